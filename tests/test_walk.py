"""The rules by which layers are found and left; the tests of quantize use them all."""

import gc
import weakref

import pytest
from torch import nn

from small_models import mlp, tied_linears
from zeropoint.walk import ROOT, Selection, show


def test_choices_and_reasons():
    selection = Selection(mlp(), None, None, lambda names: "no" if names == ["2"] else 7)
    assert selection.chosen == {"0": 7}
    assert selection.left_in_order() == {"2": "no"}


def test_what_fits_is_asked_last():
    model = mlp()
    model[2].register_forward_hook(print)
    asked = []
    selection = Selection(
        model, None, None, lambda n: 1, lambda layer: asked.append(layer) or "odd"
    )
    assert asked == [model[0]]
    assert selection.left["0"] == "odd"
    assert "hooks" in selection.left["2"]


def test_exact_names_are_chosen_in_spite_of_ties():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    left = Selection(model, None, None, lambda n: 1, stays="which stays").left
    assert left == {"1": "its weight is also '0.weight', which stays"}
    assert not Selection(model, "1", None, lambda n: 1).left
    assert Selection(model, "*", None, lambda n: 1).left


def test_leaving_one_of_tied_linears_leaves_both():
    selection = Selection(tied_linears(), None, None, lambda n: 1)
    assert list(selection.chosen) == ["0", "2"]
    selection.leave("2", "so")
    selection.leave_broken_ties()
    assert selection.left_in_order() == {
        "0": "its weight is also '2.weight', which stays float",
        "2": "so",
    }


def test_aliases():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert Selection(model, None, None, lambda n: 1).aliases() == {"b.0": "a"}
    assert Selection(model, "b.*", None, lambda n: 1).chosen == {"a": 1}


def test_patterns_are_checked():
    with pytest.raises(ValueError, match=r"include: no Linear layer matches '1'; did you mean"):
        Selection(
            nn.Sequential(nn.ReLU(), nn.ReLU(), *[nn.Linear(2, 2)] * 11), "1", None, lambda n: 1
        )
    with pytest.raises(ValueError, match=r"exclude: .*those inside it are 'a\.\*'"):
        Selection(nn.ModuleDict({"a": mlp()}), None, "a", lambda n: 1)
    with pytest.raises(TypeError, match=r"include must hold patterns \(str\), got int"):
        Selection(mlp(), [1], None, lambda n: 1)


def test_layers_can_be_let_go():
    model = mlp()
    selection = Selection(model, None, None, lambda n: 1)
    weight = weakref.ref(model[0].weight)
    gc.disable()
    try:
        del model[0], selection.layers["0"]
        assert weight() is None
    finally:
        gc.enable()


def test_show():
    text = show("heading", [("", "x"), ("a", "y")], ["note"])
    assert text == f"heading\n  {ROOT}  x\n  a            y\n  note"
