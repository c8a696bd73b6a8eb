"""The numbers of an explanation, and their JSON. Nothing here quantizes or draws.

``real = scale * (q - zero_point)``: everything below follows from it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..atomic import write_text
from ..spec import QuantSpec

SCHEMA_VERSION = 1
"""Version of the JSON: raised when a field changes its meaning or goes, not when one is added."""

SHOWN = 12
"""Of more values than this, so many are shown: evenly spread from the smallest to the largest."""


@dataclass(frozen=True)
class Grid:
    """One scale, one zero point, and with them the reals that the integers stand for."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    label: str = ""

    def real(self, q: int) -> float:
        """The real that the integer ``q`` stands for.

        >>> Grid(0.5, 10, 0, 255).real(10)
        0.0
        """
        return self.scale * (q - self.zero_point)

    @property
    def lowest(self) -> float:
        """The smallest real there is an integer for."""
        return self.real(self.qmin)

    @property
    def highest(self) -> float:
        """The largest real there is an integer for."""
        return self.real(self.qmax)

    @property
    def levels(self) -> int:
        """How many integers there are, and so how many reals."""
        return self.qmax - self.qmin + 1

    def bound(self, real: float) -> float:
        """The largest error that ``real`` can meet.

        ``scale/2`` where the nearest integer exists; beyond that the distance to the range's end.
        The arithmetic rounds to float32, which adds at most one part in 8,000 of ``scale/2``.
        """
        return max(self.scale / 2, self.lowest - real, real - self.highest)

    def clips(self, real: float) -> bool:
        """Whether ``real`` lies so far outside that rounding alone would not bring it back."""
        return self.bound(real) > self.scale / 2


@dataclass(frozen=True)
class Value:
    """One number on its way: real → integer → real.

    Args:
        index: where it stands in the tensor.
        real: as given; ``None`` where only integers are known (a checkpoint's).
        position: ``real/scale + zero_point``, what is rounded to the integer.
        integer: what is stored.
        dequantized: the real that the integer stands for.
        error: ``dequantized − real``.
        bound: the largest error possible there, see :meth:`Grid.bound`.
        clipped: the value lies outside the range.
    """

    index: tuple[int, ...]
    real: float | None
    position: float | None
    integer: int
    dequantized: float
    error: float | None
    bound: float
    clipped: bool


@dataclass(frozen=True)
class Totals:
    """Over all values of the tensor, not only those shown.

    Args:
        elements: how many there are.
        clipped: how many lie outside their range; ``None`` where the reals are not known, as the
            two errors and the SQNR then.
        largest_error: ``max |error|``.
        rms_error: ``√(mean error²)``.
        expected_rms: ``√(mean scale²/12)``, the same for values spread evenly between the grid's:
            of an error between −scale/2 and scale/2, each equally likely.
        sqnr_db: ``10 · log10(Σ real² / Σ error²)``; +inf without error, NaN of nothing.
        integers_used: how many different integers the shown grid's values make use of.
    """

    elements: int
    clipped: int | None
    largest_error: float | None
    rms_error: float | None
    expected_rms: float
    sqnr_db: float | None
    integers_used: int


@dataclass(frozen=True)
class Explanation:
    """What scale and zero point do. Made by :func:`zeropoint.explain`.

    ``print(explanation)`` is a table with a number line; ``rich.print(explanation)`` the same with
    weight and colour; :meth:`to_json` and :meth:`to_plot` write files.

    Args:
        name: of the layer; ``""`` for plain values.
        shape: of the tensor.
        spec: which integers stand for which reals.
        chosen: the scale was chosen from the values, not given.
        grid: the scale and zero point of the values shown.
        others: of a tensor with many scales, the finest, the median and the coarsest grid.
        grids: how many there are.
        values: one by one; at most :data:`SHOWN`, all of ``grid``.
        totals: over all values.
        reals: float32, all values of ``grid``; ``None`` where only integers are known.
        integers: int32, of the same shape.
    """

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec
    chosen: bool
    grid: Grid
    others: tuple[Grid, ...]
    grids: int
    values: tuple[Value, ...]
    totals: Totals
    reals: Tensor | None = field(repr=False, compare=False)
    integers: Tensor = field(repr=False, compare=False)

    @property
    def dequantized(self) -> Tensor:
        """Float32, of the shape of ``integers``."""
        return (self.integers - self.grid.zero_point).float() * self.grid.scale

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; what is infinite or not a number is ``None``.

        The fields are those of the classes here; ``docs/explain.md`` lists them.
        """
        spec = asdict(self.spec)
        spec["granularity"] = str(self.spec.granularity)
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "shape": list(self.shape),
            "spec": {k: v if isinstance(v, bool | int | str) else str(v) for k, v in spec.items()},
            "chosen": self.chosen,
            "grid": _grid(self.grid),
            "others": [_grid(g) for g in self.others],
            "grids": self.grids,
            "values": [_plain(asdict(v)) for v in self.values],
            "totals": _plain(asdict(self.totals)),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The same as JSON text, also written to ``path`` (atomically) where one is given."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def to_plot(self, path: str | os.PathLike[str]) -> None:
        """A picture of the grid, the values and their errors, by matplotlib.

        Args:
            path: the file; its ending says the format (``.png``, ``.svg``, ``.pdf`` …).

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib does not know the format.
        """
        from .plot import write

        write(self, path)

    def __rich__(self) -> Any:
        from .text import View

        return View(self)

    def __str__(self) -> str:
        from ..terminal import plain_text

        return plain_text(self, 100)


def _grid(g: Grid) -> dict[str, Any]:
    return _plain(asdict(g) | {"lowest": g.lowest, "highest": g.highest, "levels": g.levels})


def _plain(d: dict[str, Any]) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return list(x) if isinstance(x, tuple) else x

    return {k: plain(v) for k, v in d.items()}
