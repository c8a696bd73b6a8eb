"""How good a model is: scores of samples, on the search and on the held-out part of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..running import call, cosines, evaluating, real
from ..splits import split_indices
from ..statistics import Comparison, Estimate, estimate, paired, scores

KEPT_BYTES = 2**28
"""Of the float model's outputs, that are kept; what is beyond it is computed again each time."""


class Fidelity:
    """Per-sample cosine of a model's output with the float model's.

    A sample is an index of the output's dimension 0; its cosine is the mean over its vectors along
    the last dimension. Vectors that are not finite count 0.
    """

    name = "cosine of the output"

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], output: Callable[[Any], Tensor]
    ) -> None:
        self._model, self._batches, self._output = model, batches, output
        self._kept: list[Tensor] = []
        self.runs = 0

    def __call__(self, model: nn.Module) -> np.ndarray:
        """Scores, float64 ``(samples,)``."""
        self.runs += 1
        found = []
        with torch.inference_mode(), evaluating(model), evaluating(self._model):
            for i, batch in enumerate(self._batches):
                y = real(self._output(call(model, batch)))
                found.append(cosines(self._expected(i, batch, model), y).nan_to_num(0.0).mean(1))
        return torch.cat(found).numpy() if found else np.empty(0)

    def keep(self) -> None:
        """Run the float model, and keep as many of its outputs as fit."""
        held = 0
        self.runs += 1
        with torch.inference_mode(), evaluating(self._model):
            for batch in self._batches:
                y = real(self._output(call(self._model, batch)))
                held += y.numel() * y.element_size()
                if held > KEPT_BYTES:
                    break
                self._kept.append(y.clone())

    def _expected(self, i: int, batch: Any, model: nn.Module) -> Tensor:
        if i < len(self._kept):
            return self._kept[i]
        return real(self._output(call(self._model, batch)))


@dataclass(frozen=True)
class Scores:
    """A model's scores of the samples on the search data and on held-out data; of a metric that is
    one number, the same number in both."""

    search: np.ndarray
    evaluation: np.ndarray
    of_samples: bool = True


class Judge:
    """Scores of models on two parts of the samples.

    Args:
        metric: called with a model; a number, or scores of samples. ``None``: fidelity.
        search, evaluation: fidelity on either part.
        rows: how many samples the data holds, and part → which of them: where the metric scores as
            many, it is taken to score the same ones.
        shares: of the parts, where the metric's samples are others.
        level: of confidence. seed: of the split and of intervals.
    """

    def __init__(
        self,
        metric: Callable[[nn.Module], Any] | None,
        search: Fidelity,
        evaluation: Fidelity,
        *,
        indices: Mapping[str, np.ndarray],
        shares: tuple[float, float, float],
        level: float,
        seed: int,
    ) -> None:
        self._metric, self.search, self._evaluation = metric, search, evaluation
        self._indices, self._shares = indices, shares
        self._level, self._seed = level, seed
        self.runs = 0
        if metric is None:
            self.name = Fidelity.name
        else:
            name = getattr(metric, "__name__", type(metric).__name__)
            self.name = "metric" if name == "<lambda>" else name
        self._binary = None if metric else False  # cosines that are all 1 are no coin flips
        self._before: Scores | None = None

    def run(self, model: nn.Module) -> Scores:
        """What a model scores. Nothing looks at the held-out scores before :meth:`compare`."""
        if self._metric is None:
            return Scores(self.search(model), self._evaluation(model))
        self.runs += 1
        with torch.inference_mode(), evaluating(model):
            value, found = scores("metric(model)", self._metric(model))
        if found is None:
            one = np.array([value])
            return Scores(one, one, False)
        parts = self._parts(len(found))
        return Scores(found[parts["search"]], found[parts["evaluation"]])

    def start(self, model: nn.Module) -> Scores:
        """Score the float model, which all others are compared with."""
        if self._metric is None:
            ours, held_out = self.search(model), self._evaluation(model)
            self._before = Scores(np.ones(len(ours)), np.ones(len(held_out)))
        else:
            self._before = self.run(model)
        return self._before

    def search_drop(self, after: Scores) -> Estimate:
        """``before − after`` on the search data."""
        before = self.float_scores
        d = before.search - after.search
        if not after.of_samples:
            return _number(float(d[0]), self._level)
        return estimate(d, binary=False, level=self._level, seed=self._seed)

    def compare(self, after: Scores) -> Comparison:
        """The float model with another on held-out data."""
        a, b = self.float_scores.evaluation, after.evaluation
        if after is self.float_scores:
            return self.exact()
        if not after.of_samples:
            first, second, change = (
                _number(float(x), self._level) for x in (a[0], b[0], b[0] - a[0])
            )
            return Comparison(first, second, change, math.nan, None)
        return paired(a, b, binary=self._binary, level=self._level, seed=self._seed)

    def exact(self) -> Comparison:
        """The float model with itself: no difference, for certain."""
        scored = self.float_scores.evaluation
        if self.float_scores.of_samples:
            before = estimate(scored, binary=self._binary, level=self._level, seed=self._seed)
        else:
            before = _number(float(scored[0]), self._level)
        nothing = Estimate(0.0, 0.0, 0.0, before.n, self._level, "constant")
        return Comparison(before, before, nothing, 1.0, None)

    @property
    def float_scores(self) -> Scores:
        """The float model's, once :meth:`start` has run it."""
        assert self._before is not None
        return self._before

    def _parts(self, count: int) -> Mapping[str, np.ndarray]:
        if count == sum(len(part) for part in self._indices.values()):
            return self._indices
        _, search, evaluation = self._shares
        both = search + evaluation
        return split_indices(count, shares=(0.0, search / both, evaluation / both), seed=self._seed)


def _number(value: float, level: float) -> Estimate:
    """A metric that is one number tells nothing of how sure it is."""
    return Estimate(value, -math.inf, math.inf, 1, level, "none")
