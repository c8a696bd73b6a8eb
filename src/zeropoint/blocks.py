"""A model's repeated blocks, and running them one by one on the inputs that they had.

To calibrate a block, the model would have to run from its start each time. Where blocks only hand
their output on to the next one, as a transformer's layers do, that can be spared: the inputs of one
block are kept, and become those of the next by running the block once. Whether a model is so is
looked up in a run of it (:class:`Chain`), never assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Call, Enough, calibrate, inferring, progress_bar, run_batch

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_SAMPLE = 4096  # values of a block's output that are compared with those of a run by itself

Place = int | str
"""Where an argument stands: by number or by name."""


def stages(names: Iterable[str], model: nn.Module) -> dict[str, list[str]]:
    """Layers by the repeated block that holds them, or by themselves, in the order of ``names``.

    A repeated block is an entry of the outermost list (``ModuleList``, ``Sequential``) in which two
    entries of one type hold layers of ``names``.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    >>> stages(["0", "1.0", "1.1"], model)
    {'0': ['0'], '1.0': ['1.0'], '1.1': ['1.1']}
    """
    names = list(names)
    lists = {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.ModuleList | nn.Sequential) and _repeats(path, module, names)
    }
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        outer = (n for n in range(len(parts)) if ".".join(parts[:n]) in lists)
        depth = next(outer, len(parts))
        found.setdefault(".".join(parts[: depth + 1]), []).append(name)
    return found


def _repeats(path: str, module: nn.Module, names: list[str]) -> bool:
    prefix = f"{path}." if path else ""
    holding = {n[len(prefix) :].split(".")[0] for n in names if n.startswith(prefix) and n != path}
    types = Counter(type(child) for key, child in module.named_children() if key in holding)
    return max(types.values(), default=0) > 1


class Chain:
    """Which blocks can be run by themselves, one on the outputs of the other.

    :meth:`watching` looks on while the model runs over all the data. A link from one block to the
    next is kept if, in every batch, both are called once, the second right after the first; the
    second is given the first one's output (a tensor, or the first of a tuple) as one argument, and
    otherwise the very same tensors and equal plain values as the first; and none of them is changed
    in place. Anything else that is passed, a cache, say, might remember calls and breaks the link.
    :meth:`verify` then runs the blocks by themselves on the first batch: where that gives other
    bits, for what the model does around them, there is no link.

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
        self._batches = 0
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
        self._calls.clear()
        self._before = None

    def _end(self) -> None:
        for name in self._blocks:
            if self._batches and self._calls[name] != 1:
                self.exclude(name)
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
                while name is not None and self.after(name) is not None:
                    found = _handed_on(run_batch(self._blocks[name], call))
                    sample = self._samples[name]
                    if found is None or not _same_bits(found.flatten()[:_SAMPLE], sample):
                        self._break_from(name)
                        break
                    follower = self.after(name)
                    call = self._following(follower, call, found)  # type: ignore[arg-type]
                    name = follower
        self._first.clear()
        self._samples.clear()

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


class BlockInputs:
    """The inputs of blocks that run by themselves, of one block at a time.

    They are brought up to a block when they are asked for: blocks that were kept of an earlier run
    are run then, on all batches, one after the other.

    Args:
        chain: which blocks can run by themselves.
        order: of the blocks, as they are asked for.
        batches: the data.
        progress: show a progress bar where several blocks are run.
    """

    def __init__(self, chain: Chain, order: Iterable[str], batches: Iterable[Any], progress: bool):
        self.chain, self._batches, self._progress = chain, batches, progress
        self._before = {b: a for a, b in pairwise(order) if chain.after(a) == b}
        self._at: str | None = None
        self._calls: list[Call] = []

    def of(self, block: str) -> list[Call] | None:
        """The calls of a block, one a batch; ``None`` where the model must run from its start."""
        path = [block]
        while path[0] in self._before:
            path.insert(0, self._before[path[0]])
        if self._at not in path:
            self._at, self._calls = None, []
            if len(path) == 1 and block not in self._before.values():
                return None
            self._at, self._calls = path[0], self.chain.inputs(path[0], self._batches)
        steps = path[path.index(self._at) : -1]
        shown = self._progress and len(steps) > 1
        for name in progress_bar(steps, "running what is finished", shown):
            self._calls = self.chain.advance(name, self._calls)
        self._at = block
        return self._calls


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
