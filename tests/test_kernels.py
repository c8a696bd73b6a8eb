"""Every kernel on every instruction set against the reference, bit for bit, by hazard."""

from __future__ import annotations

import math
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bits import assert_same_bits
from kernel_cases import (
    BYTES,
    FLOAT_MODES,
    FLOATS,
    HAZARDS,
    INTEGER_MODES,
    MODES,
    Case,
    activations,
    check,
    each_isa,
    make,
    weights,
)
from zeropoint import QTensor, kernels

modes = pytest.mark.parametrize("mode", MODES)


def test_the_core_is_there_where_it_is_required() -> None:
    if os.environ.get("ZEROPOINT_REQUIRE_CORE") != "1":
        pytest.skip("ZEROPOINT_REQUIRE_CORE is not 1")
    assert kernels.core_error() is None
    assert kernels.active_isa() != kernels.REFERENCE or os.environ.get("ZEROPOINT_ISA")
    assert "portable" in kernels.available_isas()


# ---- choosing an instruction set ----------------------------------------------------------------


def test_reference_is_the_last_of_the_available() -> None:
    names = kernels.available_isas()
    assert names[-1] == kernels.REFERENCE
    assert len(set(names)) == len(names)
    assert kernels.active_isa() in names


def test_forcing_is_undone_and_an_unknown_name_refused() -> None:
    before = kernels.active_isa()
    x, w = torch.ones(1), QTensor(torch.ones(1, 1, dtype=torch.int8), 1.0)

    def force_and_fail() -> None:
        with kernels.force_isa(kernels.REFERENCE):
            assert kernels.active_isa() == kernels.REFERENCE
            assert not kernels.usable(x, w)
            raise KeyError

    with pytest.raises(KeyError):
        force_and_fail()
    assert kernels.active_isa() == before
    with pytest.raises(ValueError, match=r"isa must be one of .*, got 'mmx'"):
        kernels.force_isa("mmx").__enter__()
    assert kernels.active_isa() == before


@pytest.mark.parametrize("name", kernels.available_isas())
def test_environment_variable_chooses_an_available_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels.force_isa(kernels.active_isa()):  # put back afterwards
        monkeypatch.setenv("ZEROPOINT_ISA", name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.activate_from_environment()
        assert kernels.active_isa() == name


@pytest.mark.parametrize("name", ["mmx", "AVX2", "avx512vnni ", "neon", "none"])
def test_environment_variable_with_a_name_not_available_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name not in kernels.available_isas()
    with kernels.force_isa(kernels.active_isa()):
        monkeypatch.setenv("ZEROPOINT_ISA", name)
        with pytest.warns(RuntimeWarning, match=f"ZEROPOINT_ISA={name!r} is not available here"):
            kernels.activate_from_environment()
        assert kernels.active_isa() == kernels.available_isas()[0]


# ---- bits ---------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1), (1, 64, 64), (1, 63, 1), (1, 768, 70), (2, 65, 17), (3, 4, 16), (4, 5, 65),
    (5, 1, 129), (6, 130, 15), (7, 3, 31), (8, 128, 128), (13, 67, 33), (16, 256, 64),
    (17, 257, 80), (25, 66, 47), (33, 12, 79), (40, 190, 63), (200, 300, 70),
]  # fmt: skip


@modes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shape(mode: str, shape: tuple[int, int, int]) -> None:
    for dtype in (torch.float32,) if mode in FLOAT_MODES else BYTES:
        case = make(mode, *shape, dtype=dtype)
        if mode != "weight-only" and min(shape) > 3:  # not degenerate
            assert len(case.expected().unique()) > 5
        check(case, str(shape))


@modes
@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 5), (3, 5, 0), (0, 0, 0), (1, 0, 1)])
def test_size_zero(mode: str, shape: tuple[int, int, int]) -> None:
    for bias in (True, False):
        check(make(mode, *shape, bias=bias))


@pytest.mark.parametrize("mode", ["dynamic", "static", "integer", "quantized"])
def test_rows_in_several_blocks_of_cache(mode: str) -> None:
    check(make(mode, 300, 16384, 5))


