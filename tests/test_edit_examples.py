"""edit_examples: from examples to a finished, judged edit, on sets that do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from coar.baselines import gradient_x_parameter
from coar.discovery import find_components
from coar.editing import Edit
from coar.editing.from_examples import NUM_REFERENCES, edit_examples, edit_misread, first_fixed
from coar.errors import AxisError, EditError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.outputs import margin
from coar.task import Task
from tests.contributions import make_attributions, make_experiment
from tests.refused import refused


def toy(target=(-4.0, 1.0, 0.5), num_examples=130):
    """Twelve components; e0 is wrong because of component 0, all others are right without it."""
    contributions = np.random.default_rng(0).uniform(0.1, 0.2, size=(num_examples, 12))
    contributions[:, 0] /= 100
    contributions[0] = [*target, *[0.1] * 9]
    experiment = make_experiment(contributions)
    return experiment, make_attributions(contributions, experiment), contributions


def parts(result):
    """Positions of targets, references, holdout."""
    ranking = result.curve.ranking
    return ranking.targets.tolist(), ranking.references.tolist(), result.curve.holdout.tolist()


def test_the_component_that_holds_a_target_back_is_ablated():
    experiment, truth, contributions = toy()
    result = edit_examples(experiment, truth, ["e0"])
    assert result.edit.names == ("hidden[0]",)
    assert result.targets.before == pytest.approx([contributions[0].sum()], abs=1e-6)
    assert result.targets.after == pytest.approx([contributions[0, 1:].sum()], abs=1e-6)
    assert result.report.accuracy_before == result.report.accuracy_after == 1.0


def test_all_examples_play_one_part_each():
    experiment, truth, _ = toy()
    result = edit_examples(experiment, truth, [0, 5])
    targets, references, holdout = parts(result)
    assert targets == [0, 5]
    assert len(references) == NUM_REFERENCES
    used = targets + references + holdout
    assert len(set(used)) == len(used)
    assert len(holdout) == (130 - len(targets) - NUM_REFERENCES) // 2
    assert len(used) + len(result.report.before) == 130


def test_the_report_is_on_examples_that_chose_nothing():
    experiment, truth, contributions = toy()
    result = edit_examples(experiment, truth, ["e0"])
    rest = np.setdiff1d(np.arange(130), np.concatenate(parts(result)))
    assert np.sort(result.report.before) == pytest.approx(np.sort(contributions[rest].sum(axis=1)), abs=1e-6)


def test_references_are_answered_right():
    contributions = toy()[2]
    contributions[1:40, 3] = -4.0
    experiment = make_experiment(contributions)
    result = edit_examples(experiment, make_attributions(contributions, experiment), ["e0"])
    references = parts(result)[1]
    assert (contributions[references].sum(axis=1) > 0).all()


def test_the_split_depends_on_the_seed_alone():
    experiment, truth, _ = toy()
    first, again, other = (edit_examples(experiment, truth, ["e0"], seed=seed) for seed in (0, 0, 1))
    assert parts(first) == parts(again)
    assert parts(first) != parts(other)


def test_few_components_are_enough():
    contributions = toy()[2][:, :3]
    experiment = make_experiment(contributions)
    result = edit_examples(experiment, make_attributions(contributions, experiment), ["e0"])
    assert result.edit.names == ("hidden[0]",)
    assert result.curve.sizes == (0, 1, 2, 3)


def test_an_answer_can_be_forgotten():
    experiment, truth, _ = toy(target=(4.0, -1.0, -0.5))
    result = edit_examples(experiment, truth, ["e0"], "lower")
    assert result.edit.names == ("hidden[0]",)
    assert result.targets.before > 0 > result.targets.after


def test_attributions_of_some_examples_are_enough():
    """In another order than the experiment's: positions are those of the attributions."""
    experiment, truth, contributions = toy()
    order = np.random.default_rng(1).permutation(130)[:60]
    part = truth.subset([*order[order != 0], 0])
    result = edit_examples(experiment, part, ["e0"])
    assert result.targets.before == pytest.approx([contributions[0].sum()], abs=1e-6)
    known = contributions[order].sum(axis=1)
    assert all(np.isclose(known, value, atol=1e-6).any() for value in result.report.before)


