"""The torch.library operators: what torch compiles or exports computes the same bits."""

import copy
import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.library import opcheck

import zeropoint
from bits import assert_same_bits
from zeropoint import PackedLinear, QTensor, kernels, packings, prepack, quantize, reference
from zeropoint import functional as F

# torch warns of its own parts, and of what it finds while it is refused an export.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:The tensor attribute self._bias_seen"),
]

OPS = torch.ops.zeropoint
K, N = 19, 70
POST = [(None, False), ("relu", False), ("gelu", True), ("silu", True)]


def integers(zero_points=True, n=N, k=K):
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n) * 0.02 + 0.001
    zero_point = torch.randint(-9, 9, (n,), dtype=torch.int32)
    return weight, scale, zero_point if zero_points else torch.zeros_like(zero_point)


def qparams():
    return torch.tensor(0.05), torch.tensor(131, dtype=torch.int32)


def arguments(name, dtype=torch.float32, requires_grad=False):
    """What an operator takes, without activation and residual."""
    x = torch.randn(3, K).to(dtype).requires_grad_(requires_grad)
    bias = torch.randn(N, requires_grad=requires_grad)
    if name == "linear_float":
        return x, torch.randn(N, K, requires_grad=requires_grad), bias
    if name in ("linear_dynamic", "linear_weight_only"):
        return x, *integers(), bias
    if name == "linear_static":
        return x, *integers(), bias, *qparams()
    q = torch.randint(0, 256, (3, K), dtype=torch.uint8)
    if name == "linear_integer":
        return q, *integers(), bias.detach(), *qparams()
    output = (torch.tensor(1.5), torch.tensor(120, dtype=torch.int32))
    return q, *integers(), bias.detach(), *qparams(), *output


DIFFERENTIABLE = ("linear_dynamic", "linear_weight_only", "linear_static", "linear_float")
ALL = (*DIFFERENTIABLE, "linear_integer", "linear_quantized")


@pytest.mark.parametrize("name", ALL)
def test_opcheck(name):
    post = (None,) if name == "linear_quantized" else ("gelu", torch.randn(3, N))
    opcheck(getattr(OPS, name), (*arguments(name), *post))
    if name in DIFFERENTIABLE:
        opcheck(getattr(OPS, name), arguments(name, requires_grad=True))


