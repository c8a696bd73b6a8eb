"""GPTQ and AWQ checkpoints, against packers written here from the published layouts, bit by bit."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeropoint.formats import awq, gptq
from zeropoint.formats.container import CheckpointError
from zeropoint.formats.contents import Contents

IN, OUT, GROUP = 64, 32, 16


def pack_down(columns: list[list[int]], bits: int) -> Tensor:
    """Each list is a stream of integers, the first in the lowest bits; one column of words each."""
    packed = []
    for column in columns:
        stream = sum(value << bits * i for i, value in enumerate(column))
        count = len(column) * bits // 32
        words = [stream >> 32 * i & 0xFFFFFFFF for i in range(count)]
        packed.append([w - (1 << 32) if w >> 31 else w for w in words])
    return torch.tensor(packed, dtype=torch.int32).T.contiguous()


class Case:
    """Integers, zero points and scales of one layer, and the weight that they stand for."""

    def __init__(self, bits: int, group: int = GROUP, lowest: int = 0, order: Tensor | None = None):
        generator = torch.Generator().manual_seed(bits)
        size = IN if group == -1 else group
        groups = IN // size
        self.bits, self.group = bits, group
        self.q = torch.randint(0, 1 << bits, (IN, OUT), generator=generator)
        self.zeros = torch.randint(lowest, 1 << bits, (groups, OUT), generator=generator)
        self.scales = (torch.rand(groups, OUT, generator=generator) * 0.1 + 0.01).half()
        self.bias = torch.randn(OUT, generator=generator).half()
        self.order = torch.arange(IN) // size if order is None else order
        steps = (self.q - self.zeros[self.order]).float()
        self.weight = (steps * self.scales.float()[self.order]).T  # (out, in)

    def gptq(self, folder: Path, version: str = "v1", **config: Any) -> Path:
        stored = self.zeros - int(version == "v1")
        assert stored.min() >= 0
        tensors = {
            "fc.qweight": pack_down(self.q.T.tolist(), self.bits),
            "fc.qzeros": pack_down(stored.tolist(), self.bits).T.contiguous(),
            "fc.scales": self.scales,
            "fc.g_idx": self.order.to(torch.int32),
            "fc.bias": self.bias,
            "norm.weight": torch.ones(3, dtype=torch.float16),
        }
        quantization = {"quant_method": "gptq", "bits": self.bits, "group_size": self.group}
        return save(folder, tensors, quantization | config)

    def awq(self, folder: Path, **config: Any) -> Path:
        tensors = {
            "fc.qweight": pack_awq(self.q),
            "fc.qzeros": pack_awq(self.zeros),
            "fc.scales": self.scales,
            "fc.bias": self.bias,
            "norm.weight": torch.ones(3, dtype=torch.float16),
        }
        quantization = {"quant_method": "awq", "bits": 4, "group_size": self.group}
        return save(folder, tensors, quantization | {"version": "gemm"} | config)


def pack_awq(integers: Tensor) -> Tensor:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is this output of eight
    rows = []
    for row in integers.tolist():
        words = []
        for at in range(0, len(row), 8):
            word = sum(row[at + order[i]] << 4 * i for i in range(8))
            words.append(word - (1 << 32) if word >> 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def save(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def check(contents: Contents, case: Case, group: int | None) -> None:
    layer = contents.layers["fc"]
    assert torch.equal(layer.weight.dequantize(), case.weight)
    assert (layer.weight.bits, layer.weight.group_size) == (case.bits, group)
    assert torch.equal(layer.weight.int_repr(), case.q.T.to(torch.uint8))
    assert layer.bias is not None
    assert torch.equal(layer.bias, case.bias)
    assert layer.mode == "weight-only"
    assert list(contents.tensors) == ["norm.weight"]


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bits", [4, 8, 2])
def test_gptq(bits: int, version: str, group: int, tmp_path: Path) -> None:
    case = Case(bits, group, lowest=1 if version == "v1" else 0)
    form = {"v1": "gptq", "v2": "gptq_v2"}[version]
    folder = case.gptq(tmp_path, version, checkpoint_format=form, desc_act=True)
    check(gptq.read(folder), case, None if group == -1 else group)


def test_gptq_of_3_bits_crosses_words(tmp_path: Path) -> None:
    case = Case(3, lowest=1)
    check(gptq.read(case.gptq(tmp_path)), case, GROUP)


def test_gptq_convention_can_be_said(tmp_path: Path) -> None:
    case = Case(4)
    folder = case.gptq(tmp_path, "v2")  # the config does not say so
    check(gptq.read(folder, zero_points="v2"), case, GROUP)
    with pytest.raises(ValueError, match="zero_points must be 'v1', 'v2' or None, got 1"):
        gptq.read(folder, zero_points=1)  # type: ignore[arg-type]
    # As version 1, a stored 15 would mean 16, or 0.
    with pytest.raises(CheckpointError, match=r"layer 'fc': .*qzeros.*stored as 15.*0.*16"):
        gptq.read(folder)


def test_autogptq_file_of_any_name_beside_its_own_config(tmp_path: Path) -> None:
    case = Case(4, lowest=1)
    folder = case.gptq(tmp_path)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-16g.safetensors")
    (folder / "config.json").unlink()
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "damp": 0.01}')
    check(gptq.read(folder), case, GROUP)
    check(gptq.read(folder / "gptq_model-4bit-16g.safetensors"), case, GROUP)


def test_gptq_inputs_in_an_order_of_their_own(tmp_path: Path) -> None:
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0)) // GROUP
    case = Case(4, lowest=1, order=order)
    folder = case.gptq(tmp_path)
    with pytest.raises(CheckpointError, match=r"layer 'fc': its inputs.*g_idx.*dequantize"):
        gptq.read(folder)
    contents = gptq.read(folder, reordered="dequantize")
    assert contents.layers == {}
    assert torch.equal(contents.tensors["fc.weight"], case.weight.half())
    assert torch.equal(contents.tensors["fc.bias"], case.bias)
    assert list(contents.dequantized) == ["fc.weight"]
    with pytest.raises(ValueError, match="reordered must be"):
        gptq.read(folder, reordered="yes")  # type: ignore[arg-type]


def test_scale_of_zero_stands_for_zeros(tmp_path: Path) -> None:
    case = Case(4, lowest=1)
    case.scales[1, 3] = 0
    case.scales[2, 4] = -0.25
    steps = (case.q - case.zeros[case.order]).float()
    case.weight = (steps * case.scales.float()[case.order]).T
    for contents in (gptq.read(case.gptq(tmp_path / "g")), awq.read(case.awq(tmp_path / "a"))):
        weight = contents.layers["fc"].weight
        assert torch.equal(weight.dequantize(), case.weight)
        assert (weight.scale > 0).all()


@pytest.mark.parametrize("group", [GROUP, -1])
def test_awq(group: int, tmp_path: Path) -> None:
    case = Case(4, group)
    check(awq.read(case.awq(tmp_path)), case, None if group == -1 else group)


def test_awq_without_zero_points(tmp_path: Path) -> None:
    case = Case(4)
    case.zeros[:] = 8
    case.weight = ((case.q - 8).float() * case.scales.float()[case.order]).T
    folder = case.awq(tmp_path, zero_point=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["fc.qzeros"]
    save_file(tensors, folder / "model.safetensors")
    check(awq.read(folder), case, GROUP)


def test_awq_as_compressed_tensors_reads_it(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters.autoawq",
        reason="needs compressed-tensors (the dependency group test)",
    )
    case = Case(4)
    tensors = load_file(case.awq(tmp_path) / "model.safetensors")
    names = ("fc.qweight", "fc.qzeros")
    unpacked = package.AutoAWQConverter.unpack_awq(*(tensors[n] for n in names), 4)
    theirs = package.AutoAWQConverter.reverse_awq_order(*unpacked, 4)
    weight = awq.read(tmp_path).layers["fc"].weight
    assert torch.equal(weight.int_repr(), (theirs[0] & 15).T.to(torch.uint8))
    assert torch.equal(weight.zero_point, (theirs[1] & 15).T.to(torch.int32))


def test_into_a_model_and_a_checkpoint(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(IN, OUT)
            self.norm = nn.LayerNorm(3, bias=False, dtype=torch.float16)

    case = Case(4, lowest=1)
    x = torch.randn(2, IN)
    expected = x.double() @ case.weight.double().T + case.bias.double()
    for contents in (gptq.read(case.gptq(tmp_path / "g")), awq.read(case.awq(tmp_path / "a"))):
        model = contents.load_into(Net())
        assert (model.fc(x) - expected).abs().max() < 1e-4


HOSTILE_CONFIGS = [
    ("both", {"quant_method": "fp8"}, "quant_method must be"),
    ("both", {"bits": 5}, "bits must be"),
    ("both", {"bits": True}, "bits must be"),
    ("both", {"group_size": 0}, "group_size must be an integer"),
    ("both", {"group_size": "16"}, "group_size must be an integer"),
    ("both", {"group_size": 8}, r"tensor 'fc.scales': must have shape \[8, 32\], has \[4, 32\]"),
    ("gptq", {"bits": 8}, r"tensor 'fc.(scales|qzeros)': must have shape"),
    ("gptq", {"dynamic": {"fc": {"bits": 8}}}, "differ by layer"),
    ("gptq", {"checkpoint_format": "marlin"}, "must be 'gptq' or 'gptq_v2', got 'marlin'"),
    ("gptq", {"checkpoint_format": 7}, "must be 'gptq' or 'gptq_v2', got '7'"),
    ("awq", {"version": "gemv"}, "version must be 'gemm', got 'gemv'"),
    ("awq", {"version": None}, "version must be 'gemm', got 'None'"),
    ("awq", {"zero_point": 1}, "zero_point must be true or false"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), HOSTILE_CONFIGS)
def test_config_that_is_refused(
    kind: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    case = Case(4, lowest=1)
    if kind != "awq":
        with pytest.raises(CheckpointError, match=reason):
            gptq.read(case.gptq(tmp_path / "g", **change))
    if kind != "gptq":
        with pytest.raises(CheckpointError, match=reason):
            awq.read(case.awq(tmp_path / "a", **change))


HOSTILE_TENSORS = [
    ("both", "scales", None, "'fc.scales': missing"),
    ("both", "qzeros", None, "'fc.qzeros': missing"),
    ("both", "qweight", None, "no quantized layer"),
    ("both", "qweight", torch.zeros(8, 32), "'fc.qweight': must be torch.int32"),
    ("both", "qweight", torch.zeros(8, dtype=torch.int32), "'fc.qweight': no packed weight"),
    ("both", "qzeros", torch.zeros(4, 5, dtype=torch.int32), "'fc.qzeros': must have shape"),
    ("both", "scales", torch.zeros(4, 24, dtype=torch.int32), "'fc.scales': must be torch.float32"),
    ("both", "scales", torch.full((4, 32), float("inf")), "layer 'fc': scale must be positive"),
    ("both", "scales", torch.full((4, 32), float("nan")), "layer 'fc': scale must be positive"),
    ("both", "bias", torch.zeros(33), "'fc.bias': must have shape"),
    ("gptq", "g_idx", torch.zeros(63, dtype=torch.int32), "'fc.g_idx': must have shape"),
    ("gptq", "g_idx", torch.full((64,), 4, dtype=torch.int32), "'fc.g_idx': must hold groups"),
    ("gptq", "g_idx", torch.full((64,), -1, dtype=torch.int32), "'fc.g_idx': must hold groups"),
    ("gptq", "g_idx", torch.zeros(64), "'fc.g_idx': must be torch.int32"),
    ("gptq", "g_idx", torch.zeros(64, dtype=torch.int32), "its inputs are in an order"),
]


@pytest.mark.parametrize(("kind", "key", "value", "reason"), HOSTILE_TENSORS)
def test_tensors_that_are_refused(
    kind: str, key: str, value: Tensor | None, reason: str, tmp_path: Path
) -> None:
    case = Case(4, lowest=1)
    for name, module, folder in (
        ("gptq", gptq, case.gptq(tmp_path / "g")),
        ("awq", awq, case.awq(tmp_path / "a")),
    ):
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(f"fc.{key}", None)
        if value is not None:
            tensors[f"fc.{key}"] = value
        save_file(tensors, folder / "model.safetensors")
        if kind in ("both", name):
            with pytest.raises(CheckpointError, match=reason):
                module.read(folder)  # type: ignore[attr-defined]


def test_folder_without_weights_or_with_a_broken_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*index.json, and 0"):
        gptq.read(tmp_path)
    folder = Case(4, lowest=1).gptq(tmp_path)
    for text, reason in (
        ("{", "config.json: not valid JSON"),
        ("[" * 100_000, "config.json: not valid JSON"),
        ("[]", "config.json: must hold a JSON object"),
        ('{"quantization_config": 3}', "quantization_config must be a JSON object"),
        ("{}", "quant_method must be"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            gptq.read(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("fuzz")
    case = Case(4, lowest=1)
    return case.gptq(path / "g"), case.awq(path / "a")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 1 << 20), byte=st.integers(0, 255), cut=st.booleans())
def test_any_file_is_read_or_refused(
    at: int, byte: int, cut: bool, folders: tuple[Path, Path]
) -> None:
    for folder, module in zip(folders, (gptq, awq), strict=True):
        there = folder / "other"
        there.mkdir(exist_ok=True)
        good = (folder / "model.safetensors").read_bytes()
        where = at % len(good)
        tail = b"" if cut else bytes([byte]) + good[where + 1 :]
        (there / "model.safetensors").write_bytes(good[:where] + tail)
        shutil.copy(folder / "config.json", there)
        with contextlib.suppress(CheckpointError):
            module.read(there)  # type: ignore[attr-defined]
