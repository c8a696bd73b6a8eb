"""Which layers are taken together: those of one repeated block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn


def stages(names: Iterable[str], model: nn.Module) -> dict[str, list[str]]:
    """Layers by the repeated block that holds them, or by themselves, in the order of ``names``.

    A repeated block is an entry of the outermost list (``ModuleList``, ``Sequential``) in which two
    entries of one type hold layers of ``names``.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    >>> stages(["0", "1.0", "1.1"], model)
    {'0': ['0'], '1.0': ['1.0'], '1.1': ['1.1']}
    """
    names = list(names)
    lists = {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.ModuleList | nn.Sequential) and _repeats(path, module, names)
    }
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        outer = (n for n in range(len(parts)) if ".".join(parts[:n]) in lists)
        depth = next(outer, len(parts))
        found.setdefault(".".join(parts[: depth + 1]), []).append(name)
    return found


def _repeats(path: str, module: nn.Module, names: list[str]) -> bool:
    prefix = f"{path}." if path else ""
    holding = {n[len(prefix) :].split(".")[0] for n in names if n.startswith(prefix) and n != path}
    types = Counter(type(child) for key, child in module.named_children() if key in holding)
    return max(types.values(), default=0) > 1
