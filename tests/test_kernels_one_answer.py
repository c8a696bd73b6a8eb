"""Sums beyond int32, threads, batches, packing: one answer, by every kernel, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bits import assert_same_bits
from kernel_cases import (
    BYTES,
    FLOAT_MODES,
    HAZARDS,
    INTEGER_MODES,
    MODES,
    Case,
    check,
    each_isa,
    make,
    weights,
)
from zeropoint import QTensor, functional, kernels

modes = pytest.mark.parametrize("mode", MODES)


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


@pytest.mark.skipif(kernels.core is None, reason="packing needs the core")
@given(
    n=st.integers(0, 140),
    k=st.integers(0, 140),
    dtype=st.sampled_from(BYTES),
    seed=st.integers(0, 2**32),
)
def test_unpack_is_the_inverse_of_packing(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    w = weights(torch.Generator().manual_seed(seed), n, k, dtype, zero_points=True)
    assert_same_bits(kernels.prepack(w).unpack()[0].int_repr(), w.int_repr())


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
