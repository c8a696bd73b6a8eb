"""Models and data from the outside: what a command line or a script names by a string.

A model is a Hugging Face folder or ``package.module:factory``; data is a file of tensors or of
text. Nothing here unpickles: weights come from safetensors files, arrays from safetensors or numpy
files without objects, text from lines.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .quantize import RECIPES, Recipe, get_recipe

Batch = Tensor | dict[str, Tensor]
"""What one call of the model takes: ``model(batch)`` or ``model(**batch)``."""

DATA_FORMATS = (".safetensors", ".npz", ".npy", ".txt")


def load_recipe(recipe: str) -> Recipe:
    """A recipe by name, or from a JSON file (:meth:`Recipe.to_dict`).

    Raises:
        ValueError: neither a name nor a ``.json`` file, or a file that holds no recipe.
        FileNotFoundError: no such file.
    """
    if recipe in RECIPES or not recipe.endswith(".json"):
        try:
            return get_recipe(recipe)
        except ValueError as error:
            raise ValueError(f"{error}, which is no .json file either") from error
    try:
        return Recipe.from_dict(json.loads(Path(recipe).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{recipe} holds no recipe: {error}") from error


def needs_calibration(recipe: Recipe) -> bool:
    """Whether some layer of ``recipe`` is static or has a method that needs sample data."""
    layers = (recipe.default, *(layer for _, layer in recipe.overrides))
    return any(layer is not None and layer.needs_calibration for layer in layers)


@dataclass(frozen=True)
class Loaded:
    """A float model in eval mode, with what came beside it.

    Attributes:
        model: as loaded.
        tokenizer: of a folder that has one.
        warnings: for the user to see.
        missing: tensors of the model for which a folder holds no weights.
        unexpected: tensors of a folder that the model does not have.
    """

    model: nn.Module
    tokenizer: Any = None
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def is_tensor_file(model: str) -> bool:
    """Whether ``model`` names a safetensors file rather than something that can be run."""
    return model.endswith(".safetensors") or Path(model).is_file()


def load_model(model: str) -> Loaded:
    """The float model that a string names.

    Args:
        model: a Hugging Face folder (``config.json``, ``*.safetensors``, and a tokenizer if there
            is one), or ``package.module:factory``, where ``factory`` is an ``nn.Module`` or is
            called without arguments and returns one. The current directory is put on the path.

    Random numbers drawn on the way start at torch's seed 0, so that two commands that name the same
    model get the same one, parameters that no file holds included.

    Raises:
        ValueError, FileNotFoundError: the string names nothing of the kind.
        ImportError: the module, or transformers for a folder, cannot be imported.
        TypeError: the factory is not one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if Path(model).is_dir():
            loaded = _from_folder(Path(model))
        elif is_tensor_file(model):
            raise ValueError(
                f"MODEL {model!r} is a file of tensors, which cannot be run; name a Hugging Face "
                "folder or package.module:factory"
            )
        elif ":" in model and not model.startswith((".", "/", "~")):
            loaded = Loaded(_from_factory(model))
        else:
            raise FileNotFoundError(
                f"MODEL {model!r} is neither a folder or file that exists nor of the form "
                "package.module:factory"
            )
    loaded.model.eval()
    return loaded


def _from_factory(text: str) -> nn.Module:
    module_name, _, attribute = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ImportError(f"MODEL {text!r}: there is no module {error.name!r}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ImportError(f"MODEL {text!r}: {module_name} has no {attribute!r}") from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise TypeError(
                f"MODEL {text!r} must be callable or an nn.Module, got {type(found).__name__}"
            )
        found = found()
    if not isinstance(found, nn.Module):
        raise TypeError(f"MODEL {text!r} must return an nn.Module, got {type(found).__name__}")
    return found


def _from_folder(folder: Path) -> Loaded:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"MODEL {str(folder)!r} is a folder without config.json")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"MODEL {str(folder)!r} holds no *.safetensors (pickled weights are not read)"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"MODEL {str(folder)!r} is a Hugging Face folder, which needs transformers: "
            "pip install 'zeropoint[models]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    architecture = _architecture(transformers, names)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    model, info = architecture.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        # The dtype of the file, under the name that this version knows.
        **{"dtype" if version >= (4, 56) else "torch_dtype": "auto"},
    )
    warnings = []
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        warnings.append(f"{folder} holds no weights for {len(missing)} tensors ({shown}): random")
    return Loaded(
        model,
        _tokenizer(transformers, folder),
        tuple(warnings),
        tuple(missing),
        tuple(sorted(info["unexpected_keys"])),
    )


def _architecture(transformers: Any, names: Any) -> Any:
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"config.json names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have (code from the folder is not run)"
        )
    return found


