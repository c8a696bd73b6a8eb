"""Operators on weights of fewer than 8 bits and of groups, called, compiled and exported."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck

import zeropoint
from bits import assert_same_bits
from test_ops import ALL, DIFFERENTIABLE, OPS, K, N, arguments, compiled
from zeropoint import LayerRecipe, PerChannel, QuantSpec, int4, quantize
from zeropoint import functional as F

# torch warns of its own parts.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LOW_BITS = [int4(8), int4(8, symmetric=True), QuantSpec(3, granularity=PerChannel(0))]


def low_bits(spec):
    """The tensors of a low-bit weight, and what an operator is told of them."""
    q = zeropoint.quantize_to_spec(torch.randn(N, K), spec)
    layout = {
        "bits": q.bits,
        "signed": q.dtype == torch.int8,
        "group_size": q.group_size,
        "in_features": K,
    }
    return q, (q._int_repr, q.scale, q.zero_point), layout


@pytest.mark.parametrize("spec", LOW_BITS, ids=str)
@pytest.mark.parametrize("name", [name for name in ALL if name != "linear_float"])
def test_opcheck_of_low_bits(name, spec):
    _, weight, layout = low_bits(spec)
    args = arguments(name)
    opcheck(getattr(OPS, name), (args[0], *weight, *args[4:]), layout)
    if name in DIFFERENTIABLE:
        args = arguments(name, requires_grad=True)
        opcheck(getattr(OPS, name), (args[0], *weight, *args[4:]), layout)


@pytest.mark.parametrize("spec", LOW_BITS, ids=str)
def test_low_bits_have_the_bits_of_the_function(spec):
    q, weight, layout = low_bits(spec)
    x, bias = torch.randn(3, K), torch.randn(N)
    assert_same_bits(OPS.linear_dynamic(x, *weight, bias, **layout), F.linear_dynamic(x, q, bias))
    assert_same_bits(OPS.linear_weight_only(x, *weight, **layout), F.linear(x, q))
    with pytest.raises(ValueError, match="input must have shape"):
        OPS.linear_dynamic(x[:, 1:], *weight, bias, **layout)
    with pytest.raises(ValueError, match="codes must have shape"):
        OPS.linear_dynamic(x, *weight, bias, **{**layout, "bits": 6})
    with pytest.raises(ValueError, match="in_features must be given for a weight of"):
        OPS.linear_dynamic(x, *weight, bias, **{**layout, "in_features": None})


@pytest.mark.parametrize("spec", LOW_BITS, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_of_low_bits(spec, activation):
    q, weight, layout = low_bits(spec)
    leaves = [torch.randn(3, K).requires_grad_() for _ in range(2)]
    leaves[1].data.copy_(leaves[0].data)
    OPS.linear_weight_only(leaves[0], *weight, None, activation, **layout).sum().backward()
    y = torch.nn.functional.linear(leaves[1], q.dequantize())
    (y if activation is None else torch.nn.functional.silu(y)).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)


def test_one_weight_read_in_two_ways():
    """What is remembered of it is of one width and of one sign."""
    _, weight, layout = low_bits(QuantSpec(4, granularity=PerChannel(0)))
    x = torch.randn(3, K)
    signed = OPS.linear_weight_only(x, *weight, **layout)
    unsigned = OPS.linear_weight_only(x, *weight, **{**layout, "signed": False})
    torch.testing.assert_close(unsigned - signed, 8 * x.sum(1, keepdim=True) * weight[1])
    assert_same_bits(OPS.linear_weight_only(x, *weight, **layout), signed)


@pytest.mark.parametrize(
    "recipe",
    [
        "int4",
        "int4-weight-only",
        LayerRecipe("static", int4(16, symmetric=True, scale_dtype=torch.bfloat16)),
        LayerRecipe("dynamic", QuantSpec(5, granularity=PerChannel(0))),
    ],
    ids=str,
)
def test_compiled_and_exported_low_bits(recipe):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(5, K)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 3, bias=False)).eval()
    model = quantize(model, recipe, calibration=[x] if "static" in str(recipe) else None)
    fast = compiled(copy.deepcopy(model))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    with torch.no_grad():
        for n in (5, 2):
            assert_same_bits(fast(x[:n]), model(x[:n]))
            assert_same_bits(program.module()(x[:n]), model(x[:n]))