def test_opcheck_of_packed():
    packed = prepack(torch.randn(N, K), torch.randn(N))
    opcheck(OPS.linear_packed, (torch.randn(3, K, requires_grad=True), None, packed.handle, N))
    opcheck(OPS.unpacked, (torch.randn(3, K), packed.handle, N))


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only", "linear_static"])
@pytest.mark.parametrize(("activation", "residual"), POST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_function(name, activation, residual, dtype):
    x, *rest = arguments(name, dtype)
    weight, scale, zero_point, bias, *more = rest
    r = torch.randn(3, N).to(dtype) if residual else None
    got = getattr(OPS, name)(x, *rest, activation, r)
    function = getattr(F, name)
    q = QTensor(weight, scale, zero_point, 0)
    expected = function(x, q, bias, *more, activation=activation, residual=r)
    assert_same_bits(got, expected)
    assert got.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_weight_has_the_bits_of_the_reference(dtype):
    x, w, b = torch.randn(2, 3, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N)
    expected = reference.linear_float(x.reshape(-1, K), w, b).to(dtype).reshape(2, 3, N)
    assert_same_bits(OPS.linear_float(x, w, b), expected)


def test_per_tensor_weight_and_integer_activations():
    weight, _, _ = integers()
    scale, zero_point = torch.tensor(0.01), torch.tensor(3, dtype=torch.int32)
    w, x = QTensor(weight, scale, zero_point), torch.randn(3, K)
    assert_same_bits(OPS.linear_dynamic(x, weight, scale, zero_point), F.linear_dynamic(x, w))
    q = QTensor(torch.randint(0, 256, (3, K), dtype=torch.uint8), 0.05, 131)
    got = OPS.linear_integer(q.int_repr(), weight, scale, zero_point, None, *qparams())
    assert_same_bits(got, F.linear_static(q, w))
    out = (torch.tensor(0.7), torch.tensor(99, dtype=torch.int32))
    args = (q.int_repr(), weight, scale, zero_point, None, *qparams(), *out)
    assert_same_bits(OPS.linear_quantized(*args), F.linear(q, w, None, 0.7, 99).int_repr())


def test_arguments_are_checked():
    x, weight, scale, zero_point, bias = arguments("linear_dynamic")
    with pytest.raises(ValueError, match="scale must have shape"):
        OPS.linear_dynamic(x, weight, scale[:-1].clone(), zero_point, bias)
    with pytest.raises(ValueError, match="scale must be positive"):
        OPS.linear_dynamic(x, weight, -scale, zero_point, bias)
    with pytest.raises(TypeError, match=r"int_repr must be a torch.int8 or torch.uint8"):
        OPS.linear_dynamic(x, weight.float(), scale, zero_point, bias)
    with pytest.raises(ValueError, match=r"input must have shape \(\*, 19\)"):
        OPS.linear_dynamic(x[:, 1:], weight, scale, zero_point, bias)
    with pytest.raises(TypeError, match=r"weight must be .*torch.float32 or torch.bfloat16"):
        OPS.linear_float(x, weight.half())
    with pytest.raises(RuntimeError, match="not in this process"):
        OPS.linear_packed(x, None, -1, N)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("name", ["linear_float", "linear_dynamic"])
def test_gradients_are_those_of_torch(name, activation):
    x, *rest = arguments(name, requires_grad=True)
    residual, weights = torch.randn(3, N, requires_grad=True), torch.randn(3, N)
    op = getattr(OPS, name)
    bias = rest[-1]
    leaves = [x, bias, residual, *(t for t in rest[:1] if t.requires_grad)]
    got = torch.autograd.grad((op(x, *rest, activation, residual) * weights).sum(), leaves)
    before = op(x, *rest).detach().requires_grad_()
    y = before if activation is None else getattr(nn.functional, activation)(before)
    (grad,) = torch.autograd.grad((y * weights).sum(), before)
    weight = rest[0] if name == "linear_float" else QTensor(*rest[:3], 0).dequantize()
    expected = [grad @ weight, grad.sum(0), weights, grad.T @ x]
    for g, e in zip(got, expected, strict=False):
        torch.testing.assert_close(g, e)


# What is packed is remembered for as long as it is right


@pytest.fixture
def packs(monkeypatch):
    """How many weights were packed."""
    if kernels.active_isa() == kernels.REFERENCE:
        pytest.skip("no core")
    made = []
    original = kernels.weights.Packed.__init__
    monkeypatch.setattr(
        kernels.weights.Packed, "__init__", lambda self, w: made.append(1) or original(self, w)
    )
    return made


@pytest.mark.parametrize("change", ["weight", "scale", "zero_point"])
def test_a_tensor_changed_in_place_is_packed_again(packs, change):
    x, *tensors = arguments("linear_dynamic")[:4]
    for _ in range(3):
        OPS.linear_dynamic(x, *tensors)
    OPS.linear_weight_only(x, *tensors)
    assert len(packs) == 1
    tensor = dict(zip(("weight", "scale", "zero_point"), tensors, strict=True))[change]
    tensor.copy_(tensor.flip(0))
    got = OPS.linear_dynamic(x, *tensors)
    assert len(packs) == 2
    assert_same_bits(got, F.linear_dynamic(x, QTensor(*tensors, 0)))


def test_an_exchanged_scale_is_packed_again():
    x, weight, scale, zero_point, _ = arguments("linear_dynamic")
    OPS.linear_dynamic(x, weight, scale, zero_point)
    got = OPS.linear_dynamic(x, weight, scale * 2, zero_point)
    assert_same_bits(got, F.linear_dynamic(x, QTensor(weight, scale * 2, zero_point, 0)))


def test_float_weight_changed_by_an_optimizer(packs):
    x, weight = torch.randn(3, K), torch.randn(N, K)
    OPS.linear_float(x, weight)
    OPS.linear_float(x, weight)
    assert len(packs) == 1
    weight -= 1
    expected = reference.linear_float(x, weight, None)
    assert_same_bits(OPS.linear_float(x, weight), expected)


def test_packings_go_with_their_weights():
    before = packings.count()
    x, *tensors = arguments("linear_dynamic")[:4]
    weight = torch.randn(N, K)
    OPS.linear_dynamic(x, *tensors)
    OPS.linear_float(x, weight)
    if kernels.active_isa() != kernels.REFERENCE:
        assert packings.count() == before + 2
    gc.disable()  # no cycle may hold them
    try:
        del tensors, weight
        assert packings.count() == before
    finally:
        gc.enable()


def test_a_layers_packing_is_used(packs):
    layer = zeropoint.QuantizedLinear.from_linear(nn.Linear(K, N))
    x = torch.randn(3, K)
    expected = layer(x)
    got = OPS.linear_dynamic(x, layer.weight, layer.scale, layer.zero_point, layer.bias)
    assert_same_bits(got, expected)
    assert len(packs) == 1


def test_a_loaded_state_is_packed_again_without_version_counters():
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    with torch.inference_mode():
        layer = zeropoint.QuantizedLinear.from_linear(linear)
        state = zeropoint.QuantizedLinear.from_linear(nn.Linear(K, N)).state_dict()
        tensors = (layer.weight, layer.scale, layer.zero_point, layer.bias)
        OPS.linear_dynamic(x, *tensors)
        layer.load_state_dict(state)
        assert_same_bits(OPS.linear_dynamic(x, *tensors), layer(x))


# Compiled and exported


def model_of(recipe):
    torch.manual_seed(0)
    x = torch.randn(5, K)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 3, bias=False)).eval()
    calibration = [x] if recipe == "int8-static" else None
    return quantize(model, recipe, calibration=calibration), x


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **more):
    # aot_eager traces as inductor does, with fake tensors, but needs no compiler.
    return torch.compile(function, backend="aot_eager", fullgraph=True, **more)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static", "int8-weight-only"])
