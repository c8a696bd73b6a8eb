from __future__ import annotations

import dataclasses

import pytest
import torch

from zeropoint.spec import (
    ACTIVATION_UINT8,
    WEIGHT_INT4,
    WEIGHT_INT8,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    int4,
)


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax", "dtype", "middle"),
    [
        (QuantSpec(), -128, 127, torch.int8, 0),
        (QuantSpec(signed=False), 0, 255, torch.uint8, 128),
        (WEIGHT_INT8, -128, 127, torch.int8, 0),
        (ACTIVATION_UINT8, 0, 255, torch.uint8, 128),
        (WEIGHT_INT4, 0, 15, torch.uint8, 8),
        (QuantSpec(4), -8, 7, torch.int8, 0),
        (QuantSpec(2), -2, 1, torch.int8, 0),
        (QuantSpec(7, signed=False), 0, 127, torch.uint8, 64),
    ],
)
def test_integers_of_a_spec(
    spec: QuantSpec, qmin: int, qmax: int, dtype: torch.dtype, middle: int
) -> None:
    assert (spec.qmin, spec.qmax, spec.dtype) == (qmin, qmax, dtype)
    assert spec.zero_point_if_symmetric == middle
    assert spec.qmax - spec.qmin == 2**spec.bits - 1


def test_named_specs() -> None:
    assert QuantSpec(8, True, True, PerChannel(0)) == WEIGHT_INT8
    assert QuantSpec(8, False, False, PerTensor()) == ACTIVATION_UINT8
    assert QuantSpec(4, False, False, PerGroup(32), torch.bfloat16) == WEIGHT_INT4 == int4()
    assert int4(None, symmetric=True) == QuantSpec(4, True, True, PerChannel(0))
    assert int4(128, scale_dtype=torch.float16).scale_dtype == torch.float16


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
def test_unsupported_width_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be from 2 to 8, got {bits}"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("bits", ["8", None, True, 4.0])
def test_width_must_be_an_int(bits: object) -> None:
    with pytest.raises(TypeError, match="bits must be an int"):
        QuantSpec(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_scales_of_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"scale_dtype must be one of .*, got torch"):
        QuantSpec(granularity=PerGroup(8), scale_dtype=dtype)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_narrow_scales_are_for_groups(granularity: PerTensor | PerChannel) -> None:
    with pytest.raises(ValueError, match=r"must be torch.float32 unless per group"):
        QuantSpec(granularity=granularity, scale_dtype=torch.bfloat16)


def test_scale_dtype_must_be_a_dtype() -> None:
    with pytest.raises(TypeError, match=r"scale_dtype must be a torch\.dtype, got 'bfloat16'"):
        QuantSpec(granularity=PerGroup(8), scale_dtype="bfloat16")  # type: ignore[arg-type]


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


@pytest.mark.parametrize("size", [32.0, True, None, "32"])
def test_group_size_must_be_an_int(size: object) -> None:
    with pytest.raises(TypeError, match="size must be an int"):
        PerGroup(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -32])
def test_group_size_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
        PerGroup(size)


def test_count_of_groups_of_any_length() -> None:
    assert [PerGroup(4).count(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_specs_are_frozen_values() -> None:
    spec = QuantSpec(granularity=PerChannel(1))
    assert spec == QuantSpec(granularity=PerChannel(1))
    assert spec != QuantSpec(granularity=PerChannel(0))
    assert len({spec, QuantSpec(granularity=PerChannel(1)), QuantSpec()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 4  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.granularity.axis = 0  # type: ignore[misc, union-attr]
