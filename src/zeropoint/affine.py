"""How reals become integers: the affine map, and how its scale and zero point are chosen.

Quantize: ``q = clamp(round_half_even(x * (1/scale)) + zero_point, qmin, qmax)``, with ``1/scale``
and the product each rounded once to float32. Dequantize: ``real = scale * (q - zero_point)``.

There are two moments to add the zero point, which differ by one only where ``x/scale`` is (nearly)
halfway between integers: 0.5 with zero point 1 becomes 1 or 2. Per tensor it is added before the
rounding, in one fused operation (:func:`quantize_fused`), as ``torch.quantize_per_tensor`` does on
x86: that is what :func:`quantize_per_tensor` and static activations do. Rows quantized on the fly
and integer outputs add it afterwards (:func:`quantize`). :func:`quantize_per_channel` adds it
before the rounding, in two operations, as ``torch.quantize_per_channel``; and so does
:func:`quantize_per_group`, whose one group of all inputs is a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout, broadcastable, expand_groups, normalized
from .spec import PerChannel, PerGroup, QuantSpec, integer_range
from .tensor import SMALLEST_SCALE, QTensor
from .torch_names import SIGNED


def _dtype_is_signed(dtype: torch.dtype) -> bool:
    if dtype not in SIGNED:
        raise ValueError(
            f"dtype must be torch.int8, torch.uint8, torch.qint8 or torch.quint8, got {dtype}"
        )
    return SIGNED[dtype]


def _check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integers of ``x`` as int32: clamped, rounded half to even.

    ``scale`` (float32) and ``zero_point`` (int32) broadcast against ``x`` (converted to float32).
    NaN has no integer. Callers deal with it first; what gets here all the same becomes ``qmin``.
    """
    inverse = 1.0 / scale
    # Clamp as floats first: int conversion of a value out of range is undefined. Rounding is
    # monotonic and the bounds are integers, so that the order does not matter to the result.
    # The products come first in float32, each rounded once.
    low = (qmin - zero_point).to(torch.float32)
    high = (qmax - zero_point).to(torch.float32)
    scaled = torch.round(x.to(torch.float32) * inverse)
    return torch.minimum(torch.fmax(scaled, low), high).to(torch.int32) + zero_point


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a · b + c`` of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond 2008,
    https://doi.org/10.1109/TC.2007.70819), after which rounding to float32 is as if done once.
    """
    p, c = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # Knuth's TwoSum: s + error is the exact sum
    even = (s.view(torch.int64) & 1) == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf)
    odd = torch.nextafter(s, toward.to(s.dtype))
    inexact = s.isfinite() & (error != 0) & error.isfinite()
    return torch.where(inexact & even, odd, s).to(torch.float32)


def quantize_fused(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integers of ``x`` as int32 by a scale and zero point known beforehand, per tensor.

    ``clamp(round_half_even(fma(x, 1/scale, zero_point)), qmin, qmax)``: the rule of
    ``torch.quantize_per_tensor`` on x86, and of static activations. NaN is for callers to refuse.
    """
    shifted = fma(x.to(torch.float32), 1.0 / scale, zero_point.to(torch.float32))
    return torch.round(shifted).clamp(qmin, qmax).to(torch.int32)


def _check_no_nan(name: str, x: Tensor) -> None:
    nan = x.isnan()
    if bool(nan.any()):
        first = tuple(nan.nonzero()[0].tolist())
        raise ValueError(f"{name} holds NaN (first at index {first}), which no integer stands for")


def quantize_per_tensor(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    dtype: torch.dtype,
    *,
    bits: int = 8,
) -> QTensor:
    """Quantize with one scale and zero point, as ``torch.quantize_per_tensor``.

    Args:
        input: floating-point tensor of any shape. ±Inf clamps to the ends of the range.
        scale: size of one step, positive. Rounded to float32.
        zero_point: the integer that stands for real zero, in the range of the integers.
        dtype: ``torch.uint8``/``torch.quint8`` or ``torch.int8``/``torch.qint8``.
        bits: width of the integers, 2 to 8.

    Returns:
        A :class:`QTensor` of ``input``'s shape.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: NaN in ``input``; ``scale``, ``zero_point``, ``dtype`` or ``bits`` out of range.

    >>> quantize_per_tensor(torch.tensor([-1.0, 0.0, 2.5]), 1.0, 10, torch.quint8).int_repr()
    tensor([ 9, 10, 12], dtype=torch.uint8)
    """
    return _quantize(input, scale, zero_point, None, dtype, bits, None)


def quantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    axis: int,
    dtype: torch.dtype,
    *,
    bits: int = 8,
) -> QTensor:
    """Quantize with one scale and zero point a channel, as ``torch.quantize_per_channel``.

    Args:
        input: floating-point tensor.
        scales: ``(input.shape[axis],)``, positive. Rounded to float32.
        zero_points: integers ``(input.shape[axis],)`` in the range of the integers.
        axis: the channel axis.
        dtype: ``torch.uint8``/``torch.quint8`` or ``torch.int8``/``torch.qint8``.
        bits: width of the integers, 2 to 8.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: NaN in ``input``; another argument out of range.
    """
    return _quantize(input, scales, zero_points, axis, dtype, bits, None)


