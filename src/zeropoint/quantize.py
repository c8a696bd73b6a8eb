"""``quantize``: walk a model and replace its Linear layers by :class:`QuantizedLinear`, and its
embedding tables by :class:`QuantizedEmbedding` where the recipe says so.

Which layer gets what is a :class:`Recipe`; what was done, and what was left and why, is the
:class:`QuantizationSummary` on the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from .affine import BLOCK
from .algorithms import needs_data
from .calibrate import OBSERVERS, calibrate, check_batches
from .embedding import QuantizedEmbedding
from .methods import UNCALLED, Built, Keep, build_layers, in_stages, make
from .modules import QuantizedLinear
from .plan import MODES, Plan
from .recipes import (
    RECIPES,
    LayerRecipe,
    Recipe,
    describe,
    get_recipe,
    spec_from_dict,
    spec_to_dict,
)
from .replace import replace_modules, tie_weights
from .spec import QuantSpec
from .walk import ROOT, Selection, show

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


@dataclass(frozen=True)
class QuantizationSummary:
    """What :func:`quantize` did. Layers go by the first name they are met by in the model.

    Args:
        quantized: name → recipe of every layer that was replaced.
        left: name → reason of every Linear layer that stayed float.
        shared: further name → first name of replaced layers that have several.
        tied: name → name of the layer whose integers it uses, of layers and tables with one weight.
        unmatched: patterns of the recipe that decided over no layer.
        done: name → what the methods of its recipe did. Errors are those of the layer's output on
            the calibration data (or of its weight, where no method looked at data), in dB against
            rounding to nearest without any method.
        embeddings: name → spec of every embedding table that was replaced.
        embeddings_left: name → reason of every embedding that stayed float, where the recipe would
            have them quantized.
    """

    quantized: dict[str, LayerRecipe] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    done: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, QuantSpec] = field(default_factory=dict)
    embeddings_left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.quantized) + len(self.left)
        rows = [
            (name, f"{layer} ({self.done[name]})" if name in self.done else str(layer))
            for name, layer in self.quantized.items()
        ]
        rows += [(name, f"embedding {describe(spec)}") for name, spec in self.embeddings.items()]
        rows += [(alias, f"is {name or ROOT}") for alias, name in self.shared.items()]
        rows += [(name, f"shares the weight of {to or ROOT}") for name, to in self.tied.items()]
        left = self.left | self.embeddings_left
        rows += [(name, f"left float: {reason}") for name, reason in left.items()]
        heading = f"quantized {len(self.quantized)} of {total} Linear layers"
        if tables := len(self.embeddings) + len(self.embeddings_left):
            heading += f" and {len(self.embeddings)} of {tables} embeddings"
        return show(
            heading,
            rows,
            [f"the recipe's pattern {p!r} decided over no layer" for p in self.unmatched],
        )


def quantize(
    model: nn.Module,
    recipe: str | Recipe | LayerRecipe | None = None,
    *,
    plan: Plan | None = None,
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
    Parameter share its integers. Where a weight is also used by something that stays float (a
    language model's head tied to its embedding), the layer stays float, so that the tie stays
    intact, unless ``include`` holds its exact name.

    Where the recipe has ``embeddings``, every ``nn.Embedding`` that passes the same rules becomes a
    :class:`zeropoint.QuantizedEmbedding`; ``max_norm`` is one more reason to leave one. An output
    layer that is tied to a table shares its integers: it has the mode of its own recipe, the spec
    of the table, and no method, which would look for others; so it is where an override names
    it. Where one of the two stays float, so does the other, unless ``include`` holds an exact name.

    The result carries a plain attribute ``quantization``, a :class:`QuantizationSummary`; print it.

    Args:
        model: any module. A layer is known by its qualified name (``named_modules``); a model that
            is itself a Linear has the name ``""``, and the result is a ``QuantizedLinear``.
        recipe: ``"int8-dynamic"``, ``"int8-static"``, ``"int8-weight-only"``, ``"int4"``,
            ``"int4-weight-only"``, a :class:`Recipe`, or a :class:`LayerRecipe` for all layers. By
            default ``"int8-dynamic"``.
        plan: what :func:`zeropoint.plan` found, instead of a recipe: layers get the integer form it
            says. Layers that it keeps float stay as they are, also where packed is the form to
            use, which is :func:`zeropoint.prepack_model`'s to do.
        calibration: sample batches: an iterable of tensors (``model(x)``), tuples or lists
            (``model(*x)``) or mappings (``model(**x)``). Needed by static layers and by the methods
            that look at data, and by nothing else. Methods run it several times, so they keep what
            an iterator gives; rows of padding count as any other.
        include: glob patterns of the layers to consider, embeddings among them where the recipe
            has them quantized; default all. ``*`` also matches dots.
        exclude: glob patterns of layers to leave float; stronger than ``include``.
        inplace: change ``model`` itself and return it. Otherwise it is left as it is, and the
            layers that are replaced are not copied.
        progress: show progress bars where it takes over two seconds and stderr is a terminal.

    Raises:
        TypeError: ``model`` is not a module or cannot be copied; ``plan`` is no plan;
            ``calibration`` is no iterable of batches.
        ValueError: an unknown recipe; a pattern that matches no Linear layer; NaN or Inf in a
            weight or in a static layer's input; calibration data missing, empty, or given without
            need; a recipe and a plan, or the plan of another model. The model is unchanged then.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantized = quantize(model, "int8-dynamic", exclude="2")
    >>> quantized[0]
    QuantizedLinear(in_features=8, out_features=8, bias=True, mode='dynamic', bits=8)
    >>> quantized.quantization.left
    {'2': "excluded by '2'"}
    """
    return quantize_and_keep(
        model, recipe, plan, calibration, include, exclude, inplace, progress, make
    )


