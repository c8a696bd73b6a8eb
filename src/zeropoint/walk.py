"""Find a model's Linear layers, and decide which can be replaced by another layer and which not.

One set of rules for all that replaces Linear layers, so that none of them replaces a layer whose
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

    Raises:
        ValueError: a pattern that matches no Linear layer.
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
    ) -> None:
        self.layers: dict[str, nn.Linear] = {}
        self.names: dict[str, list[str]] = {}  # first name → all names
        self.chosen: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        self._include = _patterns("include", include)
        self._stays = stays
        self._owners: dict[int, list[tuple[str, str, int]]] = {}  # id of a Parameter → users
        self._in_attention: set[int] = set()
        excluded = _patterns("exclude", exclude) or ()
        self._find(model)
        _check_patterns("include", self._include or (), self.names)
        _check_patterns("exclude", excluded, self.names)
        for name, linear in self.layers.items():
            choice = choose(self.names[name])
            excluding = next((p for p in excluded if self._matches(name, p)), None)
            if self._include is not None and not any(self._matches(name, p) for p in self._include):
                self.left[name] = "not in include"
            elif excluding is not None:
                self.left[name] = f"excluded by {excluding!r}"
            elif isinstance(choice, str):
                self.left[name] = choice
            elif reason := self._unfit(linear) or fits(linear):
                self.left[name] = reason
            else:
                self.chosen[name] = choice
        self.leave_broken_ties()

    def leave(self, name: str, reason: str) -> None:
        del self.chosen[name]
        self.left[name] = reason

    def leave_broken_ties(self) -> None:
        """Leave layers whose weight something uses that stays, until none is left to do."""
        changed = True
        while changed:
            changed = False
            chosen = {id(self.layers[name]) for name in self.chosen}
            for name in list(self.chosen):
                if self._include is not None and set(self._include) & set(self.names[name]):
                    continue
                for user, parameter, module in self._owners[id(self.layers[name].weight)]:
                    if module not in chosen:
                        where = f"{user}.{parameter}".lstrip(".")
                        self.leave(name, f"its weight is also {where!r}, {self._stays}")
                        changed = True
                        break

    def left_in_order(self) -> dict[str, str]:
        """Name → reason of what was left, in the order of the model."""
        return {name: self.left[name] for name in self.layers if name in self.left}

    def aliases(self) -> dict[str, str]:
        """Further name → first name of chosen layers that have several."""
        return {
            alias: name
            for name, (_, *aliases) in self.names.items()
            if name in self.chosen
            for alias in aliases
        }

    def _find(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) in first:
                if isinstance(module, nn.Linear):
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

    def _matches(self, name: str, pattern: str) -> bool:
        return any(fnmatchcase(alias, pattern) for alias in self.names[name])

    def _unfit(self, linear: nn.Linear) -> str | None:
        """Why a replacement would not compute the same function, or ``None``."""
        kind = type(linear).__name__
        if id(linear) in self._in_attention:
            return "MultiheadAttention reads its weight directly"
        if parametrize.is_parametrized(linear):
            return "it is parametrized; remove the parametrizations first"
        weight = linear._parameters.get("weight")
        if weight is None:
            return "its weight is not a parameter"
        if is_lazy(weight):
            return "it is lazy and not initialized yet; run the model once"
        if type(linear).forward not in (nn.Linear.forward, Linear.forward):
            return f"{kind} has a forward of its own"
        if "forward" in linear.__dict__:
            return "its forward was replaced on the instance"
        if any(getattr(linear, hooks) for hooks in _HOOKS):
            return "it has hooks, which a replacement would drop"
        if linear._modules or linear._buffers or set(linear._parameters) - {"weight", "bias"}:
            return f"{kind} holds more than weight and bias"
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


def _check_patterns(argument: str, patterns: Iterable[str], names: dict[str, list[str]]) -> None:
    known = [alias for aliases in names.values() for alias in aliases]
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in known):
            continue
        message = f"{argument}: no Linear layer matches {pattern!r}"
        inside = f"{pattern}.*"
        if any(fnmatchcase(name, inside) for name in known):
            message += f"; those inside it are {inside!r}"
        elif near := difflib.get_close_matches(pattern, known, n=3):
            message += f"; did you mean {' or '.join(map(repr, near))}?"
        raise ValueError(message)
