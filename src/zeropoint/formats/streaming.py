"""Quantize a float safetensors file without a model, a block of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..affine import choose_qparams, quantize_per_tensor, quantize_to_spec
from ..algorithms import needs_data, quantize_weight
from ..algorithms.hadamard import rotation
from ..modules import QuantizedLinear
from ..quantize import LayerRecipe, QuantizationSummary, Recipe, get_recipe
from ..spec import PerGroup, PerTensor, QuantSpec
from ..tensor import QTensor
from . import header as _header
from .container import CheckpointError, Reader, TensorInfo, open_reader, progress_bar
from .embedding_info import EmbeddingInfo
from .header import AnyInfo, LayerInfo, qualified
from .writer import Writer, open_writer

EMBEDDINGS = ("*embed*", "*wte", "*wpe", "shared", "*relative_attention_bias")
"""Names that embedding tables go by. Their weights are 2-D as well, but no Linear layer's."""

BLOCK_BYTES = 1 << 20
"""Bytes of a weight quantized at a time; the temporaries take some ten times as much."""

_FLOATS = ("F16", "BF16", "F32", "F64")


def quantize_file(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    recipe: str | Recipe | LayerRecipe = "int8-dynamic",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = True,
) -> QuantizationSummary:
    """Quantize the Linear weights of a float safetensors file into a checkpoint.

    A file does not say which of its tensors are weights of Linear layers: those taken for one are
    the 2-D floating-point tensors named ``<layer>.weight``, embedding tables by their names
    (:data:`EMBEDDINGS`) excepted. Where the recipe has ``embeddings``, what goes by such a name is
    quantized as a table, unless ``exclude`` holds it. Everything else is copied byte for byte. The
    integers are those that :func:`zeropoint.quantize` gives the same layer. :func:`zeropoint.load`
    refuses the file with the layer's name where the model has no Linear layer, or no embedding,
    there; name it in ``exclude`` then. The same helps where a model ties an output layer to a
    table: the file says nothing of such a tie if it holds the weight once, and the output layer's
    is missing when the table is integers.

    Memory: some ten times a block of 1 MiB (or of one row, where a row is longer), whatever the
    size of the tensors and the file.

    Args:
        path_in: a safetensors file.
        path_out: the checkpoint, written atomically; may be ``path_in``.
        recipe: a name, :class:`Recipe` or :class:`LayerRecipe` without static layers and without
            methods that look at data, which need a model to calibrate. Other methods take weights
            per channel or per group.
        include: glob patterns of the layers to consider; default all. ``*`` also matches dots.
        exclude: glob patterns of layers to leave float, instead of :data:`EMBEDDINGS`.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.

    Returns:
        What was quantized and what was left, with reasons, by layer; only 2-D weights are listed.

    Raises:
        TypeError: a pattern that is not a string.
        ValueError: an unknown recipe, or one that needs a model to calibrate; a method and a weight
            per tensor; a pattern that matches no 2-D weight.
        CheckpointError: ``path_in`` is not a sound safetensors file or a checkpoint already; NaN or
            Inf in a weight, with the layer's name. No file is written.
        OSError: the file system's.
    """
    recipe = get_recipe(recipe)
    for layer in (recipe.default, *(layer for _, layer in recipe.overrides)):
        if layer is not None and layer.mode == "static":
            raise ValueError(
                "recipe must not be static here: static layers need a model to calibrate; use "
                "zeropoint.quantize"
            )
        if layer is not None and layer.needs_calibration:
            raise ValueError(
                f"recipe must not use {needs_data(layer.method)[0]!r} here, which looks at data "
                "and so needs a model; use zeropoint.quantize"
            )
        if layer is not None and layer.method and layer.weight.granularity == PerTensor():
            raise ValueError(
                f"recipe must be per channel or per group here for method {layer.method[0]!r}, got "
                "per tensor, for which a weight must be read whole; use zeropoint.quantize"
            )
    with open_reader(path_in) as reader:
        plan = _Plan(reader, recipe, _patterns("include", include), _patterns("exclude", exclude))

        def header(infos: dict[str, TensorInfo], sha256: dict[str, str]) -> dict[str, str]:
            return _header.encode(plan.layers, plan.aliases, plan.metadata, infos, sha256)

        total = sum(tensor.nbytes for tensor in reader.tensors.values())
        with (
            open_writer(path_out, plan.entries(), header) as writer,
            progress_bar("quantizing", total, progress) as bar,
        ):
            for name, tensor in reader.tensors.items():
                if name in plan.copied:
                    for chunk in reader.chunks(name):
                        writer.write(name, chunk)
                        bar.update(len(chunk))
                elif name in plan.weights:
                    _quantize(reader, writer, name, plan.weights[name], plan.recipes)
                    bar.update(tensor.nbytes)
                else:  # the bias of a quantized layer
                    for block in _blocks(reader, tensor):
                        writer.write_tensor(name, block.to(torch.float32))
                    bar.update(tensor.nbytes)
        return QuantizationSummary(
            quantized=plan.chosen,
            left=plan.left,
            unmatched=plan.unmatched,
            embeddings=plan.tables,
            embeddings_left=plan.tables_left,
        )


