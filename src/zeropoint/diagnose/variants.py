"""The quantized forms of a model's layers: made once, to be switched in and out of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import kernels
from ..input_transform import transform_input, walsh_hadamard
from ..layout import expand_groups
from ..modules import QuantizedLinear
from ..quantize import quantize
from ..recipes import LayerRecipe, Recipe
from ..reference import quantize_rows, quantize_static
from ..walk import Selection
from .switching import Forward, as_it_was


def chosen(model: nn.Module, recipe: Recipe) -> Selection:
    """Which layers ``quantize(model, recipe)`` quantizes, and why others are left."""

    def choose(names: list[str]) -> LayerRecipe | str:
        layer, _ = recipe.match(names)
        return "the recipe keeps it float" if layer is None else layer

    return Selection(model, None, None, choose)


@dataclass
class Variants:
    """What ``quantize`` makes of a model, without the model.

    Args:
        layers: name → quantized layer.
        recipes: name → what it was given.
        left: Linear layers that stay float: name → reason.
        runs: how often the model ran on a batch of calibration data, parts of a run included.
    """

    layers: dict[str, QuantizedLinear]
    recipes: dict[str, LayerRecipe] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    runs: int = 0
    _computed: dict[str, Forward] = field(default_factory=dict)

    def computed(self, name: str) -> Forward:
        """What a layer computes, see :func:`computed`; made once."""
        if name not in self._computed:
            self._computed[name] = computed(self.layers[name])
        return self._computed[name]

    def forwards(
        self,
        floats: Mapping[str, nn.Linear],
        *,
        only: str | None = None,
        without: str | None = None,
    ) -> dict[nn.Module, Forward]:
        """Functions to stand in for the float layers' own: of all, of one, or of all but one."""
        return {
            floats[name]: self.computed(name)
            for name in self.layers
            if name != without and (only is None or name == only)
        }


def build(
    model: nn.Module, recipe: Recipe, calibration: list[Any], progress: bool = False
) -> Variants:
    """Quantize a model's layers by ``quantize`` itself; the model is as it was afterwards.

    Embedding tables stay float, and layers tied to one with them, as :func:`chosen` says.

    Raises:
        ValueError, TypeError: as :func:`zeropoint.quantize`.
    """
    wanted = chosen(model, recipe).chosen
    needed = any(layer.needs_calibration for layer in wanted.values())
    if not wanted:
        return Variants({}, left=chosen(model, recipe).left_in_order())
    with as_it_was(model), _counted(model) as runs:
        result = quantize(
            model,
            replace(recipe, embeddings=None),
            calibration=calibration if needed else None,
            inplace=True,
            progress=progress,
        )
        modules = dict(result.named_modules(remove_duplicate=False))
        made = {n: modules[n] for n in wanted if isinstance(modules[n], QuantizedLinear)}
        left: dict[str, str] = dict(result.quantization.left)  # type: ignore[union-attr,arg-type]
    return Variants(made, {n: wanted[n] for n in made}, left, len(runs))  # type: ignore[arg-type]


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows by one whenever the model is called. No hook of the model's own, since a
    layer that has hooks is not quantized."""
    calls: list[None] = []

    def count(module: nn.Module, _args: Any) -> None:
        if module is model:
            calls.append(None)

    handle = register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


class Integers(NamedTuple):
    """Quantized values: integers (int32 or int8), what they stand for, the ends of the range, and
    one step of it (broadcast against the values)."""

    q: Tensor
    real: Tensor
    qmin: int
    qmax: int
    low: Tensor
    high: Tensor
    step: Tensor


def _integers(q: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Integers:
    scale, zero_point = scale.to(torch.float32), zero_point.to(torch.float32)
    real = (q.to(torch.float32) - zero_point) * scale
    low, high = ((end - zero_point) * scale for end in (qmin, qmax))
    return Integers(q, real, qmin, qmax, low, high, scale)


def changed_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What the layer makes of its input before anything else, see :mod:`zeropoint.input_transform`;
    float32."""
    if layer.input_factor is None:
        return x.to(torch.float32)
    return transform_input(x, layer.input_factor, layer.rotation)


def unchanged_input(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The inverse of :func:`changed_input`."""
    if layer.input_factor is None:
        return x
    return walsh_hadamard(x, layer.rotation) / layer.rotation / layer.input_factor


def changed_weight(layer: QuantizedLinear, weight: Tensor) -> Tensor:
    """The float weight that belongs to the changed input; float32."""
    weight = weight.detach().to(torch.float32)
    if layer.input_factor is None:
        return weight
    return walsh_hadamard(weight / layer.input_factor, layer.rotation) / layer.rotation


def quantized_input(layer: QuantizedLinear, x: Tensor) -> Integers | None:
    """Rows ``(n, in_features)``, changed already, as integers; ``None`` where they stay float."""
    if layer.mode == "weight-only":
        return None
    if layer.mode == "dynamic":
        q, scale, zero_point, _ = quantize_rows(x)
        return _integers(q, scale[:, None], zero_point[:, None], 0, 255)
    assert layer.input_scale is not None
    assert layer.input_zero_point is not None
    q, _ = quantize_static(x, layer.input_scale, layer.input_zero_point)
    return _integers(q, layer.input_scale, layer.input_zero_point, 0, 255)


def quantized_weight(layer: QuantizedLinear) -> Integers:
    """The weight ``(out_features, in_features)`` as the layer holds it."""
    w = layer.weight_qtensor()
    scale, zero_point = w.scale, w.zero_point
    if w.group_size is not None:
        scale, zero_point = (
            expand_groups(t, w.group_size, w.shape[-1]) for t in (scale, zero_point)
        )
    elif scale.ndim:
        scale, zero_point = scale[:, None], zero_point[:, None]
    return _integers(w.int_repr(), scale, zero_point, w.spec.qmin, w.spec.qmax)


def computed(layer: QuantizedLinear) -> Forward:
    """What the layer computes: by its kernel, or where it has none or leaves activations float, by
    floats that stand for its integers, which is the same but for float32 rounding. That is faster
    than the reference, and from some rows on than the chains of float kernels."""
    weight = layer.weight_qtensor()

    by_floats: list[Forward] = []  # made when needed: it holds the weight as floats

    def forward(input: Tensor) -> Tensor:
        if layer.mode != "weight-only" and kernels.usable(input, weight):
            return layer.forward(input)  # type: ignore[return-value]
        if not by_floats:
            by_floats.append(simulated(layer))
        return by_floats[0](input)

    return forward


def simulated(layer: QuantizedLinear) -> Forward:
    """The layer by float arithmetic on what its integers stand for."""
    weight = layer.weight_qtensor().dequantize()

    def forward(input: Tensor) -> Tensor:
        x = changed_input(layer, input.reshape(-1, layer.in_features))
        seen = quantized_input(layer, x)
        if seen is not None:
            # Rows that hold NaN or Inf give NaN, as in the layer (static clamps Inf; a float model
            # has no use for the difference).
            x = torch.where(x.isfinite().all(1, keepdim=True), seen.real, torch.nan)
        y = F.linear(x, weight, layer.bias)
        return y.to(input.dtype).reshape(*input.shape[:-1], layer.out_features)

    return forward


def layer_bytes(layer: QuantizedLinear) -> int:
    """Of the weight with scales, zero points and factors; not of the bias."""
    return sum(
        t.numel() * t.element_size()
        for name, t in layer.named_buffers(recurse=False)
        if name != "bias"
    )
