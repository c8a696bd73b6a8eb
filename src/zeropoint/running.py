"""Models as they are run: a batch given, an output picked, what they hold counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tensor import QTensor

_CHUNK = 1 << 20  # elements compared at a time: the float64 copies stay small


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: ``model(x)``, ``model(*x)`` or ``model(**x)``.

    Raises:
        TypeError: the batch is no tensor, tuple, list or mapping.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        return model(*batch)
    if isinstance(batch, Tensor | QTensor):
        return model(batch)
    raise TypeError(
        f"a batch must be a tensor, a tuple or list, or a mapping, got {type(batch).__name__}"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``eval`` mode; afterwards every module has its own mode again."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def real(x: Any) -> Any:
    """A :class:`QTensor` as floats, anything else as it is."""
    return x.dequantize() if isinstance(x, QTensor) else x


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a nested value, depth first, in the order of its parts."""
    if isinstance(value, QTensor):
        yield value.dequantize()
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors(v)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from tensors(getattr(value, f.name))


def pick_output(value: Any) -> Tensor:
    """The tensor of a model's output that is compared.

    It is the first floating-point tensor with at least one dimension, depth first, in the order of
    the tuple, mapping or dataclass; where there is none, the first 0-d one.

    Raises:
        TypeError: there is no floating-point tensor.
    """
    found = [t for t in tensors(value) if t.is_floating_point()]
    for t in found:
        if t.ndim:
            return t
    if not found:
        raise TypeError(
            f"the model returns {type(value).__name__}, in which there is no floating-point "
            "tensor; say which value to compare by output="
        )
    return found[0]


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's ``state_dict``, tensors that share memory counted once."""
    seen: set[tuple[Any, ...]] = set()
    total = 0
    for t in tensors(model.state_dict()):
        address = 0 if t.is_meta else t.data_ptr()
        key = (t.device, address, t.numel(), t.dtype)
        if not address or key not in seen:
            seen.add(key)
            total += t.numel() * t.element_size()
    return total


def cosines(y: Tensor, other: Tensor) -> Tensor:
    """Cosines between the vectors along the last dimension of two tensors of one shape.

    Two zero vectors have cosine 1, one has 0; vectors with NaN or Inf have NaN. Computed in
    float64.

    Returns:
        float64 ``(samples, vectors of a sample)`` on the CPU. A sample is an index of dimension 0;
        an output without vectors (one dimension, or a last one of size 1) is one sample with one
        vector.

    >>> cosines(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]]))
    tensor([[0.9600],
            [1.0000]], dtype=torch.float64)
    """
    if not y.numel():
        return torch.empty(0, 1, dtype=torch.float64)
    whole = y.ndim < 2 or y.shape[-1] == 1
    width = y.numel() if whole else y.shape[-1]
    step = max(1, _CHUNK // width)
    found = []
    for a, b in zip(
        y.reshape(-1, width).split(step),
        other.to(y.device).reshape(-1, width).split(step),
        strict=True,
    ):
        a, b = a.to(torch.float64), b.to(torch.float64)
        lengths = a.norm(dim=1) * b.norm(dim=1)
        both_zero = ((a == 0) & (b == 0)).all(1)
        cosine = torch.where(lengths > 0, (a * b).sum(1) / lengths, both_zero.to(a.dtype))
        finite = (a.isfinite() & b.isfinite()).all(1)
        found.append(torch.where(finite, cosine.clamp(-1, 1), torch.nan).cpu())
    return torch.cat(found).reshape(1 if whole else y.shape[0], -1)
