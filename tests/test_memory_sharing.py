"""Packed weights stay shared after fork, as docs/memory.md says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zeropoint import kernels

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "memory_sharing.py"

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux"),
    pytest.mark.skipif(kernels.active_isa() == kernels.REFERENCE, reason="nothing is packed"),
]


def run_case(case):
    """MiB of one of two workers; the weights are 16 MiB in float32 and 4 in int8."""
    command = [sys.executable, SCRIPT, "--case", case, "--workers=2", "--layers=4", "--size=1024"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "private", "shared"), [("packed", 0, 16), ("packed-own", 16, 0), ("int8", 0, 8)]
)
def test_private_and_shared(case, private, shared):
    got = run_case(case)
    assert got["private"] == pytest.approx(private, abs=2.5)
    assert got["shared"] == pytest.approx(shared, abs=2.5)
