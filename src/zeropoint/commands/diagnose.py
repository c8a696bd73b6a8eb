"""``zeropoint diagnose``: which layers lose what, why, and what mends it; on request, mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from .. import sources
from ..diagnose import Diagnosis
from ..diagnose import diagnose as diagnose_model
from ..diagnose.variants import chosen
from ..formats import native
from ..quantize import quantize
from ..recipes import Recipe
from ..report import compare, words
from ..report.numbers import Report
from .loading import load
from .options import BatchSize, Data, JsonFile, Limit, MaxTokens, Model, To
from .printing import check_writable, console, table, warn


def diagnose(
    model: Model,
    data: Data,
    to: To = "int8-dynamic",
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Data to calibrate with; by default that of --data."),
    ] = None,
    json_file: JsonFile = None,
    apply: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Quantize by the suggestions, write a checkpoint, and show before and after.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what was measured, to go on after a kill."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows of data on which each layer's damage is measured; by default some."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
) -> None:
    """Find out which layers lose what under quantization, why, and what mends it.

    zeropoint diagnose ./all-MiniLM-L6-v2 --data sentences.txt --to int8-static --apply int8.zp
    """
    recipe = sources.load_recipe(to)
    for option, path in (("--json", json_file), ("--apply", apply), ("--cache", cache)):
        check_writable(option, path)
    loaded = load(model)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "limit": limit,
        "max_tokens": max_tokens,
    }
    batches = sources.load_data(data, loaded, **options)
    calibration = None if calibrate is None else sources.load_data(calibrate, loaded, **options)
    found = diagnose_model(
        loaded.model,
        batches,
        recipe=recipe,
        calibration=calibration,
        samples=samples,
        cache=cache,
    )
    console(markup=True).print(found)
    if json_file is not None:
        found.to_json(json_file)
    if apply is not None:
        _apply(loaded.model, found, batches, calibration or batches, apply)


def _apply(
    model: nn.Module, found: Diagnosis, batches: list[Any], calibration: list[Any], out: Path
) -> None:
    """Quantize by the recipe and by the suggestions, compare both with the float model."""
    if not found.causes:
        warn("nothing was suggested; the checkpoint follows the recipe as it is")
    shown = table("", "SQNR", "cosine, mean", "worst", "size")
    reports: list[Report] = []
    for recipe in dict.fromkeys((found.recipe, found.suggestions)):
        quantized = _quantized(model, recipe, calibration)
        reports.append(compare(model, quantized, batches, repeats=0))
    native.save(quantized, out)
    for name, r in zip(("before", "after"), reports, strict=False):
        o = r.outputs
        shown.add_row(
            name,
            words.decibels(o.difference),
            words.cosine(o.cosine_mean),
            words.cosine(o.cosine_min),
            words.size(r.bytes_after),
        )
    console().print(f"\nOn all {found.rows} rows:", shown, sep="\n")
    typer.echo(f"Wrote {out}: {words.size(out.stat().st_size)}.")


def _quantized(model: nn.Module, recipe: Recipe, calibration: list[Any]) -> nn.Module:
    layers = chosen(model, recipe).chosen.values()
    needed = any(layer.needs_calibration for layer in layers)
    return quantize(model, recipe, calibration=calibration if needed else None)
