"""torchao in eager mode: weights of every Linear layer become its tensors.

Its formats for 4 bits on CPUs are prototypes of torchao's; the group is 32, as ours. The
weight-only one takes bfloat16, the whole model with it: with float32 it is thirty times slower.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from method_subjects import Subject
from zeropoint.doctor import version

from .common import Contender, ModelPeer

STABLE, PROTOTYPE = "torchao.quantization", "torchao.prototype.quantization.int4"


def missing() -> str | None:
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def _prepare(
    subject: Subject, _: Path, module: str, config: str, dtype: torch.dtype, **options: Any
) -> Contender:
    from torchao.quantization import quantize_

    model = copy.deepcopy(subject.model).to(dtype)
    # A subclass of tensors cannot be made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        quantize_(model, getattr(importlib.import_module(module), config)(**options))
    return Contender(
        stored_bytes(model), lambda: subject.scores(model), lambda threads: subject.calls(model)
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the plain tensors in a model's parameters and buffers, each counted once."""
    held = itertools.chain(model.parameters(), model.buffers())
    return sum(part.numel() * part.element_size() for tensor in held for part in _plain(tensor))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    names = getattr(tensor, "__tensor_flatten__", None)
    if names is None:
        yield tensor
        return
    for name in names()[0]:
        yield from _plain(getattr(tensor, name))


PLAIN, GROUPED = {"dtype": torch.float32}, {"dtype": torch.float32, "group_size": 32}
FORMATS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("int8 dynamic", STABLE, "Int8DynamicActivationInt8WeightConfig", PLAIN),
    ("int8 weight-only", STABLE, "Int8WeightOnlyConfig", PLAIN),
    ("int4 dynamic", PROTOTYPE, "Int8DynamicActivationInt4WeightConfig", GROUPED),
    (
        "int4 weight-only, bfloat16",
        PROTOTYPE,
        "PrototypeInt4WeightOnlyConfig",
        GROUPED | {"dtype": torch.bfloat16},
    ),
)
PEERS = [
    ModelPeer(
        f"torchao {name}",
        subject,
        version("torchao") or "",
        partial(_prepare, module=module, config=config, **options),
    )
    for name, module, config, options in FORMATS
    for subject in ("minilm", "smollm2")
]
