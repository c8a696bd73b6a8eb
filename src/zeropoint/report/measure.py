"""``compare``: run a float model and its quantized twin over the same data and take the numbers.

Sums are accumulated while the models run; what is held at any time is one batch's outputs of the
quantized layers, never a data set's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..modules import QuantizedLinear
from ..running import call, evaluating, model_bytes, pick_output, real
from ..statistics import paired, scores
from ..tensor import QTensor
from .environment import environment
from .histograms import Inputs, weights
from .numbers import (
    Latency,
    LayerReport,
    Metric,
    Outputs,
    Report,
)
from .sums import Cosines, Sums
from .timing import Stopwatch, time_layers, time_models


def compare(
    float_model: nn.Module,
    quantized_model: nn.Module,
    data: Iterable[Any],
    metric: Callable[[nn.Module], Any] | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
    timing: Mapping[str, Any] | None = None,
    repeats: int = 30,
    time_budget: float = 20.0,
    progress: bool = True,
) -> Report:
    """Measure what quantization cost a model and what it brought.

    Both models run in ``eval`` mode without gradients; their training modes are restored.
    Quantized layers are matched with the float model's by name. A ``quantized_model`` without any
    (a bfloat16 copy, say) is compared as a whole only.

    Args:
        float_model: the model before.
        quantized_model: the model after; another object, with the same names.
        data: batches, run once through each model: a tensor is called ``model(x)``, a tuple or
            list ``model(*x)``, a mapping ``model(**x)``. Where batches are padded, the padding
            counts in the layers' numbers.
        metric: called once with each model. It returns a number, or the scores of the samples,
            1-d (tensor, array or sequence), whose mean is the metric: then the report tells its
            interval, and whether the change is significant (needs scipy).
        output: picks the tensor to compare from what a model returns. By default it is the first
            floating-point tensor with at least one dimension, depth first, in the order of the
            tuple, mapping or dataclass; where there is none, the first 0-d one.
        timing: batches to time, by name; by default the first one of ``data``. Layers are timed on
            the first.
        repeats: how often each model is timed on each batch, at most; 0 times nothing.
        time_budget: seconds after which no further repeat is started, warm-up included; at least
            one repeat of each model is taken.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.

    Returns:
        A :class:`Report`.

    Raises:
        TypeError: a model that is no ``nn.Module``; data that is one batch; outputs without a
            floating-point tensor; a metric that returns neither a number nor scores.
        ValueError: no data; the same object twice; a quantized layer whose name or size the float
            model does not have; outputs of different shapes.

    >>> from zeropoint import Linear, QuantizedLinear
    >>> layer = Linear(64, 8)
    >>> report = compare(layer, QuantizedLinear.from_linear(layer), [torch.randn(16, 64)])
    >>> report.layers[0].alone.sqnr_db > 30
    True
    """
    _check_arguments(float_model, quantized_model, repeats, time_budget)
    if isinstance(data, Tensor | QTensor | Mapping):
        raise TypeError(f"data must be an iterable of batches, got one {type(data).__name__}")
    pairs = _match(float_model, quantized_model)
    tracks = {name: _Track(*pair) for name, pair in pairs.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in (float_model, quantized_model):
            stack.enter_context(evaluating(model))
        first, batches, outputs = _run(float_model, quantized_model, data, output, tracks, progress)
        measured = None if metric is None else _measured(metric, float_model, quantized_model)
        latency: tuple[Latency, ...] = ()
        seconds: dict[str, tuple[float, float]] = {}
        if repeats:
            watch = Stopwatch(repeats, time_budget)
            named = dict(timing) if timing else {"first batch": first}
            models = (float_model, quantized_model)
            latency = time_models(*models, named, watch, progress)
            seconds = time_layers(*models, pairs, next(iter(named.values())), watch)
    summary = getattr(quantized_model, "quantization", None)
    recipes = getattr(summary, "quantized", {})
    return Report(
        model=type(float_model).__name__,
        batches=batches,
        outputs=outputs,
        metric=measured,
        bytes_before=model_bytes(float_model),
        bytes_after=model_bytes(quantized_model),
        latency=latency,
        layers=tuple(
            track.report(name, seconds.get(name), str(recipes.get(name, "")))
            for name, track in tracks.items()
        ),
        left=_left(quantized_model, getattr(summary, "left", {})),
        environment=environment(),
    )


class _Track:
    """One pair of layers, watched while the models run."""

    def __init__(self, linear: nn.Linear, quantized: QuantizedLinear) -> None:
        self.linear, self.quantized = linear, quantized
        self.alone, self.accumulated, self.inputs = Sums(), Sums(), Inputs(quantized)
        self.waiting: list[Tensor] = []  # float outputs of this batch, in call order

    def see_float(self, _m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        # forward, not the call, so that hooks of the caller's do not run twice
        self.alone.add(y, real(self.quantized.forward(*args, **kwargs)))
        self.inputs.add(args[0] if args else kwargs["input"])
        self.waiting.append(y.clone())  # what follows may change it in place, as ReLU can

    def see_quantized(self, _m: Any, _args: Any, y: Any) -> None:
        y = real(y)
        expected = self.waiting.pop(0) if self.waiting else None
        if expected is None or expected.shape != y.shape:
            # data-dependent routing: another expert got the row
            self.accumulated.skipped += 1
        else:
            self.accumulated.add(expected, y)

    def end_batch(self) -> None:
        self.accumulated.skipped += len(self.waiting)
        self.waiting.clear()

    def report(self, name: str, seconds: tuple[float, float] | None, recipe: str) -> LayerReport:
        linear, quantized = self.linear, self.quantized
        weight = Sums()
        weight.add(linear.weight.detach(), quantized.dequantize().weight.detach())
        parts = (quantized.weight, quantized.scale, quantized.zero_point)
        before, after = seconds or (None, None)
        histogram, integers = weights(linear, quantized)
        return LayerReport(
            name=name,
            mode=quantized.mode,
            in_features=quantized.in_features,
            out_features=quantized.out_features,
            weight=weight.result(),
            alone=self.alone.result(),
            accumulated=self.accumulated.result(),
            bytes_before=linear.weight.numel() * linear.weight.element_size(),
            bytes_after=sum(t.numel() * t.element_size() for t in parts),
            seconds_before=before,
            seconds_after=after,
            histogram=histogram,
            integers=integers,
            inputs=self.inputs.histogram(),
            input_integers=self.inputs.integers(),
            recipe=recipe,
        )


def _run(
    float_model: nn.Module,
    quantized_model: nn.Module,
    data: Iterable[Any],
    output: Callable[[Any], Tensor] | None,
    tracks: Mapping[str, _Track],
    progress: bool,
) -> tuple[Any, int, Outputs]:
    pick = output or pick_output
    sums, cosines = Sums(), Cosines()
    first, batches = None, 0
    bar = tqdm(data, "compare", delay=2, unit="batch", disable=None if progress else True)
    with ExitStack() as stack:
        for track in tracks.values():
            hooks = (
                track.linear.register_forward_hook(track.see_float, with_kwargs=True),
                track.quantized.register_forward_hook(track.see_quantized),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        for batch in bar:
            y, other = (real(pick(call(m, batch))) for m in (float_model, quantized_model))
            if y.shape != other.shape:
                raise ValueError(
                    f"the models' outputs must have one shape, got {tuple(y.shape)} from "
                    f"float_model and {tuple(other.shape)} from quantized_model in batch {batches}"
                )
            sums.add(y, other)
            cosines.add(y, other)
            for track in tracks.values():
                track.end_batch()
            first = batch if not batches else first
            batches += 1
    if not batches:
        raise ValueError("data must hold at least one batch, got none")
    return (
        first,
        batches,
        Outputs(sums.result(), cosines.mean, cosines.lowest, cosines.count, cosines.estimate()),
    )


def _check_arguments(
    float_model: Any, quantized_model: Any, repeats: Any, time_budget: Any
) -> None:
    for name, model in (("float_model", float_model), ("quantized_model", quantized_model)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    if float_model is quantized_model:
        raise ValueError(
            "float_model and quantized_model are the same object; keep the float model by "
            "quantizing with inplace=False"
        )
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 0:
        raise ValueError(f"repeats must be an int of at least 0, got {repeats!r}")
    if not time_budget >= 0:
        raise ValueError(f"time_budget must be at least 0 seconds, got {time_budget!r}")


def _match(
    float_model: nn.Module, quantized_model: nn.Module
) -> dict[str, tuple[nn.Linear, QuantizedLinear]]:
    floats = dict(float_model.named_modules(remove_duplicate=False))
    pairs = {}
    for name, layer in quantized_model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        twin = floats.get(name)
        if not isinstance(twin, nn.Linear):
            got = "nothing" if twin is None else f"a {type(twin).__name__}"
            raise ValueError(
                f"float_model must have a Linear named {name!r}, as quantized_model has a "
                f"QuantizedLinear, got {got}"
            )
        shape = (layer.out_features, layer.in_features)
        if tuple(twin.weight.shape) != shape:
            raise ValueError(
                f"layer {name!r} has a weight of shape {shape} in quantized_model but "
                f"{tuple(twin.weight.shape)} in float_model"
            )
        pairs[name] = (twin, layer)
    return pairs


def _measured(metric: Callable[[nn.Module], Any], *models: nn.Module) -> Metric:
    (before, first), (after, second) = (
        scores(f"metric({name})", metric(model))
        for name, model in zip(("float_model", "quantized_model"), models, strict=True)
    )
    comparison = None
    if first is not None and second is not None:
        if len(first) != len(second):
            raise ValueError(
                f"metric must score the same samples of both models, got {len(first)} scores of "
                f"float_model and {len(second)} of quantized_model"
            )
        with suppress(ImportError):  # without scipy there are no intervals, and the table says so
            comparison = paired(first, second)
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric("metric" if name == "<lambda>" else name, before, after, comparison)


def _left(model: nn.Module, reasons: Mapping[str, str]) -> dict[str, str]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {n: str(reasons.get(n, "")) for n in dict.fromkeys([*names, *reasons])}
