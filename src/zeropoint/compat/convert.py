"""``torch.ao.quantization.quantize_dynamic``, for the Linear layers of a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import dynamic

_RECURRENT = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Any = None,
    dtype: torch.dtype = torch.qint8,
    mapping: dict[Any, Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace the Linear layers of a model by ones with integer weights.

    The layers are :class:`zeropoint.compat.quantized.dynamic.Linear`: the same integers and the
    same arithmetic as torch's. :func:`zeropoint.quantize` is the way to better results: a scale for
    each output channel and each row of activations instead of one for the whole tensor.

    Args:
        model: any module. Children are replaced, at any depth; ``model`` itself is not.
        qconfig_spec: which layers: ``None`` for all; a set of types and qualified names; or a
            dictionary from type or name to a qconfig of torch's (its observer chooses the weight's
            scale) or ``None``. What a name or type says holds for all that is inside.
        dtype: ``torch.qint8`` only.
        mapping: type of a float layer → class with ``from_float``; by default ``nn.Linear`` only.
        inplace: change ``model`` itself.

    Returns:
        The model, in evaluation mode.

    Raises:
        TypeError: ``model`` is no module, or ``qconfig_spec`` something other than the above.
        ValueError: another ``dtype``.

    Warns:
        UserWarning: torch would have quantized a layer that is not Linear; here it stays float.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> type(quantize_dynamic(model, {nn.Linear})[2]).__module__
    'zeropoint.compat.dynamic'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype != torch.qint8:
        raise ValueError(f"dtype must be torch.qint8, got {dtype}")
    spec: dict[Any, Any]
    if qconfig_spec is None:
        spec = dict.fromkeys((nn.Linear, *_RECURRENT), _DEFAULT)
    elif isinstance(qconfig_spec, set | frozenset):
        spec = dict.fromkeys(qconfig_spec, _DEFAULT)
    elif isinstance(qconfig_spec, dict):
        spec = qconfig_spec
    else:
        raise TypeError(
            f"qconfig_spec must be a set, a dictionary or None, got {type(qconfig_spec).__name__}"
        )
    mapping = _mapping() if mapping is None else mapping
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    made: dict[int, nn.Module] = {}
    left: list[str] = []
    for name, parent, key, child, qconfig in list(_children(model, spec)):
        if qconfig is None:
            continue
        if type(child) not in mapping:
            if isinstance(child, _RECURRENT):
                left.append(f"{name} ({type(child).__name__})")
            continue
        if id(child) not in made:
            made[id(child)] = _swap(child, mapping[type(child)], qconfig)
        parent._modules[key] = made[id(child)]
    if left:
        warnings.warn(
            f"torch would have quantized {', '.join(left)}; zeropoint quantizes Linear layers only",
            UserWarning,
            stacklevel=2,
        )
    return model


_DEFAULT = object()
"""torch's default_dynamic_qconfig: weights int8, symmetric, per tensor."""


def _mapping() -> dict[Any, Any]:
    linear = nn.modules.linear
    return dict.fromkeys((nn.Linear, linear.NonDynamicallyQuantizableLinear), dynamic.Linear)


def _children(
    module: nn.Module, spec: dict[Any, Any], prefix: str = "", outer: Any = None
) -> Iterator[tuple[str, nn.Module, str, nn.Module, Any]]:
    """Each child at any depth: its name, its place, and the qconfig that holds for it. As torch's
    ``propagate_qconfig_`` has it, a name beats a type, both beat what holds outside, and a
    ``qconfig`` that the module has already beats all."""
    here = spec.get(prefix, spec.get(type(module), outer))
    here = getattr(module, "qconfig", here)
    for key, child in list(module._modules.items()):
        if child is None:
            continue
        name = f"{prefix}.{key}" if prefix else key
        qconfig = getattr(child, "qconfig", spec.get(name, spec.get(type(child), here)))
        yield name, module, key, child, qconfig
        yield from _children(child, spec, name, here)


def _swap(old: nn.Module, kind: Any, qconfig: Any) -> nn.Module:
    had = old.__dict__.get("qconfig", ...)
    if qconfig is not _DEFAULT:
        old.qconfig = qconfig  # where from_float looks for it
    try:
        new = kind.from_float(old)
    finally:
        if had is ...:
            old.__dict__.pop("qconfig", None)
        else:
            old.qconfig = had
    for hook in old._forward_pre_hooks.values():
        new.register_forward_pre_hook(hook)
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
    return new.train(old.training)
