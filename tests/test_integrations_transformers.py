"""transformers: what is loaded computes what was saved, bit for bit, and nothing else is loaded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeropoint
from zeropoint import CheckpointError, LayerRecipe, QuantizedLinear, Recipe

transformers = pytest.importorskip("transformers", "5.0")
safetensors = pytest.importorskip("safetensors.torch")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.quantizers import HfQuantizer  # noqa: E402

from zeropoint.integrations.transformers import ZeropointConfig, make_savable  # noqa: E402

TOKENS = torch.arange(2, 20).reshape(2, 9)
LM = {
    "vocab_size": 64,
    "hidden_size": 40,  # no multiple of a group
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, LlamaForCausalLM(LlamaConfig(**LM, tie_word_embeddings=False)))


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, LlamaForCausalLM(LlamaConfig(**LM, tie_word_embeddings=True)))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, BertForSequenceClassification(BertConfig(**ENCODER)))


def saved(factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    folder = factory.mktemp("float")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)  # as initialized, outputs hardly depend on the layers
    model.save_pretrained(folder)
    return folder


def sha256(output: Tensor) -> str:
    return hashlib.sha256(output.detach().double().numpy().tobytes()).hexdigest()


def integers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear)
        for key, buffer in module.named_buffers()
    }


def assert_same(model: nn.Module, other: nn.Module) -> None:
    held, again = integers(model), integers(other)
    assert held.keys() == again.keys()
    assert held
    for name, tensor in held.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe",
    [
        "int8-dynamic",
        "int8-weight-only",
        "int4",
        Recipe(
            LayerRecipe("dynamic"), (("*.mlp.*", LayerRecipe("weight-only", zeropoint.int4())),)
        ),
        LayerRecipe("dynamic", method="hadamard"),
    ],
    ids=["int8-dynamic", "int8-weight-only", "int4", "mixed", "rotated"],
)
def test_loaded_back_the_same_bits(
    recipe: Any, dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    config = ZeropointConfig(recipe)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert_same(model, again)
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_quantizes_as_zeropoint_does(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=ZeropointConfig("int4"))
    other = zeropoint.quantize(AutoModelForCausalLM.from_pretrained(llama), "int4")
    assert_same(model, other)
    assert len(model.quantization.quantized) == 15


def test_scales_stay_float32_in_bfloat16(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=ZeropointConfig(), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    for other in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        layer = other.model.layers[0].mlp.up_proj
        assert layer.scale.dtype == torch.float32
        assert other.model.norm.weight.dtype == other(TOKENS).logits.dtype == torch.bfloat16


def test_scales_stay_what_they_are_where_a_model_keeps_modules_in_float32(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ZeropointConfig("int4")  # its scales are bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"up_proj"})
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_files_hold_integers_and_config_says_what_they_are(llama: Path, tmp_path: Path) -> None:
    config = ZeropointConfig("int8-dynamic")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    model.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert (tensors[f"{name}.weight"].dtype, tensors[f"{name}.weight"].shape) == (
        torch.int8,
        (72, 40, 1),
    )
    assert torch.equal(tensors[f"{name}.weight"][..., 0], model.get_submodule(name).weight)
    held = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert held["quant_method"] == "zeropoint"
    assert Recipe.from_dict(held["recipe"]) == zeropoint.RECIPES["int8-dynamic"]
    assert held["layers"].keys() == model.quantization.quantized.keys()
    assert ZeropointConfig.from_dict(held).to_dict() == held


def test_generates_the_same(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=ZeropointConfig())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    output = model.generate(TOKENS, **options)
    assert output.shape == (2, 15)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(TOKENS, **options), output
    )


def test_saved_again_after_loading(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=ZeropointConfig("int4"))
    model.save_pretrained(tmp_path / "1")
    AutoModelForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_tied_head_stays_tied_and_float(tied_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_llama, quantization_config=ZeropointConfig())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, again):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_tied_head_quantized_where_it_is_named(tied_llama: Path, tmp_path: Path) -> None:
    config = ZeropointConfig(include=["lm_head", "*.mlp.*"])
    model = AutoModelForCausalLM.from_pretrained(tied_llama, quantization_config=config)
    assert isinstance(model.lm_head, QuantizedLinear)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert torch.equal(model.model.embed_tokens.weight, again.model.embed_tokens.weight)
    again.tie_weights()  # as transformers does when embeddings are resized
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_bert_decoder_bias_and_embedding_ties(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = saved(tmp_path_factory, BertForMaskedLM(BertConfig(**ENCODER)))
    model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=ZeropointConfig())
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_layers_of_one_weight_share_their_integers_again(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    model = make_savable(zeropoint.quantize(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = (layer.mlp.up_proj for layer in again.model.layers)
    assert first.weight is second.weight
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_layer_used_twice(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    model = make_savable(zeropoint.quantize(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_merged_experts_stay_float_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    config = MixtralConfig(**LM, num_local_experts=2, num_experts_per_tok=2)
    folder = saved(tmp_path_factory, MixtralForCausalLM(config))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=ZeropointConfig())
    model.save_pretrained(tmp_path)
    # Merged as in the model: taking tensors apart would part integers from their scales.
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith("experts.gate_up_proj") for name in tensors) == 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_model_that_looks_at_the_dtype_of_a_weight(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    # T5 casts its hidden states to that of "wo", unless it is int8, and keeps "wo" in float32.
    if not hasattr(HfQuantizer, "get_new_dtype"):
        pytest.skip("this transformers casts the integers of such modules to float32")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    folder = saved(tmp_path_factory, T5ForConditionalGeneration(config))
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    for options in ({}, {"recipe": "int4", "modules_to_not_convert": "wo"}):
        model = AutoModelForSeq2SeqLM.from_pretrained(
            folder, quantization_config=ZeropointConfig(**options)
        )
        model.save_pretrained(tmp_path)
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert sha256(model(**inputs).logits) == sha256(again(**inputs).logits)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder, quantization_config=ZeropointConfig("int4")
    )
    with pytest.raises(TypeError, match="floating-point"):
        model(**inputs)


def test_model_without_head_from_one_with_it_and_back(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        bert, quantization_config=ZeropointConfig()
    )
    model.save_pretrained(tmp_path / "head")
    body = AutoModel.from_pretrained(tmp_path / "head")
    assert isinstance(body.encoder.layer[0].intermediate.dense, QuantizedLinear)
    expected = sha256(model.bert(TOKENS).last_hidden_state)
    assert sha256(body(TOKENS).last_hidden_state) == expected
    body.save_pretrained(tmp_path / "body")
    assert (
        sha256(AutoModel.from_pretrained(tmp_path / "body")(TOKENS).last_hidden_state) == expected
    )
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body")
    assert sha256(head.bert(TOKENS).last_hidden_state) == expected


@pytest.mark.parametrize("module", ["lm_head", "layers.0", "model.layers.0", "mlp"])
def test_modules_to_not_convert(module: str, llama: Path, tmp_path: Path) -> None:
    config = ZeropointConfig(modules_to_not_convert=[module])
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    left = {"lm_head": 1, "layers.0": 7, "model.layers.0": 7, "mlp": 6}[module]
    assert len(model.quantization.left) == left
    assert all(f".{module}." in f".{name}." for name in model.quantization.left)
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_exclude_takes_patterns(llama: Path) -> None:
    config = ZeropointConfig(exclude=["*.up_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert set(model.quantization.left) == {
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("argument", ["include", "exclude", "modules_to_not_convert"])
def test_names_of_nothing_are_refused(argument: str, llama: Path) -> None:
    with pytest.raises(ValueError, match=f"{argument}.*nothing_like_it"):
        AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=ZeropointConfig(**{argument: "nothing_like_it"})
        )


def test_calibration_comes_with_the_config_and_is_not_kept(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration"):
        AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=ZeropointConfig("int8-static")
        )
    config = ZeropointConfig("int8-static", calibration=[{"input_ids": TOKENS}])
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert model.config.quantization_config.calibration is None
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert sha256(model(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_one_config_for_several_models(llama: Path, bert: Path) -> None:
    config = ZeropointConfig()  # Auto classes would copy it
    first = LlamaForCausalLM.from_pretrained(llama, quantization_config=config)
    second = BertForSequenceClassification.from_pretrained(bert, quantization_config=config)
    assert config.layers is None
    tables = [model.config.quantization_config.layers for model in (first, second)]
    assert not tables[0].keys() & tables[1].keys()


def test_model_quantized_elsewhere(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    plan = zeropoint.quantize(model, "int4", exclude="*.query")
    assert make_savable(plan) is plan
    plan.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(plan, again)
    assert sha256(plan(TOKENS).logits) == sha256(again(TOKENS).logits)


def test_what_cannot_be_saved(bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(bert)
    with pytest.raises(ValueError, match="no quantized layers"):
        make_savable(model)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        make_savable(zeropoint.quantize(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="unpack_model"):
        make_savable(zeropoint.prepack_model(model))


def test_dequantize(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=ZeropointConfig("int8-weight-only")
    )
    expected = model(TOKENS).logits
    model.dequantize()
    assert not integers(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


# What must not load.


def quantized_folder(source: Path, folder: Path, recipe: str = "int8-dynamic") -> Path:
    config = ZeropointConfig(recipe)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)
    return folder


def test_does_not_load_without_this_package(llama: Path, tmp_path: Path) -> None:
    folders = [
        str(quantized_folder(llama, tmp_path / recipe, recipe))
        for recipe in ("int8-dynamic", "int8-weight-only", "int4")
    ]
    code = (
        "import sys, transformers\n"
        f"for folder in {folders!r}:\n"
        "    try:\n"
        "        transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except RuntimeError:\n"
        "        print('refused', 'zeropoint' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused False\n" * 3, done.stdout + done.stderr
    assert "got zeropoint" in done.stderr  # what is missing is named


def change_tensor(folder: Path, name: str, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    value = change(tensors.pop(name))
    if value is not None:
        tensors[name] = value
    safetensors.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("weight", lambda t: None, "missing"),
        ("scale", lambda t: None, "missing"),
        ("zero_point", lambda t: None, "missing"),
        ("weight", lambda t: t.to(torch.int16), "must be torch.int8"),
        ("zero_point", lambda t: t.float(), "must be torch.int32"),
        ("scale", lambda t: -t, "positive"),
        ("scale", lambda t: t * torch.nan, "positive"),
        ("zero_point", lambda t: t + 1000, "within"),
    ],
)
def test_damaged_tensors_are_refused(
    key: str, change: Any, match: str, llama: Path, tmp_path: Path
) -> None:
    if match.startswith("must be") and not hasattr(HfQuantizer, "get_new_dtype"):
        pytest.skip("this transformers casts what it reads before anyone is asked")
    folder = quantized_folder(llama, tmp_path)
    change_tensor(folder, f"model.layers.1.mlp.up_proj.{key}", change)
    with pytest.raises(CheckpointError, match=match) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert error.value.layer == "model.layers.1.mlp.up_proj"


def test_tensor_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = quantized_folder(llama, tmp_path)
    change_tensor(folder, "lm_head.weight", lambda t: t[:-1].clone())
    with pytest.raises((RuntimeError, CheckpointError), match=r"size|shape"):
        AutoModelForCausalLM.from_pretrained(folder)


def change_config(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("layers"),
        lambda c: c.update(layers=[]),
        lambda c: c.update(layers={"lm_head": 3}),
        lambda c: c.update(layers={"of.another.model": c["layers"]["lm_head"]}),
        lambda c: c.update(version="2"),
        lambda c: c.update(recipe="int9"),
        lambda c: c.update(unheard_of=1),
        lambda c: c["layers"]["lm_head"].update(mode="fast"),
        lambda c: c["layers"]["lm_head"].update(in_features=41),
        lambda c: c["layers"]["lm_head"].update(bias=True),
        lambda c: c["layers"]["lm_head"]["weight"].update(bits=1 << 40),
        lambda c: c["layers"].update({"model.norm": c["layers"]["lm_head"]}),
        lambda c: c["layers"].pop("lm_head"),
        lambda c: c.update(tied={"lm_head": "model.layers.0.mlp.up_proj"}),
    ],
)
def test_wrong_tables_are_refused(change: Any, llama: Path, tmp_path: Path) -> None:
    folder = quantized_folder(llama, tmp_path)
    change_config(folder, change)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_zeropoint_imports_neither_transformers_nor_other_heavy_packages() -> None:
    heavy = ("transformers", "matplotlib", "sklearn", "scipy", "jinja2", "onnx", "pandas")
    code = (
        f"import zeropoint, sys; print([m for m in {heavy!r} if m in sys.modules])\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    import zeropoint.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, missing = done.stdout.splitlines()
    assert imported == "[]"
    assert "zeropoint[transformers]" in missing


@pytest.mark.model
def test_minilm(tmp_path: Path) -> None:
    from models import minilm_folder

    folder = minilm_folder()
    config = ZeropointConfig("int8-dynamic")
    model = AutoModel.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path, max_shard_size="10MB")
    again = AutoModel.from_pretrained(tmp_path)
    outputs = [each(TOKENS + 1000).last_hidden_state for each in (model, again)]
    assert sha256(outputs[0]) == sha256(outputs[1])
    expected = AutoModel.from_pretrained(folder)(TOKENS + 1000).last_hidden_state
    assert nn.functional.cosine_similarity(outputs[0], expected, dim=-1).mean() > 0.99


@pytest.mark.parametrize("embeddings", [None, zeropoint.WEIGHT_INT8], ids=["float", "int8"])
def test_sentence_transformers_passes_the_config_on(embeddings: Any, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from models import minilm_folder

    config = ZeropointConfig(Recipe(LayerRecipe("dynamic"), embeddings=embeddings))
    encoder = st.SentenceTransformer(
        str(minilm_folder()), model_kwargs={"quantization_config": config}, device="cpu"
    )
    encoder.save(str(tmp_path))
    again = st.SentenceTransformer(str(tmp_path), device="cpu")
    texts = ["one answer", "at the limit"]
    assert integers(again)
    tables = [m for m in again.modules() if isinstance(m, zeropoint.QuantizedEmbedding)]
    assert len(tables) == (0 if embeddings is None else 3)
    assert (encoder.encode(texts) == again.encode(texts)).all()
