"""Quantizing a file without its model: the same integers, bounded memory, whatever the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from checkpoints import join
from checkpoints import split as split_file
from zeropoint import CheckpointError, LayerRecipe, PerChannel, PerTensor, QuantSpec, Recipe
from zeropoint.formats import container, streaming


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(7, 6, dtype=dtype)
        self.layers = nn.Sequential(
            nn.Linear(6, 50, dtype=dtype), nn.Linear(50, 4, bias=False, dtype=dtype)
        )
        self.norm = nn.LayerNorm(4, dtype=dtype)
        self.conv = nn.Conv1d(4, 4, 1, dtype=dtype)
        self.register_buffer("steps", torch.tensor(3))


def write(path: Path, model: nn.Module, **metadata: str) -> Path:
    safetensors.torch.save_file(model.state_dict(), path, metadata or None)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "float.safetensors", Model())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "quantized.safetensors"


SPECS = [
    QuantSpec(signed=signed, symmetric=symmetric, granularity=granularity)
    for signed in (True, False)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(0))
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_as_quantizing_the_model(
    spec: QuantSpec, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of a few rows, so that a weight is many and the last one is shorter.
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 100)
    model = Model(dtype)
    source, out = write(tmp_path / "a", model), tmp_path / "b"
    recipe = LayerRecipe("weight-only", spec)
    summary = zeropoint.quantize_file(source, out, recipe)
    expected = zeropoint.quantize(model, recipe)
    assert summary.quantized == expected.quantization.quantized  # type: ignore[union-attr]
    loaded = zeropoint.load(out, Model(dtype))
    assert str(loaded) == str(expected)
    for name, tensor in expected.state_dict().items():
        assert_same_bits(loaded.state_dict()[name], tensor, name)


def test_what_is_left_and_why(source: Path, out: Path) -> None:
    recipe = Recipe(LayerRecipe("dynamic"), (("layers.1", None), ("nowhere", None)))
    summary = zeropoint.quantize_file(source, out, recipe)
    assert list(summary.quantized) == ["layers.0"]
    assert summary.left == {
        "layers.1": "the recipe keeps it float",
        "word_embeddings": "an embedding table by its name '*embed*'",
    }
    assert summary.unmatched == ("nowhere",)
    zeropoint.load(out, Model())


def test_include_and_exclude(source: Path, out: Path) -> None:
    summary = zeropoint.quantize_file(source, out, include="layers.*", exclude=["*.1"])
    assert list(summary.quantized) == ["layers.0"]
    assert summary.left == {"layers.1": "excluded by '*.1'", "word_embeddings": "not in include"}
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=f"{argument}: 'norm' matches no 2-D weight"):
            zeropoint.quantize_file(source, out, **{argument: "norm"})
        with pytest.raises(TypeError, match=f"{argument} must hold patterns"):
            zeropoint.quantize_file(source, out, **{argument: [1]})  # type: ignore[list-item]


def test_embedding_taken_for_a_linear_is_refused_by_name(source: Path, out: Path) -> None:
    summary = zeropoint.quantize_file(source, out, exclude=())
    assert "word_embeddings" in summary.quantized
    with pytest.raises(CheckpointError, match=r"layer 'word_embeddings'.*has a Embedding there"):
        zeropoint.load(out, Model())


def test_a_file_of_one_layer(tmp_path: Path, out: Path) -> None:
    model = nn.Linear(3, 2)
    zeropoint.quantize_file(write(tmp_path / "a", model), out)
    assert_same_bits(
        zeropoint.load(out, nn.Linear(3, 2))(torch.ones(3)),
        zeropoint.quantize(model)(torch.ones(3)),
    )


def test_everything_else_is_copied_byte_for_byte(tmp_path: Path, out: Path) -> None:
    tensors = {
        "a.weight": torch.randn(2, 3),
        "int.weight": torch.ones(2, 3, dtype=torch.int32),
        "f8.weight": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "cube.weight": torch.ones(2, 3, 1),
        "zero.weight": torch.ones(0, 3),
        "odd.weight": torch.ones(2, 3),
        "odd.bias": torch.ones(3),
        "own.weight": torch.ones(2, 3),
        "own.scale": torch.ones(2),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "nan": torch.tensor([float("nan")]),
        "empty": torch.ones(3, 0),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a", {"format": "pt", "author": "me"})
    summary = zeropoint.quantize_file(tmp_path / "a", out)
    assert list(summary.quantized) == ["a"]
    assert {name: reason.split(",")[0] for name, reason in summary.left.items()} == {
        "zero": "its weight is empty",
        "odd": "its bias is F32 [3]",
        "own": "the file has a tensor 'own.scale' of its own",
    }
    written = safetensors.torch.load_file(out)
    del tensors["a.weight"]
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (written[name], tensor)]
        assert torch.equal(*raw), name
    assert zeropoint.inspect_checkpoint(out).metadata == {"author": "me"}


def test_ties_noted_by_the_safetensors_package(tmp_path: Path, out: Path) -> None:
    def tied() -> Any:
        model: Any = nn.ModuleDict({k: nn.Linear(4, 4, bias=False) for k in ("a", "b", "c")})
        model.b.weight = model.a.weight
        return model

    model = tied()
    safetensors.torch.save_model(model, str(tmp_path / "a"))
    summary = zeropoint.quantize_file(tmp_path / "a", out)
    assert list(summary.quantized) == ["c"]
    assert summary.left == {"a": "its weight is tied: 'b.weight' is 'a.weight'"}
    separate = nn.ModuleDict({k: nn.Linear(4, 4, bias=False) for k in ("a", "b", "c")})
    for target in (tied(), separate):
        loaded: Any = zeropoint.load(out, target)
        assert loaded.a.weight is loaded.b.weight
        assert torch.equal(loaded.a.weight, model.a.weight)


def test_onto_itself(source: Path) -> None:
    zeropoint.quantize_file(source, source)
    zeropoint.load(source, Model())
    assert list(source.parent.iterdir()) == [source]


def test_a_checkpoint_already(source: Path, out: Path) -> None:
    zeropoint.quantize_file(source, out)
    with pytest.raises(CheckpointError, match="a zeropoint checkpoint already"):
        zeropoint.quantize_file(out, out)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(
    granularity: Any, value: float, tmp_path: Path, out: Path
) -> None:
    model = Model()
    model.layers[1].weight.data[3, 2] = value
    recipe = LayerRecipe("dynamic", QuantSpec(granularity=granularity))
    with pytest.raises(CheckpointError, match=r"layer 'layers.1'.*'layers.1.weight'.*NaN or Inf"):
        zeropoint.quantize_file(write(tmp_path / "a", model), out, recipe)
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_static_needs_a_model(source: Path, out: Path) -> None:
    for recipe in (
        "int8-static",
        LayerRecipe("static"),
        Recipe(None, (("layers.0", LayerRecipe("static")),)),
    ):
        with pytest.raises(ValueError, match="recipe must not be static here"):
            zeropoint.quantize_file(source, out, recipe)
    with pytest.raises(ValueError, match="recipe must be one of"):
        zeropoint.quantize_file(source, out, "int9")


@given(st.data())
def test_altered_source(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Nothing in a float file tells that its data was altered; its structure must hold up still."""
    folder = tmp_path_factory.mktemp("fuzz")
    good = safetensors.torch.save(Model().state_dict())
    head, body = split_file(good)
    if data.draw(st.booleans()):
        bad = bytearray(good)
        at = data.draw(st.integers(0, len(good) - len(body) - 1))
        bad[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        (folder / "a").write_bytes(bad)
    else:
        name = data.draw(st.sampled_from(list(head)))
        head[name] |= data.draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "dtype": st.sampled_from(["F16", "F32", "I64", "U4", "", 1]),
                    "shape": st.lists(st.integers(-1, 2**65), max_size=4),
                    "data_offsets": st.lists(st.integers(-1, 2**65), max_size=3),
                },
            )
        )
        (folder / "a").write_bytes(join(head, body))
    try:
        zeropoint.quantize_file(folder / "a", folder / "b")
    except CheckpointError:
        assert not (folder / "b").exists()
    else:
        zeropoint.inspect_checkpoint(folder / "b")


