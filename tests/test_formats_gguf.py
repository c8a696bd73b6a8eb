"""GGUF: equal to gguf.quants.dequantize, written and read again, hostile files refused."""

from __future__ import annotations

import contextlib
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import zeropoint
from zeropoint import LayerRecipe, PerGroup, QuantSpec
from zeropoint.formats import gguf as zp_gguf
from zeropoint.formats.container import CheckpointError
from zeropoint.formats.contents import Contents
from zeropoint.formats.gguf_file import open_gguf

gguf = pytest.importorskip("gguf", reason="needs zeropoint[gguf]")
KINDS = gguf.GGMLQuantizationType
HALF = torch.float16
SPECS = {
    "Q8_0": QuantSpec(8, True, True, PerGroup(32), HALF),
    "Q4_0": QuantSpec(4, True, True, PerGroup(32), HALF),
    "Q4_1": QuantSpec(4, False, False, PerGroup(32), HALF),
}
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5, bias=False))


def quantized(kind: str) -> nn.Module:
    return zeropoint.quantize(net(), LayerRecipe("weight-only", SPECS[kind]))


def theirs(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name → type and floats, as the package reads the file."""
    return {
        t.name: (t.tensor_type.name, np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(path).tensors
    }


def file_of(path: Path, tensors: dict[str, tuple[np.ndarray, Any]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def floats(rows: int = 7, columns: int = 512) -> np.ndarray:
    data = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    data[1, 32:64] = 0  # a block without a scale
    data[2, :32] = np.abs(data[2, :32])  # and so a negative one of Q4_0
    data[3, :32] = -np.abs(data[3, :32])
    return data


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_are_layers_with_the_packages_floats(kind: str, tmp_path: Path) -> None:
    blocks = gguf.quants.quantize(floats(), KINDS[kind])
    bias = np.arange(7, dtype=np.float32)
    norm = np.ones((3,), dtype=np.float32)
    path = file_of(
        tmp_path / "m.gguf",
        {
            "blk.0.weight": (blocks, KINDS[kind]),
            "blk.0.bias": (bias, KINDS.F32),
            "norm.weight": (norm, KINDS.F32),
        },
    )
    contents = zp_gguf.read(path)
    layer = contents.layers["blk.0"]
    expected = gguf.quants.dequantize(blocks, KINDS[kind])
    assert np.array_equal(layer.weight.dequantize().numpy(), expected)
    assert (layer.weight.bits, layer.weight.group_size) == (int(kind[1]), 32)
    assert layer.weight.scale.dtype == HALF
    assert layer.bias is not None
    assert layer.bias.tolist() == bias.tolist()
    assert list(contents.tensors) == ["norm.weight"]
    assert contents.dequantized == {}


K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
OTHERS = ["Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("kind", K_QUANTS + OTHERS)
def test_other_types_are_the_packages_floats(kind: str, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (4, 512 // block * size), dtype=np.uint8)
    path = file_of(tmp_path / "m.gguf", {"a.weight": (blocks, KINDS[kind])})
    contents = zp_gguf.read(path)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, KINDS[kind])
    got = contents.tensors["a.weight"]
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected, equal_nan=True)
    assert list(contents.dequantized) == ["a.weight"]
    assert contents.layers == {}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_written_exactly_and_read_again(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    path = tmp_path / "m.gguf"
    assert zp_gguf.write(model, path, architecture="mlp", metadata={"n": 3, "who": "me"}) == ()
    read = theirs(path)
    for name in ("0", "2"):
        got_kind, weight = read[f"{name}.weight"]
        assert got_kind == kind
        expected = model.get_submodule(name).weight_qtensor().dequantize()
        assert np.array_equal(weight, expected.numpy())
    assert read["0.bias"][0] == "F32"
    loaded = zp_gguf.read(path).load_into(net())
    assert torch.equal(loaded(X), model(X))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    with open_gguf(path) as file:
        assert file.metadata["general.architecture"] == "mlp"
        assert (file.metadata["n"], file.metadata["who"]) == (3, "me")
    zeropoint.save(model, tmp_path / "m.safetensors")
    zp_gguf.write(tmp_path / "m.safetensors", tmp_path / "second.gguf")
    assert all(
        np.array_equal(v[1], read[k][1]) for k, v in theirs(tmp_path / "second.gguf").items()
    )


def test_q4_1_rounds_the_minimum_and_gives_the_integers_back(tmp_path: Path) -> None:
    model, path = quantized("Q4_1"), tmp_path / "m.gguf"
    zp_gguf.write(model, path)
    kind, weight = theirs(path)["0.weight"]
    assert kind == "Q4_1"
    q = model[0].weight_qtensor()
    minimum = (q.scale.float() * q.zero_point).amax()
    change = np.abs(weight - q.dequantize().numpy()).max()
    assert 0 < change <= minimum * 2**-11
    as_floats = zp_gguf.read(path)
    assert np.array_equal(as_floats.tensors["0.weight"].numpy(), weight)
    assert set(as_floats.dequantized) == {"0.weight", "2.weight"}
    loaded = zp_gguf.read(path, q4_1="integers").load_into(net())
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    foreign = gguf.quants.quantize(floats(), KINDS.Q4_1)
    file_of(path, {"a.weight": (foreign, KINDS.Q4_1)})
    with pytest.raises(CheckpointError, match="layer 'a': a Q4_1 minimum that is no whole number"):
        zp_gguf.read(path, q4_1="integers")
    with pytest.raises(ValueError, match="q4_1 must be 'floats' or 'integers'"):
        zp_gguf.read(path, q4_1=1)  # type: ignore[arg-type]


def test_plain_tensors_keep_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        str(i): torch.arange(6).reshape(2, 3).to(dtype)
        for i, dtype in enumerate(
            (torch.float32, HALF, torch.bfloat16, torch.float64, torch.int8, torch.int64)
        )
    } | {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    source = Contents(Path("m"), "zeropoint", {}, tensors)
    zp_gguf.write(source, tmp_path / "m.gguf")
    read = zp_gguf.read(tmp_path / "m.gguf").tensors
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.reshape(tensor.shape or (1,))), name


def test_what_no_type_holds_is_refused_or_written_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for recipe, reason in (
        ("int8-dynamic", "8 bits, no groups"),
        (LayerRecipe("weight-only", zeropoint.int4(16)), "4 bits, groups of 16"),
        (LayerRecipe("weight-only", zeropoint.int4(32, scale_dtype=torch.float32)), "float16"),
        (LayerRecipe("weight-only", QuantSpec(8, False, False, PerGroup(32), HALF)), "zero points"),
    ):
        model = zeropoint.quantize(net(), recipe)
        with pytest.raises(CheckpointError, match=f"layer '0': no GGUF type holds it: .*{reason}"):
            zp_gguf.write(model, path)
        left = zp_gguf.write(model, path, unfit="floats")
        assert any("the integers of '0'" in text for text in left)
        assert any("dynamic activations of '0'" in t for t in left) == (recipe == "int8-dynamic")
        expected = model[0].weight_qtensor().dequantize().numpy()
        assert np.array_equal(theirs(path)["0.weight"][1], expected)
        path.unlink()
    with pytest.raises(TypeError, match="metadata must hold strings and numbers, got 'a'"):
        zp_gguf.write(quantized("Q8_0"), path, metadata={"a": []})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="unfit must be"):
        zp_gguf.write(quantized("Q8_0"), path, unfit="")  # type: ignore[arg-type]
    bad = Contents(Path("m"), "zeropoint", {}, {"b": torch.tensor([True])})
    with pytest.raises(CheckpointError, match=r"tensor 'b': GGUF has no torch\.bool"):
        zp_gguf.write(bad, path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    path = tmp_path / "m.gguf"
    path.write_text("old")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="disk full"):
        zp_gguf.write(quantized("Q8_0"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_text() == "old"


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'zeropoint\[gguf\]'"):
        zp_gguf.read("x.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(tensors: int, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


PAD = bytes(64)
ALIGN = text("general.alignment") + u32(4)
HOSTILE = {
    "empty": (b"", "truncated"),
    "magic": (b"GGML" + PAD, "does not begin with GGUF"),
    "version_1": (head(0, version=1), "version 1 "),
    "big_endian": (b"GGUF" + struct.pack(">I", 3) + PAD, "version 50331648"),
    "many_tensors": (head(2**63) + PAD, "twice|truncated"),
    "many_pairs": (head(0, 2**63) + bytes(1000), "twice|truncated"),
    "long_key": (head(0, 1) + u64(2**62) + PAD, "truncated"),
    "key_not_text": (head(0, 1) + u64(2) + b"\xff\xff" + PAD, "not UTF-8"),
    "unknown_value": (head(0, 1) + text("a") + u32(99) + PAD, "unknown type 99"),
    "array_of_arrays": (head(0, 1) + text("a") + u32(9) + u32(9) + u64(1) + PAD, "array of the"),
    "endless_array": (head(0, 1) + text("a") + u32(9) + u32(0) + u64(2**61) + PAD, "truncated"),
    "endless_strings": (head(0, 1) + text("a") + u32(9) + u32(8) + u64(2**61) + PAD, "no room"),
    "key_twice": (head(0, 2) + (text("a") + u32(0) + b"\0") * 2, "'a' occurs twice"),
    "tensor_twice": (head(2) + entry("a", (1,), 0) * 2 + PAD, "tensor 'a': it occurs twice"),
    "dimensions": (head(1) + text("a") + u32(2**31) + PAD, "tensor 'a': .*dimensions"),
    "huge_shape": (head(1) + entry("a", (2**40, 2**40), 0) + PAD, "'a': its shape .*too large"),
    "large_shape": (head(1) + entry("a", (2**40,), 0) + PAD, "tensor 'a': truncated"),
    "offset": (head(1) + entry("a", (1,), 0, 2**63) + PAD, "'a': its data cannot begin"),
    "odd_offset": (head(1) + entry("a", (1,), 0, 7) + PAD, "'a': its data cannot begin"),
    "truncated_data": (head(1) + entry("a", (99,), 0) + PAD, "tensor 'a': truncated"),
    "unknown_type": (head(1) + entry("a", (1,), 999) + PAD, "'a': a type that the gguf package"),
    "blocks": (head(1) + entry("a", (33,), 8) + PAD, "'a': rows of 33 are no whole number of Q8_0"),
    "not_dequantized": (head(1) + entry("a", (256,), 15) + bytes(500), "'a': Q8_K: .*not"),
    "alignment_0": (head(0, 1) + ALIGN + u32(0), "power of two, got 0"),
    "alignment_3": (head(0, 1) + ALIGN + u32(3), "power of two, got 3"),
    "alignment_text": (head(0, 1) + text("general.alignment") + u32(8) + text("x"), "power of two"),
    "nan_scale": (
        head(1) + entry("a.weight", (32, 1), 8) + bytes(25) + b"\xff\x7f" + bytes(32),
        "layer 'a': scale must be positive and finite",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        zp_gguf.read(path)
    assert str(path) in str(caught.value)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        zp_gguf.read(tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "good.gguf"
    zp_gguf.write(quantized("Q4_1"), path)
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 1 << 20), raw=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_any_file_is_read_or_refused(at: int, raw: bytes, cut: bool, good: Path) -> None:
    data = good.read_bytes()
    at %= 600  # the header
    bad = data[:at] if cut else data[:at] + raw + data[at + len(raw) :]
    path = good.parent / "bad.gguf"
    path.write_bytes(bad)
    for q4_1 in ("floats", "integers"):
        with contextlib.suppress(CheckpointError):
            zp_gguf.read(path, q4_1=q4_1)  # type: ignore[arg-type]