def test_the_summary_says_what_changed():
    experiment, truth, contributions = toy()
    text = edit_examples(experiment, truth, ["e0"]).summary()
    before, after = contributions[0].sum(), contributions[0, 1:].sum()
    for words in (
        "ablating 1 of 12 components: hidden[0]",
        f"{before:+.2f} before, {after:+.2f} after (the linear models expected {after:+.2f})",
        "100.0% before, 100.0% after (+0.0 points) on 40 examples that chose nothing",
    ):
        assert words in text


def test_an_edit_that_moves_nothing_across_0_is_refused():
    experiment, truth, _ = toy(target=(-0.5, -2.0, -3.0))
    with refused(EditError, "across 0", "nothing was applied", "down by at most 1.00%", "before", "at best"):
        edit_examples(experiment, truth, ["e0"], sizes=[1, 2])


def test_targets_that_are_right_already_do_not_count():
    """e0 moves, but stays wrong; that e7 stays right is nobody's merit."""
    contributions = toy()[2]
    contributions[[0, 7], :3] = [-0.5, -2.0, -3.0]
    contributions[7, 3] = 9.0
    experiment = make_experiment(contributions)
    with refused(EditError, "moves a target across 0", "nothing was applied"):
        edit_examples(experiment, make_attributions(contributions, experiment), ["e0", "e7"], sizes=[1])


def test_too_few_examples_are_refused():
    experiment, truth, _ = toy(num_examples=4)
    with refused(EditError, "too few examples", "at least 4 right examples", "3 right of 3", "sets of your"):
        edit_examples(experiment, truth, ["e0"])


def test_unknown_targets_and_foreign_attributions_are_refused():
    experiment, truth, contributions = toy()
    with refused(EditError, "targets are not columns", "unknown: 'e999'"):
        edit_examples(experiment, truth, ["e999"])
    with refused(AxisError, "components", "attributions", "experiment", "model differs"):
        edit_examples(make_experiment(contributions + 1), truth, ["e0"])


@pytest.mark.slow
def test_a_digit_is_forgotten_and_the_saved_edit_does_it_too(digits_task, tmp_path):
    experiment = ComponentAblation(digits_task, find_components(digits_task.model))
    before = model_fingerprint(digits_task.model)
    attributions = gradient_x_parameter(experiment, progress=False)
    untouched = attributions.predict(np.ones((1, len(experiment.components)), dtype=bool))[0]
    target = int(np.flatnonzero(untouched > 0)[untouched[untouched > 0].argmin()])
    result = edit_examples(experiment, attributions, [target], "lower", max_accuracy_drop=0.1)
    edited = Edit.load(result.edit.save(tmp_path / "forget.json")).apply(digits_task.model)
    after = margin(edited, digits_task.batch([target])).item()
    assert untouched[target] > 0 > after
    assert after == pytest.approx(result.targets.after[0], abs=1e-4)
    assert result.report.accuracy_after >= result.report.accuracy_before - 0.25
    assert model_fingerprint(digits_task.model) == before


def test_a_target_that_is_right_already_is_refused_with_its_margin():
    experiment, truth, _ = toy()
    with refused(EditError, "nothing to edit", "below 0", "+"):
        edit_examples(experiment, truth, ["e5"])


def test_the_linear_models_are_heard_on_targets_and_report():
    experiment, truth, contributions = toy()
    result = edit_examples(experiment, truth, ["e0"])
    assert result.targets.predicted == pytest.approx([contributions[0, 1:].sum()], abs=1e-5)
    assert result.report.predicted == pytest.approx(result.report.after, abs=1e-5)


