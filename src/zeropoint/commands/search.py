"""``zeropoint search``: what each layer should get, within a budget."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .. import sources
from ..atomic import write_text
from ..quantize import RECIPES
from ..search import CHOICES
from ..search import search as search_model
from .loading import load
from .options import BatchSize, Data, Exclude, Include, Limit, MaxTokens, Model
from .printing import check_writable, console, warn_if_reference

_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def search(
    model: Model,
    data: Data,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="D", help="Of the cosine with the float model's outputs: 0.001, say."),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the model: 25000000, or 25MB.")
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Of one call on the first batch: 0.004, or 4ms."),
    ] = None,
    choices: Annotated[
        str, typer.Option(metavar="RECIPE,...", help=f"Of {', '.join(RECIPES)}; float always.")
    ] = ",".join(CHOICES),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the recipe, for quantize --to FILE.json."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the whole front as JSON.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    certain: Annotated[
        bool, typer.Option("--certain", help="Take only what is certain to keep --max-drop.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of splits and of all that is random.")] = 0,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
) -> None:
    """Find the smallest, fastest or best mixture of recipes within a budget.

    The data are split; what is reported was measured on samples that decided nothing.

    zeropoint search ./all-MiniLM-L6-v2 --data sentences.txt --max-drop 0.002 --out recipe.json
    """
    for option, path in (("--out", out), ("--json", json_file)):
        check_writable(option, path)
    if out is not None and out.suffix != ".json":
        raise typer.BadParameter(f"--out must end in .json, so that quantize takes it, got {out}")
    budget = {
        "max_drop": max_drop,
        "max_bytes": None if max_bytes is None else int(_number("--max-bytes", max_bytes, "25MB")),
        "max_latency": None
        if max_latency is None
        else _number("--max-latency", max_latency, "4ms"),
    }
    if out is not None and not any(x is not None for x in budget.values()):
        raise typer.BadParameter("--out needs a budget: --max-drop, --max-bytes or --max-latency")
    if max_latency is not None:
        warn_if_reference()
    loaded = load(model)
    batches = sources.load_data(
        data, loaded, batch_size=batch_size, limit=limit, max_tokens=max_tokens
    )
    front = search_model(
        loaded.model,
        batches,
        choices=[choice.strip() for choice in choices.split(",")],
        include=include or None,
        exclude=exclude or None,
        certain=certain,
        seed=seed,
        **budget,  # type: ignore[arg-type]
    )
    console(markup=True).print(front)
    if json_file is not None:
        front.to_json(json_file)
    if any(x is not None for x in budget.values()):
        recipe = front.recipe  # without one, the error says what comes nearest
        if out is not None:
            write_text(out, json.dumps(recipe.to_dict(), indent=1) + "\n")
            typer.echo(f"Wrote {out}, for zeropoint quantize {model} --to {out}.")


def _number(option: str, text: str, example: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?) *([a-zµ]*)", text.strip().lower())
    sizes = {"kb", "mb", "gb", ""} if option == "--max-bytes" else {"us", "µs", "ms", "s", ""}
    if match and match[2] in sizes:
        try:
            return float(match[1]) * _UNITS[match[2]]
        except ValueError:
            pass
    raise typer.BadParameter(f"{option} takes a number such as {example}, got {text!r}")
