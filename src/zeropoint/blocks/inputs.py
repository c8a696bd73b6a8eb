"""The inputs of one block after the other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from ..calibrate import Call, progress_bar
from .chain import Chain


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
