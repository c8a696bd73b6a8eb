"""A diagnosis as JSON, as a table, in words, and from the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zeropoint
from commands import fails, in_folder, ok, run  # noqa: F401
from faults import plant_outliers
from small_models import batches
from zeropoint import Diagnosis, LayerRecipe, Recipe, diagnose
from zeropoint.diagnose import Damage
from zeropoint.diagnose.as_json import schema
from zeropoint.diagnose.numbers import NO_SIGNAL_DB, sqnr_db
from zeropoint.diagnose.words import cosine, error, share


def spiky() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    plant_outliers(model[0], [model[2]], torch.tensor([3, 11]), 2000.0)
    return model


@pytest.fixture(name="found")
def found_(request: Any) -> Diagnosis:
    model, data = spiky(), batches(4, 8)
    x = torch.cat(data)
    expected = model(x).detach()

    def closeness(m: nn.Module) -> Tensor:
        return -(m(x) - expected).square().mean(1)

    return diagnose(model, data, closeness)


# JSON


def test_json_follows_its_schema_and_comes_back(found: Diagnosis, tmp_path: Path) -> None:
    text = found.to_json(tmp_path / "diagnosis.json")
    data = json.loads((tmp_path / "diagnosis.json").read_text())
    assert json.loads(text) == data
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(data, schema())
    assert Diagnosis.from_dict(data) == found
    assert Recipe.from_dict(data["suggestions"]) == found.suggestions
    assert str(Diagnosis.from_dict(data)) == str(found)


def test_schema_knows_every_field(found: Diagnosis) -> None:
    """A field that the schema does not describe would be one that nobody is told of."""
    definitions = schema()["$defs"]

    def check(value: Any, node: dict[str, Any], where: str) -> None:
        if "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[1]]
        for option in node.get("anyOf", []):
            if option.get("type") != "null":
                check(value, option, where)
                return
        if isinstance(value, dict) and "properties" in node and "recipe" not in where:
            assert set(value) == set(node["required"]) == set(node["properties"]), where
            for key, item in value.items():
                if item is not None:
                    check(item, node["properties"][key], f"{where}.{key}")
        elif isinstance(value, list) and "items" in node:
            for item in value:
                check(item, node["items"], f"{where}[]")

    content = found.to_dict()
    assert content["causes"]
    assert content["layers"][1]["outliers"]
    check(content, schema(), "diagnosis")


def test_infinities_come_back() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4, bias=False), "unused": nn.Linear(4, 4)})
    with torch.no_grad():
        model["used"].weight.copy_(127 * torch.eye(4))
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    data = [torch.ones(8, 4)]
    found = diagnose(model, data, recipe="int8-weight-only")
    assert found.damage_before.sqnr_db == math.inf
    assert found.layer("used").both_sqnr_db == math.inf
    assert "exactly the same outputs" in found.verdict
    content = json.loads(found.to_json())
    jsonschema.validate(content, schema())
    again = Diagnosis.from_dict(content)
    assert again.layer("used").both_sqnr_db == math.inf
    assert math.isnan(again.layer("unused").both_sqnr_db)
    assert str(again) == str(found)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(schema_version=99),
        lambda d: d.pop("layers"),
        lambda d: d["causes"][0].update(kind="witchcraft"),
        lambda d: d["layers"][0].pop("recipe"),
    ],
)
def test_what_is_no_diagnosis_is_refused(found: Diagnosis, spoil: Any) -> None:
    content = found.to_dict()
    spoil(content)
    with pytest.raises(ValueError, match=r"diagnosis|schema_version"):
        Diagnosis.from_dict(content)


# Words and tables


def test_table_shows_the_culprit_first(found: Diagnosis) -> None:
    text = str(found)
    lines = text.splitlines()
    assert lines[0].startswith("Quantized, the model's output is")
    assert "2 (outlier channels" in found.verdict
    table = text[text.index("Layers, worst first") :]
    first = next(line for line in table.splitlines()[2:] if line.strip()[:1].isdigit())
    assert first.split()[0] == "2"
    assert "*" in first
    assert "smoothing" in text
    assert "closeness" in text


def test_verdict_without_culprits() -> None:
    found = diagnose(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), batches(2, 8))
    assert "No layer stands out" in found.verdict
    assert "Causes" not in str(found)


def test_narrow_terminal(found: Diagnosis) -> None:
    from zeropoint.terminal import plain_text

    assert all(len(line) <= 80 for line in plain_text(found, 80).splitlines())


def test_names_are_no_markup() -> None:
    model = nn.ModuleDict({"[red]x": nn.Linear(8, 4)})
    model.forward = lambda x: model["[red]x"](x)  # type: ignore[method-assign]
    found = diagnose(model, batches(1, 8))
    assert "[red]x" in str(found)


def test_print(found: Diagnosis, capsys: pytest.CaptureFixture[str]) -> None:
    found.print()
    assert "Causes and cures" in capsys.readouterr().out


def test_numbers_in_words() -> None:
    assert error(Damage(0.0, 1.0)) == "0"
    assert error(Damage(0.0123, 1.0)) == "1.2 %"
    assert error(Damage(0.456, 1.0)) == "46 %"
    assert error(Damage(math.nan, 1.0)) == "–"
    assert cosine(0.99999) == "0.999990"
    assert cosine(1.0) == "1.0000"
    assert cosine(1 - 1e-12) == "> 0.99999999"
    assert share(0.951) == "95 %"
    assert share(0.0123) == "1.2 %"
    assert sqnr_db(0.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == NO_SIGNAL_DB
    assert math.isnan(sqnr_db(math.nan, 1.0))


def test_layer_of_no_such_name(found: Diagnosis) -> None:
    with pytest.raises(KeyError):
        found.layer("nothing")
    assert replace(found, evaluation_seconds=0.0).cost != found.cost


# The command line

NET = """
import torch
from torch import nn

