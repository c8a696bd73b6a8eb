import json

import pytest
import torch

from zeropoint import (
    ACTIVATION_UINT8,
    WEIGHT_INT4,
    WEIGHT_INT8,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    int4,
)
from zeropoint.recipes import (
    RECIPES,
    LayerRecipe,
    Recipe,
    get_recipe,
    spec_from_dict,
    spec_to_dict,
)

SPECS = [
    QuantSpec(signed=signed, symmetric=symmetric, granularity=granularity)
    for signed in (True, False)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(0), PerChannel(-1))
] + [
    int4(),
    int4(128, symmetric=True, scale_dtype=torch.bfloat16),
    int4(64, scale_dtype=torch.float16),
    int4(None),
    QuantSpec(2, granularity=PerGroup(1)),
]
GROUPS = spec_to_dict(WEIGHT_INT4)
ODD = LayerRecipe(
    "static",
    weight=QuantSpec(symmetric=False),
    activation=QuantSpec(signed=False, symmetric=True),
    observer="entropy",
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_spec_through_json(spec):
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize("layer", [LayerRecipe("dynamic"), LayerRecipe("static"), ODD], ids=str)
def test_layer_recipe_through_json(layer):
    assert LayerRecipe.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES.values(), Recipe(None), Recipe(None, (("a.*", ODD), ("*", None)))],
    ids=lambda r: str(len(r.overrides)),
)
def test_recipe_through_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_short_json():
    assert Recipe.from_dict({"default": {"mode": "dynamic"}}) == RECIPES["int8-dynamic"]


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ([], "a recipe must be a mapping, got list"),
        ({}, "must have the key 'default'"),
        ({"default": None, "override": []}, "got 'override'"),
        ({"default": None, "overrides": {"a": None}}, "list of"),
        ({"default": None, "overrides": [["a"]]}, "list of"),
        ({"default": None, "overrides": [[1, None]]}, "pairs"),
        ({"default": "dynamic"}, "a layer's recipe must be a mapping, got str"),
        ({"default": {"mode": "fast"}}, "mode must be one of dynamic, static, weight-only"),
        ({"default": {"mode": "dynamic", "bits": 8}}, "got 'bits'"),
        ({"default": {"mode": "dynamic", "weight": {"bits": 8}}}, "must have the key"),
        ({"default": {"mode": "dynamic", "weight": 8}}, "a spec must be a mapping, got int"),
        (
            {"default": {"mode": "dynamic", "weight": spec_to_dict(WEIGHT_INT8) | {"bits": 9}}},
            "bits must be from 2 to 8, got 9",
        ),
        (
            {"default": {"mode": "dynamic", "weight": spec_to_dict(WEIGHT_INT4) | {"axis": 0}}},
            "got 'axis'",
        ),
        (
            {"default": {"mode": "dynamic", "weight": GROUPS | {"group_size": 0}}},
            "size must be at least 1",
        ),
        (
            {"default": {"mode": "dynamic", "weight": GROUPS | {"group_size": True}}},
            "size must be an int",
        ),
        (
            {"default": {"mode": "dynamic", "weight": GROUPS | {"scale_dtype": "float64"}}},
            "scale_dtype must be one of float32, bfloat16, float16, got 'float64'",
        ),
        (
            {
                "default": {
                    "mode": "dynamic",
                    "weight": {k: v for k, v in GROUPS.items() if k != "scale_dtype"},
                }
            },
            "must have the key 'scale_dtype'",
        ),
        (
            {
                "default": {
                    "mode": "dynamic",
                    "weight": spec_to_dict(ACTIVATION_UINT8) | {"granularity": "per-row"},
                }
            },
            "granularity must be",
        ),
    ],
)
def test_json_that_is_refused(d, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Recipe.from_dict(d)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "int8-dynamic"}, "mode must be one of"),
        ({"weight": 8}, "weight must be a QuantSpec, got int"),
        (
            {"weight": QuantSpec(granularity=PerChannel(1))},
            r"weight must be .* PerChannel\(axis=1\)",
        ),
        ({"activation": QuantSpec()}, "activation must be unsigned"),
        (
            {"activation": QuantSpec(signed=False, granularity=PerChannel(0))},
            "activation must be unsigned 8 bits and per tensor",
        ),
        ({"activation": QuantSpec(4, False)}, "activation must be unsigned 8 bits"),
        ({"activation": QuantSpec(8, False, False, PerGroup(4))}, "activation must be unsigned"),
        ({"observer": "best"}, "observer must be one of minmax, moving-average"),
    ],
)
def test_layer_recipe_that_no_layer_can_follow(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LayerRecipe(**{"mode": "static", **fields})


def test_recipe_of_wrong_types():
    with pytest.raises(TypeError, match="default must be"):
        Recipe("dynamic")
    with pytest.raises(TypeError, match="pairs"):
        Recipe(None, (("a", "dynamic"),))


def test_first_match_wins():
    a, b = LayerRecipe("dynamic"), LayerRecipe("weight-only")
    recipe = Recipe(None, (("x.*", a), ("*.y", b), ("x.*", b)))
    assert recipe.match(["x.y"]) == (a, "x.*")
    assert recipe.match(["z.y"]) == (b, "*.y")
    assert recipe.match(["z"]) == (None, None)
    assert recipe.match(["z", "x.1"]) == (a, "x.*")
    assert Recipe(a, (("X.*", None),)).match(["x.1"]) == (a, None)  # case counts


def test_recipes_are_values():
    assert hash(Recipe(ODD, (("a", None),))) == hash(Recipe(ODD, [("a", None)]))


def test_get_recipe():
    for name, recipe in RECIPES.items():
        assert get_recipe(name) is recipe
        bits, _, mode = name.removeprefix("int").partition("-")
        assert recipe.default.mode == (mode or "dynamic")
        assert recipe.default.weight.bits == int(bits)
    assert get_recipe(Recipe(None)) == Recipe(None)
    assert get_recipe(ODD) == Recipe(ODD)
    with pytest.raises(ValueError, match=r"one of int8-dynamic, .*, int4-weight-only, got 'int8'"):
        get_recipe("int8")
    with pytest.raises(TypeError, match="got int"):
        get_recipe(8)


def test_layer_recipe_in_words():
    assert str(LayerRecipe("static")) == (
        "static, weight int8 per channel, input uint8 per tensor by mse"
    )
    assert str(LayerRecipe("dynamic", WEIGHT_INT4)) == (
        "dynamic, weight uint4 in groups of 32 with bfloat16 scales"
    )
    wide = int4(scale_dtype=torch.float32)
    assert str(LayerRecipe("dynamic", wide)) == "dynamic, weight uint4 in groups of 32"
    narrow = int4(128, symmetric=True, scale_dtype=torch.bfloat16)
    assert str(LayerRecipe("weight-only", narrow)) == (
        "weight-only, weight int4 in groups of 128 with bfloat16 scales"
    )
    assert str(ODD) == (
        "static, weight int8 per tensor with zero points, "
        "input uint8 per tensor symmetric by entropy"
    )