def quantize_and_keep(
    model: nn.Module,
    recipe: str | Recipe | LayerRecipe | None,
    plan: Plan | None,
    calibration: Iterable[Any] | None,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    inplace: bool,
    progress: bool,
    keep: Keep,
) -> nn.Module:
    """:func:`quantize`, with finished layers given to ``keep``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if plan is not None:
        if recipe is not None:
            raise ValueError(f"recipe must be None where a plan is given, got {recipe!r}")
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a zeropoint.Plan, got {type(plan).__name__}")
        recipe = plan.recipe()
    recipe = get_recipe("int8-dynamic" if recipe is None else recipe)
    before, tables_before = _before(model)
    selection, unmatched = _choose(model, recipe, plan, include, exclude)
    _check_calibration(selection, recipe, calibration)
    observers = {
        name: OBSERVERS[layer.observer]()
        for name, layer in selection.chosen.items()
        if layer.mode == "static" and not in_stages(layer)
    }
    data: list[Any] = []
    if calibration is not None:
        check_batches(calibration)
        if any(in_stages(layer) for layer in selection.chosen.values()):
            calibration = data = list(calibration)
        if observers:
            calibrate(model, observers, calibration, progress)
        for name, observer in observers.items():
            if observer.is_empty:
                selection.leave(name, UNCALLED)
        selection.leave_broken_ties()
    built = build_layers(model, selection.layers, selection.chosen, observers, data, progress, keep)
    for name in built.uncalled:
        selection.leave(name, UNCALLED)
    if built.uncalled:
        selection.leave_broken_ties()
    kept = selection.chosen
    replacements = {name: layer for name, layer in built.layers.items() if name in kept}
    tables = _build_tables(selection, replacements, built.tied, keep)
    summary = QuantizationSummary(
        quantized=before | kept,
        left=selection.left_in_order(),
        shared=selection.aliases(),
        tied={n: owner for n, owner in built.tied.items() if {n, owner} <= kept.keys() | tables},
        unmatched=unmatched,
        done={name: what for name, what in built.done.items() if name in kept},
        embeddings=tables_before | selection.tables,
        embeddings_left=selection.tables_left(),
    )
    if not summary.quantized and not summary.embeddings and recipe != Recipe(None):
        warnings.warn(f"nothing was quantized\n{summary}", UserWarning, stacklevel=3)
    result = replace_modules(model, replacements | tables, inplace=inplace)
    result.quantization = summary  # type: ignore[assignment]
    return result


def _choose(
    model: nn.Module, recipe: Recipe, plan: Plan | None, include: Any, exclude: Any
) -> tuple[Selection, tuple[str, ...]]:
    """What is quantized how, and the recipe's patterns that decided over no layer."""
    decided_by = set()

    def choose(names: list[str]) -> LayerRecipe | str:
        layer, pattern = recipe.match(names)
        decided_by.add(pattern)
        if layer is not None:
            return layer
        return "the recipe keeps it float" if plan is None else plan.why_float(names)

    selection = Selection(
        model, include, exclude, choose, table=recipe.embeddings, with_table=_with_table
    )
    if plan is not None:
        known = {alias for names in selection.names.values() for alias in names}
        for name, form in plan.choices.items():
            if form in MODES and name not in known:
                raise ValueError(f"plan: the model has no Linear layer {name!r}; plan for it anew")
    weights = {name: selection.layers[name].weight for name in selection.chosen}
    weights |= {name: selection.embeddings[name].weight for name in selection.tables}
    for name, weight in weights.items():
        rows = max(1, BLOCK // max(1, weight.shape[-1]))  # as the check takes memory too
        if not all(bool(part.isfinite().all()) for part in weight.detach().split(rows)):
            raise ValueError(f"layer {name!r}: its weight holds NaN or Inf")
    return selection, tuple(p for p, _ in recipe.overrides if p not in decided_by)


def _with_table(layer: LayerRecipe, table: QuantSpec) -> LayerRecipe:
    """What a Linear layer gets that shares the integers of a table."""
    return replace(layer, weight=table, method=())


def _build_tables(
    selection: Selection, linears: dict[str, nn.Module], tied: dict[str, str], keep: Keep
) -> dict[str, nn.Module]:
    """The embeddings' replacements. Those that share a weight with a layer or with each other share
    its integers, and are noted in ``tied``."""
    owners: dict[int, str] = {}  # id of a Parameter → the first layer that holds its integers
    built: dict[str, Any] = dict(linears)
    for name, choice in selection.chosen.items():
        # Those whose exact names include holds may have got others.
        if any(choice == _with_table(choice, spec) for spec in selection.tables.values()):
            owners.setdefault(id(selection.layers[name].weight), name)
    for name, spec in selection.tables.items():
        embedding = selection.embeddings[name]
        owner = owners.setdefault(id(embedding.weight), name)
        if owner == name:
            made = partial(QuantizedEmbedding.from_embedding, embedding, spec)
            built |= keep([name], partial(_as_built, name, made)).layers
            continue
        to, (rows, columns) = built[owner], embedding.weight.shape
        built[name] = QuantizedEmbedding(
            rows,
            columns,
            embedding.padding_idx,
            "meta",
            embedding.weight.dtype,
            bits=to.bits,
            group_size=to.group_size,
            scale_dtype=to.scale_dtype,
        )
        tie_weights(built[name], to)
        tied[name] = owner
    return {name: built[name] for name in selection.tables}


def _as_built(name: str, made: Callable[[], nn.Module]) -> Built:
    return Built({name: made()})


def _check_calibration(selection: Selection, recipe: Recipe, calibration: Any) -> None:
    """Data must be there where a layer needs it, and only where the recipe asks for it: also of a
    layer that shares a table's integers and so has no method."""
    chosen: dict[str, LayerRecipe] = selection.chosen
    static = [name for name, layer in chosen.items() if layer.mode == "static"]
    looking = {name: needs_data(layer.method) for name, layer in chosen.items()}
    looking = {name: methods for name, methods in looking.items() if methods}
    if calibration is None and static:
        raise ValueError(
            f"calibration must be given: {len(static)} layers are static (first {static[0]!r}); "
            "pass an iterable of sample batches"
        )
    if calibration is None and looking:
        name, methods = next(iter(looking.items()))
        raise ValueError(
            f"calibration must be given: {methods[0]!r} looks at sample data, and {len(looking)} "
            f"layers use it (first {name!r}); pass an iterable of sample batches"
        )
    asking = [recipe.match(selection.names[name])[0] for name in chosen]
    if calibration is not None and not any(r is not None and r.needs_calibration for r in asking):
        raise ValueError(
            "calibration was given, but no chosen layer is static or has a method that looks at it"
        )


def _before(model: nn.Module) -> tuple[dict[str, LayerRecipe], dict[str, QuantSpec]]:
    """What an earlier call of :func:`quantize` did to layers and to tables, as far as it is still
    there."""
    summary = getattr(model, "quantization", None)
    if not isinstance(summary, QuantizationSummary):
        return {}, {}
    modules = dict(model.named_modules(remove_duplicate=False))

    def there(done: dict[str, Any], kind: type[nn.Module]) -> dict[str, Any]:
        return {name: what for name, what in done.items() if isinstance(modules.get(name), kind)}

    layers = there(summary.quantized, QuantizedLinear)
    return layers, there(summary.embeddings, QuantizedEmbedding)
