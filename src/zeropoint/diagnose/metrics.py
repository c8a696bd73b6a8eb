"""The caller's metric, of the model as it is and with other computations in its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from torch import nn

from ..statistics import Comparison, paired, scores
from .cache import Cache
from .numbers import MetricChange
from .switching import Forward, switched

Measured = tuple[float, "np.ndarray | None"]
"""A metric's value, and the scores of the samples where it gave them."""


class Metric:
    """Calls a metric, and remembers what it said.

    Args:
        metric: ``metric(model)`` → a number, or 1-d scores.
        model: in eval mode, see :func:`ready`.
        cache: what it said already. A metric is known again by its name and by what it says of the
            float model, which is asked anew.

    Attributes:
        calls: how often it was called.
        name: of the metric.
    """

    def __init__(self, metric: Callable[[nn.Module], Any], model: nn.Module, cache: Cache) -> None:
        name = getattr(metric, "__name__", type(metric).__name__)
        self.name = "metric" if name == "<lambda>" else name
        self.calls = 0
        self._metric, self._model, self._cache = metric, model, cache
        before = cache.entries.get(self._key("float"))
        self.float_model = self._ask("float", {})
        if before is not None and before != cache.entries[self._key("float")]:
            for key in [k for k in cache.entries if k.startswith(self._key(""))]:
                if key != self._key("float"):
                    del cache.entries[key]

    def of(self, name: str, forwards: Mapping[nn.Module, Forward]) -> Measured:
        """The metric of a variant of the model; a name's meaning must not change."""
        known = self._cache.entries.get(self._key(name))
        if known is None:
            return self._ask(name, forwards)
        value, found = known
        return value, None if found is None else np.asarray(found)

    def change(self, quantized: Measured, repaired: Measured | None) -> MetricChange:
        """Float, quantized and mended side by side."""
        return MetricChange(
            self.name,
            self.float_model[0],
            quantized[0],
            None if repaired is None else repaired[0],
            _paired(self.float_model, quantized),
            None if repaired is None else _paired(quantized, repaired),
        )

    def _key(self, name: str) -> str:
        return f"metric {self.name}: {name}"

    def _ask(self, name: str, forwards: Mapping[nn.Module, Forward]) -> Measured:
        with switched(forwards):
            value, found = scores(f"metric({name})", self._metric(self._model))
        self.calls += 1
        self._cache.put(self._key(name), [value, None if found is None else found.tolist()])
        return value, found


def _paired(before: Measured, after: Measured) -> Comparison | None:
    if before[1] is None or after[1] is None:
        return None
    if len(before[1]) != len(after[1]):
        raise ValueError(
            f"metric must score the same samples of every model, got {len(before[1])} scores and "
            f"{len(after[1])}"
        )
    with suppress(ImportError):  # without scipy there are no intervals
        return paired(before[1], after[1])
    return None
