"""The diagram of who may import whom: any layer to its right, never leftwards, siblings never."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import zeropoint

SOURCE = Path(zeropoint.__file__).parent

# Left to right. Names are files or folders of src/zeropoint; a later file is placed here first.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("report",),
    ("search",),
    ("diagnose", "explain", "quantize_folder"),
    ("integrations",),
    ("formats", "bench", "doctor", "sources"),
    ("quantize", "prepack_model"),
    ("plan",),
    ("methods",),
    ("recipes", "replace", "walk"),
    ("algorithms", "blocks", "packed_linear"),
    ("calibrate", "compat", "embedding", "modules", "ops"),
    ("float_linear",),
    ("observers", "functional", "limits", "packings"),
    ("compute", "recording"),
    ("checks", "running"),
    ("kernels", "reference"),
    ("affine", "held_weight"),
    ("tensor",),
    ("layout", "indexing", "torch_names"),
    (
        "spec",
        "codec",
        "input_transform",
        "interleave",
        "atomic",
        "plain",
        "saving",
        "statistics",
        "splits",
        "terminal",
    ),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Folders of alternatives, with the files that these share. Other folders are one module in parts.
SHARED = {
    "algorithms": ("grid", "inputs"),
    "formats": (
        *(
            "assembled",
            "container",
            "embedding_info",
            "header",
            "loading",
            "slots",
            "streaming",
            "values",
        ),
        *("weight_entry", "writer"),
        # of formats that are not zeropoint's
        *("contents", "foreign_scales", "hf_folder", "int32_words", "new_folder"),
        # gguf's
        "gguf_file",
        # onnx's
        *("onnx_embedding", "onnx_graph", "onnx_lowering", "onnx_operators", "onnx_weights"),
        # compressed_tensors'
        "compressed_config",
        # torch_ao's
        *("inert_pickle", "rescue_report", "torch_archive", "torch_modules"),
        *("torch_parity", "torch_state"),
    ),
    "integrations": ("layer_table", "transformers_config"),
}
# Not layers: the public names, and the compiled core, which kernels alone may load.
PUBLIC, CORE = "__init__", "_core"


def modules(source: Path = SOURCE) -> list[Path]:
    return sorted(source.rglob("*.py"))


def imports(path: Path, source: Path = SOURCE) -> set[tuple[str, ...]]:
    """What a file imports of zeropoint, as paths within the package: ``("formats", "native")``."""
    package = path.relative_to(source).parent.parts  # the package that "." means in this file
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                if parts[0] == "zeropoint":
                    found.add(parts[1:])
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level == 0:
                if parts[:1] != ("zeropoint",):
                    continue
                base = parts[1:]
            else:
                base = package[: len(package) - (node.level - 1)] + parts
            for alias in node.names:
                target = (*base, alias.name)
                file = source.joinpath(*target)
                is_module = file.with_suffix(".py").exists() or file.is_dir() or target == (CORE,)
                found.add(target if is_module else base)
    return found


def violation(path: Path, target: tuple[str, ...], source: Path = SOURCE) -> str | None:
    """Why ``path`` may not import ``target``, or ``None`` if it may."""
    own = path.relative_to(source).with_suffix("").parts
    layer = own[0]
    if own == (PUBLIC,):
        return None
    if not target:
        return "imports the package's public names; name the module instead"
    if target == (CORE,):
        return None if layer == "kernels" else "only kernels may load the core"
    if layer not in RANK:
        return f"{layer} has no place in the diagram"
    if target[0] not in RANK:
        return f"imports {target[0]}, which has no place in the diagram"
    if target[0] == layer:
        # The folder's __init__ gathers; everyone else takes the shared files only.
        if layer not in SHARED or own[-1] == PUBLIC or target[1] in SHARED[layer]:
            return None
        return f"imports its sibling {'.'.join(target)}"
    if RANK[target[0]] == RANK[layer]:
        return f"imports its sibling {target[0]}"
    return None if RANK[target[0]] > RANK[layer] else f"imports leftwards: {target[0]}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_to_the_right(path: Path) -> None:
    wrong = {".".join(t): v for t in imports(path) if (v := violation(path, t)) is not None}
    assert not wrong, f"{path.relative_to(SOURCE)}: {wrong}"


def test_every_module_has_a_place_in_the_diagram() -> None:
    top = {p.relative_to(SOURCE).with_suffix("").parts[0] for p in modules()} - {PUBLIC}
    assert top <= set(RANK), f"place in the diagram: {sorted(top - set(RANK))}"


def test_reference_stands_on_tensor_and_spec_alone() -> None:
    assert {t[0] for t in imports(SOURCE / "reference.py")} <= {"affine", "tensor", "spec"}


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("spec.py", "from .tensor import QTensor", "leftwards"),
        ("kernels.py", "from . import reference", "sibling"),
        ("reference.py", "import zeropoint.kernels", "sibling"),
        ("reference.py", "from . import _core", "only kernels"),
        ("calibrate.py", "from zeropoint.modules import Linear", "sibling"),
        ("modules.py", "def f():\n    from .quantize import quantize", "leftwards"),
        ("modules.py", "import zeropoint", "public names"),
        ("formats/native.py", "from ..bench import bench", "sibling"),
        ("formats/native.py", "from ..report import compare", "leftwards"),
        ("formats/native.py", "from .gguf import load", "sibling"),
        ("formats/header.py", "from .gguf import load", "sibling"),
        ("formats/native.py", "from ..cli import main", "leftwards"),
        ("unheard_of.py", "from .spec import QuantSpec", "no place"),
    ],
)
def test_the_check_sees(tmp_path: Path, file: str, text: str, reason: str) -> None:
    for name in ("__init__", "quantize", "tensor", "reference", "kernels", "modules", "report"):
        (tmp_path / f"{name}.py").touch()
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "formats").mkdir(exist_ok=True)
    (tmp_path / "formats" / "gguf.py").touch()
    path.write_text(text)
    reasons = [violation(path, t, tmp_path) for t in imports(path, tmp_path)]
    assert any(r is not None and reason in r for r in reasons), reasons


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("modules.py", "from . import functional\nfrom .tensor import QTensor\nimport torch"),
        ("formats/native.py", "from ..quantize import quantize\nfrom .header import parse"),
        ("formats/__init__.py", "from .native import save"),
        ("kernels.py", "from . import _core"),
        ("report/plots.py", "from .numbers import Report"),
        ("cli.py", "from .formats import native\nfrom .report import compare"),
    ],
)
def test_the_check_allows(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / "functional.py").touch()
    (tmp_path / "formats").mkdir()
    for name in ("native", "header"):
        (tmp_path / "formats" / f"{name}.py").touch()
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    reasons = [violation(path, t, tmp_path) for t in imports(path, tmp_path)]
    assert reasons
    assert all(r is None for r in reasons), reasons
