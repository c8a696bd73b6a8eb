"""Which values a quantized layer's tensors may hold."""

from __future__ import annotations

import os

from torch import Tensor

from ..codec import padding_is_zero
from ..spec import integer_range
from .container import CheckpointError
from .header import AnyInfo, qualified


def check_values(
    path: str | os.PathLike[str], layer: str, info: AnyInfo, key: str, tensor: Tensor
) -> None:
    """Refuse values of a quantized layer that no arithmetic can use, or that mean nothing.

    Raises:
        CheckpointError: a scale that is not positive and finite, a zero point out of the range of
            its integers (the weight's; uint8 for activations), bits set after the last code of a
            packed row.
    """
    if key == "weight" and info.bits < 8:
        if not padding_is_zero(tensor, info.bits, info.columns):
            raise CheckpointError(
                path, "the bits after a row's last code must be zero", layer, qualified(layer, key)
            )
        return
    if key.endswith("scale"):
        bad = ~((tensor > 0) & tensor.isfinite())
        expected = "positive and finite"
    elif key == "input_factor":
        bad = ~tensor.isfinite()
        expected = "finite"
    elif key.endswith("zero_point"):
        low, high = integer_range(info.bits, info.bits == 8) if key == "zero_point" else (0, 255)
        bad = (tensor < low) | (tensor > high)
        expected = f"within [{low}, {high}]"
    else:
        return
    if bool(bad.any()):
        raise CheckpointError(
            path,
            f"must be {expected}, got {tensor[bad].flatten()[0].item()}",
            layer,
            qualified(layer, key),
        )
