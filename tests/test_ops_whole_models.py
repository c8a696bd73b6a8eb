"""Models with tables and layers of integers, compiled, exported and packaged: the same bits."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from test_ops import ALL
from zeropoint import WEIGHT_INT4, WEIGHT_INT8, LayerRecipe, Recipe

# torch warns of its own parts.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:`torch.jit")

VOCABULARY = 50


class Language(nn.Module):
    """Every form of a quantized layer, and a head that shares the table's integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.inner = nn.Sequential(nn.Linear(64, 70), nn.ReLU(), nn.Linear(70, 64))
        self.head = nn.Linear(64, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


def ids(batch: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, 5))


RECIPES = {
    "int8": Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT8),
    "int4": Recipe(LayerRecipe("weight-only", WEIGHT_INT4), embeddings=WEIGHT_INT4),
    "mixed": Recipe(
        LayerRecipe("dynamic", WEIGHT_INT4),
        (("inner.0", LayerRecipe("static")), ("inner.2", LayerRecipe("weight-only"))),
        WEIGHT_INT4,
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    calibration = [ids(4)] if name == "mixed" else None
    model = zeropoint.quantize(Language().eval(), RECIPES[name], calibration=calibration)
    assert isinstance(model.embed, zeropoint.QuantizedEmbedding)
    assert model.head.weight is model.embed.weight
    return model


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_operator_is_among_those_that_opcheck_sees() -> None:
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.removeprefix("zeropoint::") for n in names if n.startswith("zeropoint::")}
    assert ours == {*ALL, "linear_packed", "unpacked"}


@pytest.mark.parametrize("name", RECIPES)
def test_compiled_whole(name: str) -> None:
    model = model_of(name)
    fast = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (3, 2, 7, 1):
            tokens = ids(batch)
            assert_same_bits(fast(tokens), model(tokens))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_exported_with_any_batch_saved_and_loaded(name: str, strict: bool, tmp_path: Path) -> None:
    model = model_of(name)
    program = exported(model, strict)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (2, 3, 9):
        tokens = ids(batch)
        assert_same_bits(again(tokens), model(tokens))


def test_exported_integers_stay_integers() -> None:
    program = exported(model_of("int4"), False)
    tables = [t for t in program.state_dict.values() if t.shape[0] == VOCABULARY and t.ndim == 2]
    assert {t.dtype for t in tables} == {torch.uint8, torch.bfloat16}  # codes, scales
    assert not [t for t in program.constants.values() if isinstance(t, Tensor) and t.numel() > 1]


def exported(model: nn.Module, strict: bool) -> Any:
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(model, (ids(3),), dynamic_shapes=({0: batch},), strict=strict)


def test_packaged_ahead_of_time_and_run_in_another_process(tmp_path: Path) -> None:
    from torch._inductor import cpp_builder

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"AOTInductor needs a C++ compiler: {error}")
    if shutil.which(compiler) is None:
        pytest.skip(f"AOTInductor needs a C++ compiler, and {compiler} is not there")
    model = model_of("mixed")
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(model, False), package_path=package)
    inputs = [ids(batch) for batch in (2, 3, 9)]
    outputs = [model(tokens).detach() for tokens in inputs]
    here = torch._inductor.aoti_load_package(package)
    for tokens, expected in zip(inputs, outputs, strict=True):
        assert_same_bits(here(tokens), expected)
    torch.save((inputs, outputs), tmp_path / "data.pt")
    code = """
        import sys, torch, zeropoint
        model = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
        inputs, outputs = torch.load(sys.argv[1] + "/data.pt", weights_only=True)
        print([torch.equal(model(x), y) for x, y in zip(inputs, outputs, strict=True)])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[True, True, True]\n", done.stderr
