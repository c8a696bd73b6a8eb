"""One layer quantized from the inputs that were kept of it: what a trial needs, without running the
model again for every layer as ``quantize`` does."""

from __future__ import annotations

from torch import nn

from ..algorithms import InputStatistics, needs_data, needs_gram, quantize_weight
from ..calibrate import OBSERVERS
from ..input_transform import transform_input
from ..modules import QuantizedLinear
from ..recipes import LayerRecipe
from .inputs import Inputs


def from_inputs(linear: nn.Linear, recipe: LayerRecipe, inputs: Inputs) -> QuantizedLinear:
    """The layer as ``quantize`` makes it, but for statistics that come from the rows kept.

    Largest magnitudes, by which ``smooth`` goes, are those of all rows.

    Args:
        linear: the float layer.
        recipe: what it gets.
        inputs: of at least one row.
    """
    rows = inputs.rows()
    seen = None
    if needs_data(recipe.method):
        seen = InputStatistics(linear.in_features, needs_gram(recipe.method))
        seen.observe(rows)
        if needs_data(recipe.method) == ["smooth"] and inputs.amax is not None:
            # A row of all channels' largest magnitudes: it moves the means, which are not asked.
            seen.observe(inputs.amax)
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    made = quantize_weight(weight, bias, recipe.weight, recipe.method, seen)
    qparams = None
    if recipe.mode == "static":
        observer = OBSERVERS[recipe.observer]()
        if made.input_factor is not None:
            rows = transform_input(rows, made.input_factor, made.rotation)
        observer.observe(rows)
        qparams = observer.qparams(recipe.activation)
    layer = QuantizedLinear.from_quantized(
        made.weight,
        made.bias,
        recipe.mode,
        qparams,
        input_factor=made.input_factor,
        rotation=made.rotation,
    )
    return layer.to(weight.device)
