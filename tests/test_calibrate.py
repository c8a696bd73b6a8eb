import io
import sys

import pytest
import torch
from torch import nn

from zeropoint.calibrate import MinMaxObserver, calibrate
from zeropoint.spec import ACTIVATION_UINT8

BATCH = torch.tensor([[-1.0, 2.0]])


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x, shift=0.0):
        return self.b(torch.relu(self.a(input=x + shift)))


def seen(observer):
    return observer.range(ACTIVATION_UINT8)


@pytest.mark.parametrize(
    "batch",
    [BATCH + 1, (BATCH, 1.0), [BATCH, 1.0], {"x": BATCH, "shift": 1.0}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_batches(batch):
    observer = MinMaxObserver()
    assert calibrate(Pair(), {"a": observer}, [batch]) == {"a": 1}
    assert seen(observer) == (0.0, 3.0)


def test_inputs_of_inner_layers():
    model, observer = Pair(), MinMaxObserver()
    x = torch.randn(3, 5, 2)
    assert calibrate(model, {"b": observer}, iter(x)) == {"b": 3}
    inner = torch.relu(model.a(x)).detach()
    assert seen(observer) == pytest.approx((float(inner.min()), float(inner.max())))


def test_model_is_a_layer_itself():
    observer = MinMaxObserver()
    assert calibrate(nn.Linear(2, 2), {"": observer}, [BATCH]) == {"": 1}
    assert seen(observer) == (-1.0, 2.0)


def test_layer_called_twice_under_two_names():
    model, observer = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), MinMaxObserver()
    model.append(model[0])
    assert calibrate(model, {"2": observer}, [BATCH]) == {"2": 2}


def test_eval_mode_without_gradients_while_running():
    states = []

    class Probe(nn.Linear):
        def forward(self, x):
            states.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    calibrate(Probe(2, 2).train(), {"": MinMaxObserver()}, [BATCH])
    assert states == [(False, False)]


@pytest.mark.parametrize("failure", [None, "nan", "data", "forward"])
def test_everything_is_restored(failure):
    model = Pair()
    model.train()
    model.a.eval()  # modes need not be uniform
    fused = torch.backends.mha.get_fastpath_enabled()

    def data():
        yield BATCH
        if failure == "nan":
            yield BATCH * float("nan")
        if failure == "data":
            raise KeyError("data")
        if failure == "forward":
            yield torch.zeros(1, 99)

    if failure:
        with pytest.raises((ValueError, KeyError, RuntimeError)):
            calibrate(model, {"a": MinMaxObserver()}, data())
    else:
        calibrate(model, {"a": MinMaxObserver()}, data())
    assert (model.training, model.a.training, model.b.training) == (True, False, True)
    assert not model.a._forward_pre_hooks
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_other_hooks_stay():
    model = Pair()
    model.a.register_forward_pre_hook(lambda module, args: None)
    calibrate(model, {"a": MinMaxObserver()}, [BATCH])
    assert len(model.a._forward_pre_hooks) == 1


def test_nan_names_the_layer():
    model = Pair()
    with torch.no_grad():
        model.a.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="layer 'b': its input must be finite, got NaN or Inf"):
        calibrate(model, {"b": MinMaxObserver()}, [BATCH])


def test_integer_input_names_the_layer():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x.long())

    with pytest.raises(TypeError, match=r"layer 'inner': .* got torch\.int64"):
        calibrate(Cast(), {"inner": MinMaxObserver()}, [BATCH])


def test_unknown_layer():
    with pytest.raises(ValueError, match="no layer 'c'"):
        calibrate(Pair(), {"c": MinMaxObserver()}, [BATCH])


def test_no_data():
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(Pair(), {"a": MinMaxObserver()}, iter(()))


@pytest.mark.parametrize("data", [BATCH, {"x": BATCH}, "text", None])
def test_one_batch_instead_of_many(data):
    with pytest.raises(TypeError, match=r"iterable of batches .* put a single batch in a list"):
        calibrate(Pair(), {"a": MinMaxObserver()}, data)


def test_batch_of_another_type():
    with pytest.raises(TypeError, match=r"a batch must be a tensor.*got str"):
        calibrate(Pair(), {"a": MinMaxObserver()}, ["text"])


def test_never_called_layer_counts_zero():
    model = Pair()
    model.unused = nn.Linear(1, 1)
    assert calibrate(model, {"unused": MinMaxObserver(), "a": MinMaxObserver()}, [BATCH]) == {
        "unused": 0,
        "a": 1,
    }


def test_fused_transformer_layers_are_watched():
    # In eval mode without gradients torch's fused path would go past linear1 and linear2, and
    # the encoder would hand them nested tensors.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    layers = {f"layers.0.linear{i}": MinMaxObserver() for i in (1, 2)}
    padding = torch.tensor([[False, False, True], [False, True, True]])
    batch = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": padding}
    assert set(calibrate(model, layers, [batch]).values()) == {1}
    assert not layers["layers.0.linear2"].is_empty


class Slow(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(("terminal", "progress"), [(False, True), (True, False)])
def test_no_bar_without_terminal_or_wish(monkeypatch, terminal, progress):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("zeropoint.calibrate.BAR_DELAY", 0.0)
    calibrate(Slow(), {"": MinMaxObserver()}, [BATCH] * 3, progress)
    assert stream.getvalue() == ""


def test_bar_on_a_terminal_when_slow(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    calibrate(Slow(), {"": MinMaxObserver()}, [BATCH] * 3)
    assert stream.getvalue() == ""  # fast: nothing is drawn
    monkeypatch.setattr("zeropoint.calibrate.BAR_DELAY", 0.0)
    calibrate(Slow(), {"": MinMaxObserver()}, [BATCH] * 3)
    assert "calibrating" in stream.getvalue()
