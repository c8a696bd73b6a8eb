"""Proof that what was rescued is what torch has: the same integers, and the same outputs.

Integers are compared with those that torch's own reader finds in the file, where it can be asked
without running what the file says. Outputs are compared with torch's operators on random inputs, as
long as torch has them; where it has not, the report says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..compat import ops
from ..tensor import QTensor
from .torch_modules import living_state
from .torch_state import Qparams, TorchLinear, TorchState

ROWS = 16
"""Rows of random input for each layer."""

_ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


@dataclass(frozen=True)
class Outputs:
    """A layer's outputs beside those of torch's operator, on the same random input.

    Attributes:
        compared: how many.
        differ: how many differ by more than half a step.
        largest: the largest difference, in steps. A step is one of the output's integers for a
            layer with an output scale; elsewhere the smallest change that the exact sum of integers
            can make, ``input scale · weight scale``.
        engine: of torch, that computed.
        input_bits: 8, or 7 where torch's kernels could saturate.
    """

    compared: int
    differ: int
    largest: float
    engine: str
    input_bits: int

    @property
    def ok(self) -> bool:
        """Within one step, as docs/agreement_with_torch.md says why."""
        return self.largest <= 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def torchs_reading(path: str | os.PathLike[str], key: Any) -> TorchState | None:
    """What torch's own restricted reader finds in a file; ``None`` where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
            return living_state(state if key is None else state[key])
    except Exception:  # whatever torch says, it has not read it
        return None


def same_integers(ours: TorchLinear, theirs: TorchLinear | None) -> bool | None:
    """Whether integers, zero points, float32 scales and bias are equal; ``None``: not compared."""
    if theirs is None:
        return None
    a, b = ours.weight, theirs.weight
    pairs = [
        (a.int_repr(), b.int_repr()),
        (a.zero_point, b.zero_point),
        (a.scale, b.scale),
        *([(ours.bias, theirs.bias)] if ours.bias is not None and theirs.bias is not None else []),
    ]
    return (
        (ours.bias is None) == (theirs.bias is None)
        and a.axis == b.axis
        and ours.output == theirs.output
        and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    )


def compare_outputs(layer: TorchLinear, input: Qparams | None, seed: int = 0) -> Outputs | None:
    """A layer's outputs beside torch's, on random input; ``None`` where torch cannot compute them.

    Args:
        layer: of a file.
        input: scale and zero point of its input; a static layer's is made up where ``None``.
        seed: of the random numbers.
    """
    with _engine() as engine:
        if engine is None or not layer.weight.numel():
            return None
        exact = torch.backends.cpu.get_cpu_capability() == "AVX512" or engine == "qnnpack"
        bits = 8 if exact else 7
        generator = torch.Generator().manual_seed(seed)
        shape = (ROWS, layer.weight.shape[1])
        try:
            packed = torch.ops.quantized.linear_prepack(_torchs(layer.weight), layer.bias)
            if layer.output is None:
                return _dynamic(layer, packed, torch.randn(shape, generator=generator), engine)
            x = QTensor(
                torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8),
                *(input or (2.0**-5, 1 << (bits - 1))),
            )
            return _static(layer, packed, x, engine, bits)
        except (RuntimeError, AttributeError):  # an engine without such weights, or no operator
            return None


def _static(layer: TorchLinear, packed: Any, x: QTensor, engine: str, bits: int) -> Outputs:
    assert layer.output is not None
    activation = "relu" if layer.relu else None
    operator = getattr(torch.ops.quantized, "linear_relu" if layer.relu else "linear")
    theirs = operator(_torchs(x), packed, *layer.output).int_repr()
    ours = functional.linear(x, layer.weight, layer.bias, *layer.output, activation=activation)
    steps = (ours.int_repr().int() - theirs.int()).abs()  # type: ignore[operator]
    return _outputs(steps.float(), engine, bits)


def _dynamic(layer: TorchLinear, packed: Any, x: Tensor, engine: str) -> Outputs:
    # 7 bits always: the layers ask for them, and torch's kernels cannot saturate then.
    reduce_range = engine != "qnnpack"  # which ignores it
    theirs = torch.ops.quantized.linear_dynamic(x, packed, reduce_range)
    ours = ops.dynamic(x, layer.weight, layer.bias, reduce_range, None)
    scale, _ = ops.choose_qparams(x, reduce_range)
    steps = (ours - theirs).abs() / (scale * layer.weight.scale)
    return _outputs(steps, engine, 7 if reduce_range else 8)


def _outputs(steps: Tensor, engine: str, bits: int) -> Outputs:
    largest = float(steps.max()) if bool(steps.isfinite().all()) else float("inf")
    return Outputs(steps.numel(), int((steps > 0.5).sum()), largest, engine, bits)


def _torchs(q: QTensor) -> Tensor:
    if q.axis is None:
        return torch._make_per_tensor_quantized_tensor(q.int_repr(), q.q_scale(), q.q_zero_point())
    return torch._make_per_channel_quantized_tensor(
        q.int_repr().contiguous(), q.scale.double(), q.zero_point.long(), q.axis
    )


@contextmanager
def _engine() -> Iterator[str | None]:
    """torch's engine for quantized operators, and its warnings silenced; ``None``: it has none."""
    backend = getattr(torch.backends, "quantized", None)
    before = getattr(backend, "engine", None)
    supported = getattr(backend, "supported_engines", [])
    engine = next((e for e in _ENGINES if e in supported), None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if engine is not None:
                backend.engine = engine  # type: ignore[union-attr]
            yield engine
        finally:
            if engine is not None:
                backend.engine = before  # type: ignore[union-attr]
