"""``quantize`` and embedding tables: which become integers, which stay, ties to output layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import zeropoint
from bits import assert_same_bits
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    LayerRecipe,
    PerChannel,
    PerTensor,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantSpec,
    Recipe,
    quantize,
)

INT8 = Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT8)
INT4 = Recipe(LayerRecipe("dynamic", WEIGHT_INT4), embeddings=WEIGHT_INT4)
IDS = torch.tensor([[0, 8, 3], [3, 5, 1]])


class Language(nn.Module):
    """An embedding, a layer, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=0, dtype=dtype)
        self.inner = nn.Linear(6, 6, dtype=dtype)
        self.head = nn.Linear(6, 9, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


@pytest.mark.parametrize("recipe", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untied_table(recipe: Recipe, inplace: bool, dtype: Any) -> None:
    model: Any = Language(tied=False, dtype=dtype)
    embed = model.embed
    result: Any = quantize(model, recipe, inplace=inplace)
    expected = QuantizedEmbedding.from_embedding(embed, recipe.embeddings)  # type: ignore[arg-type]
    assert type(result.embed) is QuantizedEmbedding
    assert (model.embed is embed) != inplace
    assert result.embed.padding_idx == 0
    assert_same_bits(result.embed(IDS), expected(IDS))
    assert result(IDS).dtype == dtype
    assert result.quantization.embeddings == {"embed": recipe.embeddings}
    assert result.quantization.embeddings_left == {}
    assert result.quantization.tied == {}


@pytest.mark.parametrize("recipe", [INT8, INT4], ids=["int8", "int4"])
def test_a_tied_head_shares_the_table(recipe: Recipe) -> None:
    model = Language()
    apart: Any = quantize(Language(tied=False), recipe)
    result: Any = quantize(model, recipe)
    for key in ("weight", "scale", "zero_point"):
        assert getattr(result.embed, key) is getattr(result.head, key)
    assert result.embed.weight_qtensor() is result.head.weight_qtensor()
    assert result.quantization.tied == {"embed": "head"}
    expected: Any = quantize(model, Recipe(recipe.default), include="head")
    assert_same_bits(result.head.weight, expected.head.weight)
    assert zeropoint.running.model_bytes(result) < zeropoint.running.model_bytes(apart)
    assert "  embed  shares the weight of head" in str(result.quantization)


@pytest.mark.parametrize(
    ("layer", "table"),
    [
        (LayerRecipe("dynamic", WEIGHT_INT4), WEIGHT_INT8),
        (LayerRecipe("weight-only"), WEIGHT_INT4),
        (LayerRecipe("dynamic", WEIGHT_INT4, method=("awq", "gptq")), WEIGHT_INT4),
        (LayerRecipe("static", WEIGHT_INT4, method="hadamard"), WEIGHT_INT8),
    ],
    ids=["bits differ", "fewer bits", "method", "static"],
)
def test_a_tied_head_has_the_spec_of_its_table(
    layer: LayerRecipe, table: QuantSpec, tmp_path: Path
) -> None:
    model = Language()
    data = [IDS] if layer.needs_calibration else None
    result: Any = quantize(model, Recipe(layer, embeddings=table), calibration=data)
    assert result.quantization.quantized["head"] == replace(layer, weight=table, method=())
    assert result.quantization.quantized["inner"] == layer
    assert result.quantization.tied == {"embed": "head"}
    assert result.head.mode == layer.mode
    assert result.head.input_factor is None
    assert result.head.bits == result.embed.bits == table.bits
    assert result.head.weight is result.embed.weight
    direct = zeropoint.quantize_to_spec(model.embed.weight, table)
    assert torch.equal(result.embed.weight_qtensor().int_repr(), direct.int_repr())
    zeropoint.save(result, tmp_path / "m.safetensors")
    again: Any = zeropoint.load(tmp_path / "m.safetensors", Language())
    assert again.head.weight is again.embed.weight
    assert_same_bits(again(IDS), result(IDS))


def test_a_method_of_the_head_alone_asks_for_no_data() -> None:
    recipe = Recipe(
        LayerRecipe("dynamic"), (("head", LayerRecipe("dynamic", method="gptq")),), WEIGHT_INT8
    )
    model = Language()
    result: Any = quantize(model, recipe)
    assert result.head.weight is result.embed.weight
    given: Any = quantize(model, recipe, calibration=[IDS])  # nor is it refused
    assert_same_bits(given(IDS), result(IDS))
    with pytest.raises(TypeError, match="iterable of batches"):
        quantize(model, recipe, calibration=IDS)
    for arguments in ({"exclude": "head"}, {"exclude": "embed"}):
        with pytest.raises(ValueError, match="calibration was given, but no chosen layer"):
            quantize(model, recipe, calibration=[IDS], **arguments)
    with pytest.raises(ValueError, match="'gptq' looks at sample data"):
        quantize(Language(tied=False), recipe)
    with pytest.raises(ValueError, match="'gptq' looks at sample data"):
        quantize(model, recipe, include=["head", "embed"])


def test_an_override_chooses_a_tied_heads_mode() -> None:
    head = LayerRecipe("weight-only", WEIGHT_INT4, method="hqq")
    recipe = Recipe(LayerRecipe("dynamic"), (("he*", head),), WEIGHT_INT8)
    result: Any = quantize(Language(), recipe)
    assert result.quantization.quantized["head"] == LayerRecipe("weight-only", WEIGHT_INT8)
    assert result.head.weight is result.embed.weight
    assert result.quantization.unmatched == ()
    assert result.quantization.done == {}


def test_two_heads_of_a_table() -> None:
    model: Any = Language()
    model.second = nn.Linear(6, 9)
    model.second.weight = model.head.weight
    recipe = Recipe(
        LayerRecipe("dynamic", WEIGHT_INT4, method="hqq"),
        (("second", LayerRecipe("static", WEIGHT_INT4, method="clip")),),
        WEIGHT_INT8,
    )
    model.forward = lambda ids: Language.forward(model, ids) + model.second(model.embed(ids))
    result: Any = quantize(model, recipe, calibration=[IDS], inplace=True)
    assert result.head.weight is result.second.weight is result.embed.weight
    assert (result.head.mode, result.second.mode) == ("dynamic", "static")
    assert result.quantization.tied == {"second": "head", "embed": "head"}


@pytest.mark.parametrize(
    ("recipe", "embed", "head"),
    [
        (Recipe(None, embeddings=WEIGHT_INT8), "which stays float", "the recipe keeps it float"),
        (Recipe(INT8.default, (("*head", None),), WEIGHT_INT8), "which stays", "keeps it float"),
        (Recipe(LayerRecipe("dynamic")), None, "also '0.embed.weight', which stays float"),
    ],
    ids=["tables only", "head kept", "no tables"],
)
def test_where_one_stays_float_both_do_and_are_tied(
    recipe: Recipe, embed: str | None, head: str
) -> None:
    model = nn.Sequential(Language(), nn.Linear(9, 9), nn.Embedding(2, 2))
    result: Any = quantize(model, recipe)
    assert result[0].head.weight is result[0].embed.weight
    summary = result.quantization
    assert head in summary.left["0.head"]
    assert summary.embeddings == ({} if embed is None else {"2": recipe.embeddings})
    if embed is None:
        assert summary.embeddings_left == {}
    else:
        assert embed in summary.embeddings_left["0.embed"]
        assert "0.embed  left float: its weight is also '0.head.weight'" in str(summary)


def test_exact_names_are_quantized_apart() -> None:
    recipe = Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT4)
    both: Any = quantize(Language(), recipe, include=["head", "embed"])
    assert (both.head.bits, both.embed.bits) == (8, 4)
    assert both.quantization.tied == {}
    found = Recipe(LayerRecipe("dynamic", WEIGHT_INT4, method="hqq"), embeddings=WEIGHT_INT4)
    both = quantize(Language(), found, include=["head", "e*"])
    assert both.quantization.quantized == {"head": found.default}
    assert both.head.weight is not both.embed.weight
    both = quantize(Language(), found, include=["h*", "embed"])  # the table's name unties no head
    assert both.quantization.quantized == {"head": LayerRecipe("dynamic", WEIGHT_INT4)}
    assert both.head.weight is both.embed.weight
    table: Any = quantize(Language(), recipe, include="embed")
    assert type(table.embed) is QuantizedEmbedding
    assert type(table.head) is nn.Linear
    head: Any = quantize(Language(), recipe, include=["h*", "head"])
    assert type(head.embed) is nn.Embedding
    assert head.quantization.embeddings_left == {"embed": "not in include"}


def test_excluding_either_of_a_tie_keeps_both() -> None:
    for name in ("head", "embed"):
        result: Any = quantize(Language(), INT8, exclude=name)
        assert result.head.weight is result.embed.weight
        assert isinstance(result.inner, QuantizedLinear)


def test_a_head_that_calibration_never_calls_keeps_the_table() -> None:
    model = Language()
    model.forward = lambda ids: (
        Language.forward(model, ids)
        if ids is None
        # type: ignore
        else (model.inner(model.embed(ids)))
    )
    recipe = Recipe(LayerRecipe("static"), embeddings=WEIGHT_INT8)
    result: Any = quantize(model, recipe, calibration=[IDS], inplace=True)
    assert result.quantization.left == {"head": "calibration never called it"}
    assert result.quantization.embeddings_left == {
        "embed": "its weight is also 'head.weight', which stays float"
    }
    assert isinstance(result.inner, QuantizedLinear)


def test_tables_of_one_weight_share_their_integers() -> None:
    """As an encoder's and a decoder's, with a third for both."""
    model: Any = nn.ModuleDict({n: nn.Embedding(9, 6) for n in "abc"})
    model["b"].weight = model["c"].weight = model["a"].weight
    model["again"] = model["c"]
    result: Any = quantize(model, Recipe(None, embeddings=WEIGHT_INT4))
    assert result["a"].weight is result["b"].weight is result["c"].weight
    assert result["again"] is result["c"]
    assert result.quantization.tied == {"b": "a", "c": "a"}
    assert result.quantization.shared == {"again": "c"}


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


class Renamed(nn.Embedding):
    pass


class Gained(nn.Embedding):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("gain", torch.ones(()))


def hooked() -> nn.Embedding:
    embedding = nn.Embedding(9, 6)
    embedding.register_forward_hook(lambda *_: None)
    return embedding


def replaced() -> nn.Embedding:
    embedding = nn.Embedding(9, 6)
    embedding.forward = lambda ids: ids  # type: ignore[method-assign]
    return embedding


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(9, 6), "Scaled has a forward of its own"),
        (lambda: Gained(9, 6), "Gained holds more than weight"),
        (hooked, "it has hooks, which a replacement would drop"),
        (replaced, "its forward was replaced on the instance"),
        (lambda: parametrizations.weight_norm(nn.Embedding(9, 6)), "it is parametrized"),
        (lambda: nn.Embedding(9, 6, max_norm=1.0), "it has a max_norm"),
        (lambda: nn.Embedding(9, 6, device="meta"), "on the meta device"),
        (lambda: nn.Embedding(9, 6, dtype=torch.complex64), "its weight is complex64"),
        (lambda: nn.Embedding(0, 6), r"its weight is empty, (0, 6)"),
    ],
)
def test_tables_that_are_left(make: Any, reason: str) -> None:
    model = nn.ModuleDict({"odd": make(), "plain": Renamed(3, 2)})
    odd = model["odd"]
    result: Any = quantize(model, INT8, inplace=True)
    assert result["odd"] is odd
    assert reason in result.quantization.embeddings_left["odd"]
    assert type(result["plain"]) is QuantizedEmbedding
    assert f"odd    left float: {result.quantization.embeddings_left['odd']}" in str(
        result.quantization
    )


