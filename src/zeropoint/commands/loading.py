"""The models that commands are given."""

from __future__ import annotations

from .. import sources
from .printing import warn


def load(model: str) -> sources.Loaded:
    """As :func:`zeropoint.sources.load_model`; what it warns of goes to stderr."""
    loaded = sources.load_model(model)
    for warning in loaded.warnings:
        warn(warning)
    return loaded
