"""Which blocks can be run one by one, and that doing so changes nothing."""

import pytest
import torch
from torch import nn

from method_cases import INT2, recipe
from zeropoint import quantize
from zeropoint.blocks import Chain, stages
from zeropoint.calibrate import Call, calibrate

FEATURES = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(2 * FEATURES, FEATURES)
        self.runs = 0

    def forward(self, x, mask=None, **more):
        self.runs += 1
        y = self.down(self.up(x).relu())
        return x + (y if mask is None else y * mask)


class Model(nn.Module):
    """Blocks in a row; a subclass hands on something else."""

    def __init__(self, blocks=4, block=Block):
        super().__init__()
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.blocks = nn.ModuleList([block() for _ in range(blocks)])
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x):
        return self.head(self.middle(self.embed(x).tanh()).tanh())

    def middle(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def data(n=3):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(20 + i, FEATURES, generator=g) for i in range(n)]


def chain_of(model, batches=None):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chain = Chain(model, stages(names, model))
    with chain.watching():
        calibrate(model, {}, data() if batches is None else batches, progress=False)
    chain.verify()
    return chain


def links(model, batches=None):
    chain = chain_of(model, batches)
    return [n for n in ["embed", *(f"blocks.{i}" for i in range(4)), "head"] if chain.after(n)]


ALL = ["blocks.0", "blocks.1", "blocks.2"]


# Where blocks hand on their output and nothing else


class WithMask(Model):
    def middle(self, x):
        mask = torch.ones(FEATURES)
        for block in self.blocks:
            x = block(x, mask=mask, training=False, nothing=None, pair=(mask, 2))
        return x


class ByName(Model):
    def middle(self, x):
        for block in self.blocks:
            x = block(x=x)
        return x


class InTuple(Model):
    class TupleBlock(Block):
        def forward(self, x):
            return super().forward(x), "weights"

    def __init__(self):
        super().__init__(block=self.TupleBlock)

    def middle(self, x):
        for block in self.blocks:
            x = block(x)[0]
        return x


@pytest.mark.parametrize("kind", [Model, WithMask, ByName, InTuple])
def test_links_are_found(kind):
    assert links(kind()) == ALL


@pytest.mark.parametrize("kind", [Model, WithMask, ByName, InTuple])
def test_running_one_by_one_gives_each_block_the_inputs_it_had(kind):
    model = kind()
    chain = chain_of(model)
    seen = {name: [] for name in (*ALL, "blocks.3")}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, kwargs, calls=calls: calls.append(Call(args, kwargs)), with_kwargs=True
        )
        for name, calls in seen.items()
    ]
    with torch.no_grad():
        for batch in data():
            model(batch)
    for handle in handles:
        handle.remove()
    calls, name = chain.inputs("blocks.0", data()), "blocks.0"
    while name is not None:
        for call, expected in zip(calls, seen[name], strict=True):
            assert len(call.args) == len(expected.args)
            values = zip(
                [*call.args, *call.kwargs.values()],
                [*expected.args, *expected.kwargs.values()],
                strict=True,
            )
            assert all(not isinstance(a, torch.Tensor) or torch.equal(a, b) for a, b in values)
        following = chain.after(name)
        calls = chain.advance(name, calls) if following else calls
        name = following


@pytest.mark.parametrize("kind", [Model, WithMask, ByName, InTuple])
@pytest.mark.parametrize("mode", ["weight-only", "static"])
def test_quantized_the_same_with_and_without(kind, mode, monkeypatch):
    torch.manual_seed(0)
    model = kind()
    made = recipe("smooth", "gptq", mode=mode, weight=INT2)
    with_chain = quantize(model, made, calibration=data())
    runs = [block.runs for block in model.blocks]
    monkeypatch.setattr(Chain, "after", lambda self, name: None)
    without = quantize(model, made, calibration=data())
    state, expected = with_chain.state_dict(), without.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    # 3 batches: to look, for the sums, for the outputs, for what follows; and to verify the first
    more = 2 * 3 if mode == "static" else 0
    assert runs[1] == 4 * 3 + 1 + more
    assert model.blocks[1].runs - runs[1] > runs[1]


# Where they do not


