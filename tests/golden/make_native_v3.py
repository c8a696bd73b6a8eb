"""Write native_v3.safetensors and native_v3.json: embedding tables, one of them a head's weight.

Run once, when version 3 of the format was made; afterwards the files are only read. As in
make_native_v1, nothing depends on random numbers or on a float matrix product.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

import zeropoint
from zeropoint import LayerRecipe, PerChannel, PerGroup, QuantizedEmbedding, QuantSpec, Recipe

METADATA = {"made for": "tests"}
FOLDER = Path(__file__).parent

SPECS = {
    "int8": (zeropoint.WEIGHT_INT8, torch.float32),
    "int4": (zeropoint.int4(scale_dtype=torch.bfloat16), torch.bfloat16),
    "int3": (QuantSpec(3, granularity=PerChannel(0)), torch.float16),
    "int5": (QuantSpec(5, False, False, PerGroup(100)), torch.float64),
}


def architecture() -> nn.ModuleDict:
    model = nn.ModuleDict(
        {name: nn.Embedding(7, 40, dtype=dtype) for name, (_, dtype) in SPECS.items()}
    )
    model["tied"], model["head"] = nn.Embedding(7, 40), nn.Linear(40, 7)
    model["head"].weight = model["tied"].weight
    return model


def model() -> nn.ModuleDict:
    from golden.make_native_v1 import pattern

    result = architecture()
    with torch.no_grad():
        for i, tensor in enumerate(result.parameters()):
            tensor.copy_(pattern(tuple(tensor.shape), i) / 64 + i / 256)
    for name, (spec, _) in SPECS.items():
        result[name] = QuantizedEmbedding.from_embedding(result[name], spec)  # type: ignore[arg-type]
    spec = zeropoint.int4(16)
    recipe = Recipe(LayerRecipe("weight-only", spec), embeddings=spec)
    return zeropoint.quantize(result, recipe, inplace=True)  # type: ignore[return-value]


def main() -> None:
    from checkpoints import digest_of

    golden = model()
    path = FOLDER / "native_v3.safetensors"
    zeropoint.save(golden, path, metadata=METADATA)
    expected = {
        "state": {name: digest_of(t) for name, t in golden.state_dict().items()},
        "rows": {name: digest_of(golden[name](torch.arange(7))) for name in (*SPECS, "tied")},
        "layers": zeropoint.inspect_checkpoint(path).to_dict()["layers"],
    }
    path.with_suffix(".json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
