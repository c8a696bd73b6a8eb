"""The factor and the rotation that a layer applies to its input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zeropoint
from zeropoint import WEIGHT_INT4, PerChannel, QuantizedLinear, QuantSpec, quantize_to_spec
from zeropoint.input_transform import check_rotation, transform_input, walsh_hadamard
from zeropoint.kernels import quick_transform
from zeropoint.replace import tie_weights


def sylvester(size):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def changed_layer(mode="dynamic", features=24, out=5, rotation=8, spec=WEIGHT_INT4, bias=True):
    """A layer with a factor and a rotation, and the float weight that it stands for."""
    weight = quantize_to_spec(torch.randn(out, features), spec)
    factor = torch.rand(features) + 0.5
    factor[::3] *= -1
    qparams = (0.05, 128) if mode == "static" else None
    layer = QuantizedLinear.from_quantized(
        weight,
        torch.randn(out) if bias else None,
        mode,
        qparams,
        input_factor=factor,
        rotation=rotation,
    )
    plain = QuantizedLinear.from_quantized(weight, layer.bias, mode, qparams)
    return layer, plain, factor


# The transform


@pytest.mark.parametrize(("features", "size"), [(1, 1), (2, 2), (6, 2), (8, 8), (96, 32), (24, 1)])
def test_transform_is_sylvesters_matrix_in_each_run(features, size):
    x = torch.randn(3, 4, features, dtype=torch.float64)
    expected = (x.reshape(-1, size) @ sylvester(size)).reshape(x.shape)
    torch.testing.assert_close(walsh_hadamard(x, size), expected)


def test_transform_twice_is_the_size_times_the_input():
    x = torch.randint(-100, 100, (5, 64)).float()
    assert torch.equal(walsh_hadamard(walsh_hadamard(x, 64), 64), 64 * x)


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    x, factor = torch.randn(17, 96), torch.randn(96)
    whole = transform_input(x, factor, 32)
    assert all(
        torch.equal(transform_input(row, factor, 32), y) for row, y in zip(x, whole, strict=True)
    )


def test_no_rows_no_features_and_one_feature():
    assert walsh_hadamard(torch.empty(0, 8), 8).shape == (0, 8)
    assert walsh_hadamard(torch.empty(3, 0), 1).shape == (3, 0)
    assert torch.equal(walsh_hadamard(torch.tensor([2.0]), 1), torch.tensor([2.0]))


def test_nan_stays_in_its_row():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    y = transform_input(x, torch.ones(8), 8)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_float32_and_rounded_once(dtype):
    x, factor = torch.randn(4, 16).to(dtype), torch.randn(16)
    assert torch.equal(
        transform_input(x, factor, 16), transform_input(x.float(), factor, 16).to(dtype)
    )


@pytest.mark.parametrize("size", [0, -2, 3, 16, True, 2.0, None])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises((TypeError, ValueError), match="size must be"):
        check_rotation("size", size, 24)


# The kernels


@pytest.fixture(params=zeropoint.kernels.available_isas()[:-1])
def isa(request):
    with zeropoint.kernels.force_isa(request.param):
        yield


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1,), (5,), (2, 3), (0,), (301,)]),
    size=st.sampled_from([1, 2, 4, 8, 16, 64, 512]),
    runs=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.usefixtures("isa")
def test_kernels_transform_to_the_same_bits(shape, size, runs, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, size * runs, generator=generator).to(dtype)
    factor = torch.randn(size * runs, generator=generator)
    y = quick_transform(x, factor, size)
    assert y is not None
    assert torch.equal(y, transform_input(x, factor, size))


def test_what_is_out_of_the_ordinary_is_left_to_torch():
    x, factor = torch.randn(4, 24), torch.randn(24)
    assert quick_transform(x, factor, 8) is not None or zeropoint.kernels.core is None
    for strange in (
        x.double(),
        x.T.contiguous().T,
        x.clone().requires_grad_(),
        x[:, :16].contiguous(),
        torch.tensor(1.0),
        nn.Parameter(x),
        x.to("meta"),
    ):
        assert quick_transform(strange, factor, 8) is None
    for other in (factor.double(), torch.randn(48)[::2], torch.randn(1, 24)):
        assert quick_transform(x, other, 8) is None
    with zeropoint.kernels.force_isa("reference"):
        assert quick_transform(x, factor, 8) is None


def test_gradients_go_through_the_factor_and_the_rotation():
    layer, _, _ = changed_layer("weight-only")
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    layer.dequantize().requires_grad_(False)(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


# The layer


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight-only"])
@pytest.mark.parametrize("rotation", [1, 8])
def test_layer_computes_with_the_changed_input(mode, rotation):
    layer, plain, factor = changed_layer(mode, rotation=rotation)
    x = torch.randn(3, 7, 24)
    expected = plain(walsh_hadamard(x * factor, rotation))
    assert torch.equal(layer(x), expected)
    assert not torch.equal(plain(x), expected)


@pytest.mark.parametrize("rotation", [1, 8])
def test_dequantized_layer_takes_the_input_as_it_is(rotation):
    layer, _, _ = changed_layer("weight-only", rotation=rotation)
    x = torch.randn(9, 24)
    torch.testing.assert_close(layer.dequantize()(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layer_answers_in_its_inputs_dtype_and_keeps_the_factor(dtype):
    layer, _, factor = changed_layer()
    layer.to(dtype)
    assert layer.input_factor.dtype == torch.float32
    assert torch.equal(layer.input_factor, factor)
    assert layer(torch.randn(2, 24, dtype=dtype)).dtype == dtype


def test_qtensor_is_refused_by_a_layer_with_a_factor():
    layer, _, _ = changed_layer("static")
    x = zeropoint.quantize_per_tensor(torch.randn(2, 24), 0.05, 128, torch.uint8)
    with pytest.raises(TypeError, match="input must be a float tensor for a layer with an input_f"):
        layer(x)


def test_state_dict_and_copies_carry_it():
    layer, _, _ = changed_layer()
    x = torch.randn(3, 24)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other = QuantizedLinear(24, 5, bits=4, group_size=32, input_factor=True, rotation=8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert "input_factor=True, rotation=8" in repr(other)


def test_factor_changed_in_place_counts_at_the_next_call():
    layer, plain, _ = changed_layer(rotation=1)
    x = torch.randn(3, 24)
    layer(x)
    layer.input_factor.fill_(1.0)
    assert torch.equal(layer(x), plain(x))


def test_tied_layers_share_the_factor():
    a, _, _ = changed_layer()
    b, _, _ = changed_layer()
    tie_weights(b, a)
    b.bias.copy_(a.bias)
    x = torch.randn(3, 24)
    assert b.input_factor is a.input_factor
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight-only"])
def test_saved_and_loaded_bit_for_bit(mode, tmp_path):
    layer, _, _ = changed_layer(mode)
    model = nn.Sequential(layer)
    zeropoint.save(model, tmp_path / "m.safetensors")
    again = zeropoint.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(24, 5)))
    x = torch.randn(3, 24)
    assert again[0].rotation == 8
    assert torch.equal(again(x), layer(x))
    # into one that is quantized already
    zeropoint.load(tmp_path / "m.safetensors", again)
    assert torch.equal(again(x), layer(x))


def test_file_of_a_layer_of_8_bits_says_that_it_has_a_factor(tmp_path):
    spec = QuantSpec(granularity=PerChannel(0))
    layer, _, _ = changed_layer(spec=spec, rotation=1)
    zeropoint.save(layer, tmp_path / "m.safetensors")
    info = zeropoint.inspect_checkpoint(tmp_path / "m.safetensors")
    assert info.version == "2"
    assert info.layers[""].to_dict()["input"] == {"factor": True, "rotation": 1}
    x = torch.randn(3, 24)
    assert torch.equal(zeropoint.load(tmp_path / "m.safetensors", nn.Linear(24, 5))(x), layer(x))


def test_factor_that_is_not_finite_is_not_saved(tmp_path):
    layer, _, _ = changed_layer()
    layer.input_factor[3] = torch.inf
    with pytest.raises(zeropoint.CheckpointError, match="must be finite"):
        zeropoint.save(layer, tmp_path / "m.safetensors")


def test_compiled_without_a_break_in_the_graph():
    layer, _, _ = changed_layer()
    x = torch.randn(3, 24)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": 8}, "rotation needs input_factor"),
        ({"rotation": 3, "input_factor": True}, "rotation must be a power of two"),
        ({"rotation": 16, "input_factor": True}, "that divides the 24 features"),
    ],
)
def test_layers_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(24, 5, **arguments)


@pytest.mark.parametrize("factor", [torch.ones(23), torch.full((24,), torch.nan)])
def test_factors_that_do_not_fit_are_refused(factor):
    weight = quantize_to_spec(torch.randn(5, 24), WEIGHT_INT4)
    with pytest.raises(ValueError, match=r"input_factor must be finite, of shape \(24,\)"):
        QuantizedLinear.from_quantized(weight, input_factor=factor)
