"""Estimated damages are what changing one layer does to the output."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from zeropoint.running import cosines, pick_output
from zeropoint.search import sensitivities
from zeropoint.search.numbers import FLOAT


def noisy(layer: nn.Linear, size: float) -> nn.Linear:
    """The layer with its weight off by a little, as quantization would leave it."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight += size * torch.randn_like(other.weight)
    return other


def damages(model: nn.Module, layers: dict, built: dict, batches: list, **arguments):
    return sensitivities.estimate(
        model.eval(), batches, layers, built, pick_output, progress=False, **arguments
    )[0]


def measured(model: nn.Module, layer: nn.Module, other: nn.Module, batches: list) -> float:
    found = []
    with torch.no_grad():
        for x in batches:
            y = model(x)
            with sensitivities.replaced(layer, other):
                found.append(cosines(y, model(x)).mean(1))
    return 1 - float(torch.cat(found).mean())


class Tokens(nn.Module):
    """Vectors a token, mixed within a sample, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        h = h + self.b(h).mean(1, keepdim=True)
        h = h + torch.tanh(self.b(h))
        return self.c(h)


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_estimates_agree_with_measurements(size: float) -> None:
    model, batches = Tokens(), [torch.randn(40, 5, 8), torch.randn(24, 5, 8)]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    built = {n: {"noisy": noisy(m, size)} for n, m in layers.items()}
    found = damages(model, layers, built, batches, probes=16)
    for name, layer in layers.items():
        expected = measured(model, layer, built[name]["noisy"], batches)
        assert found[name]["noisy"] == pytest.approx(expected, rel=0.2), name


class Flattened(nn.Module):
    """A layer that sees (samples · tokens, features), then a mean over each sample's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def test_flattened_rows_are_samples_in_order() -> None:
    # Tokens of a sample are alike, so that their errors add up, and those of samples are not.
    model = Flattened()
    x = torch.randn(64, 1, 8) + 0.1 * torch.randn(64, 5, 8)
    built = {"layer": {"noisy": noisy(model.layer, 1e-3)}}
    found = damages(model, {"layer": model.layer}, built, [x], probes=16)
    expected = measured(model, model.layer, built["layer"]["noisy"], [x])
    assert found["layer"]["noisy"] == pytest.approx(expected, rel=0.15)


def test_errors_along_the_output_do_no_harm() -> None:
    # A cosine does not see length: a layer that doubles the output loses nothing.
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    double = copy.deepcopy(model[0])
    with torch.no_grad():
        double.weight *= 2
    found = damages(model, {"0": model[0]}, {"0": {"double": double}}, [torch.randn(16, 8)])
    assert found["0"]["double"] < 1e-10


def test_output_without_vectors() -> None:
    # One number a sample: the batch is one vector.
    model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))
    batches = [torch.randn(30, 8) for _ in range(30)]
    built = {"0": {"noisy": noisy(model[0], 1e-3)}}
    found = damages(model, {"0": model[0]}, built, batches, probes=8)
    expected = measured(model, model[0], built["0"]["noisy"], batches)
    assert found["0"]["noisy"] == pytest.approx(expected, rel=0.3)


def test_no_gradient_and_no_call_are_told_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.unused, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.cut(x).round().detach() + x)

    model = Model().eval()
    layers = dict(model.named_children())
    built = {n: {"noisy": noisy(m, 0.1)} for n, m in layers.items()}
    found, called = sensitivities.estimate(
        model, [torch.randn(8, 4)], layers, built, pick_output, progress=False
    )
    assert called == {"cut", "last"}
    assert math.isnan(found["cut"]["noisy"])
    assert found["last"]["noisy"] > 0


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    fused = torch.backends.mha.get_fastpath_enabled()
    broken = {"0": {"noisy": nn.Linear(3, 3)}}
    with pytest.raises(RuntimeError):
        damages(model, {"0": model[0]}, broken, [torch.randn(8, 4)])
    damages(model, {"0": model[0]}, {"0": {"n": noisy(model[0], 0.1)}}, [torch.randn(8, 4)])
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_same_seed_same_estimate() -> None:
    model = Tokens()
    built = {"a": {"noisy": noisy(model.a, 0.1)}}
    batches = [torch.randn(4, 5, 8)]
    first, again, other = (
        damages(model, {"a": model.a}, built, batches, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_pairs_to_check_are_spread_from_smallest_to_largest() -> None:
    table = {f"l{i}": {"x": 10.0**-i, FLOAT: 0.0, "y": math.nan} for i in range(30)}
    found = sensitivities.spread(table, 4, seed=0)
    assert [name for name, _ in found] == ["l29", "l19", "l10", "l0"]
    assert {label for _, label in found} == {"x"}
    assert len(sensitivities.spread(table, 100, seed=0)) == 30


def test_check_tells_how_near_estimates_come() -> None:
    table = {f"l{i}": {"x": float(i + 1)} for i in range(4)}
    good = sensitivities.compare(table, {(f"l{i}", "x"): 2.0 * (i + 1) for i in range(4)})
    assert (good.spearman, good.ratio) == (1.0, 2.0)
    bad = sensitivities.compare(table, {(f"l{i}", "x"): -float(i) for i in range(4)})
    assert bad.spearman == -1
    assert math.isnan(sensitivities.compare(table, {}).spearman)
