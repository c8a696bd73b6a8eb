"""The numbers of a report. Nothing here measures or draws; ``as_json`` reads and writes them.

Units: seconds, bytes, decibels. A signal-to-quantization-noise ratio is
``SQNR = 10 · log10(Σ y² / Σ (y − ŷ)²)`` with ``y`` the float model's value and ``ŷ`` the quantized
model's: 20 dB is noise of a tenth of the signal's amplitude, 40 dB of a hundredth.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..atomic import write_text
from ..statistics import Comparison, Estimate

if TYPE_CHECKING:
    from ..diagnose.numbers import Diagnosis
    from ..search.numbers import Front


@dataclass(frozen=True)
class Difference:
    """How far two tensors are apart, summed over everything that was seen.

    ``signal_power`` and ``noise_power`` are ``Σ y²`` and ``Σ (y − ŷ)²``. ``non_finite`` counts
    elements that are NaN or infinite on one side and not the same on the other: they are in none
    of the sums. ``skipped_calls`` counts calls whose two outputs could not be compared, because
    the models called the layer another number of times or with other shapes.
    """

    signal_power: float = 0.0
    noise_power: float = 0.0
    max_abs_error: float = 0.0
    elements: int = 0
    non_finite: int = 0
    skipped_calls: int = 0

    @property
    def sqnr_db(self) -> float:
        """dB. +inf: exact. −inf: noise without signal. NaN: nothing was compared."""
        if self.elements == self.non_finite:
            return math.nan
        if self.noise_power == 0:
            return math.inf
        if self.signal_power == 0:
            return -math.inf
        return 10 * (math.log10(self.signal_power) - math.log10(self.noise_power))

    @property
    def exact(self) -> bool:
        """Every element that was compared is the same."""
        return self.elements > 0 and self.noise_power == 0 and self.non_finite == 0


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of wall-clock seconds over ``repeats`` runs."""

    median: float
    q1: float
    q3: float
    repeats: int


@dataclass(frozen=True)
class Latency:
    """One batch, timed on both models in turn. ``inputs`` says the batch's shapes."""

    name: str
    inputs: str
    before: Timing
    after: Timing

    @property
    def speedup(self) -> float:
        """How many times faster the quantized model is; below 1 it is slower."""
        return self.before.median / self.after.median if self.after.median > 0 else math.nan

    @property
    def distinguishable(self) -> bool:
        """The two interquartile ranges do not overlap."""
        return self.before.q1 > self.after.q3 or self.after.q1 > self.before.q3


@dataclass(frozen=True)
class Grid:
    """The reals one output channel's weights can take: ``scale · (q − zero_point)``."""

    label: str
    scale: float
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True)
class Histogram:
    """Counts of float values between ``edges`` (one more than counts), and the grids they are
    rounded to: finest, median and coarsest; none where each row has its own."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Integers:
    """How many values became each integer, from ``qmin`` upwards."""

    qmin: int
    counts: tuple[int, ...]

    @property
    def used(self) -> int:
        """How many different integers occur."""
        return sum(c > 0 for c in self.counts)


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Args:
        name: qualified name in the quantized model; ``""`` is the model itself.
        mode: of the :class:`~zeropoint.QuantizedLinear`.
        weight: the weights alone, float against dequantized.
        alone: the layer's output, fed with the float model's input of that layer.
        accumulated: the running quantized model's output of the layer against the running float
            model's: with what all layers before it have lost.
        bytes_before, bytes_after: the weight; after, with its scales and zero points.
        seconds_before, seconds_after: median time of the layer in one pass of the model over the
            first timed batch; ``None`` where nothing was timed.
        histogram: of the float weights.
        integers: what became of them.
        inputs: histogram of the activations that the float model feeds the layer with; of a call
            with over 131,072 of them, of rows taken evenly. ``None`` where the layer never ran.
        input_integers: what the quantized layer makes of these; ``None`` where they stay float.
        recipe: what the layer was given, in words; ``""`` where that is not known.
    """

    name: str
    mode: str
    in_features: int
    out_features: int
    weight: Difference
    alone: Difference
    accumulated: Difference
    bytes_before: int
    bytes_after: int
    seconds_before: float | None = None
    seconds_after: float | None = None
    histogram: Histogram | None = None
    integers: Integers | None = None
    inputs: Histogram | None = None
    input_integers: Integers | None = None
    recipe: str = ""

    @property
    def label(self) -> str:
        """The name, or ``(model)`` for the root."""
        return self.name or "(model)"


