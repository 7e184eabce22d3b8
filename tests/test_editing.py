"""Rank, sweep, choose, Edit: on models whose contributions are written down in the test."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from coar.attributions import Attributions
from coar.baselines import leave_one_out
from coar.components import ComponentSet
from coar.editing import Edit, rank_components
from coar.errors import AxisError, EditError, SpecError, StoreError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.testing import SubsetMean, linear_experiment
from tests import cases, naive
from tests.contributions import answer, make_attributions, make_experiment
from tests.refused import refused

# Example e0 is answered wrongly (its contributions sum to -0.5): component 0 holds it back most, then 1.
# e1, e2 are references; e3 .. e12 choose the size: without component 1, e3 and e4 are wrong.
# Without component 2, e5 is wrong as well.
TARGET = [-3.0, -2.0, -1.0, 5.0, 0.5]
REFERENCES = [[0.1, 0.2, 0.1, 1.0, 1.0], [0.2, 0.1, 0.3, 1.1, 0.9]]
HOLDOUT = (
    [[0.0, 2.0, 0.0, 0.5, -1.0]] * 2  # margin 1.5, without component 1: -0.5
    + [[0.0, 0.0, 2.0, 0.5, -1.0]]  # margin 1.5, without component 2: -0.5
    + [[0.0, 0.0, 0.0, 2.0, 1.0]] * 7
)
CONTRIBUTIONS = np.array([TARGET, *REFERENCES, *HOLDOUT])
CHOOSING = range(3, 13)


def sweep(contributions=CONTRIBUTIONS, sizes=(1, 2, 3), target=("e0",), direction="raise", holdout=CHOOSING):
    experiment = make_experiment(contributions)
    truth = make_attributions(contributions, experiment)
    ranking = rank_components(truth, target, [1, 2], direction)
    return ranking.sweep(experiment, sizes, holdout, progress=False)


# --------------------------------------------------------------------------------------- ranking


@pytest.mark.parametrize(("targets", "references"), [(1, 2), (1, 20), (2, 1), (5, 9)])
def test_scores_are_welchs_t_with_population_variances(targets, references):
    weights = np.random.default_rng(0).normal(size=(targets + references, 6)).astype(np.float32)
    ranking = rank_components(
        make_attributions(weights), range(targets), range(targets, targets + references)
    )
    ours, theirs = weights[:targets].astype(float), weights[targets:].astype(float)
    assert ranking.scores == pytest.approx(naive.welch_t(ours, theirs))
    moments = [(part.mean(axis=0), part.std(axis=0), len(part)) for part in (ours, theirs)]
    scipy = stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False).statistic
    assert ranking.scores == pytest.approx(scipy)


def test_a_difference_of_means_needs_no_spread():
    ranking = rank_components(make_attributions(CONTRIBUTIONS), [0], [1], score="difference")
    assert ranking.scores == pytest.approx(CONTRIBUTIONS[0] - CONTRIBUTIONS[1])


def test_raising_ablates_the_lowest_first_and_lowering_the_highest():
    truth = make_attributions(CONTRIBUTIONS)
    up, down = (
        rank_components(truth, [0], [1, 2], direction, "difference") for direction in ("raise", "lower")
    )
    assert up.order.tolist() == [0, 1, 2, 4, 3]
    assert down.order.tolist() == [3, 4, 2, 1, 0]
    assert up.mask(2).tolist() == [False, False, True, True, True]


def test_the_ranking_as_a_table():
    ranking = rank_components(make_attributions(CONTRIBUTIONS), [0], [1, 2])
    table = ranking.table(2)
    assert table.component.tolist() == ["hidden[0]", "hidden[1]"]
    assert table.group.tolist() == ["hidden", "hidden"]
    assert table.score.to_numpy() == pytest.approx(np.sort(ranking.scores)[:2])


def test_a_component_without_any_weight_scores_0():
    contributions = CONTRIBUTIONS.copy()
    contributions[:, 4] = 0.0
    assert rank_components(make_attributions(contributions), [0], [1, 2]).scores[4] == 0.0


def test_columns_go_by_name_or_position():
    truth = make_attributions(CONTRIBUTIONS)
    by_name = rank_components(truth, ["e0"], ["e1", "e2"])
    by_position = rank_components(truth, np.array([0]), np.array([1, 2]))
    assert np.array_equal(by_name.scores, by_position.scores)


@pytest.mark.parametrize(
    ("targets", "references", "words"),
    [
        ([0], [1], ("infinite", "at least two references", "1 target, 1 reference", "difference")),
        ([0, 1], [1, 2], ("targets and references overlap", "disjoint", "1 in both, first 'e1'")),
        ([0, 99], [1, 2], ("targets are not columns", "0 .. 12", "'e0'", "unknown: 99")),
        ([0], ["e1", "nobody"], ("references are not columns", "unknown: 'nobody'")),
        ([-1], [1, 2], ("targets are not columns", "unknown: -1")),
        ([], [1, 2], ("targets are not columns", "one or more", "none")),
        ([0], [], ("references are not columns", "none")),
        ([0, "e0"], [1, 2], ("targets are not columns", "one of them twice")),
        ("e0", [1, 2], ("targets are a list", "['e0']")),
        ([0], 1, ("references are a list", "[1]")),
    ],
)
def test_bad_targets_and_references_are_refused(targets, references, words):
    with refused(EditError, *words):
        rank_components(make_attributions(CONTRIBUTIONS), targets, references)


@pytest.mark.parametrize("how", [("up", "welch"), ("raise", "student")])
def test_an_unknown_direction_or_score_is_refused(how):
    with refused(EditError, "unknown ranking", "raise or lower; welch, difference", ", ".join(how)):
        rank_components(make_attributions(CONTRIBUTIONS), [0], [1, 2], *how)


# ----------------------------------------------------------------------------------------- sweep


def test_ablation_raises_the_target_by_exactly_what_was_predicted():
    curve = sweep()
    assert curve.sizes == (0, 1, 2, 3)
    assert curve.outputs[:, 0] == pytest.approx([-0.5, 2.5, 4.5, 5.5])
    assert curve.table.target_output.to_numpy() == pytest.approx([-0.5, 2.5, 4.5, 5.5])
    assert curve.table.target_predicted.to_numpy() == pytest.approx([-0.5, 2.5, 4.5, 5.5])


def test_the_table_has_outputs_and_accuracies_of_all_parts():
    table = sweep().table.set_index("size")
    assert table.target_accuracy.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert table.reference_accuracy.tolist() == [1.0] * 4
    assert table.reference_output.loc[1] == pytest.approx(CONTRIBUTIONS[1:3, 1:].sum(axis=1).mean())
    assert table.holdout_accuracy.tolist() == pytest.approx([1.0, 1.0, 0.8, 0.7])


def test_every_size_is_really_ablated():
    experiment = cases.make_case("residual").experiment()
    attributions = leave_one_out(experiment, progress=False)
    ranking = rank_components(attributions, [0], [1, 2])
    curve = ranking.sweep(experiment, [1, 4], holdout=[3, 4], progress=False)
    masks = [ranking.mask(size) for size in (0, 1, 4)]
    assert curve.outputs == pytest.approx(naive.rows(experiment, masks)["margin"], abs=1e-5)


def test_attributions_of_some_columns_read_those_columns():
    experiment = make_experiment(CONTRIBUTIONS)
    part = make_attributions(CONTRIBUTIONS, experiment).subset([2, 12, 0, 1])
    curve = rank_components(part, ["e0"], ["e1", "e2"]).sweep(experiment, [1], ["e12"], progress=False)
    assert curve.table.target_output.to_numpy() == pytest.approx([-0.5, 2.5])
    assert curve.table.holdout_output.to_numpy() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize(
    ("holdout", "words"),
    [
        ([0, 5], ("holdout and targets overlap", "disjoint", "first 'e0'", "out of the targets")),
        ([2, 5], ("holdout and references overlap", "first 'e2'")),
        ([55], ("holdout are not columns", "unknown: 55")),
        ([], ("holdout are not columns", "none")),
    ],
)
def test_a_bad_holdout_is_refused(holdout, words):
    with refused(EditError, *words):
        sweep(holdout=holdout)


@pytest.mark.parametrize("sizes", [[6], [-1], [], [0]])
def test_sizes_out_of_range_are_refused(sizes):
    with refused(EditError, "sizes out of range", "1 .. 5", str(sizes)):
        sweep(sizes=sizes)


def test_attributions_of_another_model_are_refused():
    ranking = rank_components(make_attributions(CONTRIBUTIONS), [0], [1, 2])
    with refused(AxisError, "components", "attributions", "experiment", "model differs"):
        ranking.sweep(make_experiment(CONTRIBUTIONS + 1), [1], CHOOSING, progress=False)


# ---------------------------------------------------------------------------------------- choose


def test_the_smallest_size_among_equally_good_ones_is_chosen():
    assert sweep().choose(max_accuracy_drop=1.0).names == ("hidden[0]",)


# Component 0 alone does not make e0 right, components 0 and 1 do.
NEEDS_TWO = CONTRIBUTIONS.copy()
NEEDS_TWO[0] = [-1.5, -1.2, -1.0, 1.0, 0.5]


def test_as_many_as_needed_are_chosen_where_the_guard_allows_it():
    assert sweep(NEEDS_TWO).choose(max_accuracy_drop=0.3).names == ("hidden[0]", "hidden[1]")


@pytest.mark.parametrize(("drop", "size"), [(0.0, 1), (0.19, 1), (0.2, 2)])
def test_the_holdout_never_loses_more_than_allowed(drop, size):
    """Without component 1 two of ten holdout answers are wrong; until then nothing crosses 0."""
    edit = sweep(NEEDS_TWO).choose(max_accuracy_drop=drop)
    assert len(edit.names) == size
    assert edit.provenance["holdout_accuracy_drop"] <= drop + 1e-9


def test_no_more_components_than_allowed():
    assert len(sweep(NEEDS_TWO).choose(max_accuracy_drop=1.0, max_size=1).names) == 1
    with refused(EditError, "no size is within max_size", "at least 1"):
        sweep(NEEDS_TWO).choose(max_accuracy_drop=1.0, max_size=0)


def test_where_nothing_crosses_0_the_largest_change_is_chosen():
    hopeless = CONTRIBUTIONS.copy()
    hopeless[0] = [-3.0, -2.0, -1.0, -1.0, -1.0]
    curve = sweep(hopeless, sizes=[1, 2])
    gains = curve.table.target_output.to_numpy()
    assert gains.max() < 0
    assert len(curve.choose(max_accuracy_drop=1.0).names) == curve.sizes[int(gains.argmax())]


def test_lowering_makes_a_right_answer_wrong():
    contributions = CONTRIBUTIONS.copy()
    contributions[0] = [0.1, 0.1, 3.0, 0.5, -1.0]
    edit = sweep(contributions, direction="lower").choose(max_accuracy_drop=0.1)
    assert edit.names == ("hidden[2]",)
    assert edit.provenance["direction"] == "lower"
    assert edit.provenance["target_output_before"] == pytest.approx(2.7)
    assert edit.provenance["target_output_after"] == pytest.approx(-0.3)


def test_a_guard_that_nothing_meets_says_the_best_that_could_be_done():
    needed = CONTRIBUTIONS.copy()
    needed[3:5, 0] = [3.0, 3.0]  # without component 0 ...
    needed[3:5, 3] = [-3.0, -3.0]  # ... two of ten are wrong
    with refused(
        EditError,
        "nothing was applied",
        "at most 0.50%, size <= 2",
        "best for the targets: 2 components, outputs moved by +5.00, holdout accuracy down 20.00%",  # not 3
        "allow a larger drop",
    ):
        sweep(needed).choose(max_accuracy_drop=0.005, max_size=2)


def test_where_every_size_harms_the_best_size_is_named_all_the_same():
    harmed = CONTRIBUTIONS.copy()
    harmed[0] = [1.0, 2.0, 3.0, -7.0, -8.0]
    backwards = make_attributions(-harmed, make_experiment(harmed))
    curve = rank_components(backwards, [0], [1, 2], score="difference").sweep(
        make_experiment(harmed), [1, 2], CHOOSING, progress=False
    )
    with refused(EditError, "best for the targets: 1 components, outputs moved by -3.00"):
        curve.choose()


def test_an_output_whose_sign_means_nothing_is_refused():
    experiment, weights = linear_experiment()
    axes = experiment.components, experiment.columns["score"]
    truth = Attributions(weights, np.zeros(len(weights)), *axes, "score")
    curve = rank_components(truth, [0], [1, 2]).sweep(experiment, [1], [3, 4], progress=False)
    assert curve.table.holdout_accuracy.isna().all()
    with refused(EditError, "'score' does not say", "coar.outputs.margin"):
        curve.choose()


# ------------------------------------------------------------------------------------------ Edit


@pytest.fixture
def edit():
    return sweep().choose(max_accuracy_drop=1.0)


@pytest.fixture
def model():
    return make_experiment(CONTRIBUTIONS).task.model


def test_an_edit_says_where_it_comes_from(edit):
    assert edit.provenance["targets"] == ["e0"]
    assert edit.provenance["references"] == ["e1", "e2"]
    assert edit.provenance["target_output_predicted"] == pytest.approx(2.5)
    assert len(edit.scores) == len(edit.names) == 1
    assert repr(edit) == "Edit(ablates 1: hidden[0])"


def test_applying_gives_a_new_model_and_leaves_the_old_one(edit, model):
    before = model_fingerprint(model)
    edited = edit.apply(model)
    assert edited is not model
    assert model_fingerprint(model) == before != model_fingerprint(edited)
    assert not any(np.shares_memory(a.detach(), b.detach()) for a, b in parameters(edited, model))
    assert all(parameter.requires_grad for parameter in edited.parameters())


def parameters(first, second):
    return zip(first.parameters(), second.parameters(), strict=True)


@pytest.mark.parametrize(("bias", "value"), [("keep", "zero"), ("ablate", "zero"), ("keep", 0.3)])
def test_the_edited_model_gives_the_outputs_of_the_sweep(bias, value):
    experiment = cases.make_case("grouped").experiment(bias, value)
    attributions = leave_one_out(experiment, progress=False)
    ranking = rank_components(attributions, [0], [1, 2])
    curve = ranking.sweep(experiment, [3], holdout=[3, 4], progress=False)
    edit = Edit.of(experiment, ranking.order[:3])
    edited = naive.outputs_of(experiment.task, edit.apply(experiment.task.model))["margin"]
    assert edited == pytest.approx(curve.outputs[1], abs=1e-5)
    literal = naive.ablated(
        experiment.task.model, experiment.component_set, ranking.mask(3), bias, value
    ).eval()
    assert edited == pytest.approx(naive.outputs_of(experiment.task, literal)["margin"], abs=1e-5)


def test_an_edited_linear_model_gives_the_very_bits_of_the_sweep(edit, model):
    task = make_experiment(CONTRIBUTIONS).task
    outputs = answer(edit.apply(model), task.batch(range(len(task)))).detach().numpy()
    assert np.array_equal(outputs, sweep().outputs[1])


def test_the_effect_is_before_and_after(edit):
    effect = edit.effect(make_experiment(CONTRIBUTIONS), [0, 1, 3], "margin")
    assert effect.before == pytest.approx(CONTRIBUTIONS[[0, 1, 3]].sum(axis=1))
    assert effect.after == pytest.approx(CONTRIBUTIONS[[0, 1, 3], 1:].sum(axis=1))
    assert (effect.accuracy_before, effect.accuracy_after) == (pytest.approx(2 / 3), 1.0)


def test_an_edit_of_another_model_is_refused(edit):
    other = make_experiment(CONTRIBUTIONS + 1)
    before = model_fingerprint(other.task.model)
    with refused(EditError, "another model", "expected: model", "got:      model", "this model's own"):
        edit.apply(other.task.model)
    assert model_fingerprint(other.task.model) == before
    with refused(EditError, "another experiment", "model differs"):
        edit.effect(other, [0], "margin")


def test_the_effect_under_another_way_of_ablating_is_refused(edit):
    experiment = make_experiment(CONTRIBUTIONS)
    other = ComponentAblation(experiment.task, experiment.component_set, bias="ablate")
    with refused(EditError, "another experiment", "ablation differs", "bias=keep", "bias=ablate"):
        edit.effect(other, [0], "margin")


def test_the_effect_of_components_that_an_experiment_lacks_is_refused(edit):
    experiment = make_experiment(CONTRIBUTIONS)
    others = ComponentAblation(experiment.task, ComponentSet(experiment.component_set.pick([3, 4])))
    with refused(EditError, "another experiment", "hidden[0]", "no component of this name"):
        edit.effect(others, [0], "margin")


# ------------------------------------------------------------------------------------ Edit on disk


def test_an_edit_is_loaded_as_it_was_saved(edit, model, tmp_path):
    loaded = Edit.load(edit.save(tmp_path / "edits" / "fix.json"))
    assert loaded == edit
    assert model_fingerprint(loaded.apply(model)) == model_fingerprint(edit.apply(model))


@pytest.mark.parametrize("bias", ["keep", "ablate"])
@pytest.mark.parametrize("value", ["zero", 0.5])
def test_the_convention_is_saved(bias, value, tmp_path):
    edit = Edit.of(cases.make_case("mlp").experiment(bias, value), [2])
    loaded = Edit.load(edit.save(tmp_path / "fix.json"))
    assert (loaded.bias, loaded.value) == (bias, value)


def test_infinite_scores_are_saved(tmp_path):
    """Equal references have no spread: whatever sets the target apart scores infinity."""
    contributions = CONTRIBUTIONS.copy()
    contributions[1] = contributions[2]
    edit = sweep(contributions).choose(max_accuracy_drop=1.0)
    assert edit.scores == (-np.inf,)
    assert Edit.load(edit.save(tmp_path / "fix.json")) == edit


def test_saving_again_is_fine_and_saving_another_is_not(edit, tmp_path):
    path = edit.save(edit.save(tmp_path / "fix.json"))
    other = Edit.of(make_experiment(CONTRIBUTIONS), [3])
    with refused(StoreError, "fix.json exists and holds something else", "nothing was overwritten"):
        other.save(path)
    assert Edit.load(path) == edit


@pytest.fixture
def saved(edit, tmp_path):
    return edit.save(tmp_path / "fix.json")


def test_a_missing_or_truncated_file_is_named(saved):
    saved.write_bytes(saved.read_bytes()[:-20])
    with refused(StoreError, "fix.json is not a readable saved edit", "JSON"):
        Edit.load(saved)
    saved.unlink()
    with refused(StoreError, "fix.json is missing", "a saved edit"):
        Edit.load(saved)


@pytest.mark.parametrize(
    "key", ["format", "names", "components", "bias", "value", "source", "scores", "provenance"]
)
def test_a_file_without_a_key_is_refused(saved, key):
    change(saved, lambda value: value.pop(key))
    with refused(StoreError, "fix.json", repr(key), "nothing"):
        Edit.load(saved)


def test_a_newer_file_is_refused_whatever_its_keys(saved):
    saved.write_text('{"format": 2, "parts": []}')
    with refused(StoreError, "fix.json was written by a newer version", "format 1", "format 2", "upgrade"):
        Edit.load(saved)


def test_names_that_are_not_those_of_the_components_are_refused(saved):
    change(saved, lambda value: value.update(names=["hidden[4]"]))
    with refused(StoreError, "fix.json", "names and components differ"):
        Edit.load(saved)


def test_scores_that_are_no_numbers_are_refused(saved):
    change(saved, lambda value: value.update(scores=["high"]))
    with refused(StoreError, "fix.json", "scores are not numbers", "high"):
        Edit.load(saved)


def test_damaged_components_are_refused(saved):
    change(saved, lambda value: value["components"][0].pop("module"))
    with refused(SpecError, "fix.json", "damaged", "module"):
        Edit.load(saved)


def change(path, function) -> None:
    value = json.loads(path.read_text())
    function(value)
    path.write_text(json.dumps(value))


def test_an_edit_of_data_points_is_kept_but_cannot_be_applied(model, tmp_path):
    experiment = SubsetMean(num_points=3, num_features=2)
    edit = Edit.of(experiment, [1, 2])
    loaded = Edit.load(edit.save(tmp_path / "without.json"))
    assert loaded == edit
    assert loaded.names == ("point 1", "point 2")
    effect = loaded.effect(experiment, [0, 1], "mean")
    assert effect.before == pytest.approx(experiment.values.mean(axis=0), abs=1e-6)
    assert effect.after == pytest.approx(experiment.values[0], abs=1e-6)
    with refused(EditError, "does not ablate a model", "ComponentAblation", "point 1"):
        loaded.apply(model)
