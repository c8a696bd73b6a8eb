"""transformers folders that are damaged or lie: read as they are, or refused; nothing is run."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import folder_files
from zeropoint import WEIGHT_INT4, CheckpointError, LayerRecipe, Recipe, int4

transformers = pytest.importorskip("transformers", "5.0")

from safetensors import SafetensorError  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from zeropoint.integrations.transformers import ZeropointConfig  # noqa: E402

TOKENS = torch.arange(2, 8)[None]
# transformers' own checks raise RuntimeError, OSError and SafetensorError.
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, SafetensorError)
RECIPE = Recipe(LayerRecipe("weight-only", WEIGHT_INT4), embeddings=WEIGHT_INT4)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("folder")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(path)
    config = ZeropointConfig(RECIPE)
    model = LlamaForCausalLM.from_pretrained(path, quantization_config=config)
    model.save_pretrained(path)
    return path


def copied(good: Path) -> Path:
    folder = Path("folder").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return folder


def state(model: Any) -> dict[str, list[float]]:
    """What it holds; scales of 16 bits may have become 32, which changes none."""
    return {name: t.double().tolist() for name, t in model.state_dict().items()}


def test_the_good_folder_loads(good: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(copied(good))
    assert model(TOKENS).logits.isfinite().all()
    assert model.lm_head.weight is model.model.embed_tokens.weight


# What the config may hold instead of what it holds; and the files, byte by byte.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)
NEAR = st.sampled_from(
    [0, 1, 2, 4, 8, 16, True, None, "float32", "lm_head", "model.embed_tokens", "embedding", {}]
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_table_of_layers_is_refused_or_loads_the_same(data: st.DataObject, good: Path) -> None:
    expected = state(LlamaForCausalLM.from_pretrained(good))
    folder = copied(good)
    config = json.loads((folder / "config.json").read_text())
    at: Any = config["quantization_config"]
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key in sorted(at) if isinstance(at[key], dict) and at[key]]
        if inner:
            at = at[data.draw(st.sampled_from(inner))]
    key = data.draw(st.sampled_from(sorted(at)))
    if data.draw(st.booleans()):
        at[key] = data.draw(NEAR | VALUES)
    else:
        del at[key]
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = LlamaForCausalLM.from_pretrained(folder)
    except REFUSALS:
        return
    if getattr(model, "hf_quantizer", None) is not None:
        assert state(model) == expected


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_file_is_read_or_refused(at: float, flip: int, cut: bool, good: Path) -> None:
    folder = copied(good)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    where = int(at * 2 * length) if at < 0.5 else length + int((2 * at - 1) * (len(data) - length))
    bad = bytearray(data[:where] if cut else data)
    if not cut:
        bad[where] ^= flip
    file.write_bytes(bytes(bad))
    try:
        model = LlamaForCausalLM.from_pretrained(folder)
    except REFUSALS:
        return
    # There are no checksums: other integers may be read, but never other types and shapes.
    for name, tensor in LlamaForCausalLM.from_pretrained(good).state_dict().items():
        other = model.state_dict()[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        if name.endswith("scale"):
            assert (other > 0).all()


@pytest.mark.parametrize("claimed", ["bfloat16", "float16"])
def test_scales_are_never_rounded_to_a_type_that_the_table_claims(
    claimed: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    config = ZeropointConfig(LayerRecipe("dynamic", int4(4, scale_dtype=torch.float32)))
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    table["quantization_config"]["layers"]["lm_head"]["weight"]["scale_dtype"] = claimed
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=rf"lm_head.scale.*must be torch.{claimed}"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["pickle_only", "pickle_by_the_weights_name", "truncated"])
def test_pickles_are_not_run_and_damage_is_refused(case: str, good: Path) -> None:
    folder = copied(good)
    folder_files.FOLDERS[case][0](folder)
    with pytest.raises((*REFUSALS, pickle.UnpicklingError)):
        LlamaForCausalLM.from_pretrained(folder)
    assert not folder_files.MARK.exists()


def test_code_in_the_folder_is_not_imported(good: Path) -> None:
    folder = copied(good)
    (folder / "code.py").write_text(f"open({str(folder_files.MARK)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    config["quantization_config"]["auto_map"] = {"quantizer": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(REFUSALS):
        LlamaForCausalLM.from_pretrained(folder)
    assert not folder_files.MARK.exists()