def _tokenizer(transformers: Any, folder: Path) -> Any:
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_data(
    path: str | os.PathLike[str],
    loaded: Loaded,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    max_tokens: int = 128,
) -> list[Batch]:
    """Batches for ``loaded.model`` from a file.

    ================  ============================================================================
    ``.safetensors``  named tensors, batched along dimension 0; the names are the model's arguments
    ``.npz``          named arrays, likewise
    ``.npy``          one array, batched along dimension 0, the model's first argument
    ``.txt``          a text a line (UTF-8, empty lines skipped), for a folder with a tokenizer
    ================  ============================================================================

    Texts of one length in tokens make a batch, so that none is padded: what a model makes of
    padding would count in calibration and comparison as if it mattered. The largest batch comes
    first.

    A file with one tensor whose name is no argument of the model is passed as the first argument.
    Floats are converted to the dtype of the model's parameters, other numbers are kept.

    Args:
        path: the file.
        loaded: the model, and its tokenizer where it has one.
        batch_size: rows (or lines) a batch, at least 1.
        limit: use the first so many rows (or lines) only.
        max_tokens: longer texts are cut.

    Raises:
        ValueError: a format that is not known, objects (pickles) in a file, tensors of different
            length along dimension 0, names that the model does not take, no rows at all.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if path.suffix not in DATA_FORMATS:
        raise ValueError(f"{path} must end in {', '.join(DATA_FORMATS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".txt":
        return _texts(path, loaded, batch_size, limit, max_tokens)
    tensors = _read_tensors(path)
    lengths = {name: (t.shape[0] if t.ndim else None) for name, t in tensors.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        listed = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"{path}: tensors must have one length along dimension 0, got {listed}")
    rows = min(next(iter(lengths.values()), 0) or 0, limit or sys.maxsize)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), None)
    tensors = {
        name: t[:rows].to(dtype if dtype is not None and t.is_floating_point() else t.dtype)
        for name, t in tensors.items()
    }
    inputs = _inputs(path, tensors, loaded.model)
    if isinstance(inputs, Tensor):
        return list(inputs.split(batch_size))
    return [
        {name: t[start : start + batch_size] for name, t in inputs.items()}
        for start in range(0, rows, batch_size)
    ]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    import numpy as np

    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            arrays = {"": content}
        else:
            with content:
                arrays = {name: content[name] for name in content.files}
    except Exception as error:  # a damaged file may raise zipfile's, zlib's, struct's … errors
        raise ValueError(f"{path} is not a numpy file of plain arrays: {error}") from error
    try:
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    except (TypeError, ValueError) as error:  # text, dates, foreign byte order
        raise ValueError(f"{path}: {error}") from error


def _inputs(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> Batch:
    names, takes_any = _arguments(model)
    if all(name in names for name in tensors):
        return tensors
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if takes_any:
        return tensors
    unknown = ", ".join(repr(name) for name in tensors if name not in names)
    raise ValueError(f"{path}: the model takes {', '.join(names)}; it does not take {unknown}")


def _arguments(model: nn.Module) -> tuple[list[str], bool]:
    """The names that ``model(...)`` takes, and whether it takes any other."""
    parameters = inspect.signature(model.forward).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        [p.name for p in parameters if p.kind in by_name],
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def _texts(
    path: Path, loaded: Loaded, batch_size: int, limit: int | None, max_tokens: int
) -> list[Batch]:
    if loaded.tokenizer is None:
        raise ValueError(f"{path} is text, which needs a Hugging Face folder with a tokenizer")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()][:limit]
    if not lines:
        raise ValueError(f"{path} holds no lines")
    positions = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    length = min(max_tokens, loaded.tokenizer.model_max_length, positions or max_tokens)
    names, takes_any = _arguments(loaded.model)
    encoded: Mapping[str, list[list[int]]] = loaded.tokenizer(
        lines, truncation=True, max_length=length
    )
    by_length: dict[int, list[int]] = {}
    for number, tokens in enumerate(encoded["input_ids"]):
        by_length.setdefault(len(tokens), []).append(number)
    chunks = [
        numbers[start : start + batch_size]
        for tokens, numbers in by_length.items()
        if tokens
        for start in range(0, len(numbers), batch_size)
    ]
    if not chunks:
        raise ValueError(f"{path} holds no tokens")
    chunks.sort(key=lambda chunk: -len(chunk) * len(encoded["input_ids"][chunk[0]]))
    return [
        {
            name: torch.tensor([values[number] for number in chunk])
            for name, values in encoded.items()
            if takes_any or name in names
        }
        for chunk in chunks
    ]
