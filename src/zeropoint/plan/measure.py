"""Learn with how many rows a model's layers are called, and time them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..affine import choose_qparams
from ..calibrate import calibrate, progress_bar
from ..interleave import interleave
from ..modules import QuantizedLinear
from ..packed_linear import PACKED_DTYPES, PackedLinear
from ..replace import tie_weights
from ..spec import ACTIVATION_UINT8
from ..walk import Selection
from .numbers import Plan, ShapePlan, Time
from .rule import FORMS, MODES, choose

WORKING_SET = 2**26
"""Weights of a shape that are held in each form at most while it is timed."""
COPIES = 256
"""Layers of a shape that are held in each form at most."""


class _Rows:
    """An observer that notes how many rows each call brings."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()

    def observe(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.ndim:
            raise TypeError(f"x must be a tensor of at least one dimension, got {x!r:.80}")
        if rows := x.shape[:-1].numel():
            self.calls[rows] += 1


_Key = tuple[int, int, bool, torch.dtype, tuple[tuple[int, int], ...]]


def plan(
    model: nn.Module,
    batch: Any,
    *,
    threads: int | None = None,
    allow: Iterable[str] = FORMS[:-1],
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seconds: float = 10.0,
    progress: bool = True,
) -> Plan:
    """Time each distinct Linear layer of a model in every form on this machine; say which to use.

    The model runs once over ``batch`` to learn with how many rows each layer is called. Then one
    shape after the other is timed, with weights drawn at random, all forms in turn. Each form goes
    through as many layers as have about as many weights as the model's Linear layers together, so
    that weights come from where they come from in the model: a cache, or memory.

    ``quantize(model, plan=plan)`` follows the plan as far as it asks for integers, and
    ``prepack_model(model, include=plan.names("packed"))`` packs the layers that stay float.

    Args:
        model: any module.
        batch: one batch: a tensor (``model(x)``), a tuple or list (``model(*x)``) or a mapping
            (``model(**x)``). Its size matters: what is best for one row is not for a hundred.
        threads: to compute with; by default torch's present number, which is restored afterwards.
        allow: forms that may be chosen. By default all but ``"int8-static"``, which needs
            calibration data and loses more; it is timed for comparison all the same.
        include, exclude: glob patterns of the layers to plan for, as in :func:`quantize`.
        seconds: to spend on timing, about, shared by the shapes; more where a shape is so large
            that five rounds of it take longer.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.

    Raises:
        TypeError: ``model`` is not a module, ``batch`` no batch.
        ValueError: a pattern that matches no layer, an unknown form, a number that is not positive.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> found = plan(model, torch.randn(4, 64), seconds=0.01)
    >>> found.shapes[0].calls, found.shapes[0].layers
    (((4, 1),), ('0', '2'))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    allow = tuple(allow)
    if unknown := [form for form in allow if form not in FORMS]:
        raise ValueError(f"allow must hold forms of {', '.join(FORMS)}; got {unknown[0]!r}")
    for name, number in (("threads", threads), ("seconds", seconds)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    selection = Selection(model, include, exclude, lambda names: True)
    rows = {name: _Rows() for name in selection.chosen}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        calibrate(model, rows, [batch], False)  # type: ignore[arg-type]
        for name, seen in rows.items():
            if not seen.calls:
                selection.leave(name, "the batch never calls it")
        groups: dict[_Key, list[str]] = {}
        for name in selection.chosen:
            linear, calls = selection.layers[name], tuple(sorted(rows[name].calls.items()))
            weight = linear.weight
            key = (weight.shape[1], weight.shape[0], linear.bias is not None, weight.dtype, calls)
            groups.setdefault(key, []).append(name)
        weights = {id(w): w.numel() for w in (selection.layers[n].weight for n in selection.chosen)}
        total, share = sum(weights.values()), seconds / max(1, sum(len(k[4]) for k in groups))
        shapes = []
        for key, names in progress_bar(groups.items(), "timing", progress):
            times = _time(key, total, share)
            choice, reason = choose({f: t.median for f, t in times.items()}, allow)
            k, n, bias, dtype, calls = key
            described = str(dtype).removeprefix("torch.")
            shapes.append(
                ShapePlan(k, n, bias, described, calls, tuple(names), times, choice, reason)
            )
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    notes: tuple[str, ...] = ()
    if kernels.active_isa() == kernels.REFERENCE:
        why = kernels.core_error() or "it was asked for"
        notes = (f"Only float was timed: the reference computes, slow by design ({why}).",)
    left = selection.left_in_order()
    return Plan(tuple(shapes), left, used, kernels.active_isa(), allow, notes)


def _time(key: _Key, total: int, seconds: float) -> dict[str, Time]:
    """Each form's time of all calls of one layer."""
    k, n, _, dtype, calls = key
    copies = math.ceil(min(total, WORKING_SET) / (k * n))
    layers = _layers(key, max(1, min(copies, COPIES)))
    sums: dict[str, list[float]] = {form: [0.0, 0.0, 0.0] for form in layers}
    for rows, count in calls:
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            for layer in itertools.chain(*layers.values()):
                layer(x)  # packs its weight
            for form, times in interleave(
                {form: _cycle(many, x) for form, many in layers.items()}, seconds
            ).items():
                quartiles = statistics.quantiles(times, n=4, method="inclusive")
                for i, value in enumerate(quartiles):
                    sums[form][i] += count * value
    return {f: Time(median, low, high) for f, (low, median, high) in sums.items()}


def _cycle(layers: list[nn.Module], x: Tensor) -> Callable[[], Any]:
    following = itertools.cycle(layers).__next__
    return lambda: following()(x)


def _layers(key: _Key, copies: int) -> dict[str, list[nn.Module]]:
    """Form → layers with the same random weights, each with memory of its own."""
    k, n, bias, dtype, _ = key
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    b = torch.randn(n, generator=generator).to(dtype) if bias else None
    layers: dict[str, list[nn.Module]] = {"float": []}
    for _ in range(copies):
        linear = nn.utils.skip_init(nn.Linear, k, n, bias, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        linear.bias = None if b is None else nn.Parameter(b.clone(), requires_grad=False)
        layers["float"].append(linear)
    if kernels.active_isa() == kernels.REFERENCE:
        return layers
    if dtype in PACKED_DTYPES:
        layers["packed"] = [PackedLinear.from_linear(x) for x in layers["float"]]  # type: ignore[arg-type]
    qparams = choose_qparams(torch.tensor(-4.0), torch.tensor(4.0), ACTIVATION_UINT8)
    first = QuantizedLinear.from_linear(layers["float"][0])  # type: ignore[arg-type]
    for form, mode in MODES.items():
        same = []
        for i in range(copies):
            layer = QuantizedLinear(k, n, bias, mode)
            if layer.bias is not None:
                layer.bias.copy_(first.bias)  # type: ignore[arg-type]
            if mode == "static":
                layer.input_scale, layer.input_zero_point = qparams
            if form == "int8-weight-only":  # the first of MODES: its copies own the integers
                for name in ("weight", "scale", "zero_point"):
                    getattr(layer, name).copy_(getattr(first, name))
            else:
                tie_weights(layer, layers["int8-weight-only"][i])  # type: ignore[arg-type]
            same.append(layer)
        layers[form] = same  # type: ignore[assignment]
    return layers
