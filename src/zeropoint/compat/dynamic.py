"""``torch.ao.nn.quantized.dynamic``, as far as it is about Linear layers: floats in, floats out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import modules
from .modules import inner, quantize_weight
from .ops import dynamic

__all__ = ["Linear", "LinearReLU"]


class Linear(modules.Linear):
    """``torch.ao.nn.quantized.dynamic.Linear``: integer weights, activations quantized on the fly.

    The input is quantized to 7 bits over the range of the whole tensor, as torch's layer does.
    :class:`zeropoint.QuantizedLinear` quantizes each row over its own range to 8 bits, which
    loses far less; see docs/migration.md.

    >>> layer = Linear.from_float(torch.nn.Linear(3, 2))
    >>> layer(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    _version = 4
    _reduce_range = True

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """``(*, in_features)`` → ``(*, out_features)`` of ``x``'s dtype."""
        p = self._packed_params
        y = dynamic(x, p.qtensor(), p.bias, self._reduce_range, self._activation)
        return y.to(x.dtype)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Linear:
        """From a float layer.

        Args:
            mod: an ``nn.Linear``, or torch's fused ``LinearReLU``. Its ``qconfig``, if it has one,
                says how the weight is quantized; else torch's default, int8 per tensor.
            use_precomputed_fake_quant: for torch's signature; there is nothing to choose.

        Raises:
            TypeError: no Linear layer.
            ValueError: a ``qconfig`` for something other than int8; NaN in the weight.
        """
        linear = inner(mod)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"mod must be a Linear layer, got {type(mod).__name__}")
        qconfig = getattr(mod, "qconfig", None)
        observer = None if qconfig is None or qconfig.weight is None else qconfig.weight()
        if observer is not None:
            observer(linear.weight)
        made = cls(linear.in_features, linear.out_features)
        made.set_weight_bias(quantize_weight(linear.weight, observer), linear.bias)
        return made

    @classmethod
    def from_reference(cls, ref_qlinear: Any, *_: Any) -> Linear:
        """From one of torch's reference layers."""
        return super().from_reference(ref_qlinear, 1.0, 0)  # type: ignore[return-value]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        # Before version 4, torch quantized activations to 8 bits.
        version = local_metadata.get("version")
        self._reduce_range = version is not None and version >= 4
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"dtype={torch.qint8}, qscheme={self.weight().qscheme()}"
        )


class LinearReLU(Linear):
    """``torch.ao.nn.intrinsic.quantized.dynamic.LinearReLU``: with a ReLU fused to it."""

    _activation = "relu"