def test_compiled_model(recipe, fresh_compiler, packs):
    model, x = model_of(recipe)
    expected = {n: model(x[:n]) for n in (5, 2, 3)}
    fast = compiled(copy.deepcopy(model))
    packs.clear()
    with torch.no_grad():
        for n, y in expected.items():
            assert_same_bits(fast(x[:n]), y)
            assert_same_bits(fast(x[:n]), y)
    assert len(packs) == 2


def test_compiled_by_inductor(fresh_compiler):
    model, x = model_of("int8-dynamic")
    with torch.no_grad():
        assert_same_bits(torch.compile(model, fullgraph=True)(x), model(x))


def test_compiled_model_with_gradients(fresh_compiler):
    model, x = model_of("int8-dynamic")
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((model, compiled(model)), inputs, strict=True):
        function(leaf).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert inputs[0].grad.abs().sum() > 0


def test_compiled_packed_model(fresh_compiler):
    linear, x = nn.Linear(K, N), torch.randn(4, K)
    layer = PackedLinear.from_linear(linear)
    fast = compiled(layer)
    assert_same_bits(fast(x), layer(x))
    layer.bias.fill_(3)
    assert_same_bits(fast(x), layer(x))
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    assert_same_bits(fast(x), layer(x))
    leaf = x.clone().requires_grad_()
    fast(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, layer.weight.sum(0).expand(4, K))