def test_embedding_bags_are_no_tables() -> None:
    model = nn.ModuleList([nn.EmbeddingBag(9, 6), nn.Embedding(3, 2)])
    assert isinstance(quantize(model, INT8)[0], nn.EmbeddingBag)  # type: ignore[index]


def test_summary_in_words() -> None:
    model = nn.ModuleDict({"a": Language(), "b": Scaled(9, 6)})
    assert str(quantize(model, INT8).quantization).splitlines() == [
        "quantized 2 of 2 Linear layers and 1 of 2 embeddings",
        "  a.inner  dynamic, weight int8 per channel",
        "  a.head   dynamic, weight int8 per channel",
        "  a.embed  embedding int8 per channel",
        "  a.embed  shares the weight of a.head",
        "  b        left float: Scaled has a forward of its own",
    ]


def test_a_model_that_is_a_table() -> None:
    embedding = nn.Embedding(9, 6)
    result: Any = quantize(embedding, INT8)
    assert type(result) is QuantizedEmbedding
    assert "(the model)  embedding int8 per channel" in str(result.quantization)


def test_in_two_steps() -> None:
    first = quantize(Language(tied=False), Recipe(None, embeddings=WEIGHT_INT4))
    second: Any = quantize(first, "int8-dynamic")
    assert second.quantization.embeddings == {"embed": WEIGHT_INT4}
    assert set(second.quantization.quantized) == {"inner", "head"}
    third: Any = quantize(quantize(Language(tied=False)), INT8)
    assert set(third.quantization.quantized) == {"inner", "head"}
    assert third.quantization.embeddings == {"embed": WEIGHT_INT8}


