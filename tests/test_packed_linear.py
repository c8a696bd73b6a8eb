"""PackedLinear: nothing lost, only the packed weight held, and an nn.Linear to all that ask."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import zeropoint
from bits import assert_same_bits
from zeropoint import Linear, PackedLinear, kernels, reference

DTYPES = (torch.float32, torch.bfloat16)
needs_core = pytest.mark.skipif(kernels.active_isa() == kernels.REFERENCE, reason="no core")


def linear_of(k=19, n=70, bias=True, dtype=torch.float32):
    return nn.Linear(k, n, bias, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3), (0,)])
def test_forward_has_the_bits_of_the_reference(dtype, bias, rows):
    linear = linear_of(bias=bias, dtype=dtype)
    layer = PackedLinear.from_linear(linear)
    x = torch.randn(*rows, 19).to(dtype)
    y = layer(x)
    b = None if linear.bias is None else linear.bias.detach()
    expected = reference.linear_float(x.reshape(-1, 19), linear.weight.detach(), b)
    assert_same_bits(y, expected.to(dtype).reshape(*rows, 70))
    assert not y.requires_grad


def test_forward_is_as_exact_as_torch():
    linear, x = linear_of(512, 64), torch.randn(8, 512)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    error = (PackedLinear.from_linear(linear)(x) - exact).abs().max()
    assert 0 < error < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_an_unpacked_copy(dtype):
    linear = linear_of(dtype=dtype)
    layer = PackedLinear.from_linear(linear)
    assert_same_bits(layer.weight, linear.weight.detach())
    assert layer.weight.shape == (70, 19)
    assert layer.weight.device.type == "cpu"
    layer.weight.zero_()
    assert_same_bits(layer.weight, linear.weight.detach())


def test_weight_keeps_every_bit_pattern():
    linear = linear_of(8, 4)
    patterns = torch.tensor([0x7FC00001, -(2**31), 1, 0x7F800000], dtype=torch.int32)
    with torch.no_grad():
        linear.weight[:, 0] = patterns.view(torch.float32)
    weight = PackedLinear.from_linear(linear).weight
    assert weight[:, 0].view(torch.int32).tolist() == patterns.tolist()


def test_the_float_weight_is_not_held():
    linear = linear_of()
    layer = PackedLinear.from_linear(linear)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert layer.weight.abs().sum() > 0
    assert layer.bias.abs().sum() > 0
    del linear
    gc.collect()
    if kernels.core_error() is None:
        assert not any(
            isinstance(v, torch.Tensor) and v.untyped_storage().nbytes() > 70 * 4
            for v in vars(layer).values()
        )
        assert layer.packed_bytes >= 70 * 19 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_that_of_linear(dtype, bias):
    linear = linear_of(bias=bias, dtype=dtype)
    layer = PackedLinear.from_linear(linear)
    expected, got = linear.state_dict(), layer.state_dict()
    assert list(got) == list(expected)
    for name in expected:
        assert_same_bits(got[name], expected[name])
    again = PackedLinear(19, 70, bias, dtype=dtype)
    assert again.load_state_dict(got) == nn.modules.module._IncompatibleKeys([], [])
    x = torch.randn(3, 19).to(dtype)
    assert_same_bits(again(x), layer(x))
    Linear(19, 70, bias, dtype=dtype).load_state_dict(got)


def test_state_dict_within_a_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    packed = nn.Sequential(*map(PackedLinear.from_linear, model))
    assert list(packed.state_dict()) == list(model.state_dict())
    packed.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert_same_bits(packed[1].weight, (model[1].weight + 1).detach())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_follows_torchs_rules(assign):
    layer = PackedLinear.from_linear(linear_of())
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": torch.ones(70)}, assign=assign)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        layer.load_state_dict(before | {"other": torch.ones(1)}, assign=assign)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(before | {"weight": torch.ones(70, 20)}, assign=assign)
    assert_same_bits(layer.weight, before["weight"])
    assert "weight" not in layer._buffers
    layer.load_state_dict({"bias": torch.ones(70)}, strict=False, assign=assign)
    assert_same_bits(layer(torch.zeros(19)), torch.ones(70))
    half = {k: v.bfloat16() for k, v in before.items()}
    layer.load_state_dict(half, assign=assign)
    expected = torch.bfloat16 if assign else torch.float32
    assert_same_bits(layer.weight, half["weight"].to(expected))


def test_load_state_dict_in_inference_mode():
    layer = PackedLinear.from_linear(linear_of())
    with torch.inference_mode():
        layer.load_state_dict({"weight": torch.ones(70, 19), "bias": torch.zeros(70)})
        assert_same_bits(layer(torch.ones(1, 19)), torch.full((1, 70), 19.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_changed_in_place_or_exchanged(dtype):
    layer = PackedLinear.from_linear(linear_of(dtype=dtype))
    zero = torch.zeros(19, dtype=dtype)
    layer(zero)
    layer.bias.fill_(2)
    assert_same_bits(layer(zero), torch.full((70,), 2, dtype=dtype))
    layer.bias = torch.full((70,), 3, dtype=dtype)
    assert_same_bits(layer(zero), torch.full((70,), 3, dtype=dtype))
    layer.bias = None
    assert_same_bits(layer(zero), torch.zeros(70, dtype=dtype))


def test_conversion_to_bfloat16_and_back():
    linear = linear_of()
    layer = PackedLinear.from_linear(linear).to(torch.bfloat16)
    assert_same_bits(layer.weight, linear.weight.detach().bfloat16())
    assert_same_bits(layer.bias, linear.bias.detach().bfloat16())
    layer.float()
    assert_same_bits(layer.weight, linear.weight.detach().bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_conversion_to_other_types_is_refused(dtype):
    layer = PackedLinear.from_linear(linear_of())
    with pytest.raises(TypeError, match=r"float32 or torch.bfloat16, got .*; unpack\(\)"):
        layer.to(dtype)
    with pytest.raises(TypeError, match=r"must be torch.float32 or torch.bfloat16"):
        PackedLinear(2, 2, dtype=dtype)
    with pytest.raises(TypeError, match=r"must be torch.float32 or torch.bfloat16"):
        PackedLinear.from_linear(linear_of(dtype=dtype))


def test_conversion_that_changes_nothing_does_not_unpack(monkeypatch):
    layer = PackedLinear.from_linear(linear_of())
    packed = layer._bare
    monkeypatch.setattr(kernels.PackedWeight, "unpack", lambda self: pytest.fail("unpacked"))
    layer.to("cpu").float().cpu()
    assert layer._bare is packed


def test_meta_device():
    layer = PackedLinear.from_linear(linear_of()).to("meta")
    assert layer.weight.is_meta
    assert layer.bias.is_meta
    layer.to_empty(device="cpu").load_state_dict(
        {"weight": torch.ones(70, 19), "bias": torch.zeros(70)}
    )
    assert_same_bits(layer(torch.ones(19)), torch.full((70,), 19.0))


def test_deepcopy_shares_what_is_packed_and_nothing_else():
    layer = PackedLinear.from_linear(linear_of())
    twin = copy.deepcopy(layer)
    assert twin.packing == layer.packing
    x = torch.randn(3, 19)
    assert_same_bits(twin(x), layer(x))
    expected = layer(x)
    twin.bias.zero_()
    twin.load_state_dict({"weight": torch.zeros(70, 19)}, strict=False)
    assert_same_bits(layer(x), expected)
    assert_same_bits(twin(x), torch.zeros(3, 70))


def test_pickle_and_torch_save():
    layer = PackedLinear.from_linear(linear_of()).eval()
    x = torch.randn(3, 19)
    assert_same_bits(pickle.loads(pickle.dumps(layer))(x), layer(x))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=False)(x), layer(x))


def test_unpack():
    linear = linear_of().eval()
    layer = PackedLinear.from_linear(linear)
    generator = torch.get_rng_state()
    back = layer.unpack()
    assert type(back) is Linear
    assert torch.equal(torch.get_rng_state(), generator)
    assert back.weight.requires_grad
    assert back.bias.requires_grad
    assert not back.training
    assert_same_bits(back.weight.detach(), linear.weight.detach())
    back.bias.data.zero_()
    assert layer.bias.abs().sum() > 0


def test_gradient_to_the_input():
    linear = linear_of()
    layer = PackedLinear.from_linear(linear)
    x, twin = (torch.ones(2, 19, requires_grad=True) for _ in range(2))
    layer(x).square().sum().backward()
    linear(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_repr_and_errors():
    layer = PackedLinear(3, 2, bias=False, dtype=torch.bfloat16)
    assert repr(layer) == (
        "PackedLinear(in_features=3, out_features=2, bias=False, dtype=torch.bfloat16)"
    )
    with pytest.raises(TypeError, match=r"must be a torch.nn.Linear, got ReLU"):
        PackedLinear.from_linear(nn.ReLU())
    with pytest.raises(ValueError, match=r"share must hold a weight of shape \(70, 19\)"):
        PackedLinear.from_linear(linear_of(), share=layer)
    with pytest.raises(ValueError, match=r"input must have shape \(\*, 3\)"):
        layer(torch.zeros(4))


def test_reference_in_place_of_the_core():
    layer, x = PackedLinear.from_linear(linear_of()), torch.randn(3, 19)
    expected = layer(x)
    with zeropoint.force_isa("reference"):
        assert_same_bits(layer(x), expected)


@needs_core
def test_ordinary_calls_take_the_short_way(monkeypatch):
    layers = [PackedLinear.from_linear(linear_of(dtype=d)) for d in DTYPES]
    monkeypatch.setattr(kernels, "linear_float", lambda *a, **k: pytest.fail("the long way"))
    for layer, dtype in zip(layers, DTYPES, strict=True):
        layer(torch.randn(3, 19, dtype=dtype))