@settings(max_examples=100)
@given(data=st.data())
@modes
def test_any_input(mode: str, data: st.DataObject) -> None:
    draw = data.draw
    m = draw(st.sampled_from([1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 31, 33, 40]))
    k = draw(st.one_of(st.integers(0, 20), st.integers(0, 270)))
    n = draw(st.one_of(st.integers(0, 20), st.integers(0, 200)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    extreme = draw(st.booleans())
    w = weights(
        g, n, k, draw(st.sampled_from(BYTES)), draw(st.booleans()), draw(st.booleans()), extreme
    )
    bias = draw(st.sampled_from([None, *FLOATS]))
    b = None if bias is None else (torch.randn(n, generator=g) * 10).to(bias)
    scale = 2.0 ** draw(st.integers(-126, 126)) * 1.3 if extreme else 0.02
    if mode in FLOAT_MODES:
        x = activations(g, m, k, draw(st.sampled_from(FLOATS)), HAZARDS)
        check(Case(mode, x, w, b, scale, draw(st.integers(0, 255))))
        return
    dtype = draw(st.sampled_from(BYTES))
    info = torch.iinfo(dtype)
    points = st.one_of(st.sampled_from([info.min, info.max]), st.integers(info.min, info.max))
    x = torch.randint(info.min, info.max + 1, (m, k), generator=g, dtype=torch.int32).to(dtype)
    out_scale = 2.0 ** draw(st.integers(-126, 126)) * 1.7 if extreme else 0.1
    check(Case(mode, x, w, b, scale, draw(points), out_scale, draw(points)))


@pytest.mark.parametrize("kind", HAZARDS)
@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_row_of_a_kind(mode: str, kind: str) -> None:
    for dtype in FLOATS:
        check(make(mode, 7, 75, 35, dtype=dtype, kinds=(kind,)), f"{kind} {dtype}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("m", [3, 20])
def test_a_bad_row_touches_no_other(mode: str, m: int, bad: float) -> None:
    for column in (0, 17, 63, 68):
        case = make(mode, m, 69, 35)
        clean = case.expected()
        case.x[1, column] = bad
        others = [i for i in range(m) if i != 1]
        for isa in each_isa():
            y = case.compute()
            assert_same_bits(y[others], clean[others], isa)
            clamps = mode == "static" and math.isinf(bad)
            assert bool(y[1].isfinite().all()) if clamps else not bool(y[1].isfinite().any()), isa
        check(case)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("mode", INTEGER_MODES)
def test_zero_points_at_the_ends(mode: str, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    for zero_point in (info.min, info.max):
        for out_zero_point in (info.min, info.max):
            case = make(mode, 9, 133, 67, dtype=dtype)
            case.zero_point, case.out_zero_point = zero_point, out_zero_point
            case.out_scale = 20.0
            check(case)


@pytest.mark.parametrize("dtype", BYTES)
def test_output_that_is_nan_becomes_the_lowest_integer(dtype: torch.dtype) -> None:
    case = make("quantized", 5, 8, 20, dtype=dtype)
    assert case.bias is not None
    case.bias[::3] = float("nan")
    case.bias[1::3] = float("inf")
    case.bias[2::3] = -float("inf")
    info = torch.iinfo(dtype)
    assert case.expected()[0, :3].tolist() == [info.min, info.max, info.min]
    check(case)


@pytest.mark.parametrize("dtype", BYTES)
def test_output_halfway_between_integers(dtype: torch.dtype) -> None:
    case = make("quantized", 9, 40, 70, dtype=dtype)
    ones = torch.randint(-1, 2, (70, 40), dtype=torch.int8)
    case.weight, case.bias = QTensor(ones, 0.5), torch.randint(-9, 9, (70,)) * 0.5
    case.scale, case.out_scale, case.zero_point = 1.0, 1.0, 3
    check(case)


@modes
@pytest.mark.parametrize("weight_dtype", BYTES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("zero_points", [True, False])
def test_kinds_of_weights(
    mode: str, weight_dtype: torch.dtype, per_channel: bool, zero_points: bool
) -> None:
    for extreme in (False, True):
        g = torch.Generator().manual_seed(3)
        w = weights(g, 69, 71, weight_dtype, per_channel, zero_points, extreme)
        for m in (2, 21):
            check(make(mode, m, 71, 69, weight=w))


@modes
@pytest.mark.parametrize("m", [2, 21])
def test_strides(mode: str, m: int) -> None:
    k, n = 70, 33
    for dtype in (torch.float32, torch.bfloat16) if mode in FLOAT_MODES else BYTES:
        case = make(mode, m, k, n, dtype=dtype)
        x, expected = case.x, case.expected()
        wide = torch.full((m, k + 9), 77).to(dtype)
        wide[:, 4 : 4 + k] = x
        tall = torch.full((2 * m, k), 77).to(dtype)
        tall[::2] = x
        flat = torch.zeros(m * k + 1).to(dtype)
        flat[1:] = x.flatten()
        layouts = {
            "sliced": wide[:, 4 : 4 + k],
            "every other row": tall[::2],
            "transposed": x.T.contiguous().T,
            "every other column": x.repeat_interleave(2, 1)[:, ::2],
            "off alignment": flat[1:].view(m, k),
            "three dimensions": x.view(m, 1, k),
            "sliced in three": wide[:, 4 : 4 + k].unsqueeze(0),
            "permuted": x.view(1, m, k).permute(1, 0, 2),
        }
        for name, layout in layouts.items():
            case.x = layout
            shape = (*layout.shape[:-1], n)
            for isa in each_isa():
                assert_same_bits(case.compute(), expected.reshape(shape), f"{isa} {name}")
        case.x = x[:1].expand(m, k)
        check(case, "expanded")
        case.x = x[0]
        check(case, "one dimension")


@modes
def test_strided_weight_scale_and_bias(mode: str) -> None:
    g = torch.Generator().manual_seed(5)
    base = weights(g, 45, 62, zero_points=True)
    case = make(mode, 5, 31, 90, bias=False)
    case.weight = QTensor(
        base.int_repr().T[::2].T.reshape(45, 31).repeat(2, 1).T.contiguous().T,
        base.scale[:1].expand(90),
        base.zero_point.repeat_interleave(4)[::2],
        0,
    )
    case.bias = torch.randn(180, generator=g, dtype=torch.float64)[::2]
    assert not case.weight.int_repr().is_contiguous()
    check(case)
