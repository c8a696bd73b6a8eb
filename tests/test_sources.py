"""sources: models and data that a string names; nothing is ever unpickled."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zeropoint import Recipe, sources
from zeropoint.recipes import RECIPES, LayerRecipe
from zeropoint.sources import Loaded, load_data, load_model, load_recipe, needs_calibration


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, a: Tensor, *, b: Tensor | None = None) -> Tensor:
        return self.layer(a)


class AnyInputs(nn.Module):
    def forward(self, first: Tensor, **more: Tensor) -> Tensor:
        return first


class Trap:
    """Unpickling this writes a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unpickled"),))


# Models: package.module:factory


def write_module(name: str, text: str) -> None:
    Path(f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{text}")


def test_factory_in_the_current_directory_is_called() -> None:
    write_module("zp_a", "def make():\n    return nn.Linear(3, 2)\n")
    loaded = load_model("zp_a:make")
    assert isinstance(loaded.model, nn.Linear)
    assert not loaded.model.training
    assert loaded.tokenizer is None


def test_factory_in_a_package_and_by_a_dotted_name() -> None:
    Path("zp_pkg").mkdir()
    Path("zp_pkg/__init__.py").touch()
    Path("zp_pkg/nets.py").write_text(
        "from torch import nn\nclass Made:\n    small = staticmethod(lambda: nn.Linear(1, 1))\n"
    )
    assert isinstance(load_model("zp_pkg.nets:Made.small").model, nn.Linear)


def test_module_object_is_taken_as_it_is_and_a_class_is_called() -> None:
    write_module("zp_b", "net = nn.Linear(3, 2)\nclass Net(nn.Sequential):\n    pass\n")
    assert load_model("zp_b:net").model is sys.modules["zp_b"].net
    assert type(load_model("zp_b:Net").model).__name__ == "Net"


def test_same_random_model_each_time_and_random_numbers_left_alone() -> None:
    write_module("zp_c", "def make():\n    return nn.Linear(3, 2)\n")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_model("zp_c:make").model
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first.weight, load_model("zp_c:make").model.weight)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("no_such_module_zp:f", ImportError, "no module 'no_such_module_zp'"),
        ("zp_d.sub:f", ImportError, "no module 'zp_d.sub'"),
        ("zp_d:g", ImportError, "has no 'g'"),
        ("zp_d:number", TypeError, "callable"),
        ("zp_d:wrong", TypeError, "return an nn.Module, got dict"),
        ("zp_needs:f", ImportError, "not_installed_zp"),
        ("nothing", FileNotFoundError, "package.module:factory"),
        ("./nothing", FileNotFoundError, "package.module:factory"),
        ("weights.safetensors", ValueError, "cannot be run"),
    ],
)
def test_names_of_nothing(text: str, error: type[Exception], says: str) -> None:
    write_module("zp_d", "number = 3\ndef f():\n    return nn.Linear(1, 1)\nwrong = dict\n")
    write_module("zp_needs", "import not_installed_zp\n")
    with pytest.raises(error, match=says) as caught:
        load_model(text)
    # A module that exists but lacks something is not called missing itself.
    assert "no module 'zp_needs'" not in str(caught.value)


# Models: Hugging Face folders


def test_folder_that_is_no_model() -> None:
    Path("folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model("folder")


def test_folder_with_pickled_weights_only_is_refused() -> None:
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "bert"}')
    Path("folder/pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_model("folder")
    assert not Path("unpickled").exists()


def test_folder_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, "folder/model.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'zeropoint\[models\]'"):
        load_model("folder")


@pytest.mark.parametrize("name", ["NoSuchModel", "os", "AutoTokenizer", "logging"])
def test_architecture_that_is_no_model_is_refused(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=name):
        sources._architecture(transformers, [name])


# Data


