"""Quantize a model from a folder of safetensors files, larger than memory if it must be.

Weights are mapped from the files, not read into memory: the system brings in the pages that a layer
computes with, and drops them when it needs the room. Quantized layers are written, block by block,
and mapped in turn. What is held is one block's inputs, the sums of its layers, and what one layer's
quantization takes. The arithmetic is :func:`zeropoint.quantize`'s, and so are the bits.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import doctor
from .calibrate import Call, check_batches
from .formats import native
from .formats.hf_folder import CONFIG, open_folder
from .formats.parts import open_parts, sync
from .quantize import LayerRecipe, QuantizationSummary, Recipe, get_recipe, quantize_and_keep
from .sources import Loaded, load_data, load_model

_IN_MEMORY = 0.1
"""Share of the weights above which it is told that they are in memory."""


def quantize_folder(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    recipe: str | Recipe | LayerRecipe = "int8-dynamic",
    *,
    calibration: Iterable[Any] | str | os.PathLike[str] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    max_tokens: int = 128,
    resume: bool = True,
    progress: bool = True,
) -> QuantizationSummary:
    """Quantize a Hugging Face folder into a checkpoint or another folder, within little memory.

    The result is, bit for bit, what :func:`zeropoint.quantize` makes of the loaded model. Memory
    does not grow with the number of layers: see docs/large_models.md.

    Finished layers are kept beside ``path_out``, in a folder of that name and ``.unfinished``,
    until all is done. If the process is killed, or fails, the same call goes on after the last
    finished block, with the same result as without the interruption.

    Args:
        path_in: ``config.json`` and ``model.safetensors`` or shards of it with their index, as
            ``save_pretrained`` writes them. Do not change the files meanwhile.
        path_out: a name that ends in ``.safetensors``: a checkpoint for :func:`zeropoint.load`,
            replaced if it is there. Any other: a folder for ``from_pretrained`` (see
            docs/transformers.md), which must be new or empty, with the tokenizer if there is one.
        recipe: as :func:`zeropoint.quantize`.
        calibration: sample batches, as there, of tensors and plain values; or the path of a file
            of them, as docs/cli.md describes. Only where the recipe needs data.
        include, exclude: as there.
        batch_size, limit, max_tokens: of data from a file: rows or texts in a batch; how many in
            all; where longer texts are cut.
        resume: go on with an unfinished run; otherwise begin anew.
        progress: show progress bars where it takes over two seconds and stderr is a terminal.

    Returns:
        What was done, by layer.

    Raises:
        CheckpointError: a file is truncated or no safetensors file; files and index do not fit.
        ValueError: as :func:`zeropoint.quantize`; the folder is quantized already, or lacks weights
            that the model has; nothing would be quantized; an unfinished run of another model,
            recipe or data is there.
        FileExistsError: ``path_out`` is a folder that is not empty.
        OSError: the file system's; another process is at it.
    """
    recipe = get_recipe(recipe)
    patterns = {"include": _listed(include), "exclude": _listed(exclude)}
    path_in, target = Path(path_in), Path(os.path.realpath(path_out))
    to_file = target.suffix == ".safetensors"
    _check_target(path_out, target, to_file)
    shards = _check_source(path_in)
    loaded = load_model(str(path_in))
    _check_loaded(path_in, loaded, shards)
    if isinstance(calibration, str | os.PathLike):
        calibration = load_data(
            calibration, loaded, batch_size=batch_size, limit=limit, max_tokens=max_tokens
        )
    elif calibration is not None:
        check_batches(calibration)
        calibration = list(calibration)
    made_for = {
        "version of zeropoint": doctor.version("zeropoint"),
        "version of torch": torch.__version__,
        "model": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in shards],
        "recipe": recipe.to_dict(),
        **patterns,
        "calibration": None if calibration is None else _digest(calibration),
    }
    with open_parts(target.with_name(f"{target.name}.unfinished"), made_for, resume) as parts:
        with _without_cache(loaded.model):
            model = quantize_and_keep(
                loaded.model, recipe, None, calibration, **patterns, inplace=True,
                progress=progress, keep=parts.keep,
            )  # fmt: skip
        summary: QuantizationSummary = model.quantization  # type: ignore[assignment]
        if not summary.quantized and not summary.embeddings:
            raise ValueError(f"nothing was quantized, so {path_out} was not written")
        finished = parts.folder / f"finished{target.suffix if to_file else ''}"
        if to_file:
            native.save(model, finished, progress=progress)
        else:
            _save_folder(model, loaded.tokenizer, finished)
            if target.exists():
                target.rmdir()  # empty, or it is not removed
        finished.replace(target)
    return summary


def _listed(patterns: str | Iterable[str] | None) -> Any:
    return patterns if patterns is None or isinstance(patterns, str) else list(patterns)


def _check_target(asked: Any, target: Path, to_file: bool) -> None:
    """Before any work is done."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{asked}: there is no folder {target.parent}")
    if to_file and target.is_dir():
        raise IsADirectoryError(f"{asked} is a folder")
    if not to_file and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"{asked} is there already, and is no empty folder; a checkpoint's name ends in "
            ".safetensors"
        )


