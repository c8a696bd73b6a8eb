"""``prepack_model``: let a float model's Linear layers hold their weights as the hardware reads
them, and ``unpack_model``, the way back."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from .packed_linear import PACKED_DTYPES, PackedLinear
from .replace import Replacer, replace_modules
from .walk import ROOT, Selection, show


@dataclass(frozen=True)
class PrepackingSummary:
    """What :func:`prepack_model` did. Layers go by the first name they are met by in the model.

    Args:
        packed: name → bytes of the packed weight of every layer that was replaced.
        left: name → reason of every Linear layer that was not.
        shared: further name → first name of replaced layers that have several.
        tied: name → name of the layer whose packed weight it uses, of layers with one weight.
    """

    packed: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.packed) + len(self.left)
        rows = [(name, f"{nbytes:,} bytes") for name, nbytes in self.packed.items()]
        rows += [(alias, f"is {name or ROOT}") for alias, name in self.shared.items()]
        rows += [(name, f"shares the weight of {to or ROOT}") for name, to in self.tied.items()]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        return show(f"packed {len(self.packed)} of {total} Linear layers", rows)


def prepack_model(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace the float32 and bfloat16 Linear layers of a model by :class:`PackedLinear` ones.

    Nothing is lost: the weights keep their bits, ``state_dict()`` holds what it held, and
    :func:`unpack_model` gives the float model back. Only the packed form is held. Which layers are
    left, and why, follows the rules of :func:`zeropoint.quantize`; layers of other types than
    float32 and bfloat16 are left too. Layers that are quantized already are not touched, so that
    quantizing some layers and packing the rest is one call after the other.

    The result carries a plain attribute ``prepacking``, a :class:`PrepackingSummary`; print it.

    Args:
        model: any module. A model that is itself a Linear gives a ``PackedLinear``.
        include: glob patterns of the layers to consider; default all. ``*`` also matches dots.
        exclude: glob patterns of layers to leave; stronger than ``include``.
        inplace: change ``model`` itself and return it. A layer's float weight is let go as soon as
            it is packed, so that memory peaks at one layer's weight above what the model held.
            Otherwise ``model`` stays as it is, and the result is a second model beside it.

    Raises:
        TypeError: ``model`` is not a module or cannot be copied.
        ValueError: a pattern that matches no Linear layer. The model is unchanged then.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> packed = prepack_model(model)
    >>> packed[0]
    PackedLinear(in_features=8, out_features=8, bias=True, dtype=torch.float32)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    selection = Selection(
        model, include, exclude, lambda names: True, _why_not, "which is not packed"
    )
    packed: dict[str, int] = {}
    tied: dict[str, str] = {}
    replacements: dict[str, nn.Module] = {}
    first: dict[int, tuple[str, PackedLinear]] = {}  # id of a Parameter that is still held
    shared, left = selection.aliases(), selection.left_in_order()
    weights = [id(selection.layers[name].weight) for name in selection.chosen]
    replacer = Replacer(model) if inplace else None
    for name in list(selection.chosen):
        linear = selection.layers.pop(name)
        key = id(linear.weight)
        weights.remove(key)
        owner_name, owner = first.get(key, (name, None))
        new = PackedLinear.from_linear(linear, share=owner)
        if owner is None:
            packed[name] = new.packed_bytes
        else:
            packed[name], tied[name] = 0, owner_name
        if key in weights:
            first[key] = (owner_name, owner or new)
        if replacer is None:
            replacements[name] = new
        else:
            replacer.replace(linear, new)
        del linear  # the last that holds the float weight, where the model is changed in place
    model = replace_modules(model, replacements) if replacer is None else replacer.finish()
    model.prepacking = PrepackingSummary(packed, left, shared, tied)  # type: ignore[assignment]
    return model


def unpack_model(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace the :class:`PackedLinear` layers of a model by :class:`zeropoint.Linear` ones again.

    Args:
        model: any module.
        inplace: change ``model`` itself and return it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model)  # copies of packed layers share what is packed
    replacer = Replacer(model)
    weights: dict[int, nn.Parameter] = {}  # by what they were packed to: ties are ties again
    for layer in [m for m in model.modules() if isinstance(m, PackedLinear)]:
        new = layer.unpack(weights.get(layer.packing))
        weights[layer.packing] = new._parameters["weight"]  # type: ignore[assignment]
        replacer.replace(layer, new)
    model = replacer.finish()
    model.__dict__.pop("prepacking", None)
    return model


def _why_not(linear: nn.Linear) -> str | None:
    if linear.weight.dtype in PACKED_DTYPES:
        return None
    dtype = str(linear.weight.dtype).removeprefix("torch.")
    return f"its weight is {dtype}, and packed weights are float32 or bfloat16"
