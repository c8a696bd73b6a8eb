"""Kernels where a failure would take the process down: each test runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zeropoint
from zeropoint import kernels

TESTS = Path(__file__).parent
SOURCE = Path(zeropoint.__file__).parents[1]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")


def run(code: str, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(SOURCE), str(TESTS)))} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


CHOOSE = """
import importlib, os, warnings
import zeropoint.kernels as k
print(k.active_isa(), k.core and k.core.active_isa())
os.environ["ZEROPOINT_ISA"] = "mmx"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    importlib.reload(k.isas)
print(*(w.message for w in caught))
print(k.active_isa(), k.core and k.core.active_isa())
"""


def test_environment_variable_at_import() -> None:
    """It lowers the instruction set; an unknown name warns and changes nothing."""
    best, lowest = kernels.available_isas()[0], kernels.available_isas()[-2:][0]
    lowered, warning, unchanged = run(CHOOSE, ZEROPOINT_ISA=lowest).splitlines()
    assert lowered == (f"{lowest} {lowest}" if kernels.core else "reference None")
    assert warning.startswith(f"ZEROPOINT_ISA='mmx' is not available here; using {best!r}")
    assert unchanged == (f"{best} {best}" if kernels.core else "reference None")


AFTER_FORK = """
import os, signal, sys, time
import torch
from kernel_cases import ISAS, MODES, make
from bits import assert_same_bits
from zeropoint import kernels

torch.set_num_threads(2)
cases = [make(mode, *shape) for mode in MODES for shape in ((1, 700, 700), (32, 512, 256))]
# By torch, whose own products may wait in the child for threads that are not there.
expected = [case.expected() for case in cases]
for isa in ISAS:
    fresh = make("dynamic", 3, 64, 64, seed=9)
    fresh_expected = fresh.expected()
    with kernels.force_isa(isa):
        for case, e in zip(cases, expected):
            assert_same_bits(case.compute(), e, isa)  # the parent has used its threads
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for case, e in zip(cases, expected):
                    assert_same_bits(case.compute(), e, isa + " in the child")
                assert_same_bits(fresh.compute(), fresh_expected, isa + " packed in the child")
                code = 0
            except BaseException as error:
                print(repr(error), flush=True)
            os._exit(code)
        deadline = time.monotonic() + 20
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, (isa, status)
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                sys.exit(f"{isa}: the child hangs")
            time.sleep(0.005)
        for case, e in zip(cases, expected):
            assert_same_bits(case.compute(), e, isa + " in the parent again")
print("done")
"""


@pytest.mark.skipif(kernels.core is None, reason="torch's own threads do not survive a fork")
def test_after_fork() -> None:
    assert run(AFTER_FORK).splitlines()[-1] == "done"


GUARDED = """
import ctypes, mmap
import torch
from kernel_cases import BYTES, FLOATS, FLOAT_MODES, ISAS, MODES, make
from bits import assert_same_bits
from zeropoint import QTensor, kernels

page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
keep = []

def guarded(t, at_end):
    '''A copy between two pages that nobody may touch, hard against one of them.'''
    size = t.numel() * t.element_size()
    inner = -(-size // page) * page or page
    memory = mmap.mmap(-1, inner + 2 * page)
    keep.append(memory)
    start = page + (inner - size if at_end else 0)
    if size:
        copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
        copy.copy_(t)
        address = copy.data_ptr() - start
    else:
        return t
    for guard in (address, address + page + inner):
        assert libc.mprotect(guard, page, 0) == 0, ctypes.get_errno()
    return copy

torch.set_num_threads(2)
for at_end in (True, False):
    for mode in MODES:
        for dtype in FLOATS[:3] if mode in FLOAT_MODES else BYTES:
            for m, k, n in ((1, 1, 1), (1, 64, 64), (2, 63, 17), (5, 130, 65), (23, 66, 70)):
                case = make(mode, m, k, n, dtype=dtype)
                expected = case.expected()
                w = case.weight
                case.x = guarded(case.x, at_end)
                case.bias = guarded(case.bias, at_end)
                case.weight = QTensor(
                    guarded(w.int_repr(), at_end), guarded(w.scale, at_end),
                    guarded(w.zero_point, at_end), 0,
                )
                for isa in ISAS:
                    with kernels.force_isa(isa):
                        print(at_end, mode, dtype, (m, k, n), isa, flush=True)
                        assert_same_bits(case.compute(), expected, isa)
print("done")
"""


AFTER_REST = """
import time
from pathlib import Path
import torch, zeropoint
torch.manual_seed(0)
linear = torch.nn.Linear(256, 1024)
layer = zeropoint.quantize(torch.nn.Sequential(linear), "int8-dynamic")
x = torch.randn(64, 256)
torch.set_num_threads(1)
alone = layer(x)
torch.set_num_threads(2)

def affinities():
    status = {t.name: (t / "status").read_text() for t in Path("/proc/self/task").iterdir()}
    return {name: next(line for line in text.splitlines() if line.startswith("Cpus_allowed:"))
            for name, text in status.items()}

layer(x)
before = affinities()
for _ in range(30):
    time.sleep(0.03)  # the workers sleep too, and may wake up where the caller is
    assert torch.equal(layer(x), alone)
assert affinities() == before, (before, affinities())
print("same", len(before) > 1)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.skipif(kernels.core is None, reason="needs the C++ core")
def test_threads_woken_after_a_rest_keep_their_affinity() -> None:
    assert run(AFTER_REST).split() == ["same", "True"]


def test_nothing_is_read_outside_of_the_inputs() -> None:
    assert run(GUARDED).splitlines()[-1] == "done"
