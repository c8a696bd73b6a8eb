"""Layers of zeropoint.compat and quantize_dynamic, beside torch's own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from torch import Tensor, nn

from zeropoint import QTensor, compat
from zeropoint.compat import quantized
from zeropoint.compat.quantized import dynamic

pytestmark = pytest.mark.filterwarnings("ignore")


def same_weight(ours: QTensor, theirs: Tensor) -> bool:
    expected = QTensor.from_torch(theirs)
    return (
        ours.axis == expected.axis
        and torch.equal(ours.int_repr(), expected.int_repr())
        and torch.equal(ours.scale, expected.scale)
        and torch.equal(ours.zero_point, expected.zero_point)
    )


def prepared(engine: str = "x86", training: bool = False, bn: bool = False) -> nn.Module:
    layers = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6))
    model = tq.QuantWrapper(layers)
    fuse = tq.fuse_modules_qat if training else tq.fuse_modules
    model = fuse(model.train(training), [["module.0", "module.1"]])
    if training:
        model.qconfig = tq.get_default_qat_qconfig(engine)
        model = tq.prepare_qat(model)
    else:
        model.qconfig = tq.get_default_qconfig(engine)
        model = tq.prepare(model)
    model(torch.randn(64, 16))
    return model.eval()


MAPPING = {
    nn.Linear: quantized.Linear,
    torch.ao.nn.intrinsic.LinearReLU: quantized.LinearReLU,
    torch.ao.nn.qat.Linear: quantized.Linear,
    torch.ao.nn.intrinsic.qat.LinearReLU: quantized.LinearReLU,
    tq.QuantStub: nnq.Quantize,
    tq.DeQuantStub: nnq.DeQuantize,
}


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
@pytest.mark.parametrize("training", [False, True])
def test_torchs_convert_makes_our_layers(engine: str, training: bool) -> None:
    """In torch's own workflow, by the ``mapping`` that ``convert`` takes."""
    before = prepared(engine, training)
    theirs = tq.convert(copy.deepcopy(before))
    ours = tq.convert(before, mapping=MAPPING)
    for i, kind in ((0, quantized.LinearReLU), (2, quantized.Linear)):
        a, b = ours.module[i], theirs.module[i]
        assert type(a) is kind
        assert same_weight(a.weight(), b.weight())
        assert torch.equal(a.bias(), b.bias())
        assert (a.scale, a.zero_point) == (b.scale, b.zero_point)
    x = torch.randn(32, 16)
    steps = (ours(x) - theirs(x)).abs() / theirs.module[2].scale
    assert steps.max() < 1.01
    assert ours.module[0](ours.quant(x)).int_repr().min() >= ours.module[0].zero_point


def test_batch_norm_of_training_is_folded() -> None:
    fused = torch.ao.nn.intrinsic.qat.LinearBn1d(8, 5, qconfig=tq.get_default_qat_qconfig("x86"))
    nn.init.normal_(fused.bias)  # torch leaves it as the memory was
    fused.activation_post_process = tq.HistogramObserver()
    fused.activation_post_process(fused.train()(torch.randn(64, 8) * 3 + 1))
    fused.eval()
    theirs = nnq.Linear.from_float(copy.deepcopy(fused))
    ours = quantized.Linear.from_float(fused)
    assert same_weight(ours.weight(), theirs.weight())
    assert torch.equal(ours.bias(), theirs.bias())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_state_dict_loads(kind: str, bias: bool) -> None:
    theirs = (nnq.Linear if kind == "static" else nnq.dynamic.Linear)(8, 5, bias)
    weight = torch.quantize_per_channel(
        torch.randn(5, 8), torch.rand(5, dtype=torch.float64) + 0.01, torch.zeros(5).long(), 0,
        torch.qint8,
    )  # fmt: skip
    theirs.set_weight_bias(weight, torch.randn(5) if bias else None)
    theirs.scale, theirs.zero_point = (0.25, 7) if kind == "static" else (1.0, 0)
    ours = (quantized.Linear if kind == "static" else dynamic.Linear)(8, 5, bias)
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    assert same_weight(ours.weight(), weight)
    x = torch.randn(3, 8)
    if kind == "static":
        q = torch.quantize_per_tensor(x, 0.03, 100, torch.quint8)
        steps = ours(q).int_repr().int() - theirs(q).int_repr().int()
        assert steps.abs().max() <= 1
        assert (ours.scale, ours.zero_point) == (0.25, 7)
    else:
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_own_state_is_plain_tensors_and_loads(tmp_path: Any) -> None:
    layer = dynamic.Linear.from_float(nn.Linear(8, 5))
    state = layer.state_dict()
    assert sorted(state) == [
        *(f"_packed_params.{key}" for key in ("bias", "scale", "weight", "zero_point")),
        *("scale", "zero_point"),
    ]
    assert all(type(value) is Tensor for value in state.values())
    torch.save(state, tmp_path / "state.pt")
    again = dynamic.Linear(8, 5)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(3, 8)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        again.load_state_dict({"scale": torch.tensor(1.0), "zero_point": torch.tensor(0)})


def test_loading_another_weight_is_seen_by_the_next_call() -> None:
    """The packing is remembered; it must not outlive the weight."""
    a, b = (dynamic.Linear.from_float(nn.Linear(8, 5)) for _ in range(2))
    x = torch.randn(3, 8)
    before = a(x)
    a.load_state_dict(b.state_dict())
    assert not torch.equal(a(x), before)
    assert torch.equal(a(x), b(x))
    b.set_weight_bias(QTensor(torch.zeros(5, 8, dtype=torch.int8), 1.0), None)
    assert torch.equal(b(x), torch.zeros(3, 5))


