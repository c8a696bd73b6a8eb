"""A model's layers quantized by the methods of their recipes, block by block.

Layers without a method that needs data are quantized one after the other. The others are taken in
stages, in the order in which the model calls them. A stage is one of the model's repeated blocks
(a transformer's layers, say), or a single layer outside of them. Each stage sees the data as all
layers before it, quantized already, let it through: so a layer is made for the inputs that it will
get, errors of earlier layers included, as in GPTQ's paper. Where blocks hand on their outputs and
nothing else (:mod:`zeropoint.blocks`), each block runs by itself on the outputs of the last, twice
for each batch; elsewhere the model runs from its start for each stage, up to it. Held at a time are
one block's inputs and the sums of one stage's layers, ``in²`` float32 for each.

What is finished can be put aside (:data:`Keep`), and need not be made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .affine import quantize_to_spec
from .algorithms import InputStatistics, QuantizedWeight, needs_data, needs_gram, quantize_weight
from .algorithms.bias_correction import correct_bias
from .blocks import BlockInputs, Chain, stages
from .calibrate import OBSERVERS, Call, Observer, calibrate, progress_bar
from .input_transform import transform_input
from .modules import QuantizedLinear
from .recipes import LayerRecipe
from .replace import tie_weights
from .spec import QuantSpec

UNCALLED = "calibration never called it"
"""Why a layer is left float that data is needed for."""


@dataclass
class Built:
    """The layers that take the float ones' places, or those of a part of the model.

    Attributes:
        layers: name → layer, or table.
        tied: name → name of the layer whose integers it uses.
        done: name → what the methods did, in words.
        uncalled: names of layers that the data never reached.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)


Keep: TypeAlias = Callable[[list[str], Callable[[], Built]], Built]
"""Given the names of some layers and what makes them: the finished layers. It may put them where
they take no memory, and it may know them from an earlier run, which has to have been the same up to
there, and make nothing."""


def make(names: list[str], made: Callable[[], Built]) -> Built:
    """The :data:`Keep` that keeps nothing."""
    return made()


def build_layers(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    recipes: dict[str, LayerRecipe],
    observers: dict[str, Observer],
    data: list[Any],
    progress: bool,
    keep: Keep = make,
) -> Built:
    """Quantize the named layers. ``model`` runs, but is not changed.

    Args:
        model: what holds the layers.
        linears: name → float layer.
        recipes: name → what it gets, of the layers to quantize.
        observers: of static layers without a method that needs data: what saw their inputs.
        data: batches for the methods that need some; as :func:`zeropoint.calibrate.calibrate`.
        progress: show progress bars.
        keep: what takes finished layers, block by block. Layers that run in place of float ones
            are packed anew for each call then, since their packings would not be kept by it.

    Raises:
        TypeError, ValueError: as :func:`zeropoint.calibrate.calibrate`.
    """
    builder = _Builder(linears, recipes, keep)
    waiting = [name for name, layer in recipes.items() if in_stages(layer)]
    ready = [name for name in recipes if name not in set(waiting)]

    def nearest(names: list[str]) -> None:
        for name in names:
            builder.add(name, None, observers.get(name))

    for names in progress_bar(stages(ready, model).values(), "quantizing", progress):
        builder.build(names, partial(nearest, names))
    if waiting:
        _Stages(model, builder, waiting, data).run(progress)
    return builder.built


def in_stages(layer: LayerRecipe) -> bool:
    """Whether a layer waits for its stage: for data about the inputs it will have."""
    return bool(needs_data(layer.method)) or (layer.mode == "static" and bool(layer.method))


