"""What a model of any library can be asked for, and how a library says that it takes part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from method_subjects import Call, Subject


@dataclass(frozen=True)
class Contender:
    """A model that is ready to run."""

    bytes: int
    scores: Callable[[], Tensor]
    """Of each test sample, as :attr:`Subject.scores`."""
    calls: Callable[[int], dict[str, Call]]
    """A call of each case of the subject, on so many threads."""


@dataclass(frozen=True)
class ModelPeer:
    """A subject's model in another library.

    Args:
        name: library and format, as tables call it.
        subject: name of the subject.
        version: of the library: what was measured with another is measured again.
        prepare: makes the contender; files of its own go to the folder.
    """

    name: str
    subject: str
    version: str
    prepare: Callable[[Subject, Path], Contender]
