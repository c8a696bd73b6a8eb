"""``Linear``, the layer that trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bits import assert_same_bits
from zeropoint import Linear


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (1, 1), (100, 9), (0, 4), (4, 0), (0, 0)])
def test_same_seed_gives_torchs_parameters(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(7)
    theirs, after = nn.Linear(*shape, bias, dtype=dtype), torch.rand(3)
    torch.manual_seed(7)
    ours = Linear(*shape, bias, dtype=dtype)
    assert_same_bits(torch.rand(3), after)  # the generator has moved as far
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], expected, name)
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    assert_same_bits(ours.weight.detach(), theirs.weight.detach())


def test_weights_are_uniform_within_one_over_root_in() -> None:
    layer = Linear(64, 500)
    for parameter in (layer.weight, layer.bias):
        bound = float(parameter.detach().abs().max())
        assert 0.95 / 8 < bound <= 1 / 8
        assert abs(float(parameter.detach().mean())) < 0.02


def test_it_is_an_nn_linear() -> None:
    ours, theirs = Linear(3, 2), nn.Linear(3, 2)
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == repr(theirs)
    assert repr(Linear(3, 2, bias=False)) == "Linear(in_features=3, out_features=2, bias=False)"
    assert Linear.__constants__ == nn.Linear.__constants__
    assert set(vars(ours)) == set(vars(theirs))
    assert isinstance(ours.weight, nn.Parameter)
    assert Linear(3, 2, bias=False).bias is None
    assert "bias" in Linear(3, 2, bias=False)._parameters
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 3)
    assert_same_bits(ours(x).detach(), theirs(x).detach())


def test_device_and_dtype() -> None:
    assert Linear(3, 2, device="meta").weight.device.type == "meta"
    assert Linear(3, 2, dtype=torch.float64).bias.dtype == torch.float64
    skipped = nn.utils.skip_init(Linear, 3, 2)
    assert skipped.weight.shape == (2, 3)
    layer = Linear(3, 2)
    assert layer.to(torch.bfloat16) is layer
    assert layer(torch.randn(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.double().weight.dtype == torch.float64


def test_copies_train_alone() -> None:
    layer = Linear(3, 2)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 3)
    before = layer(x).detach()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other(x).pow(2).sum().backward()
    optimizer.step()
    assert_same_bits(layer(x).detach(), before)
    assert not torch.equal(other(x), before)
    assert layer.weight.grad is None


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool) -> None:
    layer = Linear(4, 3, bias, dtype=torch.float64)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def call(x: Tensor, *p: Tensor) -> Tensor:
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_scripting_and_hooks_work_as_on_nn_linear() -> None:
    layer = Linear(3, 2)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(torch.randn(7, 3))
    assert seen == [(7, 2)]


# ---- PyTorch's own module tests -----------------------------------------------------------------


def pytorchs_inputs(dtype: torch.dtype, requires_grad: bool = False) -> list:
    common = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
    # Importing it forbids setting torch.backends flags for the rest of the process.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    infos = [info for info in common.module_db if info.module_cls is nn.Linear]
    if not infos:
        pytest.skip("this torch has no module tests for Linear")
    assert len(infos) == 1
    inputs = infos[0].module_inputs_func(
        infos[0], device="cpu", dtype=dtype, requires_grad=requires_grad, training=True
    )
    assert len(inputs) >= 3
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_forward_and_reference(dtype: torch.dtype) -> None:
    for case in pytorchs_inputs(dtype):
        made, given = case.constructor_input, case.forward_input
        layer = Linear(*made.args, **made.kwargs, dtype=dtype)
        output = layer(*given.args, **given.kwargs)
        expected = case.reference_fn(layer, *given.args, **given.kwargs)
        torch.testing.assert_close(output, expected, msg=case.desc)
        assert "Linear(" in repr(layer)
        theirs = nn.Linear(*made.args, **made.kwargs, dtype=dtype)
        theirs.load_state_dict(layer.state_dict())
        assert_same_bits(output.detach(), theirs(*given.args, **given.kwargs).detach())
        again = copy.deepcopy(layer)
        assert_same_bits(again(*given.args, **given.kwargs).detach(), output.detach())
        for mode in (layer.train(), layer.eval()):
            assert_same_bits(mode(*given.args, **given.kwargs).detach(), output.detach())


def test_pytorchs_gradients_and_layouts() -> None:
    for case in pytorchs_inputs(torch.float64, requires_grad=True):
        made, given = case.constructor_input, case.forward_input
        layer = Linear(*made.args, **made.kwargs, dtype=torch.float64)
        (x,) = (*given.args, *given.kwargs.values())
        assert torch.autograd.gradcheck(layer, (x,)), case.desc
        assert torch.autograd.gradgradcheck(layer, (x,)), case.desc
        strided = x.detach().repeat_interleave(2, -1)[..., ::2]
        assert not strided.is_contiguous()
        torch.testing.assert_close(layer(strided), layer(x))


def test_pytorchs_factory_arguments() -> None:
    for case in pytorchs_inputs(torch.float32):
        made = case.constructor_input
        for dtype in (torch.float32, torch.float64):
            for device in ("cpu", "meta"):
                layer = Linear(*made.args, **made.kwargs, device=device, dtype=dtype)
                for p in layer.parameters():
                    assert (p.device.type, p.dtype) == (device, dtype)
        moved = Linear(*made.args, **made.kwargs, device="meta").to_empty(device="cpu")
        assert moved.weight.device.type == "cpu"
