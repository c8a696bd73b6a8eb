from __future__ import annotations

import dataclasses

import pytest
import torch

from zeropoint import ACTIVATION_UINT8, WEIGHT_INT8, PerChannel, PerTensor, QuantSpec


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax", "dtype", "middle"),
    [
        (QuantSpec(), -128, 127, torch.int8, 0),
        (QuantSpec(signed=False), 0, 255, torch.uint8, 128),
        (WEIGHT_INT8, -128, 127, torch.int8, 0),
        (ACTIVATION_UINT8, 0, 255, torch.uint8, 128),
    ],
)
def test_integers_of_a_spec(
    spec: QuantSpec, qmin: int, qmax: int, dtype: torch.dtype, middle: int
) -> None:
    assert (spec.qmin, spec.qmax, spec.dtype) == (qmin, qmax, dtype)
    assert spec.zero_point_if_symmetric == middle
    info = torch.iinfo(spec.dtype)
    assert (info.min, info.max) == (spec.qmin, spec.qmax)


def test_named_specs() -> None:
    assert QuantSpec(8, True, True, PerChannel(0)) == WEIGHT_INT8
    assert QuantSpec(8, False, False, PerTensor()) == ACTIVATION_UINT8


@pytest.mark.parametrize("bits", [0, 4, 7, 9, 16, "8", None])
def test_unsupported_width_is_refused(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be 8, got"):
        QuantSpec(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["signed", "symmetric"])
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_flags_must_be_bool(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a bool, got {value!r}"):
        QuantSpec(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", [PerTensor, PerChannel, "per tensor", 0, None])
def test_granularity_must_be_an_object(granularity: object) -> None:
    with pytest.raises(TypeError, match="granularity must be"):
        QuantSpec(granularity=granularity)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [1.0, True, None, "0"])
def test_axis_must_be_an_int(axis: object) -> None:
    with pytest.raises(TypeError, match="axis must be an int"):
        PerChannel(axis)  # type: ignore[arg-type]


def test_specs_are_frozen_values() -> None:
    spec = QuantSpec(granularity=PerChannel(1))
    assert spec == QuantSpec(granularity=PerChannel(1))
    assert spec != QuantSpec(granularity=PerChannel(0))
    assert len({spec, QuantSpec(granularity=PerChannel(1)), QuantSpec()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 4  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.granularity.axis = 0  # type: ignore[misc, union-attr]