def test_a_protected_component_is_not_ablated():
    experiment, truth, _ = toy(target=(-4.0, -1.5, 4.5))
    assert edit_examples(experiment, truth, ["e0"]).edit.names == ("hidden[0]",)
    result = edit_examples(experiment, truth, ["e0"], protect_components=["hidden[0]"])
    assert result.edit.names == ("hidden[1]",)
    assert "1 of 12 components" in result.summary()
    assert result.curve.sizes[-1] == 8  # of 11 that may be ablated


def sided(contributions, sides):
    """The experiment of some contributions with a side for every example."""
    plain = make_experiment(contributions)
    metadata = {"id": plain.task.example_ids(), "side": sides}
    task = Task(plain.task.model, plain.task.dataset, plain.task.outputs, metadata=metadata, device="cpu")
    return ComponentAblation(task, plain.component_set)


def test_a_protected_group_keeps_its_accuracy():
    """A tenth of the examples needs component 0: too few to trip the guard but as a group."""
    contributions = toy()[2]
    rare = np.arange(130) % 10 == 5
    contributions[rare, 0] = 9.0
    contributions[rare, 1:] = -0.1
    sides = np.where(rare, "rare", "common")
    experiment = sided(contributions, sides)
    truth = make_attributions(contributions, experiment)
    drop = {"max_accuracy_drop": 0.3, "sizes": [1]}
    assert edit_examples(experiment, truth, ["e0"], **drop).edit.names == ("hidden[0]",)
    common = edit_examples(experiment, truth, ["e0"], protect={"side": "common"}, **drop)
    assert common.edit.provenance["protected_accuracy_drops"] == {"side=common": 0.0}
    assert common.summary().endswith("protected side=common: +0.0 points on the holdout")
    with refused(EditError, "also of side=common, side=rare", "of side=rare 100.00%", "nothing was applied"):
        edit_examples(experiment, truth, ["e0"], protect="side", **drop)


class TestMisread:
    """e0 is fixed without component 0; e1 is the closer mistake, and everything holds it back alike."""

    def made(self):
        contributions = np.random.default_rng(0).uniform(0.1, 0.2, size=(130, 12))
        contributions[:, 0] /= 100
        contributions[0] = [-4.0, 1.0, 0.5, *[0.1] * 9]
        contributions[1] = -0.01
        experiment = make_experiment(contributions)
        return experiment, make_attributions(contributions, experiment)

    def test_each_is_tried_the_closest_mistake_first(self):
        experiment, truth = self.made()
        found = list(edit_misread(experiment, truth))
        assert [target for target, _, _ in found] == [1, 0]
        assert found[0][1] == pytest.approx(-0.12, abs=1e-6)
        assert found[0][2] is None
        assert found[1][2].edit.names == ("hidden[0]",)

    def test_the_first_that_can_be_fixed(self):
        experiment, truth = self.made()
        assert first_fixed(experiment, truth).edit.provenance["targets"] == ["e0"]

    def test_protection_holds_for_each(self):
        experiment, truth = self.made()
        found = {target: edit for target, _, edit in edit_misread(experiment, truth)}
        assert found[0] is not None
        kept = edit_misread(experiment, truth, protect_components=["hidden[0]"])
        assert [edit for _, _, edit in kept] == [None, None]
        with refused(EditError, "no misread example can be fixed", "2 examples tried"):
            first_fixed(experiment, truth, protect_components=["hidden[0]"])

    def test_what_nobody_can_protect_is_said_once(self):
        experiment, truth = self.made()
        with refused(EditError, "'nobody' matches no component"):
            first_fixed(experiment, truth, protect_components=["nobody"])
        with refused(EditError, "no column 'side'"):
            first_fixed(experiment, truth, protect="side")

    def test_none(self):
        experiment, truth, _ = toy(target=(4.0, 1.0, 0.5))
        with refused(EditError, "no misread example can be fixed", "no example is misread"):
            first_fixed(experiment, truth)
