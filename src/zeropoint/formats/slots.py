"""Where a model keeps the tensors of its ``state_dict``, and which of them are one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..packed_linear import PackedLinear
from .container import CheckpointError


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer: the module that owns it, and its name there."""

    owner: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        parameter = self.owner._parameters.get(self.key)
        tensor = self.owner._buffers[self.key] if parameter is None else parameter
        assert tensor is not None
        return tensor


def slots_of(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Slot]:
    """Name → slot of all that ``model.state_dict()`` holds, in its order.

    Raises:
        CheckpointError: the ``state_dict`` holds something else as well, or lacks some.
    """
    slots: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        keys = [k for k, p in module._parameters.items() if p is not None]
        transient = module._non_persistent_buffers_set
        keys += [k for k, b in module._buffers.items() if b is not None and k not in transient]
        for key in keys:
            slots[f"{prefix}.{key}" if prefix else key] = Slot(module, key)
    state = model.state_dict(keep_vars=True)
    for name in state.keys() ^ slots.keys():
        layer = name.rpartition(".")[0]
        if isinstance(dict(model.named_modules()).get(layer), PackedLinear):
            raise CheckpointError(
                path, "the layer is packed; use zeropoint.unpack_model first", layer, name
            )
        raise CheckpointError(
            path,
            "the model's state_dict has an entry of its own making (extra state or a hook), which "
            "is no parameter or buffer"
            if name in state
            else "the model's state_dict leaves out this parameter or buffer",
            tensor=name,
        )
    return slots


def why_not_plain(tensor: Tensor) -> str | None:
    """Why a tensor is not simply a piece of memory, or ``None`` if it is."""
    if is_lazy(tensor):
        return "not initialized yet (a lazy module); run the model once"
    if type(tensor.detach()) is not Tensor:
        return f"a {type(tensor).__name__}; only plain tensors can be saved and loaded"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}; only strided tensors can be saved and loaded"
    return None


def same_memory(tensor: Tensor) -> Any:
    """A key that two tensors have in common if they are the same elements of the same memory."""
    if why_not_plain(tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)  # no memory to tell by
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
    )
