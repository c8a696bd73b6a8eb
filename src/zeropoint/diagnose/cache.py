"""What was measured already, in a file, so that a diagnosis that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import write_text

FORMAT = "zeropoint diagnosis cache"
VERSION = 1
SAVE_EVERY = 1.0
"""Seconds between two writings of the file, at least; at the end, and when killed, it is written
once more."""


class Cache:
    """Name → numbers, kept in a JSON file.

    The file tells by fingerprints what model, data, recipe and settings its numbers are of. Of
    others it is ignored, with a warning that says what differs, and written anew.

    Args:
        path: the file, or ``None`` to keep nothing.
        fingerprints: what the numbers depend on: name → fingerprint.

    Raises:
        ValueError: the file is something else than such a cache. It is left as it is.
        FileNotFoundError: there is no folder for it.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, fingerprints: Mapping[str, str]
    ) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprints = dict(fingerprints)
        self.entries: dict[str, Any] = {}
        self.seconds_before = 0.0
        self._began = self._saved = time.perf_counter()
        if self.path is not None:
            if not self.path.resolve().parent.is_dir():
                raise FileNotFoundError(
                    f"cache {self.path}: there is no folder {self.path.resolve().parent}"
                )
            self._load(self.path)

    @property
    def seconds(self) -> float:
        """Since the diagnosis began, without the time between interruption and resumption."""
        return self.seconds_before + time.perf_counter() - self._began

    def put(self, name: str, value: Any) -> None:
        """Keep JSON types under a name; the file follows within :data:`SAVE_EVERY`."""
        self.entries[name] = value
        if time.perf_counter() - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the file, atomically."""
        if self.path is None:
            return
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprints": self.fingerprints,
            "seconds": self.seconds,
            "entries": self.entries,
        }
        write_text(self.path, json.dumps(content))
        self._saved = time.perf_counter()

    def _load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise ValueError(f"cache {path} is no cache of a diagnosis: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"cache {path} is no cache of a diagnosis; name another file")
        theirs = content.get("fingerprints")
        if content.get("version") != VERSION or not isinstance(theirs, dict):
            differing = ["version"]
        else:
            differing = [k for k, v in self.fingerprints.items() if theirs.get(k) != v]
        if differing:
            warnings.warn(
                f"cache {path} was made with another {', '.join(differing)}: it is ignored and "
                "written anew",
                UserWarning,
                stacklevel=4,
            )
            return
        self.entries = dict(content["entries"])
        self.seconds_before = float(content["seconds"])


def fingerprint(value: Any) -> str:
    """A hash of a model's tensors, of batches, or of JSON types: equal for equal content only.

    Of a model: the names, dtypes, shapes and bytes of parameters and buffers, and its classes.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, nn.Module):
        for name, module in value.named_modules():
            state.update(f"{name}:{type(module).__qualname__};".encode())
        for name, t in (*value.named_parameters(), *value.named_buffers()):
            state.update(f"{name}=".encode())
            _feed(state, t)
    elif isinstance(value, Tensor):
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if not value.is_meta:
            flat = value.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            state.update(f"{key!r}:".encode())
            _feed(state, item)
    elif isinstance(value, list | tuple):
        state.update(f"[{len(value)}".encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode())
