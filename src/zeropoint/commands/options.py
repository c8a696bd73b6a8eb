"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quantize import RECIPES

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder; or package.module:factory, a callable that returns an "
        "nn.Module.",
    ),
]
Data = Annotated[
    Path,
    typer.Option(metavar="FILE", help="Inputs: .safetensors, .npz, .npy, or lines of .txt."),
]
To = Annotated[
    str,
    typer.Option(
        metavar="RECIPE",
        help=f"{', '.join(RECIPES)}, or a recipe as a .json file.",
        autocompletion=lambda: list(RECIPES),
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write JSON here too.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Only layers whose name matches. Repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave layers whose name matches. Repeatable."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows or lines of data a batch.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many rows or lines only.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Cut longer lines of text.")]
