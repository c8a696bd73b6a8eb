"""``quantize``: walk a model and replace its Linear layers by :class:`QuantizedLinear`.

Which layer gets what is a :class:`Recipe`; what was done, and what was left and why, is the
:class:`QuantizationSummary` on the result.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .calibrate import OBSERVERS, Observer, calibrate, progress_bar
from .modules import Linear, QuantizedLinear
from .recipes import (
    RECIPES,
    LayerRecipe,
    Recipe,
    get_recipe,
    spec_from_dict,
    spec_to_dict,
)
from .replace import replace_modules, tie_weights
from .spec import QuantSpec
from .tensor import quantize_to_spec

__all__ = [
    "RECIPES",
    "LayerRecipe",
    "QuantizationSummary",
    "Recipe",
    "get_recipe",
    "quantize",
    "replace_modules",
    "spec_from_dict",
    "spec_to_dict",
    "tie_weights",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class QuantizationSummary:
    """What :func:`quantize` did. Layers go by the first name they are met by in the model.

    Args:
        quantized: name → recipe of every layer that was replaced.
        left: name → reason of every Linear layer that stayed float.
        shared: further name → first name of replaced layers that have several.
        tied: name → name of the layer whose integers it uses, of layers with one weight.
        unmatched: patterns of the recipe that decided over no layer.
    """

    quantized: dict[str, LayerRecipe] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.quantized) + len(self.left)
        lines = [f"quantized {len(self.quantized)} of {total} Linear layers"]
        rows = [(name, str(layer)) for name, layer in self.quantized.items()]
        rows += [(alias, f"is {name or _ROOT}") for alias, name in self.shared.items()]
        rows += [(name, f"shares the weight of {to or _ROOT}") for name, to in self.tied.items()]
        rows += [(name, f"left float: {reason}") for name, reason in self.left.items()]
        width = max((len(name or _ROOT) for name, _ in rows), default=0)
        lines += [f"  {name or _ROOT:<{width}}  {what}" for name, what in rows]
        lines += [f"  the recipe's pattern {p!r} decided over no layer" for p in self.unmatched]
        return "\n".join(lines)


_ROOT = "(the model)"


def quantize(
    model: nn.Module,
    recipe: str | Recipe | LayerRecipe = "int8-dynamic",
    *,
    calibration: Iterable[Any] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    inplace: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Replace the Linear layers of a model by quantized ones.

    What is replaced is an ``nn.Linear`` or :class:`zeropoint.Linear` whose replacement computes the
    same function but for quantization. Left float, with the reason in the summary: subclasses with
    a forward or state of their own, layers with hooks or parametrizations, weights that something
    else reads (``nn.MultiheadAttention``'s output projection, a weight tied to an embedding),
    layers on the meta device or without weights, and, in static mode, layers that calibration
    never called.

    A layer that is used under several names is replaced once. Linear layers whose weight is one
    Parameter share one int8 weight. Where a weight is also used by something that stays float (a
    language model's head tied to its embedding), the layer stays float, so that the tie stays
    intact, unless ``include`` holds its exact name.

    The result carries a plain attribute ``quantization``, a :class:`QuantizationSummary`; print it.

    Args:
        model: any module. A layer is known by its qualified name (``named_modules``); a model that
            is itself a Linear has the name ``""``, and the result is a ``QuantizedLinear``.
        recipe: ``"int8-dynamic"``, ``"int8-static"``, ``"int8-weight-only"``, a :class:`Recipe`,
            or a :class:`LayerRecipe` for all layers.
        calibration: batches for static layers: an iterable of tensors (``model(x)``), tuples or
            lists (``model(*x)``) or mappings (``model(**x)``). Needed by static layers only.
        include: glob patterns of the layers to consider; default all. ``*`` also matches dots.
        exclude: glob patterns of layers to leave float; stronger than ``include``.
        inplace: change ``model`` itself and return it. Otherwise it is left as it is, and the
            layers that are replaced are not copied.
        progress: show progress bars where it takes over two seconds and stderr is a terminal.

    Raises:
        TypeError: ``model`` is not a module or cannot be copied; ``calibration`` is no iterable of
            batches.
        ValueError: an unknown recipe; a pattern that matches no Linear layer; NaN or Inf in a
            weight or in a static layer's input; calibration data missing, empty, or given without
            need. The model is unchanged then.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantized = quantize(model, "int8-dynamic", exclude="2")
    >>> quantized[0]
    QuantizedLinear(in_features=8, out_features=8, bias=True, mode='dynamic', bits=8)
    >>> quantized.quantization.left
    {'2': "excluded by '2'"}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    recipe = get_recipe(recipe)
    plan = _Plan(model, recipe, _patterns("include", include), _patterns("exclude", exclude) or ())
    observers = {
        name: OBSERVERS[layer.observer]()
        for name, layer in plan.chosen.items()
        if layer.mode == "static"
    }
    if observers and calibration is None:
        raise ValueError(
            f"calibration must be given: {len(observers)} layers are static "
            f"(first {next(iter(observers))!r}); pass an iterable of sample batches"
        )
    if not observers and calibration is not None:
        raise ValueError("calibration was given, but no chosen layer is static")
    if observers and calibration is not None:
        calibrate(model, observers, calibration, progress)
        for name, observer in observers.items():
            if observer.is_empty:
                plan.leave(name, "calibration never called it")
        plan.leave_broken_ties()
    replacements = _build(plan, observers, progress)
    summary = plan.summary()
    if not summary.quantized and recipe != Recipe(None):
        warnings.warn(f"nothing was quantized\n{summary}", UserWarning, stacklevel=2)
    result = replace_modules(model, replacements, inplace=inplace)
    result.quantization = summary  # type: ignore[assignment]
    return result


def _build(plan: _Plan, observers: dict[str, Observer], progress: bool) -> dict[str, nn.Module]:
    replacements: dict[str, nn.Module] = {}
    first: dict[tuple[int, QuantSpec], tuple[str, QuantizedLinear]] = {}  # of one Parameter
    chosen = plan.chosen.items()
    for name, layer in progress_bar(chosen, "quantizing", progress):
        linear = plan.layers[name]
        qparams = observers[name].qparams(layer.activation) if name in observers else None
        key = (id(linear.weight), layer.weight)
        if key in first:
            owner_name, owner = first[key]
            weight = owner.weight_qtensor()
            new = QuantizedLinear.from_quantized(weight, linear.bias, layer.mode, qparams)
            tie_weights(new, owner)
            plan.tied[name] = owner_name
        else:
            weight = quantize_to_spec(linear.weight, layer.weight)
            new = QuantizedLinear.from_quantized(weight, linear.bias, layer.mode, qparams)
            first[key] = (name, new)
        replacements[name] = new
    return replacements


class _Plan:
    """Which layers get what, and why others are left, by the first name each is met by."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        include: tuple[str, ...] | None,
        exclude: tuple[str, ...],
    ) -> None:
        self.layers: dict[str, nn.Linear] = {}
        self.names: dict[str, list[str]] = {}  # first name → all names
        self.chosen: dict[str, LayerRecipe] = {}
        self.left: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self._include = include
        self._owners: dict[int, list[tuple[str, str, nn.Module]]] = {}  # id of a Parameter → users
        self._in_attention: set[int] = set()
        self._before = _before(model)
        self._find(model)
        _check_patterns("include", include or (), self.names, model)
        _check_patterns("exclude", exclude, self.names, model)
        decided_by = set()
        for name, linear in self.layers.items():
            layer, pattern = recipe.match(self.names[name])
            decided_by.add(pattern)
            excluding = next((p for p in exclude if self._matches(name, p)), None)
            if include is not None and not any(self._matches(name, p) for p in include):
                self.left[name] = "not in include"
            elif excluding is not None:
                self.left[name] = f"excluded by {excluding!r}"
            elif layer is None:
                self.left[name] = "the recipe keeps it float"
            elif reason := self._unfit(linear):
                self.left[name] = reason
            else:
                self.chosen[name] = layer
        self._unmatched = tuple(p for p, _ in recipe.overrides if p not in decided_by)
        self.leave_broken_ties()
        for name in self.chosen:
            if not bool(self.layers[name].weight.isfinite().all()):
                raise ValueError(f"layer {name!r}: its weight holds NaN or Inf")

    def leave(self, name: str, reason: str) -> None:
        del self.chosen[name]
        self.left[name] = reason

    def leave_broken_ties(self) -> None:
        """Leave layers whose weight something uses that stays float, until none is left to do."""
        changed = True
        while changed:
            changed = False
            chosen = {id(self.layers[name]) for name in self.chosen}
            for name in list(self.chosen):
                if self._include is not None and set(self._include) & set(self.names[name]):
                    continue
                for user, parameter, module in self._owners[id(self.layers[name].weight)]:
                    if id(module) not in chosen:
                        where = f"{user}.{parameter}".lstrip(".")
                        self.leave(name, f"its weight is also {where!r}, which stays float")
                        changed = True
                        break

    def summary(self) -> QuantizationSummary:
        return QuantizationSummary(
            quantized=self._before | self.chosen,
            left={name: self.left[name] for name in self.layers if name in self.left},
            shared={
                alias: name
                for name, (_, *aliases) in self.names.items()
                if name in self.chosen
                for alias in aliases
            },
            tied=dict(self.tied),
            unmatched=self._unmatched,
        )

    def _find(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) in first:
                if isinstance(module, nn.Linear):
                    self.names[first[id(module)]].append(name)
                continue
            first[id(module)] = name
            for key, parameter in module._parameters.items():
                self._owners.setdefault(id(parameter), []).append((name, key, module))
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
        if weight.dtype not in _FLOATS:
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
        if weight.is_meta:
            return "its weight is on the meta device and holds no values"
        if not weight.numel():
            return f"its weight is empty, {tuple(weight.shape)}"
        return None


def _before(model: nn.Module) -> dict[str, LayerRecipe]:
    """What an earlier call of :func:`quantize` did, as far as it is still there."""
    summary = getattr(model, "quantization", None)
    if not isinstance(summary, QuantizationSummary):
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name: layer
        for name, layer in summary.quantized.items()
        if isinstance(modules.get(name), QuantizedLinear)
    }


def _patterns(argument: str, value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold patterns (str), got {type(pattern).__name__}")
    return patterns


def _check_patterns(
    argument: str, patterns: Iterable[str], names: dict[str, list[str]], model: nn.Module
) -> None:
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
