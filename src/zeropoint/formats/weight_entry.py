"""What a layer's entry in a checkpoint's table says of its weight, and the tensors that follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from .. import held_weight
from ..spec import SCALE_DTYPES
from .container import CheckpointError, dtype_name

SCALE_DTYPE_OF: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES
}
"""Types of scales by the names that entries have for them."""

MAX_SIZE = 1 << 62
"""Sizes in an entry are below it."""

Fail = Callable[[str], CheckpointError]
"""Makes an entry's error of a reason."""


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def weight_to_dict(
    bits: int, group_size: int | None = None, scale_dtype: str = "float32"
) -> dict[str, Any]:
    """The object under ``weight``."""
    integers: dict[str, Any] = {"bits": bits, "signed": bits == 8}
    if group_size is None:
        return {**integers, "granularity": "per-channel", "axis": 0}
    more = {"group_size": group_size, "scale_dtype": scale_dtype}
    return {**integers, "granularity": "per-group", **more}


def weight_from_dict(weight: Any, fail: Fail) -> dict[str, Any]:
    """The arguments that :func:`weight_to_dict` makes this object of.

    Raises:
        CheckpointError: there are none.
    """
    fields = _fields(weight, fail)
    expected = weight_to_dict(**fields)
    if canonical(weight) != canonical(expected):  # compared as JSON, where true is not 1
        raise fail(f"weight must be {json.dumps(expected)}, got {canonical(weight)[:200]}")
    return fields


def weight_tensors(
    rows: int, columns: int, bits: int, group_size: int | None, scale_dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of ``weight``, ``scale`` and ``zero_point``."""
    held = held_weight.buffers(rows, columns, bits, group_size, SCALE_DTYPE_OF[scale_dtype])
    return {name: (dtype_name(dtype) or "", tuple(shape)) for name, (shape, dtype) in held.items()}


def _fields(weight: Any, fail: Fail) -> dict[str, Any]:
    if not isinstance(weight, dict):
        raise fail("weight must be a JSON object")
    bits = weight.get("bits")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise fail(f"bits must be an integer from 2 to 8, got {str(bits)[:40]!r}")
    granularity = weight.get("granularity")
    if granularity == "per-channel":
        return {"bits": bits}
    if granularity != "per-group":
        raise fail(
            f"granularity must be 'per-channel' or 'per-group', got {str(granularity)[:40]!r}"
        )
    size, scale_dtype = weight.get("group_size"), weight.get("scale_dtype")
    if type(size) is not int or not 1 <= size < MAX_SIZE:
        raise fail(f"group_size must be an integer from 1, got {str(size)[:40]!r}")
    if not isinstance(scale_dtype, str) or scale_dtype not in SCALE_DTYPE_OF:
        names = ", ".join(SCALE_DTYPE_OF)
        raise fail(f"scale_dtype must be one of {names}, got {str(scale_dtype)[:40]!r}")
    return {"bits": bits, "group_size": size, "scale_dtype": scale_dtype}
