"""The packers of AutoGPTQ and AutoAWQ, out of their wheels; the packages are not installed.

Both were given up by their authors and no longer import beside transformers 5, but what packs and
unpacks a layer is a file or two of plain torch, which runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

from models import fetch

ANY_PLATFORM = (
    *("--only-binary=:all:", "--python-version", "3.11"),
    *("--platform", "manylinux2014_x86_64", "--platform", "any"),
)
GPTQ = (
    "auto-gptq==0.7.1",
    "sha256:a372d81d523b8d2f98639bbca63c0c427cab0ed55b8a57bb96706b0942aa01c9",
    "auto_gptq/nn_modules/qlinear/",
    "24 MB",
)
AWQ = (
    "autoawq==0.2.7.post3",
    "sha256:02e09d71ca961ca131ac9963a2635fe8c34eb52d6b6a104b8574056aef8f2efe",
    "awq/",
    "0.1 MB",
)


def gptq_linear() -> Any:
    """AutoGPTQ's ``QuantLinear``."""
    path = fetch(*GPTQ, ANY_PLATFORM) / "qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("autogptq_qlinear_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


@cache
def awq_gemm() -> Any:
    """AutoAWQ's module of ``WQLinear_GEMM``, imported past what its packages' ``__init__`` does."""
    folder = fetch(*AWQ, ANY_PLATFORM)
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")[1:]))]
        sys.modules[name] = package
    lacks = importlib.util.find_spec("accelerate") is None  # a function beside asks for it
    if lacks:
        sys.modules["accelerate"] = types.ModuleType("accelerate")
    try:
        return importlib.import_module("awq.modules.linear.gemm")
    finally:
        if lacks:  # nobody else is to think that it is there
            del sys.modules["accelerate"]
