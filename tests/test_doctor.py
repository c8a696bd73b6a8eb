"""doctor: facts about this machine, and the advice that facts of any machine call for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from zeropoint import doctor, kernels
from zeropoint.doctor import Facts, advice, facts

HEALTHY = Facts(
    versions={"python": "3.11.7", "zeropoint": "0.1.0", "torch": "2.13.0", "transformers": None},
    system="Linux",
    cpu="A CPU",
    cpu_features=("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"),
    cpus=8,
    usable_cpus=8,
    available_isas=("avx512vnni", "avx2", "portable", "reference"),
    active_isa="avx512vnni",
    agrees={"avx512vnni": True, "avx2": True, "portable": True},
    core_error=None,
    core_file="/somewhere/zeropoint/_core.abi3.so",
    threads=8,
    torch_cpu="AVX512",
    torch_build={"mkl": "yes", "onednn": "yes", "openmp": "yes", "cuda": "no", "gpu": "no"},
    quantized_engines=("x86",),
    openmp=("/lib/libgomp.so.1",),
    environment={},
)


def texts(level: str, **changes: object) -> list[str]:
    found = advice(dataclasses.replace(HEALTHY, **changes))
    return [a.text for a in found if a.level == level]


def test_facts_of_this_machine() -> None:
    f = facts()
    assert f.active_isa == kernels.active_isa()
    assert f.available_isas[-1] == "reference"
    assert set(f.agrees) == set(f.available_isas) - {"reference"}
    assert all(f.agrees.values())
    assert f.threads == torch.get_num_threads()
    assert 1 <= f.usable_cpus <= f.cpus
    assert f.versions["torch"] == doctor.version("torch")
    assert (f.core_error is None) == (kernels.core_error() is None)
    assert f.ok == (kernels.core_error() is None)
    assert json.loads(json.dumps(f.to_dict())) == json.loads(json.dumps(dataclasses.asdict(f)))
    assert all(a.text for a in advice(f))


def test_looking_leaves_the_active_kernel_and_the_threads() -> None:
    before = kernels.active_isa(), torch.get_num_threads(), torch.random.get_rng_state()
    facts()
    assert (kernels.active_isa(), torch.get_num_threads()) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_healthy_machine_needs_no_advice() -> None:
    assert HEALTHY.ok
    assert advice(HEALTHY) == []


def test_missing_core_is_an_error_that_says_why_and_how() -> None:
    missing = {
        "core_error": "libgomp.so.1: cannot open shared object file",
        "available_isas": ("reference",),
        "active_isa": "reference",
        "agrees": {},
    }
    (text,) = texts("error", **missing)
    assert "libgomp.so.1" in text
    assert "compiler" in text
    assert not dataclasses.replace(HEALTHY, **missing).ok


def test_wrong_kernel_is_an_error_that_names_it() -> None:
    agrees = {"avx512vnni": True, "avx2": False, "portable": True}
    (text,) = texts("error", agrees=agrees)
    assert "avx2" in text
    assert not dataclasses.replace(HEALTHY, agrees=agrees).ok


def test_a_kernel_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available_isas", lambda: (*isas, "reference"))
    isas = ("broken",)

    class Forced:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(kernels, "force_isa", lambda name: Forced())
    right = doctor.functional.linear_dynamic
    assert doctor._agreement() == {"broken": True}
    monkeypatch.setattr(doctor.functional, "linear_dynamic", lambda *a: right(*a) + 1e-6)
    assert doctor._agreement() == {"broken": False}


def test_errors_come_first() -> None:
    f = dataclasses.replace(
        HEALTHY, threads=64, cpu_features=("avx512f", "amx_bf16"), agrees={"avx2": False}
    )
    assert [a.level for a in advice(f)] == ["error", "warning", "note"]


def test_more_threads_than_cpus() -> None:
    (text,) = texts("warning", threads=8, usable_cpus=3)
    assert "OMP_NUM_THREADS=3" in text


def test_one_thread_of_many() -> None:
    (text,) = texts("note", threads=1)
    assert "8 CPUs" in text
    assert texts("note", threads=1, usable_cpus=1) == []


def test_two_openmp_runtimes() -> None:
    (text,) = texts("warning", openmp=("/a/libgomp.so.1", "/b/libiomp5.so"))
    assert "/a/libgomp.so.1" in text
    assert "/b/libiomp5.so" in text


def test_isa_lowered_by_the_environment() -> None:
    (text,) = texts("warning", active_isa="avx2", environment={"ZEROPOINT_ISA": "avx2"})
    assert "avx512vnni" in text


def test_isa_that_is_not_there() -> None:
    (text,) = texts("warning", environment={"ZEROPOINT_ISA": "neon"})
    assert "neon" in text
    assert "ignored" in text


def test_avx512_without_vnni() -> None:
    features = ("avx2", "fma", "avx512f", "avx512_bf16")
    (text,) = texts("note", cpu_features=features)
    assert "VNNI" in text


def test_no_bfloat16_arithmetic() -> None:
    (text,) = texts("note", cpu_features=("avx2", "fma"))
    assert "bfloat16" in text


def test_torch_builds() -> None:
    slow = {**HEALTHY.torch_build, "mkl": "no", "onednn": "no"}
    (text,) = texts("warning", torch_build=slow)
    assert "oneDNN" in text
    (text,) = texts("warning", torch_build={**HEALTHY.torch_build, "openmp": "no"})
    assert "OpenMP" in text
    (text,) = texts("note", torch_build={**HEALTHY.torch_build, "cuda": "12.8"})
    assert "CUDA" in text
    assert texts("note", torch_build={**HEALTHY.torch_build, "cuda": "12.8", "gpu": "yes"}) == []
    (text,) = texts("note", environment={"ATEN_CPU_CAPABILITY": "default"})
    assert "ATEN_CPU_CAPABILITY=default" in text


@pytest.mark.parametrize(
    ("variable", "value"), [("OMP_PROC_BIND", "close"), ("OMP_WAIT_POLICY", "passive")]
)
def test_openmp_settings(variable: str, value: str) -> None:
    (text,) = texts("note", environment={variable: value})
    assert f"{variable}={value}" in text


def test_openmp_proc_bind_false_is_no_matter() -> None:
    assert texts("note", environment={"OMP_PROC_BIND": "FALSE"}) == []


def test_control_group_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Files:
        """Stands for pathlib.Path, with /sys/fs/cgroup elsewhere."""

        def __new__(cls, path: str) -> Path:  # type: ignore[misc]
            return tmp_path if path == "/sys/fs/cgroup" else Path(path)

    monkeypatch.setattr(doctor, "Path", Files)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert doctor._cgroup_cpus() is None
    assert doctor._usable_cpus() == 6
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor._cgroup_cpus() is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor._cgroup_cpus() == 1.5
    assert doctor._usable_cpus() == 2
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert doctor._cgroup_cpus() is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    assert doctor._cgroup_cpus() == 0.5
    assert doctor._usable_cpus() == 1
