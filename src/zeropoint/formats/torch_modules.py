"""From the tree of a file of torch's, or from a living model, to the names of a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..tensor import QTensor
from .inert_pickle import Call, Object, Table
from .torch_archive import ADVICE, GRAPH_MODULE, Archive, Foreign
from .torch_state import Packed, TorchState, interpret

_PACKED_CLASSES = ("torch.ScriptObject", "__torch__.torch.classes.quantized.")
_MAX_MODULES = 100_000
_MAX_DEPTH = 100


def read_state(archive: Archive, key: str | None = None) -> TorchState:
    """What an archive holds.

    Args:
        archive: open.
        key: where the file holds a dictionary of several things, the one to read.

    Raises:
        CheckpointError: it is no state dict and no model, or of contents that do not fit.
    """
    tree = _Tree(archive)
    root, key = tree.pick(archive.root, key)
    if isinstance(root, dict):
        foreign = sorted(c for c in archive.classes if not c.startswith(_PACKED_CLASSES))
        if foreign:
            raise archive.fail(
                f"it holds an object of the class {foreign[0][:100]!r} beside tensors, which was "
                f"not made. {ADVICE}"
            )
        kind, entries = "state dict", {name: tree.value(v) for name, v in root.items()}
        versions = _versions(root)
    else:
        kind = "TorchScript" if archive.is_script else "model"
        entries = dict(tree.walk(root))
        versions = tree.versions
    try:
        state = interpret(kind, entries, versions, tree.classes)
    except ValueError as error:
        raise archive.fail(str(error)) from None
    state.key = key
    return state


class _Tree:
    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._modules = 0
        self.classes: dict[str, str] = {}
        self.versions: dict[str, Any] = {}

    def pick(self, root: Any, key: Any) -> tuple[Any, Any]:
        """The state dict or model in a file that may hold other things beside it, and its key."""
        if key is not None:
            if not isinstance(root, dict) or key not in root:
                raise self._archive.fail(f"it holds nothing under the key {key!r}")
            root = root[key]
        if isinstance(root, dict) and not _is_state_dict(root):
            found = [k for k, v in root.items() if _is_state_dict(v) or _state(v) is not None]
            if len(found) != 1:
                raise self._archive.fail(
                    "it is no state dict; it holds "
                    + (", ".join(str(k)[:40] for k in list(root)[:10]) or "nothing")
                    + ("; say which to read (key=)" if found else "")
                )
            key = found[0]
            root = root[key]
        if not isinstance(root, dict) and _state(root) is None:
            raise self._archive.fail("it holds neither a state dict nor a model")
        return root, key

    def value(self, node: Any) -> Any:
        """A tensor, packed parameters, a number; anything else as it is in the tree."""
        if isinstance(node, Call):
            return self._archive.tensor(node)
        if _is_packed(node):
            node = node.state
            if isinstance(node, tuple) and node and isinstance(node[0], tuple):
                node = node[0]  # a model's pickle names the class beside it
        if isinstance(node, tuple) and len(node) >= 2 and isinstance(node[0], Call):
            weight, bias = node[:2]  # (weight, bias) or (weight, bias, training, dtype)
            if bias is None or isinstance(bias, Call):
                bias = None if bias is None else self._archive.tensor(bias)
                return Packed(self._archive.tensor(weight), bias)
        return node

    def walk(self, node: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
        """The entries of a module's state dict, and of those below it."""
        self._modules += 1
        if self._modules > _MAX_MODULES or depth > _MAX_DEPTH:
            raise self._archive.fail("its modules hold each other without end")
        state = _state(node)
        layer = prefix.rstrip(".")
        if isinstance(node, Object):
            self.classes[layer] = node.name
        if isinstance(state, tuple):  # packed parameters that say of themselves what they save
            yield f"{prefix}_packed_params", self.value(state)
            return
        assert isinstance(state, dict)
        self.versions[layer] = state.get("version")
        items = dict(state) if "_modules" not in state else _registered(state)
        for name, value in items.items():
            if not isinstance(name, str):
                continue
            if _is_packed(value):
                yield f"{prefix}{name}", self.value(value)
            elif isinstance(value, Object) and isinstance(_state(value), dict | tuple):
                yield from self.walk(value, f"{prefix}{name}.", depth + 1)
            else:
                made = self.value(value)
                if isinstance(made, Tensor | QTensor | Foreign | Packed) or name in _NUMBERS:
                    yield f"{prefix}{name}", made


