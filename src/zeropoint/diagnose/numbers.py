"""The numbers of a diagnosis. Nothing here measures or draws.

A signal-to-quantization-noise ratio is ``SQNR = 10 · log10(Σ y² / Σ (y − ŷ)²)`` in decibels, with
``y`` the float value and ``ŷ`` the quantized one; +inf: no error at all, NaN: nothing was compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..atomic import write_text
from ..plain import to_text
from ..recipes import LayerRecipe, Recipe
from ..statistics import Comparison

SCHEMA_VERSION = 1
"""Version of the JSON: raised when a field changes its meaning or goes, not when one is added."""

NO_SIGNAL_DB = -300.0
"""The SQNR that stands for noise where the float value is zero throughout."""

Kind = Literal["outlier-channels", "bad-range", "coarse-activations", "sensitive"]
"""Why a layer loses: see :class:`Cause`."""


def sqnr_db(signal: float, noise: float) -> float:
    """``10 · log10(signal / noise)`` of two powers, at least :data:`NO_SIGNAL_DB`.

    >>> sqnr_db(100.0, 1.0), sqnr_db(1.0, 0.0), sqnr_db(0.0, 1.0)
    (20.0, inf, -300.0)
    """
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0:
        return NO_SIGNAL_DB
    return max(10 * (math.log10(signal) - math.log10(noise)), NO_SIGNAL_DB)


@dataclass(frozen=True)
class Damage:
    """How far a model's output is from the float model's, over the rows that were compared.

    Args:
        relative_error: ``√(Σ (y − ŷ)² / Σ y²)``; 0 where nothing is lost, NaN where nothing could
            be compared (no finite element, or outputs of another shape).
        cosine: mean cosine of the vectors along the last dimension; NaN where there was none.
        metric: the caller's metric of this model; ``None`` where it was not measured.
        elements: how many output elements were compared.
        non_finite: elements that are NaN or infinite on one side and not the same on the other;
            they are in none of the sums.
    """

    relative_error: float
    cosine: float
    metric: float | None = None
    elements: int = 0
    non_finite: int = 0

    @property
    def noise(self) -> float:
        """``Σ (y − ŷ)² / Σ y²``: noise power for a signal of power 1."""
        return self.relative_error**2

    @property
    def sqnr_db(self) -> float:
        """The same in decibels; +inf: no error, NaN: nothing was compared."""
        return sqnr_db(1.0, self.noise)


@dataclass(frozen=True)
class OutlierChannel:
    """An input channel whose largest magnitude is ``ratio`` times the median channel's.

    Args:
        index: of the channel, along in_features.
        amax: its largest magnitude over all the data.
        ratio: ``amax`` over the median of the channels' largest magnitudes (of those not zero).
    """

    index: int
    amax: float
    ratio: float


@dataclass(frozen=True)
class ErrorSplit:
    """Shares of a tensor's squared quantization error. They add up to 1, or are 0 without error.

    Args:
        clipping: of values beyond the representable range, half a step included.
        rounding: of all others.
    """

    clipping: float
    rounding: float


@dataclass(frozen=True)
class Saturation:
    """Fraction of integers at ``qmin`` or ``qmax``. Exact zeros are not counted: behind a ReLU they
    are at the end of the range, and lose nothing.

    Args:
        weight: of the weights.
        activation: of the inputs; ``None`` where these stay float.
    """

    weight: float
    activation: float | None


@dataclass(frozen=True)
class LayerDiagnosis:
    """One Linear layer that the recipe quantizes.

    The SQNRs are of the layer alone, fed with the float model's inputs, on at most
    :attr:`Diagnosis.statistics_rows` rows of these, taken evenly from all the data. A layer that
    the data never calls has ``calls`` 0 and NaN in their place.

    Args:
        name: qualified name in the model; ``""`` is the model itself.
        in_features, out_features: of the layer.
        recipe: what the layer was to get.
        calls: how often one pass over the data calls it.
        weight_sqnr_db: the dequantized weights against the float ones.
        weights_only_sqnr_db: the output, quantized weights × float activations.
        activations_only_sqnr_db: the output, float weights × quantized activations; +inf where the
            recipe leaves activations float.
        both_sqnr_db: the output, as the recipe says. Where the recipe holds a method that rotates,
            parts that cannot be told apart are NaN.
        only_this: the model's output where this layer alone is quantized.
        all_but_this: the model's output where all other layers are quantized.
        noise_share: of the sum of all layers' ``only_this.noise``, this layer's share.
        outliers: channels that stand out, largest ratio first, at most :data:`OUTLIERS_LISTED`.
        outlier_count: how many there are.
        weight_error: how the weights' squared error splits up.
        activation_error: the inputs'; ``None`` where these stay float.
        saturation: integers at the ends of their range.
        bytes: of the quantized weight with scales, zero points and factors; not the bias.
        float_bytes: of the float weight.
    """

    name: str
    in_features: int
    out_features: int
    recipe: LayerRecipe
    calls: int
    weight_sqnr_db: float
    weights_only_sqnr_db: float
    activations_only_sqnr_db: float
    both_sqnr_db: float
    only_this: Damage
    all_but_this: Damage
    noise_share: float
    outliers: tuple[OutlierChannel, ...]
    outlier_count: int
    weight_error: ErrorSplit
    activation_error: ErrorSplit | None
    saturation: Saturation
    bytes: int
    float_bytes: int

    @property
    def label(self) -> str:
        """The name, or ``(model)`` for the root."""
        return self.name or "(model)"


OUTLIERS_LISTED = 8
"""How many outlier channels of a layer are listed."""


@dataclass(frozen=True)
class Trial:
    """A cure that was tried on one layer.

    Args:
        text: what it is, in words.
        recipe: what the layer was given; ``None``: it stayed float.
        sqnr_db: of the layer alone, as :attr:`LayerDiagnosis.both_sqnr_db`.
        damage: the model's output where this layer alone is quantized, in this way; ``None`` where
            the layer alone told enough.
        bytes: of the weight in this form.
        suffices: whether the layer no longer stands out among the others.
    """

    text: str
    recipe: LayerRecipe | None
    sqnr_db: float
    damage: Damage | None
    bytes: int
    suffices: bool


@dataclass(frozen=True)
class Cause:
    """Why the model loses, in one layer, and what mends it. Each cure was measured.

    Args:
        layer: its name.
        kind: ``"outlier-channels"`` few input channels are many times larger than the rest and
            stretch everyone's steps; ``"bad-range"`` the static range of the inputs was chosen
            badly, and another observer chooses better; ``"coarse-activations"`` the inputs lose
            most, for another reason; ``"sensitive"`` the weights lose most: the layer needs more
            bits, or smaller groups, than others.
        evidence: the numbers that say so.
        cure: what the layer gets in :attr:`Diagnosis.suggestions`; ``None`` keeps it float.
        cure_text: the same in words, with the measured repair.
        before, after: the model's output where only this layer is quantized, by the recipe and by
            the cure.
        trials: what was tried, in order; the last one that suffices is the cure.
    """

    layer: str
    kind: Kind
    evidence: str
    cure: LayerRecipe | None
    cure_text: str
    before: Damage
    after: Damage
    trials: tuple[Trial, ...] = ()

    @property
    def label(self) -> str:
        """The layer's name, or ``(model)`` for the root."""
        return self.layer or "(model)"


