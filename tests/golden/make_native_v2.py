"""Write native_v2.safetensors and native_v2.json: weights below 8 bits and groups.

Run once, when version 2 of the format was made; afterwards the files are only read. As in
make_native_v1, nothing depends on random numbers or on a float matrix product.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

import zeropoint
from zeropoint import PerChannel, PerGroup, QuantizedLinear, QuantSpec

METADATA = {"made for": "tests"}
FOLDER = Path(__file__).parent

SPECS = {
    "int4": zeropoint.int4(scale_dtype=torch.float32),
    "symmetric": zeropoint.int4(64, symmetric=True, scale_dtype=torch.bfloat16),
    "int3": QuantSpec(3, granularity=PerChannel(0)),
    "int2": QuantSpec(2, False, False, PerGroup(16), torch.float16),
    "int5": QuantSpec(5, False, False, PerGroup(100)),
    "int6": QuantSpec(6, granularity=PerChannel(0)),
    "int7": QuantSpec(7, False, False, PerGroup(7)),
    "int8": QuantSpec(granularity=PerGroup(32)),
    "plain": zeropoint.WEIGHT_INT8,
}
MODES = ("dynamic", "weight-only", "static")


def architecture() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(70, 3, bias=i % 2 == 0) for i, name in enumerate(SPECS)})


def model() -> nn.ModuleDict:
    from golden.make_native_v1 import pattern

    result = architecture()
    with torch.no_grad():
        for i, tensor in enumerate(result.parameters()):
            tensor.copy_(pattern(tuple(tensor.shape), i) / 64 + i / 256)
    for i, (name, spec) in enumerate(SPECS.items()):
        mode = MODES[i % 3]
        qparams = (0.25, 131) if mode == "static" else None
        result[name] = QuantizedLinear.from_linear(result[name], mode, spec, qparams)  # type: ignore[arg-type]
    return result


def main() -> None:
    from checkpoints import digest_of
    from golden.make_native_v1 import inputs, layers

    golden = model()
    path = FOLDER / "native_v2.safetensors"
    zeropoint.save(golden, path, metadata=METADATA)
    expected = {
        "state": {name: digest_of(t) for name, t in golden.state_dict().items()},
        "outputs": {
            name: layer(inputs(layer.in_features)).view(torch.int32).tolist()
            for name, layer in layers(golden).items()
        },
        "layers": zeropoint.inspect_checkpoint(path).to_dict()["layers"],
    }
    path.with_suffix(".json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
