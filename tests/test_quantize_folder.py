"""Models quantized from their folders: the same bits as in memory, whatever goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zeropoint
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    CheckpointError,
    LayerRecipe,
    Recipe,
    blocks,
    sources,
)
from zeropoint.recipes import TABLES

transformers = pytest.importorskip("transformers")

INT4 = LayerRecipe("dynamic", WEIGHT_INT4, method=("awq", "gptq"))
INT4_TABLE = Recipe(INT4, embeddings=TABLES["int8"])
STATIC = LayerRecipe("static", WEIGHT_INT8, method=("smooth", "bias-correction"))
TABLE = Recipe(LayerRecipe("dynamic", WEIGHT_INT4, method="clip"), embeddings=TABLES["int8"])


def llama(folder: Path, **more: Any) -> Path:
    """bfloat16, tied, in shards."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": True, **more},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "llama", max_shard_size="20KB")
    assert len(list((folder / "llama").glob("*.safetensors"))) > 3
    return folder / "llama"


def bert(folder: Path) -> Path:
    """float32, one file."""
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    return folder / "bert"


def t5(folder: Path) -> Path:
    """Blocks that do not hand on their output alone."""
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4
    )
    torch.manual_seed(2)
    transformers.T5EncoderModel(config).save_pretrained(folder / "t5")
    return folder / "t5"


def tokens() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (3, n), generator=g)} for n in (5, 9, 9)]


def in_memory(folder: Path, recipe: Any, data: Any, **patterns: Any) -> nn.Module:
    model = sources.load_model(str(folder)).model
    return zeropoint.quantize(model, recipe, calibration=data, **patterns)


CASES = [
    (llama, "int8-dynamic", {}),
    (llama, INT4, {}),
    (llama, INT4, {"include": ["*.mlp.*", "lm_head"], "exclude": "*.layers.1.*"}),
    (llama, STATIC, {}),
    (llama, TABLE, {}),
    (llama, INT4_TABLE, {}),
    (llama, Recipe(STATIC, embeddings=TABLES["int4"]), {}),
    (bert, "int8-static", {}),
    (bert, INT4, {}),
    (t5, INT4, {}),
]


@pytest.mark.parametrize(("make", "recipe", "patterns"), CASES)
def test_same_bits_as_in_memory(
    tmp_path: Path, make: Any, recipe: Any, patterns: dict[str, Any]
) -> None:
    folder, out = make(tmp_path), tmp_path / "out.safetensors"
    data = tokens() if zeropoint.sources.needs_calibration(zeropoint.get_recipe(recipe)) else None
    summary = zeropoint.quantize_folder(folder, out, recipe, calibration=data, **patterns)
    expected = in_memory(folder, recipe, data, **patterns)
    zeropoint.save(expected, tmp_path / "expected.safetensors")
    assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert summary == expected.quantization
    assert len(summary.quantized) > 8
    assert [p.name for p in tmp_path.glob("*.unfinished")] == []
    loaded = zeropoint.load(out, sources.load_model(str(folder)).model)
    for a, b in zip(loaded.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [llama, bert])
def test_blocks_run_by_themselves_although_the_model_would_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    heads, told = [], []
    inputs, holds_for = blocks.Chain.inputs, blocks.Chain.holds_for

    def noting_head(self: Any, name: str, data: Any) -> Any:
        heads.append(name)
        return inputs(self, name, data)

    def noting_answer(self: Any, data: Any) -> bool:
        told.append(holds_for(self, data))
        return told[-1]

    monkeypatch.setattr(blocks.Chain, "inputs", noting_head)
    monkeypatch.setattr(blocks.Chain, "holds_for", noting_answer)
    folder = make(tmp_path)
    zeropoint.quantize_folder(folder, tmp_path / "q", INT4, calibration=tokens())
    assert heads == ["model.layers.0" if make is llama else "encoder.layer.0"]
    assert told == [True]
    before, after = (json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "q"))
    assert before.get("use_cache") == after.get("use_cache")


