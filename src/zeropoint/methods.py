"""A model's layers quantized by the methods of their recipes, block by block.

Layers without a method that needs data are quantized one after the other. The others are taken in
stages, in the order in which the model calls them. A stage is one of the model's repeated blocks
(a transformer's layers, say), or a single layer outside of them. For each stage the model runs over
the data, up to that stage, with all layers before it quantized already: so a layer is made for the
inputs that it will get, errors of earlier layers included, as in GPTQ's paper. Held at a time are
the sums of one stage's layers, ``in²`` float32 for each, and no inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .affine import quantize_to_spec
from .algorithms import InputStatistics, QuantizedWeight, needs_data, needs_gram, quantize_weight
from .algorithms.bias_correction import correct_bias
from .calibrate import OBSERVERS, Observer, calibrate, progress_bar
from .input_transform import transform_input
from .modules import QuantizedLinear
from .recipes import LayerRecipe
from .replace import tie_weights
from .spec import QuantSpec

UNCALLED = "calibration never called it"
"""Why a layer is left float that data is needed for."""


@dataclass
class Built:
    """The layers that take the float ones' places.

    Attributes:
        layers: name → layer.
        tied: name → name of the layer whose integers it uses.
        done: name → what the methods did, in words.
        uncalled: names of layers that the data never reached.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)


def build_layers(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    recipes: dict[str, LayerRecipe],
    observers: dict[str, Observer],
    data: list[Any],
    progress: bool,
) -> Built:
    """Quantize the named layers. ``model`` runs, but is not changed.

    Args:
        model: what holds the layers.
        linears: name → float layer.
        recipes: name → what it gets, of the layers to quantize.
        observers: of static layers without a method that needs data: what saw their inputs.
        data: batches for the methods that need some; as :func:`zeropoint.calibrate.calibrate`.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: as :func:`zeropoint.calibrate.calibrate`.
    """
    builder = _Builder(linears, recipes)
    waiting = [name for name, layer in recipes.items() if in_stages(layer)]
    ready = [name for name in recipes if name not in set(waiting)]
    for name in progress_bar(ready, "quantizing", progress):
        builder.add(name, None, observers.get(name))
    if waiting:
        _in_stages(model, builder, waiting, data, progress)
    return builder.built


def in_stages(layer: LayerRecipe) -> bool:
    """Whether a layer waits for its stage: for data about the inputs it will have."""
    return bool(needs_data(layer.method)) or (layer.mode == "static" and bool(layer.method))


def stages(names: Iterable[str], model: nn.Module) -> list[list[str]]:
    """Layers by the repeated block that holds them, in the order of ``names``.

    A repeated block is an entry of the outermost list (``ModuleList``, ``Sequential``) in which two
    entries of one type hold layers of ``names``.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    >>> stages(["0", "1.0", "1.1"], model)
    [['0'], ['1.0'], ['1.1']]
    """
    names = list(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    lists = {
        path
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _repeats(path, module, names)
    }
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        block = name
        for depth in range(len(parts)):
            if ".".join(parts[:depth]) in lists:
                block = ".".join(parts[: depth + 1])
                break
        found.setdefault(block, []).append(name)
    return list(found.values())


def _repeats(path: str, module: nn.Module, names: list[str]) -> bool:
    prefix = f"{path}." if path else ""
    holding = {n[len(prefix) :].split(".")[0] for n in names if n.startswith(prefix) and n != path}
    types = Counter(type(child) for key, child in module.named_children() if key in holding)
    return max(types.values(), default=0) > 1


class _Builder:
    """Makes layers one at a time, and keeps track of shared weights."""

    def __init__(self, linears: dict[str, nn.Linear], recipes: dict[str, LayerRecipe]) -> None:
        self.linears, self.recipes = linears, recipes
        self.built = Built()
        self._users = Counter(id(linears[name].weight) for name in recipes)
        # The first layer of each shared Parameter, by spec and method; its integers serve others.
        self._first: dict[tuple[int, QuantSpec, tuple[str, ...]], tuple[str, QuantizedWeight]] = {}

    def quantize(self, name: str, inputs: InputStatistics | None) -> QuantizedWeight:
        """The layer's integers, or those of the layer it shares its weight with."""
        linear, recipe = self.linears[name], self.recipes[name]
        key = (id(linear.weight), recipe.weight, recipe.method)
        if key not in self._first:
            if not recipe.method:
                made = QuantizedWeight(quantize_to_spec(linear.weight, recipe.weight), linear.bias)
            else:
                try:
                    made = quantize_weight(
                        linear.weight, linear.bias, recipe.weight, recipe.method, inputs
                    )
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
            if self._users[id(linear.weight)] > 1:
                self._first[key] = name, made
            return made
        owner, made = self._first[key]
        self.built.tied[name] = owner
        bias: Tensor | None = linear.bias
        if bias is not None and inputs is not None and "bias-correction" in recipe.method:
            bias = correct_bias(bias.cpu(), linear.weight.cpu(), made.reals(), inputs.mean)
        return QuantizedWeight(made.weight, bias, made.input_factor, made.rotation, made.notes)

    def add(
        self, name: str, made: QuantizedWeight | None, observer: Observer | None
    ) -> QuantizedLinear:
        """The layer, from its integers if they are there."""
        recipe, linear = self.recipes[name], self.linears[name]
        made = self.quantize(name, None) if made is None else made
        qparams = None if observer is None else observer.qparams(recipe.activation)
        new = QuantizedLinear.from_quantized(
            made.weight,
            made.bias,
            recipe.mode,
            qparams,
            input_factor=made.input_factor,
            rotation=made.rotation,
        ).to(linear.weight.device)
        if name in self.built.tied:
            tie_weights(new, self.built.layers[self.built.tied[name]])  # type: ignore[arg-type]
        self.built.layers[name] = new
        if made.notes:
            self.built.done[name] = ", ".join(made.notes)
        return new


class _Counting:
    """Counts a layer's calls, batch by batch."""

    def __init__(self, batches: _Batches) -> None:
        self._batches = batches
        self.calls: Counter[int] = Counter()

    def observe(self, x: Any) -> None:
        self.calls[self._batches.number] += 1


class _Batches:
    """The data, and which batch is running."""

    def __init__(self, data: list[Any]) -> None:
        self._data = data
        self.number = -1

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._data):
            self.number = number
            yield batch


