"""Checkpoints with embedding tables: version 3 of the format."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from checkpoints import digest_of, fingerprint, save_bytes
from commands import fails, ok
from hostile.embedding_files import header_files, value_files
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    CheckpointError,
    LayerRecipe,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantSpec,
    Recipe,
    int4,
)
from zeropoint.formats.native import EmbeddingInfo

HERE = Path(__file__).parent
IDS = torch.tensor([[0, 8], [3, 5]])
INT8 = Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT8)
SPECS = [
    WEIGHT_INT8,
    WEIGHT_INT4,
    QuantSpec(8, False, False, PerTensor()),
    QuantSpec(3, granularity=PerChannel(0)),
    QuantSpec(5, False, False, PerGroup(5), torch.float16),
    QuantSpec(8, False, False, PerGroup(4)),
    int4(None),
]


class Language(nn.Module):
    def __init__(self, tied: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 6, padding_idx=2, dtype=dtype)
        self.inner = nn.Linear(6, 6, dtype=dtype)
        self.head = nn.Linear(6, 9, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed_tokens(ids)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    a, b = got.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in b:
        assert_same_bits(a[name], b[name], name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(spec: QuantSpec, dtype: Any, path: Path) -> None:
    recipe = Recipe(LayerRecipe("dynamic"), embeddings=spec)
    model: Any = zeropoint.quantize(Language(False, dtype), recipe)
    zeropoint.save(model, path)
    with torch.device("meta"):
        on_meta = Language(False, dtype)
    quantized = zeropoint.quantize(Language(False, dtype), INT8)
    for into in (Language(False, dtype), quantized, model, on_meta):
        loaded: Any = zeropoint.load(path, into)
        assert_same_state(loaded, model)
        assert loaded.embed_tokens.padding_idx == 2
        assert loaded.embed_tokens.output_dtype == dtype
        assert_same_bits(loaded(IDS), model(IDS))
    info = zeropoint.inspect_checkpoint(path)
    assert info.version == "3"
    assert info.layers["embed_tokens"] == EmbeddingInfo.of(model.embed_tokens)
    assert json.loads(json.dumps(info.to_dict()))["layers"]["embed_tokens"]["kind"] == "embedding"


@pytest.mark.parametrize("spec", [WEIGHT_INT8, WEIGHT_INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False], ids=["into a tied model", "into an untied one"])
def test_a_shared_table_is_written_once_and_stays_shared(
    spec: QuantSpec, tied: bool, path: Path
) -> None:
    recipe = Recipe(LayerRecipe("dynamic", spec), embeddings=spec)
    model: Any = zeropoint.quantize(Language(), recipe)
    zeropoint.save(model, path)
    info = zeropoint.inspect_checkpoint(path)
    assert set(info.aliases) == {f"head.{key}" for key in ("weight", "scale", "zero_point")}
    loaded: Any = zeropoint.load(path, Language(tied))
    assert loaded.head.weight is loaded.embed_tokens.weight
    assert loaded.head.scale is loaded.embed_tokens.scale
    assert_same_bits(loaded(IDS), model(IDS))


def test_only_files_with_tables_are_version_3(path: Path) -> None:
    model = Language(tied=False)
    for recipe, version in ((Recipe(LayerRecipe("dynamic")), "1"), (INT8, "3")):
        zeropoint.save(zeropoint.quantize(model, recipe), path)
        assert zeropoint.inspect_checkpoint(path).version == version
    zeropoint.save(zeropoint.quantize(model, "int4"), path)
    assert zeropoint.inspect_checkpoint(path).version == "2"


def test_a_model_that_is_a_table(path: Path) -> None:
    table = QuantizedEmbedding.from_embedding(nn.Embedding(5, 4))
    zeropoint.save(table, path)
    loaded = zeropoint.load(path, nn.Embedding(5, 4))
    assert type(loaded) is QuantizedEmbedding
    assert_same_state(loaded, table)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


class Own(QuantizedEmbedding):
    pass


def hooked() -> nn.Embedding:
    embedding = nn.Embedding(9, 6)
    embedding.register_forward_hook(lambda *_: None)
    return embedding


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(8, 6), "num_embeddings is 8 in the model, 9 in the file"),
        (lambda: nn.Embedding(9, 12), "embedding_dim is 12 in the model, 6 in the file"),
        (lambda: QuantizedEmbedding(9, 12, bits=4), "embedding_dim is 12 in the model"),
        (
            lambda: nn.Embedding(9, 6, dtype=torch.bfloat16),
            "dtype is bfloat16 in the model, float32",
        ),
        (lambda: QuantizedEmbedding(9, 6).half(), "dtype is float16 in the model, float32 in"),
        (lambda: nn.Linear(6, 9), "a quantized embedding, but the model has a Linear there"),
        (lambda: QuantizedLinear(6, 9), "but the model has a QuantizedLinear there"),
        (lambda: nn.EmbeddingBag(9, 6), "but the model has a EmbeddingBag there"),
        (lambda: nn.Embedding(9, 6, max_norm=1.0), "has a max_norm"),
        (lambda: Scaled(9, 6), "Scaled has a forward, parametrizations or state of its own"),
        (lambda: Own(9, 6), "the model has a Own of its own there"),
        (hooked, "has hooks, which the quantized layer would drop"),
    ],
)
def test_models_that_do_not_fit(make: Any, reason: str, path: Path) -> None:
    zeropoint.save(
        nn.ModuleDict({"t": QuantizedEmbedding.from_embedding(nn.Embedding(9, 6))}), path
    )
    model = nn.ModuleDict({"t": make()})
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=f"layer 't': .*{reason}"):
        zeropoint.load(path, model)
    assert fingerprint(model) == before


def test_layers_and_tables_are_not_taken_for_each_other(path: Path) -> None:
    model = nn.ModuleDict({"t": nn.Linear(6, 9, bias=False)})
    zeropoint.save(zeropoint.quantize(model), path)
    with pytest.raises(CheckpointError, match="a quantized Linear, but the model has a Embedding"):
        zeropoint.load(path, nn.ModuleDict({"t": nn.Embedding(9, 6)}))
    with pytest.raises(CheckpointError, match="but the model has a QuantizedEmbedding there"):
        zeropoint.load(path, nn.ModuleDict({"t": QuantizedEmbedding(9, 6)}))
    zeropoint.save(model, path)
    with pytest.raises(CheckpointError, match=r"quantized in the model .*float in the file"):
        zeropoint.load(path, nn.ModuleDict({"t": QuantizedEmbedding(9, 6)}))


def test_models_that_are_not_saved(path: Path) -> None:
    with pytest.raises(CheckpointError, match="Own is a subclass of QuantizedEmbedding"):
        zeropoint.save(nn.Sequential(Own(9, 6)), path)
    table = QuantizedEmbedding(9, 6, bits=4)
    table.scale[3] = 0
    with pytest.raises(CheckpointError, match="positive and finite, got 0"):
        zeropoint.save(table, path)
    table.scale[3] = 1
    table.zero_point[0] = 16
    with pytest.raises(CheckpointError, match=r"within \[0, 15\], got 16"):
        zeropoint.save(table, path)
    odd = QuantizedEmbedding(9, 5, bits=4)
    odd.weight[4, 2] = 0x10
    with pytest.raises(CheckpointError, match="bits after a row's last code must be zero"):
        zeropoint.save(odd, path)
    assert not path.exists()


# A file without a model


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_quantized_to_the_same_bytes(
    spec: QuantSpec, dtype: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeropoint.formats.streaming, "BLOCK_BYTES", 50)  # a row or two at a time
    model = Language(False, dtype)
    recipe = Recipe(LayerRecipe("dynamic"), embeddings=spec)
    plain = path.with_name("float")
    safetensors.torch.save_file(model.state_dict(), plain)
    summary = zeropoint.quantize_file(plain, path, recipe)
    assert summary.embeddings == {"embed_tokens": spec}
    assert set(summary.quantized) == {"inner", "head"}
    quantized = zeropoint.quantize(model, recipe)
    assert path.read_bytes() == save_bytes(quantized, path.parent)
    loaded: Any = zeropoint.load(path, Language(False, dtype))
    assert_same_bits(loaded(IDS), quantized(IDS))


def test_what_is_left_in_a_file(path: Path) -> None:
    plain = path.with_name("float")
    tensors = {
        "embed.weight": torch.randn(9, 6),
        "embed_proj.weight": torch.randn(9, 6),
        "embed_proj.bias": torch.randn(9),
        "wpe.weight": torch.randn(4, 6),
        "embed_scaled.weight": torch.randn(4, 6),
        "embed_scaled.scale": torch.randn(4),
        "fc.weight": torch.randn(3, 6),
    }
    safetensors.torch.save_file(tensors, plain)
    summary = zeropoint.quantize_file(plain, path, INT8, exclude="wpe")
    assert list(summary.embeddings) == ["embed"]
    assert list(summary.quantized) == ["fc"]
    assert summary.embeddings_left == {
        "wpe": "excluded by 'wpe'",
        "embed_proj": "it has a bias, so it is no embedding",
        "embed_scaled": "the file has a tensor 'embed_scaled.scale' of its own",
    }
    assert summary.left == {}
    summary = zeropoint.quantize_file(plain, path, INT8, include="fc")
    assert summary.embeddings == {}
    assert summary.embeddings_left["embed"] == "not in include"
    summary = zeropoint.quantize_file(plain, path, "int8-dynamic")
    assert "embedding table by its name" in summary.left["embed"]
    assert summary.embeddings == summary.embeddings_left == {}


def test_a_tied_table_of_a_file_stays(path: Path) -> None:
    model = Language()
    plain = path.with_name("float")
    safetensors.torch.save_model(model, str(plain))  # notes the tie
    summary = zeropoint.quantize_file(plain, path, INT8)
    assert "its weight is tied" in str({**summary.left, **summary.embeddings_left})
    loaded: Any = zeropoint.load(path, Language())
    assert loaded.head.weight is loaded.embed_tokens.weight
    # As Hugging Face writes them: the head is not in the file.
    state = {name: t for name, t in model.state_dict().items() if name != "head.weight"}
    safetensors.torch.save_file(state, plain)
    zeropoint.quantize_file(plain, path, INT8)
    with pytest.raises(CheckpointError, match=r"head.weight': missing from the file"):
        zeropoint.load(path, Language())
    zeropoint.quantize_file(plain, path, INT8, exclude="embed_tokens")
    zeropoint.load(path, Language())


# The command line


def make() -> nn.Module:
    torch.manual_seed(0)
    return Language()


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = ok(
        "quantize", "test_embedding_formats:make", "--to", "int4", "--embeddings", "int4", "-oq"
    )
    assert "2 of 2 Linear layers and 1 of 1 embeddings" in text
    assert "embed_tokens  shares the weight of head" in text
    shown = ok("inspect", "q")
    assert "version 3" in shown
    assert [w for w in shown.splitlines() if "embedding" in w and "9 × 6" in w and "4 bits" in w]
    text = ok("quantize", "test_embedding_formats:make", "--to", "int8-dynamic", "-oq")
    assert "embeddings" not in text
    error = fails("quantize", "x:y", "--to", "int4", "--embeddings", "int3", "--out", "q", code=2)
    assert "--embeddings must be one of int8, int4, got 'int3'" in error


def test_recipe_file_with_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(None, embeddings=WEIGHT_INT8)
    Path("r.json").write_text(json.dumps(recipe.to_dict()))
    safetensors.torch.save_file(Language(tied=False).state_dict(), "float.safetensors")
    text = ok("quantize", "float.safetensors", "--to", "r.json", "--out", "q.safetensors")
    assert "0 of 2 Linear layers and 1 of 1 embeddings" in text


def test_a_table_is_no_layer_to_explain(path: Path) -> None:
    from zeropoint.formats.one_layer import load_layer

    zeropoint.save(zeropoint.quantize(Language(False), INT8), path)
    load_layer(path, "inner")
    with pytest.raises(CheckpointError, match="layer 'embed_tokens': an embedding table, not a"):
        load_layer(path, "embed_tokens")


# Files that must be refused


def small_model() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(5, 6), "linear": nn.Linear(6, 2)})


def _good() -> bytes:
    model = small_model()
    model["table"] = QuantizedEmbedding.from_embedding(
        model["table"], int4(4, scale_dtype=torch.float32)
    )
    model["linear"] = QuantizedLinear.from_linear(model["linear"])
    with tempfile.TemporaryDirectory() as folder:
        return save_bytes(model, Path(folder))


HEADERS = {name: (data, reason) for name, data, reason in header_files(_good())}
VALUES = {name: (data, reason) for name, data, reason in value_files(_good())}


def test_the_good_file_is_good(path: Path) -> None:
    path.write_bytes(_good())
    assert zeropoint.inspect_checkpoint(path).layers["table"].bits == 4
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

GOLDEN = HERE / "golden" / "native_v3.safetensors"


def test_files_of_version_3_keep_loading() -> None:
    from golden.make_native_v3 import architecture

    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    model: Any = zeropoint.load(GOLDEN, architecture())
    assert {n: digest_of(t) for n, t in model.state_dict().items()} == expected["state"]
    assert model["tied"].weight is model["head"].weight
    for name, rows in expected["rows"].items():
        assert digest_of(model[name](torch.arange(7))) == rows, name
    assert zeropoint.inspect_checkpoint(GOLDEN).to_dict()["layers"] == expected["layers"]
