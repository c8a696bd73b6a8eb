"""Sound files that do not fit the model, and models that cannot be saved: refused by name, nothing
changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import zeropoint
from checkpoints import fingerprint, float_zoo, quantized_zoo, untied
from zeropoint import CheckpointError, QuantizedLinear
from zeropoint.formats.slots import slots_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def zoo(path: Path) -> Path:
    zeropoint.save(quantized_zoo(), path)
    return path


# Files that are sound but do not fit the model


def refuse(path: Path, model: nn.Module) -> CheckpointError:
    before = fingerprint(model)
    with pytest.raises(CheckpointError) as caught:
        zeropoint.load(path, model)
    assert fingerprint(model) == before, "the model was changed by a file that was refused"
    return caught.value


def changed(change: Callable[[Any], Any]) -> nn.Module:
    model = float_zoo(1)
    change(model)
    return model


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnTensor(Tensor):
    pass


class OwnState(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(1))


MISFITS: dict[str, tuple[Callable[[Any], Any], str | None, str]] = {
    "in_features": (
        lambda m: setattr(m, "static", nn.Linear(7, 6)),
        "static",
        "in_features is 7 in the model, 6 in the file",
    ),
    "out_features": (
        lambda m: setattr(m, "static", nn.Linear(6, 7)),
        "static",
        "out_features is 7 in the model, 6 in the file",
    ),
    "bias": (
        lambda m: setattr(m, "static", nn.Linear(6, 6, bias=False)),
        "static",
        "bias is False in the model, True in the file",
    ),
    "no_layer": (lambda m: delattr(m, "static"), "static", "no such layer"),
    "other_module": (
        lambda m: setattr(m, "static", nn.Embedding(6, 6)),
        "static",
        "the model has a Embedding there",
    ),
    "own_forward": (lambda m: setattr(m, "static", OwnForward(6, 6)), "static", "of its own"),
    "own_state": (lambda m: setattr(m, "static", OwnState(6, 6)), "static", "of its own"),
    "patched": (lambda m: setattr(m.static, "forward", abs), "static", "of its own"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.static, "weight", nn.Identity()),
        "static",
        "of its own",
    ),
    "hooked": (lambda m: m.static.register_forward_hook(print), "static", "hooks"),
    "lazy_layer": (lambda m: setattr(m, "static", nn.LazyLinear(6)), "static", "lazy"),
    "sparse": (lambda m: m.register_buffer("scalar", torch.eye(2).to_sparse()), None, "strided"),
    "subclass": (
        lambda m: setattr(m.low, "bias", nn.Parameter(torch.zeros(6).as_subclass(OwnTensor))),
        None,
        "a OwnTensor; only plain tensors",
    ),
    "lazy_tensor": (lambda m: setattr(m, "low", nn.LazyLinear(6)), None, "lazy"),
    "quantized_in_model": (
        lambda m: setattr(m, "low", QuantizedLinear(6, 6)),
        "low",
        "quantized in the model",
    ),
    "shared_in_model": (
        lambda m: setattr(m, "low", m.static),
        "low",
        "quantized in the model",
    ),
    "shared_otherwise": (
        lambda m: setattr(m, "weight_only", m.chain[2]),
        "weight_only",
        "under another name",
    ),
    "missing": (lambda m: m.register_buffer("new", torch.ones(1)), None, "missing from the file"),
    "unexpected": (lambda m: delattr(m, "scalar"), None, "the model has no such tensor"),
    "shape": (
        lambda m: m.register_buffer("scalar", torch.ones(1, dtype=torch.float64)),
        None,
        r"shape is \[\] in the file, \[1\] in the model",
    ),
    "dtype": (
        lambda m: m.low.to(torch.float16),
        None,
        "dtype is BF16 in the file, F16 in the model",
    ),
    "transient_on_meta": (
        lambda m: setattr(m, "transient", torch.ones(3, device="meta")),
        None,
        "non-persistent buffer",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_model_that_does_not_fit(name: str, zoo: Path) -> None:
    change, layer, reason = MISFITS[name]
    error = refuse(zoo, changed(change)) if "lazy" not in name else refuse_lazy(zoo, change)
    with pytest.raises(CheckpointError, match=reason):
        raise error
    assert error.layer == layer
    assert layer is not None or error.tensor is not None


def refuse_lazy(path: Path, change: Callable[[Any], Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        zeropoint.load(path, changed(change))
    return caught.value


def test_attention_that_reads_the_weight_itself(path: Path) -> None:
    model: Any = nn.MultiheadAttention(4, 2)
    quantized = copy.deepcopy(model)
    quantized.out_proj = QuantizedLinear.from_linear(model.out_proj)
    zeropoint.save(quantized, path)
    error = refuse(path, model)
    assert error.layer == "out_proj"
    assert "MultiheadAttention" in error.reason


def test_layer_shared_in_the_model_but_not_in_the_file(path: Path) -> None:
    separate: Any = untied(float_zoo())
    separate.head.weight = separate.embed.weight
    torch.nn.init.ones_(separate.again.weight)
    zeropoint.save(zeropoint.quantize(separate, exclude="low"), path)
    error = refuse(path, float_zoo())
    assert "ties it to" in error.reason
    assert error.layer in ("again", "dynamic")


# Models that cannot be saved


class Mine(QuantizedLinear):
    pass


class ExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def with_buffer(buffer: Tensor, name: str = "odd") -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer(name, buffer)
    return model


def with_bad(key: str, value: float) -> nn.Module:
    layer = QuantizedLinear.from_linear(nn.Linear(4, 3), "static", input_qparams=(1.0, 0))
    getattr(layer, key).fill_(value)
    return nn.ModuleDict({"bad": layer})


def without(key: str) -> nn.Module:
    layer = QuantizedLinear.from_linear(nn.Linear(4, 3))
    setattr(layer, key, None)
    return layer


UNSAVABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "'weight'.*meta device"),
    "lazy": (lambda: nn.LazyLinear(2), "'weight'.*not initialized yet"),
    "sparse": (lambda: with_buffer(torch.eye(2).to_sparse()), "'odd'.*strided"),
    "dtype": (lambda: with_buffer(torch.ones(2, dtype=torch.complex128)), "'odd'.*complex128"),
    "subclass": (lambda: nn.ModuleDict({"mine": Mine(2, 2)}), "layer 'mine'.*Mine is a subclass"),
    "extra_state": (lambda: ExtraState(2, 2), "'_extra_state'.*of its own making"),
    "reserved_name": (lambda: with_buffer(torch.ones(1), "__metadata__"), "for itself"),
    "scale": (lambda: with_bad("scale", 0.0), "layer 'bad'.*'bad.scale'.*positive"),
    "zero_point": (lambda: with_bad("zero_point", 128), "layer 'bad'.*'bad.zero_point'.*128"),
    "input_scale": (lambda: with_bad("input_scale", float("nan")), "'bad.input_scale'.*positive"),
    "input_zero_point": (lambda: with_bad("input_zero_point", -1), "input_zero_point.*255"),
    "lost_scale": (lambda: without("scale"), "'scale': the layer has lost it"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_model_that_cannot_be_saved(name: str, path: Path) -> None:
    build, reason = UNSAVABLE[name]
    with pytest.raises(CheckpointError, match=reason):
        zeropoint.save(build(), path)
    assert not list(path.parent.iterdir())


def test_state_dict_that_leaves_something_out(path: Path) -> None:
    model = nn.Linear(2, 2)
    model._register_state_dict_hook(lambda module, state, prefix, local: state.popitem() and None)
    with pytest.raises(CheckpointError, match=r"'bias'.*leaves out"):
        slots_of(path, model)


def test_arguments(path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        zeropoint.save({}, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got type"):
        zeropoint.load(path, nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strings to strings"):
        zeropoint.save(nn.Linear(1, 1), path, metadata={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="'version', a key of the format"):
        zeropoint.save(nn.Linear(1, 1), path, metadata={"version": "2"})
