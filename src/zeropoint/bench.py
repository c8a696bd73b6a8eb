"""How fast a Linear layer is on this machine, in each precision, beside torch's own.

All candidates take turns in one process, so that what disturbs one disturbs all; ratios are of
medians. Weights are used again and again, so they come from the caches as far as they fit there.
Where this machine's limits were measured, each time is also a fraction of the one that binds it.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .affine import choose_qparams
from .float_linear import Linear
from .limits import Bound, Limits
from .modules import QuantizedLinear
from .spec import ACTIVATION_UINT8

SHAPES = ((384, 1536), (768, 768), (768, 3072), (3072, 768), (4096, 4096))
"""``(in_features, out_features)`` of layers of small and middling transformers."""
ROWS = (1, 16, 128)

TORCH = ("torch float32", "torch bfloat16", "torch int8 dynamic")
OURS = ("int8-dynamic", "int8-static", "int8-weight-only")
WORK = {
    "torch float32": ("float32", 4),
    "torch bfloat16": ("bfloat16", 2),
    "torch int8 dynamic": ("int8", 1),
    "int8-dynamic": ("int8", 1),
    "int8-static": ("int8", 1),
    "int8-weight-only": ("float32", 1),
}
"""Candidate → the arithmetic it needs, and the bytes of a weight."""
REFERENCE_OPERATIONS = 2**24
"""The reference is timed only up to so many multiplications: it is slow by design."""
MIN_SQNR = 20.0
"""dB. A candidate further from float32 than this is not computing the same layer."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call over ``rounds`` turns; ``sqnr`` in dB against torch's float32."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int
    sqnr: float


@dataclass(frozen=True)
class Result:
    """One shape at one thread count: candidate → timing, in the order of the columns. A candidate
    that does not exist here is missing; :attr:`notes` says why."""

    in_features: int
    out_features: int
    rows: int
    threads: int
    timings: dict[str, Timing]
    notes: dict[str, str]
    bounds: dict[str, Bound] = field(default_factory=dict)
    """Candidate → the least time this machine would allow, where that was measured."""

    def fraction(self, name: str) -> float | None:
        """The least time possible as a fraction of the time taken; ``None`` where unknown."""
        if name not in self.timings or name not in self.bounds:
            return None
        return self.bounds[name].seconds * 1e6 / self.timings[name].median

    def ratio(self, ours: str, peer: str) -> float | None:
        """How many times faster ``ours`` is than ``peer``; ``None`` where one was not timed."""
        if ours not in self.timings or peer not in self.timings:
            return None
        return self.timings[peer].median / self.timings[ours].median

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, ratios and fractions included."""
        return asdict(self) | {
            "fractions": {n: f for n in self.timings if (f := self.fraction(n)) is not None},
            "ratios": {
                ours: {p: r for p in TORCH if (r := self.ratio(ours, p)) is not None}
                for ours in OURS
                if ours in self.timings
            },
        }


def bench(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    rows: Iterable[int] = ROWS,
    threads: Iterable[int] | None = None,
    *,
    seconds: float = 1.0,
    limits: Limits | None = None,
) -> Iterator[Result]:
    """Time every combination, one result at a time.

    Args:
        shapes: ``(in_features, out_features)`` pairs.
        rows: rows of input a call.
        threads: thread counts, set through ``torch.set_num_threads`` and restored; by default the
            present one.
        seconds: to spend on each result, about; at least 5 turns are timed whatever it says.
        limits: of this machine, by :func:`zeropoint.limits.measure` for these thread counts, to
            compare with. Ours are compared with those of the active instruction set, torch's with
            those of the best.

    Raises:
        ValueError: a number that is not positive.
    """
    shapes, rows = list(shapes), list(rows)
    before = torch.get_num_threads()
    threads = [before] if threads is None else list(threads)
    for name, numbers in (
        ("shapes", [n for shape in shapes for n in shape]),
        ("rows", rows),
        ("threads", threads),
        ("seconds", [seconds]),
    ):
        if not numbers or min(numbers) <= 0:
            raise ValueError(f"{name} must be positive numbers, got {numbers}")
    try:
        for count in threads:
            torch.set_num_threads(count)
            for k, n in shapes:
                candidates, notes = _candidates(k, n)
                for m in rows:
                    timings, more = _time(candidates, m, k, n, seconds)
                    bounds = {} if limits is None else _bounds(limits, timings, m, k, n, count)
                    yield Result(k, n, m, count, timings, notes | more, bounds)
    finally:
        torch.set_num_threads(before)


def table(results: Iterable[Result]) -> Any:
    """Results as a table for ``rich``: medians in µs with the fraction of the limit that was
    reached, then how often int8-dynamic is faster."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("K × N", "rows", "threads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in (*TORCH[:2], "torch int8", "dynamic", "static", "weight only"):
        table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for name in TORCH:
        table.add_column(
            f"× {name.removeprefix('torch ').removesuffix(' dynamic')}", justify="right"
        )
    for r in results:
        cells = [f"{r.in_features} × {r.out_features}", str(r.rows), str(r.threads)]
        for name in TORCH + OURS:
            timing, fraction = r.timings.get(name), r.fraction(name)
            cell = "–"
            if timing is not None:
                cell = f"{timing.median:,.{0 if timing.median >= 100 else 1}f}"
            cells.append(cell if fraction is None else f"{cell} {fraction:4.0%}")
        for name in TORCH:
            ratio = r.ratio("int8-dynamic", name)
            cells.append("–" if ratio is None else f"{ratio:.2f}")
        table.add_row(*cells)
    return table


