"""The ``quantization_config`` of compressed-tensors: which layer has which scheme."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..modules import Mode
from .container import CheckpointError

METHOD = "compressed-tensors"
PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_PLAIN = (PLAIN, "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How the layers of one group are quantized.

    Attributes:
        bits: of the weight's signed integers, 2 to 8.
        symmetric: no zero points of the weight are stored.
        strategy: ``"tensor"``, ``"channel"`` or ``"group"``.
        group_size: with ``"group"``.
        mode: what the activations make of the layer.
        input_symmetric: of quantized activations.
        packed: the weight is packed into 32-bit words.
    """

    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    mode: Mode
    input_symmetric: bool
    packed: bool

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        """The entry of ``config_groups``."""
        inputs: dict[str, Any] | None = None
        if self.mode != "weight-only":
            dynamic = self.mode == "dynamic"
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": self.input_symmetric,
                "strategy": "token" if dynamic else "tensor",
                "group_size": None,
                "dynamic": dynamic,
            }
        return {
            "targets": targets,
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.symmetric,
                "strategy": self.strategy,
                "group_size": self.group_size,
                "dynamic": False,
            },
            "input_activations": inputs,
            "output_activations": None,
            "format": PACKED if self.packed else PLAIN,
        }


def encode(schemes: Mapping[str, Scheme], floats: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` for layers and their schemes.

    Args:
        schemes: layer → scheme.
        floats: layers that may be Linear layers and are not quantized.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    one = len(groups) == 1
    formats = {PACKED if scheme.packed else PLAIN for scheme in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            # One scheme is said the way that every reader knows: the class, less what is ignored.
            f"group_{i}": scheme.to_dict(["Linear"] if one else names)
            for i, (scheme, names) in enumerate(groups.items())
        },
        "ignore": sorted(floats) if one else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


class Config:
    """A ``quantization_config`` that was read.

    Raises:
        CheckpointError: of another method, or with features that cannot be brought over.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        if config.get("quant_method") != METHOD:
            raise CheckpointError(
                path,
                f"quant_method must be {METHOD!r}, got {str(config.get('quant_method'))!r:.60}",
            )
        for key, what in (
            ("kv_cache_scheme", "a quantized key-value cache"),
            ("transform_config", "transforms of inputs and weights"),
            ("sparsity_config", "sparse weights"),
        ):
            value = config.get(key)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise CheckpointError(path, f"it has {what} ({key}), which zeropoint has not")
        self._format = config.get("format")
        self._ignore = _strings(path, "ignore", config.get("ignore") or [])
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise CheckpointError(
                path, "config_groups must map names to objects that spell out the scheme"
            )
        self._groups = {
            name: (_strings(path, f"{name}: targets", group.get("targets")), group)
            for name, group in groups.items()
        }

    def scheme(self, layer: str) -> Scheme:
        """That of a layer which the file holds quantized.

        Raises:
            CheckpointError: none, or one that zeropoint has not.
        """
        if any(_matches(layer, pattern) for pattern in self._ignore):
            raise CheckpointError(
                self._path, "its tensors are quantized, the config ignores it", layer
            )
        # A name is nearer than a pattern, a pattern nearer than the class.
        for nearness in (0, 1, 2):
            for name, (targets, group) in self._groups.items():
                if any(_nearness(layer, target) == nearness for target in targets):
                    return self._scheme(layer, name, group)
        raise CheckpointError(self._path, "no group of the config names it", layer)

    def _scheme(self, layer: str, name: str, group: Mapping[str, Any]) -> Scheme:
        def fail(reason: str) -> CheckpointError:
            return CheckpointError(self._path, f"by {name}: {reason}", layer)

        weights = _args(group.get("weights"), fail, "weights")
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        size = weights.get("group_size")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise fail(f"weights of 2 to 8 bits can be read, got {str(bits)[:40]}")
        if strategy is None:  # as the package infers it
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        if strategy not in ("tensor", "channel", "group"):
            raise fail(f"weights by tensor, channel or group can be read, got {strategy!r:.40}")
        if strategy == "group" and (type(size) is not int or size < 1):
            raise fail(f"group_size must be an integer from 1, got {str(size)[:40]}")
        if weights.get("actorder") in ("group", "dynamic", True):
            raise fail("its groups are not runs of neighbouring inputs (actorder)")
        if group.get("output_activations"):
            raise fail("quantized outputs (output_activations) cannot be brought over")
        form = group.get("format") or self._format
        if form not in (PACKED, *_PLAIN):
            raise fail(f"format must be {PACKED}, {PLAIN} or {_PLAIN[1]}, got {str(form)[:40]!r}")
        mode: Mode = "weight-only"
        inputs: Mapping[str, Any] = {}
        if group.get("input_activations"):
            inputs = _args(group["input_activations"], fail, "input_activations")
            if inputs.get("num_bits") != 8:
                raise fail(f"activations of 8 bits can be read, got {inputs.get('num_bits')!r:.40}")
            dynamic, how = inputs.get("dynamic", False), inputs.get("strategy") or "tensor"
            if how not in (("token", "tensor") if dynamic is True else ("tensor",)) or (
                type(dynamic) is not bool
            ):
                raise fail(
                    "activations can be static by tensor, or dynamic by token or tensor, got "
                    f"dynamic={dynamic!r:.20}, strategy={how!r:.40}"
                )
            mode = "dynamic" if dynamic else "static"
        return Scheme(
            bits,
            bool(weights.get("symmetric", True)),
            strategy,
            size if strategy == "group" else None,
            mode,
            bool(inputs.get("symmetric", True)),
            form == PACKED,
        )


def _args(args: Any, fail: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(args, dict):
        raise fail(f"{what} must be a JSON object, got {json.dumps(args)[:40]}")
    if args.get("type", "int") != "int":
        raise fail(f"{what} of type {args['type']!r:.40}; integers can be read")
    return args


def _strings(path: Path, what: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(path, f"{what} must be a list of strings")
    return value


def _nearness(layer: str, target: str) -> int | None:
    """0: its name; 1: a pattern that matches it; 2: a class, which a file does not tell."""
    if target == layer:
        return 0
    if target.startswith("re:"):
        return 1 if _matches(layer, target) else None
    return 2 if target.isidentifier() and target[:1].isupper() else None


def _matches(layer: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return layer == pattern
    try:
        return re.match(pattern.removeprefix("re:"), layer) is not None
    except (re.error, RecursionError, OverflowError):
        return False