@dataclass(frozen=True)
class Outputs:
    """The two models' outputs. Cosines are taken between vectors along the last dimension.

    ``cosine`` is their mean with its interval, where a sample is an index of dimension 0; ``None``
    where there is no vector, or scipy is not installed.
    """

    difference: Difference
    cosine_mean: float
    cosine_min: float
    vectors: int
    cosine: Estimate | None = None


@dataclass(frozen=True)
class Metric:
    """What the caller's ``metric`` said of each model.

    ``comparison`` holds the intervals, and whether the change is significant; ``None`` where the
    metric gives one number and no scores of the samples, or scipy is not installed.
    """

    name: str
    before: float
    after: float
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Environment:
    """Where the numbers come from. ``date`` is UTC, ISO 8601."""

    date: str
    cpu: str
    logical_cpus: int
    threads: int
    isa: str
    available_isas: tuple[str, ...]
    platform: str
    python: str
    torch: str
    zeropoint: str


@dataclass(frozen=True)
class Report:
    """What quantization cost and what it brought. Made by :func:`zeropoint.compare`.

    ``print(report)`` is a table; ``rich.print(report)`` one with weight and colour;
    :meth:`to_json` and :meth:`to_html` write files. ``layers`` are in model order; ``left`` names
    the Linear layers that stayed float, and why where that is known. ``diagnosis`` and ``front``
    are what else is known of the model, see :meth:`beside`.
    """

    model: str
    batches: int
    outputs: Outputs
    metric: Metric | None
    bytes_before: int
    bytes_after: int
    latency: tuple[Latency, ...]
    layers: tuple[LayerReport, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    environment: Environment | None = None
    diagnosis: Diagnosis | None = None
    front: Front | None = None

    def beside(self, diagnosis: Diagnosis | None = None, front: Front | None = None) -> Report:
        """This report with a diagnosis or a front, so that all its forms show them too.

        Args:
            diagnosis: what :func:`zeropoint.diagnose` found of the same model; ``None`` keeps what
                the report has.
            front: what :func:`zeropoint.search` found, likewise.
        """
        return replace(self, diagnosis=diagnosis or self.diagnosis, front=front or self.front)

    @property
    def verdict(self) -> str:
        """One or two sentences for someone who reads nothing else."""
        from .words import verdict

        return verdict(self)

    def worst(self, count: int) -> list[LayerReport]:
        """The layers that lose most alone, worst first; exact ones and ones not run are none."""
        lossy = [x for x in self.layers if x.alone.sqnr_db < math.inf]
        return sorted(lossy, key=lambda x: x.alone.sqnr_db)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, as :func:`zeropoint.report.schema` says.

        Numbers that JSON does not have are ``None``; the schema says what that means where.
        """
        from .as_json import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`; unknown fields are ignored.

        Raises:
            ValueError: another schema version, or a field that is missing or of the wrong type.
        """
        from .as_json import from_dict

        return from_dict(data)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to ``path`` (atomically) where one is given."""
        from .as_json import to_text

        text = to_text(self)
        if path is not None:
            write_text(path, text)
        return text

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        diagnosis: Diagnosis | None = None,
        front: Front | None = None,
    ) -> str:
        """One self-contained page that works offline, also written to ``path`` (atomically).

        Args:
            path: the file to write, or ``None``.
            title: heading of the page, by default made of the model's name.
            diagnosis, front: as :meth:`beside`.

        Raises:
            ImportError: jinja2 or matplotlib is not installed.
        """
        from .page import render

        text = render(self.beside(diagnosis, front), title)
        if path is not None:
            write_text(path, text)
        return text

    def __rich__(self) -> Any:
        from .table import View

        return View(self)

    def __str__(self) -> str:
        from ..terminal import plain_text

        return plain_text(self)
