"""``explain``: quantize values and keep what happens to each of them on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..affine import (
    quantize_per_channel,
    quantize_per_group,
    quantize_per_tensor,
    quantize_to_spec,
)
from ..layout import broadcastable, expand_groups
from ..modules import QuantizedLinear
from ..spec import ACTIVATION_UINT8, WEIGHT_INT8, PerChannel, PerGroup, QuantSpec
from ..tensor import QTensor
from .numbers import SHOWN, Explanation, Grid, Totals, Value


def explain(
    values: Tensor | Sequence[Any] | QTensor | nn.Linear | QuantizedLinear,
    spec: QuantSpec | None = None,
    *,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor | None = None,
    channel: int | None = None,
    group: int | None = None,
    name: str = "",
) -> Explanation:
    """Show what a scale and a zero point do: ``real = scale * (q - zero_point)``.

    A larger scale means coarser steps; real zero is exactly ``zero_point``.

    Args:
        values: finite numbers of any shape, taken as float32; or a ``Linear``, for its weights; or
            a :class:`QTensor` or :class:`QuantizedLinear`, of which only the integers are known.
        spec: which integers; by default unsigned 8 bits with a zero point
            (:data:`ACTIVATION_UINT8`), of a ``Linear`` :data:`WEIGHT_INT8`.
        scale: size of one step; by default chosen from the values. Per channel, a vector, per group
            as :func:`quantize_per_group`; or one for all.
        zero_point: the integer that stands for real zero, given with ``scale`` only; by default
            the fixed one of a symmetric spec, or such that the range begins at the smallest value.
        channel: of a tensor with many scales, the index along its axis that is shown, of one with
            groups the row; by default the one with the coarsest steps.
        group: which group of the row; by default the one with the coarsest steps.
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
        return _of(values, values.spec, None, False, (channel, group), name)
    if isinstance(values, nn.Linear):
        values, spec = values.weight, spec or WEIGHT_INT8
    x = _floats(values)
    spec = spec or ACTIVATION_UINT8
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point must be given with scale, or neither of them")
        return _of(quantize_to_spec(x, spec), spec, x, True, (channel, group), name)
    return _of(_quantize(x, spec, scale, zero_point), spec, x, False, (channel, group), name)


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
    zero_points = torch.as_tensor(zero_point)
    if isinstance(spec.granularity, PerGroup):
        if not x.ndim:
            raise ValueError("values must have a dimension to be grouped along, got one number")
        size = spec.granularity.size
        shape = (*x.shape[:-1], spec.granularity.count(x.shape[-1]))
        step = step.to(spec.scale_dtype).expand(shape)
        return quantize_per_group(
            x, step, zero_points.expand(shape), size, spec.dtype, bits=spec.bits
        )
    if isinstance(spec.granularity, PerChannel):
        axis = spec.granularity.axis
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis {axis} is not an axis of values of shape {tuple(x.shape)}")
        n = x.shape[axis]
        return quantize_per_channel(
            x, step.expand(n), zero_points.expand(n), axis, spec.dtype, bits=spec.bits
        )
    return quantize_per_tensor(x, step, zero_points, spec.dtype, bits=spec.bits)


def _of(
    q: QTensor,
    spec: QuantSpec,
    reals: Tensor | None,
    chosen: bool,
    where: tuple[int | None, int | None],
    name: str,
) -> Explanation:
    scale, zero_point = q.scale.cpu().float(), q.zero_point.cpu().to(torch.int32)
    integers = q.int_repr().cpu().to(torch.int32)

    def grid(at: tuple[int, ...]) -> Grid:
        return Grid(float(scale[at]), int(zero_point[at]), spec.qmin, spec.qmax, _label(q, at))

    at = _place(q, scale, *where)
    order = scale.reshape(-1).argsort(stable=True).tolist()
    ends = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    others = [grid(_index(n, scale)) for n in ends] if len(ends) > 1 else []
    part: tuple[slice, ...] = (slice(None),) * q.ndim
    wide_scale, wide_zero_point = scale, zero_point
    if q.group_size is not None:
        g, size = at[-1], q.group_size
        part = (*(slice(i, i + 1) for i in at[:-1]), slice(g * size, (g + 1) * size))
        wide_scale, wide_zero_point = (
            expand_groups(t, size, q.shape[-1]) for t in (scale, zero_point)
        )
    elif q.axis is not None:
        part = (*part[: q.axis], slice(at[0], at[0] + 1), *part[q.axis + 1 :])
        wide_scale, wide_zero_point = (
            broadcastable(t, q.axis, q.ndim) for t in (scale, zero_point)
        )
    shown = integers[part]
    shown_reals = None if reals is None else reals[part]
    focus = grid(at)
    return Explanation(
        name=name,
        shape=tuple(q.shape),
        spec=spec,
        chosen=chosen,
        grid=focus,
        others=tuple(others),
        grids=scale.numel(),
        values=_values(focus, shown, shown_reals, [s.start or 0 for s in part]),
        totals=_totals(integers, reals, wide_scale, wide_zero_point, spec, shown),
        reals=shown_reals if at == () or shown_reals is None else shown_reals.reshape(-1),
        integers=shown if at == () else shown.reshape(-1),
    )


def _place(q: QTensor, scale: Tensor, channel: int | None, group: int | None) -> tuple[int, ...]:
    """The index of the scale that is shown: the coarsest among those that are asked for."""
    rows = 0 if not scale.ndim else scale.shape[0]
    if channel is not None and (not scale.ndim or scale.ndim > 2):
        raise ValueError(f"channel must be None for values without channels, got {channel}")
    if group is not None and q.group_size is None:
        raise ValueError(f"group must be None for values without groups, got {group}")
    groups = scale.shape[-1] if q.group_size is not None else 0
    for name, given, size in (("channel", channel, rows), ("group", group, groups)):
        if given is not None and not 0 <= given < size:
            raise ValueError(f"{name} must be from 0 to {size - 1}, got {given}")
    asked = torch.full_like(scale, -torch.inf)
    part: list[int | slice] = [slice(None)] * scale.ndim
    if channel is not None:
        part[0] = channel
    if group is not None:
        part[-1] = group
    asked[tuple(part)] = scale[tuple(part)]
    return _index(int(asked.argmax()), scale)


def _index(n: int, t: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(n, t.shape)) if t.ndim else ()


def _label(q: QTensor, at: tuple[int, ...]) -> str:
    if q.group_size is None:
        return f"channel {at[0]}" if at else ""
    rows = ", ".join(map(str, at[:-1]))
    return (f"channel {rows}, " if rows else "") + f"group {at[-1]}"


def _values(
    grid: Grid, integers: Tensor, reals: Tensor | None, start: list[int]
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
        index = (a + b for a, b in zip(start, _index(n, integers), strict=True))
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