def _check_source(folder: Path) -> list[Path]:
    """The files that the model is made of, all of them sound as far as their headers tell."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no folder with a {CONFIG}")
    with open_folder(folder) as opened:
        if opened.quantization:
            by = str(opened.quantization.get("quant_method", "another library"))[:40]
            raise ValueError(f"{folder} is quantized already, by {by}")
        return [folder / CONFIG, *opened.files]


def _check_loaded(folder: Path, loaded: Loaded, shards: list[Path]) -> None:
    for kind, names in (("missing", loaded.missing), ("unexpected", loaded.unexpected)):
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        if names and kind == "missing":
            raise ValueError(
                f"{folder} holds no weights for {len(names)} tensors of the model ({shown}); they "
                "would be random"
            )
        if names:
            warnings.warn(
                f"{folder} holds {len(names)} tensors that the model does not have ({shown}): left "
                "out",
                UserWarning,
                stacklevel=3,
            )
    held, total = _in_memory(loaded.model, shards)
    if held > _IN_MEMORY * total:
        warnings.warn(
            f"{held >> 20} of {total >> 20} MiB of the weights are in memory: transformers "
            "converts or rearranges them while it loads this folder",
            UserWarning,
            stacklevel=3,
        )


def _in_memory(model: nn.Module, files: list[Path]) -> tuple[int, int]:
    """Bytes of the parameters that are not mapped from the files (0 where the system does not
    tell), and of all."""
    sizes = {p.data_ptr(): p.nbytes for p in model.parameters()}
    total = sum(sizes.values())
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0, total
    names = {os.path.realpath(file) for file in files}
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in lines
        if line.split(maxsplit=5)[5:] and line.split(maxsplit=5)[5] in names
    ]
    mapped = sum(n for at, n in sizes.items() if any(a <= at < b for a, b in spans))
    return total - mapped, total


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No keys and values are remembered: a block that is given a cache cannot run by itself."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    changed = {id(c): c for c in configs if getattr(c, "use_cache", False) is True}.values()
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def _digest(data: Any) -> str:
    """SHA-256 of batches."""
    sha256 = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Call):
            value = (value.args, value.kwargs)
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha256.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            sha256.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            sha256.update(f"mapping {len(value)}".encode())
            for key in value:
                take(key)
                take(value[key])
        elif isinstance(value, list | tuple):
            sha256.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                take(item)
        elif value is None or isinstance(value, bool | int | float | str):
            sha256.update(f"{type(value).__name__} {value!r}".encode())
        else:
            raise TypeError(
                "calibration must hold tensors and plain values, which tell whether it is the same "
                f"data as before; got {type(value).__name__}"
            )

    take(data)
    return sha256.hexdigest()


def _save_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    from .integrations.transformers import make_savable

    make_savable(model).save_pretrained(folder, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    sync(folder)
