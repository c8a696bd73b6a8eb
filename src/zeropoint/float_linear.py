"""``Linear``: the layer that trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional


class Linear(nn.Linear):
    r"""``y = x Aᵀ + b``, a drop-in for :class:`torch.nn.Linear`.

    It *is* an ``nn.Linear`` to every library that asks (``isinstance``, the same ``state_dict``);
    its initialization and forward are this package's.

    Args:
        in_features: size of each input sample; 0 is allowed.
        out_features: size of each output sample.
        bias: ``False`` registers ``bias`` as ``None``.
        device, dtype: of the parameters.

    Shapes: input ``(*, in_features)``, output ``(*, out_features)`` for any number of leading
    dimensions, none included. ``weight`` is ``(out_features, in_features)``, ``bias``
    ``(out_features,)``.

    >>> layer = Linear(3, 2)
    >>> layer(torch.zeros(4, 5, 3)).shape
    torch.Size([4, 5, 2])
    """

    __constants__ = ["in_features", "out_features"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(−1/√in_features, 1/√in_features).

        The weight is Kaiming-uniform (He et al. 2015, https://arxiv.org/abs/1502.01852) with the
        negative slope a = √5: its bound is ``gain · √3 / √in`` with ``gain = √(2 / (1 + a²)) =
        √(1/3)``, hence 1/√in, the bound of LeCun's classical rule. That is the only reason for √5,
        as the authors of torch's initialization explain
        (https://github.com/pytorch/pytorch/issues/15314). ``in_features = 0`` leaves an empty
        weight and a zero bias. Random numbers are drawn in torch's order, so that the same seed
        gives ``torch.nn.Linear``'s parameters bit for bit.
        """
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0  # no −0.0 as bound
        if self.weight.numel():
            gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
            # Written as torch computes it: algebraically 1/√in, but the same float64 bits.
            weight_bound = math.sqrt(3.0) * (gain / math.sqrt(self.in_features))
            with torch.no_grad():
                self.weight.uniform_(-weight_bound, weight_bound)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.uniform_(-bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` → ``(*, out_features)``."""
        return functional.linear(input, self.weight, self.bias)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
