"""The definition of the arithmetic: slow, exact, short.

Every kernel returns the bits of the functions here, on every instruction set, at every thread
count, for a row alone or inside any batch. They are written in plain torch and run on any device.

Shapes: activations ``(rows, in_features)``, weights ``(out_features, in_features)``.

Weights of any width compute by the same formulas. Where groups of inputs have scales of their own
(:class:`zeropoint.PerGroup`), the groups' sums are added in ascending order, each by one fused
multiply-add with its scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .affine import fma, quantize, quantize_fused
from .tensor import SMALLEST_SCALE, QTensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize each row over its own range to unsigned 8 bits, zero exactly representable.

    ``lo = min(0, min x)``, ``hi = max(0, max x)``, ``scale = hi/255 − lo/255`` (at least the
    smallest normal float32), ``zero_point = clamp(round_half_even(−lo · (1/scale)), 0, 255)``,
    ``q = clamp(round_half_even(x · (1/scale)) + zero_point, 0, 255)``; each operation is rounded
    once to float32.

    Args:
        x: ``(rows, k)`` floating point.

    Returns:
        ``(q, scale, zero_point, finite)``: int32 ``(rows, k)``; float32, int32, bool ``(rows,)``.
        A row that is not ``finite`` holds NaN or ±Inf; its integers mean nothing.
    """
    x = x.to(torch.float32)
    finite = x.isfinite().all(1)
    x = torch.where(finite[:, None], x, 0.0)
    zeros = x.new_zeros(x.shape[0], 1)
    padded = torch.cat((zeros, x), 1)
    lo, hi = padded.amin(1), padded.amax(1)
    steps = torch.full_like(hi, 255.0)  # a tensor, since dividing by a number may multiply by 1/255
    scale = (hi / steps - lo / steps).clamp(min=SMALLEST_SCALE)
    zero_point = torch.round(-lo * (1.0 / scale)).clamp(0, 255).to(torch.int32)
    return quantize(x, scale[:, None], zero_point[:, None], 0, 255), scale, zero_point, finite


def integer_product(
    q: Tensor, zero_point: Tensor, weight: Tensor, weight_zero_point: Tensor
) -> Tensor:
    """``Σ_k (q[m,k] − zero_point[m]) · (weight[n,k] − weight_zero_point[n])``, exact.

    Computed in float64: every partial sum is an integer below 2**53 in magnitude (for k < 2**37),
    so that no order of summation rounds.

    Args:
        q: integers ``(rows, k)``; zero_point: ``(rows,)`` or 0-d.
        weight: integers ``(out, k)``; weight_zero_point: ``(out,)`` or 0-d.

    Returns:
        float64 ``(rows, out)`` holding integers.
    """
    a = q.to(torch.float64) - zero_point.to(torch.float64).reshape(-1, 1)
    b = weight.to(torch.float64) - weight_zero_point.to(torch.float64).reshape(-1, 1)
    return a @ b.T + 0.0  # a sum of −0 products may be −0; integers have one zero


