"""Find a model's Linear layers, and decide which can be replaced by another layer and which not.

Embedding tables too, where they are asked for: a table may be an output layer's weight. One set of
rules for all that replaces layers, so that none of them replaces a layer whose
weight something else reads, or which computes something of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .float_linear import Linear

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

ROOT = "(the model)"
"""How a model that is itself a layer, and so has the name ``""``, is shown."""


class Selection:
    """Which Linear layers of a model get what, and why others are left.

    Layers go by the first name they are met by. A layer whose weight something uses that is not
    chosen stays as it is, so that the tie stays intact, unless ``include`` holds its exact name.

    Args:
        model: any module.
        include: glob patterns of the layers to consider, ``None`` for all.
        exclude: glob patterns of layers to leave; stronger than ``include``.
        choose: all names of a layer → what it gets, or a ``str``: the reason to leave it.
        fits: a layer that could be replaced → the reason to leave it all the same, or ``None``.
        stays: how the reason ends that is given for a broken tie.
        table: what every ``nn.Embedding`` gets; ``None`` takes no account of them. Otherwise
            ``include`` and ``exclude`` are about them as well.
        with_table: what a Linear layer gets instead of its choice where its weight is a table's as
            well, of its choice and of what the table gets; not where ``include`` holds its exact
            name.

    Raises:
        ValueError: a pattern that matches no such layer.
        TypeError: a pattern that is no ``str``.
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
        choose: Callable[[list[str]], Any],
        fits: Callable[[nn.Linear], str | None] = lambda linear: None,
        stays: str = "which stays float",
        table: Any = None,
        with_table: Callable[[Any, Any], Any] = lambda choice, table: choice,
    ) -> None:
        self.layers: dict[str, nn.Linear] = {}
        self.names: dict[str, list[str]] = {}  # first name → all names
        self.chosen: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        self.embeddings: dict[str, nn.Embedding] = {}
        self.tables: dict[str, Any] = {}  # of the embeddings, as chosen is of the layers
        self._find_tables = table is not None
        self._include = _patterns("include", include)
        self._stays = stays
        self._owners: dict[int, list[tuple[str, str, int]]] = {}  # id of a Parameter → users
        self._in_attention: set[int] = set()
        excluded = _patterns("exclude", exclude) or ()
        self._find(model)
        what = "Linear layer or embedding" if self._find_tables else "Linear layer"
        _check_patterns("include", self._include or (), self.names, what)
        _check_patterns("exclude", excluded, self.names, what)
        for name, linear in self.layers.items():
            choice = choose(self.names[name])
            if reason := self._unwanted(name, excluded):
                self.left[name] = reason
            elif isinstance(choice, str):
                self.left[name] = choice
            elif reason := self._unfit(linear) or fits(linear):
                self.left[name] = reason
            else:
                self.chosen[name] = choice
        for name, embedding in self.embeddings.items():
            if reason := self._unwanted(name, excluded) or _unfit_table(embedding):
                self.left[name] = reason
            else:
                self.tables[name] = table
        weights = {id(self.embeddings[n].weight): given for n, given in self.tables.items()}
        for name, choice in self.chosen.items():
            shared = weights.get(id(self.layers[name].weight))
            if shared is not None and not self._named_exactly(name):
                self.chosen[name] = with_table(choice, shared)
        self.leave_broken_ties()

    def leave(self, name: str, reason: str) -> None:
        del (self.chosen if name in self.chosen else self.tables)[name]
        self.left[name] = reason

    def leave_broken_ties(self) -> None:
        """Leave layers whose weight something uses that stays, until none is left to do."""
        changed = True
        while changed:
            changed = False
            chosen = {id(self.layers[name]) for name in self.chosen}
            chosen |= {id(self.embeddings[name]) for name in self.tables}
            broken = {name: self._broken_tie(name, chosen) for name in (*self.chosen, *self.tables)}
            for name, reason in broken.items():
                if reason is not None:
                    self.leave(name, reason)
                    changed = True

    def _broken_tie(self, name: str, chosen: set[int]) -> str | None:
        """Why a layer's weight, or a table, must stay what it is for something else's sake."""
        if self._named_exactly(name):
            return None
        own = self.layers[name] if name in self.chosen else self.embeddings[name]
        for user, parameter, module in self._owners[id(own.weight)]:
            if module not in chosen:
                where = f"{user}.{parameter}".lstrip(".")
                return f"its weight is also {where!r}, {self._stays}"
        return None

    def _named_exactly(self, name: str) -> bool:
        """Whether ``include`` holds an exact name of the layer, which unties it."""
        return self._include is not None and bool(set(self._include) & set(self.names[name]))

    def left_in_order(self) -> dict[str, str]:
        """Name → reason of the Linear layers that were left, in the order of the model."""
        return {name: self.left[name] for name in self.layers if name in self.left}

    def tables_left(self) -> dict[str, str]:
        """The same of embeddings."""
        return {name: self.left[name] for name in self.embeddings if name in self.left}

    def aliases(self) -> dict[str, str]:
        """Further name → first name of chosen layers and tables that have several."""
        return {
            alias: name
            for name, (_, *aliases) in self.names.items()
            if name in self.chosen or name in self.tables
            for alias in aliases
        }

    def _find(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) in first:
                if first[id(module)] in self.names:
                    self.names[first[id(module)]].append(name)
                continue
            first[id(module)] = name
            for key, parameter in module._parameters.items():
                self._owners.setdefault(id(parameter), []).append((name, key, id(module)))
            if isinstance(module, nn.MultiheadAttention):
                self._in_attention.update(id(child) for child in module.children())
            if isinstance(module, nn.Linear):
                self.layers[name] = module
                self.names[name] = [name]
            if self._find_tables and isinstance(module, nn.Embedding):
                self.embeddings[name] = module
                self.names[name] = [name]

    def _matches(self, name: str, pattern: str) -> bool:
        return any(fnmatchcase(alias, pattern) for alias in self.names[name])

    def _unwanted(self, name: str, excluded: tuple[str, ...]) -> str | None:
        if self._include is not None and not any(self._matches(name, p) for p in self._include):
            return "not in include"
        excluding = next((p for p in excluded if self._matches(name, p)), None)
        return None if excluding is None else f"excluded by {excluding!r}"

    def _unfit(self, linear: nn.Linear) -> str | None:
        """Why a replacement would not compute the same function, or ``None``."""
        if id(linear) in self._in_attention:
            return "MultiheadAttention reads its weight directly"
        return _unfit(linear, (nn.Linear.forward, Linear.forward), ("weight", "bias"))


