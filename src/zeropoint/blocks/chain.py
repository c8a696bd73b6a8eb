"""Which blocks only hand on their output, and running them one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Call, Enough, calibrate, inferring, run_batch

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_SAMPLE = 4096  # values of a block's output that are compared with those of a run by itself

Place = int | str
"""Where an argument stands: by number or by name."""


class Chain:
    """Which blocks can be run by themselves, one on the outputs of the other.

    :meth:`watching` looks on while the model runs over all the data. A link from one block to the
    next is kept if, in every batch, both are called once, the second right after the first; the
    second is given the first one's output (a tensor, or the first of a tuple) as one argument, and
    otherwise the very same tensors and equal plain values as the first; and none of them is changed
    in place. Anything else that is passed, a cache, say, might remember calls and breaks the link.
    :meth:`verify` then runs the blocks by themselves on the first batch: where that gives other
    bits, for what the model does around them, there is no link.

    :meth:`holds_for` finds out whether the links of the first batches hold in others too, without
    running the blocks.

    Args:
        model: what holds the blocks.
        names: of the blocks, in the order of their calls.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._blocks = {name: modules[name] for name in names}
        order = list(self._blocks)
        self._next = dict(pairwise(order))
        self._model = model
        self._places: dict[str, set[Place]] = {name: set() for name in order}
        self._broken: set[str] = set()  # second blocks of links that do not hold
        self._first: dict[str, Call] = {}  # the first batch's
        self._samples: dict[str, Tensor] = {}
        # Blocks whose output is like their input → how many None follow it (see _alone); where.
        self._alike: dict[str, tuple[int, torch.device]] = {}
        self._batches = 0
        self._in_batch = False
        self._calls: Counter[str] = Counter()
        self._before: tuple[str, Call, Any, list[int]] | None = None
        self.running: str | None = None
        """The block that is running, while :meth:`watching`."""

    def exclude(self, name: str) -> None:
        """Never run this block by itself."""
        self._broken |= {name, self._next.get(name, name)}

    def after(self, name: str) -> str | None:
        """The block that takes the output of this one, if there is one that does."""
        follower = self._next.get(name)
        if follower is None or follower in self._broken or len(self._places[follower]) != 1:
            return None
        return follower

    def linked(self) -> list[str]:
        """The blocks that are followed, or follow, in their order."""
        follower = {name: self.after(name) for name in self._blocks}
        return [n for n in self._blocks if follower[n] or n in follower.values()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look on while the model runs; the model may run several batches."""
        handles = [self._model.register_forward_pre_hook(self._begin)]
        for name, block in self._blocks.items():
            handles.append(
                block.register_forward_pre_hook(
                    self._entering(name), with_kwargs=True, prepend=True
                )
            )
            handles.append(block.register_forward_hook(self._leaving(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._end()

    def _begin(self, *_: Any) -> None:
        self._end()
        self._batches += 1
        self._in_batch = True
        self._calls.clear()
        self._before = None

    def _end(self) -> None:
        for name in self._blocks if self._in_batch else ():
            if self._calls[name] != 1:
                self.exclude(name)
        self._in_batch = False
        self._before = None

    def _entering(self, name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call, before = Call(args, kwargs), self._before
            self._calls[name] += 1
            self.running = name
            if before is None or self._next.get(before[0]) != name:
                self._broken.add(name)
            else:
                place = _place(before[2], call)
                if place is None or not _others_are_same(before[1], call, place):
                    self._broken.add(name)
                else:
                    self._places[name].add(place)
            self._before = (name, call, None, _versions(call))

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, out = self._before, _handed_on(output)
            self.running = None
            if before is None or before[0] != name or before[3] != _versions(before[1]):
                out = None
            if before is not None and out is None:
                self._broken |= {self._next[n] for n in (name, before[0]) if n in self._next}
            if before is None or out is None:
                self._before = None
                return
            self._before = (name, before[1], out, before[3])
            if self._batches == 1:
                self._samples[name] = out.detach().flatten()[:_SAMPLE].clone()
                if name not in self._places or not self._places[name]:
                    self._first[name] = before[1]  # may head a chain

        return hook

    def verify(self) -> None:
        """Run the chains by themselves on the first batch, and break those that give other bits."""
        with inferring(self._model):
            for head, call in self._first.items():
                name: str | None = head
                while name in self.linked():
                    output = run_batch(self._blocks[name], call)
                    found, sample = _handed_on(output), self._samples.get(name)
                    if (
                        found is None
                        or sample is None
                        or not _same_bits(found.flatten()[:_SAMPLE], sample)
                    ):
                        self._break_from(name)
                        break
                    given = dict(_places(call)).get(self._given_at(name))
                    if isinstance(given, Tensor) and _kind(given) == _kind(found):
                        self._alike.update((name, (n, found.device)) for n in _alone(output))
                    name = self.after(name)
                    call = call if name is None else self._following(name, call, found)
        self._first.clear()
        self._samples.clear()

    def holds_for(self, data: Iterable[Any]) -> bool:
        """Whether the links hold in these batches too; where in doubt, no.

        The model runs without its linked blocks. In place of what a block would compute, it hands
        on a tensor of that size without values, which shows what the model does with it: nothing,
        or something that no such tensor allows. The last one hands on zeros.
        """
        linked = self.linked()
        changed = [n for n in linked if "forward" in self._blocks[n].__dict__]
        if not linked or changed or any(n not in self._alike for n in linked):
            return False

        def stand_in(name: str) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = dict(_places(Call(args, kwargs)))[self._given_at(name)]
                more, device = self._alike[name]
                last = self.after(name) is None
                out = torch.zeros_like(given, device=device if last else "meta")
                return out if more < 0 else (out, *[None] * more)

            return forward

        def past_its_block(*_: Any) -> None:
            raise RuntimeError("a block does not call its layers here")

        before = set(self._broken), {n: set(p) for n, p in self._places.items()}
        handles = []
        try:
            for name in linked:
                self._blocks[name].forward = stand_in(name)  # type: ignore[method-assign]
                inner = list(self._blocks[name].modules())[1:]
                handles += [module.register_forward_pre_hook(past_its_block) for module in inner]
            with self.watching():
                calibrate(self._model, {}, data, progress=False)
            return (self._broken, self._places) == before
        except Exception:  # whatever a model raises that looks at values that are not there
            return False
        finally:
            for handle in handles:
                handle.remove()
            for name in linked:
                self._blocks[name].__dict__.pop("forward", None)
            self._broken, self._places, self._in_batch = *before, False

    def _given_at(self, name: str) -> Place:
        """Where a linked block is given what the block before it hands on; the first one of a
        chain, where the others are."""
        of = name if self.after(name) is None else self.after(name)
        return next(iter(self._places[of]))  # type: ignore[index]

    def _break_from(self, name: str | None) -> None:
        while name is not None:
            name = self._next.get(name)
            if name is not None:
                self._broken.add(name)

    def inputs(self, name: str, data: Iterable[Any]) -> list[Call]:
        """The calls of a block, one a batch, from a run of the model that ends there."""
        found: list[Call] = []

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Call(args, kwargs))
            raise Enough

        handle = self._blocks[name].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            calibrate(self._model, {}, data, progress=False)
        finally:
            handle.remove()
        return found

    def advance(self, name: str, calls: list[Call]) -> list[Call]:
        """The calls of the block after this one; ``calls`` is used up."""
        follower = self.after(name)
        assert follower is not None
        with inferring(self._blocks[name]):
            for i, call in enumerate(calls):
                output = _handed_on(run_batch(self._blocks[name], call))
                calls[i] = self._following(follower, call, output)
        return calls

    def block(self, name: str) -> nn.Module:
        """The module of that name."""
        return self._blocks[name]

    def _following(self, follower: str, call: Call, output: Any) -> Call:
        place = next(iter(self._places[follower]))
        if isinstance(place, int):
            args = (*call.args[:place], output, *call.args[place + 1 :])
            return Call(args, call.kwargs)
        return Call(call.args, {**call.kwargs, place: output})


def _kind(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.dtype, x.device)


def _alone(output: Any) -> list[int]:
    """How many ``None`` follow the tensor in a block's output, −1 for one without a tuple; nothing
    where there is more in it."""
    if isinstance(output, Tensor):
        return [-1]
    plain = type(output) is tuple and all(value is None for value in output[1:])
    return [len(output) - 1] if plain else []


def _handed_on(output: Any) -> Tensor | None:
    if type(output) in (tuple, list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _places(call: Call) -> Iterator[tuple[Place, Any]]:
    yield from enumerate(call.args)
    yield from call.kwargs.items()


def _place(output: Any, call: Call) -> Place | None:
    found = [place for place, value in _places(call) if value is output and output is not None]
    return found[0] if len(found) == 1 else None


def _others_are_same(before: Call, now: Call, place: Place) -> bool:
    a, b = dict(_places(before)), dict(_places(now))
    return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a if key != place)


def _same(a: Any, b: Any) -> bool:
    """The very same tensors, equal plain values, and nothing that could remember calls."""
    if isinstance(a, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, _PLAIN) and a == b


def _versions(call: Call) -> list[int]:
    """Counts that rise when a tensor among the arguments is changed in place."""
    found: list[int] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(-1 if value.is_inference() else value._version)
        elif isinstance(value, tuple | list):
            for v in value:
                visit(v)
        elif isinstance(value, dict):
            visit(list(value.values()))

    visit([value for _, value in _places(call)])
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
