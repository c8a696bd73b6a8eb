"""Other computations in a model's layers for as long as a ``with`` lasts. Nothing is copied.

A layer computes something else while a function stands in its ``__dict__`` under the name
``forward``, whatever holds the layer and by however many names. Layers with such an attribute of
their own are never quantized, so that there is none to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..running import call, evaluating

Forward = Callable[[Tensor], Tensor]
"""What a Linear layer computes: ``forward(input)``."""


@contextmanager
def switched(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let each layer compute by its function; afterwards all compute as before, come what may."""
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer in forwards:
            layer.__dict__.pop("forward", None)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo, afterwards, every change of the model's attributes and submodules, come what may.

    Tensors are not copied: a change within one stays.
    """
    before = [(m, dict(m.__dict__), dict(m._modules)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            if dict(module._modules) != children or list(module._modules) != list(children):
                module._modules.clear()
                module._modules.update(children)


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """``eval`` mode, no gradients, nothing that goes past the layers: torch's fused attention, and
    code compiled for the layers as they were."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if hasattr(torch.compiler, "set_stance"):  # from torch 2.6 on
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, the same whenever it is asked for.

    The batch is handed over as a copy, since a model may write into its input, and random numbers
    begin at seed 0. The caller's random state is left as it was.
    """
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        return call(model, _copied(batch))
    finally:
        torch.random.set_rng_state(state)


def _copied(batch: Any) -> Any:
    def one(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {key: one(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [one(value) for value in batch]
    return one(batch)