def weight_sizes(shapes: Iterable[tuple[int, int]]) -> list[int]:
    """Bytes of these layers' weights in each precision, which is what limits are needed for."""
    return sorted({k * n * width for k, n in shapes for _, width in WORK.values()})


def _bounds(
    limits: Limits, timings: Iterable[str], m: int, k: int, n: int, threads: int
) -> dict[str, Bound]:
    bounds = {}
    for name in timings:
        kind, width = WORK[name]
        isa = kernels.active_isa() if name in OURS else None
        if isa != kernels.REFERENCE:
            bounds[name] = limits.bound(2 * m * k * n, k * n * width, kind, threads, isa)
    return bounds


Call = Callable[[], Tensor]
"""One call of a layer on its input."""
Candidate = Callable[[Tensor], Call]
"""Prepares the call for a float32 input."""


def _candidates(k: int, n: int) -> tuple[dict[str, Candidate], dict[str, str]]:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.utils.skip_init(Linear, k, n)  # drawn below, from a generator of its own
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
        layer.bias.copy_(torch.randn(n, generator=generator))
    weight, bias = layer.weight.detach(), layer.bias.detach()
    weight16, bias16 = weight.bfloat16(), bias.bfloat16()

    def float32(x: Tensor) -> Call:
        return lambda: F.linear(x, weight, bias)

    def bfloat16(x: Tensor) -> Call:
        x16 = x.bfloat16()
        return lambda: F.linear(x16, weight16, bias16)

    candidates: dict[str, Candidate] = {TORCH[0]: float32, TORCH[1]: bfloat16}
    notes = {}
    try:
        candidates[TORCH[2]] = _torch_int8(weight, bias)
    except Exception as error:  # torch is removing these operators; any way of lacking them counts
        notes[TORCH[2]] = f"torch {torch.__version__} does not have it ({_first_line(error)})"

    def dynamic(x: Tensor) -> Call:
        quantized = QuantizedLinear.from_linear(layer, "dynamic")
        return lambda: quantized(x)

    def static(x: Tensor) -> Call:
        qparams = choose_qparams(x.min(), x.max(), ACTIVATION_UINT8)
        quantized = QuantizedLinear.from_linear(layer, "static", input_qparams=qparams)
        return lambda: quantized(x)

    def weight_only(x: Tensor) -> Call:
        quantized = QuantizedLinear.from_linear(layer, "weight-only")
        return lambda: quantized(x)

    candidates |= dict(zip(OURS, (dynamic, static, weight_only), strict=True))
    return candidates, notes


def _torch_int8(weight: Tensor, bias: Tensor) -> Candidate:
    """torch's own int8 layer, weights per channel, prepacked, as its dynamic quantization uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, which is why this may be missing
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        q = torch.quantize_per_channel(
            weight, scale, torch.zeros_like(scale, dtype=torch.int64), 0, torch.qint8
        )
        packed = torch.ops.quantized.linear_prepack(q, bias)
        operator = torch.ops.quantized.linear_dynamic
        operator(torch.zeros(1, weight.shape[1]), packed)
    return lambda x: lambda: operator(x, packed)


def _time(
    candidates: dict[str, Candidate], m: int, k: int, n: int, seconds: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    calls: dict[str, Call] = {}
    sqnr: dict[str, float] = {}
    notes: dict[str, str] = {}
    inner: dict[str, int] = {}
    with torch.inference_mode():
        expected = candidates[TORCH[0]](x)()
        for name, candidate in candidates.items():
            slow = name in OURS and kernels.active_isa() == kernels.REFERENCE
            if slow and m * k * n > REFERENCE_OPERATIONS:
                notes[name] = "not timed: the reference computes, which is slow by design"
                continue
            call = candidate(x)
            sqnr[name] = _sqnr(expected, call())
            if not sqnr[name] >= MIN_SQNR:
                notes[name] = f"not timed: its result is wrong ({sqnr[name]:.1f} dB)"
                continue
            calls[name] = call
            # Warm up, and let a turn last some 200 µs: clock and loop cost tens of nanoseconds.
            inner[name] = 1
            while (took := _turn(call, inner[name])) < 2e-4 and inner[name] < 4096:
                inner[name] *= 2
        seen: dict[str, list[float]] = {name: [] for name in calls}
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            rounds = 0
            names = list(calls)
            while rounds < 5 or (time.perf_counter() - start < seconds and rounds < 2000):
                for name in names:
                    took = _turn(calls[name], inner[name])
                    seen[name].append(took / inner[name] * 1e6)
                # Nobody always follows the same neighbour, whose data it finds in the caches.
                names = names[1:] + names[:1] if rounds % 2 else names[::-1]
                rounds += 1
        finally:
            if collecting:
                gc.enable()
    timings = {}
    for name, times in seen.items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        timings[name] = Timing(median, low, high, rounds, sqnr[name])
    return timings, notes


def _turn(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _sqnr(expected: Tensor, got: Tensor) -> float:
    """``10 log10(‖expected‖² / ‖expected − got‖²)`` in dB, at most 200."""
    expected, got = expected.double(), got.double()
    noise = (expected - got).square().sum().clamp(min=1e-20 * float(expected.square().sum()))
    return float(10 * torch.log10(expected.square().sum() / noise))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
