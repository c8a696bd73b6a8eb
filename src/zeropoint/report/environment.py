"""Where a report's numbers come from: CPU, instruction set, threads, versions."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import kernels
from .numbers import Environment


def environment() -> Environment:
    """This machine, now."""
    return Environment(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu=_cpu(),
        logical_cpus=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=kernels.active_isa(),
        available_isas=kernels.available_isas(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        zeropoint=own_version(),
    )


def own_version() -> str:
    """The installed version of this package, ``"source"`` where it is not installed."""
    try:
        return version("zeropoint")
    except PackageNotFoundError:
        return "source"


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
