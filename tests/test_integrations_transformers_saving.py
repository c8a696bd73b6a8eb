"""Integers are never saved as if they were float weights, whoever put them into the model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropoint
from bits import assert_same_bits
from zeropoint import WEIGHT_INT8, QuantizedEmbedding, QuantizedLinear, Recipe
from zeropoint.compat import quantize_dynamic
from zeropoint.replace import replace_modules

pytest.importorskip("transformers", "5.0")

from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from zeropoint.integrations.transformers import ZeropointConfig, make_savable

TOKENS = torch.arange(2, 20).reshape(2, 9)
REFUSED = r"save_pretrained must not write .*make_savable\(model\) first"


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16)
    return BertForSequenceClassification(config).eval()


QUANTIZED = {
    "quantize": lambda m: zeropoint.quantize(m),
    "in place": lambda m: zeropoint.quantize(m, inplace=True),
    "table": lambda m: zeropoint.quantize(m, Recipe(None, embeddings=WEIGHT_INT8)),
    "one layer": lambda m: replace_modules(
        m, {"classifier": zeropoint.QuantizedLinear.from_linear(m.classifier)}
    ),
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_refused_until_it_is_made_savable(how: str, tmp_path: Path) -> None:
    model = QUANTIZED[how](bert())
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=REFUSED):
            each.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    make_savable(model).save_pretrained(tmp_path / "saved")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_bits(again(TOKENS).logits.detach(), model(TOKENS).logits.detach())


def test_refused_in_a_process_that_knows_nothing_of_the_integration(tmp_path: Path) -> None:
    code = """
        import sys, transformers, zeropoint
        model = transformers.BertModel(transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8))
        try:
            zeropoint.quantize(model).save_pretrained(sys.argv[1])
        except ValueError as error:
            print("make_savable" in str(error), "zeropoint.integrations" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "refused")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr
    assert not (tmp_path / "refused").exists()


def test_refused_where_a_checkpoint_was_loaded_into_it(tmp_path: Path) -> None:
    zeropoint.save(zeropoint.quantize(bert()), tmp_path / "model.safetensors")
    model = zeropoint.load(tmp_path / "model.safetensors", bert())
    with pytest.raises(ValueError, match=REFUSED):
        model.save_pretrained(tmp_path / "refused")


def put(model: Any, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


WORDS = "bert.embeddings.word_embeddings"
PLACED = {
    "in place": lambda m: zeropoint.quantize(m.bert.encoder.layer[0], inplace=True),
    "a part": lambda m: put(m, "bert.pooler", zeropoint.quantize(m.bert.pooler)),
    "a layer": lambda m: put(m, "classifier", QuantizedLinear.from_linear(m.classifier)),
    "a table": lambda m: put(
        m, WORDS, QuantizedEmbedding.from_embedding(m.get_submodule(WORDS), WEIGHT_INT8)
    ),
}


@pytest.mark.parametrize("how", PLACED)
def test_refused_where_a_part_was_quantized_by_itself(how: str, tmp_path: Path) -> None:
    model = bert()
    PLACED[how](model)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=REFUSED):
            each.save_pretrained(tmp_path / "refused")
    assert not list((tmp_path / "refused").glob("*.safetensors"))
    torch.save(model.state_dict(), tmp_path / "state.pt")  # as ever
    make_savable(model).save_pretrained(tmp_path / "saved")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_bits(again(TOKENS).logits.detach(), model(TOKENS).logits.detach())


def test_a_part_quantized_afterwards_gets_into_the_table(tmp_path: Path) -> None:
    model = make_savable(zeropoint.quantize(bert(), include="classifier"))
    zeropoint.quantize(model.bert.pooler, inplace=True)
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again.bert.pooler.dense, QuantizedLinear)
    assert_same_bits(again(TOKENS).logits.detach(), model(TOKENS).logits.detach())


@pytest.mark.parametrize(
    ("savable", "message"),
    [
        (False, r"float weights: with layers of zeropoint\.compat"),
        (True, "a LinearPackedParams cannot be saved in a transformers folder"),
    ],
    ids=["floats", "a savable model"],
)
def test_layers_of_compat_are_refused(savable: bool, message: str, tmp_path: Path) -> None:
    model = bert()
    if savable:
        model = make_savable(zeropoint.quantize(model, include="classifier"))
    quantize_dynamic(model.bert.pooler, inplace=True)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    state = model.state_dict()  # as ever
    assert state["bert.pooler.dense._packed_params.weight"].dtype == torch.int8


def test_refused_within_another_model_as_in_sentence_transformers(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = bert().bert

    model = zeropoint.quantize(Encoder())
    with pytest.raises(ValueError, match=REFUSED):
        model.auto_model.save_pretrained(tmp_path / "refused")
    make_savable(model.auto_model).save_pretrained(tmp_path / "saved")
    AutoModel.from_pretrained(tmp_path / "saved")


def test_a_part_of_a_model_is_saved_as_one(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "float")
    loaded = BertForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config=ZeropointConfig()
    )
    loaded.save_pretrained(tmp_path / "whole")
    models = {
        "quantized": loaded,
        "made": make_savable(zeropoint.quantize(bert())),
        "read": BertForSequenceClassification.from_pretrained(tmp_path / "whole"),
    }
    for name, model in models.items():
        model.bert.save_pretrained(tmp_path / name)
        again = BertModel.from_pretrained(tmp_path / name)
        expected = model.bert(TOKENS).last_hidden_state
        assert_same_bits(again(TOKENS).last_hidden_state.detach(), expected.detach(), name)
        model.save_pretrained(tmp_path / f"{name} after")  # with its own table of layers again
        head = BertForSequenceClassification.from_pretrained(tmp_path / f"{name} after")
        assert_same_bits(head(TOKENS).logits.detach(), model(TOKENS).logits.detach(), name)


def test_what_holds_no_integers_is_saved_as_ever(tmp_path: Path) -> None:
    model = bert()
    zeropoint.quantize(model)  # a copy
    model.save_pretrained(tmp_path / "float")
    zeropoint.prepack_model(model).save_pretrained(tmp_path / "packed")  # saves floats
    for name in ("float", "packed"):
        again = BertForSequenceClassification.from_pretrained(tmp_path / name)
        assert_same_bits(again.classifier.weight, model.classifier.weight)
    quantized = zeropoint.quantize(model, include="classifier")
    floats = {"classifier": quantized.classifier.dequantize()}
    replace_modules(quantized, floats, inplace=True).save_pretrained(tmp_path / "back")
    made = make_savable(zeropoint.quantize(model))
    made.dequantize()
    made.save_pretrained(tmp_path / "dequantized")
    made.bert.save_pretrained(tmp_path / "dequantized body")
    assert not hasattr(AutoModel.from_pretrained(tmp_path / "dequantized body"), "hf_quantizer")


def test_other_methods_of_the_model_work_as_before() -> None:
    model = zeropoint.quantize(bert())
    assert model.to(torch.bfloat16)(TOKENS).logits.dtype == torch.bfloat16
    assert model.float().dtype == torch.float32
