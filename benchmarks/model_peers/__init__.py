"""Whole models quantized by other libraries, one small adapter each.

An adapter lists its ``PEERS`` and says by ``missing()`` why it cannot take part.
"""

from __future__ import annotations

from types import ModuleType

from . import llamacpp_, onnxruntime_, torchao_
from .common import Contender, ModelPeer

MODULES: dict[str, ModuleType] = {
    "torchao": torchao_,
    "llama.cpp": llamacpp_,
    "onnxruntime": onnxruntime_,
}

__all__ = ["MODULES", "Contender", "ModelPeer", "available"]


def available(subject: str) -> tuple[list[ModelPeer], dict[str, str]]:
    """Peers that have this subject's model, and why libraries that would are missing."""
    peers: list[ModelPeer] = []
    absent: dict[str, str] = {}
    for name, module in MODULES.items():
        have = [peer for peer in module.PEERS if peer.subject == subject]
        reason = module.missing() if have else None
        if reason is None:
            peers += have
        else:
            absent[name] = reason
    return peers, absent
