"""transformers folders with embedding tables of integers: the same bits, and ties that stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    CheckpointError,
    LayerRecipe,
    QuantizedEmbedding,
    QuantizedLinear,
    Recipe,
    int4,
)

transformers = pytest.importorskip("transformers", "5.0")
safetensors = pytest.importorskip("safetensors.torch")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.quantizers import HfQuantizer  # noqa: E402

from zeropoint.integrations.transformers import ZeropointConfig, make_savable  # noqa: E402

TOKENS = torch.arange(2, 20).reshape(2, 9)
INT8 = Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT8)
INT4 = Recipe(LayerRecipe("weight-only", WEIGHT_INT4), embeddings=WEIGHT_INT4)
BY_METHODS = Recipe(LayerRecipe("dynamic", WEIGHT_INT4, method=("awq", "gptq")), (), WEIGHT_INT8)
DATA = {"calibration": [{"input_ids": TOKENS}]}
TABLE = "model.embed_tokens"


def folder(path: Path, model: Any) -> Path:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    return path


def llama(path: Path, tied: bool) -> Path:
    sizes = {"vocab_size": 64, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return folder(path, LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("tied"), True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("untied"), False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16)
    return folder(tmp_path_factory.mktemp("bert"), BertForMaskedLM(config))


def quantized(source: Path, recipe: Any = INT8, **options: Any) -> Any:
    config = ZeropointConfig(recipe, **options.pop("config", {}))
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)


def held(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of quantized layers, under every name."""
    return {
        f"{name}.{key}": buffer
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
        for key, buffer in module.named_buffers()
    }


def assert_same(model: Any, other: Any) -> None:
    mine, others = held(model), held(other)
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert_same_bits(tensor, others[name], name)
    assert_same_bits(model(TOKENS)[0].detach(), other(TOKENS)[0].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "recipe",
    [
        INT8,
        INT4,
        Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT4),
        Recipe(None, embeddings=WEIGHT_INT8),
        Recipe(None, embeddings=int4(None)),
    ],
    ids=["int8", "int4", "int8+int4", "tables-int8", "tables-int4"],
)
@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_loaded_back_the_same_bits(
    recipe: Recipe,
    dtype: torch.dtype,
    shape: str,
    tied: Path,
    untied: Path,
    tmp_path: Path,
) -> None:
    source = {"tied": tied, "untied": untied}[shape]
    only = {"include": TABLE} if recipe.default is None else {}  # which unties it
    model = quantized(source, recipe, dtype=dtype, config=only)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    first, second = (m.model.embed_tokens for m in (model, again))
    assert type(first) is type(second)
    if isinstance(first, QuantizedEmbedding):
        assert second.output_dtype == first.output_dtype == dtype
        assert second.padding_idx == first.padding_idx == 0