class Skipping(Model):
    def middle(self, x):
        first = x
        for i, block in enumerate(self.blocks):
            x = block(x if i < 2 else x + first)
        return x


class ChangingMask(Model):
    def middle(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, mask=torch.full((FEATURES,), float(i)))
        return x


class ChangingNumber(Model):
    def middle(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, layer=i)
        return x


class Remembering(Model):
    def middle(self, x):
        cache = {"a"}  # a set: could hold anything
        for block in self.blocks:
            x = block(x, cache=cache)
        return x


class Reused(Model):
    def middle(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[0](x)


class PassedTwice(Model):
    def middle(self, x):
        for block in self.blocks:
            x = block(x, same=x)
        return x


class InPlace(Model):
    class Overwriting(Block):
        def forward(self, x):
            return x.add_(super().forward(x))

    def __init__(self):
        super().__init__(block=self.Overwriting)


class Counting(Model):
    class Stateful(Block):
        def forward(self, x):
            return super().forward(x) * (1 + self.runs % 7)

    def __init__(self):
        super().__init__(block=self.Stateful)


class Autocast(Model):
    def middle(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().middle(x)


class Object(Model):
    class Wrapping(Block):
        def forward(self, x):
            return {"hidden": super().forward(x)}

    def __init__(self):
        super().__init__(block=self.Wrapping)

    def middle(self, x):
        for block in self.blocks:
            x = block(x)["hidden"]
        return x


BROKEN = {
    Skipping: ["blocks.0"],
    ChangingMask: [],
    ChangingNumber: [],
    Remembering: [],
    Reused: ["blocks.1", "blocks.2"],
    PassedTwice: [],
    InPlace: [],
    Counting: [],
    Autocast: [],
    Object: [],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_links_that_do_not_hold_are_seen(kind):
    assert links(kind()) == BROKEN[kind]


@pytest.mark.parametrize("kind", [k for k in BROKEN if k is not Counting])
def test_quantized_all_the_same(kind, monkeypatch):
    torch.manual_seed(0)
    model, made = kind(), recipe("gptq", weight=INT2)
    found = quantize(model, made, calibration=data()).state_dict()
    monkeypatch.setattr(Chain, "after", lambda self, name: None)
    expected = quantize(model, made, calibration=data()).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_link_must_hold_in_every_batch():
    class Sometimes(Model):
        def middle(self, x):
            return super().middle(x) if len(x) < 22 else Skipping.middle(self, x)

    assert links(Sometimes(), data(2)) == ALL
    assert links(Sometimes(), data(3)) == ["blocks.0"]

    class Shorter(Model):
        def middle(self, x):
            for block in self.blocks[: 4 if len(x) < 22 else 3]:
                x = block(x)
            return x

    assert links(Shorter(), data(3)) == ["blocks.0", "blocks.1"]


def test_a_layer_that_is_called_past_its_block_too(monkeypatch):
    class Past(Model):
        def middle(self, x):
            return super().middle(x) + self.blocks[1].up(x)[:, :FEATURES]

    torch.manual_seed(0)
    model, made = Past(), recipe("gptq", weight=INT2)
    found = quantize(model, made, calibration=data()).state_dict()
    monkeypatch.setattr(Chain, "after", lambda self, name: None)
    expected = quantize(model, made, calibration=data()).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_blocks_whose_layers_are_left_out_do_not_confuse(monkeypatch):
    torch.manual_seed(0)
    model, made = Model(), recipe("gptq", weight=INT2)
    out = {"exclude": ["blocks.1.*", "blocks.2.up"]}
    found = quantize(model, made, calibration=data(), **out).state_dict()
    monkeypatch.setattr(Chain, "after", lambda self, name: None)
    expected = quantize(model, made, calibration=data(), **out).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_torchs_own_encoder(monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    batches = [torch.randn(2, 5, FEATURES) for _ in range(2)]
    made = recipe("gptq", weight=INT2)
    found = quantize(model, made, calibration=batches).state_dict()
    assert chain_of(model, batches).after("layers.0") == "layers.1"
    monkeypatch.setattr(Chain, "after", lambda self, name: None)
    expected = quantize(model, made, calibration=batches).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hooks_are_gone_afterwards():
    model = Model()
    chain_of(model)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
