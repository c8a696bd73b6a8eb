"""``zeropoint explain``: what scale and zero point do to given values, or to a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..explain import explain as explain_values
from ..formats.one_layer import load_layer
from ..modules import QuantizedLinear
from ..sources import is_tensor_file
from ..spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec
from .loading import load
from .options import JsonFile
from .printing import check_writable, console


def explain(
    values: Annotated[
        list[str] | None, typer.Argument(metavar="[NUMBER]...", help="Values to quantize.")
    ] = None,
    bits: Annotated[int, typer.Option(metavar="B", help="Width of the integers.")] = 8,
    scale: Annotated[
        float | None, typer.Option(metavar="S", help="By default chosen from the values.")
    ] = None,
    zero_point: Annotated[
        int | None, typer.Option(metavar="Z", help="The integer for real zero; with --scale.")
    ] = None,
    signed: Annotated[
        bool | None,
        typer.Option(
            "--signed/--unsigned",
            help="By default values and groups are unsigned, a layer's channels signed.",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric", help="A fixed zero point; by default where signed."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="As MODEL of quantize, or a checkpoint that quantize wrote."
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of its Linear layers.")
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(metavar="N", help="Which output channel; by default the coarsest."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(metavar="N", help="Which group; by default the coarsest.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(metavar="SIZE", help="One scale for each run of so many values or inputs."),
    ] = None,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="One scale for all weights of the layer.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg, .pdf …")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show what scale and zero point do: the integers, what they stand for, the error, its bound.

    zeropoint explain -1.0 0 2.5 --scale 0.5 --zero-point 10

    zeropoint explain --model ./all-MiniLM-L6-v2 --layer encoder.layer.0.output.dense
    """
    for option, path in (("--plot", plot), ("--json", json_file)):
        check_writable(option, path)
    if (model is None) == (not values):
        raise typer.BadParameter("give either numbers or --model MODEL")
    if (model is None) != (layer is None):
        raise typer.BadParameter("--model and --layer go together")
    if per_tensor and group_size is not None:
        raise typer.BadParameter("give --per-tensor or --group-size, not both")
    subject: Any = [_number(v) for v in values or []]
    granularity: Granularity = PerTensor() if group_size is None else PerGroup(group_size)
    name = ""
    if model is not None and layer is not None:
        subject, name = _layer(model, layer), layer
        if group_size is None and not per_tensor:
            granularity = PerChannel(0)
        signed = signed if signed is not None else group_size is None
    signed = bool(signed)
    spec = QuantSpec(bits, signed, signed if symmetric is None else symmetric, granularity)
    if isinstance(subject, QuantizedLinear):
        made = explain_values(subject, channel=channel, group=group, name=name)
    else:
        made = explain_values(
            subject, spec, scale=scale, zero_point=zero_point, channel=channel, group=group,
            name=name,
        )  # fmt: skip
    console(markup=True).print(made)
    if plot is not None:
        made.to_plot(plot)
    if json_file is not None:
        made.to_json(json_file)


def _layer(model: str, name: str) -> nn.Linear | QuantizedLinear:
    if is_tensor_file(model):
        return load_layer(model, name)
    modules = dict(load(model).model.named_modules())
    known = [n for n, m in modules.items() if isinstance(m, nn.Linear | QuantizedLinear)]
    if name not in known:
        shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        raise ValueError(f"--layer must name a Linear layer, got {name!r}; there are {shown}")
    found = modules[name]
    assert isinstance(found, nn.Linear | QuantizedLinear)
    return found


def _number(text: str) -> float:
    # Negative numbers look like options, so that click leaves unknown options to us.
    try:
        return float(text)
    except ValueError:
        what = "No such option" if text.startswith("-") else "not a number"
        raise typer.BadParameter(f"{what}: {text}") from None
