"""prepack_model: float layers become packed ones, by the rules of quantize; nothing is lost."""

import gc
import weakref

import pytest
import torch
from torch import nn

import zeropoint
from bits import assert_same_bits
from small_models import mlp, tied_linears
from test_quantize_left import Doubled, Extra
from zeropoint import PackedLinear, QuantizedLinear, prepack_model, unpack_model


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_are_replaced(inplace):
    model = mlp().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first, x = model[0], torch.randn(5, 16)
    expected = model(x)
    packed = prepack_model(model, inplace=inplace)
    assert (packed is model) == inplace
    assert [type(m) for m in packed] == [PackedLinear, nn.GELU, PackedLinear]
    assert (type(model[0]) is nn.Linear) == (not inplace)
    assert first.weight.requires_grad
    assert not packed[0].training
    torch.testing.assert_close(packed(x), expected)
    assert list(packed.state_dict()) == list(state)
    for name, tensor in packed.state_dict().items():
        assert_same_bits(tensor, state[name])
    assert list(packed.prepacking.packed) == ["0", "2"]
    assert "packed 2 of 2 Linear layers" in str(packed.prepacking)


def test_float_weights_are_let_go_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    original = PackedLinear.from_linear.__func__

    def counting(cls, linear, **arguments):
        alive.append(sum(w() is not None for w in weights))
        return original(cls, linear, **arguments)

    gc.disable()  # nothing may wait for the collector of cycles
    try:
        monkeypatch.setattr(PackedLinear, "from_linear", classmethod(counting))
        prepack_model(model, inplace=True)
        assert alive == [4, 3, 2, 1]
        assert not any(w() is not None for w in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("inplace", [False, True])
def test_model_that_is_itself_a_linear(inplace):
    linear = nn.Linear(4, 3)
    packed = prepack_model(linear, inplace=inplace)
    assert isinstance(packed, PackedLinear)
    assert list(packed.prepacking.packed) == [""]
    assert "(the model)" in str(packed.prepacking)


def test_bfloat16_and_mixed_models():
    model = mlp().bfloat16()
    packed = prepack_model(model)
    assert packed[0].weight.dtype == torch.bfloat16
    x = torch.randn(3, 16).bfloat16()
    torch.testing.assert_close(packed(x), model(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.half(), "its weight is float16, and packed weights are float32 or bfloat16"),
        (lambda m: m.double(), "its weight is float64"),
        (lambda m: m.to("meta"), "on the meta device"),
        (lambda m: m.register_forward_hook(print), "it has hooks"),
        (nn.utils.parametrizations.weight_norm, "it is parametrized"),
    ],
    ids=["float16", "float64", "meta", "hook", "parametrized"],
)
def test_layers_that_are_left(change, reason):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[1])
    packed = prepack_model(model, inplace=True)
    assert not isinstance(packed[1], PackedLinear)
    assert reason in packed.prepacking.left["1"]
    assert list(packed.prepacking.packed) == ["0"]
    assert f"left: {packed.prepacking.left['1']}" in str(packed.prepacking)


@pytest.mark.parametrize("layer", [Doubled, Extra])
def test_subclasses_that_do_more_are_left(layer):
    assert "1" in prepack_model(nn.Sequential(nn.Linear(8, 8), layer(8, 8))).prepacking.left


def test_attention_output_is_left_and_fused_paths_are_off(monkeypatch):
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0).eval()
    x = torch.randn(3, 5, 16)
    packed = prepack_model(model)
    assert "MultiheadAttention" in packed.prepacking.left["self_attn.out_proj"]
    assert isinstance(packed.linear1, PackedLinear)
    monkeypatch.setattr(PackedLinear, "weight", property(lambda self: pytest.fail("weight read")))
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x))


def test_include_and_exclude():
    assert list(prepack_model(mlp(), include="0").prepacking.packed) == ["0"]
    assert prepack_model(mlp(), exclude="0").prepacking.left == {"0": "excluded by '0'"}
    with pytest.raises(ValueError, match="no Linear layer matches '7'"):
        prepack_model(mlp(), include="7")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        prepack_model(torch.ones(1))


def test_layer_under_two_names():
    layer = nn.Linear(8, 8)
    packed = prepack_model(nn.Sequential(layer, layer), inplace=True)
    assert packed[0] is packed[1]
    assert packed.prepacking.shared == {"1": "0"}


@pytest.mark.parametrize("inplace", [False, True])
def test_tied_linears_share_one_packing_and_are_tied_again(inplace):
    model = tied_linears()
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    packed = prepack_model(model, inplace=inplace)
    assert packed[0].packing == packed[2].packing
    assert packed.prepacking.tied == {"2": "0"}
    assert packed.prepacking.packed["2"] == 0
    for i, bias in zip((0, 2), biases, strict=True):
        assert_same_bits(packed[i].bias, bias)
    back = unpack_model(packed)
    assert back[0].weight is back[2].weight


def test_weight_tied_to_an_embedding_is_left_unless_named():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    left = prepack_model(model).prepacking.left
    assert left == {"1": "its weight is also '0.weight', which is not packed"}
    assert isinstance(prepack_model(model, include="1")[1], PackedLinear)


def test_quantize_some_layers_and_pack_the_rest():
    model = mlp()
    mixed = prepack_model(zeropoint.quantize(model, include="0"))
    assert [type(m) for m in mixed] == [QuantizedLinear, nn.GELU, PackedLinear]
    assert list(mixed.quantization.quantized) == ["0"]
    x = torch.randn(3, 16)
    torch.testing.assert_close(mixed(x), model(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("inplace", [False, True])
def test_unpack_model(inplace):
    model = mlp().eval()
    packed = prepack_model(model)
    back = unpack_model(packed, inplace=inplace)
    assert (back is packed) == inplace
    assert [type(m) for m in back] == [zeropoint.Linear, nn.GELU, zeropoint.Linear]
    assert not hasattr(back, "prepacking")
    assert not back[0].training
    for (name, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert_same_bits(a, b, name)
    assert isinstance(unpack_model(PackedLinear(2, 2)), zeropoint.Linear)
    with pytest.raises(TypeError, match="model must be"):
        unpack_model(1)


def test_checkpoints_say_how_to_save_it(tmp_path):
    said = r"'[02]'.*packed; use zeropoint.unpack_model"
    with pytest.raises(zeropoint.CheckpointError, match=said):
        zeropoint.save(prepack_model(mlp()), tmp_path / "model.safetensors")
