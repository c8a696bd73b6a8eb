"""A real model as an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import zeropoint
from commands import ok
from models import load_minilm, load_tokenizer, minilm_folder
from onnx_files import ANY, onnx, onnxruntime, run, tensors
from zeropoint import WEIGHT_INT8, LayerRecipe, Recipe
from zeropoint.formats import onnx as zp_onnx

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]
TEXTS = [
    "The modulo operator yields the remainder from the division of the first argument.",
    "A cat sat on the mat.",
    "Numbers are immutable; once created their value never changes.",
]
SHAPES = ({0: ANY, 1: ANY}, {0: ANY, 1: ANY})


def inputs(texts: list[str]) -> tuple[Tensor, Tensor]:
    batch = load_tokenizer()(texts, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b).min())


@pytest.mark.parametrize(
    ("recipe", "least", "megabytes"),
    [
        # Sums of floats in another order are rounded to other integers here and there; multiplying
        # the float weights by 1 ± 1e-7 does as much.
        ("int8-dynamic", 0.998, 59.5),
        ("int4-weight-only", 0.999999, 55.0),
    ],
)
def test_minilm(recipe: str, least: float, megabytes: float, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    model = zeropoint.quantize(load_minilm(), recipe)
    assert zp_onnx.write(model, file, inputs(TEXTS[:2]), dynamic_shapes=SHAPES) == ()
    x = inputs(TEXTS)
    with torch.no_grad():
        want = model(*x)
    got = run(file, *x)[0]
    assert got.shape == want.shape == (3, 384)
    assert cosine(got, want) > least
    assert cosine(run(file, *inputs(TEXTS[:1]))[0], want[:1]) > least
    held = tensors(file)
    floats = {n for n, (kind, s) in held.items() if kind == "FLOAT" and len(s) == 2 and min(s) > 2}
    # All 36 Linear weights of the encoder are integers; the tables are not quantized here.
    embeddings = "transformer.embeddings"
    assert {n for n in floats if not n.endswith((".scales", ".scales_transposed"))} == {
        f"{embeddings}.word_embeddings.weight",
        f"{embeddings}.position_embeddings.weight",
    }
    integers = [n for n, (kind, s) in held.items() if n.endswith((".transposed", ".blocks"))]
    assert len(integers) == 36
    assert {held[n][0] for n in integers} == {"INT8" if "int8" in recipe else "UINT8"}
    assert file.stat().st_size < megabytes * 1e6


def test_minilm_with_a_quantized_table_on_the_command_line(tmp_path: Path) -> None:
    folder, file, texts = minilm_folder(), tmp_path / "m.onnx", tmp_path / "texts.txt"
    checkpoint = tmp_path / "m.safetensors"
    texts.write_text("\n".join(TEXTS))
    recipe = Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT8)
    model = zeropoint.quantize(load_minilm().transformer, recipe)
    zeropoint.save(model, checkpoint)
    out = ok("convert", checkpoint, file, "--model", folder, "--data", texts)
    assert "Wrote " in out
    session = onnxruntime.InferenceSession(file)
    names = [value.name for value in session.get_inputs()]
    assert {"input_ids", "attention_mask"} <= set(names)
    batch = dict(load_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    hidden = session.run(None, {name: batch[name].numpy() for name in names})[0]
    with torch.no_grad():
        want = model(**batch).last_hidden_state
    got = torch.from_numpy(hidden)
    mask = batch["attention_mask"].bool()
    assert cosine(got[mask], want[mask]) > 0.98
    assert file.stat().st_size < 26e6
    assert onnx.load(file).opset_import[0].version == 21
