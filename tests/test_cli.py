"""The command line: what each command writes and prints, exit codes, errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zeropoint
from commands import fails, in_folder, ok, run, shell
from zeropoint import doctor, kernels, sources
from zeropoint.recipes import LayerRecipe, Recipe

__all__ = ["in_folder"]  # a fixture: used by being here


# The frame


def test_version_and_help() -> None:
    assert ok("--version").startswith("zeropoint ")
    text = ok("--help")
    for command in ("quantize", "compare", "inspect", "bench", "doctor"):
        assert command in text
        assert "Usage" in ok(command, "-h")


@pytest.mark.parametrize(
    "line",
    [
        ["--nonsense"],
        ["quantise"],
        ["quantize", "zp_nets:small"],
        ["quantize", "zp_nets:small", "--to", "int8-static", "--out", "x.safetensors"],
        ["compare", "zp_nets:small", "x.safetensors"],
        ["inspect", "a", "b"],
        ["bench", "--shapes", "64"],
        ["bench", "--shapes", "0x4"],
        ["bench", "--rows", "1,-2"],
        ["bench", "--threads", "two"],
        ["doctor", "--json=3"],
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(line: list[str]) -> None:
    assert "--help" in fails(*line, code=2)


def test_usage_error_names_the_command_and_the_nearest_one() -> None:
    assert "'quantize'" in fails("quantise", code=2)
    assert "zeropoint bench --help" in fails("bench", "--shapes", "64", code=2)


def test_unexpected_error_is_one_line_that_names_its_type() -> None:
    line = fails("quantize", "zp_nets:broken", "--to", "int8-dynamic", "--out", "x.safetensors")
    assert line == "error: RuntimeError: cannot be made"
    line = fails("quantize", "zp_nets:crashing", "--to", "int8-dynamic", "--out", "x.safetensors")
    assert line == "error: KeyError: 'gone'"


def test_debug_lets_the_error_through_wherever_it_stands() -> None:
    line = ["quantize", "zp_nets:broken", "--to", "int8-dynamic", "--out", "x.safetensors"]
    for at in (0, 1, len(line)):
        result = run(*line[:at], "--debug", *line[at:])
        assert result.exit_code == 1
        assert isinstance(result.exception, RuntimeError)
        assert result.stderr == ""


# quantize, inspect, compare: a factory


def test_quantize_inspect_compare() -> None:
    text = ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "--out", "q.safetensors")
    assert "quantized 2 of 2 Linear layers" in text
    assert "Wrote q.safetensors" in text
    with safe_open("q.safetensors", "pt") as file:
        assert file.metadata()["format"] == "zeropoint"
        assert file.get_tensor("0.weight").dtype == torch.int8

    text = ok("inspect", "q.safetensors")
    assert "checksums verified" in text
    assert "8 × 16" in text
    assert "16 × 4" in text
    assert "not verified" in ok("inspect", "q.safetensors", "--no-verify")
    content = json.loads(ok("inspect", "q.safetensors", "--json"))
    assert content["layers"]["2"]["mode"] == "dynamic"
    assert content["verified"] is True

    text = ok("compare", "zp_nets:small", "q.safetensors", "--data", "data.npy", "--json", "r.json")
    assert "dB" in text
    report = json.loads(Path("r.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == ["0", "2"]
    assert all(layer["alone"]["sqnr_db"] > 30 for layer in report["layers"])
    assert report["batches"] == 2  # 40 rows by 32


def test_quantized_file_is_the_library_s() -> None:
    ok("quantize", "zp_nets:small", "--to", "int8-weight-only", "--out", "q.safetensors")
    model = sources.load_model("zp_nets:small").model
    zeropoint.save(zeropoint.quantize(model, "int8-weight-only"), "expected.safetensors")
    assert Path("q.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()


def test_compare_writes_a_page() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "-o", "q.safetensors")
    ok("compare", "zp_nets:small", "q.safetensors", "--data", "data.npy", "--html", "r.html")
    assert "<html" in Path("r.html").read_text(encoding="utf-8")


def test_static_takes_its_scales_from_the_calibration_file() -> None:
    line = ["quantize", "zp_nets:small", "--to", "int8-static", "--out", "q.safetensors"]
    ok(*line, "--calibrate", "data.npy")
    first = float(load_file("q.safetensors")["0.input_scale"])
    np.save("wide.npy", 10 * np.load("data.npy"))
    ok(*line, "--calibrate", "wide.npy")
    assert float(load_file("q.safetensors")["0.input_scale"]) == pytest.approx(10 * first, rel=0.2)
    ok(*line, "--calibrate", "wide.npy", "--limit", 1)
    assert float(load_file("q.safetensors")["0.input_scale"]) < 10 * first


def test_include_exclude_and_recipe_file() -> None:
    line = ["quantize", "zp_nets:small", "--out", "q.safetensors"]
    ok(*line, "--to", "int8-dynamic", "--exclude", "2", "--exclude", "[1-9]")
    assert list(json.loads(ok("inspect", "q.safetensors", "--json"))["layers"]) == ["0"]
    ok(*line, "--to", "int8-dynamic", "--include", "2")
    assert list(json.loads(ok("inspect", "q.safetensors", "--json"))["layers"]) == ["2"]
    recipe = Recipe(LayerRecipe("dynamic"), (("0", LayerRecipe("weight-only")),))
    Path("r.json").write_text(json.dumps(recipe.to_dict()))
    ok(*line, "--to", "r.json")
    layers = json.loads(ok("inspect", "q.safetensors", "--json"))["layers"]
    assert {name: layer["mode"] for name, layer in layers.items()} == {
        "0": "weight-only",
        "2": "dynamic",
    }


def test_methods_are_the_library_s() -> None:
    line = ["quantize", "zp_nets:small", "--to", "int4", "--out", "q.safetensors"]
    text = ok(*line, "--method", "smooth, gptq", "--calibrate", "data.npy")
    assert "by smooth, gptq" in text
    assert "output error" in text
    loaded = sources.load_model("zp_nets:small")
    recipe = zeropoint.RECIPES["int4"].with_method(("smooth", "gptq"))
    data = sources.load_data("data.npy", loaded)
    expected = zeropoint.quantize(loaded.model, recipe, calibration=data)
    zeropoint.save(expected, "expected.safetensors")
    assert Path("q.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert "by hqq" in ok(*line, "--method", "hqq")
    assert "--method gptq needs --calibrate FILE" in fails(*line, "--method", "gptq", code=2)
    assert "--method: method must be of smooth," in fails(*line, "--method", "gtpq", code=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["w.safetensors", "--to", "int4", "--method", "gptq", "--calibrate", "data.npy"], "calib"),
        (["zp_nets:no", "--to", "int8-dynamic"], "has no 'no'"),
        (["missing.safetensors", "--to", "int8-dynamic"], "missing.safetensors"),
        (["zp_nets:small", "--to", "int9"], "int8-dynamic"),
        (["zp_nets:small", "--to", "int8-dynamic", "--include", "lm_*"], "lm_*"),
        (["zp_nets:small", "--to", "int8-dynamic", "--calibrate", "data.npy"], "no chosen layer"),
        (["zp_nets:small", "--to", "int8-static", "--calibrate", "no.npy"], "no.npy"),
        (["zp_nets:small", "--to", "int8-static", "--calibrate", "wide.npy"], "shapes"),
        (["w.safetensors", "--to", "int8-static", "--calibrate", "data.npy"], "calibrated"),
        (["zp_nets.py", "--to", "int8-dynamic"], "zp_nets.py"),
    ],
)
def test_quantize_refuses_with_one_line_and_writes_nothing(arguments: list[str], says: str) -> None:
    np.save("wide.npy", np.ones((2, 9)))
    save_file({"a.weight": torch.randn(4, 4)}, "w.safetensors")
    assert says in fails("quantize", *arguments, "--out", "out.safetensors")
    assert not list(Path().glob("*out*"))


@pytest.mark.filterwarnings("ignore:nothing was quantized")
def test_nothing_to_quantize_writes_nothing() -> None:
    line = ["zp_nets:without_linear", "--to", "int8-dynamic", "--out", "out.safetensors"]
    assert "nothing was quantized" in fails("quantize", *line)
    assert not Path("out.safetensors").exists()


def test_output_that_cannot_be_written_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("worked first")

    monkeypatch.setattr(sources, "load_model", work)
    line = ["quantize", "zp_nets:small", "--to", "int8-dynamic", "--out"]
    assert "no folder" in fails(*line, "nowhere/q.safetensors")
    assert "is a folder" in fails(*line, ".")
    line = ["compare", "zp_nets:small", "q.safetensors", "--data", "data.npy"]
    assert "--json" in fails(*line, "--json", "nowhere/r.json")
    assert "--html" in fails(*line, "--html", "nowhere/r.html")
    assert "--json" in fails("bench", "--json", "nowhere/r.json")


def test_compare_refuses_what_does_not_fit() -> None:
    ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "--out", "q.safetensors")
    assert "w.safetensors" in fails(
        "compare", "w.safetensors", "q.safetensors", "--data", "data.npy"
    )
    data = ["--data", "data.npy"]
    assert fails("compare", "zp_nets:without_linear", "q.safetensors", *data)
    content = bytearray(Path("q.safetensors").read_bytes())
    content[-1] ^= 1
    Path("q.safetensors").write_bytes(content)
    assert "q.safetensors" in fails("compare", "zp_nets:small", "q.safetensors", *data)
    assert "q.safetensors" in fails("inspect", "q.safetensors")


def test_inspect_of_what_is_no_checkpoint() -> None:
    save_file({"a.weight": torch.randn(4, 4)}, "w.safetensors")
    for file in ("w.safetensors", "data.npy", "missing"):
        assert file in fails("inspect", file)


# quantize: a file of tensors


def test_tensor_file_gets_the_integers_of_the_model() -> None:
    model = sources.load_model("zp_nets:small").model
    save_file(model.state_dict(), "float.safetensors")
    text = ok("quantize", "float.safetensors", "--to", "int8-dynamic", "--out", "a.safetensors")
    assert "2 of 2" in text
    ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "--out", "b.safetensors")
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    ok("compare", "zp_nets:small", "a.safetensors", "--data", "data.npy")


def test_tensor_file_with_nothing_to_quantize_warns() -> None:
    save_file({"x": torch.randn(4)}, "x.safetensors")
    result = run("quantize", "x.safetensors", "--to", "int8-dynamic", "--out", "y.safetensors")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: nothing was quantized")


# bench


def test_bench_prints_and_writes() -> None:
    text = ok(
        *("bench", "--shapes", "32x48,16X8", "--rows", "1,2", "--threads", "1"),
        *("--seconds", "0.01", "--json", "b.json"),
    )
    assert text.count("32 × 48") == 2
    content = json.loads(Path("b.json").read_text())
    assert content["version"] == 1
    assert content["machine"]["active_isa"] == kernels.active_isa()
    assert [r["out_features"] for r in content["results"]] == [48, 48, 8, 8]
    assert content["results"][0]["timings"]["int8-dynamic"]["median"] > 0


def test_reference_is_warned_about() -> None:
    with kernels.force_isa("reference"):
        result = run("bench", "--shapes", "8x8", "--rows", "1", "--seconds", "0.01")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: ")
    assert "doctor" in result.stderr


# doctor


def test_doctor_here() -> None:
    result = run("doctor")
    assert result.exit_code == (0 if kernels.core_error() is None else 1)
    assert kernels.active_isa() in result.stdout
    content = json.loads(run("doctor", "--json").stdout)
    assert content["ok"] == (kernels.core_error() is None)
    assert content["available_isas"][-1] == "reference"


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_doctor_without_the_core_is_loud(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(doctor, "_core_error", lambda: "it was not built")
    assert "it was not built" in fails("doctor", *options)
    text = run("doctor", *options).stdout
    assert "it was not built" in text
    if options:
        assert json.loads(text)["advice"][0]["level"] == "error"
    else:
        assert "MISSING" in text
        assert any(line.startswith("ERROR: ") for line in text.splitlines())


# Real processes


def test_module_runs_and_its_output_is_plain_where_it_is_piped() -> None:
    done = shell("-m", "zeropoint", "doctor", FORCE_COLOR="", TERM="xterm-256color")
    assert done.returncode == (0 if kernels.core_error() is None else 1), done.stderr
    assert "\x1b" not in done.stdout
    assert "kernel in use" in done.stdout


def test_error_in_a_process_is_one_line_without_traceback() -> None:
    line = ["-m", "zeropoint", "quantize", "zp_nets:broken", "--to", "int8-dynamic"]
    done = shell(*line, "--out", "q.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: RuntimeError: cannot be made\n"


def test_warning_in_a_process_is_one_line() -> None:
    line = ["zp_nets:without_linear", "--to", "int8-dynamic", "--out", "q.safetensors"]
    done = shell("-c", "from zeropoint.cli import main; main()", "quantize", *line)
    assert done.returncode == 1
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: nothing was quantized")
    assert error.startswith("error: nothing was quantized")


def test_ascii_terminals_get_no_encoding_error() -> None:
    ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "--out", "q.safetensors")
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = shell("-m", "zeropoint", "inspect", "q.safetensors", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "8 ? 16" in done.stdout


def test_importing_the_package_imports_no_command_line() -> None:
    code = "import sys, zeropoint; print([m for m in ('typer', 'rich') if m in sys.modules])"
    assert shell("-c", code).stdout == "[]\n"


def test_completion() -> None:
    environment = {"_ZEROPOINT_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    code = "from zeropoint.cli import main; main()"
    done = shell("-c", code, COMP_WORDS="zeropoint qu", **environment)
    assert done.stdout.split() == ["quantize"]
