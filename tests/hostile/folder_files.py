"""Folders that must be refused, whichever library's quantization they claim: compressed-tensors,
GPTQ, AWQ.

Each is a good folder with one thing wrong. ``MARK`` is what a pickle among them would make.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = Path("struck")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Strike:
    """Makes ``MARK`` where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (MARK,))


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Strike()))


def _pickle_by_the_weights_name(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Strike()))


def _pickle_in_the_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "part.bin")
    _index(folder, "part.bin")


def _index(folder: Path, file: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))


def _index_out_of_the_folder(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    _index(folder, "../outside.safetensors")


def _absolute_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    _index(folder, str(folder.parent / "outside.safetensors"))


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])


def _longer(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        change(head)
        text = json.dumps(head).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


def _first(head: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in head.items() if name != "__metadata__")  # type: ignore[no-any-return]


def _endless_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])


def _config(text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return apply


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle_only": (_pickle_only, "neither model.safetensors nor"),
    "pickle_by_the_weights_name": (_pickle_by_the_weights_name, "header|not valid"),
    "pickle_in_the_index": (_pickle_in_the_index, "'part.bin' is no file of the folder"),
    "index_out_of_the_folder": (_index_out_of_the_folder, "is no file of the folder"),
    "absolute_index": (_absolute_index, "is no file of the folder"),
    "index_of_nothing": (lambda f: _index(f, "model.safetensors"), "lacks what .* lists"),
    "index_missing_file": (lambda f: _index(f, "x.safetensors"), "'x.safetensors' is missing"),
    "index_number": (lambda f: _index(f, 3), "must map tensors to file names"),
    "pipe": (_pipe, "neither model.safetensors nor|not a regular file"),
    "truncated": (_truncated, "header|bytes|truncated"),
    "longer": (_longer, "header|bytes|cover"),
    "endless_header": (_endless_header, "header"),
    "negative_size": (_header(lambda h: _first(h).update(shape=[-1, 4])), "shape"),
    "huge_size": (
        _header(lambda h: _first(h).update(shape=[1 << 62, 1 << 62])),
        "shape|bytes|size",
    ),
    "overlap": (
        _header(lambda h: _first(h).update(data_offsets=[0, 1 << 40])),
        "offset|bytes|overl",
    ),
    "unknown_dtype": (_header(lambda h: _first(h).update(dtype="I3")), "dtype"),
    "config_no_json": (_config("{"), "not valid JSON"),
    "config_deep": (_config("[" * 100_000), "not valid JSON"),
    "config_list": (_config("[]"), "must hold a JSON object"),
    "config_quantization_list": (
        _config('{"quantization_config": []}'),
        "JSON object|quant_method",
    ),
    "config_of_nobody": (_config('{"quantization_config": {"quant_method": "x"}}'), "quant_method"),
}
