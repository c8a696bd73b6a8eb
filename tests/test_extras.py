"""Optional packages: each is in an extra, errors name it, none is imported unasked."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import zeropoint

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parent.parent
SOURCE = Path(zeropoint.__file__).parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NAMED = re.compile(r"(?:zeropoint|pip install \.|'\.|=\.)\[([a-z][a-z, ]*)\]")
PACKAGE = {"sklearn": "scikit-learn", "nanobind_backend": "nanobind-backend"}


def named_in(text: str) -> set[str]:
    return {name.strip() for found in NAMED.findall(text) for name in found.split(",")}


def packages(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", r).group() for r in requirements}  # type: ignore[union-attr]


def third_party(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it, but those of Python and ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return {PACKAGE.get(n, n) for n in found - set(sys.stdlib_module_names) - {"zeropoint"}}


def texts() -> dict[str, str]:
    files = [*SOURCE.rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    return {str(f.name): f.read_text() for f in [*files, ROOT / "Makefile"]}


def test_every_extra_that_is_named_exists() -> None:
    named = {name: where for where, text in texts().items() for name in named_in(text)}
    assert {"gguf", "onnx", "report", "search", "models", "transformers"} <= named.keys()
    assert named.keys() <= EXTRAS.keys(), named


def test_every_extra_is_named_somewhere() -> None:
    assert set().union(*(named_in(text) for text in texts().values())) == EXTRAS.keys()


def test_every_package_that_is_imported_is_required_or_in_an_extra() -> None:
    known = packages(PROJECT["dependencies"]).union(*(packages(e) for e in EXTRAS.values()))
    for path in SOURCE.rglob("*.py"):
        assert third_party(path) <= known, path


def test_importing_zeropoint_brings_no_optional_package() -> None:
    optional = set().union(*(packages(e) for e in EXTRAS.values()))
    optional |= {"torchao", "compressed-tensors", "onnxruntime", "onnxscript", "pandas"}
    names = {n.replace("-", "_") for n in optional} | {"sklearn"}
    code = f"import zeropoint, sys; print([n for n in {sorted(names)!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


OPTIONAL = ("gguf", "jinja2", "matplotlib", "onnx", "scipy", "sklearn", "transformers")
NEEDED = {  # what is asked for, the extra that the error names
    "zeropoint.formats.gguf.read('x.gguf')": "gguf",
    "zeropoint.formats.onnx.write(model, 'x.onnx', (x,))": "onnx",
    "import zeropoint.integrations.transformers": "transformers",
    "zeropoint.sources.load_model('folder')": "models",
    "report.to_html('x.html')": "report",
    "zeropoint.explain(x, zeropoint.WEIGHT_INT8).to_plot('x.svg')": "report",
    "zeropoint.statistics.estimate([1.0, 2.0, 4.0])": "search",
    "zeropoint.splits.split_indices(100)": "search",
    "zeropoint.search(model, [x] * 40, max_drop=0.1)": "search",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each says where no optional package is installed."""
    path = tmp_path_factory.mktemp("without")
    (path / "folder").mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / "folder" / name).write_text("{}")
    code = f"""
        import json, sys
        import torch
        from torch import nn
        sys.modules.update(dict.fromkeys({OPTIONAL!r}))
        import zeropoint
        import zeropoint.formats.gguf, zeropoint.formats.onnx
        import zeropoint.sources, zeropoint.splits, zeropoint.statistics
        x = torch.randn(8, 4)
        model = nn.Sequential(nn.Linear(4, 4))
        report = zeropoint.compare(model, zeropoint.quantize(model), [x], repeats=0)
        errors = {{}}
        for call in {list(NEEDED)!r}:
            try:
                exec(call)
            except Exception as error:
                errors[call] = f"{{type(error).__name__}}: {{error}}"
        print(json.dumps(errors))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", NEEDED)
def test_what_is_missing_is_named_with_its_extra(call: str, errors: dict[str, str]) -> None:
    assert errors[call].startswith(("ImportError: ", "ModuleNotFoundError: ")), errors[call]
    assert named_in(errors[call]) == {NEEDED[call]}, errors[call]
    assert "pip install" in errors[call]


def test_every_format_names_tests_that_exist() -> None:
    """Each row of docs/interop.md's first table, in its last column."""
    text = (ROOT / "docs" / "interop.md").read_text()
    rows = [line for line in text.split("|---|---|---|---|---|")[1].splitlines() if line[:1] == "|"]
    table = rows[: next((i for i, row in enumerate(rows) if row.count("|") != 6), len(rows))]
    assert len(table) >= 10
    for row in table:
        files = re.findall(r"`(test_\w+\.py)`", row.split("|")[5])
        assert files, row
        for file in files:
            assert (ROOT / "tests" / file).is_file(), file
