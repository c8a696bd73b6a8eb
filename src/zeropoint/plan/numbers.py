"""What a plan holds, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..recipes import LayerRecipe, Recipe
from .rule import FORMS, MODES


@dataclass(frozen=True)
class Time:
    """Microseconds of all calls that the batch makes of one layer: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class ShapePlan:
    """What was found for the layers of one shape that are called alike.

    Args:
        in_features, out_features, bias: of the layers.
        dtype: of their weights, as ``"float32"``.
        calls: ``(rows, number of calls with so many rows)`` of one layer in the batch.
        layers: their names.
        times: form → its time; a form that was not timed is missing.
        choice: the form to use; reason: why.
    """

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    calls: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]
    times: dict[str, Time]
    choice: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Which form each Linear layer of a model should have on this machine; made by
    :func:`zeropoint.plan`.

    Args:
        shapes: in the order of the model.
        left: name → reason of Linear layers that cannot be replaced, or that the batch never calls.
        threads: that were used; isa: the instruction set that computed.
        allow: the forms that could be chosen.
        notes: what else there is to know.
    """

    shapes: tuple[ShapePlan, ...]
    left: dict[str, str]
    threads: int
    isa: str
    allow: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def choices(self) -> dict[str, str]:
        """Name of each layer → its form."""
        return {name: shape.choice for shape in self.shapes for name in shape.layers}

    def names(self, form: str) -> list[str]:
        """The layers that should have this form: ``prepack_model(model,
        include=plan.names("packed"))``.

        Raises:
            ValueError: an unknown form.
        """
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        return [name for name, choice in self.choices.items() if choice == form]

    def why_float(self, names: list[str]) -> str:
        """What :func:`zeropoint.quantize` says of a layer that it leaves."""
        for shape in self.shapes:
            if set(names) & set(shape.layers):
                if shape.choice == "packed":
                    return "the plan keeps it float, packed: that is for prepack_model to do"
                return f"the plan keeps it float: {shape.reason}"
        return next((self.left[n] for n in names if n in self.left), "it is not in the plan")

    def recipe(self) -> Recipe:
        """The integer part as a recipe; layers that should stay float, packed or not, it keeps."""
        overrides = []
        for name, form in self.choices.items():
            layer = LayerRecipe(MODES[form]) if form in MODES else None
            overrides.append(("".join(f"[{c}]" if c in "*?[" else c for c in name), layer))
        return Recipe(None, tuple(overrides))

    def seconds(self, form: str | None = None) -> float:
        """Of all the layers' calls in the batch, in one form, or as planned. Where a layer was not
        timed in that form, its float time counts."""
        total = 0.0
        for shape in self.shapes:
            time = shape.times.get(form or shape.choice, shape.times["float"])
            total += time.median * len(shape.layers)
        return total / 1e6

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with a ``version`` and the choice of every layer by name."""
        return {"version": 1, **json.loads(json.dumps(asdict(self))), "choices": self.choices}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: not a plan, of another version, or an unknown form.
        """
        if not isinstance(d, Mapping) or "shapes" not in d:
            raise TypeError(f"a plan must be a mapping with 'shapes', got {type(d).__name__}")
        if d.get("version") != 1:
            raise ValueError(f"a plan must be of version 1, got {d.get('version')!r}")
        try:
            shapes = tuple(
                ShapePlan(
                    **{
                        **s,
                        "calls": tuple((int(m), int(n)) for m, n in s["calls"]),
                        "layers": tuple(s["layers"]),
                        "times": {form: Time(**t) for form, t in s["times"].items()},
                    }
                )
                for s in d["shapes"]
            )
            rest: dict[str, Any] = {key: d[key] for key in ("left", "threads", "isa")}
            rest |= {key: tuple(d[key]) for key in ("allow", "notes")}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error}") from error
        for shape in shapes:
            if shape.choice not in FORMS or "float" not in shape.times:
                raise ValueError(f"a form must be one of {', '.join(FORMS)}: {shape.choice!r}")
        return cls(shapes, **rest)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("K × N", "rows", "layers"):
            table.add_column(heading, justify="right", no_wrap=True)
        for form in FORMS:
            table.add_column(form.removeprefix("int8-").replace("-", " "), justify="right")
        table.add_column("use", style="bold", no_wrap=True)
        for s in self.shapes:
            rows = ", ".join(f"{m}" if n == 1 else f"{n} × {m}" for m, n in s.calls)
            cells = [f"{s.in_features} × {s.out_features}", rows, str(len(s.layers))]
            for form in FORMS:
                cells.append(f"{s.times[form].median:,.1f}" if form in s.times else "–")
            table.add_row(*cells, s.choice)
        lines = [
            "Microseconds of all calls of one layer in a batch.",
            *(f"{s.in_features} × {s.out_features}: {s.choice}: {s.reason}." for s in self.shapes),
            "",
            f"All layers of one batch: {self.seconds('float') * 1e3:,.2f} ms float, "
            f"{self.seconds() * 1e3:,.2f} ms as planned ({self.threads} threads, {self.isa}).",
            *self.notes,
            *(f"{name or '(the model)'} is left: {reason}" for name, reason in self.left.items()),
        ]
        return Group(table, Text("\n".join(lines)))

    def __str__(self) -> str:
        import io

        from rich.console import Console

        file = io.StringIO()
        Console(file=file, width=100, color_system=None, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))