def test_bad_values_name_the_table_and_change_nothing() -> None:
    model = Language(tied=False)
    with torch.no_grad():
        model.embed.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="layer 'embed': its weight holds NaN or Inf"):
        quantize(model, INT8, inplace=True)
    assert type(model.inner) is nn.Linear


def test_patterns_know_tables_only_where_asked() -> None:
    with pytest.raises(ValueError, match="exclude: no Linear layer matches 'embed'"):
        quantize(Language(), exclude="embed")
    with pytest.raises(
        ValueError, match="no Linear layer or embedding matches 'embde'; did you mea"
    ):
        quantize(Language(), INT8, exclude="embde")


def test_nothing_to_do_warns() -> None:
    with pytest.warns(UserWarning, match="nothing was quantized"):
        quantize(nn.Sequential(Scaled(9, 6)), Recipe(None, embeddings=WEIGHT_INT8))


# Recipes


@pytest.mark.parametrize("recipe", [INT8, INT4, Recipe(None, (("a", None),), WEIGHT_INT4)], ids=str)
def test_recipe_through_json(recipe: Recipe) -> None:
    d = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(d) == recipe
    del d["embeddings"]  # as recipes were written before tables
    assert Recipe.from_dict(d) == Recipe(recipe.default, recipe.overrides)


