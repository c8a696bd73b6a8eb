"""Linear layers by ggml, the library under llama.cpp, through ctypes.

As a program, ``python ggml.py BUFFER`` computes small layers with weights in that buffer type and
ends with status 0 where they are right; a build for another CPU ends it by a signal, which is
better suffered there than where others are timed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import subprocess
import sys
import weakref
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT32, TYPES = 0, {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}
"""``enum ggml_type``."""
BLOCKS = {"Q4_0": 32, "Q8_0": 32, "Q4_K": 256}
"""What a row's length must be a multiple of."""
PLAIN, REPACKED, AMX = "CPU", "CPU_REPACK", "AMX"
"""Buffer types: what is written to the last two is packed for their kernels."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_P, _S = c_void_p, c_size_t
_BASE = {
    "ggml_log_set": (None, _Log, _P),
    "ggml_init": (_P, _InitParams),
    "ggml_free": (None, _P),
    "ggml_tensor_overhead": (_S,),
    "ggml_graph_overhead": (_S,),
    "ggml_new_tensor_2d": (_P, _P, c_int, c_int64, c_int64),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_add_inplace": (_P, _P, _P, _P),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_row_size": (_S, c_int, c_int64),
    "ggml_quantize_chunk": (_S, c_int, _P, _P, c_int64, c_int64, c_int64, _P),
    "ggml_backend_buft_name": (c_char_p, _P),
    "ggml_backend_buft_alloc_buffer": (_P, _P, _S),
    "ggml_backend_buft_get_alloc_size": (_S, _P, _P),
    "ggml_backend_buffer_get_base": (_P, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_cpu_buffer_from_ptr": (_P, _P, _S),
    "ggml_backend_dev_buffer_type": (_P, _P),
    "ggml_backend_dev_init": (_P, _P, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, _P, _P),
    "ggml_backend_reg_dev_get": (_P, _P, _S),
    "ggml_backend_reg_get_proc_address": (_P, _P, c_char_p),
    "ggml_backend_tensor_alloc": (c_int, _P, _P, _P),
    "ggml_backend_tensor_set": (None, _P, _P, _S, _S),
    "ggml_backend_graph_plan_create": (_P, _P, _P),
    "ggml_backend_graph_plan_compute": (c_int, _P, _P),
    "ggml_backend_graph_plan_free": (None, _P, _P),
}
_CPU = {
    "ggml_backend_cpu_reg": (_P,),
    "ggml_backend_cpu_set_n_threads": (None, _P, c_int),
    "ggml_backend_cpu_set_threadpool": (None, _P, _P),
    "ggml_threadpool_new": (_P, ctypes.POINTER(_ThreadpoolParams)),
}


_silent = _Log(lambda level, text, data: None)


def installed() -> bool:
    """Whether llama-cpp-python is, which brings the libraries."""
    return importlib.util.find_spec("llama_cpp") is not None


@cache
def _api() -> Any:
    """The functions, by their names without ``ggml_``."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    functions = {}
    for name, signatures in (("ggml-base", _BASE), ("ggml-cpu", _CPU)):
        library = ctypes.CDLL(str(folder / f"{prefix}{name}{suffix}"))
        for function, (result, *arguments) in signatures.items():
            found = getattr(library, function)
            found.restype, found.argtypes = result, arguments
            functions[function.removeprefix("ggml_")] = found
    functions["log_set"](_silent, None)  # it tells of every tensor that it repacks
    return type("Api", (), {k: staticmethod(v) for k, v in functions.items()})


@cache
def _device() -> int:
    return _api().backend_reg_dev_get(_api().backend_cpu_reg(), 0)