def quantize_per_group(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    group_size: int,
    dtype: torch.dtype,
    *,
    bits: int = 8,
) -> QTensor:
    """Quantize with one scale and zero point for each run of ``group_size`` entries along the last
    axis. The last group may be shorter.

    Args:
        input: floating-point tensor ``(…, size)``. ±Inf clamps to the ends of the range.
        scales: ``(…, groups)`` with ``groups = ceil(size / group_size)``, positive; float32,
            bfloat16 or float16, in which they are stored. The arithmetic is float32's.
        zero_points: integers of the same shape in the range of the integers.
        group_size: at least 1; above ``size`` it is one group.
        dtype: ``torch.uint8``/``torch.quint8`` or ``torch.int8``/``torch.qint8``.
        bits: width of the integers, 2 to 8.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: NaN in ``input``; another argument out of range or of another shape.

    >>> x, zeros = torch.tensor([[0.0, 1.0, 20.0]]), torch.zeros(1, 2, dtype=torch.int32)
    >>> quantize_per_group(x, torch.tensor([[0.5, 2.0]]), zeros, 2, torch.uint8, bits=4).int_repr()
    tensor([[ 0,  2, 10]], dtype=torch.uint8)
    """
    return _quantize(input, scales, zero_points, None, dtype, bits, group_size)


def _quantize(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    axis: int | None,
    dtype: torch.dtype,
    bits: int,
    group_size: int | None,
) -> QTensor:
    _check_float("input", x)
    signed = _dtype_is_signed(dtype)
    layout = Layout.of(x.shape, signed, bits, group_size)
    _check_no_nan("input", x)
    qmin, qmax = integer_range(bits, signed)
    storage = torch.int8 if signed else torch.uint8
    scale, zero_point, axis = normalized(layout, x.device, scale, zero_point, axis)
    x = x.detach().to(torch.float32)
    if axis is None and group_size is None:
        integers = quantize_fused(x, scale, zero_point, qmin, qmax)
    else:
        per_entry = (scale.to(torch.float32), zero_point.to(torch.float32))
        if axis is not None:
            s, z = (broadcastable(t, axis, x.ndim) for t in per_entry)
        else:
            s, z = (expand_groups(t, group_size or 1, x.shape[-1]) for t in per_entry)
        integers = torch.round(x * (1.0 / s) + z).clamp(qmin, qmax)
    return QTensor._of_plain(integers.to(storage), scale, zero_point, axis, bits, group_size)


