"""The C++ core: which instruction set of it computes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

core: ModuleType | None
_error: str | None = None
try:
    from .. import _core as core  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    core = None
    _error = str(error)

REFERENCE = "reference"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the core calls each type."""


class State:
    """What computes now. ``enabled``: a kernel of the core, not the reference."""

    __slots__ = ("active", "enabled")

    def __init__(self) -> None:
        self.active, self.enabled = REFERENCE, False


state = State()


def core_error() -> str | None:
    """Why the C++ core could not be loaded, or ``None`` if it was."""
    return _error


def available_isas() -> tuple[str, ...]:
    """Instruction sets that can compute here, best first; ``"reference"`` is always the last."""
    return (*(core.available_isas() if core is not None else ()), REFERENCE)


def active_isa() -> str:
    """The instruction set that computes now."""
    return state.active


def _activate(name: str) -> None:
    if name not in available_isas():
        raise ValueError(f"isa must be one of {', '.join(available_isas())} here, got {name!r}")
    if name != REFERENCE:
        assert core is not None
        core.force_isa(name)
    state.active, state.enabled = name, name != REFERENCE


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Compute with another instruction set within a ``with`` block, in the whole process.

    Args:
        name: one of :func:`available_isas`; packed weights serve them all.

    Raises:
        ValueError: this machine cannot run it.

    >>> with force_isa("reference"):
    ...     active_isa()
    'reference'
    """
    before = state.active
    _activate(name)
    try:
        yield
    finally:
        _activate(before)


def activate_from_environment() -> None:
    wanted = os.environ.get("ZEROPOINT_ISA", "")
    best = available_isas()[0]
    if wanted and wanted not in available_isas():
        warnings.warn(
            f"ZEROPOINT_ISA={wanted!r} is not available here; using {best!r} "
            f"(available: {', '.join(available_isas())})",
            RuntimeWarning,
            stacklevel=2,
        )
        wanted = ""
    _activate(wanted or best)


activate_from_environment()
