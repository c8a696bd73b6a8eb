"""What a layer's inputs are like, in a few numbers that grow with the data only in count.

Sums over all rows that a layer was called with: enough for every method here, so that no inputs are
kept. Memory: three vectors, and ``in²`` float32 where the products of channels are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS = 4096  # rows of inputs that are converted to float32 in one go


class InputStatistics:
    """Statistics of a layer's inputs, channel by channel.

    Args:
        in_features: number of channels.
        gram: whether to sum the products of channels as well.

    Attributes:
        rows: how many rows were seen.

    >>> inputs = InputStatistics(2)
    >>> inputs.observe(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> inputs.largest, inputs.mean_magnitude
    (tensor([3., 2.]), tensor([2., 1.]))
    >>> inputs.gram
    tensor([[ 5., -1.],
            [-1.,  2.]])
    """

    def __init__(self, in_features: int, gram: bool = True) -> None:
        self.in_features = in_features
        self.rows = 0
        self._largest: Tensor = torch.zeros(in_features)
        self._sum = torch.zeros(in_features, dtype=torch.float64)
        self._magnitudes = torch.zeros(in_features, dtype=torch.float64)
        self._products = torch.zeros(in_features, in_features) if gram else None

    @property
    def is_empty(self) -> bool:
        """Whether no row was seen yet."""
        return self.rows == 0

    def observe(self, x: Any) -> None:
        """Take in rows ``(…, in_features)``, floating point; there may be none.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: another number of channels, or NaN or Inf in ``x``. Nothing is taken in.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have {self.in_features} channels along its last axis, got shape "
                f"{tuple(x.shape)}"
            )
        x = x.detach().reshape(-1, self.in_features).cpu()
        # Checked whole first, so that a row that is refused leaves nothing behind.
        bad = int((~x.to(torch.float32).isfinite()).sum())
        if bad:
            raise ValueError(f"x must be finite, got NaN or Inf in {bad} of {x.numel()} values")
        for rows in x.split(_ROWS) if x.numel() else ():
            self._add(rows.to(torch.float32))

    def _add(self, x: Tensor) -> None:
        magnitudes = x.abs()
        self.rows += len(x)
        self._largest = torch.maximum(self._largest, magnitudes.amax(0))
        self._sum += x.sum(0, dtype=torch.float64)
        self._magnitudes += magnitudes.sum(0, dtype=torch.float64)
        if self._products is not None:
            self._products.addmm_(x.T, x)

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each channel, float32 ``(in,)``."""
        return self._largest

    @property
    def mean(self) -> Tensor:
        """The mean of each channel, float32 ``(in,)``."""
        return (self._sum / max(self.rows, 1)).to(torch.float32)

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean magnitude of each channel, float32 ``(in,)``."""
        return (self._magnitudes / max(self.rows, 1)).to(torch.float32)

    @property
    def gram(self) -> Tensor:
        """The mean of ``xᵀ x`` over all rows, float32 ``(in, in)``.

        Raises:
            ValueError: the products were not asked for.
        """
        if self._products is None:
            raise ValueError("the products of channels were not gathered; pass gram=True")
        return self._products / max(self.rows, 1)
