"""Sums of edits, what the linear models expect of them, and what a ranking and a sweep say of themselves."""

from __future__ import annotations

import json
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coar.baselines import leave_one_out
from coar.discovery import find_components
from coar.editing import Edit, Effect, rank_components
from coar.errors import AxisError, EditError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.task import Task
from coar.testing import SubsetMean
from tests import cases
from tests.contributions import make_attributions, make_experiment, make_task_of_two_outputs
from tests.refused import refused

CONTRIBUTIONS = np.array([[-3.0, -2.0, -1.0, 5.0, 0.5], [0.1, 0.2, 0.1, 1.0, 1.0], [0.2, 0.1, 0.3, 1.1, 0.9]])
EXPERIMENT = make_experiment(CONTRIBUTIONS)

# ---------------------------------------------------------------------------------------------- composed


def part(indices):
    return Edit.of(EXPERIMENT, indices, [float(i) for i in indices], {"about": list(indices)})


def test_a_sum_ablates_what_either_does():
    both = part([3, 1]) + part([1, 0])
    assert both.names == ("hidden[3]", "hidden[1]", "hidden[0]")
    assert both.scores == (3.0, 1.0, 0.0)
    model = EXPERIMENT.task.model
    assert model_fingerprint(both.apply(model)) == model_fingerprint(part([0, 1, 3]).apply(model))
    assert both == part([3, 1]).compose(part([1, 0]))


@pytest.mark.parametrize("name", [*cases.OUTPUT_UNITS, "slices"])
@pytest.mark.parametrize(
    ("bias", "value"), [("keep", "zero"), ("ablate", "zero"), ("keep", 0.3), ("keep", "mean")]
)
def test_a_sum_is_the_edit_of_the_union(name, bias, value):
    experiment = cases.make_case(name).experiment(bias, value)
    both = Edit.of(experiment, [0]) + Edit.of(experiment, [2, 0])
    model, together = experiment.task.model, Edit.of(experiment, [0, 2])
    assert model_fingerprint(both.apply(model)) == model_fingerprint(together.apply(model))


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
