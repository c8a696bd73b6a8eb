"""``Linear`` and ``LinearReLU`` of ``torch.ao.nn.quantized``: integers in, integers out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_weights

from .. import functional
from ..affine import quantize_per_channel, quantize_per_tensor
from ..packings import remembered_qtensor
from ..saving import check_state_goes_elsewhere
from ..tensor import QTensor
from .ops import own

_EPS = torch.finfo(torch.float32).eps
"""torch's observers choose no scale below it."""


class LinearPackedParams(nn.Module):
    """A quantized weight and a bias as plain buffers, packed for the hardware at the first use.

    Its state dict holds ``weight`` int8 ``(out, in)``, ``scale`` float32 and ``zero_point`` int32,
    ``()`` or ``(out,)``, and ``bias`` float32 ``(out,)`` where there is one. State dicts of torch's
    own class, which hold torch's quantized tensors, are taken as well.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(self, weight: QTensor, bias: Tensor | None) -> None:
        super().__init__()
        for name in ("weight", "scale", "zero_point", "bias"):
            self.register_buffer(name, None)
        self.set_weight_bias(weight, bias)

    def set_weight_bias(self, weight: QTensor | Tensor, bias: Tensor | None) -> None:
        """Take other parameters.

        Raises:
            TypeError: ``weight`` is not quantized to int8.
            ValueError: a shape or axis that does not fit.
        """
        weight = own("weight", weight)
        if weight.dtype != torch.int8:
            raise TypeError(f"weight must be quantized to torch.qint8, got {weight.dtype}")
        if weight.ndim != 2 or weight.axis not in (None, 0):
            raise ValueError(
                "weight must have shape (out_features, in_features), per tensor or per channel "
                f"along axis 0; got shape {tuple(weight.shape)}, axis {weight.axis}"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        self.weight, self.scale, self.zero_point = (
            weight.int_repr(),
            weight.scale,
            weight.zero_point,
        )
        self.bias = None if bias is None else bias.detach().to(torch.float32)

    def qtensor(self) -> QTensor:
        """The weight, which shares this module's buffers."""
        return remembered_qtensor(self.weight, self.scale, self.zero_point)

    def _apply(self, fn: Any, recurse: bool = True) -> LinearPackedParams:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)  # a cast would round scales and bias
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        check_state_goes_elsewhere(savable=False)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            packed = state_dict.get(f"{prefix}_packed_params")  # torch's version 3
            if packed is not None:
                self.set_weight_bias(*packed)
            elif f"{prefix}weight" in state_dict:
                weight, bias = state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}bias")
                if not weight.is_quantized:  # our own
                    scale, zero_point = (
                        state_dict[f"{prefix}{k}"] for k in ("scale", "zero_point")
                    )
                    weight = QTensor(weight, scale, zero_point, 0 if scale.ndim else None)
                self.set_weight_bias(weight, bias)
            else:
                missing_keys.append(f"{prefix}weight")
        except (KeyError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}: {error}")


