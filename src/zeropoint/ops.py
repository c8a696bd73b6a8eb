"""The same functions as ``torch.library`` operators on plain tensors: ``torch.ops.zeropoint.*``.

Plain eager inference goes past torch's dispatcher, which costs as much as a small layer. Where
torch compiles, exports, or otherwise records what is computed, :mod:`zeropoint.functional` calls
these instead: torch sees one operator with a shape, a gradient and no graph break, and what runs
in the end are the same kernels, with the same bits.

=====================  ==========================================================================
``linear_dynamic``     ``(input, weight, scale, zero_point, bias, activation, residual)``
``linear_weight_only`` the same
``linear_static``      ``(input, weight, scale, zero_point, bias, input_scale, input_zero_point,
                       activation, residual)``
``linear_integer``     the same with an 8-bit integer ``input``; float32 out
``linear_quantized``   the same, then ``output_scale, output_zero_point``; no residual; integers of
                       ``input``'s dtype out
``linear_float``       ``(input, weight, bias, activation, residual)``, float32 or bfloat16 weight
``linear_packed``      any of the float results, by the handle of a packed weight of this process
=====================  ==========================================================================

Integer weights are int8 or uint8 ``(out, in)``; ``scale`` is float32 and ``zero_point`` int32, both
``(out,)`` or ``()``. Below 8 bits they are packed codes (:mod:`zeropoint.codec`); with groups,
``scale`` and ``zero_point`` are ``(out, groups)``. The first five operators learn of both by the
names ``bits=8``, ``signed=False`` (what the codes stand for), ``group_size=None`` and, for packed
codes, whose shape does not tell it, ``in_features``. What is packed of a weight is remembered for
as long as the weight tensor lives, and packed again when it was changed in place
(:mod:`zeropoint.packings`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from . import codec, packings
from .compute import compute, compute_integer, compute_packed, compute_quantized
from .kernels import packed_by_handle
from .layout import Layout
from .tensor import QTensor

_LIBRARY = Library("zeropoint", "DEF")  # operators exist for as long as this object does
_WEIGHT = "Tensor input, Tensor weight, Tensor scale, Tensor zero_point, Tensor? bias"
_QPARAMS = "Tensor input_scale, Tensor input_zero_point"
_POST = "str? activation=None, Tensor? residual=None"
_LAYOUT = "*, int bits=8, bool signed=False, int? group_size=None, int? in_features=None"


def _plain(x: Tensor) -> Tensor:
    return x if type(x) is Tensor else x.detach().as_subclass(Tensor)


def _layout(
    weight: Tensor,
    bits: int = 8,
    signed: bool = False,
    group_size: int | None = None,
    in_features: int | None = None,
) -> Layout | None:
    if bits == 8:
        signed, in_features = weight.dtype == torch.int8, weight.shape[1]
    elif in_features is None:
        raise ValueError(f"in_features must be given for a weight of {bits} bits")
    shape = torch.Size((weight.shape[0], in_features))
    return Layout.of(shape, signed, bits, group_size).kept()


def _weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    signed: bool,
    group_size: int | None,
    in_features: int | None,
) -> QTensor:
    layout = _layout(weight, bits, signed, group_size, in_features)
    return packings.remembered_qtensor(weight, scale, zero_point, layout)


def linear_dynamic(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    bits: int = 8,
    signed: bool = False,
    group_size: int | None = None,
    in_features: int | None = None,
) -> Tensor:
    q = _weight(weight, scale, zero_point, bits, signed, group_size, in_features)
    return compute("linear_dynamic", _plain(input), q, bias, (), activation, residual)


def linear_weight_only(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    bits: int = 8,
    signed: bool = False,
    group_size: int | None = None,
    in_features: int | None = None,
) -> Tensor:
    q = _weight(weight, scale, zero_point, bits, signed, group_size, in_features)
    return compute("linear_weight_only", _plain(input), q, bias, (), activation, residual)


def linear_static(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    bits: int = 8,
    signed: bool = False,
    group_size: int | None = None,
    in_features: int | None = None,
) -> Tensor:
    q = _weight(weight, scale, zero_point, bits, signed, group_size, in_features)
    qparams = (input_scale, input_zero_point)
    return compute("linear_static", _plain(input), q, bias, qparams, activation, residual)


def linear_integer(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    bits: int = 8,
    signed: bool = False,
    group_size: int | None = None,
    in_features: int | None = None,
) -> Tensor:
    x = QTensor(_plain(input), input_scale, input_zero_point)
    q = _weight(weight, scale, zero_point, bits, signed, group_size, in_features)
    return compute_integer(x, q, bias, activation, residual)


def linear_quantized(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    output_scale: Tensor,
    output_zero_point: Tensor,
    activation: str | None = None,
    *,
    bits: int = 8,
    signed: bool = False,
    group_size: int | None = None,
    in_features: int | None = None,
) -> Tensor:
    x = QTensor(_plain(input), input_scale, input_zero_point)
    q = _weight(weight, scale, zero_point, bits, signed, group_size, in_features)
    y = compute_quantized(x, q, bias, output_scale, output_zero_point, activation)
    return y.int_repr()


def linear_float(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    packed = packings.remembered_float(weight)
    return compute_packed(_plain(input), packed, bias, activation, residual)


def linear_packed(
    input: Tensor,
    bias: Tensor | None,
    handle: int,
    out_features: int,
    kind: str = "linear_float",
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    packed, x = packed_by_handle(handle), _plain(input)
    if kind == "linear_float":
        return compute_packed(x, packed, bias, activation, residual)
    if kind == "linear_integer":
        q = QTensor(x, input_scale, input_zero_point)  # type: ignore[arg-type]
        return compute_integer(q, packed.operand(), bias, activation, residual)
    qparams = () if input_scale is None else (input_scale, input_zero_point)
    return compute(kind, x, packed.operand(), bias, qparams, activation, residual)


def unpacked(like: Tensor, handle: int, out_features: int) -> Tensor:
    """The weight behind a handle, dequantized, in ``like``'s dtype."""
    weight, _ = packed_by_handle(handle).unpack()
    weight = weight.dequantize() if isinstance(weight, QTensor) else weight
    return weight.to(like.dtype, copy=True)