_NUMBERS = ("scale", "zero_point")


def _registered(state: dict[Any, Any]) -> dict[Any, Any]:
    """What a pickled ``nn.Module`` puts into its state dict, and what a quantized one adds."""
    items: dict[Any, Any] = {}
    for group in ("_parameters", "_buffers", "_modules"):
        if isinstance(state.get(group), dict):
            items |= state[group]
    transient = state.get("_non_persistent_buffers_set")
    if isinstance(transient, Call) and transient.args and isinstance(transient.args[0], list):
        for name in transient.args[0]:
            if isinstance(name, str):
                items.pop(name, None)
    own = {k: v for k, v in state.items() if k in _NUMBERS or _is_packed(v)}
    return own | items


def _is_packed(node: Any) -> bool:
    return isinstance(node, Object) and node.name.startswith(_PACKED_CLASSES)


def _state(node: Any) -> Any:
    """The state of a module in the tree; ``None`` if the node is none."""
    if isinstance(node, Call) and node.name == GRAPH_MODULE and node.args:
        return node.args[0] if isinstance(node.args[0], dict) else None
    if isinstance(node, Object) and not _is_packed(node):
        state = node.state
        if isinstance(state, dict) or (isinstance(state, tuple) and state):
            return state
    return None


def _is_state_dict(node: Any) -> bool:
    if not isinstance(node, dict) or not all(isinstance(k, str) for k in node):
        return False
    return any(
        isinstance(v, Call)
        or (isinstance(v, tuple) and v and isinstance(v[0], Call))
        or _is_packed(v)
        for v in node.values()
        if not (isinstance(v, Call) and v.name == GRAPH_MODULE)
    )


def _versions(root: dict[Any, Any]) -> dict[str, Any]:
    attributes = root.state if isinstance(root, Table) else None
    metadata = attributes.get("_metadata") if isinstance(attributes, dict) else None
    if not isinstance(metadata, dict):
        return {}
    return {
        name: entry.get("version")
        for name, entry in metadata.items()
        if isinstance(name, str) and isinstance(entry, dict)
    }


def living_state(source: nn.Module | Mapping[str, Any]) -> TorchState:
    """What a living model or state dict of ``torch.ao.quantization`` holds; torch's quantized
    tensors are converted.

    Raises:
        TypeError, ValueError: contents that do not fit.
    """
    classes: dict[str, str] = {}
    state: Mapping[str, Any]
    if isinstance(source, nn.Module):
        classes = {
            name: f"{type(m).__module__}.{type(m).__qualname__}"
            for name, m in source.named_modules(remove_duplicate=False)
        }
        kind, state = "model", source.state_dict()
    else:
        kind, state = "state dict", source
    entries = {name: _living(value) for name, value in state.items()}
    metadata = getattr(state, "_metadata", {})
    versions = {name: entry.get("version") for name, entry in metadata.items()}
    return interpret(kind, entries, versions, classes)


def _living(value: Any) -> Any:
    if hasattr(value, "__getstate__") and type(value).__name__ == "ScriptObject":
        value = value.__getstate__()
    if isinstance(value, tuple) and len(value) >= 2 and isinstance(value[0], Tensor):
        return Packed(*map(_living, value[:2]))
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if not value.is_quantized:
        return value
    try:
        return QTensor.from_torch(value)
    except (TypeError, ValueError) as error:
        try:
            values = value.dequantize()
        except RuntimeError:
            values = None
        return Foreign(str(error), values)
