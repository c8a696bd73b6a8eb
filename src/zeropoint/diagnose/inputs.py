"""What a float model's layers are fed with: watched during one pass over the data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .switching import Forward

ROWS = 512
"""Rows of a layer's input that are kept, at least, where it has so many; fewer than twice that."""
FEW = 128
"""Rows that are kept in any case."""
MEMORY = 256 << 20
"""Bytes of kept inputs, about, of all layers together."""


class Inputs:
    """The inputs of one layer.

    Rows are kept evenly from all that come: every ``stride``-th, the stride doubling whenever
    there are too many. So which rows they are does not depend on the batches they came in.

    Args:
        in_features: of the layer.
        limit: how many rows to keep; up to twice as many may be held meanwhile.

    Attributes:
        calls: how often the layer was called.
        amax: largest magnitude of each channel, float32 ``(in_features,)``, over all finite rows.
        non_finite: rows that hold NaN or Inf; they are in nothing else.
    """

    def __init__(self, in_features: int, limit: int) -> None:
        self.in_features, self.limit = in_features, limit
        self.calls = self.seen = self.non_finite = 0
        self.amax: Tensor | None = None
        self._kept: list[Tensor] = []
        self._held, self._stride = 0, 1

    def see(self, x: Any) -> None:
        """Take in one call's input, ``(*, in_features)``."""
        self.calls += 1
        x = x.detach().reshape(-1, self.in_features)
        if not len(x):
            return
        amax = torch.linalg.vector_norm(x, torch.inf, dim=0)  # of the magnitudes; NaN propagates
        if not bool(amax.isfinite().all()):
            finite = x.isfinite().all(1)
            self.non_finite += int((~finite).sum())
            x = x[finite]
            if not len(x):
                return
            amax = x.abs().amax(0)
        amax = amax.to(torch.float32)
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
        # The first row of the call whose number in the whole is a multiple of the stride.
        kept = x[-self.seen % self._stride :: self._stride].clone()
        self.seen += len(x)
        if not len(kept):
            return
        self._kept.append(kept)
        self._held += len(kept)
        while self._held >= 2 * self.limit:
            # All rows held are numbered by multiples of the stride, from 0 on.
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._held, self._stride = len(self._kept[0]), 2 * self._stride

    def rows(self) -> Tensor:
        """The rows that were kept, ``(n, in_features)``, in the dtype they came in: of little data
        an eighth, so that a layer's numbers cost less than a pass over it, but no fewer than
        :data:`FEW`."""
        if not self._kept:
            return torch.empty(0, self.in_features)
        few = max(FEW, self.seen // 8)
        if len(self._kept) > 1 or self._held > few:
            every = -(-self._held // few)
            self._kept = [torch.cat(self._kept)[::every].clone()]
            self._held, self._stride = len(self._kept[0]), self._stride * every
        return self._kept[0]


class Watch:
    """Watches layers; tells how long the watching took, so that it can be told from the model.

    Args:
        layers: name → layer.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        widths = sum(layer.in_features for layer in layers.values()) or 1
        limit = max(16, min(ROWS, MEMORY // (8 * widths)))
        self.inputs = {name: Inputs(x.in_features, limit) for name, x in layers.items()}
        self.limit = limit
        self.seconds = 0.0
        self._layers = layers

    def forwards(self) -> dict[nn.Module, Forward]:
        """Functions to stand in for the layers' own, see :func:`switched`."""
        return {layer: self._forward(layer, self.inputs[n]) for n, layer in self._layers.items()}

    def _forward(self, layer: nn.Linear, inputs: Inputs) -> Forward:
        def forward(input: Tensor) -> Tensor:
            began = time.perf_counter()
            inputs.see(input)
            self.seconds += time.perf_counter() - began
            return type(layer).forward(layer, input)

        return forward
