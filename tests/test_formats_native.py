"""Checkpoints: what is saved comes back bit for bit; what does not fit the model is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from checkpoints import IDS, QUANTIZED, digest_of, fingerprint, float_zoo, quantized_zoo, untied
from zeropoint import CheckpointError, QuantizedLinear, QuantSpec
from zeropoint.formats import container, native, writer

HERE = Path(__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def zoo(path: Path) -> Path:
    zeropoint.save(quantized_zoo(), path)
    return path


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    a, b = got.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in b:
        if a[name].is_complex():
            assert torch.equal(a[name], b[name])
        else:
            assert_same_bits(a[name], b[name], name)


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


# Round trips


def on_meta() -> nn.Module:
    with torch.device("meta"):
        model = nn.Module.eval(type(float_zoo())())
    model.transient = torch.ones(3)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fresh": lambda: float_zoo(1),
    "the_float_model": lambda: float_zoo(0),
    "quantized": lambda: quantized_zoo(1),
    "quantized_otherwise": lambda: zeropoint.quantize(
        float_zoo(1), "int8-weight-only", exclude=("low", "head")
    ),
    "meta": on_meta,
    "untied": lambda: untied(float_zoo(1)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, zoo: Path) -> None:
    expected = quantized_zoo()
    model = MODELS[kind]()
    loaded: Any = zeropoint.load(zoo, model)
    assert loaded is model
    assert_same_state(loaded, expected)
    assert_same_bits(loaded(IDS), expected(IDS))
    assert sorted(n for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)) == sorted(
        set(QUANTIZED) - (set() if kind == "untied" else {"again"})
    )
    assert loaded.head.weight is loaded.embed.weight, "the tie is lost"
    assert same_memory(loaded.again.weight, loaded.dynamic.weight), "the tie is lost"
    assert (loaded.again is loaded.dynamic) == (kind != "untied")


def test_round_trip_in_a_new_process(zoo: Path) -> None:
    script = (
        "import sys, torch, zeropoint\n"
        "from checkpoints import IDS, digest_of, float_zoo\n"
        "model = zeropoint.load(sys.argv[1], float_zoo(int(sys.argv[2])))\n"
        "print(digest_of(model(IDS)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, zoo, "7"],
        env={"PYTHONPATH": f"{HERE}:{Path(zeropoint.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == digest_of(quantized_zoo()(IDS))


def test_a_float_model(path: Path) -> None:
    zeropoint.save(float_zoo(), path)
    assert zeropoint.inspect_checkpoint(path).layers == {}
    assert_same_state(zeropoint.load(path, float_zoo(1)), float_zoo())


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight-only"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5, 3), (0, 3), (5, 0), (1, 1)])
def test_the_model_is_a_layer(mode: Any, bias: bool, sizes: tuple[int, int], path: Path) -> None:
    layer = QuantizedLinear(*sizes, bias, mode)
    generator = torch.Generator().manual_seed(0)
    for buffer in layer.buffers():
        buffer.copy_(torch.randint(1, 99, buffer.shape, generator=generator))
    zeropoint.save(layer, path)
    model = nn.Linear(*sizes, bias) if 0 not in sizes else zeropoint.Linear(*sizes, bias)
    loaded = zeropoint.load(path, model)
    assert isinstance(loaded, QuantizedLinear)
    assert loaded.mode == mode
    assert_same_state(loaded, layer)
    x = torch.randn(4, sizes[0])
    assert_same_bits(loaded(x), layer(x))


def test_asymmetric_weights(path: Path) -> None:
    linear = nn.Linear(7, 5)
    spec = QuantSpec(signed=False, symmetric=False)
    layer = QuantizedLinear.from_linear(linear, weight_spec=spec)
    assert layer.zero_point.any()
    zeropoint.save(layer, path)
    assert_same_state(zeropoint.load(path, linear), layer)


@pytest.mark.parametrize("quantized", [False, True])
def test_existing_tensors_keep_their_identity(quantized: bool, zoo: Path) -> None:
    model = quantized_zoo(1) if quantized else float_zoo(1)
    kept = {
        n: (t, t.data_ptr())
        for n, t in (*model.named_parameters(), *model.named_buffers())
        if (quantized or n.split(".")[0] in ("embed", "low", "norm")) and n != "expanded"
    }
    zeropoint.load(zoo, model)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert len(kept) >= 8
    for name, (tensor, address) in kept.items():
        assert now[name] is tensor, name
        assert tensor.data_ptr() == address, name


def test_the_packing_of_a_loaded_layer_is_dropped(path: Path) -> None:
    first, second = (QuantizedLinear.from_linear(nn.Linear(6, 6)) for _ in range(2))
    x = torch.randn(3, 6)
    assert not torch.equal(first(x), second(x))  # both are packed now
    zeropoint.save(second, path)
    assert zeropoint.load(path, first) is first
    assert_same_bits(first(x), second(x))


def test_training_mode_and_gradients_are_kept(zoo: Path) -> None:
    model = float_zoo(1).train()
    model.low.weight.requires_grad_(False)
    zeropoint.load(zoo, model)
    assert all(module.training for module in model.modules())
    assert not model.low.weight.requires_grad
    assert model.low.bias.requires_grad
    assert model.head.weight.requires_grad


def test_meta_model_keeps_what_needs_gradients(zoo: Path) -> None:
    model: Any = on_meta()
    model.low.weight.requires_grad_(False)
    zeropoint.load(zoo, model)
    assert isinstance(model.low.weight, nn.Parameter)
    assert not model.low.weight.requires_grad
    assert model.low.bias.requires_grad
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_meta_device_that_is_asked_for(zoo: Path) -> None:
    model: Any = zeropoint.load(zoo, on_meta(), device="cpu")
    assert model.low.weight.device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="device"):
        zeropoint.load(zoo, on_meta(), device="nonsense")


def test_under_inference_mode(zoo: Path) -> None:
    with torch.inference_mode():
        model: Any = float_zoo(1)  # its parameters are inference tensors
        zeropoint.load(zoo, model)
    assert_same_state(model, quantized_zoo())
    assert not model.dynamic.weight.is_inference()
    model.dynamic.weight.add_(1)  # an inference tensor would refuse


def test_recurrent_layers_on_meta(path: Path) -> None:
    saved = nn.ModuleList([nn.LSTM(4, 3, batch_first=True), nn.GRU(3, 2)])
    zeropoint.save(saved, path)
    with torch.device("meta"):
        model = nn.ModuleList([nn.LSTM(4, 3, batch_first=True), nn.GRU(3, 2)])
    loaded = zeropoint.load(path, model)
    x = torch.randn(2, 5, 4)
    assert_same_bits(loaded[0](x)[0], saved[0](x)[0])  # type: ignore[index]


def test_transformer_layer_in_its_fast_path(path: Path) -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
        return nn.TransformerEncoder(layer, 2).eval()

    quantized = zeropoint.quantize(encoder())
    zeropoint.save(quantized, path)
    loaded = zeropoint.load(path, encoder())
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert_same_bits(
            loaded(x, src_key_padding_mask=mask), quantized(x, src_key_padding_mask=mask)
        )


def test_tied_linears_share_their_integers_again(path: Path) -> None:
    def model() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    quantized: Any = zeropoint.quantize(model())
    assert same_memory(quantized[0].weight, quantized[1].weight)
    zeropoint.save(quantized, path)
    info = zeropoint.inspect_checkpoint(path)
    assert info.aliases == {f"1.{k}": f"0.{k}" for k in ("weight", "scale", "zero_point")}
    separate = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for target in (model(), separate):
        loaded: Any = zeropoint.load(path, target)
        assert_same_state(loaded, quantized)
        for key in ("weight", "scale", "zero_point"):
            assert same_memory(getattr(loaded[0], key), getattr(loaded[1], key))
        assert not same_memory(loaded[0].bias, loaded[1].bias)


def test_parameter_tied_to_a_buffer(path: Path) -> None:
    def model(tied: bool) -> Any:
        model = nn.Linear(3, 2)
        model.register_buffer("copy", model.weight.detach() if tied else torch.zeros(2, 3))
        return model

    zeropoint.save(model(True), path)
    assert zeropoint.inspect_checkpoint(path).aliases == {"copy": "weight"}
    loaded = zeropoint.load(path, model(False))
    assert isinstance(loaded.weight, nn.Parameter)
    assert type(loaded.copy) is Tensor
    assert same_memory(loaded.weight, loaded.copy)


def test_overlapping_views_are_saved_each(path: Path) -> None:
    model = nn.Module()
    whole = torch.arange(6.0)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[2:])
    model.register_buffer("first_half", whole[:3])
    model.register_buffer("other_half", whole[3:])
    model.register_buffer("square", whole[:4].view(2, 2))
    model.register_buffer("turned", whole[:4].view(2, 2).t())
    zeropoint.save(model, path)
    assert zeropoint.inspect_checkpoint(path).aliases == {}
    loaded: Any = copy.deepcopy(model)
    loaded.whole.zero_()
    zeropoint.load(path, loaded)
    assert_same_state(loaded, model)
    assert same_memory(loaded.part, loaded.whole[2:]), "the model's own views stay"


def test_file_without_ties_into_a_model_with_them(path: Path) -> None:
    separate: Any = untied(float_zoo())
    zeropoint.save(separate, path)
    model = float_zoo()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=r"'head.weight'.*ties it to 'embed.weight'"):
        zeropoint.load(path, model)
    assert fingerprint(model) == before
    with torch.no_grad():
        separate.head.weight.copy_(separate.embed.weight)
    zeropoint.save(separate, path)
    zeropoint.load(path, model)
    assert_same_state(model, separate)


def test_double_of_a_tied_tensor_is_verified_as_well(path: Path) -> None:
    separate: Any = untied(float_zoo())
    with torch.no_grad():
        separate.head.weight.copy_(separate.embed.weight)
    zeropoint.save(separate, path)
    data = bytearray(path.read_bytes())
    info = zeropoint.inspect_checkpoint(path).tensors["head.weight"]
    data[8 + int.from_bytes(data[:8], "little") + info.begin] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'head.weight'.*altered"):
        zeropoint.load(path, float_zoo())


def test_tensors_longer_than_a_chunk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (container, writer):
        monkeypatch.setattr(module, "CHUNK_BYTES", 7)
    zeropoint.save(quantized_zoo(), path)
    zeropoint.inspect_checkpoint(path)
    assert_same_state(zeropoint.load(path, float_zoo(1)), quantized_zoo())


def test_any_safetensors_reader_reads_it(zoo: Path) -> None:
    state = quantized_zoo().state_dict()
    with safe_open(zoo, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "zeropoint"
    assert metadata["version"] == "1"
    tensors = safetensors.torch.load_file(zoo)
    aliases = json.loads(metadata["aliases"])
    assert tensors.keys() | aliases.keys() == state.keys()
    for name in tensors:
        assert digest_of(tensors[name]) == digest_of(state[name]), name
        assert digest_of(tensors[name]) == json.loads(metadata["sha256"])[name]


def test_rewritten_by_the_safetensors_package(zoo: Path) -> None:
    with safe_open(zoo, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(zoo), zoo, metadata)
    assert_same_state(zeropoint.load(zoo, float_zoo(1)), quantized_zoo())


def test_inspect(path: Path) -> None:
    zeropoint.save(quantized_zoo(), path, metadata={"model": "zoo", "note": "ü"})
    info = zeropoint.inspect_checkpoint(path)
    assert info.verified
    assert info.file_bytes == path.stat().st_size
    assert info.metadata == {"model": "zoo", "note": "ü"}
    assert sorted(info.layers) == sorted(QUANTIZED)
    assert info.layers["chain.0"] == native.LayerInfo("static", 6, 6, False, True)
    assert info.layers["weight_only"] == native.LayerInfo("weight-only", 5, 6, True)
    assert info.aliases["head.weight"] == "embed.weight"
    assert info.tensors["empty"].shape == (0, 3)
    assert info.tensors["scalar"].shape == ()
    assert json.loads(json.dumps(info.to_dict()))["tensors"]["low.weight"]["dtype"] == "BF16"


def test_inspect_without_verifying_reads_the_header_only(zoo: Path) -> None:
    data = bytearray(zoo.read_bytes())
    data[-1] ^= 1
    zoo.write_bytes(data)
    assert not zeropoint.inspect_checkpoint(zoo, verify=False).verified
    with pytest.raises(CheckpointError, match="altered"):
        zeropoint.inspect_checkpoint(zoo)


# Golden bytes

GOLDEN = HERE / "golden" / "native_v1.safetensors"


def test_files_of_version_1_keep_loading() -> None:
    from golden.make_native_v1 import architecture, inputs, layers

    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    model = zeropoint.load(GOLDEN, architecture())
    assert {n: digest_of(t) for n, t in model.state_dict().items()} == expected["state"]
    for name, layer in layers(model).items():
        output = layer(inputs(layer.in_features))
        assert output.view(torch.int32).tolist() == expected["outputs"][name], name
    assert zeropoint.inspect_checkpoint(GOLDEN).to_dict()["layers"] == expected["layers"]


def test_version_1_is_still_what_is_written(path: Path) -> None:
    """Once this differs on purpose, the version must change."""
    from golden.make_native_v1 import METADATA, model

    zeropoint.save(model(), path, metadata=METADATA)
    assert path.read_bytes() == GOLDEN.read_bytes()