@pytest.mark.parametrize(
    ("recipe", "config"),
    [(INT8, {}), (INT4, {}), (BY_METHODS, DATA)],
    ids=["int8", "int4", "by methods"],
)
def test_a_tied_head_shares_the_table_and_is_written_once(
    recipe: Recipe, config: dict[str, Any], tied: Path, tmp_path: Path
) -> None:
    model = quantized(tied, recipe, config=config)
    model.save_pretrained(tmp_path / "1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    for each in (model, again):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert each.lm_head.scale is each.model.embed_tokens.scale
        assert each.config.tie_word_embeddings
    names = safetensors.load_file(tmp_path / "1" / "model.safetensors").keys()
    assert f"{TABLE}.weight" in names
    assert not [name for name in names if name.startswith("lm_head")]
    again.save_pretrained(tmp_path / "2")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    again.tie_weights()  # as transformers does by itself at times
    assert_same(model, again)


def test_no_warning_that_a_tied_head_is_newly_initialized(
    tied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantized(tied).save_pretrained(tmp_path)
    capfd.readouterr()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "MISSING" not in capfd.readouterr().err


def test_a_table_by_itself_where_its_tie_is_cut(tied: Path, tmp_path: Path) -> None:
    # The head stays float, and must not get the table's integers for weights.
    model = quantized(tied, INT8, config={"include": [TABLE, "*.mlp.*"]})
    assert isinstance(model.lm_head, nn.Linear)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.tie_weights()
    assert_same(model, again)


def test_table_and_head_of_different_integers(tied: Path, tmp_path: Path) -> None:
    recipe = Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT4)
    model = quantized(tied, recipe, config={"include": [TABLE, "lm_head"]})
    assert (model.lm_head.bits, model.model.embed_tokens.bits) == (8, 4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.tie_weights()
    assert_same(model, again)


def test_a_static_head_of_a_table_keeps_what_is_its_own(tied: Path, tmp_path: Path) -> None:
    recipe = Recipe(LayerRecipe("static"), embeddings=WEIGHT_INT8)
    model = quantized(tied, recipe, config=DATA)
    model.save_pretrained(tmp_path)
    assert "lm_head.input_scale" in safetensors.load_file(tmp_path / "model.safetensors")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_several_tables_and_a_decoder_with_a_bias(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(bert, quantization_config=ZeropointConfig(INT8))
    assert len(model.quantization.embeddings) == 3
    model.save_pretrained(tmp_path / "head")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "head")
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert_same(model, again)
    body = AutoModel.from_pretrained(tmp_path / "head")
    expected = model.bert(TOKENS).last_hidden_state
    assert_same_bits(body(TOKENS).last_hidden_state.detach(), expected.detach())
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    assert_same_bits(again(TOKENS).last_hidden_state.detach(), expected.detach())


def test_rows_come_out_in_the_dtype_that_is_asked_for(untied: Path, tmp_path: Path) -> None:
    model = quantized(untied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rows = again.model.embed_tokens(TOKENS)
    assert_same_bits(rows, model.model.embed_tokens(TOKENS).bfloat16())
    assert again(TOKENS).logits.dtype == torch.bfloat16


def test_modules_to_not_convert_holds_tables(tied: Path) -> None:
    model = quantized(tied, INT8, config={"modules_to_not_convert": ["embed_tokens", "lm_head"]})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    with pytest.raises(ValueError, match="no Linear layer is in a module 'embed_tokens'"):
        quantized(tied, "int8-dynamic", config={"modules_to_not_convert": "embed_tokens"})


def test_model_quantized_elsewhere(bert: Path, tmp_path: Path) -> None:
    model = zeropoint.quantize(AutoModelForMaskedLM.from_pretrained(bert), INT4)
    make_savable(model).save_pretrained(tmp_path)
    assert_same(model, AutoModelForMaskedLM.from_pretrained(tmp_path))


def test_dequantize_gives_a_tied_table_back(tied: Path) -> None:
    model = quantized(tied, Recipe(LayerRecipe("weight-only"), embeddings=WEIGHT_INT8))
    expected = model(TOKENS).logits
    model.dequantize()
    assert not held(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


# What must not load.


def test_does_not_load_without_this_package(bert: Path, tmp_path: Path) -> None:
    folders = []
    for recipe in (INT8, INT4):
        only_tables = Recipe(None, embeddings=recipe.embeddings)
        model = AutoModel.from_pretrained(bert, quantization_config=ZeropointConfig(only_tables))
        folders.append(str(tmp_path / str(len(folders))))
        model.save_pretrained(folders[-1])
    code = (
        "import sys, transformers\n"
        f"for folder in {folders!r}:\n"
        "    try:\n"
        "        transformers.AutoModel.from_pretrained(folder)\n"
        "    except RuntimeError as error:\n"
        "        print('refused', 'zeropoint' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused False\n" * 2, done.stdout + done.stderr


@pytest.fixture(scope="module")
def good(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    quantized(tied, INT4).save_pretrained(path)
    return path


def changed(good: Path, path: Path, tensors: Any = None, config: Any = None) -> Path:
    for file in good.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    if tensors is not None:
        values = safetensors.load_file(path / "model.safetensors")
        tensors(values)
        safetensors.save_file(values, path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        values = json.loads((path / "config.json").read_text())
        config(values["quantization_config"])
        (path / "config.json").write_text(json.dumps(values))
    return path


def test_the_folder_that_the_hostile_ones_are_made_of_loads(good: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(changed(good, tmp_path, lambda t: None, lambda c: None))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda e: e.update(kind="linear"), "kind must be 'embedding'"),
        (lambda e: e.pop("kind"), "exactly the keys"),
        (lambda e: e.update(padding_idx=0), "exactly the keys"),
        (lambda e: e.pop("dtype"), "exactly the keys"),
        (lambda e: e.update(dtype="int8"), "dtype must be one of"),
        (lambda e: e.update(num_embeddings=65), "num_embeddings is 64 in the model, 65"),
        (lambda e: e.update(embedding_dim=-1), "embedding_dim must be an integer from 0"),
        (lambda e: e.update(embedding_dim=1 << 61), "embedding_dim is 40 in the model"),
        (lambda e: e.update(weight="int4"), "weight must be a JSON object"),
        (lambda e: e["weight"].update(bits=1), "bits must be an integer from 2 to 8"),
        (lambda e: e["weight"].update(group_size=0), "group_size must be an integer from 1"),
        (lambda e: e["weight"].update(bits=3), "shape|size"),
        (lambda e: e["weight"].update(group_size=8), "shape|size"),
    ],
)
def test_wrong_entries_are_refused(change: Any, match: str, good: Path, tmp_path: Path) -> None:
    changed(good, tmp_path, config=lambda c: change(c["layers"][TABLE]))
    with pytest.raises((CheckpointError, RuntimeError), match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["layers"].update({TABLE: c["layers"]["lm_head"]}), "has a Embedding there"),
        (lambda c: c["layers"].update({"lm_head": c["layers"][TABLE]}), "has a Linear there"),
        (lambda c: c["layers"].pop(TABLE), "no quantized layer"),
        (lambda c: c.update(tied={}), "lm_head.*missing from the files"),
        (
            lambda c: c["tied"].update(lm_head="model.layers.0.mlp.up_proj"),
            "weight is of another kind",
        ),
        (lambda c: c["tied"].update({TABLE: "lm_head"}), "tied itself|missing"),
        (lambda c: c["tied"].update(lm_head="lm_head"), "tied itself|missing"),
        (lambda c: c.update(tied={"lm_head": 3}), "no quantized layer"),
    ],
)
def test_wrong_tables_are_refused(change: Any, match: str, good: Path, tmp_path: Path) -> None:
    changed(good, tmp_path, config=change)
    with pytest.raises((CheckpointError, RuntimeError, TypeError), match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("weight", None, "missing"),
        ("scale", None, "missing"),
        ("weight", lambda t: t.to(torch.int32), "must be torch.uint8"),
        ("scale", lambda t: -t, "positive"),
        ("scale", lambda t: t * torch.nan, "positive"),
        ("zero_point", lambda t: t + 16, r"within \[0, 15\]"),
        ("zero_point", lambda t: t.float(), "must be torch.uint8"),
        ("weight", lambda t: t[:-1].clone(), "size|shape"),
    ],
)
def test_damaged_tensors_are_refused(
    key: str, change: Any, match: str, good: Path, tmp_path: Path
) -> None:
    if match.startswith("must be") and not hasattr(HfQuantizer, "get_new_dtype"):
        pytest.skip("this transformers casts what it reads before anyone is asked")

    def damage(tensors: dict[str, Tensor]) -> None:
        value = tensors.pop(f"{TABLE}.{key}")
        if change is not None:
            tensors[f"{TABLE}.{key}"] = change(value)

    changed(good, tmp_path, damage)
    with pytest.raises((CheckpointError, RuntimeError), match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_of_other_values_than_the_table_it_is_tied_to(good: Path, tmp_path: Path) -> None:
    def part(tensors: dict[str, Tensor]) -> None:
        for key in ("weight", "scale", "zero_point"):
            tensors[f"lm_head.{key}"] = tensors[f"{TABLE}.{key}"].clone()
        tensors["lm_head.zero_point"] ^= 1

    changed(good, tmp_path, part)
    with pytest.raises(CheckpointError, match=r"lm_head.*tied to .*holds other values"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_scaled_embedding_takes_no_plain_table(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8

    build = LlamaForCausalLM.__init__

    def scaled(self: Any, config: Any) -> None:
        build(self, config)
        self.model.embed_tokens = Scaled(64, 40)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", scaled)
    with pytest.raises(CheckpointError, match="Scaled has a forward"):
        AutoModelForCausalLM.from_pretrained(good)
