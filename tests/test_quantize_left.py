"""Layers that ``quantize`` leaves float, and torch's transformer with its fused path."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from small_models import batches, calibration_for, sqnr, tied_linears
from zeropoint import QuantizedLinear, quantize
from zeropoint.quantize import RECIPES


def assert_left(model, name, reason, **arguments):
    """The layer stays the very module it was, and the summary says why."""
    result = quantize(model, inplace=True, **arguments)
    layer = result.get_submodule(name)
    assert not isinstance(layer, QuantizedLinear)
    assert reason in result.quantization.left[name]
    assert name not in result.quantization.quantized
    return result


def test_multihead_attention_output_projection():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    exact = model(x, x, x)[0]
    with pytest.warns(UserWarning, match="nothing"):
        result = assert_left(model, "out_proj", "MultiheadAttention reads its weight directly")
    assert torch.equal(result(x, x, x)[0], exact)


def test_plain_linear_in_multihead_attention():
    model = nn.MultiheadAttention(8, 2)
    model.out_proj = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="nothing"):
        assert_left(model, "out_proj", "reads its weight directly")


def test_non_dynamically_quantizable_linear_elsewhere_is_a_linear():
    model = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8))
    assert isinstance(quantize(model)[0], QuantizedLinear)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


class Extra(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))


def two(layer):
    return nn.Sequential(nn.Linear(8, 8), layer)


def test_subclass_with_a_forward_of_its_own():
    assert_left(two(Doubled(8, 8)), "1", "Doubled has a forward of its own")


def test_subclass_that_only_has_another_name():
    assert isinstance(quantize(two(Renamed(8, 8)))[1], QuantizedLinear)


def test_subclass_that_holds_more():
    assert_left(two(Extra(8, 8)), "1", "Extra holds more than weight and bias")


def test_forward_replaced_on_the_instance():
    model = two(nn.Linear(8, 8))
    model[1].forward = lambda x: x
    assert_left(model, "1", "its forward was replaced on the instance")


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *a: None),
        lambda m: m.register_forward_pre_hook(lambda *a: None),
        lambda m: m.register_full_backward_hook(lambda *a: None),
        lambda m: m.register_full_backward_pre_hook(lambda *a: None),
    ],
    ids=["forward", "forward-pre", "backward", "backward-pre"],
)
def test_hooks(register):
    model = two(nn.Linear(8, 8))
    register(model[1])
    assert_left(model, "1", "it has hooks")


def test_hooks_that_calibration_placed_do_not_count():
    result = quantize(two(nn.Linear(8, 8)), "int8-static", calibration=batches(features=8))
    assert not result.quantization.left


def test_parametrizations():
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = two(wrap(nn.Linear(8, 8)))
        assert_left(model, "1", "it is parametrized")
        nn.utils.parametrize.remove_parametrizations(model[1], "weight")
        assert isinstance(quantize(model)[1], QuantizedLinear)


def test_pruned_layer():
    model = two(nn.Linear(8, 8))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert_left(model, "1", "its weight is not a parameter")


def test_lazy_layer():
    assert_left(two(nn.LazyLinear(8)), "1", "lazy and not initialized yet")


def test_meta_device():
    assert_left(two(nn.Linear(8, 8, device="meta")), "1", "on the meta device")


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights(shape):
    assert_left(two(nn.Linear(*shape)), "1", f"its weight is empty, {shape[::-1]}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes(dtype):
    model = two(nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype), requires_grad=False)
    assert_left(model, "1", f"its weight is {str(dtype).removeprefix('torch.')}")


def test_weight_of_a_tensor_subclass():
    class Special(torch.Tensor):
        pass

    model = two(nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Special))
    assert_left(model, "1", "its weight is a Special")


def test_layer_that_calibration_never_called():
    model = two(nn.Linear(8, 8))
    model.unused = nn.Linear(8, 8)
    model.forward = lambda x: model[1](model[0](x))
    result = assert_left(
        model, "unused", "never called", recipe="int8-static", calibration=batches(features=8)
    )
    assert list(result.quantization.quantized) == ["0", "1"]


def test_calibration_leaves_one_of_two_tied_linears():
    model = tied_linears()
    model.forward = lambda x: model[0](x)
    with pytest.warns(UserWarning, match="nothing"):
        result = quantize(model, "int8-static", calibration=batches(features=8), inplace=True)
    assert result.quantization.left == {
        "0": "its weight is also '2.weight', which stays float",
        "2": "calibration never called it",
    }


# torch's transformer, whose fused path reads the weights of its Linear layers


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder(recipe, padded, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, activation="gelu", batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [2]]) if padded else None
    batch = {"src": x, "src_key_padding_mask": padding}
    result = quantize(model, recipe, calibration=calibration_for(recipe, [batch]))
    assert len(result.quantization.quantized) == 4
    with torch.no_grad():
        exact, fused = model(**batch), result(**batch)
    slow = result(**batch)
    keep = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    assert sqnr(slow[keep], fused[keep]) > 45  # attention itself rounds differently
    assert sqnr(exact[keep], fused[keep]) > 30


def test_transformer_encoder_layer_in_inference_mode():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    result = quantize(model)
    with torch.inference_mode():
        assert sqnr(model(x), result(x)) > 30
    assert torch.backends.mha.get_fastpath_enabled()
    copied = copy.deepcopy(result)
    with torch.no_grad():
        assert torch.equal(copied(x), result(x))


def test_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True).eval()
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    result = quantize(model)
    assert len(result.quantization.quantized) == 4
    with torch.no_grad():
        assert sqnr(model(source, target), result(source, target)) > 30
