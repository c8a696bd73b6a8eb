"""Put other layers into a model: under every name, with tied weights tied."""

from __future__ import annotations

import copy
from typing import TypeAlias

from torch import nn

from . import saving
from .embedding import QuantizedEmbedding
from .modules import QuantizedLinear
from .packed_linear import PackedLinear

_OURS = (QuantizedLinear, PackedLinear)


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
    if inplace:
        replacer = Replacer(model)
        for name, module in replacements.items():
            replacer.replace(modules[name], module)
        return replacer.finish()
    new = {id(modules[name]): module for name, module in replacements.items()}
    for name, module in replacements.items():
        module.train(modules[name].training)
    if id(model) in new:
        return new[id(model)]
    try:
        # What deepcopy finds in its memo it takes for the copy: the layers to be replaced are
        # exchanged in every place that holds them, and their weights never copied.
        result = copy.deepcopy(model, dict(new))
    except Exception as error:
        raise TypeError(f"model cannot be copied ({error}); pass inplace=True") from error
    return _finished(result)


class Replacer:
    """Puts other modules into a model in place, one at a time. What was replaced is held no more.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._users: dict[int, list[tuple[nn.Module, str]]] = {}  # id of a module → who holds it
        for parent in model.modules():
            for key, child in parent._modules.items():
                if child is not None:
                    self._users.setdefault(id(child), []).append((parent, key))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` in every place of ``old``, in its training mode."""
        new.train(old.training)
        for parent, key in self._users.get(id(old), ()):
            parent._modules[key] = new
        if old is self._model:
            self._model = new

    def finish(self) -> nn.Module:
        """The model, with paths switched off that go past what was replaced, or would save it as
        if it were floats."""
        return _finished(self._model)


def _finished(model: nn.Module) -> nn.Module:
    _switch_off_fused_paths(model)
    _guard_saving(model)
    return model


def _switch_off_fused_paths(model: nn.Module) -> None:
    """Let ``TransformerEncoderLayer`` call its layers where one of them is ours."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, _OURS) for child in module.children()
        ):
            module.activation_relu_or_gelu = 0  # the fused path asks for 1 or 2
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, _OURS) for child in module.modules()
        ):
            module.use_nested_tensor = False  # it packs padded batches for the fused path only


def _guard_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of transformers raise on models, and parts of them, that hold our
    integers, before it writes anything. The layers themselves would refuse once it has written the
    config. ``ZeropointQuantizer`` is what lets it write them, see
    :func:`zeropoint.integrations.transformers.make_savable`."""
    pretrained = saving.pretrained_class()
    if pretrained is None:
        return
    for module in model.modules():
        if not isinstance(module, pretrained):
            continue
        ours = any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in module.modules())
        if ours and not saving.is_savable(module):
            module.save_pretrained = saving.refuse  # type: ignore[assignment]
        else:
            allow_saving(module)


def allow_saving(model: nn.Module) -> None:
    """Undo for one model what :func:`replace_modules` does to ``save_pretrained``."""
    if model.__dict__.get("save_pretrained") is saving.refuse:
        del model.save_pretrained


_Holder: TypeAlias = QuantizedLinear | QuantizedEmbedding


def tie_weights(layer: _Holder, to: _Holder) -> None:
    """Let ``layer`` use the integers, scales and zero points of ``to``, and so one packing; and its
    input factor and rotation, which its integers are made for. A row of an embedding table is an
    output of a Linear layer.

    Raises:
        ValueError: the layers' weights differ in size, width or groups, or one is a table and the
            other has an input factor.
    """
    if layer.weight.shape != to.weight.shape or layer._layout != to._layout:
        raise ValueError(f"layer must have a weight {_describe(to)}, got one {_describe(layer)}")
    linear = isinstance(layer, QuantizedLinear)
    if linear and isinstance(to, QuantizedLinear):
        layer.input_factor, layer.rotation = to.input_factor, to.rotation
    elif any(
        isinstance(side, QuantizedLinear) and side.input_factor is not None for side in (layer, to)
    ):
        raise ValueError(
            "an embedding table and a Linear layer with an input_factor share no weight"
        )
    layer.weight, layer.scale, layer.zero_point = to.weight, to.scale, to.zero_point


def _describe(layer: _Holder) -> str:
    groups = "" if layer.group_size is None else f" in groups of {layer.group_size}"
    if isinstance(layer, QuantizedEmbedding):
        size = layer.num_embeddings, layer.embedding_dim
    else:
        size = layer.out_features, layer.in_features
    return f"of shape {size}, {layer.bits} bits{groups}"
