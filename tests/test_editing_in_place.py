"""Edits applied to the very model and taken back, bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coar.components import ComponentGroup, ComponentSet
from coar.editing import Edit
from coar.errors import EditError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.testing import SubsetMean
from tests import cases, naive
from tests.refused import refused

CONVENTIONS = [("keep", "zero"), ("ablate", "zero"), ("keep", 0.3), ("keep", "mean")]
ABLATIONS = [
    *((name, *convention) for name in cases.OUTPUT_UNITS for convention in CONVENTIONS),
    ("slices", "keep", "zero"),
    ("slices", "keep", 0.3),
]


class Transposed(nn.Module):
    """A grouped transposed convolution: a filter is some columns of its group's rows."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)

    def forward(self, x):
        return self.up(x).mean(dim=(2, 3))


def make_edit(name, bias="keep", value="zero", indices=(0, 2)):
    return Edit.of(cases.make_case(name).experiment(bias, value), indices)


def bits(model):
    """Names and bytes of all that a model holds, None included."""
    tensors = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in {**module._parameters, **module._buffers}.items()
    }
    return {
        key: None if value is None else value.detach().numpy().tobytes() for key, value in tensors.items()
    }


# --------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize(("name", "bias", "value"), ABLATIONS)
def test_in_place_is_the_copy_and_undone_is_the_original(name, bias, value):
    edit, model = make_edit(name, bias, value), cases.make_model(name)
    before, fingerprint, parameters = bits(model), model_fingerprint(model), list(model.parameters())
    copied = bits(edit.apply(model))
    assert edit.apply_(model) is model
    assert bits(model) == copied != before
    assert edit.undo_(model) is model
    assert bits(model) == before
    assert model_fingerprint(model) == fingerprint
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_columns_of_blocks_are_put_back_in_every_precision(dtype):
    model = Transposed().to(dtype).eval()
    model.up.weight.data[0, 0, 0, :2] = torch.tensor([-0.0, float("nan")])  # bits, not numbers
    components = ComponentSet([ComponentGroup("up", "filter", "up", "weight", 1, 6, bias="bias", blocks=2)])
    edit = Edit(
        ("up[0]", "up[4]"), components.pick([0, 4]), "ablate", "zero", {"model": model_fingerprint(model)}
    )
    before = [tensor.detach().clone().view(torch.uint8) for tensor in model.parameters()]
    edit.apply_(model)
    assert not model.up.bias[[0, 4]].any()
    assert model.up.bias[[1, 2, 3, 5]].all()
    edit.undo_(model)
    after = [tensor.detach().view(torch.uint8) for tensor in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_components_that_lie_in_each_other_are_put_back():
    """Rows and columns of one weight: some numbers belong to both."""
    task = cases.make_task("mlp")
    rows = ComponentGroup("rows", "neuron", "hidden2", "weight", 0, 6, bias="bias")
    columns = ComponentGroup("columns", "input", "hidden2", "weight", 1, 7, side="input")
    experiment = ComponentAblation(task, ComponentSet([rows, columns], overlap=True), "ablate")
    edit = Edit.of(experiment, [1, 8]) + Edit.of(experiment, [2])
    assert edit.components.overlap
    before = bits(task.model)
    weight = task.model.hidden2.weight.detach().numpy().copy()
    weight[[1, 2]] = weight[:, 2] = 0.0
    with edit.applied(task.model):
        assert np.array_equal(task.model.hidden2.weight.detach().numpy(), weight)
    assert bits(task.model) == before


@given(name=st.sampled_from(["residual", "mlp", "grouped"]), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_components_in_any_order_are_put_back(name, data):
    experiment = cases.make_case(name).experiment(*data.draw(st.sampled_from(CONVENTIONS[:3])))
    count = len(experiment.components)
    indices = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    model = experiment.task.model
    before = bits(model)
    edit = Edit.of(experiment, indices)
    for _ in range(2):
        with edit.applied(model) as edited:
            literal = naive.ablated(
                cases.make_model(name),
                experiment.component_set,
                ~np.isin(np.arange(count), indices),
                experiment.bias,
                experiment.value,
            )
            assert edited is model
            found, wanted = (naive.outputs_of(experiment.task, m.eval())["margin"] for m in (model, literal))
            assert found == pytest.approx(wanted, abs=1e-5)
        assert bits(model) == before


def test_an_error_inside_undoes_the_edit():
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    before = bits(model)

    def fail():
        with edit.applied(model):
            assert bits(model) != before
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert bits(model) == before


def test_gradients_and_training_go_on_outside_the_edited_slices():
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    head = model.head.weight.detach().clone()
    before = bits(model)
    with edit.applied(model):
        model(cases.random_numbers(3, 6)).sum().backward()
        assert all(parameter.requires_grad for parameter in model.parameters())
        torch.optim.SGD(model.head.parameters(), lr=0.1).step()
    after = bits(model)
    assert {key for key in before if before[key] != after[key]} == {"head.weight", "head.bias"}
    assert not torch.equal(model.head.weight, head)


def test_an_edit_loaded_elsewhere_can_be_undone_too(tmp_path):
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    before = bits(model)
    edit.apply_(model)
    Edit.load(edit.save(tmp_path / "edit.json")).undo_(model)
    assert bits(model) == before


def test_another_model_is_refused_and_left_alone():
    edit, other = make_edit("mlp"), cases.make_model("residual")
    before = bits(other)
    with refused(EditError, "made for another model", "this model's own"):
        edit.apply_(other)
    with refused(EditError, "another model"), edit.applied(other):
        pytest.fail("applied")
    assert bits(other) == before


def test_applying_twice_is_refused():
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    edit.apply_(model)
    edited = bits(model)
    for again in (edit, make_edit("mlp", indices=[4])):
        for how in (again.apply_, again.apply):
            with refused(EditError, "applied to this model already", "hidden1[0], hidden1[2]", "undo_"):
                how(model)
    assert bits(model) == edited
    edit.undo_(model)
    edit.apply_(model)  # once undone, it can be applied again
    assert bits(model) == edited


def test_undoing_what_was_not_applied_is_refused():
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    with refused(EditError, "not applied to this model", "a model without an edit"):
        edit.undo_(model)
    edit.apply_(model)
    twin = copy.deepcopy(model)
    before = bits(twin)
    with refused(EditError, "not applied to this model", "apply_ was called with"):
        edit.undo_(twin)
    assert bits(twin) == before
    with refused(EditError, "not applied", "hidden1[0], hidden1[2] ablated", "undo the edit that is applied"):
        make_edit("mlp", indices=[0]).undo_(model)
    with refused(EditError, "not applied", "hidden1[0], hidden1[2] ablated"):
        make_edit("mlp", "ablate").undo_(model)
    edit.undo_(model)
    with refused(EditError, "not applied to this model"):
        edit.undo_(model)


@pytest.mark.parametrize("changed", ["value", "precision"])
def test_edited_weights_that_changed_since_are_not_overwritten(changed):
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    edit.apply_(model)
    if changed == "value":
        model.hidden1.weight.data[2, 0] = 7.0
    else:
        model.double()
    before = bits(model)
    with refused(EditError, "have changed since", "nothing was restored", "hidden1.weight", "load the model"):
        edit.undo_(model)
    assert bits(model) == before


def test_a_model_whose_weights_were_loaded_again_is_untouched():
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    edited = bits(edit.apply_(model))
    model.load_state_dict(cases.make_model("mlp").state_dict())
    assert bits(edit.apply_(model)) == edited
    assert bits(edit.undo_(model)) == bits(cases.make_model("mlp"))


def test_a_failure_half_way_leaves_the_model_as_it_was():
    """The first component gets a bias of its own before the second turns out to have no place for one."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 4, bias=False)
            self.second = nn.Conv1d(4, 4, 3)

    model = Half().eval()
    groups = [
        ComponentGroup("first", "neuron", "first", "weight", 0, 1),
        ComponentGroup("second", "input", "second", "weight", 1, 1, side="input"),
    ]
    edit = Edit(("first", "second"), ComponentSet(groups), "keep", 0.5, {"model": model_fingerprint(model)})
    before = bits(model)
    with pytest.raises(Exception, match="cannot be replaced by a constant"):
        edit.apply_(model)
    assert bits(model) == before
    with refused(EditError, "not applied"):
        edit.undo_(model)


def test_an_edited_model_is_let_go_of():
    edit, model = make_edit("mlp"), cases.make_model("mlp")
    seen = weakref.ref(edit.apply_(model))
    del model
    gc.collect()
    assert seen() is None


def test_an_edit_of_data_points_has_no_model():
    edit = Edit.of(SubsetMean(num_points=3, num_features=2), [1])
    for method in (edit.apply_, edit.undo_):
        with refused(EditError, "does not ablate a model", "point 1"):
            method(cases.make_model("mlp"))