class Linear(nn.Module):
    """``torch.ao.nn.quantized.Linear``: a quantized Linear layer with quantized in- and outputs.

    Args:
        in_features, out_features: as ``torch.nn.Linear``.
        bias_: whether there is a bias.
        dtype: of the weights; ``torch.qint8`` only.

    Attributes:
        scale, zero_point: of the output, a float and an int; 1 and 0 at first.

    Raises:
        ValueError: another dtype.

    Its state dict holds ``scale``, ``zero_point`` and the plain tensors of
    :class:`LinearPackedParams` below ``_packed_params``; state dicts of torch's class load too.

    >>> layer = Linear(3, 2)
    >>> layer(QTensor(torch.zeros(4, 3, dtype=torch.uint8), 0.5))
    QTensor([[0., 0.],
             [0., 0.],
             [0., 0.],
             [0., 0.]], dtype=uint8, scale=1, zero_point=0)
    """

    _version = 3
    _activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_: bool = True,
        dtype: torch.dtype = torch.qint8,
    ) -> None:
        super().__init__()
        if dtype != torch.qint8:
            raise ValueError(f"dtype must be torch.qint8, got {dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.zero_point = 1.0, 0
        zeros = torch.zeros(out_features, in_features, dtype=torch.int8)
        bias = torch.zeros(out_features) if bias_ else None
        self._packed_params = LinearPackedParams(QTensor(zeros, 1.0), bias)

    def forward(self, x: QTensor | Tensor) -> Any:
        """``(*, in_features)`` → ``(*, out_features)``, both quantized."""
        p = self._packed_params
        return functional.linear(
            own("x", x),
            p.qtensor(),
            p.bias,
            float(self.scale),
            int(self.zero_point),
            activation=self._activation,
        )

    def weight(self) -> QTensor:
        """The weight, ``(out_features, in_features)``."""
        return self._packed_params.qtensor()

    def bias(self) -> Tensor | None:
        """The bias, float32 ``(out_features,)``, or ``None``."""
        return self._packed_params.bias

    def set_weight_bias(self, w: QTensor | Tensor, b: Tensor | None) -> None:
        """Take another weight and bias. Raises as :class:`LinearPackedParams` does."""
        self._packed_params.set_weight_bias(w, b)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Linear:
        """From a layer that torch's ``prepare`` gave observers and that has seen data.

        Args:
            mod: an ``nn.Linear`` (or torch's fused ``LinearReLU``) with ``qconfig`` and
                ``activation_post_process``, or its counterpart of quantization-aware training.
            use_precomputed_fake_quant: use the range that the weight's fake quantization has.

        Raises:
            TypeError: no such layer.
        """
        observer = getattr(mod, "activation_post_process", None)
        if observer is None or getattr(mod, "qconfig", None) is None:
            raise TypeError("mod must have a qconfig and an observer, which torch's prepare gives")
        linear = inner(mod)
        weight_observer = getattr(mod, "weight_fake_quant", None) or mod.qconfig.weight()
        weight, bias = linear.weight, linear.bias
        if (bn := getattr(linear, "bn", None)) is not None:  # a LinearBn1d of training
            weight, bias = fuse_linear_bn_weights(
                weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
        if not use_precomputed_fake_quant:
            weight_observer(weight)
        made = cls(linear.in_features, linear.out_features)
        made.set_weight_bias(quantize_weight(weight, weight_observer), bias)
        scale, zero_point = observer.calculate_qparams()
        made.scale, made.zero_point = float(scale), int(zero_point)
        return made

    @classmethod
    def from_reference(
        cls, ref_qlinear: Any, output_scale: float, output_zero_point: int
    ) -> Linear:
        """From one of torch's reference layers, which hold a float weight and its scale."""
        ref_qlinear = inner(ref_qlinear)
        made = cls(ref_qlinear.in_features, ref_qlinear.out_features)
        made.set_weight_bias(ref_qlinear.get_quantized_weight(), ref_qlinear.bias)
        made.scale, made.zero_point = float(output_scale), int(output_zero_point)
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = torch.tensor(self.scale)
        destination[f"{prefix}zero_point"] = torch.tensor(self.zero_point)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *more: Any,
    ) -> None:
        for key, kind in (("scale", float), ("zero_point", int)):
            if f"{prefix}{key}" in state_dict:
                setattr(self, key, kind(state_dict.pop(f"{prefix}{key}")))
            else:
                missing_keys.append(f"{prefix}{key}")
        for key in ("weight", "bias"):  # torch's version 1 kept them here
            if f"{prefix}{key}" in state_dict:
                state_dict[f"{prefix}_packed_params.{key}"] = state_dict.pop(f"{prefix}{key}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *more
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scale={self.scale}, zero_point={self.zero_point}, qscheme={self.weight().qscheme()}"
        )


class LinearReLU(Linear):
    """``torch.ao.nn.intrinsic.quantized.LinearReLU``: :class:`Linear` with a ReLU fused to it."""

    _activation = "relu"


def inner(mod: Any) -> Any:
    """The Linear layer in torch's fused ``LinearReLU``, which is a sequence, but that of training,
    which is a Linear layer as well; others as they are."""
    return mod[0] if isinstance(mod, nn.Sequential) and not isinstance(mod, nn.Linear) else mod


def quantize_weight(weight: Tensor, observer: Any = None) -> QTensor:
    """Integers of a float weight, by one of torch's observers or by torch's default rule.

    The default is the ``MinMaxObserver`` of dynamic quantization: int8, symmetric, per tensor,
    ``scale = max|w| / 127.5``, at least the machine epsilon of float32.

    Args:
        weight: ``(out_features, in_features)``.
        observer: with ``calculate_qparams()``, ``dtype`` and ``qscheme``, as torch's have.

    Raises:
        ValueError: the observer is not for int8.
    """
    weight = weight.detach().to(torch.float32)
    if observer is None:
        largest = weight.abs().amax() if weight.numel() else torch.tensor(127.5)
        scale = torch.clamp(largest / 127.5, min=_EPS)
        return quantize_per_tensor(weight, scale, 0, torch.int8)
    observer = getattr(observer, "activation_post_process", observer)  # in a fake quantization
    if observer.dtype not in (torch.qint8, torch.int8):
        raise ValueError(f"the weight's observer must have dtype torch.qint8, got {observer.dtype}")
    scale, zero_point = observer.calculate_qparams()
    if observer.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric):
        q = quantize_per_channel(weight, scale, zero_point, observer.ch_axis, torch.int8)
    else:
        q = quantize_per_tensor(weight, float(scale), int(zero_point), torch.int8)
    integers = q.int_repr().clamp_(int(observer.quant_min), int(observer.quant_max))
    return QTensor(integers, q.scale, q.zero_point, q.axis)
