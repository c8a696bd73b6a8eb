"""Who stands out, what is tried on them, what it costs, and going on after an interruption."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faults import plant_outliers
from small_models import batches
from zeropoint import WEIGHT_INT4, LayerRecipe, PerGroup, QuantSpec, Recipe, diagnose, quantize
from zeropoint.diagnose import Damage, trials
from zeropoint.diagnose.causes import GOOD, NEGLIGIBLE, culprits
from zeropoint.diagnose.cures import Candidate, candidates, overridden
from zeropoint.diagnose.samples import sample

BAD = Damage(0.5, 0.9)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
    )


# Culprits


def test_spread_as_in_a_healthy_transformer_is_nobodys_fault() -> None:
    noises = {str(i): 1e-6 * 1.25**i for i in range(30)}  # 30 dB from end to end
    assert culprits(noises, Damage(0.05, 0.99))[0] == []


def test_culprits_are_found_however_many() -> None:
    noises = {"a": 0.5, "b": 1e-4, "c": 0.1, "d": 2e-4, "e": 0.05}
    found, limit = culprits(noises, BAD)
    assert found == ["a", "c", "e"]
    assert limit == pytest.approx(10 * 1.5e-4)


def test_negligible_damage_has_no_culprits() -> None:
    noises = {"a": 1e-9, "b": 9e-5}
    assert culprits(noises, Damage(0.0095, 1.0))[0] == []
    assert culprits(noises, BAD)[0] == ["b"]


def test_layer_below_its_share_is_no_culprit() -> None:
    noises = {"a": 1e-12, "b": 0.9 * NEGLIGIBLE / 3, "c": 0.5}
    assert culprits(noises, BAD)[0] == ["c"]


def test_where_all_lose_too_much_the_worst_are_culprits() -> None:
    noises = {str(i): 0.001 * (i + 1) for i in range(8)}
    found, limit = culprits(noises, BAD)
    assert found == ["7", "6", "5", "4", "3", "2"]
    assert sum(v for k, v in noises.items() if k not in found) <= GOOD / 2
    assert limit == pytest.approx(GOOD / 2 / 6)


def test_single_layer_is_a_culprit_where_it_loses_too_much() -> None:
    assert culprits({"": 0.02}, Damage(math.sqrt(0.02), 0.99)) == ([""], pytest.approx(GOOD / 2))
    assert culprits({"": 0.002}, Damage(math.sqrt(0.002), 0.99))[0] == []


def test_infinite_noise_is_worst() -> None:
    assert culprits({"a": 1e-5, "b": math.inf, "c": 0.1}, Damage(math.nan, 1.0))[0] == ["b", "c"]


# Candidates


def diagnosed(recipe: LayerRecipe, x: Tensor | None = None, width: int = 64) -> Any:
    x = torch.randn(64, width) if x is None else x
    return diagnose(nn.Linear(x.shape[1], 16), [x], recipe=recipe).layers[0]


def test_sensitive_layer_gets_smaller_groups_then_eight_bits_then_float() -> None:
    layer = diagnosed(
        LayerRecipe("weight-only", QuantSpec(2, False, False, PerGroup(512))), width=512
    )
    found = [c.recipe for c in candidates(layer, {})]
    specs = [None if r is None else r.weight for r in found]
    sizes = [s.granularity.size for s in specs[:-2]]
    assert sizes == [128, 64, 32, 16]
    assert specs[-2].bits == 8
    assert specs[-1] is None
    assert all(r.mode == "weight-only" for r in found[:-1])


def test_groups_that_cost_more_than_eight_bits_are_no_cure() -> None:
    layer = diagnosed(LayerRecipe("weight-only", WEIGHT_INT4))
    assert [c.text for c in candidates(layer, {})] == [
        "4 bits in groups of 16",
        "8 bits per channel",
        "float",
    ]


def test_outliers_are_smoothed_first() -> None:
    x = torch.randn(64, 64)
    x[:, 5] *= 300
    layer = diagnosed(LayerRecipe("dynamic"), x)
    found = candidates(layer, {})
    assert [c.text for c in found] == ["smoothing", "float activations (weight-only)", "float"]
    assert found[0].recipe == LayerRecipe("dynamic", method=("smooth",))


def test_override_is_of_the_layer_alone() -> None:
    recipe = overridden(Recipe(LayerRecipe("dynamic")), {"a[0].*": None})
    assert recipe.match(["a[0].*"])[0] is None
    assert recipe.match(["a0.x"])[0] == LayerRecipe("dynamic")


# Cures that were measured


def spiky() -> tuple[nn.Sequential, list[Tensor]]:
    model, data = mlp(), batches(4)
    plant_outliers(model[0], [model[2]], torch.tensor([3, 11]), 2000.0)
    return model, data


def test_outliers_are_cured_and_the_cure_is_what_quantize_does() -> None:
    model, data = spiky()
    found = diagnose(model, data, samples=128)
    [cause] = found.causes
    assert (cause.layer, cause.kind) == ("2", "outlier-channels")
    assert cause.cure is not None
    assert cause.cure.method == ("smooth",)
    assert [t.suffices for t in cause.trials] == [False] * (len(cause.trials) - 1) + [True]
    assert cause.after.noise < cause.before.noise / 100
    assert found.damage_after is not None
    mended = quantize(model, found.suggestions, calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        y, other = model(x), mended(x)
    error = float((y - other).norm() / y.norm())
    assert found.damage_after.relative_error == pytest.approx(error, rel=0.02)
    assert found.damage_after.noise < found.damage_before.noise / 100


def test_cure_that_helps_but_does_not_suffice_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    floats = Candidate("float activations", LayerRecipe("weight-only"))
    monkeypatch.setattr(trials, "candidates", lambda *_: [floats, Candidate("float", None)])
    model, data = spiky()
    found = diagnose(model, data, samples=128)
    [cause] = found.causes
    first, last = cause.trials
    assert first.damage is not None
    assert first.damage.noise < cause.before.noise / 4
    assert not first.suffices
    assert last.suffices
    assert cause.cure is None
    assert "2" in quantize(model, found.suggestions).quantization.left


def test_sensitive_layer_is_cured_at_the_least_bytes() -> None:
    torch.manual_seed(1)
    model, data = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))), batches(4, 64)
    coarse = LayerRecipe("weight-only", QuantSpec(2, False, False, PerGroup(64)))
    recipe = Recipe(LayerRecipe("weight-only"), (("3", coarse),))
    found = diagnose(model, data, recipe=recipe)
    [cause] = found.causes
    assert (cause.layer, cause.kind) == ("3", "sensitive")
    assert cause.cure is not None
    sizes = [t.bytes for t in cause.trials]
    assert sizes == sorted(sizes)
    assert cause.trials[-1].recipe == cause.cure
    assert cause.cure.weight.bits == 8
    assert found.damage_after is not None
    assert found.damage_after.sqnr_db > found.damage_before.sqnr_db + 10


def test_tied_layers_are_mended_as_quantize_would() -> None:
    model, data = mlp(), batches(4)
    model[2].weight = nn.Parameter(model[2].weight[:, :32].clone())
    model.append(nn.Linear(8, 8))
    found = diagnose(model, data, recipe="int8-dynamic")
    assert found.causes == ()
    assert found.suggestions == found.recipe
    assert found.damage_after is None


def test_too_many_culprits_are_told_of() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(10))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.layers]).sum(0)

    model, data = Sum(), batches(3, 32)
    coarse = LayerRecipe("weight-only", QuantSpec(2, False, False, PerGroup(32)))
    found = diagnose(model, data, recipe=coarse)
    assert len(found.causes) == 4
    assert any("cures were tried on the 4 worst" in note for note in found.notes)


# Metrics


def test_metric_of_worst_layers_and_of_all_three_models() -> None:
    model, data = spiky()
    x = torch.cat(data)
    expected = model(x).detach()
    calls = []

    def closeness(m: nn.Module) -> Tensor:
        calls.append(m)
        return -(m(x) - expected).square().mean(1)

    found = diagnose(model, data, closeness, metric_layers=1)
    assert len(calls) == 3 + 2
    assert all(m is model for m in calls)
    metric = found.metric
    assert metric is not None
    assert metric.name == "closeness"
    assert metric.float_model == 0
    assert metric.repaired is not None
    assert metric.quantized < metric.repaired < 0
    worst = found.layer("2")
    assert worst.only_this.metric == pytest.approx(metric.quantized, rel=0.1)
    assert worst.all_but_this.metric > metric.quantized
    assert found.layer("0").only_this.metric is None
    assert found.damage_before.metric == metric.quantized
    assert found.damage_after.metric == metric.repaired
    assert metric.repair is not None
    assert metric.repair.significant


# The cost


def test_cost_grows_linearly_and_stays_within_the_budget() -> None:
    data = [torch.randn(64, 32) for _ in range(8)]
    for count in (4, 16, 64):
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(count)))
        runs: list[int] = []
        handle = model.register_forward_pre_hook(
            lambda _m, args, runs=runs: runs.append(len(args[0]))
        )
        found = diagnose(model, data)
        handle.remove()
        assert sum(runs) / 512 == pytest.approx(found.evaluations, abs=0.2)
        assert found.evaluations < 16
    assert found.samples < 64


def test_sample_is_spread_over_the_batches() -> None:
    data = [torch.full((10, 2), float(i)) for i in range(12)]
    found = sample(data, 8)
    assert [int(b[0, 0]) for b in found.batches] == [1, 4, 7, 10]
    assert found.rows == 8
    assert found.share == pytest.approx(8 / 120)
    assert sample(data, 90).rows == 90
    assert sample(data, 500).share == 1


def test_batches_that_cannot_be_cut_are_taken_whole() -> None:
    data = [(torch.zeros(4, 2), torch.zeros(3)) for _ in range(6)]
    found = sample(data, 1)
    assert found.rows == 1
    assert found.batches[0][0].shape == (4, 2)


# Going on after a kill


class Killed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.runs, self.last = spiky()[0], 0, math.inf

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs > self.last:
            raise KeyboardInterrupt
        return self.model(x)


def test_interrupted_diagnosis_goes_on(tmp_path: Path) -> None:
    data, cache = batches(4), tmp_path / "cache.json"
    model = Killed()
    expected = diagnose(model, data)
    whole = model.runs
    model.runs, model.last = 0, whole - 4
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, data, cache=cache)
    kept = json.loads(cache.read_text())
    assert len(kept["entries"]) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["cache.json"]
    model.runs, model.last = 0, math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(model, data, cache=cache)
    assert model.runs < whole / 2
    assert found.seconds > kept["seconds"]
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a == b
    assert found.causes == expected.causes
    assert found.suggestions == expected.suggestions


def test_cache_of_another_model_data_or_recipe_is_ignored_with_a_warning(tmp_path: Path) -> None:
    model, data, cache = mlp(), batches(2), tmp_path / "cache.json"
    diagnose(model, data, cache=cache)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.warns(UserWarning, match="another model:"):
        found = diagnose(model, data, cache=cache)
    assert found.layers == diagnose(model, data).layers
    with pytest.warns(UserWarning, match="another data, calibration, settings:"):
        diagnose(model, batches(3), cache=cache)
    with pytest.warns(UserWarning, match="another recipe:"):
        diagnose(model, batches(3), cache=cache, recipe="int8-weight-only")
    with pytest.warns(UserWarning, match="another settings:"):
        diagnose(model, batches(3), cache=cache, recipe="int8-weight-only", samples=3)


def test_metric_of_another_mind_is_asked_again(tmp_path: Path) -> None:
    model, data, cache = mlp(), batches(2), tmp_path / "cache.json"
    answers = [1.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    for offset in (0.0, 10.0):
        left = [a + offset for a in answers]
        found = diagnose(model, data, metric=lambda m, left=left: left.pop(0), cache=cache)
        assert found.metric is not None
        assert (found.metric.float_model, found.metric.quantized) == (1 + offset, 0.5 + offset)
    left = [11.0]
    again = diagnose(model, data, metric=lambda m: left.pop(0), cache=cache)
    assert again.metric == found.metric


@pytest.mark.parametrize("text", ["not JSON", "[1]", '{"format": "other"}'])
def test_foreign_file_is_refused_and_left(tmp_path: Path, text: str) -> None:
    file = tmp_path / "precious.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="no cache of a diagnosis"):
        diagnose(mlp(), batches(1), cache=file)
    assert file.read_text() == text


def test_cache_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        diagnose(mlp(), batches(1), cache=tmp_path / "none" / "cache.json")