class _Transformed:
    """Shows an observer a layer's input as the layer changes it."""

    def __init__(self, observer: Observer, made: QuantizedWeight) -> None:
        self._observer, self._made = observer, made

    def observe(self, x: Any) -> None:
        factor = self._made.input_factor
        if factor is not None and isinstance(x, Tensor):
            x = transform_input(x, factor.to(x.device), self._made.rotation)
        self._observer.observe(x)


def _in_stages(
    model: nn.Module, builder: _Builder, names: list[str], data: list[Any], progress: bool
) -> None:
    batches = _Batches(data)
    counting = {name: _Counting(batches) for name in names}
    order: list[str] = []

    def note(name: str) -> bool:
        if len(counting[name].calls) == 1 and counting[name].calls.total() == 1:
            order.append(name)
        return False

    calibrate(model, counting, batches, progress, note)
    builder.built.uncalled += [name for name in names if name not in order]
    bar = progress_bar(stages(order, model), "quantizing by stages", progress)
    with _stand_ins() as stand_in, bar:
        for stage in bar:
            bar.set_postfix_str(stage[0])
            _one_stage(model, builder, stage, counting, batches)
            for name in stage:
                if name in builder.built.layers:
                    stand_in(builder.linears[name], builder.built.layers[name])


def _one_stage(
    model: nn.Module,
    builder: _Builder,
    stage: list[str],
    counting: dict[str, _Counting],
    batches: _Batches,
) -> None:
    def show(watching: dict[str, Any]) -> None:
        """Run the data up to where these layers have had their calls."""
        left: Counter[str] = Counter()
        running = -1

        def enough(name: str) -> bool:
            nonlocal running
            if batches.number != running:
                running = batches.number
                left.clear()
                left.update({n: counting[n].calls[running] for n in watching})
            left[name] -= 1
            return all(count <= 0 for count in left.values())

        if watching:
            calibrate(model, watching, batches, False, enough)

    recipes = builder.recipes
    inputs = {
        name: InputStatistics(builder.linears[name].in_features, needs_gram(recipes[name].method))
        for name in stage
        if needs_data(recipes[name].method)
    }
    show(inputs)
    made = {}
    for name in stage:
        if name in inputs and inputs[name].is_empty:
            builder.built.uncalled.append(name)
            continue
        made[name] = builder.quantize(name, inputs.pop(name, None))
    observers = {n: OBSERVERS[recipes[n].observer]() for n in made if recipes[n].mode == "static"}
    show({name: _Transformed(observer, made[name]) for name, observer in observers.items()})
    for name, weight in made.items():
        observer = observers.get(name)
        if observer is not None and observer.is_empty:
            builder.built.uncalled.append(name)
        else:
            builder.add(name, weight, observer)


@contextmanager
def _stand_ins() -> Iterator[Any]:
    """Lets quantized layers compute in place of float ones; afterwards the model is as it was."""
    replaced: list[nn.Linear] = []

    def stand_in(linear: nn.Linear, layer: nn.Module) -> None:
        replaced.append(linear)
        linear.forward = layer.forward  # type: ignore[method-assign]

    try:
        yield stand_in
    finally:
        for linear in replaced:
            del linear.__dict__["forward"]
