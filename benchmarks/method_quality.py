"""What every recipe and method makes of a model: scores of its test samples, its bytes, itself.

A row is measured once: its scores are kept as JSON in a folder, beside them the quantized model as
a checkpoint. It is measured again where the recipe, the samples, the code that decides the
integers, torch or transformers (or the peer's library) is another. Which kernel computes is not
asked: all give the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zeropoint
from method_subjects import Subject
from model_peers import Contender, ModelPeer
from zeropoint import doctor
from zeropoint.atomic import write_text
from zeropoint.recipes import TABLES
from zeropoint.running import model_bytes, tensors

METHODS: tuple[tuple[str, ...], ...] = (
    (),
    ("clip",),
    ("hqq",),
    ("hadamard",),
    ("smooth",),
    ("awq",),
    ("gptq",),
    ("gptq", "bias-correction"),
    ("clip", "gptq"),
    ("awq", "gptq"),
    ("hadamard", "gptq"),
    ("smooth", "hadamard", "gptq"),
)
BEST = ("awq", "gptq")
"""By which the tables' rows are made, beside rounding."""
FLOAT = "float32"


@dataclass(frozen=True)
class Entry:
    """A line of the table that is ours.

    Args:
        name: what is quantized how.
        recipe: ``None`` leaves the model float.
    """

    name: str
    recipe: zeropoint.Recipe | None

    @property
    def method(self) -> tuple[str, ...]:
        """By which its layers' integers are found; none: rounded to nearest."""
        default = None if self.recipe is None else self.recipe.default
        return () if default is None else default.method

    @property
    def title(self) -> str:
        """The name, and the method."""
        return ": ".join([self.name, *([", ".join(self.method)] if self.method else [])])

    @property
    def form(self) -> str:
        """What layers compute: those of one form are equally fast, whatever their integers."""
        if "hadamard" in self.method:
            return f"{self.name}, input rotated"
        if {"smooth", "awq"} & set(self.method):
            return f"{self.name}, input scaled"
        return self.name


def entries(methods: tuple[tuple[str, ...], ...] = METHODS) -> list[Entry]:
    """Float, 8 bits, 4 bits by each method, and with embedding tables quantized."""
    int8, int4, weight_only = map(
        zeropoint.get_recipe, ("int8-dynamic", "int4", "int4-weight-only")
    )
    best = [BEST] if BEST in methods else []
    found = [
        Entry(FLOAT, None),
        Entry("int8-dynamic", int8),
        Entry("int8-weight-only", zeropoint.get_recipe("int8-weight-only")),
    ]
    found += [Entry("int4", int4.with_method(m)) for m in dict.fromkeys([(), *methods])]
    found += [Entry("int4-weight-only", weight_only.with_method(m)) for m in [(), *best]]
    found += [Entry("int8-dynamic, int8 tables", replace(int8, embeddings=TABLES["int8"]))]
    for bits in ("int8", "int4"):
        tables = replace(int4, embeddings=TABLES[bits])
        found += [Entry(f"int4, {bits} tables", tables.with_method(m)) for m in [(), *best]]
    return found


@dataclass(frozen=True)
class Row:
    """What one line's quality is.

    Args:
        title: of the entry, or name of the peer.
        form: in which it is timed.
        scores: of the test samples.
        bytes: of the whole model.
        seconds: that quantizing took.
    """

    title: str
    form: str
    scores: tuple[float, ...]
    bytes: int
    seconds: float


def checkpoint(folder: Path, title: str) -> Path:
    """Where the model of a line is kept."""
    return folder / f"{_slug(title)}.safetensors"