def test_named_tensors_are_batched_as_keywords() -> None:
    a, b = torch.randn(5, 4), torch.arange(5)
    save_file({"a": a, "b": b}, "data.safetensors")
    np.savez("data.npz", a=a.numpy(), b=b.numpy())
    for file in ("data.safetensors", "data.npz"):
        batches: Any = load_data(file, Loaded(TwoInputs()), batch_size=2)
        assert [len(batch["a"]) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat([batch["a"] for batch in batches]), a)
        assert torch.equal(torch.cat([batch["b"] for batch in batches]), b)
        assert batches[0]["b"].dtype == torch.int64


def test_one_tensor_of_another_name_is_the_first_argument() -> None:
    x = torch.randn(3, 4)
    save_file({"features": x}, "data.safetensors")
    np.save("data.npy", x.numpy())
    for file in ("data.safetensors", "data.npy"):
        for model in (TwoInputs(), AnyInputs(), nn.Sequential(nn.Linear(4, 4))):
            (batch,) = load_data(file, Loaded(model))
            assert torch.equal(batch, x)  # type: ignore[arg-type]


def test_one_tensor_of_an_argument_s_name_is_that_argument() -> None:
    save_file({"a": torch.ones(3, 4)}, "data.safetensors")
    (batch,) = load_data("data.safetensors", Loaded(TwoInputs()))
    assert isinstance(batch, dict)


