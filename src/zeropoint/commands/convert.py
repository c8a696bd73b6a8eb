"""``zeropoint convert``: between checkpoints of zeropoint's and other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import size
from .convert_onnx import to_onnx
from .printing import check_writable, warn

READABLE = ("awq", "compressed-tensors", "gptq")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A folder or .safetensors file of compressed-tensors, GPTQ or AWQ; a .gguf file; "
            "or a checkpoint of zeropoint.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="FILE.safetensors: a checkpoint of zeropoint. FILE.gguf: GGUF. FILE.onnx: ONNX, "
            "of a checkpoint of zeropoint. A folder, new or empty: compressed-tensors.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The float model's config.json, for a folder. Default: the one beside IN.",
        ),
    ] = None,
    zero_points: Annotated[
        str | None,
        typer.Option(metavar="v1|v2", help="GPTQ: the convention, where the config is wrong."),
    ] = None,
    reordered: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="GPTQ: layers with inputs in another order: refuse or dequantize."
        ),
    ] = "refuse",
    q4_1: Annotated[
        str, typer.Option("--q4-1", metavar="HOW", help="GGUF: read Q4_1 as floats or integers.")
    ] = "floats",
    unfit: Annotated[
        str,
        typer.Option(metavar="HOW", help="GGUF: layers that no type holds: refuse, or as floats."),
    ] = "refuse",
    architecture: Annotated[
        str, typer.Option(metavar="NAME", help="GGUF: the general.architecture to write.")
    ] = "zeropoint",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="ONNX: the float model, a Hugging Face folder or package.module:factory.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="ONNX: example inputs: .safetensors, .npz, .npy, or lines of .txt. How many rows "
            "and tokens there are is not fixed by them.",
        ),
    ] = None,
    operators: Annotated[
        str, typer.Option(metavar="WHICH", help="ONNX: onnxruntime or standard.")
    ] = "onnxruntime",
) -> None:
    """Move a quantized checkpoint from one format into another, its integers unchanged.

    zeropoint convert ./Llama-AWQ llama.safetensors

    zeropoint convert model.safetensors ./w8a8 --config ./base/config.json

    zeropoint convert model.safetensors model.onnx --model ./base --data sentences.txt
    """
    from ..formats import compressed_tensors, gguf

    to_file = out.suffix in (".safetensors", ".gguf", ".onnx")
    check_writable("OUT", out if to_file else None)
    if out.suffix and not to_file and not out.is_dir():
        raise typer.BadParameter(
            f"OUT must end in .safetensors, .gguf or .onnx, or be a folder, got {str(out)!r}"
        )
    if config is not None and to_file:
        raise typer.BadParameter("--config is for a folder of compressed-tensors")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"OUT is IN, {source}")
    if (out.suffix == ".onnx") != (model is not None) or (model is None) != (data is None):
        raise typer.BadParameter("--model and --data are for FILE.onnx, which needs both")
    if model is not None and data is not None:
        for text in to_onnx(source, out, model, data, operators):
            warn(f"left behind: {text}")
        typer.echo(f"Wrote {out}: {size(_bytes(out))}, from {size(_bytes(source))}.")
        return
    contents = _read(source, zero_points=zero_points, reordered=reordered, q4_1=q4_1)
    left: tuple[str, ...] = ()
    if out.suffix == ".safetensors":
        if contents.format == "zeropoint":
            raise ValueError(f"{source} is a checkpoint of zeropoint already")
        contents.save(out)
        left = tuple(f"the integers of {n!r}: {why}" for n, why in contents.dequantized.items())
    elif out.suffix == ".gguf":
        how: Any = unfit
        left = gguf.write(contents, out, architecture=architecture, unfit=how)
    else:
        base = _config_beside(source) if config is None else config
        left = compressed_tensors.write(contents, out, config=base)
    for text in left:
        warn(f"left behind: {text}")
    for note in contents.notes:
        warn(note)
    count = len(contents.layers)
    layers = f"{count} quantized layer{'' if count == 1 else 's'}"
    typer.echo(f"{layers} of {contents.format}, {len(contents.tensors)} other tensors.")
    typer.echo(f"Wrote {out}: {size(_bytes(out))}, from {size(_bytes(source))}.")


def _read(source: Path, *, zero_points: Any, reordered: Any, q4_1: Any) -> Any:
    from ..formats import awq, compressed_tensors, contents, gguf, gptq
    from ..formats.container import open_reader
    from ..formats.hf_folder import open_folder

    if source.suffix == ".gguf":
        return gguf.read(source, q4_1=q4_1)
    if source.is_file():
        with open_reader(source) as reader:
            if reader.metadata.get("format") == "zeropoint":
                return contents.of_checkpoint(source)
    with open_folder(source) as folder:
        method = folder.quantization.get("quant_method")
    if method == "compressed-tensors":
        return compressed_tensors.read(source)
    if method == "gptq":
        return gptq.read(source, zero_points=zero_points, reordered=reordered)
    if method == "awq":
        return awq.read(source)
    said = "no quantization_config" if method is None else f"quant_method {str(method)[:40]!r}"
    raise ValueError(f"{source} has {said}; read are {', '.join(READABLE)}, .gguf and zeropoint's")


def _config_beside(source: Path) -> dict[str, Any] | None:
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {content!r:.40}")
    old = ("quantization_config", "compression_config")
    return {key: value for key, value in content.items() if key not in old}


def _bytes(path: Path) -> int:
    files = path.glob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