@dataclass(frozen=True)
class MetricChange:
    """The caller's metric of three models.

    Args:
        name: of the metric.
        float_model, quantized, repaired: its value; ``repaired`` is ``None`` without suggestions.
        loss, repair: float against quantized, quantized against repaired, sample by sample; only
            where the metric gave per-sample scores and scipy is installed.
    """

    name: str
    float_model: float
    quantized: float
    repaired: float | None
    loss: Comparison | None = None
    repair: Comparison | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Which layers lose what, why, and what mends it. Made by :func:`zeropoint.diagnose`.

    ``print(diagnosis)`` is a table; :meth:`print` one with weight and colour; :meth:`to_json`
    writes a file.

    Args:
        model: class name.
        recipe: what was diagnosed.
        batches, rows: of the data; a row is an index of dimension 0, a sample.
        samples: on how many of the rows damages were measured, in ``sample_batches`` batches.
        sample_batches: see ``samples``.
        statistics_rows: how many input rows of a layer its statistics come from, at most.
        damage_before: all layers quantized by the recipe.
        damage_after: all layers quantized by ``suggestions``; ``None`` where these are the recipe.
        metric: the caller's metric, ``None`` where none was given.
        layers: in model order.
        left: Linear layers that the recipe leaves float: name → reason.
        causes: worst first; empty where no layer stands out.
        suggestions: a recipe for ``quantize`` that cures the causes.
        evaluations: what the diagnosis cost in runs of the model over all the data: rows run by the
            model, over rows of the data, and calls of the metric; statistics of layers not counted.
        evaluation_seconds: one run of the float model over the data.
        seconds: the whole diagnosis, interrupted earlier runs included.
        notes: what else there is to know.
    """

    model: str
    recipe: Recipe
    batches: int
    rows: int
    samples: int
    sample_batches: int
    statistics_rows: int
    damage_before: Damage
    damage_after: Damage | None
    metric: MetricChange | None
    layers: tuple[LayerDiagnosis, ...]
    left: Mapping[str, str]
    causes: tuple[Cause, ...]
    suggestions: Recipe
    evaluations: float
    evaluation_seconds: float
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """A few sentences for someone who reads nothing else."""
        from .words import verdict

        return verdict(self)

    @property
    def cost(self) -> float:
        """The time of the diagnosis over that of one run of the float model over the data."""
        return self.seconds / self.evaluation_seconds if self.evaluation_seconds else math.nan

    def worst(self, count: int) -> list[LayerDiagnosis]:
        """The layers that damage the output most when they alone are quantized, worst first."""
        known = [x for x in self.layers if x.only_this.noise > 0]
        return sorted(known, key=lambda x: -x.only_this.noise)[:count]

    def layer(self, name: str) -> LayerDiagnosis:
        """The layer of this name.

        Raises:
            KeyError: there is none.
        """
        for x in self.layers:
            if x.name == name:
                return x
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, as :func:`schema` describes them.

        Numbers that JSON does not have are ``None``; the schema says what that means where.
        """
        from .as_json import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """The inverse of :meth:`to_dict`; unknown fields are ignored.

        Raises:
            ValueError: another schema version, or a field that is missing or of the wrong type.
        """
        from .as_json import from_dict

        return from_dict(data)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The diagnosis as JSON text, also written to ``path`` (atomically) where one is given."""
        text = to_text(self.to_dict())
        if path is not None:
            write_text(path, text)
        return text

    def print(self) -> None:
        """The table, to the terminal, with weight and colour."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> Any:
        from .table import View

        return View(self)

    def __str__(self) -> str:
        from ..terminal import plain_text

        return plain_text(self)
