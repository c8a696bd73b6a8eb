"""Published methods that make few bits go further, one file each, and how they go together.

A method does one of five things, and this is their order:

1. scale the input channels (``smooth``, ``awq``): inputs by a factor, weights by its inverse;
2. rotate the input (``hadamard``);
3. choose the grids, that is scales and zero points (``clip``, ``hqq``; without one of them
   ``awq``'s own clipping, or the smallest and largest weight);
4. choose the integers on them (``gptq``; otherwise the nearest);
5. correct the bias (``bias-correction``).

What a method needs of the data are sums over it (:mod:`zeropoint.algorithms.inputs`), gathered
once: those of scaled and rotated inputs follow from those of the inputs as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..input_transform import walsh_hadamard
from ..spec import QuantSpec
from ..tensor import QTensor
from . import awq, bias_correction, clip, gptq, hadamard, hqq, smooth
from .grid import Grid, minmax_grid
from .inputs import InputStatistics

__all__ = [
    "METHODS",
    "InputStatistics",
    "QuantizedWeight",
    "check_methods",
    "needs_data",
    "needs_gram",
    "quantize_weight",
]

STEPS: tuple[tuple[str, ...], ...] = (
    ("smooth", "awq"),
    ("hadamard",),
    ("clip", "hqq"),
    ("gptq",),
    ("bias-correction",),
)
"""The methods in the order in which they apply; of those in one step a recipe may name one."""

METHODS = tuple(name for step in STEPS for name in step)
"""All names of methods."""

_NEED_DATA = ("smooth", "awq", "gptq", "bias-correction")
_NEED_GRAM = ("awq", "gptq")


def check_methods(methods: Iterable[str]) -> tuple[str, ...]:
    """The methods of a layer's recipe, as a tuple; a ``str`` is one method.

    Raises:
        TypeError: something else than names.
        ValueError: an unknown name, one that comes too early, or two of one step.

    >>> check_methods(["smooth", "gptq"])
    ('smooth', 'gptq')
    """
    if isinstance(methods, str):
        methods = (methods,)
    if not isinstance(methods, list | tuple) or not all(isinstance(m, str) for m in methods):
        raise TypeError(f"method must be a tuple of names, got {methods!r}")
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"method must be of {', '.join(METHODS)}; got {name!r}")
    at = [next(i for i, step in enumerate(STEPS) if name in step) for name in methods]
    for (a, i), (b, j) in zip(
        zip(methods, at, strict=True), list(zip(methods, at, strict=True))[1:], strict=False
    ):
        if a == b:
            raise ValueError(f"method must hold a name once, got {a!r} twice")
        if i == j:
            raise ValueError(f"method must hold one of {a!r} and {b!r}, which do the same step")
        if i > j:
            expected = tuple(sorted(methods, key=METHODS.index))
            raise ValueError(f"method must be in the order {expected}, got {tuple(methods)}")
    return tuple(methods)


def needs_data(methods: Iterable[str]) -> list[str]:
    """Those of the methods that need sample data.

    >>> needs_data(("hadamard", "gptq"))
    ['gptq']
    """
    return [name for name in methods if name in _NEED_DATA]


def needs_gram(methods: Iterable[str]) -> bool:
    """Whether one of the methods needs the products of channels."""
    return any(name in _NEED_GRAM for name in methods)


@dataclass(frozen=True)
class QuantizedWeight:
    """What the methods made of a layer.

    Args:
        weight: integers ``(out, in)``, for the changed input where there is a factor.
        bias: float32 ``(out,)``, or ``None`` where the layer has none.
        input_factor: float32 ``(in,)`` or ``None``, rotation: see
            :class:`zeropoint.QuantizedLinear`.
        notes: what was done, in words.
    """

    weight: QTensor
    bias: Tensor | None
    input_factor: Tensor | None = None
    rotation: int = 1
    notes: tuple[str, ...] = ()

    def reals(self) -> Tensor:
        """The weight that the layer stands for, as seen by its unchanged input: float32."""
        weight = self.weight.dequantize()
        if self.input_factor is None:
            return weight
        return walsh_hadamard(weight, self.rotation) * self.input_factor


def quantize_weight(
    weight: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
    methods: Iterable[str],
    inputs: InputStatistics | None = None,
) -> QuantizedWeight:
    """Quantize a layer's weight by the methods, in their order.

    Args:
        weight: ``(out, in)``, finite, not empty.
        bias: ``(out,)`` or ``None``.
        spec: per tensor, per channel along axis 0, or per group.
        methods: names of :data:`METHODS`.
        inputs: statistics of the layer's inputs, of at least one row; needed where
            :func:`needs_data` names a method, with ``gram`` where :func:`needs_gram` says so.

    Raises:
        TypeError, ValueError: methods that do not go together; ``inputs`` missing, empty or of
            another width; NaN or Inf in the weight.

    >>> from zeropoint import WEIGHT_INT4
    >>> w, x = torch.randn(4, 64), torch.randn(256, 64)
    >>> inputs = InputStatistics(64)
    >>> inputs.observe(x)
    >>> found = quantize_weight(w, None, WEIGHT_INT4, ("hadamard", "gptq"), inputs)
    >>> found.rotation, bool((x @ found.reals().T - x @ w.T).std() < 1)
    (64, True)
    """
    methods = check_methods(tuple(methods))
    original = weight.detach().to("cpu", torch.float32)
    if not bool(original.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or Inf")
    needing = needs_data(methods)
    if needing and (inputs is None or inputs.is_empty):
        raise ValueError(f"inputs must hold sample data, which {needing[0]!r} needs; got none")
    if inputs is not None and inputs.in_features != original.shape[1]:
        raise ValueError(
            f"inputs must be of {original.shape[1]} channels, got {inputs.in_features}"
        )
    work = _Work(original, spec, inputs, needs_gram(methods))
    for name in methods:
        work.apply(name)
    quantized = work.quantized(methods)
    if bias is not None:
        bias = bias.detach().to("cpu", torch.float32)
    result = QuantizedWeight(quantized, bias, work.factor, work.rotation, tuple(work.notes))
    if "bias-correction" in methods:
        assert inputs is not None
        if bias is None:
            work.notes.append("no bias to correct")
        else:
            bias = bias_correction.correct_bias(bias, original, result.reals(), inputs.mean)
    if methods:
        work.notes.append(work.gain(result))
    return QuantizedWeight(quantized, bias, work.factor, work.rotation, tuple(work.notes))


class _Work:
    """A weight on its way through the methods."""

    def __init__(
        self, weight: Tensor, spec: QuantSpec, inputs: InputStatistics | None, gram: bool
    ) -> None:
        self.original = self.weight = weight
        self.spec = spec
        self.inputs = inputs
        self.original_gram = self.gram = inputs.gram if inputs is not None and gram else None
        self.factor: Tensor | None = None
        self.rotation = 1
        self.grid: Grid | None = None
        self.notes: list[str] = []

    def apply(self, name: str) -> None:
        """One method of steps 1 to 3; those of later steps come with the integers."""
        if name == "smooth":
            assert self.inputs is not None
            self._change(smooth.smooth(self.weight, self.inputs.largest))
        elif name == "awq":
            assert self.inputs is not None
            assert self.gram is not None
            magnitudes = self.inputs.mean_magnitude
            factor, exponent = awq.awq(self.weight, self.spec, magnitudes, self.gram)
            self.notes.append(f"awq α = {exponent:.2f}")
            if exponent:
                self._change(factor)
        elif name == "hadamard":
            factor, size = hadamard.rotation(self.weight.shape[1])
            if size == 1:
                self.notes.append("not rotated, the number of inputs is odd")
            else:
                self._change(factor, size)
        elif name == "clip":
            self.grid = clip.clip(self.weight, self.spec)
        elif name == "hqq":
            self.grid = hqq.hqq(self.weight, self.spec)

    def _change(self, factor: Tensor, size: int = 1) -> None:
        self.weight = hadamard.rotate_weight(self.weight, factor, size)
        self.factor = factor if self.factor is None else self.factor * factor
        self.rotation = size
        if self.gram is not None:
            gram = factor[:, None] * self.gram * factor
            self.gram = walsh_hadamard(walsh_hadamard(gram, size).T, size)

    def quantized(self, methods: tuple[str, ...]) -> QTensor:
        """The integers: by GPTQ, or the nearest."""
        grid = self.grid
        if grid is None and "awq" in methods:
            assert self.gram is not None
            grid = awq.clip_to_inputs(self.weight, self.spec, self.gram)
        if "gptq" in methods:
            assert self.gram is not None
            return gptq.gptq(self.weight, self.spec, self.gram, grid)
        return (grid or minmax_grid(self.weight, self.spec)).qtensor(self.weight)

    def gain(self, result: QuantizedWeight) -> str:
        """How much smaller the error is than without any method."""
        nearest = minmax_grid(self.original, self.spec).nearest(self.original)
        errors = [reals - self.original for reals in (nearest, result.reals())]
        if self.original_gram is None:
            what, sizes = "weight", [float(e.square().sum(dtype=torch.float64)) for e in errors]
        else:
            what, sizes = "output", [awq.output_error(e, self.original_gram) for e in errors]
        if min(sizes) <= 0:
            return f"{what} error {sizes[1]:.3g}, {sizes[0]:.3g} without"
        return f"{what} error {10 * math.log10(sizes[1] / sizes[0]):+.1f} dB".replace("-", "−")
