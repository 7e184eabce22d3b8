"""Edits applied to the very model and taken back, joined, and predicted by the linear models."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coar.baselines import leave_one_out
from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.editing import Edit, Effect, rank_components
from coar.errors import AxisError, EditError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.task import Task
from coar.testing import SubsetMean
from tests import cases, naive
from tests.contributions import make_attributions, make_experiment, make_task_of_two_outputs
from tests.refused import refused

CONTRIBUTIONS = np.array([[-3.0, -2.0, -1.0, 5.0, 0.5], [0.1, 0.2, 0.1, 1.0, 1.0], [0.2, 0.1, 0.3, 1.1, 0.9]])
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


# ---------------------------------------------------------------------------------------------- composed


EXPERIMENT = make_experiment(CONTRIBUTIONS)


def part(indices):
    return Edit.of(EXPERIMENT, indices, [float(i) for i in indices], {"about": list(indices)})


def test_a_sum_ablates_what_either_does():
    both = part([3, 1]) + part([1, 0])
    assert both.names == ("hidden[3]", "hidden[1]", "hidden[0]")
    assert both.scores == (3.0, 1.0, 0.0)
    model = EXPERIMENT.task.model
    assert model_fingerprint(both.apply(model)) == model_fingerprint(part([0, 1, 3]).apply(model))
    assert both == part([3, 1]).compose(part([1, 0]))


@pytest.mark.parametrize(("name", "bias", "value"), ABLATIONS)
def test_a_sum_is_the_edit_of_the_union(name, bias, value):
    experiment = cases.make_case(name).experiment(bias, value)
    both = Edit.of(experiment, [0]) + Edit.of(experiment, [2, 0])
    model = experiment.task.model
    assert bits(both.apply(model)) == bits(Edit.of(experiment, [0, 2]).apply(model))


def test_the_provenance_of_both_is_kept():
    both = part([3]) + part([1])
    assert both.provenance["parts"] == [
        {"names": ["hidden[3]"], "scores": [3.0], "provenance": {"about": [3]}},
        {"names": ["hidden[1]"], "scores": [1.0], "provenance": {"about": [1]}},
    ]


index_lists = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)


@given(st.lists(index_lists, min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_sums_do_not_depend_on_brackets(lists):
    edits = [part(indices) for indices in lists]
    left = reduce(Edit.compose, edits)
    right = reduce(lambda done, edit: edit + done, reversed(edits))
    assert left == right
    assert list(left.names) == list(dict.fromkeys(name for edit in edits for name in edit.names))
    assert [entry["provenance"] for entry in left.provenance["parts"]] == [edit.provenance for edit in edits]
    turned = reduce(Edit.compose, edits[::-1])
    model = EXPERIMENT.task.model
    assert set(turned.names) == set(left.names)
    assert model_fingerprint(turned.apply(model)) == model_fingerprint(left.apply(model))


def test_a_sum_is_saved_with_infinite_scores(tmp_path):
    both = Edit.of(EXPERIMENT, [0], [-np.inf]) + part([2])
    loaded = Edit.load(both.save(tmp_path / "both.json"))
    assert loaded == both
    assert loaded.scores == (-np.inf, 2.0)
    text = json.loads((tmp_path / "both.json").read_text())
    assert text["provenance"]["parts"][0]["scores"] == ["-inf"]


def test_scores_of_a_sum_are_those_of_all_components_or_none():
    assert (Edit.of(EXPERIMENT, [0]) + part([2])).scores == ()


def test_edits_of_data_points_are_joined():
    experiment = SubsetMean(num_points=3, num_features=2)
    both = Edit.of(experiment, [0]) + Edit.of(experiment, [2])
    assert both.names == ("point 0", "point 2")
    assert both.components is None
    assert both.effect(experiment, [0], "mean").after == pytest.approx(experiment.values[1, :1], abs=1e-6)


def test_edits_of_different_things_are_not_joined():
    experiment = cases.make_case("mlp").experiment()
    ours, others = Edit.of(experiment, [0]), cases.make_case("mlp").experiment("ablate")
    with refused(EditError, "cannot be one: model differs", "from one experiment"):
        ours + part([0])
    with refused(EditError, "ablation differs", "bias=keep", "bias=ablate"):
        ours + Edit.of(others, [1])
    fewer = find_components(experiment.task.model, kinds=["neuron"], include=["hidden2"])
    with refused(EditError, "slices differs", "joined with +"):
        ours + Edit.of(ComponentAblation(experiment.task, fewer), [1])
    with pytest.raises(TypeError):
        ours + "hidden1[0]"


# --------------------------------------------------------------------------------------------- predicted


def test_the_prediction_is_minus_the_sum_of_the_weights():
    truth = make_attributions(CONTRIBUTIONS, EXPERIMENT)
    expected = -CONTRIBUTIONS[[2, 0]][:, [3, 1]].sum(axis=1)
    assert part([3, 1]).predicted(truth, [2, "e0"]) == pytest.approx(expected)
    effect = part([3, 1]).effect(EXPERIMENT, ["e2", 0], "margin", truth)
    assert effect.predicted == pytest.approx(effect.after, abs=1e-6)


def test_the_predicted_effect_is_the_difference_of_two_predictions():
    experiment = cases.make_case("residual").experiment()
    attributions = leave_one_out(experiment, progress=False)
    edit = Edit.of(experiment, [1, 4, 5])
    masks = np.ones((2, len(experiment.components)), dtype=bool)
    masks[1, [1, 4, 5]] = False
    kept, ablated = attributions.predict(masks)
    assert edit.predicted(attributions, range(5)) == pytest.approx(ablated - kept)
    effect = edit.effect(experiment, [3, 1], "margin", attributions.subset([1, 2, 3]))
    assert effect.predicted == pytest.approx(effect.before + (ablated - kept)[[3, 1]])
    single = Edit.of(experiment, [4]).effect(experiment, range(5), "margin", attributions)
    assert single.predicted == pytest.approx(single.after, abs=1e-4)  # leave-one-out is exact for one


def test_an_effect_says_what_was_predicted():
    assert repr(Effect(np.zeros(2), np.ones(2))) == "Effect(mean +0.00 -> +1.00 over 2 columns)"
    said = Effect(np.zeros(2), np.ones(2), np.full(2, 1.5))
    assert repr(said) == "Effect(mean +0.00 -> +1.00 (+1.50 predicted) over 2 columns)"
    assert part([0]).effect(EXPERIMENT, [0], "margin").predicted is None


def test_attributions_of_something_else_predict_nothing():
    other = make_attributions(CONTRIBUTIONS + 1)
    with refused(EditError, "made for other attributions: model differs"):
        part([0]).predicted(other, [0])
    with refused(EditError, "made for other attributions: model differs"):
        part([0]).effect(EXPERIMENT, [0], "margin", other)
    truth = make_attributions(CONTRIBUTIONS, EXPERIMENT)
    with refused(EditError, "columns are not columns of the attributions", "unknown: 9"):
        part([0]).predicted(truth, [9])
    with refused(AxisError, "'e2'", "attributions"):
        part([0]).effect(EXPERIMENT, [2], "margin", truth.subset([0, 1]))


def test_attributions_of_another_output_predict_nothing():
    task = make_task_of_two_outputs(CONTRIBUTIONS.tolist())
    experiment = ComponentAblation(task, EXPERIMENT.component_set)
    truth = make_attributions(CONTRIBUTIONS, experiment)
    with refused(EditError, "of another output", "expected: twice", "got:      margin"):
        Edit.of(experiment, [0]).effect(experiment, [0], "twice", truth)


# ------------------------------------------------------------------------------ one target, and the holdout


@pytest.mark.parametrize(
    ("targets", "references", "score", "spread"),
    [
        ([0], [1, 2], "welch", "reference spread"),
        ([0, 1], [2], "welch", "target spread"),
        ([0, 1], [2, 3], "welch", "target and reference spread"),
        ([0], [1], "difference", "none"),
    ],
)
def test_a_ranking_says_whose_spread_is_in_the_denominator(targets, references, score, spread):
    contributions = np.vstack([CONTRIBUTIONS, CONTRIBUTIONS[:2] + 0.3])
    experiment = make_experiment(contributions)
    truth = make_attributions(contributions, experiment)
    ranking = rank_components(truth, targets, references, score=score)
    assert ranking.spread == spread
    assert (f"{spread} in the denominator" in repr(ranking)) == (score == "welch")
    edit = ranking.sweep(experiment, range(1, 5), [4], progress=False).choose(max_accuracy_drop=1.0)
    assert edit.provenance["spread"] == spread


def test_a_single_target_is_measured_by_the_spread_of_the_references():
    ranking = rank_components(make_attributions(CONTRIBUTIONS), [0], [1, 2])
    spread = CONTRIBUTIONS[1:].std(axis=0) / np.sqrt(2)
    assert ranking.scores == pytest.approx((CONTRIBUTIONS[0] - CONTRIBUTIONS[1:].mean(axis=0)) / spread)


def test_the_holdout_may_be_any_named_example_of_the_experiment():
    """Attributions of targets and references are enough."""
    contributions = np.vstack([CONTRIBUTIONS, np.eye(5)])
    experiment = make_experiment(contributions)
    few = make_attributions(contributions, experiment).subset([2, 0, 1])
    ranking = rank_components(few, ["e0"], ["e1", "e2"])
    curve = ranking.sweep(experiment, [1], ["e7", "e3"], progress=False)
    assert curve.holdout.tolist() == [7, 3]
    assert curve.table.holdout_output.to_numpy() == pytest.approx([1.0, 0.5])
    assert curve.table.target_output.to_numpy() == pytest.approx([-0.5, 2.5])
    assert curve.table.overall_accuracy.to_numpy() == pytest.approx([7 / 8, 7 / 8])
    with refused(EditError, "holdout and references overlap", "'e1'"):
        ranking.sweep(experiment, [1], ["e1"], progress=False)
    with refused(EditError, "holdout and targets overlap", "'e0'"):
        ranking.sweep(experiment, [1], [1], progress=False)  # positions are those of the attributions
    with refused(EditError, "holdout have a column twice"):
        rank_components(few, ["e0"], ["e1"], score="difference").sweep(
            experiment, [1], [0, "e2"], progress=False
        )


def test_metadata_do_not_disturb_an_edit():
    """A task with metadata of its own kind and none protected edits as ever."""
    task = EXPERIMENT.task
    plain = Task(
        task.model, task.dataset, outputs=task.outputs, metadata={"id": ["a", "b", "c"]}, device="cpu"
    )
    experiment = ComponentAblation(plain, EXPERIMENT.component_set)
    ranking = rank_components(make_attributions(CONTRIBUTIONS, experiment), ["a"], ["b"], score="difference")
    edit = ranking.sweep(experiment, [1], ["c"], progress=False).choose()
    assert edit.provenance["protected_accuracy_drops"] == {}
