"""Time two models in turn: what slows the machine down for a while slows both."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..running import call
from .numbers import Latency, Timing

_WARM_UP = 2  # the first call packs weights, the second finds caches and threads warm
_LAYER_REPEATS = 9


class Stopwatch:
    """How often to repeat: at most ``repeats`` times, none begun once the budget is spent."""

    def __init__(self, repeats: int, budget: float) -> None:
        self.repeats = repeats
        self.deadline = time.perf_counter() + budget

    def until(self, share: float) -> float:
        """When ``share`` of the time left is over."""
        now = time.perf_counter()
        return now + max(0.0, self.deadline - now) * share


def _rounds(count: int, end: float) -> Iterator[tuple[int, ...]]:
    """At most ``count`` times which model goes first, (0, 1) or (1, 0); once at least."""
    for i in range(count):
        if i and time.perf_counter() >= end:
            return
        yield (1, 0) if i % 2 else (0, 1)


def time_models(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Mapping[str, Any],
    watch: Stopwatch,
    progress: bool,
) -> tuple[Latency, ...]:
    """Latency of each batch; the models take turns, and turns in going first."""
    models, result = (float_model, quantized_model), []
    bar = tqdm(batches.items(), "time", delay=2, unit="batch", disable=None if progress else True)
    for done, (name, batch) in enumerate(bar):
        samples: tuple[list[float], list[float]] = ([], [])
        end = watch.until(1 / (len(batches) + 1 - done))  # the layers count as one more batch
        with _quiet():
            for _ in range(_WARM_UP):
                for model in models:
                    call(model, batch)
            for order in _rounds(watch.repeats, end):
                for which in order:
                    samples[which].append(_seconds(models[which], batch))
        result.append(Latency(name, describe(batch), _timing(samples[0]), _timing(samples[1])))
    return tuple(result)


def time_layers(
    float_model: nn.Module,
    quantized_model: nn.Module,
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    batch: Any,
    watch: Stopwatch,
) -> dict[str, tuple[float, float]]:
    """Median seconds each layer takes within its model, caches as the model leaves them."""
    models = (float_model, quantized_model)
    samples: tuple[dict[str, list[float]], ...] = (defaultdict(list), defaultdict(list))
    with ExitStack() as stack:
        clocks = [_Clock({n: pair[i] for n, pair in pairs.items()}, stack) for i in (0, 1)]
        stack.enter_context(_quiet())
        for order in _rounds(min(watch.repeats, _LAYER_REPEATS), watch.until(1)):
            for which in order:
                clocks[which].spent.clear()
                call(models[which], batch)
                for name, seconds in clocks[which].spent.items():
                    samples[which][name].append(seconds)
    return {
        name: (float(np.median(samples[0][name])), float(np.median(samples[1][name])))
        for name in pairs
        if name in samples[0] and name in samples[1]
    }


def describe(batch: Any) -> str:
    """The shapes and dtypes of a batch: ``input_ids 1×32 int64, attention_mask 1×32 int64``."""
    if isinstance(batch, Mapping):
        items = [(f"{k} ", v) for k, v in batch.items()]
    else:
        items = [("", v) for v in (batch if isinstance(batch, list | tuple) else [batch])]
    parts = []
    for name, v in items:
        if isinstance(v, Tensor):
            shape = "×".join(map(str, v.shape)) or "scalar"
            parts.append(f"{name}{shape} {str(v.dtype).removeprefix('torch.')}")
        else:
            parts.append(f"{name}{type(v).__name__}")
    return ", ".join(parts)


class _Clock:
    """Adds up the time spent in each layer by hooks around its forward."""

    def __init__(self, layers: Mapping[str, nn.Module], stack: ExitStack) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._began = 0.0  # one is enough: these layers do not call one another
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(self._start).remove)
            stack.callback(layer.register_forward_hook(partial(self._stop, name)).remove)

    def _start(self, _layer: Any, _args: Any) -> None:
        _synchronize()
        self._began = time.perf_counter()

    def _stop(self, name: str, _layer: Any, _args: Any, _y: Any) -> None:
        _synchronize()
        self.spent[name] += time.perf_counter() - self._began


def _seconds(model: nn.Module, batch: Any) -> float:
    _synchronize()
    began = time.perf_counter()
    call(model, batch)
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _timing(samples: list[float]) -> Timing:
    q1, median, q3 = (float(x) for x in np.percentile(samples, (25, 50, 75)))
    return Timing(median, q1, q3, len(samples))


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection while the clock runs, as timeit does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