def _fake(dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    def fake(input: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
        bits = more.get("bits", 8)
        k = more.get("in_features") if bits < 8 else weight.shape[-1]
        if (
            input.ndim == 0
            or weight.ndim != 2
            or input.shape[-1] != k
            or codec.packed_size(k, bits) != weight.shape[1]
        ):
            raise ValueError(
                f"input must have shape (*, in_features) for a weight of shape "
                f"{tuple(weight.shape)}, {bits} bits and in_features {k}, got {tuple(input.shape)}"
            )
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype)

    return fake


def _fake_packed(
    input: Tensor, bias: Any, handle: int, out: int, kind: str = "linear_float", *rest: Any
) -> Tensor:
    dtype = torch.float32 if kind == "linear_integer" else None
    return input.new_empty((*input.shape[:-1], out), dtype=dtype)


def _gradients(op: Any, weight_of: Callable[..., Tensor], bias_at: int, trained: bool) -> Any:
    """Gradients to input, bias and residual, and to a float weight; see
    :class:`zeropoint.compute._StraightThrough`. Arguments end with activation and residual."""

    def setup(
        ctx: Any, inputs: tuple[Any, ...], output: Tensor, keyword_only_inputs: Any = None
    ) -> None:
        ctx.layout = keyword_only_inputs or {}
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        pairs = zip(ctx.is_tensor, ctx.rest, strict=True)
        inputs = [next(saved) if tensor else value for tensor, value in pairs]
        x, bias, (activation, residual) = inputs[0], inputs[bias_at], inputs[-2:]
        gradients: list[Any] = [None] * len(inputs)
        if residual is not None:
            gradients[-1] = grad.to(residual.dtype)
        if activation is not None:
            before = op(*inputs[:-2], **ctx.layout)
            grad = {
                "relu": lambda: grad * (before > 0),
                "gelu": lambda: torch.ops.aten.gelu_backward(grad, before),
                "silu": lambda: torch.ops.aten.silu_backward(grad, before),
            }[activation]()
        if ctx.needs_input_grad[0]:
            gradients[0] = grad @ weight_of(*inputs, **ctx.layout).to(grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if trained and ctx.needs_input_grad[1]:
            gradients[1] = (rows.T @ x.reshape(-1, x.shape[-1])).to(inputs[1].dtype)
        if bias is not None and ctx.needs_input_grad[bias_at]:
            gradients[bias_at] = rows.sum(0).to(bias.dtype)
        return tuple(gradients)

    return backward, setup


def _dequantized(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, *_: Any, **layout: Any
) -> Tensor:
    axis = 0 if scale.ndim == 1 else None
    return QTensor._of(weight, scale, zero_point, axis, _layout(weight, **layout)).dequantize()


def _register() -> None:
    def define(
        function: Callable[..., Tensor], arguments: str, fake: Callable[..., Tensor]
    ) -> None:
        name = function.__name__
        tags = (torch.Tag.pt2_compliant_tag,)
        _LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=tags)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        register_fake(f"zeropoint::{name}", fake, lib=_LIBRARY)

    def differentiate(name: str, weight_of: Any, bias_at: int, trained: bool = False) -> None:
        op = getattr(torch.ops.zeropoint, name)
        backward, setup = _gradients(op, weight_of, bias_at, trained)
        register_autograd(f"zeropoint::{name}", backward, setup_context=setup, lib=_LIBRARY)

    define(linear_dynamic, f"{_WEIGHT}=None, {_POST}, {_LAYOUT}", _fake())
    define(linear_weight_only, f"{_WEIGHT}=None, {_POST}, {_LAYOUT}", _fake())
    define(linear_static, f"{_WEIGHT}, {_QPARAMS}, {_POST}, {_LAYOUT}", _fake())
    define(linear_integer, f"{_WEIGHT}, {_QPARAMS}, {_POST}, {_LAYOUT}", _fake(torch.float32))
    output = "Tensor output_scale, Tensor output_zero_point, str? activation=None"
    define(linear_quantized, f"{_WEIGHT}, {_QPARAMS}, {output}, {_LAYOUT}", _fake())
    define(linear_float, f"Tensor input, Tensor weight, Tensor? bias=None, {_POST}", _fake())
    define(
        linear_packed,
        "Tensor input, Tensor? bias, int handle, SymInt out_features, str kind='linear_float', "
        f"Tensor? input_scale=None, Tensor? input_zero_point=None, {_POST}",
        _fake_packed,
    )
    define(
        unpacked,
        "Tensor like, int handle, SymInt out_features",
        lambda like, handle, out_features: like.new_empty((out_features, like.shape[-1])),
    )
    for name in ("linear_dynamic", "linear_weight_only", "linear_static"):
        differentiate(name, _dequantized, 4)
    differentiate("linear_float", lambda x, weight, *_: weight, 2, trained=True)
    differentiate(
        "linear_packed",
        lambda x, bias, handle, out, *_: torch.ops.zeropoint.unpacked(x, handle, out),
        1,
    )


_register()
