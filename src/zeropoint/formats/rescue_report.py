"""What a rescue did, layer by layer, and how it compares with torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .torch_parity import Outputs

SCHEMA_VERSION = 1
"""Of :meth:`RescueReport.to_dict`."""


@dataclass(frozen=True)
class RescuedLayer:
    """One Linear layer.

    Attributes:
        name: of the layer.
        torch_kind: what torch made of it.
        mode: of the layer in the checkpoint, ``"dynamic"`` or ``"static"``.
        in_features, out_features: of the layer.
        granularity: of the weight, ``"per tensor"`` or ``"per channel"``.
        bias: whether it has one.
        input: whose output scale its input has and how that is known; ``""`` for dynamic layers.
        integers_equal: whether torch reads the same integers, zero points, scales and bias;
            ``None`` where torch was not asked.
        outputs: beside torch's; ``None`` where torch was not asked or cannot compute them.
    """

    name: str
    torch_kind: str
    mode: str
    in_features: int
    out_features: int
    granularity: str
    bias: bool
    input: str
    integers_equal: bool | None
    outputs: Outputs | None

    @property
    def ok(self) -> bool:
        """Whether no comparison that was made has failed."""
        return self.integers_equal is not False and (self.outputs is None or self.outputs.ok)

    def to_dict(self) -> dict[str, Any]:
        outputs = None if self.outputs is None else self.outputs.to_dict()
        return asdict(self) | {"outputs": outputs, "ok": self.ok}


@dataclass(frozen=True)
class RescueReport:
    """What :func:`zeropoint.formats.torch_ao.rescue` did.

    Attributes:
        path: of the checkpoint that was written.
        kind: of what was read: ``"state dict"``, ``"model"`` or ``"TorchScript"``.
        layers: the quantized Linear layers, in the file's order.
        tensors: names of the plain tensors that were kept.
        dequantized: name → what it was, of those that were quantized and are floats now.
        left: name → reason, of what is not in the checkpoint.
        zero_biases: layers whose bias is zero throughout.
        compared: whether a comparison with torch was asked for.
    """

    path: Path
    kind: str
    layers: tuple[RescuedLayer, ...]
    tensors: tuple[str, ...] = ()
    dequantized: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    zero_biases: tuple[str, ...] = ()
    compared: bool = True

    @property
    def ok(self) -> bool:
        """Whether no comparison that was made has failed."""
        return all(layer.ok for layer in self.layers)

    def notes(self) -> Iterator[str]:
        """What a reader of the table should know, a sentence each."""
        guessed = [layer.name for layer in self.layers if layer.input.endswith("by order")]
        if guessed:
            yield (
                f"The input scale of {_some(guessed)} was taken from the order of the file, which "
                "is right for a plain chain of layers only."
            )
        if self.zero_biases:
            yield (
                f"The bias of {_some(self.zero_biases)} is zero throughout: torch's qnnpack writes "
                "one for a layer without. If the architecture has none there, name it in no_bias."
            )
        if not self.compared:
            return
        if any(layer.integers_equal is None for layer in self.layers):
            yield "Integers were not compared: torch reads such a file only by running it."
        missing = [layer.name for layer in self.layers if layer.outputs is None]
        if missing:
            yield f"Outputs of {_some(missing)} were not compared: torch has no operator for them."
        bad = [layer.name for layer in self.layers if not layer.ok]
        if bad:
            yield f"NOT THE SAME AS TORCH'S: {_some(bad)}."

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types. Version 1: keys may be added, none goes or changes meaning."""
        return {
            "version": SCHEMA_VERSION,
            "path": str(self.path),
            "kind": self.kind,
            "ok": self.ok,
            "compared": self.compared,
            "layers": [layer.to_dict() for layer in self.layers],
            "tensors": list(self.tensors),
            "dequantized": dict(self.dequantized),
            "left": dict(self.left),
            "zero_biases": list(self.zero_biases),
            "notes": list(self.notes()),
        }

    def _title(self) -> str:
        source = "TorchScript archive" if self.kind == "TorchScript" else self.kind
        count = len(self.layers)
        return f"{count} Linear layer{'' if count == 1 else 's'} from a {source}"

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("layer", "torch's", "now", "in × out", "weight", "input scale"):
            table.add_column(heading, overflow="fold")
        for heading in ("integers", "outputs", "differ", "largest"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(*_row(layer))
        parts: list[Any] = [Text(self._title()), table]
        others = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("not a Linear layer", "what became of it"):
            others.add_column(heading, overflow="fold")
        for name, was in self.dequantized.items():
            others.add_row(name, f"float32, of {was}")
        for name, reason in self.left.items():
            others.add_row(name or "(the model)", f"left: {reason}")
        if others.row_count:
            parts += [Text(), others]
        kept = len(self.tensors) - len(self.dequantized)
        if kept:
            parts += [Text(), Text(f"{kept} plain tensors are kept as they are.")]
        notes = list(self.notes())
        if notes:
            parts += [Text(), *map(Text, notes)]
        return Group(*parts)


def _row(layer: RescuedLayer) -> list[str]:
    equal = {True: "equal", False: "DIFFER", None: "–"}[layer.integers_equal]
    row = [
        layer.name or "(the model)",
        layer.torch_kind,
        layer.mode,
        f"{layer.in_features} × {layer.out_features}",
        f"int8 {layer.granularity}",
        layer.input or "each row's own",
        equal,
    ]
    o = layer.outputs
    if o is None:
        return [*row, "–", "–", "–"]
    largest = f"{o.largest:.0f}" if o.largest in (0, 1) else f"{o.largest:.2g}"
    return [*row, f"{o.compared:,}", f"{o.differ:,}", f"{largest} step"]


def _some(names: Any) -> str:
    names = [name or "the model" for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