def _unfit_table(embedding: nn.Embedding) -> str | None:
    if embedding.max_norm is not None:
        return "it has a max_norm, so that looking a row up changes the table"
    return _unfit(embedding, (nn.Embedding.forward,), ("weight",))


def _unfit(layer: nn.Module, forwards: tuple[Any, ...], held: tuple[str, ...]) -> str | None:
    """Why what holds only ``held`` and computes by one of ``forwards`` cannot replace it."""
    kind = type(layer).__name__
    if parametrize.is_parametrized(layer):
        return "it is parametrized; remove the parametrizations first"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter"
    if is_lazy(weight):
        return "it is lazy and not initialized yet; run the model once"
    if type(layer).forward not in forwards:
        return f"{kind} has a forward of its own"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "it has hooks, which a replacement would drop"
    if layer._modules or layer._buffers or set(layer._parameters) - set(held):
        return f"{kind} holds more than {' and '.join(held)}"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.is_meta:
        return "its weight is on the meta device and holds no values"
    if not weight.numel():
        return f"its weight is empty, {tuple(weight.shape)}"
    return None


def show(heading: str, rows: Iterable[tuple[str, str]], notes: Iterable[str] = ()) -> str:
    """Lines of ``name  what``, aligned, below a heading: how summaries print."""
    rows = [(name or ROOT, what) for name, what in rows]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [heading, *(f"  {name:<{width}}  {what}" for name, what in rows)]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _patterns(argument: str, value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold patterns (str), got {type(pattern).__name__}")
    return patterns


def _check_patterns(
    argument: str, patterns: Iterable[str], names: dict[str, list[str]], what: str
) -> None:
    known = [alias for aliases in names.values() for alias in aliases]
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in known):
            continue
        message = f"{argument}: no {what} matches {pattern!r}"
        inside = f"{pattern}.*"
        if any(fnmatchcase(name, inside) for name in known):
            message += f"; those inside it are {inside!r}"
        elif near := difflib.get_close_matches(pattern, known, n=3):
            message += f"; did you mean {' or '.join(map(repr, near))}?"
        raise ValueError(message)
