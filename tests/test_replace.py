import copy

import pytest
import torch
from torch import nn

from zeropoint.modules import QuantizedLinear
from zeropoint.replace import replace_modules, tie_weights


def quantized(linear):
    return QuantizedLinear.from_linear(linear)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["0", "2.0"])
def test_every_name_and_training_mode(inplace, name):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)).train()
    new = quantized(shared)
    result = replace_modules(model, {name: new}, inplace=inplace)
    assert result[0] is result[2][0] is new
    assert (result is model) == inplace
    assert (model[0] is shared) == (not inplace)
    assert new.training


def test_a_copy_shares_nothing_with_its_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    result = replace_modules(model, {"0": quantized(model[0])})
    assert result[1] is not model[1]
    assert result[1].weight.data_ptr() != model[1].weight.data_ptr()


def test_replaced_weights_are_not_copied(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    copied = []
    plain = nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda self, memo: (copied.append(self), plain(self, memo))[1]
    )
    replace_modules(model, {"0": quantized(model[0])})
    assert {id(p) for p in copied} == {id(p) for p in model[1].parameters()}


def test_references_outside_the_module_tree_follow():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.order = [self.fc]

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x

    model = Model()
    result = replace_modules(model, {"fc": quantized(model.fc)})
    assert result.order[0] is result.fc
    assert isinstance(result.fc, QuantizedLinear)


def test_the_model_itself():
    linear = nn.Linear(4, 4)
    new = quantized(linear)
    assert replace_modules(linear, {"": new}) is new


@pytest.mark.parametrize("inplace", [False, True])
def test_unknown_name_changes_nothing(inplace):
    model = nn.Sequential(nn.Linear(4, 4))
    linear = model[0]
    with pytest.raises(ValueError, match="no layer '1'"):
        replace_modules(model, {"0": quantized(linear), "1": quantized(linear)}, inplace=inplace)
    assert model[0] is linear


def test_model_that_cannot_be_copied():
    model = nn.Sequential(nn.Linear(4, 4))
    model.stream = (x for x in ())  # generators cannot be copied
    with pytest.raises(TypeError, match=r"model cannot be copied .*pass inplace=True"):
        replace_modules(model, {"0": quantized(model[0])})
    assert isinstance(
        replace_modules(model, {"0": quantized(model[0])}, inplace=True)[0], QuantizedLinear
    )


def test_fused_paths_are_switched_off_only_where_needed():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    result = replace_modules(model, {"layers.0.linear1": quantized(model.layers[0].linear1)})
    assert [layer.activation_relu_or_gelu for layer in result.layers] == [0, 1]
    assert not result.use_nested_tensor
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1
    assert replace_modules(model, {}).use_nested_tensor


def tied_pair():
    linear = nn.Linear(6, 4)
    a, b = quantized(linear), quantized(linear)
    tie_weights(b, a)
    return nn.ModuleList([a, b])


def test_tied_weights_are_one_tensor_with_one_packing():
    a, b = pair = tied_pair()
    for name in ("weight", "scale", "zero_point"):
        assert getattr(a, name) is getattr(b, name)
    assert a.weight_qtensor() is b.weight_qtensor()
    a, b = copy.deepcopy(pair)
    assert a.weight is not pair[0].weight
    assert a.weight_qtensor() is b.weight_qtensor()
    a, b = pair.half()
    assert a.weight_qtensor() is b.weight_qtensor()


def test_tied_layers_see_each_others_changes():
    a, b = tied_pair()
    x = torch.randn(3, 6)
    before = b(x)
    a.scale.mul_(2)
    assert torch.equal(b(x), a(x))
    assert not torch.equal(b(x), before)
    b.weight = b.weight.clone()  # untied again
    assert a.weight_qtensor() is not b.weight_qtensor()
    assert torch.equal(b(x), a(x))


def test_tying_layers_of_another_size():
    with pytest.raises(
        ValueError, match=r"weight of shape \(4, 6\), 8 bits, got one of shape \(4, 5\)"
    ):
        tie_weights(quantized(nn.Linear(5, 4)), quantized(nn.Linear(6, 4)))
