"""``explain``: quantize values and keep what happens to each of them on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..affine import quantize_per_channel, quantize_per_tensor, quantize_to_spec
from ..modules import QuantizedLinear
from ..spec import ACTIVATION_UINT8, WEIGHT_INT8, PerChannel, QuantSpec
from ..tensor import QTensor, broadcastable
from .numbers import SHOWN, Explanation, Grid, Totals, Value


def explain(
    values: Tensor | Sequence[Any] | QTensor | nn.Linear | QuantizedLinear,
    spec: QuantSpec | None = None,
    *,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor | None = None,
    channel: int | None = None,
    name: str = "",
) -> Explanation:
    """Show what a scale and a zero point do: ``real = scale * (q - zero_point)``.

    A larger scale means coarser steps; real zero is exactly ``zero_point``.

    Args:
        values: finite numbers of any shape, taken as float32; or a ``Linear``, for its weights; or
            a :class:`QTensor` or :class:`QuantizedLinear`, of which only the integers are known.
        spec: which integers; by default unsigned 8 bits with a zero point
            (:data:`ACTIVATION_UINT8`), of a ``Linear`` :data:`WEIGHT_INT8`.
        scale: size of one step; by default chosen from the values. Per channel, a vector.
        zero_point: the integer that stands for real zero, given with ``scale`` only; by default
            the fixed one of a symmetric spec, or such that the range begins at the smallest value.
        channel: of a tensor with many scales, the index along its axis that is shown; by default
            the one with the coarsest steps.
        name: what the values are, for the heading.

    Returns:
        An :class:`Explanation`.

    Raises:
        TypeError: values of another type.
        ValueError: no values, NaN or Inf; a spec, scale, zero point or channel that does not fit.

    >>> e = explain([-1.0, 0.0, 2.5], scale=0.5, zero_point=10)
    >>> [v.integer for v in e.values], [v.error for v in e.values]
    ([8, 10, 15], [0.0, 0.0, 0.0])
    >>> explain([-1.0, 0.0, 2.5], scale=1.0, zero_point=10).values[2]
    Value(index=(2,), real=2.5, position=12.5, integer=12, dequantized=2.0, error=-0.5, bound=0.5, \
clipped=False)
    """
    if isinstance(values, QuantizedLinear):
        values = values.weight_qtensor()
    if isinstance(values, QTensor):
        for option, given in (("spec", spec), ("scale", scale), ("zero_point", zero_point)):
            if given is not None:
                raise ValueError(f"{option} must not be given with integers, which have their own")
        if not values.numel():
            raise ValueError("values must hold at least one number, got none")
        return _of(values, values.spec, None, False, channel, name)
    if isinstance(values, nn.Linear):
        values, spec = values.weight, spec or WEIGHT_INT8
    x = _floats(values)
    spec = spec or ACTIVATION_UINT8
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point must be given with scale, or neither of them")
        return _of(quantize_to_spec(x, spec), spec, x, True, channel, name)
    return _of(_quantize(x, spec, scale, zero_point), spec, x, False, channel, name)


def _floats(values: Any) -> Tensor:
    try:
        x = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "values must be numbers, a tensor, a Linear, a QTensor or a QuantizedLinear, got "
            f"{type(values).__name__}"
        ) from error
    if x.is_complex() or x.is_quantized:
        raise TypeError(f"values must be real numbers, got {x.dtype}")
    x = x.detach().to("cpu", torch.float32)
    if not x.numel():
        raise ValueError("values must hold at least one number, got none")
    if not bool(x.isfinite().all()):
        at = tuple((~x.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"values must be finite in float32, got {x[at].item()} at index {at}")
    return x


def _quantize(
    x: Tensor, spec: QuantSpec, scale: float | Tensor, zero_point: int | Tensor | None
) -> QTensor:
    step = torch.as_tensor(scale, dtype=torch.float32)
    if zero_point is None:
        zero_point = torch.full_like(step, spec.zero_point_if_symmetric, dtype=torch.int32)
        if not spec.symmetric and step.ndim == 0 and float(step) > 0:
            start = torch.round(-x.min().clamp(max=0) / step) + spec.qmin
            zero_point = start.clamp(spec.qmin, spec.qmax).to(torch.int32)
    if isinstance(spec.granularity, PerChannel):
        axis = spec.granularity.axis
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis {axis} is not an axis of values of shape {tuple(x.shape)}")
        size = x.shape[axis]
        zero_points = torch.as_tensor(zero_point).expand(size)
        return quantize_per_channel(x, step.expand(size), zero_points, axis, spec.dtype)
    return quantize_per_tensor(x, step, zero_point, spec.dtype)


def _of(
    q: QTensor,
    spec: QuantSpec,
    reals: Tensor | None,
    chosen: bool,
    channel: int | None,
    name: str,
) -> Explanation:
    scale, zero_point = q.scale.cpu(), q.zero_point.cpu()
    integers = q.int_repr().cpu().to(torch.int32)

    def grid(at: int | None) -> Grid:
        s, z = (scale, zero_point) if at is None else (scale[at], zero_point[at])
        label = "" if at is None else f"channel {at}"
        return Grid(float(s), int(z), spec.qmin, spec.qmax, label)

    wide_scale, wide_zero_point = scale, zero_point
    others: tuple[Grid, ...] = ()
    shown, shown_reals = integers, reals
    if q.axis is None:
        if channel is not None:
            raise ValueError(f"channel {channel} must not be given for values with one scale")
        at = None
    else:
        order = scale.argsort(stable=True).tolist()
        at = order[-1] if channel is None else channel
        if not -len(order) <= at < len(order):
            raise ValueError(f"channel must be below {len(order)}, got {channel}")
        at %= len(order)
        others = tuple(
            grid(n) for n in dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
        )
        wide_scale, wide_zero_point = (
            broadcastable(t, q.axis, q.ndim) for t in (scale, zero_point)
        )
        shown = integers.select(q.axis, at)
        shown_reals = None if reals is None else reals.select(q.axis, at)
    focus = grid(at)
    totals = _totals(integers, reals, wide_scale, wide_zero_point, spec, shown)
    return Explanation(
        name=name,
        shape=tuple(q.shape),
        spec=spec,
        chosen=chosen,
        grid=focus,
        others=others if len(others) > 1 else (),
        grids=scale.numel(),
        values=_values(focus, shown, shown_reals, None if at is None else (q.axis or 0, at)),
        totals=totals,
        reals=shown_reals,
        integers=shown,
    )


def _values(
    grid: Grid, integers: Tensor, reals: Tensor | None, fixed: tuple[int, int] | None
) -> tuple[Value, ...]:
    flat = integers.reshape(-1)
    dequantized = (flat - grid.zero_point).float() * grid.scale
    chosen = list(range(len(flat)))
    if len(chosen) > SHOWN:
        order = (flat if reals is None else reals.reshape(-1)).argsort(stable=True)
        steps = [round(i * (len(order) - 1) / (SHOWN - 1)) for i in range(SHOWN)]
        chosen = order[steps].tolist()
    values = []
    for n in chosen:
        q = int(flat[n])
        index = [int(i) for i in np.unravel_index(n, integers.shape)] if integers.ndim else []
        if fixed is not None:
            index.insert(*fixed)
        back = float(dequantized[n])
        real = None if reals is None else float(reals.reshape(-1)[n])
        values.append(
            Value(
                index=tuple(index),
                real=real,
                position=None if real is None else real / grid.scale + grid.zero_point,
                integer=q,
                dequantized=back,
                error=None if real is None else back - real,
                bound=grid.scale / 2 if real is None else grid.bound(real),
                clipped=real is not None and grid.clips(real),
            )
        )
    return tuple(values)


def _totals(
    integers: Tensor,
    reals: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    shown: Tensor,
) -> Totals:
    n, used = integers.numel(), len(shown.unique())
    s, z = scale.double(), zero_point.double()
    expected = math.sqrt(float((s.square() / 12).expand(integers.shape).mean()))
    if reals is None:
        return Totals(n, None, None, None, expected, None, used)
    x = reals.double()
    error = ((integers - zero_point).float() * scale).double() - x  # as rounded to float32
    half = s / 2
    outside = (x < s * (spec.qmin - z) - half) | (x > s * (spec.qmax - z) + half)
    signal, noise = float(x.square().sum()), float(error.square().sum())
    sqnr = math.inf if noise == 0 else -math.inf
    if noise and signal:
        sqnr = 10 * (math.log10(signal) - math.log10(noise))
    return Totals(
        elements=n,
        clipped=int(outside.sum()),
        largest_error=float(error.abs().max()),
        rms_error=math.sqrt(noise / n),
        expected_rms=expected,
        sqnr_db=sqnr,
        integers_used=used,
    )
