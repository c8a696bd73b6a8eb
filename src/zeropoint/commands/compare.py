"""``zeropoint compare``: what quantization cost a model, and all else that is known of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .. import sources
from ..formats import native
from ..report import compare as compare_models
from .loading import load
from .options import BatchSize, Data, JsonFile, Limit, MaxTokens
from .printing import check_writable, console, warn_if_reference

if TYPE_CHECKING:
    from ..diagnose.numbers import Diagnosis
    from ..search.numbers import Front

Found = TypeVar("Found")


def compare(
    model: Annotated[str, typer.Argument(metavar="FLOAT_MODEL", help="As MODEL of quantize.")],
    file: Annotated[
        Path, typer.Argument(metavar="QUANTIZED_FILE", help="What quantize wrote for that model.")
    ],
    data: Data,
    json_file: JsonFile = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")
    ] = None,
    diagnosis: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show what diagnose --json wrote, too.")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show what search --json wrote, too.")
    ] = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
) -> None:
    """Run a float model and its quantized file side by side: error, bytes and time, by layer.

    zeropoint compare ./all-MiniLM-L6-v2 minilm.safetensors --data sentences.txt --html out.html
    """
    for option, path in (("--json", json_file), ("--html", html)):
        check_writable(option, path)
    beside = _diagnosis(diagnosis), _front(front)
    warn_if_reference()
    loaded = load(model)
    batches = sources.load_data(
        data, loaded, batch_size=batch_size, limit=limit, max_tokens=max_tokens
    )
    quantized = native.load(file, copy.deepcopy(loaded.model))
    report = compare_models(loaded.model, quantized, batches).beside(*beside)
    console(markup=True).print(report)
    if json_file is not None:
        report.to_json(json_file)
    if html is not None:
        report.to_html(html)


# Imported where needed: what is read costs nothing where nothing is.
def _diagnosis(path: Path | None) -> Diagnosis | None:
    if path is None:
        return None
    from ..diagnose.numbers import Diagnosis

    return _read(path, Diagnosis.from_dict)


def _front(path: Path | None) -> Front | None:
    if path is None:
        return None
    from ..search.numbers import Front

    return _read(path, Front.from_dict)


def _read(path: Path, make: Callable[[Any], Found]) -> Found:
    try:
        return make(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
