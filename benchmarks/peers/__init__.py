"""Linear layers of several libraries behind one protocol, one small adapter a library.

An adapter lists its ``PEERS`` and says by ``missing()`` why it cannot take part. To add a library:
its file, its name in :data:`MODULES`.
"""

from __future__ import annotations

from types import ModuleType

from . import llamacpp_, onnxruntime_, openvino_, ours, torch_, torchao_, zentorch_
from .common import PRECISIONS, Case, Layer, Peer, Precision

MODULES: dict[str, ModuleType] = {
    "zeropoint": ours,
    "torch": torch_,
    "onnxruntime": onnxruntime_,
    "openvino": openvino_,
    "llamacpp": llamacpp_,
    "torchao": torchao_,
    "zentorch": zentorch_,
}
OURS = ours.NAME

__all__ = ["MODULES", "OURS", "PRECISIONS", "Case", "Layer", "Peer", "Precision", "available"]


def available(names: list[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """Peers of the libraries that are installed, and why the others are missing.

    Raises:
        ValueError: a name that is not of :data:`MODULES`.
    """
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    for name in MODULES if names is None else dict.fromkeys([OURS, *names]):
        if name not in MODULES:
            raise ValueError(f"libraries must be some of {', '.join(MODULES)}, got {name!r}")
        reason = MODULES[name].missing()
        if reason is None:
            peers += MODULES[name].PEERS
        else:
            absent[name] = reason
    return peers, absent
