"""ONNX: a quantized model written for ONNX Runtime and others, its weights integers in the file.
Needs ``pip install 'zeropoint[onnx]'``. See docs/onnx.md.

torch's exporter translates the float parts of a model; what quantized layers become, is in
:mod:`zeropoint.formats.onnx_lowering`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..packed_linear import PackedLinear
from ..running import evaluating

__all__ = ["write"]

_OPSET = 21  # the first with integers of 4 bits and with blocks
_LARGEST = 2**31 - 2**20
"""Bytes of tensors that a single file may hold: protobuf's limit, less room for the graph."""


def write(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    operators: Literal["onnxruntime", "standard"] = "onnxruntime",
    external_data: bool | None = None,
) -> tuple[str, ...]:
    """Write a quantized model as an ONNX file, with opset 21.

    Args:
        model: with quantized layers. It is not changed; it is exported in eval mode.
        path: of the file, written atomically.
        args, kwargs: what the model is called with, for example. Tensors become inputs of the file,
            everything else is fixed.
        dynamic_shapes: which dimensions may vary, as for :func:`torch.export.export`, for example
            ``({0: torch.export.Dim.DYNAMIC},)``. By default all are those of the example.
        input_names, output_names: of the file, in order; by default torch's.
        operators: ``"onnxruntime"`` uses its MatMulNBits for weights of 4 bits and of groups;
            ``"standard"`` writes ONNX's own operators only, for other runtimes. ONNX Runtime rounds
            the float activations of such a file to 8 bits, unless told not to.
        external_data: whether tensors go into a second file, ``NAME.data`` beside it; ``None``:
            where they have more than 2 GB, which one file cannot hold.

    Returns:
        What the file has not, in words; empty where nothing is.

    Raises:
        ImportError: a package of ``zeropoint[onnx]`` is not installed.
        TypeError: ``model`` is no module.
        ValueError: no quantized layer; a layer that cannot be written, which is named; an argument
            that is none of those; tensors for which one file is too small.
        FileExistsError: the second file is there already.
        torch.onnx.OnnxExporterError: torch cannot export the model.
        OSError: the file system's.

    >>> import tempfile, zeropoint
    >>> model = zeropoint.quantize(nn.Sequential(nn.Linear(32, 8)), "int8-dynamic")
    >>> with tempfile.TemporaryDirectory() as there:
    ...     write(model, f"{there}/model.onnx", (torch.randn(4, 32),))
    ()
    """
    onnx = _package()
    if operators not in ("onnxruntime", "standard"):
        raise ValueError(f"operators must be 'onnxruntime' or 'standard', got {operators!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            raise ValueError(
                f"layer {name!r} is a PackedLinear, whose weight is laid out for this machine; "
                "zeropoint.unpack_model(model) first"
            )
    names = {"input_names": input_names, "output_names": output_names}
    graph, left = _exported(model, args, kwargs, dynamic_shapes, names, operators == "standard")
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if external_data is None:
        external_data = size > _LARGEST
    elif not external_data and size > _LARGEST:
        raise ValueError(f"external_data must not be False for tensors of {size} bytes")
    _save(onnx, graph, Path(os.path.realpath(path)), external_data)
    return left


def _package() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ImportError(
            f"ONNX files need onnx and onnxscript ({error}): pip install 'zeropoint[onnx]'"
        ) from error
    return onnx


def _exported(
    model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any, names: Any, standard: bool
) -> tuple[Any, tuple[str, ...]]:
    """The graph, as onnx_ir has it, and what it has not."""
    from .onnx_graph import remove_unused
    from .onnx_lowering import Lowering
    from .onnx_operators import embeddings_as_nodes, translations

    with torch.no_grad(), evaluating(model), embeddings_as_nodes(model):
        program = torch.onnx.export(
            model,
            tuple(args),
            kwargs=dict(kwargs or {}),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=translations(),
            **names,
        )
    assert program is not None
    lowering = Lowering(program.model, standard)
    if not lowering.run():
        raise ValueError(
            "model has no quantized layer that is called; torch.onnx.export writes float models"
        )
    remove_unused(program.model)
    return program.model, tuple(lowering.left)


def _save(onnx: Any, graph: Any, target: Path, external_data: bool) -> None:
    """Both files under their names in a folder beside ``target``, then moved."""
    import onnx_ir

    data = target.with_name(f"{target.name}.data")
    if external_data and data.exists():
        # Replaced, it would belong to the old file until that is replaced too.
        raise FileExistsError(f"{data} is there already")
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".zeropoint-"))
    try:
        file = folder / target.name
        onnx_ir.save(graph, file, external_data=data.name if external_data else None)
        onnx.checker.check_model(file)
        for written in folder.iterdir():
            with written.open("rb+") as opened:
                os.fsync(opened.fileno())
        if (folder / data.name).exists():
            (folder / data.name).replace(data)
        try:
            file.replace(target)
        except BaseException:
            if external_data:
                data.unlink(missing_ok=True)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
