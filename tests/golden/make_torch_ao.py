"""Write torch_ao/*.pt and torch_ao.json: small models that torch.ao.quantization made, and what
torch itself says is in them and computes.

Run once, with torch 2.13; afterwards the files are only read. They prove that models are rescued
from files when torch can read them no more.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "torch_ao"


class Net(nn.Module):
    """Two layers, the second without a bias; the stubs stand last, as in many old models."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 6)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(6, 4, bias=False)
        self.quant = torch.ao.quantization.QuantStub()
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.fc2(self.relu(self.fc1(self.quant(x)))))


class FloatNet(nn.Module):
    """Its float architecture, without stubs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 6)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(x)))


class Traced(FloatNet):
    """What FX traces: a LayerNorm between the layers, and a module within a module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):  # FX cannot pickle annotations that are text
        return self.body(self.norm(super().forward(x)))


class Others(nn.Module):
    """Quantized layers that are not Linear, and float tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.fc = nn.Linear(3, 2)
        self.embed = nn.Embedding(5, 4)
        self.low = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)
        self.quant = torch.ao.quantization.QuantStub()
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.conv(self.quant(x)).permute(0, 2, 1)
        return self.norm(self.dequant(self.fc(y)).mean(1)) + self.low(self.embed(tokens))


def pattern(*shape: int) -> Tensor:
    """Reals that look random and are the same everywhere."""
    size = torch.Size(shape).numel()
    return ((torch.arange(1, size + 1) * 37 % 101 - 50) / 16).reshape(shape)


def fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(pattern(*p.shape).roll(i) / 8)
    return model.eval()


def dynamic(**spec: Any) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(fill(FloatNet()), **spec)


def static(engine: str, training: bool = False) -> nn.Module:
    from torch.ao.quantization import (
        convert,
        fuse_modules,
        fuse_modules_qat,
        get_default_qat_qconfig,
        get_default_qconfig,
        prepare,
        prepare_qat,
    )

    torch.backends.quantized.engine = engine
    model = fill(Net())
    if training:
        model.qconfig = get_default_qat_qconfig(engine)
        model = prepare_qat(fuse_modules_qat(model.train(), [["fc1", "relu"]]))
        model(pattern(32, 8))
        return convert(model.eval())
    model.qconfig = get_default_qconfig(engine)
    model = prepare(fuse_modules(model, [["fc1", "relu"]]))
    model(pattern(32, 8))
    return convert(model)


def traced(mapping: Any) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = prepare_fx(fill(Traced()), mapping, (pattern(2, 8),))
    model(pattern(32, 8))
    return convert_fx(model)


def others() -> nn.Module:
    from torch.ao.quantization import (
        convert,
        float16_dynamic_qconfig,
        float_qparams_weight_only_qconfig,
        get_default_qconfig,
        prepare,
        quantize_dynamic,
    )

    torch.backends.quantized.engine = "x86"
    model = fill(Others())
    for part in (model.conv, model.fc, model.quant):
        part.qconfig = get_default_qconfig("x86")
    model.embed.qconfig = float_qparams_weight_only_qconfig
    model = prepare(model)
    model(pattern(2, 2, 5), torch.arange(2))
    model = convert(model)
    return quantize_dynamic(model, {"low": float16_dynamic_qconfig})


def save_state(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_legacy(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def save_older(version: int) -> Callable[[nn.Module, Path], None]:
    """As torch 1.2 and 1.3 wrote state dicts: weight and bias apart (versions 1 and 2)."""

    def save(model: nn.Module, path: Path) -> None:
        state: OrderedDict[str, Any] = OrderedDict()
        for name, value in model.state_dict().items():
            if name.endswith("_packed_params._packed_params"):
                prefix = name.removesuffix("_packed_params")
                if version == 1:
                    prefix = prefix.removesuffix("_packed_params.")
                state[f"{prefix}weight"], state[f"{prefix}bias"] = value
            elif not name.endswith(".dtype") or version == 2:
                state[name] = value
        torch.save(state, path, _use_new_zipfile_serialization=False)

    return save


def save_script(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(model), path)


def files() -> dict[str, tuple[nn.Module, Callable[[nn.Module, Path], None]]]:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization import get_default_qconfig_mapping as mapping_for
    from torch.ao.quantization import per_channel_dynamic_qconfig as per_channel

    of_dynamic = QConfigMapping().set_global(default_dynamic_qconfig)
    x86, script = static("x86"), static("x86")
    return {
        "dynamic_state": (dynamic(), save_state),
        "dynamic_per_channel_legacy": (dynamic(qconfig_spec={nn.Linear: per_channel}), save_legacy),
        "dynamic_model": (dynamic(), torch.save),
        "static_x86_state": (x86, save_state),
        "static_x86_model": (x86, torch.save),
        "static_x86_script": (script, save_script),
        "static_version_1": (x86, save_older(1)),
        "static_version_2": (x86, save_older(2)),
        "static_onednn_state": (static("onednn"), save_state),
        "static_qnnpack_state": (static("qnnpack"), save_state),
        "trained_fbgemm_state": (static("fbgemm", training=True), save_state),
        "fx_static_state": (traced(mapping_for("x86")), save_state),
        "fx_static_model": (traced(mapping_for("x86")), torch.save),
        "fx_dynamic_state": (traced(of_dynamic), save_state),
        "others_state": (others(), save_state),
    }


def contents(model: nn.Module) -> dict[str, Any]:
    """Each Linear layer's integers and numbers, as torch's accessors tell them."""
    layers = {}
    for name, module in model.named_modules():
        if not hasattr(module, "_packed_params") or not hasattr(module, "in_features"):
            continue
        weight, bias = module.weight(), module.bias()
        if not weight.is_quantized:
            continue
        per_channel = weight.qscheme() == torch.per_channel_affine
        scale = weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale())
        zero_point = weight.q_per_channel_zero_points() if per_channel else weight.q_zero_point()
        is_dynamic = "dynamic" in type(module).__module__
        layers[name] = {
            "integers": weight.int_repr().tolist(),
            "scale": scale.float().tolist(),
            "zero_point": torch.as_tensor(zero_point).tolist(),
            "bias": None if bias is None else bias.tolist(),
            "output": None if is_dynamic else [module.scale, module.zero_point],
        }
    return layers


def main() -> None:
    from zeropoint.formats.torch_ao import observe_inputs

    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    expected = {}
    for name, (model, save) in files().items():
        save(model, FOLDER / f"{name}.pt")
        entry: dict[str, Any] = {"layers": contents(model)}
        if name != "others_state":
            if "qnnpack" in name or "onednn" in name:
                torch.backends.quantized.engine = name.split("_")[1]
            entry["inputs"] = {k: list(v) for k, v in observe_inputs(model, pattern(5, 8)).items()}
            entry["outputs"] = model(pattern(5, 8)).tolist()
            torch.backends.quantized.engine = "x86"
        else:
            entry["dequantized"] = {
                "conv.weight": model.conv.weight().dequantize().tolist(),
                "embed.weight": model.embed.weight().dequantize().tolist(),
            }
        expected[name] = entry
    text = json.dumps(expected, indent=None, sort_keys=True, separators=(",", ":"))
    FOLDER.with_suffix(".json").write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