@pytest.mark.parametrize("kind", ["dynamic", "weight_only", "static", "packed", "quantized"])
def test_compiled_functions(kind, fresh_compiler):
    x, bias = torch.randn(4, K), torch.randn(N)
    q = QTensor(*integers(), 0)
    packed, packed_float = prepack(q, bias), prepack(torch.randn(N, K), bias)
    qx = zeropoint.quantize_per_tensor(x, 0.05, 131, torch.quint8)
    functions = {
        "dynamic": [lambda: F.linear_dynamic(x, q, bias, activation="silu")],
        "weight_only": [lambda: F.linear(x, q), lambda: F.linear(x, packed)],
        "static": [lambda: F.linear_static(x, q, bias, 0.05, 7), lambda: F.linear_static(qx, q)],
        "packed": [
            lambda: F.linear(x, packed_float, residual=x.new_ones(4, N)),
            lambda: F.linear_dynamic(x, packed),
            lambda: F.linear_static(x, packed, None, 0.05, 7),
            lambda: F.linear_static(qx, packed),
        ],
        "quantized": [
            lambda: F.linear(qx, q).int_repr(),
            lambda: F.linear(qx, q, bias, 0.5, 3, activation="relu").int_repr(),
        ],
    }
    for function in functions[kind]:
        assert_same_bits(compiled(function)(), function())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static", "int8-weight-only"])
def test_exported_model(recipe, strict):
    model, x = model_of(recipe)
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    mode = recipe.removeprefix("int8-").replace("-", "_")
    assert called.count(f"zeropoint.linear_{mode}.default") == 2
    for n in (5, 2):
        assert_same_bits(program.module()(x[:n]), model(x[:n]))


def test_exported_saved_and_loaded_in_another_process(tmp_path):
    model, x = model_of("int8-dynamic")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    code = """
        import sys, torch, zeropoint
        folder = sys.argv[1]
        data = torch.load(folder + "/data.pt", weights_only=True)
        y = torch.export.load(folder + "/model.pt2").module()(data["x"])
        assert torch.equal(y, data["y"]), (y, data["y"])
        print("same bits")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout == "same bits\n", done.stderr


@pytest.mark.parametrize("strict", [False, True])
def test_a_packed_model_cannot_be_exported_and_says_so(strict, fresh_compiler):
    layer = PackedLinear(K, N)
    with pytest.raises(Exception, match=r"cannot be exported.*unpack_model"):
        torch.export.export(layer, (torch.randn(2, K),), strict=strict)


# Whatever else watches


def test_dispatch_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model, x = model_of("int8-dynamic")
    packed = PackedLinear(K, N)
    expected = model(x)
    with torch.no_grad(), Watch():
        got = model(x)
        packed(x)
    assert_same_bits(got, expected)
    assert seen.count("zeropoint.linear_dynamic.default") == 2
    assert seen.count("zeropoint.linear_packed.default") == 1


def test_fake_tensors_get_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, bias = torch.randn(2, 3, K), torch.randn(N)
        q = QTensor._of(torch.zeros(N, K, dtype=torch.int8), torch.ones(N), torch.zeros(N), 0)
    y = F.linear_dynamic(x.bfloat16(), q, bias)
    assert (y.shape, y.dtype) == ((2, 3, N), torch.bfloat16)


def test_subclasses_of_tensor():
    class Special(torch.Tensor):
        pass

    x, q = torch.randn(3, K), QTensor(*integers(), 0)
    got = F.linear_dynamic(x.as_subclass(Special), q)
    assert_same_bits(got.as_subclass(torch.Tensor), F.linear_dynamic(x, q))


def test_torch_jit_trace_is_refused_with_the_reason():
    model, x = model_of("int8-dynamic")
    model(x)  # packed weights take the short way, which must not be taken
    with pytest.raises(RuntimeError, match=r"use torch.export"):
        torch.jit.trace(model, x)


def test_plain_eager_calls_skip_the_dispatcher(monkeypatch):
    if kernels.active_isa() == kernels.REFERENCE:
        pytest.skip("no core")
    monkeypatch.setattr(F, "record", lambda *a: pytest.fail("through the dispatcher"))
    for recipe in ("int8-dynamic", "int8-static", "int8-weight-only"):
        model, x = model_of(recipe)
        model(x)
        model(x.clone().requires_grad_())
        model(x.t().contiguous().t())