MEMORY = """
import sys, zeropoint
from zeropoint import LayerRecipe, PerTensor, QuantSpec

def peak_after(source):
    for recipe in "int8-dynamic", LayerRecipe("dynamic", QuantSpec(granularity=PerTensor())):
        zeropoint.quantize_file(source, source + ".out", recipe)
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before = peak_after(sys.argv[1])
print(peak_after(sys.argv[2]) - before)
"""


def write_zeros(path: Path, rows: int) -> None:
    """A Linear's float32 weight and a tensor to copy, both (rows, 1024): holes, not written."""
    nbytes = rows * 1024 * 4
    header = {
        f"{name}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [at, at + nbytes]}
        for name, shape, at in (("a", [rows, 1024], 0), ("b", [rows, 1024, 1], nbytes))
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * nbytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file eight times as large, with tensors of 96 MiB, needs no 24 MiB more.

    Compared with a first file of the same kind, so that what the libraries load and keep for the
    first one, which is the machine's affair, does not count.
    """
    paths = tmp_path / "small", tmp_path / "large"
    for path, rows in zip(paths, (3 << 10, 24 << 10), strict=True):
        write_zeros(path, rows)
    used = int(
        subprocess.run(
            [sys.executable, "-c", MEMORY, *paths],
            env={"PYTHONPATH": str(Path(zeropoint.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    for path in tmp_path.iterdir():
        path.unlink()
    assert used < 24 << 20, f"{used >> 20} MiB more"


def test_writing_streams_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece handed to the writer is longer than a chunk."""
    longest = 0
    original = streaming.Writer.write

    def spy(self: Any, name: str, data: bytes) -> None:
        nonlocal longest
        longest = max(longest, len(data))
        original(self, name, data)

    monkeypatch.setattr(streaming.Writer, "write", spy)
    big: dict[str, Tensor] = {"a.weight": torch.zeros(4096, 1024), "b": torch.zeros(3 << 20)}
    safetensors.torch.save_file(big, tmp_path / "a")
    zeropoint.quantize_file(tmp_path / "a", tmp_path / "b")
    assert 0 < longest <= container.CHUNK_BYTES