def measure(
    subject: Subject,
    wanted: list[Entry],
    peers: list[ModelPeer],
    folder: Path,
    *,
    fresh: bool = False,
) -> tuple[list[Row], dict[str, str]]:
    """A row for each entry and peer, and why peers have none; what was measured before is read."""
    rows, failed = [], {}
    data = {"test": _digest(subject.test), "calibration": _digest(subject.calibration)}
    code = fingerprint()
    for entry in wanted:
        recipe = None if entry.recipe is None else entry.recipe.to_dict()
        key = {**data, "code": code, "recipe": recipe}
        file = folder / f"{_slug(entry.title)}.json"
        row = None if fresh else _read(file, key)
        if row is None:
            row = _ours(subject, entry, checkpoint(folder, entry.title))
            _write(file, row, key)
        rows.append(_told(subject, row))
    for peer in peers:
        key = {**data, "peer": peer.version, "torch": doctor.version("torch")}
        file = folder / f"{_slug(peer.name)}.json"
        row = None if fresh else _read(file, key)
        if row is None:
            try:
                row = _theirs(subject, peer, folder)
            except Exception as error:  # whatever a library does here, the others go on
                failed[peer.name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                print(f"{peer.name} failed: {failed[peer.name]}", file=sys.stderr)
                continue
            _write(file, row, key)
        rows.append(_told(subject, row))
    return rows, failed


def read_rows(folder: Path, titles: list[str]) -> list[Row]:
    """Rows of these titles as they were measured last, those that were."""
    found = [_read(folder / f"{_slug(title)}.json", None) for title in titles]
    return [row for row in found if row is not None]


def load(subject: Subject, folder: Path, title: str) -> nn.Module:
    """The model of a line, from its checkpoint.

    Raises:
        FileNotFoundError: it was not measured.
    """
    if title == FLOAT:
        return subject.model
    return zeropoint.load(checkpoint(folder, title), copy.deepcopy(subject.model)).eval()


def fingerprint() -> str:
    """Of the code that decides which integers a method finds and what is computed with them."""
    package = Path(zeropoint.__file__).parent
    names = ("affine", "algorithms", "blocks", "input_transform", "methods", "reference", "spec")
    digest = hashlib.sha256()
    for name in names:
        files = sorted(package.glob(f"{name}.py")) + sorted(package.glob(f"{name}/*.py"))
        if not files:
            raise FileNotFoundError(f"{package} has no {name}")
        for file in files:
            digest.update(file.read_bytes())
    for library in ("torch", "transformers"):
        digest.update(str(doctor.version(library)).encode())
    return digest.hexdigest()[:16]


def _ours(subject: Subject, entry: Entry, file: Path) -> Row:
    begun = time.perf_counter()
    model = subject.model
    if entry.recipe is not None:
        data = subject.calibration if needs_calibration(entry.recipe) else None
        model = zeropoint.quantize(model, entry.recipe, calibration=data)
        seconds = time.perf_counter() - begun
        zeropoint.save(model, file)
    else:
        seconds = 0.0
    scores = subject.scores(model).tolist()
    return Row(entry.title, entry.form, tuple(scores), model_bytes(model), seconds)


def needs_calibration(recipe: zeropoint.Recipe) -> bool:
    """Whether it needs sample data."""
    return recipe.default is not None and recipe.default.needs_calibration


def _theirs(subject: Subject, peer: ModelPeer, folder: Path) -> Row:
    begun = time.perf_counter()
    contender: Contender = peer.prepare(subject, folder)
    seconds = time.perf_counter() - begun
    scores = tuple(contender.scores().tolist())
    if not torch.tensor(scores).isfinite().all():
        raise ValueError("its results are not finite")
    return Row(peer.name, peer.name, scores, contender.bytes, seconds)


def _digest(batches: list[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors(batches):
        digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(file: Path, key: dict[str, Any] | None) -> Row | None:
    """The row in a file, if it is there and was measured with this key (``None``: with any)."""
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if key is not None and content["key"] != key:
        return None
    row = content["row"]
    return Row(**{**row, "scores": tuple(row["scores"])})


def _write(file: Path, row: Row, key: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"key": key, "row": vars(row)}, ensure_ascii=False, indent=1))


def _told(subject: Subject, row: Row) -> Row:
    mean = subject.shown(sum(row.scores) / len(row.scores))
    print(f"{subject.name}, {row.title}: {mean:.4f}", file=sys.stderr, flush=True)
    return row


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in title.replace(": ", "-"))
