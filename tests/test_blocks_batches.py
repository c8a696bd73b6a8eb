"""Whether blocks hand on their outputs in all batches, told from the first one."""

import pytest
import torch

from method_cases import INT2, recipe
from test_blocks import FEATURES, ByName, Model, WithMask, data
from zeropoint import quantize
from zeropoint.blocks import Chain


def runs_and_state(model, method=("smooth", "gptq"), exclude="embed"):
    made = quantize(
        model, recipe(*method, weight=INT2), calibration=data(), exclude=exclude, progress=False
    )
    return [block.runs for block in model.blocks], made.state_dict()


@pytest.mark.parametrize("kind", [Model, WithMask, ByName])
def test_blocks_are_not_run_to_see_that_more_batches_go_the_same_way(kind, monkeypatch):
    torch.manual_seed(0)
    model = kind()
    runs, state = runs_and_state(model)
    # To look at the first batch and verify it; 3 for the sums, for what follows, and for the
    # outputs, which the last block hands on to nobody.
    assert runs == [2 + 9, 2 + 9, 2 + 9, 2 + 6]
    monkeypatch.setattr(Chain, "holds_for", lambda self, data: False)
    again, expected = runs_and_state(model)
    assert [b - 2 * a for a, b in zip(runs, again, strict=True)] == [2] * 4
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Later(Model):
    """Goes another way where a batch is longer than the first one."""

    def middle(self, x):
        return super().middle(x) if len(x) == 20 else self.other(x)


class AddsLater(Later):
    def other(self, x):
        first = x
        for block in self.blocks:
            x = block(x + first)
        return x


class ScalesLater(Later):
    def other(self, x):
        for block in self.blocks:
            x = 2 * block(x)
        return x


class MasksLater(Later):
    def other(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, mask=torch.full((FEATURES,), float(i)))
        return x


class MasksTheLastLater(Later):
    def other(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, mask=torch.ones(FEATURES) if i == 3 else None)
        return x


class StopsLater(Later):
    def other(self, x):
        for block in self.blocks[:3]:
            x = block(x)
        return x


class GoesOnLater(Later):
    def other(self, x):
        return self.blocks[1](Model.middle(self, x))


class GoesPastLater(Later):
    def other(self, x):
        return Model.middle(self, x) + self.blocks[1].up(x)[:, :FEATURES]


class LooksLater(Later):
    def other(self, x):
        for block in self.blocks:
            x = block(x)
            if x.sum() > 1e6:
                break
        return x


@pytest.mark.parametrize(
    "kind",
    [
        AddsLater,
        ScalesLater,
        MasksLater,
        MasksTheLastLater,
        StopsLater,
        GoesOnLater,
        GoesPastLater,
        LooksLater,
    ],
)
def test_another_way_in_a_later_batch_is_seen(kind, monkeypatch):
    torch.manual_seed(0)
    model, told = kind(), []
    holds_for = Chain.holds_for

    def noting(self, data):
        told.append(holds_for(self, data))
        return told[-1]

    monkeypatch.setattr(Chain, "holds_for", noting)
    _, state = runs_and_state(model)
    assert told == [False]
    monkeypatch.setattr(Chain, "after", lambda self, name: None)
    _, expected = runs_and_state(model)
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_layers_before_the_blocks_have_all_batches_looked_at(monkeypatch):
    monkeypatch.setattr(Chain, "holds_for", lambda self, data: pytest.fail("asked"))
    runs_and_state(Model(), exclude=None)
