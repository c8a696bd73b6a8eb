"""ONNX Runtime on an exported model that its ``quantize_dynamic`` made int8, per channel.

MiniLM alone: an exported language model would have no cache of keys and values.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from bench_model import OnnxEncoder
from method_subjects import Subject
from zeropoint.doctor import version

from .common import Contender, ModelPeer


def missing() -> str | None:
    for name in ("onnx", "onnxruntime"):
        if not importlib.util.find_spec(name):
            return f"{name} is not installed"
    return None


def _prepare(subject: Subject, folder: Path) -> Contender:
    file = folder / f"onnxruntime-{version('onnxruntime')}-int8.onnx"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            OnnxEncoder.write(subject.model, subject.test[0], Path(work)).replace(file)
    return Contender(
        file.stat().st_size,
        lambda: subject.scores(OnnxEncoder(file, 1)),
        lambda threads: subject.calls(OnnxEncoder(file, threads)),
    )


PEERS = [ModelPeer("ONNX Runtime int8 dynamic", "minilm", version("onnxruntime") or "", _prepare)]
