"""GPTQ and AWQ layers as AutoGPTQ 0.7.1 and AutoAWQ 0.2.7 pack them: the weights they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_formats_gptq_awq import GROUP, IN, OUT, save
from zeropoint.formats import awq, gptq

pytest.importorskip("transformers")
pytestmark = pytest.mark.model


def layer(bits: int, groups: int, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    """A Linear of whole steps, and their scales and zero points ``(out, groups)``."""
    torch.manual_seed(bits)
    steps = torch.randint(0, 1 << bits, (OUT, IN))
    zeros = torch.randint(1, 1 << bits, (OUT, groups))
    scales = (torch.rand(OUT, groups) * 0.1 + 0.01).to(dtype)
    size = IN // groups
    linear = nn.Linear(IN, OUT, dtype=dtype)
    with torch.no_grad():
        each = (steps - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
        linear.weight.copy_(each)
    return linear, scales, zeros


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_autogptq(bits: int, group: int, tmp_path: Path) -> None:
    from foreign_packers import gptq_linear

    groups = 1 if group == -1 else IN // group
    linear, scales, zeros = layer(bits, groups, torch.float32)
    theirs = gptq_linear()(bits, group, IN, OUT, True)
    theirs.pack(linear, scales, zeros.float(), None)
    folder = save_packed(tmp_path, theirs, {"quant_method": "gptq", "bits": bits}, group)
    read = gptq.read(folder).layers["fc"]
    assert torch.equal(read.weight.dequantize(), weight_of(theirs))
    assert torch.equal(read.weight.dequantize(), linear.weight.detach())
    assert read.bias is not None
    assert torch.equal(read.bias, linear.bias.detach())
    assert read.weight.group_size == (None if group == -1 else group)


def test_autogptq_with_inputs_in_an_order_of_their_own(tmp_path: Path) -> None:
    from foreign_packers import gptq_linear

    linear, scales, zeros = layer(4, IN // GROUP, torch.float32)
    theirs = gptq_linear()(4, GROUP, IN, OUT, True)
    order = torch.randperm(IN) // GROUP
    theirs.pack(linear, scales, zeros.float(), order.int())
    config = {"quant_method": "gptq", "bits": 4, "desc_act": True}
    read = gptq.read(save_packed(tmp_path, theirs, config, GROUP), reordered="dequantize")
    assert torch.equal(read.tensors["fc.weight"], weight_of(theirs))


def weight_of(theirs: Any) -> Tensor:
    """What their layer computes with: each input alone gives a row of it."""
    theirs.bias = None
    return theirs(torch.eye(IN)).T


@pytest.mark.parametrize("group", [GROUP, IN])
def test_autoawq(group: int, tmp_path: Path) -> None:
    from foreign_packers import awq_gemm

    package = awq_gemm()
    linear, scales, zeros = layer(4, IN // group, torch.float16)
    theirs = package.WQLinear_GEMM.from_linear(
        linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    read = awq.read(save_packed(tmp_path, theirs, config, group)).layers["fc"]
    expected = package.dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, group).T
    assert torch.equal(read.weight.dequantize().half(), expected)
    assert torch.equal(expected, linear.weight.detach())
    assert read.bias is not None
    assert torch.equal(read.bias.half(), theirs.bias)


def save_packed(folder: Path, theirs: nn.Module, config: dict[str, Any], group: int) -> Path:
    tensors = {f"fc.{name}": t.contiguous() for name, t in theirs.state_dict().items()}
    return save(folder, tensors, config | {"group_size": group})