def spiky():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[[3, 11]] *= 2000
        model[2].weight[:, [3, 11]] /= 2000
    return model
"""


@pytest.fixture(name="spiky_net")
def spiky_net_(folder: Path) -> str:
    Path("zp_spiky.py").write_text(NET)
    return "zp_spiky:spiky"


def test_command_diagnoses(spiky_net: str) -> None:
    shown = ok("diagnose", spiky_net, "--data", "data.npy", "--json", "out.json")
    assert "Causes and cures" in shown
    content = json.loads(Path("out.json").read_text())
    jsonschema.validate(content, schema())
    assert content["causes"][0]["layer"] == "2"


def test_command_applies_and_shows_before_and_after(spiky_net: str) -> None:
    shown = ok("diagnose", spiky_net, "--data", "data.npy", "--apply", "mended.safetensors")
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert float(lines["after"][1]) > float(lines["before"][1]) + 10
    assert "Wrote mended.safetensors" in shown
    model = zeropoint.load("mended.safetensors", spiky())
    x = torch.from_numpy(np.load("data.npy")).float()
    y, other = spiky()(x), model(x)
    assert float((y - other).norm() / y.norm()) < 0.05


def test_command_writes_a_recipe_that_quantize_takes(spiky_net: str) -> None:
    ok("diagnose", spiky_net, "--data", "data.npy", "--json", "out.json", "--cache", "cache.json")
    content = json.loads(Path("out.json").read_text())
    Path("recipe.json").write_text(json.dumps(content["suggestions"]))
    options = ("--to", "recipe.json", "--out", "a.safetensors", "--calibrate", "data.npy")
    shown = ok("quantize", spiky_net, *options)
    assert "smooth" in shown
    assert Path("cache.json").exists()


def test_command_applies_without_suggestions(folder: Path) -> None:
    result = run("diagnose", "zp_nets:small", "--data", "data.npy", "--apply", "a.safetensors")
    assert result.exit_code == 0
    assert "nothing was suggested" in result.stderr
    assert Path("a.safetensors").exists()


def test_command_static_recipe_with_calibration(spiky_net: str) -> None:
    recipe = Recipe(LayerRecipe("static", observer="minmax"))
    Path("static.json").write_text(json.dumps(recipe.to_dict()))
    np.save("calibration.npy", np.load("data.npy")[:10] * 50)
    shown = ok(
        *("diagnose", spiky_net, "--data", "data.npy", "--to", "static.json"),
        *("--calibrate", "calibration.npy", "--limit", "40"),
    )
    assert "a bad activation range" in shown


def test_command_errors(folder: Path) -> None:
    assert "no folder" in fails(
        *("diagnose", "zp_nets:small", "--data", "data.npy", "--json", "none/out.json")
    )
    assert "quantizes no layer" in fails("diagnose", "zp_nets:without_linear", "--data", "data.npy")
    fails("diagnose", "zp_nets:small", code=2)
