"""Write native_v1.safetensors and native_v1.json.

Run once, when version 1 of the format was made; afterwards the files are only read. What is written
and what is expected depends on no random numbers and no float matrix product, so that every machine
gives the same bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zeropoint
from zeropoint import QuantizedLinear

METADATA = {"made for": "tests", "unicode": "ä 层"}
FOLDER = Path(__file__).parent


class Architecture(nn.Module):
    """Every mode, a tied tensor, a layer used twice, and the dtypes that other layers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.dynamic = nn.Linear(70, 3)
        self.same = self.dynamic
        self.static = nn.Linear(4, 3, bias=False)
        self.static_out = nn.Sequential(nn.Linear(4, 3))
        self.weight_only = nn.Linear(4, 3)
        self.low = nn.Linear(2, 2, dtype=torch.bfloat16)
        self.register_buffer("scalar", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("empty", torch.empty(2, 0, dtype=torch.float16))
        self.register_buffer("flags", torch.tensor([False, False, False]))


def architecture() -> Architecture:
    return Architecture()


def pattern(shape: tuple[int, ...], start: int = 1) -> Tensor:
    """Integers from −32 to 32 that look like no ramp."""
    size = torch.Size(shape).numel()
    return (torch.arange(start, start + size) * 37 % 65 - 32).reshape(shape)


def inputs(in_features: int) -> Tensor:
    return pattern((3, in_features), 5) * torch.tensor([[0.03125], [1.0], [0.0]])


def model() -> Architecture:
    result = Architecture()
    with torch.no_grad():
        for i, tensor in enumerate((*result.parameters(), *result.buffers())):
            tensor.copy_(pattern(tuple(tensor.shape), i) / 64 + i)
    new = QuantizedLinear.from_linear
    result.dynamic = result.same = new(result.dynamic)  # type: ignore[assignment]
    result.static = new(result.static, "static", input_qparams=(0.25, 131))  # type: ignore[assignment]
    result.static_out[0] = new(
        result.static_out[0],  # type: ignore[arg-type]
        "static",
        input_qparams=(0.125, 7),
        output_qparams=(0.5, 128),
    )
    result.weight_only = new(result.weight_only, "weight-only")  # type: ignore[assignment]
    return result


def layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def main() -> None:
    from checkpoints import digest_of

    golden = model()
    path = FOLDER / "native_v1.safetensors"
    zeropoint.save(golden, path, metadata=METADATA)
    expected = {
        "state": {name: digest_of(t) for name, t in golden.state_dict().items()},
        "outputs": {
            name: layer(inputs(layer.in_features)).view(torch.int32).tolist()
            for name, layer in layers(golden).items()
        },
        "layers": zeropoint.inspect_checkpoint(path).to_dict()["layers"],
    }
    path.with_suffix(".json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
