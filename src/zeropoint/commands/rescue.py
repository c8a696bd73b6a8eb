"""``zeropoint rescue``: models of ``torch.ao.quantization`` into checkpoints of zeropoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import size
from .printing import check_writable, console, warn, write_json


def rescue(
    old: Annotated[
        Path,
        typer.Argument(
            metavar="OLD.pt",
            help="A state dict or model of torch.save, or an archive of torch.jit.save.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Where static layers' input scales come from: order, dynamic, or a .json file "
            "from layer to module or [scale, zero_point].",
        ),
    ] = None,
    no_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers whose bias of zeros is none. Repeatable."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="The entry to read, where the file is a dictionary of several."),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Compare integers and outputs with torch's, as far as it can.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON here.")
    ] = None,
) -> None:
    """Move what torch.ao.quantization made into a checkpoint, and prove that it is the same.

    Nothing that the file says is run. zeropoint.load puts the result into the float architecture.

    zeropoint rescue old.pt model.safetensors
    """
    from ..formats import torch_ao

    check_writable("OUT", out)
    check_writable("--json", json_file)
    how: Any = inputs
    if inputs is not None and inputs.endswith(".json"):
        how = _mapping(Path(inputs))
    elif inputs not in (None, "order", "dynamic"):
        raise typer.BadParameter(f"--inputs takes order, dynamic or a .json file, got {inputs!r}")
    report = torch_ao.rescue(old, out, inputs=how, no_bias=no_bias or (), key=key, compare=compare)
    console().print(report)
    content = report.to_dict()
    write_json(json_file, content)
    before, after = old.stat().st_size, out.stat().st_size
    typer.echo(f"\nWrote {out}: {size(after)}, from {size(before)}.")
    if not report.ok:
        warn(f"{out} does not compute what torch computes; see the table")
        raise typer.Exit(1)


def _mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a JSON object from layer to module, got {content!r:.40}"
        )
    return content