@pytest.mark.parametrize("recipe", [INT4, INT4_TABLE], ids=["float tables", "int8 tables"])
def test_folder_for_transformers(tmp_path: Path, recipe: Any) -> None:
    import zeropoint.integrations.transformers

    folder, out = llama(tmp_path), tmp_path / "Llama-3.1-int4"
    out.mkdir()  # empty
    zeropoint.quantize_folder(folder, out, recipe, calibration=tokens())
    expected = in_memory(folder, recipe, tokens())
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tokens()[0]["input_ids"]
    assert torch.equal(again(ids).logits, expected(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert getattr(again.lm_head, "bits", None) == (8 if recipe is INT4_TABLE else None)
    with pytest.raises(FileExistsError, match="no empty folder"):
        zeropoint.quantize_folder(folder, out, INT4, calibration=tokens())
    with pytest.raises(ValueError, match="quantized already, by zeropoint"):
        zeropoint.quantize_folder(out, tmp_path / "q")


# Interruptions

KILLED = """
import json, os, signal, sys
sys.path[:0] = [sys.argv[3]]
import test_quantize_folder as cases
import zeropoint
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # once, not in every child
from zeropoint import methods
from zeropoint.formats import native, parts, writer

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
made = []

def run(out):
    zeropoint.quantize_folder(folder, out, cases.INT4, calibration=cases.tokens())

def killing(owner, name, when):
    original, calls = getattr(owner, name), []
    def call(*args, **more):
        calls.append(0)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)
    setattr(owner, name, call)

def in_child(work):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

def killed(*where):
    def work():
        killing(*where)
        run(out)
    unfinished = Path(f"{out}.unfinished")
    status = in_child(work)
    held = sorted(p.name for p in unfinished.glob("part-*"))
    return [status, held, sum(p.name.endswith(".tmp") for p in unfinished.glob(".*"))]

def resumed():
    count = []
    original = methods.quantize_weight
    def counting(*args, **more):
        count.append(0)
        return original(*args, **more)
    methods.quantize_weight = counting
    run(out)
    out.with_suffix(".count").write_text(str(len(count)))

found = {
    "whole": in_child(lambda: run(out.with_name("whole.safetensors"))),
    "killed": [
        killed(methods, "quantize_weight", 3),      # in the first block
        killed(methods, "quantize_weight", 7 + 4),  # in the second
        killed(writer.Writer, "_finish", 1),        # while the second is written
        killed(methods, "quantize_weight", 7 + 1),  # in the third, on the way of the second
        killed(native, "write_checkpoint", 1),      # when all is made
        killed(writer.Writer, "_finish", 1),        # while the model is written
    ],
    "resumed": in_child(resumed),
}
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder, out = llama(tmp_path), tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(out), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a fork has no threads
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["whole"], found["resumed"]) == (0, 0), done.stderr
    statuses, parts, leftovers = zip(*found["killed"], strict=True)
    assert set(statuses) == {signal.SIGKILL}
    assert [len(names) for names in parts] == [0, 1, 1, 2, 4, 4]
    assert leftovers[2] == leftovers[5] == 1  # so that there was something to clean up
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert out.with_suffix(".count").read_text() == "0"  # all was there
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["llama", "out.count", "out.safetensors", "whole.safetensors"]


class StoppedError(Exception):
    pass


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose quantization stopped in the second block."""
    folder, calls = llama(tmp_path), []
    original = zeropoint.methods.quantize_weight

    def stopping(*args: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == 10:
            raise StoppedError
        return original(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(zeropoint.methods, "quantize_weight", stopping)
        with pytest.raises(StoppedError):
            zeropoint.quantize_folder(
                folder, tmp_path / "q.safetensors", INT4, calibration=tokens()
            )
    assert (tmp_path / "q.safetensors.unfinished" / "part-00000.safetensors").is_file()
    assert not (tmp_path / "q.safetensors").exists()
    return folder


def test_what_was_begun_with_something_else_is_not_gone_on_with(stopped: Path) -> None:
    out, more = stopped.parent / "q.safetensors", {"calibration": tokens()}
    other = LayerRecipe("weight-only", WEIGHT_INT4, method=("awq", "gptq"))
    with pytest.raises(ValueError, match=r"another recipe; begin anew"):
        zeropoint.quantize_folder(stopped, out, other, **more)
    with pytest.raises(ValueError, match=r"another exclude and calibration;"):
        zeropoint.quantize_folder(stopped, out, INT4, exclude="*.q_proj", calibration=tokens()[:1])
    shard = next(iter(stopped.glob("*.safetensors")))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(ValueError, match=r"another model;"):
        zeropoint.quantize_folder(stopped, out, INT4, **more)
    zeropoint.quantize_folder(stopped, out, other, **more, resume=False)
    zeropoint.save(in_memory(stopped, other, tokens()), stopped.parent / "r.safetensors")
    assert out.read_bytes() == (stopped.parent / "r.safetensors").read_bytes()


def test_a_damaged_part_is_told_from_a_sound_one(stopped: Path) -> None:
    part = stopped.parent / "q.safetensors.unfinished" / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        zeropoint.quantize_folder(
            stopped, stopped.parent / "q.safetensors", INT4, calibration=tokens()
        )


def test_two_at_once_are_refused(stopped: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    unfinished = stopped.parent / "q.safetensors.unfinished"
    with (unfinished / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="in use: another process"):
            zeropoint.quantize_folder(
                stopped, stopped.parent / "q.safetensors", INT4, calibration=tokens(), resume=False
            )
    assert (unfinished / "part-00000.safetensors").is_file()


# Folders that are refused, with nothing left behind


def refuse(folder: Path, error: type[Exception], says: str, **more: Any) -> None:
    out = folder.parent / "q.safetensors"
    with pytest.raises(error, match=says):
        zeropoint.quantize_folder(folder, out, **more)
    assert [p for p in folder.parent.iterdir() if p != folder] == []


def test_truncated_shard(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(folder, CheckpointError, rf"{shard.name}: .*truncated: the data ends after")


def test_shard_or_tensor_of_the_index_missing(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[2]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard, {"format": "pt"})
    refuse(folder, CheckpointError, f"tensor '{name}': lacks what model.safetensors.index.json")
    shard.unlink()
    refuse(folder, CheckpointError, f"'{shard.name}' is missing")


def test_weights_that_the_model_has_missing(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    says = r"no weights for 1 tensors of the model \(encoder.layer.1.output.dense.weight\)"
    refuse(folder, ValueError, says)


def test_weights_that_the_model_lacks_are_told(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"more.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"does not have \(more.weight\): left out"):
        zeropoint.quantize_folder(folder, tmp_path / "q.safetensors")


def test_weights_that_loading_converts_are_told(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with pytest.warns(UserWarning, match="of the weights are in memory: transformers converts"):
        zeropoint.quantize_folder(folder, tmp_path / "q.safetensors")


def test_nothing_is_left_of_what_could_not_begin(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    refuse(folder, ValueError, "calibration must be given", recipe=INT4)
    refuse(folder, ValueError, "calibration was given", calibration=tokens())
    refuse(folder, TypeError, "iterable of batches", recipe=INT4, calibration=tokens()[0])
    refuse(folder, TypeError, "plain values", recipe=INT4, calibration=[{"input_ids": object()}])
    with pytest.warns(UserWarning, match="nothing was quantized"):
        refuse(folder, ValueError, "nothing was quantized, so", exclude="*")
    shard = sorted(folder.glob("*.safetensors"))[2]
    tensors = load_file(shard)
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[name][1, 1] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    refuse(folder, ValueError, f"layer '{name.removesuffix('.weight')}': its weight holds NaN")
    shutil.rmtree(folder)
    folder.mkdir()
    refuse(folder, FileNotFoundError, "no folder with a config.json")