def epilogue(acc: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``float(acc) · (scale · weight_scale[n]) + bias[n]`` in float32, each operation rounded once.

    Args:
        acc: float64 integers ``(rows, out)``; scale: float32 ``(rows,)`` or 0-d.
        weight_scale: float32 ``(out,)`` or 0-d; bias: float32 ``(out,)`` or ``None``.
    """
    y = acc.to(torch.float32) * (scale.reshape(-1, 1) * weight_scale.reshape(1, -1))
    return y if bias is None else y + bias.to(torch.float32)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows to unsigned 8 bits with a scale and zero point known beforehand.

    The integers are those of :func:`zeropoint.quantize_per_tensor`, so that a layer gives the same
    whether it is handed floats or their quantized tensor.

    Returns:
        ``(q, no_nan)``: int32 of ``x``'s shape, bool ``(rows,)``. ±Inf clamps to the ends of the
        range; a row that holds NaN has integers that mean nothing.
    """
    no_nan = ~x.isnan().any(1)
    x = torch.where(no_nan[:, None], x, 0.0)
    return quantize_fused(x, scale, zero_point, 0, 255), no_nan


def linear_integer(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: QTensor,
    bias: Tensor | None,
) -> Tensor:
    """Integer activations × integer weights, float32 ``(rows, out)``.

    Args:
        q: int8, or integers from 0 to 255 of another type, ``(rows, k)``.
        scale, zero_point: of the activations, ``(rows,)`` or 0-d.
    """
    if weight.group_size is not None:
        return linear_integer_groups(q, scale, zero_point, weight, bias)
    acc = integer_product(q, zero_point, weight.int_repr(), weight.zero_point)
    return epilogue(acc, scale, weight.scale, bias)


def linear_integer_groups(
    q: Tensor, scale: Tensor, zero_point: Tensor, weight: QTensor, bias: Tensor | None
) -> Tensor:
    """:func:`linear_integer` where groups of inputs have scales of their own.

    Activations count from the middle: ``a = q − 128`` and ``z = zero_point − 128``; of int8,
    ``a = q`` and ``z = zero_point``. From 0, with the groups ``g`` ascending::

        T[m,n] = fma(float(Σ_{k∈g} a[m,k] · (w[n,k] − zw[n,g])), s[n,g], T[m,n])
        C[n]   = fma(float(Σ_{k∈g} (w[n,k] − zw[n,g])), s[n,g], C[n])

    with exact sums, rounded once to float32. Then
    ``y = fma(−float(z[m]), C[n], T[m,n]) · scale[m]`` and ``+ bias[n]``, each operation rounded
    once.
    """
    middle = 0 if q.dtype == torch.int8 else 128
    a = q.to(torch.float64) - middle
    z = (zero_point.to(torch.int32) - middle).to(torch.float32).reshape(-1, 1)
    total = torch.zeros(a.shape[0], weight.shape[0], dtype=torch.float32, device=a.device)
    correction = total.new_zeros(1, weight.shape[0])
    for columns, w, s in groups(weight):
        w = w.to(torch.float64)
        acc = a[:, columns] @ w.T + 0.0  # as integer_product: exact, with one zero
        total = fma(acc.to(torch.float32), s, total)
        correction = fma(w.sum(1).to(torch.float32), s, correction)
    y = fma(-z, correction, total) * scale.reshape(-1, 1)
    return y if bias is None else y + bias.to(torch.float32)


def groups(weight: QTensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The groups of a weight, ascending: which inputs, ``w − zero_point`` as int32 ``(out,
    inputs)``, and the scale as float32 ``(out,)``."""
    size = weight.group_size
    assert size is not None
    integers = weight.int_repr().to(torch.int32)
    scale, zero_point = weight.scale.to(torch.float32), weight.zero_point.to(torch.int32)
    for g in range(scale.shape[1]):
        columns = slice(g * size, (g + 1) * size)
        yield columns, integers[:, columns] - zero_point[:, g : g + 1], scale[:, g]


def linear_static(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: QTensor, bias: Tensor | None
) -> Tensor:
    """Float activations quantized by a known scale × integer weights, float32 ``(rows, out)``.

    A row holding NaN is NaN throughout and touches no other; ±Inf clamps.
    """
    q, no_nan = quantize_static(x, scale, zero_point)
    y = linear_integer(q, scale, zero_point, weight, bias)
    return torch.where(no_nan[:, None], y, torch.nan)


def linear_dynamic(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """Float activations quantized row by row × integer weights, float32 ``(rows, out)``.

    A row holding NaN or ±Inf is NaN throughout and touches no other.
    """
    q, scale, zero_point, finite = quantize_rows(x)
    y = linear_integer(q, scale, zero_point, weight, bias)
    return torch.where(finite[:, None], y, torch.nan)


def linear_weight_only(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """Float activations × dequantized weights, float32 ``(rows, out)``.

    One fused multiply-add chain an output, ``k`` ascending from 0, over ``float(q − zero_point)``;
    then ``· scale[n]`` and ``+ bias[n]``, each rounded once. Where groups of inputs have scales of
    their own, a chain ``p[g]`` for each, and from 0, ``g`` ascending, ``y = fma(p[g], s[n,g], y)``;
    then ``+ bias[n]``.
    """
    x = x.to(torch.float32)
    if weight.group_size is None:
        w = weight.int_repr().to(torch.int32) - weight.zero_point.reshape(-1, 1)
        y = _chain(x, w) * weight.scale.reshape(1, -1)
    else:
        y = x.new_zeros(x.shape[0], weight.shape[0])
        for columns, w, s in groups(weight):
            y = fma(_chain(x[:, columns], w), s, y)
    return y if bias is None else y + bias.to(torch.float32)


def linear_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float activations × float32 or bfloat16 weights, float32 ``(rows, out)``.

    One fused multiply-add chain an output, ``k`` ascending from 0; then ``+ bias[n]``.
    """
    acc = _chain(x.to(torch.float32), weight)
    return acc if bias is None else acc + bias.to(torch.float32)


def _chain(x: Tensor, w: Tensor) -> Tensor:
    """``Σ_k x[m,k] · float(w[n,k])``: one fused multiply-add chain, ``k`` ascending from 0."""
    w = w.to(torch.float32)
    acc = x.new_zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        acc = fma(x[:, k : k + 1], w[:, k].reshape(1, -1), acc)
    return acc


def exponential(x: Tensor) -> Tensor:
    """``exp(x)`` in float32 with ``x`` clamped to [−87, 87], each operation rounded once.

    ``2**n`` times a polynomial of the rest, after Cephes' ``expf``
    (https://www.netlib.org/cephes/); relative error about 1e-7. NaN becomes ``exp(−87)``.
    """
    x = torch.where(x > -87.0, x, torch.full_like(x, -87.0))
    x = torch.where(x < 87.0, x, torch.full_like(x, 87.0))
    n = torch.round(x * 1.44269504)
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """``"relu"``, ``"gelu"`` (the exact one, by the error function), ``"silu"`` or ``None``.

    GELU is ``x`` times the normal distribution function, whose tail is Abramowitz and Stegun's
    7.1.26, absolute error below 1.5e-7 (https://personal.math.ubc.ca/~cbm/aands/page_299.htm).
    """
    if activation is None:
        return x
    if activation == "relu":
        return torch.where(x < 0.0, torch.zeros_like(x), x)
    if activation == "silu":
        return torch.where(x < -87.0, torch.full_like(x, -87.0), x) / (exponential(0.0 - x) + 1.0)
    if activation == "gelu":
        one = torch.ones_like(x)
        magnitude = torch.where(x > 0.0 - x, x, 0.0 - x)
        z = magnitude * 0.707106781
        t = one / (z * 0.3275911 + 1.0)
        p = torch.full_like(x, 1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            p = p * t + coefficient
        tail = p * t * exponential(0.0 - z * z) * 0.5
        part = x.clamp(-64.0, 64.0) * tail
        return torch.where(x < 0.0, part, x - part)
    raise ValueError(f"activation must be 'relu', 'gelu', 'silu' or None, got {activation!r}")
