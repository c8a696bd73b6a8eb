"""compressed-tensors: the package reads what is written here, and what it writes is read here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zeropoint
from zeropoint import LayerRecipe, PerGroup, QTensor, QuantizedLinear, QuantSpec
from zeropoint.formats import compressed_tensors as ct
from zeropoint.formats import int32_words
from zeropoint.formats.compressed_config import Config
from zeropoint.formats.contents import Contents, LayerContents

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 35), nn.ReLU(), nn.Linear(35, 64, bias=False), nn.LayerNorm(64)
    )


def quantized(case: str) -> nn.Module:
    """By the recipe of that name; or weights of so many bits, in groups or by channel."""
    recipe: Any = case
    model = net()
    if case.startswith("w"):
        bits, how = int(case[1]), case[3:]
        spec = {
            "symmetric": QuantSpec(bits, True, True, PerGroup(16)),
            "asymmetric": QuantSpec(bits, False, False, PerGroup(16), torch.float16),
            "channel": QuantSpec(bits, False, False, zeropoint.PerChannel(0)),
        }[how]
        recipe = LayerRecipe("weight-only", spec)
        if how != "channel":  # 35 inputs are no whole number of groups
            model = model[:1]
    return zeropoint.quantize(model, recipe, calibration=[X] if case == "int8-static" else None)


CASES = [
    *("int8-dynamic", "int8-static", "int8-weight-only"),
    *("w4-symmetric", "w4-asymmetric", "w4-channel", "w3-symmetric", "w2-asymmetric", "w8-channel"),
]


def layers_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def package() -> Any:
    return pytest.importorskip(
        "compressed_tensors", reason="needs compressed-tensors (the dependency group test)"
    )


def by_the_package(folder: Path, floats: nn.Module) -> nn.Module:
    """The float model with the weights that the package decompresses."""
    package()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig(**config_of(folder))
    apply_quantization_config(floats, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(floats)
    floats.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    compressor.decompress_model(floats)
    return floats


@pytest.mark.parametrize("case", CASES)
def test_the_package_reads_what_is_written(case: str, tmp_path: Path) -> None:
    model = quantized(case)
    assert not [t for t in ct.write(model, tmp_path / "out") if "output scale" not in t]
    floats = nn.Sequential(
        *(
            nn.Linear(m.in_features, m.out_features, m.bias is not None)
            if isinstance(m, QuantizedLinear)
            else m
            for m in model
        )
    )
    theirs = by_the_package(tmp_path / "out", floats)
    assert layers_of(model)
    for name, layer in layers_of(model).items():
        other = theirs.get_submodule(name)
        ours = layer.weight_qtensor().dequantize()
        assert torch.equal(other.weight.detach(), ours.to(other.weight.dtype))
        if layer.bias is not None:
            assert torch.equal(other.bias.detach(), layer.bias)
        if layer.mode == "static":
            assert other.input_scale.item() == layer.input_scale.item()
            assert other.input_zero_point.item() + 128 == layer.input_zero_point.item()


@pytest.mark.parametrize("case", CASES)
def test_written_and_read_again_computes_the_same_bits(case: str, tmp_path: Path) -> None:
    model = quantized(case)
    ct.write(model, tmp_path / "out")
    contents = ct.read(tmp_path / "out")
    for name, layer in layers_of(model).items():
        again = contents.layers[name].build()
        assert again.mode == layer.mode
        for key, tensor in layer.state_dict().items():
            if not key.startswith("output"):
                assert torch.equal(again.state_dict()[key], tensor), (name, key)
    contents.save(tmp_path / "model.safetensors")
    ct.write(tmp_path / "model.safetensors", tmp_path / "second")
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert config_of(tmp_path / "out") == config_of(tmp_path / "second")


def test_into_a_model(tmp_path: Path) -> None:
    model = quantized("int8-static")
    ct.write(model, tmp_path / "out")
    loaded = ct.read(tmp_path / "out").load_into(net())
    assert torch.equal(loaded(X), model(X))
    wrong = nn.Sequential(nn.Linear(64, 35))
    before = wrong[0].weight.clone()
    with pytest.raises(ct.CheckpointError, match=r"out: layer '2'.*no such layer"):
        ct.read(tmp_path / "out").load_into(wrong)
    assert torch.equal(wrong[0].weight, before)


def scheme(case: str) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    preset, _, how = case.partition(" ")
    weights: dict[str, Any] = {"num_bits": int(preset[1]), "type": "int", "symmetric": True}
    weights |= {"strategy": "channel"} if preset[1] == "8" else {"strategy": "group"}
    if weights["strategy"] == "group":
        weights["group_size"] = 16
    if "asymmetric weights" in how:
        weights["symmetric"] = False
    if "tensor weights" in how:
        weights["strategy"] = "tensor"
    inputs = None
    if preset.endswith("A8"):
        dynamic = "dynamic" in how
        inputs = QuantizationArgs(
            num_bits=8,
            symmetric="asymmetric inputs" not in how,
            strategy="token" if dynamic else "tensor",
            dynamic=dynamic,
        )
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs
    )


THEIRS = [
    *("W8A8 dynamic", "W8A8 dynamic, asymmetric inputs", "W8A8 static"),
    *("W8A8 static, asymmetric inputs", "W8A8 dynamic, asymmetric weights"),
    *("W8A8 static, tensor weights", "W8A16", "W8A16 asymmetric weights", "W8A16 tensor weights"),
    *("W4A16", "W4A16 asymmetric weights", "W3A16 asymmetric weights", "W4A8 dynamic"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", THEIRS)
def test_what_the_package_writes_is_read(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    package()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 35), nn.ReLU(), nn.Linear(35, 7)).to(dtype)
    config = QuantizationConfig(config_groups={"group_0": scheme(case)}, ignore=["2"])
    apply_quantization_config(model, config)
    layer, args = model[0], config.config_groups["group_0"].weights
    rows = {"tensor": layer.weight.reshape(1, 1, -1), "channel": layer.weight[:, None]}.get(
        args.strategy, layer.weight.unflatten(-1, (-1, 16))
    )
    scale, zero_point = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
    with torch.no_grad():
        layer.weight_scale.copy_(scale.reshape(layer.weight_scale.shape))
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.copy_(zero_point.reshape(layer.weight_zero_point.shape))
        if hasattr(layer, "input_scale"):
            layer.input_scale.fill_(0.03125)
            if not config.config_groups["group_0"].input_activations.symmetric:
                layer.input_zero_point.fill_(-17)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(str(tmp_path))
    compressor.decompress_model(model)

    contents = ct.read(tmp_path)
    assert set(contents.layers) == {"0"}
    ours = contents.layers["0"]
    assert torch.equal(ours.weight.dequantize().to(dtype), model[0].weight)
    assert torch.equal(ours.bias, model[0].bias.detach())
    assert torch.equal(contents.tensors["2.weight"], model[2].weight.detach())
    kind = case.split()[1].rstrip(",") if "A8" in case else "weight-only"
    assert ours.mode == kind
    if kind == "static":
        assert ours.input_qparams == (0.03125, 111 if "asymmetric inputs" in case else 128)
    assert ours.weight.bits == int(case[1])


@pytest.mark.parametrize("case", ["weight-only", "weight-only with zero points", "dynamic"])
def test_transformers_loads_a_written_model(case: str, tmp_path: Path) -> None:
    package()
    transformers = pytest.importorskip("transformers", reason="needs zeropoint[models]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    zero_points, dynamic = "zero points" in case, case == "dynamic"
    spec = zeropoint.int4(16, symmetric=not zero_points, scale_dtype=torch.float32)
    recipe = LayerRecipe(
        "dynamic" if dynamic else "weight-only", zeropoint.WEIGHT_INT8 if dynamic else spec
    )
    model = zeropoint.quantize(model, recipe, exclude="lm_head", inplace=True)
    (tmp_path / "base.json").write_text(json.dumps(config.to_dict() | {"dtype": "float32"}))
    ct.write(model, tmp_path / "out", config=tmp_path / "base.json")
    assert config_of(tmp_path / "out")["ignore"] == ["lm_head", "model.embed_tokens"]
    # Packed zero points do not fit what the package makes on the meta device, its own neither.
    how = transformers.CompressedTensorsConfig(dequantize=True) if zero_points else None
    more = {} if how is None else {"quantization_config": how}
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", **more)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = theirs(ids).logits  # decompresses at the first call
        expected = model(ids).logits
    assert len(layers_of(model)) == 7
    for name, layer in layers_of(model).items():
        weight = theirs.get_submodule(name).weight.detach()
        assert torch.equal(weight, layer.weight_qtensor().dequantize()), name
    # Activations of 8 bits are rounded by different formulas; floats in a different order.
    bound = 0.05 if dynamic else 1e-5
    assert (logits - expected).abs().max() < bound * expected.abs().max()


def test_words_are_the_documented_ones() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]], dtype=torch.uint8)
    words = int32_words.pack(codes, 4)
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == [0xF7654321, 9]
    assert torch.equal(int32_words.unpack(words, 4, 9), codes)
    dense = int32_words.pack(torch.full((1, 11), 7, dtype=torch.uint8), 3)  # 33 bits
    assert dense.tolist() == [[-1, 1]]


def test_names_are_nearer_than_patterns_and_patterns_than_classes() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    config = Config(
        Path("x"),
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": group(8, "Linear"),
                "b": group(4, r"re:.*\.down$"),
                "c": group(2, "m.1.down"),
            },
            "ignore": ["re:.*head"],
        },
    )
    assert [config.scheme(n).bits for n in ("m.0.up", "m.0.down", "m.1.down")] == [8, 4, 2]
    with pytest.raises(ct.CheckpointError, match=r"layer 'lm_head': .*the config ignores it"):
        config.scheme("lm_head")


def test_layers_of_several_kinds_are_named_one_by_one(tmp_path: Path) -> None:
    model = net()
    model[0] = QuantizedLinear.from_linear(model[0], "weight-only", zeropoint.int4(16))
    model[2] = QuantizedLinear.from_linear(model[2], "dynamic")
    ct.write(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    assert [g["targets"] for g in config["config_groups"].values()] == [["0"], ["2"]]
    assert torch.equal(ct.read(tmp_path / "out").load_into(net())(X), model(X))


def test_quantized_embedding_becomes_floats(tmp_path: Path) -> None:
    table = zeropoint.QuantizedEmbedding.from_embedding(nn.Embedding(5, 64))
    model = nn.Sequential(table, QuantizedLinear.from_linear(nn.Linear(64, 4), "weight-only"))
    zeropoint.save(model, tmp_path / "model.safetensors")
    for source in (model, tmp_path / "model.safetensors"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        left = ct.write(source, tmp_path / "out")
        assert ["'0.weight': a quantized embedding" in text for text in left] == [True]
        tensors = ct.read(tmp_path / "out").tensors
        assert torch.equal(tensors["0.weight"], table.weight_qtensor().dequantize())


def test_shards(tmp_path: Path) -> None:
    model = quantized("int8-weight-only")
    ct.write(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = ({k: v for k, v in tensors.items() if k[0] == "0"}, {})
    halves[1].update({k: v for k, v in tensors.items() if k[0] != "0"})
    index: dict[str, Any] = {}
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{i}.safetensors")
        index |= dict.fromkeys(half, f"part-{i}.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    assert torch.equal(ct.read(tmp_path).load_into(net())(X), model(X))
    for bad, reason in (
        ({"a": "../part-0.safetensors"}, "is no file of the folder"),
        ({"a": "part-9.safetensors"}, "is missing"),
        ({"a": 3}, "weight_map must map"),
        ([], "weight_map must map"),
    ):
        file.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ct.CheckpointError, match=reason):
            ct.read(tmp_path)
    shutil.copy(tmp_path / "part-0.safetensors", tmp_path / "part-2.safetensors")
    file.write_text(json.dumps({"weight_map": index | {"a": "part-2.safetensors"}}))
    with pytest.raises(ct.CheckpointError, match=r"part-0.safetensors holds one of this name"):
        ct.read(tmp_path)


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = QuantizedLinear.from_linear(nn.Linear(20, 4), "weight-only", zeropoint.int4(16))
    with pytest.raises(ct.CheckpointError, match="layer '0': groups of 16 do not divide its 20"):
        ct.write(nn.Sequential(short), out)
    q = QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5)
    factor = LayerContents(q, input_factor=torch.ones(3))
    with pytest.raises(ct.CheckpointError, match="layer 'a': it has an input factor"):
        ct.write(Contents(Path("m"), "zeropoint", {"a": factor}, {}), out)
    with pytest.raises(ct.CheckpointError, match="no quantized layer"):
        ct.write(net(), out)
    with pytest.raises(TypeError, match="config must hold a JSON object, got list"):
        ct.write(quantized("int8-dynamic"), out, config=[])  # type: ignore[arg-type]
    odd = Contents(
        Path("m"), "zeropoint", {"a": LayerContents(q)}, {"t": torch.ones(1).to(torch.complex128)}
    )
    with pytest.raises(ct.CheckpointError, match=r"tensor 't': torch\.complex128"):
        ct.write(odd, out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="no empty folder"):
        ct.write(quantized("int8-dynamic"), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "mine.txt").unlink()
    ct.write(quantized("int8-dynamic"), out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


def test_activations_are_said_as_they_are(tmp_path: Path) -> None:
    for case, strategy in (("int8-dynamic", "token"), ("int8-static", "tensor")):
        ct.write(quantized(case), tmp_path / case)
        inputs = config_of(tmp_path / case)["config_groups"]["group_0"]["input_activations"]
        assert (inputs["strategy"], inputs["dynamic"]) == (strategy, strategy == "token")
        assert (inputs["num_bits"], inputs["symmetric"]) == (8, False)


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(ct, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        ct.write(quantized("int8-dynamic"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
