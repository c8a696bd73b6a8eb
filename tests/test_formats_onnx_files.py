"""ONNX files: tables of integers, names, external data, and what is refused, with no file left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropoint
from onnx_files import ANY, Calls, Several, nodes, onnx, run, tensors, through
from zeropoint import PerChannel, PerGroup, QuantizedEmbedding, QuantizedLinear, QuantSpec
from zeropoint.formats import onnx as zp_onnx

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of its own parts
ROWS = 50


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def table(bits: int, group_size: int | None, dim: int = 40) -> QuantizedEmbedding:
    granularity = PerChannel(0) if group_size is None else PerGroup(group_size)
    scales = torch.float32 if group_size is None else torch.bfloat16
    spec = QuantSpec(bits, bits == 8, False, granularity, scales)
    return QuantizedEmbedding.from_embedding(nn.Embedding(ROWS, dim), spec)


def layer(inputs: int = 8) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(inputs, 4))


@pytest.mark.parametrize("group_size", [None, 16, 7, 100])
def test_tables_stay_integers_and_give_the_same_bits(group_size: int | None, file: Path) -> None:
    tables = {
        f"{bits}_{dim}": table(bits, group_size, dim) for bits in range(2, 9) for dim in (40, 41)
    }
    model, shapes = Several(tables), ({0: ANY, 1: ANY},)
    left = zp_onnx.write(model, file, (torch.randint(ROWS, (2, 3)),), dynamic_shapes=shapes)
    index = torch.randint(ROWS, (4, 5))
    index[0, 0], index[0, 1] = 0, ROWS - 1
    for (name, module), y in zip(tables.items(), run(file, index), strict=True):
        assert torch.equal(y, module(index)), name
    weights = [t for n, t in tensors(file).items() if n.endswith((".weight", ".weight.rows"))]
    assert len(weights) == len(tables)
    for kind, shape in weights:
        assert kind in ("INT8", "UINT8")
        assert shape[0] == ROWS
    sizes = sorted(shape[1] for _, shape in weights)
    assert sizes == [20] * 3 + [21] * 3 + [40] * 4 + [41] * 4
    assert len(left) == 10  # all but 4 and 8 bits
    floats = [s for kind, s in tensors(file).values() if "FLOAT" in kind]
    assert all(len(shape) < 2 or shape[1] < 8 for shape in floats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_rows_in_other_floats(dtype: torch.dtype, file: Path) -> None:
    module, index = table(4, 16).to(dtype), torch.tensor([3, 49], dtype=torch.int32)
    y = through(module, file, index)[0]
    assert y.dtype == dtype
    assert torch.equal(y, module(index))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = table(8, None, 16)
        self.head = QuantizedLinear.from_quantized(self.table.weight_qtensor())
        for name in ("weight", "scale", "zero_point"):
            setattr(self.head, name, getattr(self.table, name))

    def forward(self, ids: torch.Tensor, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.table(ids) + shift)}


def test_a_tied_head_names_and_keyword_arguments(file: Path) -> None:
    model, ids, shift = Tied(), torch.randint(ROWS, (2, 3)), torch.randn(16)
    names = {"input_names": ["tokens", "added"], "output_names": ["scores"]}
    zp_onnx.write(model, file, (ids,), {"shift": shift}, **names)
    graph = onnx.load(file).graph
    assert [v.name for v in graph.input] == ["tokens", "added"]
    assert [v.name for v in graph.output] == ["scores"]
    assert torch.equal(run(file, ids, shift)[0], model(ids, shift=shift)["logits"])
    assert {kind for kind, s in tensors(file).values() if len(s) == 2} == {"INT8"}


def test_the_model_is_as_it_was(file: Path) -> None:
    model = nn.Sequential(table(8, None, 8), nn.Dropout(), layer()).train()
    zp_onnx.write(model, file, (torch.tensor([1]),))
    assert all(module.training for module in model.modules())
    assert "forward" not in model[0].__dict__
    assert "Dropout" not in nodes(file)
    assert {(o.domain, o.version) for o in onnx.load(file).opset_import} == {("", 21)}


def test_float_parts_and_the_checker(file: Path) -> None:
    float_model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)).eval()
    model = zeropoint.quantize(float_model, "int8-weight-only")
    x = torch.randn(3, 8)
    y = through(model, file, x)[0]
    torch.testing.assert_close(y, model(x), rtol=0, atol=1e-5)
    onnx.checker.check_model(file, full_check=True)


def external(file: Path) -> list[str]:
    graph = onnx.load(file, load_external_data=False).graph
    return [
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]


def test_external_data(file: Path, tmp_path: Path) -> None:
    model, x = layer(128), torch.randn(3, 128)
    y = through(model, file, x, external_data=True)[0]
    assert torch.equal(y, model(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert set(external(file)) == {"model.onnx.data"}
    before = (tmp_path / "model.onnx.data").read_bytes()
    with pytest.raises(FileExistsError, match=r"model.onnx.data is there already"):
        zp_onnx.write(layer(128), file, (x,), external_data=True)
    assert (tmp_path / "model.onnx.data").read_bytes() == before
    assert torch.equal(run(file, x)[0], model(x))


def test_more_than_one_file_can_hold(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = layer(128), torch.randn(3, 128)
    through(model, file, x)
    assert not external(file)
    file.unlink()
    monkeypatch.setattr(zp_onnx, "_LARGEST", 300)
    with pytest.raises(
        ValueError, match=r"external_data must not be False for tensors of \d+ bytes"
    ):
        zp_onnx.write(model, file, (x,), external_data=False)
    assert not list(tmp_path.iterdir())
    assert torch.equal(through(model, file, x)[0], model(x))
    assert external(file)


REFUSED: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "no module": (3, (), TypeError, r"model must be a torch.nn.Module, got int"),
    "float": (nn.Linear(8, 4), (torch.randn(2, 8),), ValueError, r"no quantized layer that is"),
    "packed": (
        nn.Sequential(zeropoint.PackedLinear.from_linear(nn.Linear(8, 4))),
        (torch.randn(2, 8),),
        ValueError,
        r"layer '0' is a PackedLinear, .*unpack_model",
    ),
    "a weight that is an input": (
        Calls(
            lambda x, w: torch.ops.zeropoint.linear_weight_only(
                x, w, torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
            )
        ),
        (torch.randn(2, 8), torch.zeros(4, 8, dtype=torch.int8)),
        ValueError,
        r"weight must be a parameter or buffer of the model, or a number; 'arg\w*|weight must",
    ),
    "no inputs": (layer(0), (torch.randn(2, 0),), ValueError, r"'weight' is empty, \(4, 0\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_without_a_trace(name: str, file: Path, tmp_path: Path) -> None:
    model, args, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        zp_onnx.write(model, file, args)
    assert not list(tmp_path.iterdir())


def test_sums_that_would_overflow(file: Path, tmp_path: Path) -> None:
    for qparams in (None, (0.5, 3)):
        mode = "dynamic" if qparams is None else "static"
        wide = QuantizedLinear.from_linear(nn.Linear(66_400, 4), mode, input_qparams=qparams)
        wide.weight.fill_(127)
        with pytest.raises(ValueError, match=r"'weight' has 66400 inputs, .* 32 bits"):
            zp_onnx.write(wide, file, (torch.randn(1, 66_400),))
    assert not list(tmp_path.iterdir())
    most = layer(66_310)
    most.weight.fill_(-127)
    x = torch.full((1, 66_310), 3.0)
    assert torch.equal(through(most, file, x)[0], most(x))


def test_an_unknown_set_of_operators(file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"operators must be 'onnxruntime' or 'standard', got 'qdq'"
    ):
        zp_onnx.write(layer(), file, (torch.randn(2, 8),), operators="qdq")  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [False, True])
def test_the_old_file_stays_if_the_new_one_fails(
    data: bool, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(b"old")

    def full(self: Path, target: Path) -> None:
        raise OSError("the disk is gone")

    real = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: real(self, to) if to.suffix == ".data" else full(self, to)
    )
    with pytest.raises(OSError, match="the disk is gone"):
        zp_onnx.write(layer(128), file, (torch.randn(2, 128),), external_data=data)
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