@cache
def buffer_types() -> dict[str, int]:
    """By name: what this build and CPU have, ``PLAIN`` first."""
    api = _api()
    found = [api.backend_dev_buffer_type(_device())]
    address = api.backend_reg_get_proc_address(
        api.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    if address:
        list_of = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        extra = list_of(_device())
        index = 0
        while extra[index]:
            found.append(extra[index])
            index += 1
    return {api.backend_buft_name(b).decode(): b for b in found}


@cache
def _backend(threads: int) -> int:
    """A backend whose threads are made once. Builds with OpenMP, the default, use its threads;
    others spin 5 ms after a graph at this ``poll``, as long as those of GNU OpenMP."""
    api = _api()
    backend = api.backend_dev_init(_device(), None)
    pool = api.threadpool_new(_ThreadpoolParams(n_threads=threads, poll=1))
    api.backend_cpu_set_n_threads(backend, threads)
    api.backend_cpu_set_threadpool(backend, pool)
    return backend


def quantize(weight: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """``(N, bytes of a row)``, by ggml's own quantizer.

    Raises:
        ValueError: rows that are no whole number of blocks.
    """
    n, k = weight.shape
    if k % BLOCKS[kind]:
        raise ValueError(f"{kind} takes rows in multiples of {BLOCKS[kind]}, got {k}")
    weight = np.ascontiguousarray(weight, np.float32)
    rows = np.empty((n, _api().row_size(TYPES[kind], k)), np.uint8)
    _api().quantize_chunk(TYPES[kind], weight.ctypes.data, rows.ctypes.data, 0, n, k, None)
    return rows


def _context(tensors: int) -> int:
    api = _api()
    size = tensors * api.tensor_overhead() + api.graph_overhead()
    return api.init(_InitParams(size, None, True))


class Weight:
    """Quantized weights in a buffer type."""

    def __init__(self, rows: NDArray[np.uint8], kind: str, shape: tuple[int, int], buffer: str):
        """
        Args:
            rows: of :func:`quantize`; they are copied.
            shape: ``(N, K)``.

        Raises:
            ValueError: a buffer type that is not here, or cannot multiply such weights.
        """
        api, types = _api(), buffer_types()
        if buffer not in types:
            raise ValueError(f"buffer must be one of {', '.join(types)}, got {buffer}")
        self.n, self.k = shape
        self._context = _context(4)
        self.tensor = api.new_tensor_2d(self._context, TYPES[kind], self.k, self.n)
        size = api.backend_buft_get_alloc_size(types[buffer], self.tensor)
        allocated = api.backend_buft_alloc_buffer(types[buffer], size)
        weakref.finalize(self, _free_all, self._context, [allocated])
        base = api.backend_buffer_get_base(allocated)
        api.backend_tensor_alloc(allocated, self.tensor, base)
        x = api.new_tensor_2d(self._context, FLOAT32, self.k, 1)
        product = api.mul_mat(self._context, self.tensor, x)
        if not api.backend_dev_supports_op(_device(), product):
            raise ValueError(f"{buffer} has no kernel for {kind} weights here")
        api.backend_tensor_set(self.tensor, rows.ctypes.data, 0, rows.nbytes)


class Product:
    """``y = x Wᵀ + bias`` on arrays that stay where they are; calling it computes ``y`` anew."""

    def __init__(self, weight: Weight, rows: int, x: int, bias: int, y: int, threads: int):
        """
        Args:
            x: address of ``(rows, K)`` float32, ``bias`` of ``(N,)``, ``y`` of ``(rows, N)``, each
                aligned to 32 bytes. They must live as long as this.
        """
        api = _api()
        context = _context(8)
        self._keep, buffers = weight, []

        def place(tensor: int, address: int, size: int) -> int:
            buffers.append(api.backend_cpu_buffer_from_ptr(address, 4 * size))
            api.backend_tensor_alloc(buffers[-1], tensor, address)
            return tensor

        inputs = api.new_tensor_2d(context, FLOAT32, weight.k, rows)
        place(inputs, x, rows * weight.k)
        product = api.mul_mat(context, weight.tensor, inputs)
        place(product, y, rows * weight.n)
        added = api.new_tensor_2d(context, FLOAT32, weight.n, 1)
        place(added, bias, weight.n)
        result = api.add_inplace(context, product, added)  # where the product has its place by now
        graph = api.new_graph(context)
        api.build_forward_expand(graph, result)
        backend = _backend(threads)
        plan = api.backend_graph_plan_create(backend, graph)
        weakref.finalize(self, _free_all, context, buffers, (backend, plan))
        self._compute, self._arguments = api.backend_graph_plan_compute, (backend, plan)

    def __call__(self) -> None:
        if self._compute(*self._arguments):
            raise RuntimeError("ggml could not compute the graph")


def _free_all(context: int, buffers: list[int], plan: tuple[int, int] | None = None) -> None:
    api = _api()
    if plan is not None:
        api.backend_graph_plan_free(*plan)
    for buffer in buffers:
        api.backend_buffer_free(buffer)
    api.free(context)


@cache
def unusable(buffer: str) -> str | None:
    """Why weights in this buffer type are not to be computed with here; found out by trying."""
    done = subprocess.run(
        [sys.executable, __file__, buffer], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"{buffer} weights end the process by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or ["?"])[-1]


def _others_release_tiles() -> None:
    """What other libraries do to the thread's AMX configuration: `tilerelease; ret`."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xc4\xe2\x78\x49\xc0\xc3")
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()


def _aligned(*shape: int) -> NDArray[np.float32]:
    """Zeros that begin at a multiple of 64 bytes."""
    size = int(np.prod(shape))
    block = np.zeros(4 * size + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + 4 * size].view(np.float32).reshape(shape)


def _check(buffer: str) -> None:
    generator = np.random.default_rng(0)
    n, k = 96, 256
    matrix = generator.standard_normal((n, k), np.float32)
    weight = Weight(quantize(matrix, "Q4_0"), "Q4_0", (n, k), buffer)
    for rows in (1, 40, 40):
        x, bias, y = _aligned(rows, k), _aligned(n), _aligned(rows, n)
        x[:] = generator.standard_normal(x.shape)
        bias[:] = generator.standard_normal(n)
        Product(weight, rows, x.ctypes.data, bias.ctypes.data, y.ctypes.data, 1)()
        expected = x @ matrix.T + bias
        error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
        if not error < 0.15:
            sys.exit(f"{buffer} weights: relative error {error:.2g}")
        if buffer == AMX:
            _others_release_tiles()


if __name__ == "__main__":
    _check(sys.argv[1])
