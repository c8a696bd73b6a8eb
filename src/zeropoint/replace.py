"""Put quantized layers into a model: under every name, with tied weights tied."""

from __future__ import annotations

import copy

from torch import nn

from .modules import QuantizedLinear


def replace_modules(
    model: nn.Module, replacements: dict[str, nn.Module], *, inplace: bool = False
) -> nn.Module:
    """Put other modules in place of the named ones, under every name they are used by.

    torch's ``TransformerEncoderLayer`` has a fused path that reads the weights of its ``linear1``
    and ``linear2`` as float tensors; it is switched off where they are replaced.

    Args:
        model: any module; ``""`` names the model itself.
        replacements: qualified name → new module. It takes the old one's training mode.
        inplace: change ``model``; otherwise it stays as it is, and the result is a copy of all but
            what is replaced.

    Returns:
        The model with its replacements.

    Raises:
        ValueError: ``model`` has no module of such a name. It is unchanged then.
        TypeError: ``model`` cannot be copied.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in replacements:
        if name not in modules:
            raise ValueError(f"model has no layer {name!r}")
    new = {id(modules[name]): module for name, module in replacements.items()}
    for name, module in replacements.items():
        module.train(modules[name].training)
    if id(model) in new:
        return new[id(model)]
    if inplace:
        result = model
        for parent in set(modules.values()):
            for key, child in parent._modules.items():
                if id(child) in new:
                    parent._modules[key] = new[id(child)]
    else:
        try:
            # What deepcopy finds in its memo it takes for the copy: the layers to be replaced are
            # exchanged in every place that holds them, and their weights never copied.
            result = copy.deepcopy(model, dict(new))
        except Exception as error:
            raise TypeError(f"model cannot be copied ({error}); pass inplace=True") from error
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, QuantizedLinear) for child in module.children()
        ):
            module.activation_relu_or_gelu = 0  # the fused path asks for 1 or 2
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, QuantizedLinear) for child in module.modules()
        ):
            module.use_nested_tensor = False  # it packs padded batches for the fused path only
    return result


def tie_weights(layer: QuantizedLinear, to: QuantizedLinear) -> None:
    """Let ``layer`` use the integers, scales and zero points of ``to``, and so one packing.

    Raises:
        ValueError: the layers differ in size.
    """
    if layer.weight.shape != to.weight.shape:
        raise ValueError(
            f"layer must have a weight of shape {tuple(to.weight.shape)}, got "
            f"{tuple(layer.weight.shape)}"
        )
    layer.weight, layer.scale, layer.zero_point = to.weight, to.scale, to.zero_point
