"""diagnose works for any model, and leaves it as it was; what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_models import batches, sqnr, tied_linears
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    LayerRecipe,
    Linear,
    Recipe,
    diagnose,
    quantize,
)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), Linear(32, 8))


# Kinds of models


def test_root_linear_and_its_layers_name() -> None:
    found = diagnose(nn.Linear(8, 4), [torch.randn(32, 8)])
    assert [x.name for x in found.layers] == [""]
    assert found.layers[0].label == "(model)"
    assert found.layers[0].all_but_this.relative_error == 0
    assert "(model)" in str(found)


def test_tied_layers() -> None:
    model = tied_linears()
    found = diagnose(model, [torch.randn(32, 8)])
    assert [x.name for x in found.layers] == ["0", "2"]
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(LayerRecipe("dynamic")),
        Recipe(LayerRecipe("dynamic", WEIGHT_INT4), embeddings=WEIGHT_INT8),
        Recipe(LayerRecipe("dynamic"), (("head", LayerRecipe("static")),), WEIGHT_INT8),
    ],
    ids=["no tables", "tables", "tables, static head"],
)
def test_head_tied_to_an_embedding_is_left(recipe: Recipe) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid = nn.Embedding(10, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mid(self.embed(ids)))

    found = diagnose(Model(), [torch.randint(10, (20, 5))], recipe=recipe)
    assert [x.name for x in found.layers] == ["mid"]
    assert "embed.weight" in found.left["head"]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = self.layer
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.layer(x).tanh())


def test_shared_layer_called_twice_and_one_never_called() -> None:
    model, data = Shared(), [torch.randn(64, 8), torch.randn(64, 8)]
    found = diagnose(model, data, samples=128)
    assert [x.name for x in found.layers] == ["layer", "unused"]
    assert [x.calls for x in found.layers] == [4, 0]
    used, unused = found.layers
    whole = quantize(model, "int8-dynamic")
    x = torch.cat(data)
    assert used.only_this.sqnr_db == pytest.approx(sqnr(model(x), whole(x)), abs=0.05)
    assert math.isnan(unused.both_sqnr_db)
    assert unused.only_this.relative_error == 0
    assert unused.all_but_this == found.damage_before
    assert any("never calls 1" in note for note in found.notes)
    assert "unused" in str(found)


def test_layer_that_static_calibration_never_calls_is_left() -> None:
    found = diagnose(Shared(), [torch.randn(64, 8)], recipe="int8-static")
    assert [x.name for x in found.layers] == ["layer"]
    assert "calibration never called it" in found.left["unused"]


class Routed(nn.Module):
    """Rows go to one of two experts, by what a Linear layer says of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        y = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static"])
def test_experts(recipe: str) -> None:
    model = Routed()
    with torch.no_grad():
        model.router.weight[0] *= 0.001
    x = torch.randn(64, 8)
    x[-1] = 0
    found = diagnose(model, [x, x[:1]], recipe=recipe)  # one expert gets no row of the second batch
    assert len(found.layers) == 3
    assert all(x.only_this.elements for x in found.layers)


@pytest.mark.parametrize("kind", ["tuple", "dict", "list"])
def test_kinds_of_batches(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
            assert scale.ndim == 0
            return {"ids": x.argmax(-1), "logits": self.layer(x) * scale}

    x, scale = torch.randn(32, 8), torch.tensor(2.0)
    batch: Any = {"tuple": (x, scale), "dict": {"x": x, "scale": scale}, "list": [x, scale]}[kind]
    found = diagnose(Two(), (batch for _ in range(3)), samples=20)
    assert (found.batches, found.rows, found.samples) == (3, 96, 20)
    assert found.damage_before.elements == 20 * 4


def test_output_says_what_counts() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    found = diagnose(model, [torch.randn(32, 8)], output=lambda y: y[:, :1], samples=32)
    assert found.damage_before.elements == 32


def test_model_that_takes_whole_batches_only() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(16, 8))

    found = diagnose(Model(), [torch.randn(16, 8) for _ in range(6)], samples=5)
    assert (found.samples, found.sample_batches) == (16, 1)
    assert any("whole batches" in note for note in found.notes)


