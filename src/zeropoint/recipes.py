"""Recipes: which spec and which mode each layer of a model gets. Plain data, readable as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch

from .algorithms import check_methods, needs_data
from .calibrate import DEFAULT_OBSERVER, OBSERVERS
from .modules import Mode
from .spec import (
    ACTIVATION_UINT8,
    SCALE_DTYPES,
    WEIGHT_INT4,
    WEIGHT_INT8,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
)

_SCALE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}


def spec_to_dict(spec: QuantSpec) -> dict[str, Any]:
    """A :class:`QuantSpec` as JSON types.

    >>> spec_to_dict(WEIGHT_INT8)
    {'bits': 8, 'signed': True, 'symmetric': True, 'granularity': 'per-channel', 'axis': 0}
    >>> spec_to_dict(WEIGHT_INT4)["granularity"], spec_to_dict(WEIGHT_INT4)["group_size"]
    ('per-group', 32)
    """
    d: dict[str, Any] = {"bits": spec.bits, "signed": spec.signed, "symmetric": spec.symmetric}
    if isinstance(spec.granularity, PerChannel):
        return {**d, "granularity": "per-channel", "axis": spec.granularity.axis}
    if isinstance(spec.granularity, PerGroup):
        scale_dtype = str(spec.scale_dtype).removeprefix("torch.")
        more = {"group_size": spec.granularity.size, "scale_dtype": scale_dtype}
        return {**d, "granularity": "per-group", **more}
    return {**d, "granularity": "per-tensor"}


def spec_from_dict(d: Mapping[str, Any]) -> QuantSpec:
    """The inverse of :func:`spec_to_dict`.

    Raises:
        TypeError, ValueError: not a mapping, unknown or missing keys, or values that do not fit.
    """
    name = d.get("granularity") if isinstance(d, Mapping) else None
    more = {"per-channel": ("axis",), "per-group": ("group_size", "scale_dtype")}
    known = ("bits", "signed", "symmetric", "granularity", *more.get(str(name), ()))
    _check_keys("a spec", d, known, required=known)
    granularity: Granularity = PerTensor()
    scale_dtype = "float32"
    if name == "per-channel":
        granularity = PerChannel(d["axis"])
    elif name == "per-group":
        granularity, scale_dtype = PerGroup(d["group_size"]), d["scale_dtype"]
        if scale_dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype must be one of {', '.join(_SCALE_DTYPES)}, got {scale_dtype!r}"
            )
    elif name != "per-tensor":
        raise ValueError(
            f"granularity must be 'per-tensor', 'per-channel' or 'per-group', got {name!r}"
        )
    dtype = _SCALE_DTYPES[scale_dtype]
    return QuantSpec(d["bits"], d["signed"], d["symmetric"], granularity, dtype)


def _check_rows(field: str, spec: QuantSpec) -> None:
    """Refuse scales that rows of a weight cannot have."""
    granularity = spec.granularity
    if granularity not in (PerTensor(), PerChannel(0)) and not isinstance(granularity, PerGroup):
        raise ValueError(
            f"{field} must be per tensor, PerChannel(0) or PerGroup(size), got {granularity!r}"
        )


@dataclass(frozen=True)
class LayerRecipe:
    """How one Linear layer is quantized.

    Args:
        mode: ``"dynamic"``, ``"static"`` or ``"weight-only"``, see :class:`QuantizedLinear`.
        weight: spec of the weight, 2 to 8 bits: per tensor, per channel along axis 0 (the output
            channel), or per group of inputs.
        activation: spec of the input, unsigned 8 bits and per tensor; static mode only.
        observer: how the input's range is chosen, one of :data:`zeropoint.calibrate.OBSERVERS`;
            static mode only.
        method: names of :data:`zeropoint.algorithms.METHODS`, in the order of their steps, by which
            the integers are found; none rounds the weights to nearest. A single name may stand for
            itself.

    Raises:
        TypeError, ValueError: a field that the layer cannot follow.

    >>> print(LayerRecipe("dynamic"))
    dynamic, weight int8 per channel
    """

    mode: Mode
    weight: QuantSpec = WEIGHT_INT8
    activation: QuantSpec = ACTIVATION_UINT8
    observer: str = DEFAULT_OBSERVER
    method: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        for field in ("weight", "activation"):
            spec = getattr(self, field)
            if not isinstance(spec, QuantSpec):
                raise TypeError(f"{field} must be a QuantSpec, got {type(spec).__name__}")
        _check_rows("weight", self.weight)
        a = self.activation
        if a.signed or a.bits != 8 or a.granularity != PerTensor():
            raise ValueError(f"activation must be unsigned 8 bits and per tensor, got {a!r}")
        if self.observer not in OBSERVERS:
            raise ValueError(
                f"observer must be one of {', '.join(OBSERVERS)}, got {self.observer!r}"
            )
        object.__setattr__(self, "method", check_methods(self.method))

    @property
    def needs_calibration(self) -> bool:
        """Whether sample data is needed: in static mode, and by some methods."""
        return self.mode == "static" or bool(needs_data(self.method))

    def __str__(self) -> str:
        text = f"{self.mode}, weight {describe(self.weight)}"
        if self.method:
            text += f" by {', '.join(self.method)}"
        if self.mode == "static":
            text += f", input {describe(self.activation)} by {self.observer}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """This recipe as JSON types; what only static mode reads is left out elsewhere, and
        ``method`` where there is none."""
        d: dict[str, Any] = {"mode": self.mode, "weight": spec_to_dict(self.weight)}
        if self.mode == "static":
            d |= {"activation": spec_to_dict(self.activation), "observer": self.observer}
        if self.method:
            d["method"] = list(self.method)
        return d

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> LayerRecipe:
        """The inverse of :meth:`to_dict`; all but ``mode`` may be missing.

        Raises:
            TypeError, ValueError: not a mapping, unknown keys, or values that do not fit.
        """
        _check_keys("a layer's recipe", d, [f.name for f in fields(cls)], required=("mode",))
        specs = {k: spec_from_dict(d[k]) for k in ("weight", "activation") if k in d}
        return cls(**{**d, **specs})


@dataclass(frozen=True)
class Recipe:
    """How each Linear layer of a model is quantized, and its embedding tables.

    Args:
        default: for layers that no pattern matches; ``None`` keeps them float.
        overrides: ``(pattern, layer recipe or None)`` pairs. The first pattern that matches a
            layer's qualified name wins; ``None`` keeps the layer float. Patterns are globs as in
            :mod:`fnmatch`, case-sensitive, and ``*`` also matches dots.
        embeddings: spec of the rows of every ``nn.Embedding``, as a layer's ``weight``, whose
            output channel is a row here; ``None`` keeps them float. ``overrides`` is not about
            them. A layer that is tied to a table gets the table's spec and no method, whatever its
            own recipe says, unless that keeps it float.

    Raises:
        TypeError, ValueError: a field of the wrong type, or a spec that rows cannot follow.

    >>> recipe = Recipe(LayerRecipe("dynamic"), overrides=(("*.lm_head", None),))
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    default: LayerRecipe | None
    overrides: tuple[tuple[str, LayerRecipe | None], ...] = ()
    embeddings: QuantSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.embeddings, QuantSpec | None):
            raise TypeError(
                f"embeddings must be a QuantSpec or None, got {type(self.embeddings).__name__}"
            )
        if self.embeddings is not None:
            _check_rows("embeddings", self.embeddings)
        if not isinstance(self.default, LayerRecipe | None):
            raise TypeError(
                f"default must be a LayerRecipe or None, got {type(self.default).__name__}"
            )
        overrides = tuple(tuple(pair) for pair in self.overrides)
        for pair in overrides:
            if not (
                len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], LayerRecipe | None)
            ):
                raise TypeError(
                    f"overrides must hold (pattern, LayerRecipe or None) pairs, got {pair!r}"
                )
        object.__setattr__(self, "overrides", overrides)

    def match(self, names: Iterable[str]) -> tuple[LayerRecipe | None, str | None]:
        """What a layer known by these names gets, and the pattern that decided, if one did."""
        names = list(names)
        for pattern, layer in self.overrides:
            if any(fnmatchcase(name, pattern) for name in names):
                return layer, pattern
        return self.default, None

    def with_method(self, method: str | tuple[str, ...]) -> Recipe:
        """The same for all layers that it quantizes, with this method.

        Raises:
            TypeError, ValueError: as :class:`LayerRecipe`.

        >>> print(RECIPES["int8-dynamic"].with_method("gptq").default)
        dynamic, weight int8 per channel by gptq
        """

        def by(layer: LayerRecipe | None) -> LayerRecipe | None:
            return None if layer is None else replace(layer, method=method)  # type: ignore[arg-type]

        overrides = tuple((p, by(layer)) for p, layer in self.overrides)
        return Recipe(by(self.default), overrides, self.embeddings)

    def to_dict(self) -> dict[str, Any]:
        """This recipe as JSON types; ``embeddings`` is left out where they stay float."""
        d = {
            "default": None if self.default is None else self.default.to_dict(),
            "overrides": [[p, None if r is None else r.to_dict()] for p, r in self.overrides],
        }
        return d if self.embeddings is None else d | {"embeddings": spec_to_dict(self.embeddings)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; all but ``default`` may be missing.

        Raises:
            TypeError, ValueError: not a mapping, unknown keys, or values that do not fit.
        """
        _check_keys("a recipe", d, ("default", "overrides", "embeddings"), required=("default",))
        overrides = d.get("overrides", [])
        if not isinstance(overrides, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in overrides
        ):
            raise TypeError(f"overrides must be a list of [pattern, recipe] pairs: {overrides!r}")

        def layer(value: Any) -> LayerRecipe | None:
            return None if value is None else LayerRecipe.from_dict(value)

        embeddings = d.get("embeddings")
        return cls(
            layer(d["default"]),
            tuple((p, layer(r)) for p, r in overrides),
            None if embeddings is None else spec_from_dict(embeddings),
        )


RECIPES: dict[str, Recipe] = {
    "int8-dynamic": Recipe(LayerRecipe("dynamic")),
    "int8-static": Recipe(LayerRecipe("static")),
    "int8-weight-only": Recipe(LayerRecipe("weight-only")),
    "int4": Recipe(LayerRecipe("dynamic", WEIGHT_INT4)),
    "int4-weight-only": Recipe(LayerRecipe("weight-only", WEIGHT_INT4)),
}
"""Recipes by name. ``"int4"`` quantizes activations row by row to 8 bits: that costs little beside
what 4-bit weights cost, and lets the integer units compute."""


TABLES: dict[str, QuantSpec] = {"int8": WEIGHT_INT8, "int4": WEIGHT_INT4}
"""Specs of embedding tables by name: those of the recipes' weights, so that a tied output layer
is what it would be by the recipe."""


def get_recipe(recipe: str | Recipe | LayerRecipe) -> Recipe:
    """A recipe by its name; recipes pass through, and a layer's recipe stands for all layers.

    Raises:
        ValueError: no recipe has this name.
        TypeError: something else than a name or recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, LayerRecipe):
        return Recipe(recipe)
    if not isinstance(recipe, str):
        raise TypeError(
            f"recipe must be a name, a Recipe or a LayerRecipe, got {type(recipe).__name__}"
        )
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe]


def describe(spec: QuantSpec) -> str:
    """A spec in a few words.

    >>> describe(WEIGHT_INT8)
    'int8 per channel'
    """
    name = f"{'int' if spec.signed else 'uint'}{spec.bits}"
    where = "per channel" if isinstance(spec.granularity, PerChannel) else "per tensor"
    if isinstance(spec.granularity, PerGroup):
        where = f"in groups of {spec.granularity.size}"
        if spec.scale_dtype != torch.float32:
            where += f" with {str(spec.scale_dtype).removeprefix('torch.')} scales"
    # Signed symmetric and unsigned asymmetric are what one expects; the rest is said.
    usual = spec.symmetric == spec.signed
    return f"{name} {where}" + (
        "" if usual else " symmetric" if spec.symmetric else " with zero points"
    )


def _check_keys(what: str, d: Any, known: Iterable[str], required: Iterable[str]) -> None:
    if not isinstance(d, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(d).__name__}")
    known = tuple(known)
    for key in d:
        if key not in known:
            raise ValueError(f"{what} has the keys {', '.join(known)}; got {key!r}")
    for key in required:
        if key not in d:
            raise ValueError(f"{what} must have the key {key!r}")