def choose_qparams(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point for reals between ``lo`` and ``hi``.

    The range is first widened to hold zero, so that zero is exactly representable (Jacob et al.
    2018, section 2.1, https://arxiv.org/abs/1712.05877). Asymmetric: ``scale = hi/(qmax − qmin) −
    lo/(qmax − qmin)``, which cannot overflow, and ``zero_point = qmin + round(−lo · (1/scale))``.
    Symmetric: ``scale = max(|lo|, |hi|)/((qmax − qmin)//2)``. No scale falls below the smallest
    normal float32, which keeps ``1/scale`` finite for constant and denormal ranges. It is rounded
    to ``spec.scale_dtype`` (and does not become zero there) before the zero point is chosen.

    Args:
        lo, hi: finite float tensors of one shape, the smallest and largest real to represent: one
            entry for each scale, so ``(…, groups)`` for groups.
        spec: gives the integers and whether the zero point is fixed.

    Returns:
        ``(scale, zero_point)``: tensors of ``lo``'s shape, of ``spec.scale_dtype`` and int32.

    Raises:
        ValueError: ``lo`` or ``hi`` is not finite in float32, ``lo`` above ``hi``, or of another
            shape; a range whose scale is above what ``spec.scale_dtype`` holds.

    >>> spec = QuantSpec(signed=False, symmetric=False)
    >>> choose_qparams(torch.tensor(-1.0), torch.tensor(1.55), spec)
    (tensor(0.0100), tensor(100, dtype=torch.int32))
    """
    lo, hi = lo.detach().to(torch.float32), hi.detach().to(torch.float32)
    for name, t in (("lo", lo), ("hi", hi)):
        if not bool(t.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {t[~t.isfinite()].flatten()[0].item()}")
    if lo.shape != hi.shape:
        raise ValueError(
            f"lo and hi must have one shape, got {tuple(lo.shape)} and {tuple(hi.shape)}"
        )
    if bool((lo > hi).any()):
        raise ValueError(
            f"lo must not be above hi, got {lo[lo > hi].flatten()[0].item()} above "
            f"{hi[lo > hi].flatten()[0].item()}"
        )
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    # A tensor, since dividing by a number may multiply by its rounded reciprocal.
    steps = torch.full_like(hi, spec.qmax - spec.qmin)
    if spec.symmetric:
        scale = (torch.maximum(-lo, hi) / (steps // 2)).clamp(min=SMALLEST_SCALE)
        scale = rounded_scale(scale, spec.scale_dtype)
        return scale, torch.full_like(scale, spec.zero_point_if_symmetric, dtype=torch.int32)
    scale = rounded_scale((hi / steps - lo / steps).clamp(min=SMALLEST_SCALE), spec.scale_dtype)
    zero_point = torch.round(-lo * (1.0 / scale.to(torch.float32))) + spec.qmin
    return scale, zero_point.clamp(spec.qmin, spec.qmax).to(torch.int32)


def rounded_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in a narrower type, not zero and not infinite."""
    if dtype == torch.float32:
        return scale
    rounded = scale.to(dtype)
    if bool(rounded.isinf().any()):
        raise ValueError(
            f"scale_dtype {dtype} holds no scale above {torch.finfo(dtype).max}, needed is "
            f"{float(scale.max())}; use torch.float32"
        )
    # float16 goes down to 2**-24, with fewer digits; below that comes zero.
    least = 2.0**-24 if dtype == torch.float16 else SMALLEST_SCALE
    return rounded.clamp(min=least)


def group_ranges(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest entry of each group along the last axis, widened to hold zero.

    Args:
        x: floating point ``(…, size)``.

    Returns:
        ``(lo, hi)``: ``(…, groups)`` of ``x``'s dtype.
    """
    groups = PerGroup(group_size).count(x.shape[-1])
    if not groups:
        return (x.new_zeros(*x.shape[:-1], 0),) * 2
    group_size = min(group_size, x.shape[-1])
    # The zeros that fill up the last group are within the widened range.
    padded = torch.nn.functional.pad(x, (0, groups * group_size - x.shape[-1]))
    padded = padded.reshape(*x.shape[:-1], groups, group_size)
    return padded.amin(-1).clamp(max=0.0), padded.amax(-1).clamp(min=0.0)


BLOCK = 1 << 22
"""Entries of a matrix that :func:`quantize_to_spec` takes in one go where rows have scales of their
own: the temporaries take some twenty bytes each."""


def quantize_to_spec(x: Tensor, spec: QuantSpec) -> QTensor:
    """Quantize ``x`` over its own range (minimum and maximum) by ``spec``.

    Args:
        x: finite floating-point tensor. Empty channels get scale :data:`SMALLEST_SCALE`.
        spec: per tensor, per channel along an axis of ``x``, or per group along its last axis.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: NaN or Inf in ``x``; an axis that ``x`` does not have; a range whose scale
            ``spec.scale_dtype`` cannot hold.
    """
    _check_float("x", x)
    x = x.detach()
    own_scales = isinstance(spec.granularity, PerGroup) or spec.granularity == PerChannel(0)
    if x.ndim != 2 or x.numel() <= BLOCK or not own_scales:
        _check_finite(x)
        return _quantize_to_spec(x, spec)
    rows = max(1, BLOCK // x.shape[1])
    parts = []
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        _check_finite(block, start)
        parts.append(_quantize_to_spec(block, spec))
    first = parts[0]
    layout = None if first._layout is None else first._layout._replace(shape=x.shape)
    integers, scale, zero_point = (
        torch.cat([getattr(q, key) for q in parts])
        for key in ("_int_repr", "_scale", "_zero_point")
    )
    return QTensor._of(integers, scale, zero_point, first._axis, layout)


def _check_finite(x: Tensor, row: int = 0) -> None:
    """``row``: the number of its first one."""
    if not bool(x.isfinite().all()):
        first = (~x.isfinite()).nonzero()[0].tolist()
        value = x[tuple(first)].item()
        where = tuple([row + first[0], *first[1:]] if first else first)
        raise ValueError(f"x must be finite, got {value} (first at index {where})")


def _quantize_to_spec(x: Tensor, spec: QuantSpec) -> QTensor:
    if isinstance(spec.granularity, PerGroup):
        if not x.ndim:
            raise ValueError("x must have an axis to group, got a 0-d tensor")
        size = spec.granularity.size
        qparams = choose_qparams(*group_ranges(x, size), spec)
        return quantize_per_group(x, *qparams, size, spec.dtype, bits=spec.bits)
    axis: int | None = None
    if isinstance(spec.granularity, PerChannel):
        axis = spec.granularity.axis
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis {axis} is not an axis of a tensor of shape {tuple(x.shape)}")
        flat = x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x[:, None]
        flat = flat if x.numel() else x.new_zeros(x.shape[axis], 1)
    else:
        flat = x.reshape(1, -1) if x.numel() else x.new_zeros(1, 1)
    scale, zero_point = choose_qparams(flat.amin(1), flat.amax(1), spec)
    if axis is None:
        return quantize_per_tensor(x, scale[0], zero_point[0], spec.dtype, bits=spec.bits)
    return quantize_per_channel(x, scale, zero_point, axis, spec.dtype, bits=spec.bits)
