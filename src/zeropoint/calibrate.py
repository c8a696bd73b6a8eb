"""Run a model over sample data and show its layers' inputs to observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .observers import (
    DEFAULT_OBSERVER,
    OBSERVERS,
    EntropyObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)
from .running import call, evaluating

__all__ = [
    "DEFAULT_OBSERVER",
    "OBSERVERS",
    "EntropyObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "calibrate",
    "progress_bar",
]


BAR_DELAY = 2.0
"""Seconds after which a progress bar appears."""


def progress_bar(items: Iterable[Any], what: str, wanted: bool) -> tqdm:
    """``items`` with a progress bar if ``wanted``, slow, and stderr is a terminal."""
    return tqdm(items, what, delay=BAR_DELAY, disable=None if wanted else True)


class Watching(Protocol):
    """What is shown a layer's inputs: an :class:`Observer`, say."""

    def observe(self, x: Any) -> None:
        """Take in one call's input. ``ValueError`` and ``TypeError`` get the layer's name."""


@dataclass(frozen=True)
class Call:
    """A batch with all its arguments: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Enough(BaseException):
    """Ends a batch early. No error, so that models that catch errors let it pass."""


def check_batches(data: Any) -> None:
    """Refuse one batch where many are expected.

    Raises:
        TypeError: ``data`` is no iterable of batches.
    """
    if isinstance(data, Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            "data must be an iterable of batches (tensors, tuples or dicts), got "
            f"{type(data).__name__}; put a single batch in a list: [batch]"
        )


def calibrate(
    model: nn.Module,
    layers: Mapping[str, Watching],
    data: Iterable[Any],
    progress: bool = True,
    enough: Callable[[str], bool] = lambda name: False,
    own_name: str = "",
) -> dict[str, int]:
    """Run ``model`` over ``data`` and show each named layer's inputs to its observer.

    The model runs in eval mode without gradients. Training modes, hooks and torch's switch for
    fused attention (off while observing, since it goes past the layers) are restored whatever
    happens.

    Args:
        model: any module.
        layers: qualified name (``""`` is the model itself) → observer of that layer's first input.
        data: iterable of batches: a tensor is passed as ``model(x)``, a tuple or list as
            ``model(*x)``, a dict or other mapping as ``model(**x)``, a :class:`Call` as it says.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.
        enough: told each layer whose input was just shown; true ends the batch there, before the
            layer runs. Any hook may end it by raising :class:`Enough`.
        own_name: the model's, where it is part of another by which ``layers`` are named.

    Returns:
        How often each layer was called.

    Raises:
        TypeError: ``data`` is one batch instead of many, or holds something else than batches.
        ValueError: ``data`` is empty, ``model`` has no such layer, or NaN or Inf in a layer's
            input.

    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1))
    >>> observer = MinMaxObserver()
    >>> calibrate(model, {"1": observer}, [torch.tensor([-3.0, 2.0])])
    {'1': 1}
    >>> observer.lo, observer.hi
    (0.0, 2.0)
    """
    check_batches(data)
    modules = {
        f"{own_name}.{name}".strip("."): module
        for name, module in model.named_modules(remove_duplicate=False)
    }
    for name in layers:
        if name not in modules:
            raise ValueError(f"model has no layer {name!r}")
    calls = dict.fromkeys(layers, 0)

    def hook_for(name: str, observer: Watching) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            calls[name] += 1
            try:
                observer.observe(x)
            except (TypeError, ValueError) as error:
                message = str(error).replace("x must be", "its input must be", 1)
                raise type(error)(f"layer {name!r}: {message}") from error
            if enough(name):
                raise Enough

        return hook

    handles = []
    batches = 0
    try:
        for name, observer in layers.items():
            hook = hook_for(name, observer)
            handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        bar = progress_bar(data, "calibrating", progress)
        with inferring(model), bar:
            for batch in bar:
                with suppress(Enough):
                    run_batch(model, batch)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("data must hold at least one batch, got none")
    return calls


@contextmanager
def inferring(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused attention, which goes past the layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch.

    Raises:
        TypeError: something else than a tensor, tuple, list, mapping or :class:`Call`.
    """
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    return call(model, batch)
