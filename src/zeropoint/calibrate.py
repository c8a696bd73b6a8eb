"""Run a model over sample data and show its layers' inputs to observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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


class _Enough(BaseException):
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
) -> dict[str, int]:
    """Run ``model`` over ``data`` and show each named layer's inputs to its observer.

    The model runs in eval mode without gradients. Training modes, hooks and torch's switch for
    fused attention (off while observing, since it goes past the layers) are restored whatever
    happens.

    Args:
        model: any module.
        layers: qualified name (``""`` is the model itself) → observer of that layer's first input.
        data: iterable of batches: a tensor is passed as ``model(x)``, a tuple or list as
            ``model(*x)``, a dict or other mapping as ``model(**x)``.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.
        enough: told each layer whose input was just shown; true ends the batch there, before the
            layer runs.

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
    modules = dict(model.named_modules(remove_duplicate=False))
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
                raise _Enough

        return hook

    training = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    handles = []
    batches = 0
    try:
        for name, observer in layers.items():
            hook = hook_for(name, observer)
            handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        bar = progress_bar(data, "calibrating", progress)
        with torch.no_grad(), bar:
            for batch in bar:
                with suppress(_Enough):
                    _run(model, batch)
                batches += 1
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    if not batches:
        raise ValueError("data must hold at least one batch, got none")
    return calls


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        raise TypeError(
            f"a batch must be a tensor, a tuple or list, or a mapping, got {type(batch).__name__}"
        )