def test_model_that_draws_random_numbers_and_writes_into_its_input() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.layer(x) + torch.randn(4)

    model, data = Noisy(), [torch.randn(32, 8)]
    before, state = data[0].clone(), torch.random.get_rng_state()
    found = diagnose(model, data)
    assert found.damage_before.relative_error < 0.05  # the noise is the same in all runs
    assert torch.equal(data[0], before)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert diagnose(model, data).layers == found.layers  # whatever the caller's random state


def test_encoder_layer_with_torchs_fused_path() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = dict(model.__dict__)
    found = diagnose(model, [torch.randn(8, 5, 16)], samples=8)
    assert [x.name for x in found.layers] == ["linear1", "linear2"]
    assert all(x.only_this.relative_error > 0 for x in found.layers)
    assert model.__dict__.keys() == before.keys()
    assert model.activation_relu_or_gelu == before["activation_relu_or_gelu"]


def test_low_precision_model() -> None:
    found = diagnose(mlp().bfloat16(), [x.bfloat16() for x in batches(2)])
    assert found.layers[0].float_bytes == 16 * 32 * 2
    assert 15 < found.damage_before.sqnr_db < 60


def test_rows_of_nan_are_counted() -> None:
    x = torch.randn(32, 16)
    x[3, 4] = math.nan
    found = diagnose(mlp(), [x], samples=32)
    assert found.damage_before.non_finite == 0  # NaN on both sides
    assert any("NaN or Inf" in note for note in found.notes)
    assert 20 < found.layer("0").both_sqnr_db < 60


# What is left behind


class Interrupting(nn.Module):
    """Raises at the n-th run."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        super().__init__()
        self.model, self.after, self.error = mlp(), after, error

    def forward(self, x: Tensor) -> Tensor:
        self.after -= 1
        if not self.after:
            raise self.error
        return self.model(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static"])
def test_model_is_restored_whatever_happens(
    after: int, error: type[BaseException], recipe: str
) -> None:
    model = Interrupting(after, error).train()
    model.model[1].eval()
    modules = list(model.named_modules())
    attributes = [dict(m.__dict__) for _, m in modules]
    children = [dict(m._modules) for _, m in modules]
    with pytest.raises(error):
        diagnose(model, batches(2), recipe=recipe, samples=64)
    model.after = attributes[0]["after"]
    assert list(model.named_modules()) == modules
    assert [dict(m.__dict__) for _, m in modules] == attributes
    assert [dict(m._modules) for _, m in modules] == children
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_nothing_is_left_behind() -> None:
    model = mlp().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    diagnose(model, batches(2), metric=lambda m: float(m(torch.ones(1, 16)).sum()))
    assert model.training
    assert not hasattr(model, "quantization")
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# Arguments


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": "text"}, TypeError, "model must be a torch.nn.Module"),
        ({"data": torch.ones(2, 16)}, TypeError, "data must be an iterable of batches"),
        ({"data": []}, ValueError, "data must hold at least one batch"),
        ({"data": ["text"]}, TypeError, "a batch must be a tensor"),
        ({"calibration": []}, ValueError, "calibration must hold at least one batch"),
        ({"recipe": "int7"}, ValueError, "recipe must be one of"),
        ({"recipe": Recipe(None)}, ValueError, "quantizes no layer of the model"),
        ({"samples": 0}, ValueError, "samples must be an int of at least 1"),
        ({"metric_layers": -1}, ValueError, "metric_layers must be an int of at least 0"),
        ({"budget": 0}, ValueError, "budget must be above 0"),
        ({"metric": lambda m: "good"}, TypeError, "metric.* must be a number"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"model": mlp(), "data": batches(1)} | change
    with pytest.raises(error, match=text):
        diagnose(arguments.pop("model"), arguments.pop("data"), **arguments)