class _Plan:
    """Which weights are quantized, and what the file will hold."""

    def __init__(
        self,
        reader: Reader,
        recipe: Recipe,
        include: tuple[str, ...] | None,
        exclude: tuple[str, ...] | None,
    ) -> None:
        if reader.metadata.get("format") == _header.FORMAT:
            raise CheckpointError(reader.path, "a zeropoint checkpoint already")
        self._reader = reader
        tensors = reader.tensors
        # save_model of the safetensors package notes tied names so.
        self.aliases = {
            name: target
            for name, target in reader.metadata.items()
            if target in tensors and name not in tensors
        }
        self.metadata = {
            key: value
            for key, value in reader.metadata.items()
            if key not in _header.RESERVED and key not in self.aliases
        }
        names = [
            name.removesuffix("weight").removesuffix(".")
            for name, t in tensors.items()
            if (name == "weight" or name.endswith(".weight"))
            and len(t.shape) == 2
            and t.dtype in _FLOATS
        ]
        for argument, patterns in (("include", include), ("exclude", exclude)):
            for pattern in patterns or ():
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{argument}: {pattern!r} matches no 2-D weight of the file")
        self.chosen: dict[str, LayerRecipe] = {}
        self.left: dict[str, str] = {}
        self.tables: dict[str, QuantSpec] = {}
        self.tables_left: dict[str, str] = {}
        used: set[str] = set()
        for name in names:
            if recipe.embeddings is not None and _first(EMBEDDINGS, name):
                if include is not None and not _first(include, name):
                    self.tables_left[name] = "not in include"
                elif excluding := _first(exclude or (), name):
                    self.tables_left[name] = f"excluded by {excluding!r}"
                elif reason := self._unfit(name) or self._no_table(name):
                    self.tables_left[name] = reason
                else:
                    self.tables[name] = recipe.embeddings
                continue
            layer, decided_by = recipe.match([name])
            used.update(() if decided_by is None else (decided_by,))
            excluding = _first(EMBEDDINGS if exclude is None else exclude, name)
            if include is not None and not _first(include, name):
                self.left[name] = "not in include"
            elif excluding is not None:
                what = "an embedding table by its name" if exclude is None else "excluded by"
                self.left[name] = f"{what} {excluding!r}"
            elif layer is None:
                self.left[name] = "the recipe keeps it float"
            elif reason := self._unfit(name):
                self.left[name] = reason
            else:
                self.chosen[name] = layer
        self.unmatched = tuple(p for p, _ in recipe.overrides if p not in used)
        # A table's rows are quantized as a layer's are.
        as_layers = {n: LayerRecipe("weight-only", spec) for n, spec in self.tables.items()}
        self.recipes = self.chosen | as_layers
        self.layers: dict[str, AnyInfo] = {}
        self.weights: dict[str, str] = {}
        replaced: set[str] = set()
        for name, layer in self.chosen.items():
            out_features, in_features = tensors[qualified(name, "weight")].shape
            bias = qualified(name, "bias") in tensors
            groups = layer.weight.granularity
            self.layers[name] = LayerInfo(
                layer.mode,
                in_features,
                out_features,
                bias,
                bits=layer.weight.bits,
                group_size=groups.size if isinstance(groups, PerGroup) else None,
                scale_dtype=str(layer.weight.scale_dtype).removeprefix("torch."),
                rotation=_rotation(layer, in_features)[1],
            )
            self.weights[qualified(name, "weight")] = name
            replaced |= {qualified(name, "weight"), qualified(name, "bias")}
        for name, spec in self.tables.items():
            weight, groups = tensors[qualified(name, "weight")], spec.granularity
            num_embeddings, embedding_dim = weight.shape
            self.layers[name] = EmbeddingInfo(
                num_embeddings,
                embedding_dim,
                str(weight.torch_dtype).removeprefix("torch."),
                bits=spec.bits,
                group_size=groups.size if isinstance(groups, PerGroup) else None,
                scale_dtype=str(spec.scale_dtype).removeprefix("torch."),
            )
            self.weights[weight.name] = name
            replaced.add(weight.name)
        self.copied = tensors.keys() - replaced

    def _no_table(self, name: str) -> str | None:
        has_bias = qualified(name, "bias") in self._reader.tensors
        return "it has a bias, so it is no embedding" if has_bias else None

    def _unfit(self, name: str) -> str | None:
        tensors = self._reader.tensors
        weight = tensors[qualified(name, "weight")]
        bias = tensors.get(qualified(name, "bias"))
        if not math.prod(weight.shape):
            return f"its weight is empty, {weight.shape}"
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in _FLOATS):
            return f"its bias is {bias.dtype} {list(bias.shape)}, no Linear layer's"
        for key in ("scale", "zero_point", "input_factor"):
            other = qualified(name, key)
            if other in tensors or other in self.aliases:
                return f"the file has a tensor {other!r} of its own"
        for alias, target in self.aliases.items():
            for key in ("weight", "bias"):
                if qualified(name, key) in (alias, target):
                    return f"its {key} is tied: {alias!r} is {target!r}"
        return None

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor of the output."""
        for name in self.copied:
            tensor = self._reader.tensors[name]
            yield name, tensor.dtype, tensor.shape
        for layer, info in self.layers.items():
            for key, (dtype, shape) in info.tensors().items():
                yield qualified(layer, key), dtype, shape


def _quantize(
    reader: Reader, writer: Writer, name: str, layer: str, recipes: dict[str, LayerRecipe]
) -> None:
    recipe, tensor = recipes[layer], reader.tensors[name]
    per_tensor = isinstance(recipe.weight.granularity, PerTensor)
    whole = _range(reader, tensor, layer) if per_tensor else None
    for block in _blocks(reader, tensor):
        _require_finite(reader.path, layer, name, block)
        if recipe.method:
            q = quantize_weight(block, None, recipe.weight, recipe.method).weight
        elif whole is None:
            q = quantize_to_spec(block, recipe.weight)
        else:
            scale, zero_point = choose_qparams(*whole, recipe.weight)
            spec = recipe.weight
            q = quantize_per_tensor(block, scale, zero_point, spec.dtype, bits=spec.bits)
        _write_block(writer, layer, q)
    factor, size = _rotation(recipe, tensor.shape[1])
    if size:
        writer.write_tensor(qualified(layer, "input_factor"), factor)


def _rotation(recipe: LayerRecipe, in_features: int) -> tuple[Tensor, int]:
    """The factor and the size of the rotation that change a layer's input; 0: nothing does."""
    if "hadamard" not in recipe.method:
        return torch.empty(0), 0
    factor, size = rotation(in_features)
    return factor, size if size > 1 else 0


