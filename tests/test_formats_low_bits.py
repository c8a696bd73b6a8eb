"""Checkpoints of 2 to 8 bits and of groups: version 2 of the format."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import zeropoint
from bits import assert_same_bits
from checkpoints import digest_of, fingerprint, save_bytes
from hostile.low_bit_files import PER_GROUP, header_files, value_files
from zeropoint import (
    CheckpointError,
    LayerRecipe,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedLinear,
    QuantSpec,
    int4,
)

HERE = Path(__file__).parent

SPECS = [
    *(QuantSpec(bits, granularity=PerChannel(0)) for bits in range(2, 8)),
    *(QuantSpec(bits, False, False, PerGroup(7)) for bits in range(2, 9)),
    int4(128, symmetric=True, scale_dtype=torch.bfloat16),
    int4(1, scale_dtype=torch.float16),
    QuantSpec(4, False, False, PerTensor()),
]


def floats(in_features: int = 20, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(in_features, 9), nn.ReLU(), nn.Linear(9, 3, bias=False))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    a, b = got.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in b:
        assert_same_bits(a[name], b[name], name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_round_trip(spec: QuantSpec, mode: Any, path: Path) -> None:
    model: Any = zeropoint.quantize(floats(), LayerRecipe(mode, spec))
    assert model[0].bits == spec.bits
    zeropoint.save(model, path)
    for into in (floats(seed=1), zeropoint.quantize(floats(seed=1)), model):
        loaded: Any = zeropoint.load(path, into)
        assert_same_state(loaded, model)
        x = torch.randn(4, 20)
        assert_same_bits(loaded(x), model(x))
        assert loaded[0].weight_qtensor().spec == model[0].weight_qtensor().spec
    info = zeropoint.inspect_checkpoint(path)
    assert info.version == "2"
    assert info.layers["0"] == zeropoint.formats.native.LayerInfo.of(model[0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_file_is_quantized_to_the_same_bytes(
    spec: QuantSpec, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeropoint.formats.streaming, "BLOCK_BYTES", 200)  # 2 rows at a time
    plain = path.with_name("float")
    safetensors.torch.save_file(floats().state_dict(), plain)
    recipe = LayerRecipe("dynamic", spec)
    zeropoint.quantize_file(plain, path, recipe)
    assert path.read_bytes() == save_bytes(zeropoint.quantize(floats(), recipe), path.parent)


def test_static_and_quantized_output(path: Path) -> None:
    linear = nn.Linear(20, 5)
    layer = QuantizedLinear.from_linear(linear, "static", int4(8), (0.05, 128), (0.1, 100))
    zeropoint.save(layer, path)
    loaded: Any = zeropoint.load(path, nn.Linear(20, 5))
    assert_same_state(loaded, layer)
    q = zeropoint.quantize_per_tensor(torch.randn(3, 20), 0.05, 128, torch.uint8)
    assert_same_bits(loaded(q).int_repr(), layer(q).int_repr())


@pytest.mark.parametrize("sizes", [(5, 0), (0, 3), (0, 0), (1, 1)])
def test_empty_and_one_column_layers(sizes: tuple[int, int], path: Path) -> None:
    layer = QuantizedLinear.from_linear(zeropoint.Linear(*sizes), weight_spec=int4())
    zeropoint.save(layer, path)
    assert_same_state(zeropoint.load(path, zeropoint.Linear(*sizes)), layer)


def test_a_packed_layer_of_the_same_bytes_is_another_layer(path: Path) -> None:
    """20 inputs of 4 bits take as many bytes as 10 of 8: sizes are compared, not shapes."""
    zeropoint.save(QuantizedLinear.from_linear(nn.Linear(20, 5), weight_spec=int4()), path)
    model = QuantizedLinear.from_linear(nn.Linear(10, 5))
    with pytest.raises(CheckpointError, match="in_features is 10 in the model, 20 in the file"):
        zeropoint.load(path, model)


def test_layers_of_version_1_stay_version_1(path: Path) -> None:
    zeropoint.save(zeropoint.quantize(floats()), path)
    assert zeropoint.inspect_checkpoint(path).version == "1"
    mixed = zeropoint.quantize(
        floats(), zeropoint.Recipe(LayerRecipe("dynamic"), (("2", LayerRecipe("dynamic", int4())),))
    )
    zeropoint.save(mixed, path)
    assert zeropoint.inspect_checkpoint(path).version == "2"
    assert_same_state(zeropoint.load(path, floats(seed=1)), mixed)


def test_a_quarter_of_the_bytes(path: Path) -> None:
    model = nn.Linear(1024, 256, bias=False)
    spec = int4(128, scale_dtype=torch.bfloat16)
    zeropoint.save(zeropoint.quantize(model, LayerRecipe("dynamic", spec)), path)
    groups = 256 * 8
    assert 0 < path.stat().st_size - (256 * 512 + groups * 2 + groups) < 1500  # the header


def test_values_out_of_range_are_not_saved(path: Path) -> None:
    def save(key: str, at: Any, value: float, match: str) -> None:
        layer = QuantizedLinear.from_linear(
            nn.Linear(5, 3), weight_spec=int4(2, scale_dtype=torch.float32)
        )
        getattr(layer, key)[at] = value
        with pytest.raises(CheckpointError, match=match):
            zeropoint.save(layer, path)
        assert not path.exists()

    save("zero_point", (2, 1), 16, r"within \[0, 15\], got 16")
    save("scale", (0, 2), 0, "positive and finite, got 0")
    save("weight", (1, -1), 0x10, "bits after a row's last code must be zero")


# Files that must be refused


def small_model() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"four": nn.Linear(5, 3), "three": nn.Linear(5, 2)})


def _good() -> bytes:
    model = small_model()
    model["four"] = QuantizedLinear.from_linear(
        model["four"], weight_spec=int4(2, scale_dtype=torch.float32)
    )
    three = QuantSpec(3, granularity=PerChannel(0))
    model["three"] = QuantizedLinear.from_linear(model["three"], weight_spec=three)
    with tempfile.TemporaryDirectory() as folder:
        return save_bytes(model, Path(folder))


HEADERS = {name: (data, reason) for name, data, reason in header_files(_good())}
VALUES = {name: (data, reason) for name, data, reason in value_files(_good())}


def test_the_good_file_is_good(path: Path) -> None:
    path.write_bytes(_good())
    assert zeropoint.inspect_checkpoint(path).layers["four"].weight() == PER_GROUP
    zeropoint.load(path, small_model())


@pytest.mark.parametrize("name", [*HEADERS, *VALUES])
def test_hostile_file(name: str, path: Path) -> None:
    data, reason = (HEADERS | VALUES)[name]
    path.write_bytes(data)
    model = small_model()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=reason):
        zeropoint.load(path, model)
    assert fingerprint(model) == before, "the model was changed by a file that was refused"
    if name in HEADERS:
        with pytest.raises(CheckpointError, match=reason):
            zeropoint.inspect_checkpoint(path)


# Golden bytes

GOLDEN = HERE / "golden" / "native_v2.safetensors"


def test_files_of_version_2_keep_loading() -> None:
    from golden.make_native_v1 import inputs, layers
    from golden.make_native_v2 import architecture

    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    model = zeropoint.load(GOLDEN, architecture())
    assert {n: digest_of(t) for n, t in model.state_dict().items()} == expected["state"]
    for name, layer in layers(model).items():
        output = layer(inputs(layer.in_features))
        assert output.view(torch.int32).tolist() == expected["outputs"][name], name
    assert zeropoint.inspect_checkpoint(GOLDEN).to_dict()["layers"] == expected["layers"]


def test_version_2_is_still_what_is_written(path: Path) -> None:
    """Once this differs on purpose, the version must change."""
    from golden.make_native_v2 import METADATA, model

    zeropoint.save(model(), path, metadata=METADATA)
    assert path.read_bytes() == GOLDEN.read_bytes()