def test_recipes_without_tables_are_written_as_before() -> None:
    assert set(Recipe(None).to_dict()) == {"default", "overrides"}
    assert Recipe.from_dict({"default": None, "embeddings": None}) == Recipe(None)


def test_recipes_that_are_refused() -> None:
    with pytest.raises(TypeError, match="embeddings must be a QuantSpec or None, got str"):
        Recipe(None, embeddings="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"embeddings must be per tensor, PerChannel\(0\) or"):
        Recipe(None, embeddings=QuantSpec(granularity=PerChannel(1)))
    with pytest.raises(TypeError, match="a spec must be a mapping, got str"):
        Recipe.from_dict({"default": None, "embeddings": "int8"})
    with pytest.raises(ValueError, match="leave embeddings"):
        zeropoint.search(Language(), [IDS], choices=[INT8], max_drop=0.1)


def test_what_changes_a_recipe_keeps_its_tables() -> None:
    assert INT8.with_method("clip").embeddings == WEIGHT_INT8
    from zeropoint.diagnose.cures import overridden

    assert overridden(INT8, {"inner": None}).embeddings == WEIGHT_INT8


def test_one_scale_for_all_rows() -> None:
    recipe = Recipe(LayerRecipe("dynamic", QuantSpec()), embeddings=QuantSpec())
    assert recipe.embeddings.granularity == PerTensor()  # type: ignore[union-attr]
    result: Any = quantize(Language(), recipe)
    assert result.head.weight is result.embed.weight
    assert len(result.embed.scale.unique()) == 1