def _write_block(writer: Writer, layer: str, q: QTensor) -> None:
    rows = QuantizedLinear.from_quantized(q)  # knows how a layer holds its integers
    for key in ("weight", "scale", "zero_point"):
        writer.write_tensor(qualified(layer, key), getattr(rows, key))


def _range(reader: Reader, tensor: TensorInfo, layer: str) -> tuple[Tensor, Tensor]:
    lo, hi = torch.tensor(math.inf), torch.tensor(-math.inf)
    for block in _blocks(reader, tensor):
        _require_finite(reader.path, layer, tensor.name, block)
        block = block.to(torch.float32)
        lo, hi = torch.minimum(lo, block.amin()), torch.maximum(hi, block.amax())
    return lo, hi


def _require_finite(path: Path, layer: str, name: str, block: Tensor) -> None:
    if not bool(block.isfinite().all()):
        raise CheckpointError(path, "it holds NaN or Inf", layer, name)


def _blocks(reader: Reader, tensor: TensorInfo) -> Iterator[Tensor]:
    """A tensor's rows, as many at a time as fit a few MiB, at least one."""
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.nbytes else 1
    for chunk in reader.chunks(tensor.name, max(BLOCK_BYTES // row_bytes, 1) * row_bytes):
        flat = torch.frombuffer(bytearray(chunk), dtype=tensor.torch_dtype)
        yield flat.reshape(-1, *tensor.shape[1:])


def _first(patterns: Iterable[str], name: str) -> str | None:
    return next((p for p in patterns if fnmatchcase(name, p)), None)


def _patterns(argument: str, value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold patterns (str), got {type(pattern).__name__}")
    return patterns
