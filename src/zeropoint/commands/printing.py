"""What commands print with, and the files they write."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .. import kernels
from ..atomic import write_text


def console(markup: bool = False) -> Console:
    """On stdout. Into a pipe or file, 80 columns would fold tables; who wants that sets COLUMNS."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=120 if wide else None, markup=markup, highlight=False)


def table(*headings: str) -> Table:
    """A plain table, its numbers on the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        made.add_column(heading, overflow="fold", justify="right" if number > 1 else "left")
    return made


def error(text: str) -> None:
    """One line on stderr."""
    typer.echo(f"error: {' '.join(text.split())}", err=True)


def warn(text: object) -> None:
    """One line on stderr."""
    typer.echo(f"warning: {' '.join(str(text).split())}", err=True)


def warn_if_reference() -> None:
    """Where times are taken, and no kernel is there to take them of."""
    if kernels.active_isa() == kernels.REFERENCE:
        warn("no kernel computes here but the slow reference; see zeropoint doctor")


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """``content``, with a version before it, where a path is given."""
    if path is not None:
        write_text(path, json.dumps({"version": 1} | content, indent=2) + "\n")


def check_writable(option: str, path: Path | None) -> None:
    """Before any work is done, not after.

    Raises:
        FileNotFoundError, IsADirectoryError: no file can be written there.
    """
    if path is not None and not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.resolve().parent}")
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder")