def test_names_that_the_model_does_not_take() -> None:
    save_file({"a": torch.ones(3, 4), "c": torch.ones(3)}, "data.safetensors")
    with pytest.raises(ValueError, match="takes a, b; it does not take 'c'"):
        load_data("data.safetensors", Loaded(TwoInputs()))
    (batch,) = load_data("data.safetensors", Loaded(AnyInputs()))
    assert set(batch) == {"a", "c"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_take_the_model_s_dtype(dtype: torch.dtype) -> None:
    np.save("data.npy", np.ones((2, 4)))
    (batch,) = load_data("data.npy", Loaded(nn.Linear(4, 1, dtype=dtype)))
    assert isinstance(batch, Tensor)
    assert batch.dtype == dtype


def test_limit() -> None:
    np.save("data.npy", np.arange(10.0))
    batches: Any = load_data("data.npy", Loaded(AnyInputs()), batch_size=2, limit=3)
    assert [batch.tolist() for batch in batches] == [[0.0, 1.0], [2.0]]


@pytest.mark.parametrize("file", ["trap.npy", "trap.npz", "raw.npy", "raw.npz"])
def test_pickles_are_never_read(file: str) -> None:
    np.save("trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez("trap.npz", x=np.array([Trap()], dtype=object))
    Path("raw.npy").write_bytes(pickle.dumps(Trap()))
    Path("raw.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=file):
        load_data(file, Loaded(AnyInputs()))
    assert not Path("unpickled").exists()


def test_the_trap_works() -> None:
    pickle.loads(pickle.dumps(Trap()))
    assert Path("unpickled").exists()


def _bad_files() -> None:
    save_file({"a": torch.ones(3, 4), "b": torch.ones(2)}, "lengths.safetensors")
    save_file({"a": torch.tensor(1.0)}, "scalar.safetensors")
    save_file({"a": torch.ones(0, 4)}, "norows.safetensors")
    save_file({}, "nothing.safetensors")
    Path("cut.safetensors").write_bytes(Path("lengths.safetensors").read_bytes()[:20])
    Path("cut.npz").write_bytes(b"PK\3\4")
    Path("empty.npy").touch()
    np.save("text.npy", np.array(["a", "b"]))
    np.save("foreign.npy", np.arange(3, dtype=">i4"))
    Path("data.pt").touch()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("lengths.safetensors", r"one length along dimension 0, got a \(3, 4\), b \(2,\)"),
        ("scalar.safetensors", "one length along dimension 0"),
        ("norows.safetensors", "no rows"),
        ("nothing.safetensors", "no rows"),
        ("cut.safetensors", "not a safetensors file"),
        ("cut.npz", "not a numpy file"),
        ("empty.npy", "not a numpy file"),
        ("text.npy", r"text\.npy"),
        ("foreign.npy", r"foreign\.npy"),
        ("data.pt", r"must end in \.safetensors, \.npz, \.npy, \.txt"),
    ],
)
def test_bad_data(file: str, says: str) -> None:
    _bad_files()
    with pytest.raises(ValueError, match=says):
        load_data(file, Loaded(TwoInputs()))


def test_missing_data_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.npy does not exist"):
        load_data("missing.npy", Loaded(AnyInputs()))


@pytest.mark.parametrize("argument", ["batch_size", "limit"])
def test_counts_below_one(argument: str) -> None:
    np.save("data.npy", np.arange(10.0))
    with pytest.raises(ValueError, match=argument):
        load_data("data.npy", Loaded(AnyInputs()), **{argument: 0})


class Tokenizer:
    """A token a character, by its code."""

    model_max_length = 10**30

    def __call__(self, lines: list[str], truncation: bool, max_length: int) -> Any:
        assert truncation
        tokens = [[ord(c) for c in line[:max_length] if c != "~"] for line in lines]
        return {"input_ids": tokens, "a": tokens, "mask": [[1] * len(t) for t in tokens]}


def text(tokens: Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in tokens.tolist()]


def test_lines_of_text_are_batched_by_length_without_padding() -> None:
    # A line is what ends in a newline; empty ones, and those without tokens, are skipped.
    Path("data.txt").write_text(
        "one\r\n\n  zwölf \u2028x\n \nsix\n~~\nten\nthree", encoding="utf-8"
    )
    batches: Any = load_data("data.txt", Loaded(TwoInputs(), Tokenizer()), batch_size=2)
    # The largest first; what the model does not take is left out.
    assert all(set(batch) == {"a"} for batch in batches)
    found = [text(batch["a"]) for batch in batches]
    assert found == [["zwölf \u2028x"], ["one", "six"], ["three"], ["ten"]]


def test_texts_are_cut_where_the_model_ends() -> None:
    Path("data.txt").write_text("x" * 200)
    model = TwoInputs()
    model.config = type("Config", (), {"max_position_embeddings": 16})  # type: ignore[assignment]
    (batch,) = load_data("data.txt", Loaded(model, Tokenizer()))
    assert text(batch["a"]) == ["x" * 16]  # type: ignore[index]
    (batch,) = load_data("data.txt", Loaded(model, Tokenizer()), max_tokens=7)
    assert text(batch["a"]) == ["x" * 7]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "tokenizer", "says"),
    [
        (b"line", None, "tokenizer"),
        (b" \n\n", Tokenizer(), "no lines"),
        (b"~\n", Tokenizer(), "no tokens"),
        (b"\xff\xfe", Tokenizer(), "UTF-8"),
    ],
)
def test_bad_text(content: bytes, tokenizer: Any, says: str) -> None:
    Path("data.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_data("data.txt", Loaded(TwoInputs(), tokenizer))


# Recipes


def test_recipe_by_name_and_from_json() -> None:
    assert load_recipe("int8-static") is RECIPES["int8-static"]
    recipe = Recipe(LayerRecipe("dynamic"), (("*.head", LayerRecipe("static")),))
    Path("recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert load_recipe("recipe.json") == recipe
    assert needs_calibration(recipe)
    assert needs_calibration(RECIPES["int8-static"])
    assert not needs_calibration(RECIPES["int8-dynamic"])
    assert not needs_calibration(Recipe(None))


@pytest.mark.parametrize("content", ["{", "[]", '{"default": 3}', '{"other": null}', "\xff"])
def test_recipe_file_that_holds_none(content: str) -> None:
    Path("recipe.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"recipe\.json holds no recipe"):
        load_recipe("recipe.json")


def test_recipe_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"int8-dynamic.*'int9'.*no \.json file"):
        load_recipe("int9")
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        load_recipe("other.json")