class _Builder:
    """Makes layers one at a time, and keeps track of shared weights."""

    def __init__(
        self, linears: dict[str, nn.Linear], recipes: dict[str, LayerRecipe], keep: Keep
    ) -> None:
        self.linears, self.recipes, self._keep = linears, recipes, keep
        self.built = Built()
        self.part = Built()
        """What is being made, and not yet taken over into ``built``."""
        self._users = Counter(id(linears[name].weight) for name in recipes)
        # The first layer of each shared Parameter, by spec and method; its integers serve others.
        self._first: dict[tuple[int, QuantSpec, tuple[str, ...]], tuple[str, QuantizedWeight]] = {}

    @property
    def keeps(self) -> bool:
        """Whether finished layers are put somewhere."""
        return self._keep is not make

    def build(self, names: list[str], fill: Callable[[], None]) -> None:
        """Take the layers that ``fill`` puts into ``part``, or those that were kept of an earlier
        run."""

        def made() -> Built:
            self.part = Built()
            fill()
            return self.part

        part = self._keep(names, made)
        self.part = Built()
        self.built.layers |= part.layers
        self.built.tied |= part.tied
        self.built.done |= part.done
        self.built.uncalled += part.uncalled
        for name, layer in part.layers.items():
            if name in part.tied:
                tie_weights(layer, self.built.layers[part.tied[name]])  # type: ignore[arg-type]
            elif self._users[id(self.linears[name].weight)] > 1:
                assert isinstance(layer, QuantizedLinear)
                notes = (part.done[name],) if name in part.done else ()
                held = layer.weight_qtensor(), layer.bias, layer.input_factor, layer.rotation
                self._first[self._key(name)] = name, QuantizedWeight(*held, notes)

    def _key(self, name: str) -> tuple[int, QuantSpec, tuple[str, ...]]:
        recipe = self.recipes[name]
        return id(self.linears[name].weight), recipe.weight, recipe.method

    def quantize(self, name: str, inputs: InputStatistics | None) -> QuantizedWeight:
        """The layer's integers, or those of the layer it shares its weight with."""
        linear, recipe, key = self.linears[name], self.recipes[name], self._key(name)
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
        self.part.tied[name] = owner
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
        if name in self.part.tied:
            owner = self.part.tied[name]
            to = self.part.layers.get(owner) or self.built.layers[owner]
            tie_weights(new, to)  # type: ignore[arg-type]
        self.part.layers[name] = new
        if made.notes:
            self.part.done[name] = ", ".join(made.notes)
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

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        return self.some(0, len(self))

    def some(self, begin: int, end: int) -> Iterator[Any]:
        """The batches of these numbers."""
        for number in range(begin, min(end, len(self))):
            self.number = number
            yield self._data[number]


class _Transformed:
    """Shows an observer a layer's input as the layer changes it."""

    def __init__(self, observer: Observer, made: QuantizedWeight) -> None:
        self._observer, self._made = observer, made

    def observe(self, x: Any) -> None:
        factor = self._made.input_factor
        if factor is not None and isinstance(x, Tensor):
            x = transform_input(x, factor.to(x.device), self._made.rotation)
        self._observer.observe(x)


