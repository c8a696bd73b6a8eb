"""Every kernel on every instruction set against the reference, bit for bit, named by hazard."""

from __future__ import annotations

import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from zeropoint import QTensor, functional, kernels

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
            kernels._activate_from_environment()
        assert kernels.active_isa() == name


@pytest.mark.parametrize("name", ["mmx", "AVX2", "avx512vnni ", "neon", "none"])
def test_environment_variable_with_a_name_not_available_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name not in kernels.available_isas()
    with kernels.force_isa(kernels.active_isa()):
        monkeypatch.setenv("ZEROPOINT_ISA", name)
        with pytest.warns(RuntimeWarning, match=f"ZEROPOINT_ISA={name!r} is not available here"):
            kernels._activate_from_environment()
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


# ---- overflow of int32 --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dynamic", "static", "integer", "quantized"])
@pytest.mark.parametrize(
    ("k", "weight_zero"),
    [(65_793, 0), (65_794, 0), (70_001, 0), (33_025, 127), (33_026, 127), (33_026, -128)],
)
def test_k_around_the_bound_of_int32(mode: str, k: int, weight_zero: int) -> None:
    n = 67
    integers = torch.full((n, k), -128 if weight_zero >= 0 else 127, dtype=torch.int8)
    integers[1::3] = 127  # the other end
    integers[2::3] = torch.randint(-128, 128, (len(integers[2::3]), k), dtype=torch.int8)
    for i in range(n):  # the first output is the most extreme, the others less and less
        integers[i, k - i * k // (2 * n) :] = 0
    zero_point = torch.full((n,), weight_zero, dtype=torch.int32)
    w = QTensor(integers, torch.full((n,), 2.0**-12), zero_point, 0)
    x = torch.ones(4, k)
    x[1] = -1.0  # zero point 255, integers 0
    x[2] = torch.rand(k) - 0.5
    x[3, ::2] = -1.0
    case = Case(mode, x, w, torch.randn(n), 1 / 255, 0, 20.0, 100)
    largest = 255 * int((integers[0, 0].int() - weight_zero).abs()) * k
    assert (largest > 2**31) == (k not in (65_793, 33_025))
    if mode in INTEGER_MODES:
        case.x = torch.full((4, k), 255, dtype=torch.uint8)
        case.x[1:] = torch.randint(0, 256, (3, k), dtype=torch.uint8)
        assert len(case.expected().unique()) > 10
    check(case, f"k={k}")
    if mode in INTEGER_MODES:
        case.x = (case.x.int() - 128).to(torch.int8)
        case.zero_point, case.out_zero_point = -128, -5
        check(case, f"k={k} int8")


# ---- one answer ---------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("shape", [(1, 512, 700), (5, 300, 300), (70, 257, 130), (200, 128, 64)])
def test_thread_count_does_not_matter(mode: str, shape: tuple[int, int, int]) -> None:
    before = torch.get_num_threads()
    case = make(mode, *shape)
    expected = case.expected()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for isa in each_isa():
                assert_same_bits(case.compute(), expected, f"{isa}, {threads} threads")
    finally:
        torch.set_num_threads(before)


@modes
def test_a_row_alone_is_the_row_in_a_batch(mode: str) -> None:
    case = make(mode, 40, 131, 70, kinds=HAZARDS)
    whole, rows = case.expected(), case.x
    for isa in each_isa():
        for first, last in [(i, i + 1) for i in range(40)] + [(3, 12), (7, 40)]:
            case.x = rows[first:last]
            assert_same_bits(case.compute(), whole[first:last], f"{isa} rows {first}:{last}")


@modes
def test_flush_to_zero_of_the_caller_does_not_matter(mode: str) -> None:
    case = make(mode, 12, 70, 40, kinds=("denormal", "tiny", "gaussian"))
    case.bias = torch.randn(40) * 1e-40
    if mode == "quantized":
        case.out_scale = 2.0**127  # its reciprocal is denormal
        case.bias = torch.full((40,), 3e38)
    expected = case.expected()
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        assert float(torch.tensor(2.0**-126) / 2) == 0.0
        got = {isa: case.compute() for isa in each_isa() if isa != kernels.REFERENCE}
    finally:
        torch.set_flush_denormal(False)
    for isa, y in got.items():
        assert_same_bits(y, expected, isa)


@modes
def test_python_threads_at_once(mode: str) -> None:
    cases = [make(mode, m, 300, n, seed=m) for m, n in ((1, 70), (3, 260), (40, 64), (100, 130))]
    expected = [case.expected() for case in cases]
    for isa in each_isa():
        for case in cases:
            case.weight._packed = None  # the threads pack at once, too

        def work(i: int, isa: str = isa) -> None:
            for _ in range(8):
                j = i % len(cases)
                assert_same_bits(cases[j].compute(), expected[j], isa)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


# ---- packing ------------------------------------------------------------------------------------


@pytest.mark.skipif(kernels._core is None, reason="packing needs the core")
@given(
    n=st.integers(0, 140),
    k=st.integers(0, 140),
    dtype=st.sampled_from(BYTES),
    seed=st.integers(0, 2**32),
)
def test_unpack_is_the_inverse_of_packing(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    w = weights(torch.Generator().manual_seed(seed), n, k, dtype, zero_points=True)
    assert_same_bits(kernels.unpack(w), w.int_repr())


EDITS = {
    "integers": lambda w: w.int_repr().bitwise_not_(),
    "one integer": lambda w: w.int_repr()[3, 4].add_(99),
    "scale": lambda w: w.scale.mul_(1.5),
    "zero point": lambda w: w.zero_point.add_(3),
    "through a view": lambda w: w.int_repr().T[1:20].neg_(),
}


@modes
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_changed_weight_is_packed_again(mode: str, edit: str, context: type) -> None:
    for isa in each_isa():
        case = make(mode, 4, 50, 30)
        before = case.compute()
        with context():
            EDITS[edit](case.weight)
        y = case.compute()
        assert_same_bits(y, case.expected(), isa)
        assert not torch.equal(y, before)


def test_packing_is_remembered() -> None:
    for isa in each_isa():
        if isa == kernels.REFERENCE:
            pytest.skip("packing needs the core")
        w = make("dynamic", 1, 8, 8).weight
        first = kernels.packed(w)
        functional.linear_dynamic(torch.ones(1, 8), w)
        assert kernels.packed(w) is first
        w.scale.mul_(1)
        assert kernels.packed(w) is not first


@modes
def test_guards_around_the_output(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes before and after what a kernel writes stay as they were."""
    margin = 256
    buffers: list[torch.Tensor] = []

    def guarded(
        like: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any
    ) -> torch.Tensor:
        dtype = dtype or like.dtype
        shape = torch.Size(size if size and isinstance(size[0], int) else size[0])
        count = shape.numel() * dtype.itemsize
        buffers.append(torch.full((margin + count + margin,), 0xA5, dtype=torch.uint8))
        return buffers[-1][margin : margin + count].view(dtype).view(shape)

    for dtype in (torch.float32, torch.bfloat16) if mode in FLOAT_MODES else BYTES:
        for m, k, n in ((1, 70, 1), (3, 64, 17), (7, 65, 63), (20, 33, 65), (33, 9, 130)):
            case = make(mode, m, k, n, dtype=dtype)
            expected = case.expected()
            for isa in each_isa():
                if isa == kernels.REFERENCE:
                    continue
                for _ in ("while it is packed", "by the short way"):
                    buffers.clear()
                    with monkeypatch.context() as patch:
                        patch.setattr(torch.Tensor, "new_empty", guarded)
                        got = case.compute()
                    assert_same_bits(got, expected, isa)
                    assert buffers, "the output was not taken from new_empty"
                    for buffer in buffers:
                        assert bool((buffer[:margin] == 0xA5).all()), isa
                        assert bool((buffer[-margin:] == 0xA5).all()), isa