def test_casts_leave_scales_and_bias_alone() -> None:
    layer = dynamic.Linear.from_float(nn.Linear(8, 5))
    x = torch.randn(3, 8)
    y = layer(x)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x), y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_version_before_4_quantized_to_8_bits() -> None:
    layer = dynamic.Linear.from_float(nn.Linear(64, 5))
    state = layer.state_dict()
    x = torch.randn(3, 64)
    old = dynamic.Linear(64, 5)
    state._metadata[""]["version"] = 3
    old.load_state_dict(state)
    float_y = nn.functional.linear(x, layer.weight().dequantize(), layer.bias())
    assert (old(x) - float_y).abs().mean() < (layer(x) - float_y).abs().mean()


def test_layers_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch\.qint8"):
        quantized.Linear(3, 2, dtype=torch.float16)
    layer = quantized.Linear(3, 2)
    with pytest.raises(TypeError, match="quantized to"):
        layer.set_weight_bias(QTensor(torch.zeros(2, 3, dtype=torch.uint8), 1.0), None)
    by_input = QTensor(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3), torch.zeros(3).int(), 1)
    with pytest.raises(ValueError, match="axis 1"):
        layer.set_weight_bias(by_input, None)
    with pytest.raises(ValueError, match="bias must have shape"):
        layer.set_weight_bias(QTensor(torch.zeros(2, 3, dtype=torch.int8), 1.0), torch.ones(3))
    with pytest.raises(TypeError, match="qconfig and an observer"):
        quantized.Linear.from_float(nn.Linear(3, 2))
    with pytest.raises(TypeError, match="mod must be a Linear layer"):
        dynamic.Linear.from_float(nn.Conv1d(1, 1, 1))
    float_layer = nn.Linear(3, 2)
    float_layer.qconfig = tq.float16_dynamic_qconfig
    with pytest.raises(ValueError, match=r"dtype torch\.qint8"):
        dynamic.Linear.from_float(float_layer)


def test_printed_as_torch_prints_it() -> None:
    ours, theirs = str(quantized.Linear(3, 2)), str(nnq.Linear(3, 2))
    for part in ("in_features=3, out_features=2", "scale=1.0, zero_point=0", "per_tensor_affine"):
        assert part in ours
        assert part in theirs


# quantize_dynamic


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.body = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(torch.relu(self.first(x))))


per_channel = tq.per_channel_dynamic_qconfig
SPECS: dict[str, Any] = {
    "all": None,
    "types": {nn.Linear},
    "names": {"first", "body.2"},
    "a whole part": {"body"},
    "dictionary": {nn.Linear: tq.default_dynamic_qconfig},
    "per channel": {nn.Linear: per_channel},
    "one per channel": {"body.0": per_channel, nn.Linear: tq.default_dynamic_qconfig},
    "but one": {nn.Linear: tq.default_dynamic_qconfig, "body.2": None},
    "the root": {"": tq.default_dynamic_qconfig},
    "nothing": set(),
}


@pytest.mark.parametrize("what", SPECS)
def test_quantize_dynamic_is_torchs(what: str) -> None:
    model = Net().train()
    theirs = tq.quantize_dynamic(model, SPECS[what])
    ours = compat.quantize_dynamic(model, SPECS[what])
    assert model.training
    assert type(model.first) is nn.Linear
    assert not ours.training
    for name, module in theirs.named_modules():
        if isinstance(module, nnq.dynamic.Linear):
            mine = ours.get_submodule(name)
            assert type(mine) is dynamic.Linear, name
            assert same_weight(mine.weight(), module.weight())
        elif isinstance(module, nn.Linear):
            assert type(ours.get_submodule(name)) is nn.Linear, name
    x = torch.randn(7, 16)
    a, b = ours(x), theirs(x)
    assert torch.allclose(a, b, atol=1e-4)
    assert what == "nothing" or not torch.equal(a, model(x))


def test_quantize_dynamic_in_place_keeps_hooks_and_shared_layers() -> None:
    model = Net()
    model.again = model.first
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("after"))
    model.first.register_forward_pre_hook(lambda *_: calls.append("before"))
    assert compat.quantize_dynamic(model, inplace=True) is model
    assert model.again is model.first
    assert type(model.first) is dynamic.Linear
    assert not hasattr(model.first, "qconfig")
    model(torch.randn(2, 16))
    assert calls == ["before", "after"]


def test_quantize_dynamic_leaves_no_qconfig_behind() -> None:
    model = Net()
    compat.quantize_dynamic(model, {nn.Linear: per_channel})
    assert not any(hasattr(m, "qconfig") for m in model.modules())
    model.first.qconfig = per_channel  # beats what is asked for, as in torch
    ours = compat.quantize_dynamic(model)
    assert ours.first.weight().axis == 0
    assert ours.body[0].weight().axis is None


def test_quantize_dynamic_says_what_it_leaves() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match=r"rnn \(LSTM\)"):
        ours = compat.quantize_dynamic(model)
    assert type(ours["fc"]) is dynamic.Linear
    assert type(ours["rnn"]) is nn.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.quantize_dynamic(model, {nn.Linear})


def test_quantize_dynamic_mapping() -> None:
    ours = compat.quantize_dynamic(Net(), mapping={nn.Linear: dynamic.LinearReLU})
    assert ours.first(torch.randn(9, 16)).min() == 0


def test_quantize_dynamic_refuses() -> None:
    with pytest.raises(TypeError, match="model must be"):
        compat.quantize_dynamic("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="qconfig_spec must be"):
        compat.quantize_dynamic(Net(), ["first"])
    with pytest.raises(ValueError, match=r"dtype must be torch\.qint8, got torch\.float16"):
        compat.quantize_dynamic(Net(), dtype=torch.float16)
    model = Net()
    with torch.no_grad():
        model.first.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        compat.quantize_dynamic(model)