class _Stages:
    """The layers that wait for data, stage by stage."""

    def __init__(self, model: nn.Module, builder: _Builder, names: list[str], data: list[Any]):
        self.model, self.builder = model, builder
        self.batches = _Batches(data)
        self.counting = {name: _Counting(self.batches) for name in names}
        self.surveyed = 0

    def run(self, progress: bool) -> None:
        """Quantize them all."""
        by_block, chain = self._survey(progress)
        inputs = BlockInputs(chain, by_block, self.batches, progress)
        bar = progress_bar(by_block.items(), "quantizing by stages", progress)
        with _stand_ins(self.builder.keeps) as stand_in, bar:
            for block, names in bar:
                bar.set_postfix_str(block)
                self.builder.build(names, partial(self._stage, block, names, inputs))
                for name in names:
                    if name in self.builder.built.layers:
                        stand_in(self.builder.linears[name], self.builder.built.layers[name])

    def _survey(self, progress: bool) -> tuple[dict[str, list[str]], Chain]:
        """Which layers are called, when, and what blocks hand on, from runs of the float model.

        The first batch is run. The others too, unless it can be told without running the blocks
        that they go the same way: in each, the weights of the whole model are read.
        """
        order: list[str] = []

        # Blocks by the order in which layers are defined; a chain holds where that is the order of
        # the calls as well.
        defined = stages(self.counting, self.model)
        chain = Chain(self.model, defined)
        block_of = {name: block for block, names in defined.items() for name in names}

        def note(name: str) -> bool:
            if self.counting[name].calls.total() == 1:
                order.append(name)
            if chain.running != block_of[name]:
                chain.exclude(block_of[name])  # called past its block
            return False

        def watch(begin: int, end: int) -> None:
            with chain.watching():
                batches = self.batches.some(begin, end)
                calibrate(self.model, self.counting, batches, progress, note)

        watch(0, 1)
        chain.verify()
        self.surveyed, count = 1, len(self.batches)
        linked = chain.linked()
        alone = [block_of[name] in linked for name in order]
        # Were some called before the blocks, each of them would take a run to the end, as it is not
        # known when they have had their calls.
        sure = len(order) == len(self.counting) and alone == sorted(alone, reverse=True)
        if count > 1 and not (sure and chain.holds_for(self.batches.some(1, count))):
            watch(1, count)
            self.surveyed = count
        self.builder.built.uncalled += [name for name in self.counting if name not in order]
        return stages(order, self.model), chain

    def _show(self, watching: dict[str, Any], alone: tuple[str, Chain, list[Call]] | None) -> None:
        """Run the data up to where these layers have had their calls, or their block by itself."""
        if not watching:
            return
        if alone is not None:
            block, chain, calls = alone
            calibrate(chain.block(block), watching, calls, False, own_name=block)
            return
        left: Counter[str] = Counter()
        running = -1

        def enough(name: str) -> bool:
            nonlocal running
            if self.batches.number != running:
                running = self.batches.number
                left.clear()
                left.update({n: self.counting[n].calls[running] for n in watching})
            if running >= self.surveyed:
                return False  # how often they will be called is not known
            left[name] -= 1
            return all(count <= 0 for count in left.values())

        calibrate(self.model, watching, self.batches, False, enough)

    def _stage(self, block: str, names: list[str], block_inputs: BlockInputs) -> None:
        calls = block_inputs.of(block)
        alone = None if calls is None else (block, block_inputs.chain, calls)
        recipes, linears = self.builder.recipes, self.builder.linears
        uncalled = self.builder.part.uncalled
        inputs = {
            n: InputStatistics(linears[n].in_features, needs_gram(recipes[n].method))
            for n in names
            if needs_data(recipes[n].method)
        }
        self._show(inputs, alone)
        made = {}
        for name in names:
            if name in inputs and inputs[name].is_empty:
                uncalled.append(name)
            else:
                made[name] = self.builder.quantize(name, inputs.pop(name, None))
        static = [name for name in made if recipes[name].mode == "static"]
        observers = {name: OBSERVERS[recipes[name].observer]() for name in static}
        self._show({n: _Transformed(o, made[n]) for n, o in observers.items()}, alone)
        for name, weight in made.items():
            observer = observers.get(name)
            if observer is not None and observer.is_empty:
                uncalled.append(name)
            else:
                self.builder.add(name, weight, observer)


@contextmanager
def _stand_ins(pack_each_time: bool) -> Iterator[Any]:
    """Lets quantized layers compute in place of float ones; afterwards the model is as it was."""
    replaced: list[nn.Linear] = []

    def stand_in(linear: nn.Linear, layer: QuantizedLinear) -> None:
        def forward(input: Tensor) -> Any:
            try:
                return layer.forward(input)
            finally:
                layer._cache = None  # and with it the packing

        replaced.append(linear)
        linear.forward = (  # type: ignore[method-assign]
            forward if pack_each_time else layer.forward  # type: ignore[assignment]
        )

    try:
        yield stand_in
    finally:
        for linear in replaced:
            del linear.__dict__["forward"]
