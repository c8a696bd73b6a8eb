"""An unfinished model on disk: its finished layers, part by part, and what they were made for.

A folder with ``begun.json``, which says of what model, recipe and data the layers are, and a
checkpoint (:mod:`zeropoint.formats.native`) for each part, in the order in which they were made. A
part appears complete or not at all, so a process may be killed at any moment. What was written is
mapped, not held: it takes no memory that the system could not have back.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ..atomic import write_text
from ..methods import Built
from . import header as _header
from .assembled import without_twins, write_checkpoint
from .container import CheckpointError, open_reader
from .header import info_of, qualified

_BEGUN, _LOCK = "begun.json", "lock"


class Parts:
    """The parts in a folder; made by :func:`open_parts`.

    Attributes:
        folder: where they are.
        found: how many there were of an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = len(list(folder.glob("part-*.safetensors")))
        self._next = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept yet."""
        return not max(self.found, self._next)

    def keep(self, names: list[str], made: Callable[[], Built]) -> Built:
        """The next part (a :data:`zeropoint.methods.Keep`): read where it is there; otherwise made
        and written.

        Raises:
            CheckpointError: a part is damaged, or of other layers.
        """
        path = self.folder / f"part-{self._next:05}.safetensors"
        again = path.is_file()
        if not again:
            _write(path, names, made())
            _give_back()
        self._next += 1
        return _read(path, names, verify=again)


@contextmanager
def open_parts(folder: Path, made_for: dict[str, Any], resume: bool) -> Iterator[Parts]:
    """The folder of an unfinished model, made where there is none. It stays when the block ends
    badly, if there is a part in it, and goes when the block ends well.

    Args:
        folder: beside what will be the model.
        made_for: all that the parts depend on, as JSON types; the keys are words for messages.
        resume: go on with parts of an earlier run; otherwise they are thrown away.

    Raises:
        ValueError: the parts that are there were made for something else.
        OSError: another process is at it, or the file system's.
    """
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        _lock(lock, folder)
        if not resume:
            _remove_all_but(folder, lambda name: name == _LOCK)
        begun = folder / _BEGUN
        made_for = json.loads(json.dumps(made_for))
        if begun.is_file():
            _compare(folder, json.loads(begun.read_text(encoding="utf-8")), made_for)
            kept = (_BEGUN, _LOCK)  # what a killed process was just writing is no part
            _remove_all_but(folder, lambda name: name in kept or name.startswith("part-"))
        else:
            _remove_all_but(folder, lambda name: name == _LOCK)
            write_text(begun, json.dumps(made_for, indent=1) + "\n")
        parts = Parts(folder)
        try:
            yield parts
        except BaseException:
            if parts.is_empty:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _give_back() -> None:
    """Let the system have what was freed. glibc would keep it where small objects, a layer's say,
    lie between large ones: the more of it, the more layers there are."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _lock(file: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{folder} is in use: another process quantizes the same model") from None


def _remove_all_but(folder: Path, stays: Callable[[str], bool]) -> None:
    for path in folder.iterdir():
        if not stays(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _compare(folder: Path, before: Any, now: dict[str, Any]) -> None:
    before = before if isinstance(before, dict) else {}
    if other := [key for key in now if before.get(key) != now[key]]:
        raise ValueError(
            f"{folder} is of an unfinished run with another {' and '.join(other)}; begin anew with "
            "resume=False (--restart), or delete it"
        )


def _write(path: Path, names: list[str], built: Built) -> None:
    layers = {name: info for name, layer in built.layers.items() if (info := info_of(layer))}
    held: dict[str, Tensor] = {}
    for name, info in layers.items():
        held |= {qualified(name, key): getattr(built.layers[name], key) for key in info.tensors()}
    tensors, aliases = without_twins(path, held)
    said = {"names": names, "done": built.done, "tied": built.tied, "uncalled": built.uncalled}
    metadata = {key: json.dumps(value) for key, value in said.items()}
    write_checkpoint(path, tensors, aliases, layers, metadata)


def _read(path: Path, names: list[str], verify: bool) -> Built:
    with open_reader(path) as reader:
        header = _header.decode(reader)
        if verify:
            for name in reader.tensors:
                reader.verify(name, header.sha256[name])
    said = {key: json.loads(value) for key, value in header.metadata.items()}
    if said["names"] != names:
        raise CheckpointError(path, f"of layers {said['names']}, expected {names}")
    mapped = load_file(path)
    layers: dict[str, nn.Module] = {}
    for name, info in header.layers.items():
        layer = layers[name] = info.build("meta").eval()
        for key in info.tensors():
            setattr(layer, key, mapped[header.source(qualified(name, key))])
    return Built(layers, said["tied"], said["done"], said["uncalled"])


def sync(folder: Path) -> None:
    """Put the files of a folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
