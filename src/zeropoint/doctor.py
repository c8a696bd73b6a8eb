"""What this machine is, which kernel computes on it, and what would make it faster."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import functional, kernels, reference
from .affine import quantize_to_spec
from .spec import WEIGHT_INT8

PACKAGES = ("zeropoint", "torch", "numpy", "safetensors", "nanobind-backend", "transformers")
VARIABLES = (
    "ZEROPOINT_ISA",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "LD_PRELOAD",
)
# By the names of Linux's /proc/cpuinfo: x86-64, then aarch64.
X86 = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
FEATURES = (*X86, "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True)
class Advice:
    """One finding: an ``"error"`` must be mended, a ``"warning"`` costs speed, a ``"note"`` is to
    be known."""

    level: Literal["error", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Facts:
    """What was found. Plain values, so that advice can be given about any machine."""

    versions: dict[str, str | None]
    """Package → version, ``None`` where it is not installed."""
    system: str
    cpu: str
    cpu_features: tuple[str, ...]
    """Of :data:`FEATURES`, those that the CPU and the operating system enable."""
    cpus: int
    usable_cpus: int
    """What affinity and control groups leave to this process."""
    available_isas: tuple[str, ...]
    active_isa: str
    agrees: dict[str, bool]
    """Instruction set → whether a small layer gave the reference's bits."""
    core_error: str | None
    """Why the C++ core is missing; ``None`` if it is loaded."""
    core_file: str | None
    threads: int
    """What torch and the core compute with."""
    torch_cpu: str
    """The instruction set of torch's own kernels."""
    torch_build: dict[str, str]
    quantized_engines: tuple[str, ...]
    openmp: tuple[str, ...]
    """OpenMP runtimes mapped into this process."""
    environment: dict[str, str]
    """Variables of :data:`VARIABLES` that are set."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @property
    def ok(self) -> bool:
        """Whether the core computes here, and correctly."""
        return self.core_error is None and all(self.agrees.values())


def facts() -> Facts:
    """Look at the machine. Takes milliseconds; changes nothing."""
    found = {feature for feature in FEATURES if feature in _cpu_flags()}
    return Facts(
        versions={"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        system=platform.platform(),
        cpu=_cpu_name(),
        cpu_features=tuple(f for f in FEATURES if f in found),
        cpus=os.cpu_count() or 1,
        usable_cpus=_usable_cpus(),
        available_isas=kernels.available_isas(),
        active_isa=kernels.active_isa(),
        agrees=_agreement(),
        core_error=_core_error(),
        core_file=_core_file(),
        threads=torch.get_num_threads(),
        torch_cpu=torch.backends.cpu.get_cpu_capability(),
        torch_build=_torch_build(),
        quantized_engines=tuple(
            e for e in torch.backends.quantized.supported_engines if e != "none"
        ),
        openmp=_openmp_runtimes(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def advice(f: Facts) -> list[Advice]:
    """What to do about ``f``, the gravest first."""
    out: list[Advice] = []

    def say(level: Literal["error", "warning", "note"], text: str) -> None:
        out.append(Advice(level, text))

    if f.core_error is not None:
        say(
            "error",
            f"The C++ core is missing ({f.core_error}). Results are right to the bit, but come "
            "from the reference in plain torch, which is very slow. Install a C++17 compiler with "
            "OpenMP (Debian: apt-get install g++; macOS: brew install llvm libomp), then "
            "reinstall: pip install --force-reinstall --no-cache-dir --no-deps zeropoint",
        )
    for isa, agrees in f.agrees.items():
        if not agrees:
            say(
                "error",
                f"The {isa} kernel does not return the reference's bits on this machine. Set "
                "ZEROPOINT_ISA to another one and report this output.",
            )
    best = f.available_isas[0]
    wanted = f.environment.get("ZEROPOINT_ISA", "")
    if wanted and wanted not in f.available_isas:
        say(
            "warning",
            f"ZEROPOINT_ISA={wanted} is not available here and is ignored; there are "
            f"{', '.join(f.available_isas)}.",
        )
    elif f.active_isa != best:
        say("warning", f"{f.active_isa} computes, though {best} is available: unset ZEROPOINT_ISA.")
    if "avx512f" in f.cpu_features and "avx512_vnni" not in f.cpu_features:
        say(
            "note",
            "This CPU has AVX-512 without VNNI, the instructions for 8-bit products. 8-bit layers "
            "use 256-bit arithmetic: they gain where memory is the limit (few rows), less where "
            "arithmetic is.",
        )
    _advise_threads(f, say)
    _advise_torch(f, say)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(out, key=lambda a: order[a.level])


def _advise_threads(f: Facts, say: Any) -> None:
    if f.threads > f.usable_cpus:
        say(
            "warning",
            f"{f.threads} threads share {f.usable_cpus} usable CPU(s) and wait for each other: set "
            f"OMP_NUM_THREADS={f.usable_cpus}, or call torch.set_num_threads({f.usable_cpus}).",
        )
    elif f.threads == 1 and f.usable_cpus > 1:
        say(
            "note",
            f"One thread computes, though {f.usable_cpus} CPUs are usable: unset OMP_NUM_THREADS, "
            "or call torch.set_num_threads.",
        )
    if len(f.openmp) > 1:
        say(
            "warning",
            f"{len(f.openmp)} OpenMP runtimes are loaded ({', '.join(f.openmp)}). Their "
            "threads compete for the same CPUs: import torch first, and install one of them only.",
        )
    if f.environment.get("OMP_PROC_BIND", "false").lower() not in ("false", ""):
        say(
            "note",
            f"OMP_PROC_BIND={f.environment['OMP_PROC_BIND']} pins threads. Several processes "
            "pinned alike share the first CPUs: give each its own with OMP_PLACES or taskset.",
        )
    if f.environment.get("OMP_WAIT_POLICY", "").lower() == "passive":
        say(
            "note",
            "OMP_WAIT_POLICY=passive puts threads to sleep between layers; waking them costs more "
            "than a small layer takes.",
        )


def _advise_torch(f: Facts, say: Any) -> None:
    if "ATEN_CPU_CAPABILITY" in f.environment:
        say(
            "note",
            f"ATEN_CPU_CAPABILITY={f.environment['ATEN_CPU_CAPABILITY']} limits torch's own "
            f"kernels to {f.torch_cpu}.",
        )
    if f.torch_build.get("onednn") == "no" and f.torch_build.get("mkl") == "no":
        say(
            "warning",
            "torch was built without oneDNN and MKL: its float layers are slow here, and look slow "
            "in comparisons. Use one of PyTorch's own builds.",
        )
    if f.torch_build.get("openmp") == "no":
        say("warning", "torch was built without OpenMP: it shares no threads with the core.")
    if f.torch_build.get("cuda", "no") != "no" and f.torch_build.get("gpu") == "no":
        say(
            "note",
            "This torch is a CUDA build without a GPU to use; PyTorch's build for CPUs is smaller.",
        )
    x86 = "avx2" in f.cpu_features
    if x86 and not {"avx512_bf16", "amx_bf16"} & set(f.cpu_features):
        say("note", "This CPU has no bfloat16 arithmetic: compare against float32.")


def table(f: Facts) -> Any:
    """Facts as a table for ``rich``."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    build = ", ".join(f"{k} {v}" for k, v in f.torch_build.items())
    installed = ", ".join(f"{k} {v or '(not installed)'}" for k, v in f.versions.items())
    kernel_list = [
        f"{isa}{'' if f.agrees.get(isa, True) else ' (WRONG)'}" for isa in f.available_isas
    ]
    rows = {
        "kernel in use": f.active_isa,
        "kernels here": ", ".join(kernel_list),
        "core": f.core_file if f.core_error is None else f"MISSING: {f.core_error}",
        "CPU": f.cpu,
        "CPU features": ", ".join(f.cpu_features) or "unknown",
        "threads": f"{f.threads} of {f.usable_cpus} usable CPUs ({f.cpus} in all)",
        "OpenMP": ", ".join(f.openmp) or "unknown",
        "environment": ", ".join(f"{k}={v}" for k, v in f.environment.items()) or "nothing set",
        "torch's kernels": f"{f.torch_cpu}; {', '.join(f.quantized_engines)}",
        "torch's build": build,
        "versions": installed,
        "system": f.system,
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def version(package: str) -> str | None:
    """The installed version of a package, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _agreement() -> dict[str, bool]:
    """Whether each kernel gives the reference's bits on a layer with ragged edges."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 70, generator=generator)
    bias = torch.randn(67, generator=generator)
    weight = quantize_to_spec(torch.randn(67, 70, generator=generator), WEIGHT_INT8)
    expected = reference.linear_dynamic(x, weight, bias)
    result = {}
    for isa in kernels.available_isas():
        if isa != kernels.REFERENCE:
            with kernels.force_isa(isa):
                result[isa] = torch.equal(functional.linear_dynamic(x, weight, bias), expected)
    return result


def _core_file() -> str | None:
    try:
        spec = importlib.util.find_spec("zeropoint._core")
    except (ImportError, ValueError):
        return None
    return spec.origin if spec is not None else None


def _core_error() -> str | None:
    error = kernels.core_error()
    if error is not None and _core_file() is None:
        # The import machinery calls a module that was never built a circular import.
        return "it was not built: the package was installed without a working C++ compiler"
    return error


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_flags() -> set[str]:
    # Linux lists what it enables, the state of the vector registers included.
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _cpu_info(), re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _cpu_info(), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def _usable_cpus() -> int:
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_cpus()
    return max(1, min(cpus, math.ceil(quota))) if quota else cpus


def _cgroup_cpus() -> float | None:
    """CPUs that a control group (version 2, then 1) grants, or ``None`` for no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or period == "0":
        return None  # "max", or −1: no limit
    return int(quota) / int(period)


def _torch_build() -> dict[str, str]:
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "mkl": "yes" if torch.backends.mkl.is_available() else "no",
        "onednn": "yes" if torch.backends.mkldnn.is_available() else "no",
        "openmp": "yes" if torch.backends.openmp.is_available() else "no",
        "cuda": torch.version.cuda or "no",
        "gpu": "yes" if torch.cuda.is_available() else "no",
        "blas": blas.group(1) if blas else "unknown",
    }


def _openmp_runtimes() -> tuple[str, ...]:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    pattern = re.compile(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so[^/\s]*)")
    return tuple(sorted(set(pattern.findall(maps))))
