"""A diagnosis in the terminal, by rich: the verdict, the causes, then the layers, worst first."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..terminal import table as styled
from . import words
from .numbers import Damage, Diagnosis, LayerDiagnosis

WIDE = 110
"""Columns from which there is room for what the layers' activations and weights look like."""
SHOWN = 40
"""How many layers are listed at most; the JSON holds all."""


class View:
    """Verdict, whole model, causes, layers, one below the other."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self.diagnosis = diagnosis

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        d = self.diagnosis
        yield Text(d.verdict + "\n", style="bold")
        yield _whole(d)
        if d.causes:
            yield _causes(d)
        yield _layers(d, options.max_width >= WIDE)
        if d.left:
            yield _left(d)
        lines = [
            f"Damages: {d.samples} of {d.rows} rows, in {d.sample_batches} of {d.batches} batches. "
            f"Cost: {d.evaluations:.1f} runs of the model over the data; {d.seconds:.3g} s, where "
            f"one of them takes {d.evaluation_seconds:.3g} s.",
            *d.notes,
        ]
        yield Text("\n".join(lines), style="dim")


def _whole(d: Diagnosis) -> Table:
    table = styled(f"{d.model}, the whole model")
    for name in ("", "output error", "SQNR dB", "cosine"):
        table.add_column(name, justify="right" if name else "left")
    if d.metric is not None:
        table.add_column(d.metric.name, justify="right")
        table.add_row("float", "0", "", "", words.number(d.metric.float_model))
    for name, damage in (
        ("quantized by the recipe", d.damage_before),
        ("by the suggestions", d.damage_after),
    ):
        if damage is not None:
            cells = [*_damage(damage), words.cosine(damage.cosine)]
            if damage.metric is not None:
                cells.append(words.number(damage.metric))
            table.add_row(name, *cells)
    if d.metric is not None:
        said = [("loss", d.metric.loss), ("repair", d.metric.repair)]
        notes = [f"{what}: {x.verdict}" for what, x in said if x is not None]
        table.caption = escape("; ".join(notes)) or None
    return table


def _damage(x: Damage) -> tuple[str, str]:
    return words.error(x), words.decibels(x.sqnr_db)


def _causes(d: Diagnosis) -> Table:
    table = styled("Causes and cures, worst first")
    for name in ("layer", "cause", "evidence", "cure, measured"):
        table.add_column(name, overflow="fold")
    for x in d.causes:
        table.add_row(*(escape(t) for t in (x.label, x.kind, x.evidence, x.cure_text)))
    return table


def _layers(d: Diagnosis, wide: bool) -> Table:
    sick = [x.layer for x in d.causes]
    order = sorted(
        d.layers, key=lambda x: (x.name not in sick, -words.order(x.only_this.relative_error))
    )
    modes = {str(x.recipe) for x in d.layers}
    title = "Layers, worst first" + (f", all {modes.pop()}" if len(modes) == 1 else "")
    table = styled(title)
    table.add_column("layer", overflow="fold", min_width=16)
    for name in ("noise", "only", "all but", "alone"):
        table.add_column(name, justify="right")
    if wide:
        for name in ("weights", "inputs", "outliers", "clipped"):
            table.add_column(name, justify="right")
    for x in order[:SHOWN]:
        mark = "*" if x.name in sick else " "
        cells = [
            words.share(x.noise_share) + mark,
            words.decibels(x.only_this.sqnr_db),
            words.decibels(x.all_but_this.sqnr_db),
            words.decibels(x.both_sqnr_db),
        ]
        if wide:
            cells += _details(x)
        table.add_row(escape(x.label), *cells, style="bold" if mark == "*" else None)
    caption = (
        "noise: share of all layers' noise in the output. SQNR in dB: only, all but: of the "
        "model's output where this layer alone, or all others, are quantized; alone: of the "
        "layer's own "
        + ("output, weights, inputs: with these alone quantized. " if wide else "output. ")
        + "* stands out."
    )
    if len(order) > SHOWN:
        caption += f" {len(order) - SHOWN} more layers, which lose less, are in the JSON."
    table.caption = caption
    return table


def _details(x: LayerDiagnosis) -> list[str]:
    outliers = "–" if not x.outlier_count else f"{x.outlier_count} to {x.outliers[0].ratio:.0f} ×"
    clipped = "–" if x.activation_error is None else f"{x.activation_error.clipping:.0%}"
    return [
        words.decibels(x.weights_only_sqnr_db),
        words.decibels(x.activations_only_sqnr_db),
        outliers,
        clipped,
    ]


def _left(d: Diagnosis) -> Table:
    table = styled("Left in float")
    table.add_column("layer", overflow="fold")
    table.add_column("why")
    for name, reason in d.left.items():
        table.add_row(escape(name or "(model)"), escape(reason or "–"))
    return table
