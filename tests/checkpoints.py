"""Models and small helpers for the tests of checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zeropoint
from zeropoint import QuantizedLinear
from zeropoint.formats import header
from zeropoint.formats.container import TensorInfo


class Zoo(nn.Module):
    """One of everything that a checkpoint must bring back. Input: int64 ``(rows,)`` below 9."""

    strided: Tensor
    expanded: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Not its own initialization, which imports half of torch on the meta device.
        self.embed = nn.Embedding(9, 6, _weight=torch.empty(9, 6).uniform_(-1, 1))
        self.dynamic = nn.Linear(6, 6)
        self.again = self.dynamic
        self.static = nn.Linear(6, 6)
        self.chain = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 5))
        self.weight_only = nn.Linear(5, 6)
        self.low = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("strided", torch.tensor(range(12)).float().reshape(3, 4).t())
        self.register_buffer("expanded", torch.tensor([0, 1, 2]).expand(4, 3))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("float16", torch.tensor([1.5, -0.0], dtype=torch.float16))
        self.register_buffer("waves", torch.tensor([1 + 2j], dtype=torch.complex64))
        self.register_buffer("transient", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.dynamic(self.embed(ids)))
        x = self.weight_only(self.chain(self.static(x)))
        x = self.norm(self.low(x.to(torch.bfloat16)).float())
        return self.head(x) + self.strided.sum() + self.expanded.sum() + self.scalar.float()


IDS = torch.tensor([0, 8, 3, 3, 5])
QUANTIZED = ("again", "chain.0", "chain.2", "dynamic", "static", "weight_only")


def float_zoo(seed: int = 0) -> Zoo:
    torch.manual_seed(seed)
    return Zoo().eval()


def quantized_zoo(seed: int = 0) -> Zoo:
    model = float_zoo(seed)
    new = QuantizedLinear.from_linear
    model.dynamic = model.again = new(model.dynamic)
    model.static = new(model.static, "static", input_qparams=(0.02, 130))
    model.chain[0] = new(model.chain[0], "static", input_qparams=(0.5, 3), output_qparams=(2.0, 9))
    model.chain[2] = new(model.chain[2])
    model.weight_only = new(model.weight_only, "weight-only")
    return model


def untied(model: Any) -> nn.Module:
    """The zoo without its ties."""
    model.head.weight = nn.Parameter(torch.zeros(9, 6))
    model.again = copy.deepcopy(model.again)
    return model


def save_bytes(model: nn.Module, folder: Path) -> bytes:
    path = folder / "saved.safetensors"
    zeropoint.save(model, path)
    return path.read_bytes()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that loading could change: modules and tensors by identity, tensors by value."""
    result: dict[str, Any] = {
        f"module {name}": (id(module), module.training)
        for name, module in model.named_modules(remove_duplicate=False)
    }
    for name, module in model.named_modules():
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                values = None if tensor.is_meta else repr(tensor.to_dense().tolist())
                result[f"tensor {name}.{key}"] = (id(tensor), tensor.dtype, values)
    return result


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bits."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(raw.tolist())).hexdigest()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(head: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def sign(head: dict[str, Any], data: bytes | None = None) -> dict[str, Any]:
    """Make the header's digest right again, and with ``data`` the checksums too."""
    head = dict(head)
    metadata = dict(head["__metadata__"])
    entries = {k: v for k, v in head.items() if k != "__metadata__"}
    if data is not None:
        metadata["sha256"] = json.dumps(
            {
                name: hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest()
                for name, entry in entries.items()
            }
        )
    infos = [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), 0, 0)
        for name, entry in entries.items()
        if isinstance(entry, dict) and {"dtype", "shape"} <= entry.keys()
        if isinstance(entry["dtype"], str)
    ]
    metadata["digest"] = header.digest(metadata, infos)
    return {"__metadata__": metadata, **entries}
