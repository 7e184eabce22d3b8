"""What an edit must leave alone: components by pattern, and subpopulations of the task's metadata."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coar.attributions import Attributions
from coar.axes import Axis
from coar.baselines import gradient_x_parameter, leave_one_out
from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.editing import rank_components
from coar.editing.choice import Sizes
from coar.editing.protection import protected_components
from coar.errors import EditError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.outputs import margin
from coar.task import Task
from coar.testing import SubsetMean
from tests.contributions import make_attributions, make_experiment
from tests.refused import refused

# ------------------------------------------------------------------------------------------- components

GROUPS = ["stem"] * 2 + ["layer1.0.conv1"] * 2 + ["layer4.0.conv1"] * 2 + ["layer4.0.conv10"] * 2
NAMES = [f"{group}[{i % 2}]" for i, group in enumerate(GROUPS)]
AXIS = Axis("components", NAMES, {}, {"group": GROUPS})


@pytest.mark.parametrize(
    ("patterns", "protected"),
    [
        ([], []),
        (["stem"], [0, 1]),
        (["stem[1]"], [1]),
        (["layer4.*"], [4, 5, 6, 7]),
        (["layer4.0.conv1"], [4, 5]),
        (["layer4.0.conv1[0]"], [4]),  # the component, not the pattern for conv10
        (["layer4.0.conv1[!1]"], [6, 7]),
        (["*conv1", "stem"], [0, 1, 2, 3, 4, 5]),
        (["layer[14].0.conv1"], [2, 3, 4, 5]),
    ],
)
def test_patterns_name_components_or_groups(patterns, protected):
    assert np.flatnonzero(protected_components(AXIS, patterns)).tolist() == protected


def test_components_without_groups_go_by_their_names():
    axis = Axis("components", ["point 1", "point 2"], {})
    assert protected_components(axis, ["*2"]).tolist() == [False, True]
    with refused(EditError, "'points' matches no component", "such as 'point 1'"):
        protected_components(axis, ["points"])


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["stem", "layer9.*"], ("'layer9.*' matches no component", "stem, layer1.0.conv1", "whole names")),
        ("layer4.*", ("a list of patterns", "['layer4.*']")),
        (["*"], ("every component is protected", "leave some", "'*'")),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, words):
    with refused(EditError, *words):
        protected_components(AXIS, patterns)


CONTRIBUTIONS = np.array(
    [[-3.0, -2.0, -1.0, 5.0, 0.5], [0.1, 0.2, 0.1, 1.0, 1.0], [0.2, 0.1, 0.3, 1.1, 0.9]]
    + [[0.0, 2.0, 0.0, 0.5, -1.0]] * 2  # margin 1.5, without component 1: -0.5
    + [[2.0, 0.0, 0.0, 0.5, -1.0]]  # margin 1.5, without component 0: -0.5
    + [[0.0, 0.0, 0.0, 2.0, 1.0]] * 14
)


@given(
    weights=st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).normal(size=(5, 8))),
    patterns=st.lists(st.sampled_from([*NAMES, "stem", "layer1*", "layer4.0.conv10"]), max_size=3),
    direction=st.sampled_from(["raise", "lower"]),
)
@settings(max_examples=30, deadline=None)
def test_a_ranking_is_the_ranking_without_what_is_protected(weights, patterns, direction):
    attributions = Attributions(
        weights, np.zeros(5), AXIS, Axis("columns", [str(i) for i in range(5)], {}), output="margin"
    )
    every = rank_components(attributions, [0, 1], [2, 3], direction)
    some = rank_components(attributions, [0, 1], [2, 3], direction, protect=patterns)

    def kept(name, group):  # no pattern here but those of names is a name
        fits = [
            pattern == name or (pattern not in NAMES and fnmatchcase(group, pattern)) for pattern in patterns
        ]
        return any(fits)

    expected = [i for i in every.order if not kept(NAMES[i], GROUPS[i])]
    assert some.order.tolist() == expected
    assert np.array_equal(some.scores, every.scores)
    for size in range(len(expected) + 1):
        assert np.flatnonzero(~some.mask(size)).tolist() == sorted(expected[:size])


def test_protected_components_are_not_ablated_nor_counted():
    experiment = make_experiment(CONTRIBUTIONS)
    truth = make_attributions(CONTRIBUTIONS, experiment)
    ranking = rank_components(truth, [0], [1, 2], protect=["hidden[0]"])
    assert repr(ranking).endswith("1 protected, first hidden[1])")
    assert "hidden[0]" not in set(ranking.table().component)
    curve = ranking.sweep(experiment, [1, 2, 4], range(3, 20), progress=False)
    assert curve.table.target_output.to_numpy() == pytest.approx([-0.5, 1.5, 2.5, -3.0])
    assert curve.table.target_predicted.to_numpy() == pytest.approx([-0.5, 1.5, 2.5, -3.0])
    edit = curve.choose(max_accuracy_drop=1.0)
    assert edit.names == ("hidden[1]",)
    assert edit.provenance["protected_components"] == ["hidden[0]"]
    with refused(EditError, "sizes out of range", "1 .. 4"):
        ranking.sweep(experiment, [5], range(3, 20), progress=False)


# --------------------------------------------------------------------------------------- subpopulations

LABELS = [0, 0, 0, *[3, 3, 5], *[5] * 7, *[7] * 7]
SIDES = ["left", "left", "right", "left", "right", "right", *["left", "right"] * 7]
HOLDOUT = range(3, 20)


def grouped_experiment(metadata=None):
    """The model of `CONTRIBUTIONS`, with two columns that say what an example is."""
    task = make_experiment(CONTRIBUTIONS).task
    ids = {"id": [f"e{i}" for i in range(len(CONTRIBUTIONS))]}
    table = ids | ({"label": LABELS, "side": SIDES} if metadata is None else metadata)
    task = Task(task.model, task.dataset, outputs=task.outputs, metadata=table, device="cpu")
    groups = [ComponentGroup("hidden", "neuron", "hidden", "weight", dimension=0, count=5)]
    return ComponentAblation(task, ComponentSet(groups))


def grouped_curve(sizes=(1, 2), holdout=HOLDOUT, metadata=None, protect=None, **how):
    experiment = grouped_experiment(metadata)
    ranking = rank_components(make_attributions(CONTRIBUTIONS, experiment), [0], [1, 2], **how)
    return ranking.sweep(experiment, sizes, holdout, protect=protect, progress=False)


def group_drop(column, value, removed):
    """Accuracy that a group of the holdout loses without some components: from the contributions alone."""
    values = {"label": LABELS, "side": SIDES}[column]
    rows = CONTRIBUTIONS[[i for i in HOLDOUT if values[i] == value]]
    left = np.delete(rows, removed, axis=1)
    return (rows.sum(axis=1) > 0).mean() - (left.sum(axis=1) > 0).mean()


@pytest.mark.parametrize(
    ("protect", "groups"),
    [
        ("label", ["label=5", "label=3", "label=7"]),
        ({"label": [3]}, ["label=3"]),
        ({"label": 3, "side": "left"}, ["label=3", "side=left"]),
        (["side"], ["side=left", "side=right"]),
        (None, []),
        ({}, []),
    ],
)
def test_every_protected_group_has_a_column_in_the_table(protect, groups):
    metadata = {"label": [5 if label == 0 else label for label in LABELS], "side": SIDES}
    table = grouped_curve(metadata=metadata).protecting(protect).table
    columns = [name.removesuffix("_accuracy") for name in table if "=" in name]
    assert columns == groups
    for name in groups:
        column, value = name.split("=")
        value = int(value) if column == "label" else value
        drops = [group_drop(column, value, list(range(size))) for size in (0, 1, 2)]
        shares = table[f"{name}_accuracy"].to_numpy()
        assert shares[0] - shares == pytest.approx(drops)


def test_the_table_has_everything_overall():
    table = grouped_curve().table
    left = [np.delete(CONTRIBUTIONS, list(range(size)), axis=1).sum(axis=1) for size in (0, 1, 2)]
    assert table.overall_output.to_numpy() == pytest.approx([np.mean(row) for row in left])
    assert table.overall_accuracy.to_numpy() == pytest.approx([np.mean(row > 0) for row in left])


def test_the_guard_holds_for_every_group_by_itself():
    """Without component 0 one of eight fives is wrong, one of 17 altogether."""
    curve = grouped_curve(sizes=(1,))
    assert curve.choose(max_accuracy_drop=0.06).names == ("hidden[0]",)
    assert curve.choose(max_accuracy_drop=0.06, protect={"label": [3, 7]}).names == ("hidden[0]",)
    with refused(
        EditError,
        "nothing was applied",
        "down by at most 6.00%, also of label=3, label=5",
        "1 components, outputs moved by +3.00, holdout accuracy down 5.88%, of label=5 12.50%",
        "also of the protected groups",
    ):
        curve.choose(max_accuracy_drop=0.06, protect={"label": [3, 5]})


def test_the_whole_holdout_is_guarded_beside_the_groups():
    with refused(EditError, "holdout accuracy down 5.88%, of label=7 0.00%"):
        grouped_curve(sizes=(1,)).choose(max_accuracy_drop=0.01, protect={"label": [7]})


def test_the_edit_remembers_what_every_group_lost():
    edit = grouped_curve(sizes=(1,), protect={"label": [5]}).choose(0.2, protect={"side": "right"})
    drops = edit.provenance["protected_accuracy_drops"]
    assert drops == {
        "label=5": pytest.approx(group_drop("label", 5, [0])),
        "side=right": pytest.approx(group_drop("side", "right", [0])),
    }


def test_the_gentlest_size_is_named_beside_the_strongest():
    """Both sizes harm a group; the smaller one harms less and moves the target less."""
    with refused(
        EditError,
        "targets: 2 components, outputs moved by +5.00",
        "least harm: 1 components, outputs moved by +3.00",
    ):
        grouped_curve().choose(0.01, protect={"label": [3, 5]})


@pytest.mark.parametrize(
    ("protect", "words"),
    [
        ("labels", ("metadata has no column 'labels'", "id, label, side", "rank_components(..., protect=")),
        (["side", "layer4.*"], ("no column 'layer4.*'",)),
        ({"label": [3, 4]}, ("no example has label 4", "one of: 0, 3, 5, 7", "got:      4")),
        ({"label": ["3"]}, ("no example has label '3'", "0, 3, 5, 7")),
        ({"side": "up"}, ("no example has side 'up'", "'left', 'right'")),
        ("label", ("no holdout example is of the protected group label=0", "some of the 3", "17 holdout")),
        ({"label": 0}, ("no holdout example", "label=0", "add examples")),
    ],
)
def test_unknown_groups_and_groups_nobody_can_judge_are_refused(protect, words):
    curve = grouped_curve()
    with refused(EditError, *words):
        curve.choose(protect=protect)
    with refused(EditError, *words):
        grouped_curve(protect=protect)


def test_examples_without_a_value_are_in_no_group():
    sides = [None if side == "left" else side for side in SIDES]
    weights = [np.nan if label == 0 else label for label in LABELS]
    table = grouped_curve(metadata={"side": sides, "label": weights}, protect=["side", "label"]).table
    assert [name for name in table if "=" in name] == [
        "side=right_accuracy",
        "label=3.0_accuracy",
        "label=5.0_accuracy",
        "label=7.0_accuracy",
    ]


def test_groups_need_metadata():
    task = make_experiment(CONTRIBUTIONS).task
    bare = Task(task.model, task.dataset, outputs=task.outputs, device="cpu")
    groups = [ComponentGroup("hidden", "neuron", "hidden", "weight", dimension=0, count=5)]
    experiment = ComponentAblation(bare, ComponentSet(groups))
    ranking = rank_components(make_attributions(CONTRIBUTIONS, experiment), [0], [1, 2])
    with refused(EditError, "no metadata", "Task(..., metadata="):
        ranking.sweep(experiment, [1], HOLDOUT, protect="label", progress=False)


def test_an_experiment_without_a_task_has_no_groups():
    experiment = SubsetMean(num_points=4, num_features=5)
    ranking = rank_components(leave_one_out(experiment, progress=False), [0], [1, 2])
    with refused(EditError, "no metadata"):
        ranking.sweep(experiment, [1], [3, 4], protect="label", progress=False)


# ------------------------------------------------------------------------------------------- the choice


def slow_choice(sizes, gain, done, drops, limit, max_size):
    """Every size in turn, as the definition says; None where none will do."""
    useful = [
        i
        for i, size in enumerate(sizes)
        if (gain[i] > 0 or done[i] > done[0])
        and (max_size is None or size <= max_size)
        and all(drop[i] <= limit for drop in drops.values())
    ]
    if not useful:
        return None
    most = max(done[i] for i in useful)
    if most > done[0]:
        return min(i for i in useful if done[i] == most)
    return max(useful, key=lambda i: (gain[i], -i))


tenths = st.integers(-4, 6).map(lambda n: n / 8)  # exact, so that equality means the same everywhere
shares = st.integers(0, 4).map(lambda n: n / 4)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_choice_is_the_obvious_one(data):
    count = data.draw(st.integers(2, 6))
    lists = {
        "gain": [0.0, *(data.draw(tenths) for _ in range(count - 1))],
        "done": [data.draw(shares) for _ in range(count)],
    }
    names = ["holdout", "a=1", "a=2"][: data.draw(st.integers(1, 3))]
    drops = {name: [0.0, *(data.draw(tenths) for _ in range(count - 1))] for name in names}
    limit, max_size = data.draw(shares), data.draw(st.none() | st.integers(2, 2 * count))
    numbers = [2 * i for i in range(count)]
    expected = slow_choice(numbers, lists["gain"], lists["done"], drops, limit, max_size)
    found = Sizes(
        np.array(numbers),
        np.array(lists["gain"]),
        np.array(lists["done"]),
        {name: np.array(drop) for name, drop in drops.items()},
    )
    if expected is None:
        with refused(EditError, "nothing was applied", f"at most {limit:.2%}"):
            found.best(limit, max_size)
    else:
        assert found.best(limit, max_size) == expected


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_a_drop_that_is_no_fraction_is_refused(limit):
    with refused(EditError, "max_accuracy_drop is a fraction", "0 to 1", str(limit)):
        grouped_curve().choose(max_accuracy_drop=limit)


@pytest.mark.slow
def test_a_digit_is_forgotten_and_the_others_are_protected(digits_task):
    """On a trained network: what the guard promises is true of the edited model, read by itself."""
    experiment = ComponentAblation(digits_task, find_components(digits_task.model))
    attributions = gradient_x_parameter(experiment, progress=False)
    labels = np.asarray(digits_task.metadata["label"])
    untouched = attributions.predict(np.ones((1, len(experiment.components)), dtype=bool))[0]
    right = np.flatnonzero(untouched > 0)
    digit = labels[right[0]]
    targets = right[labels[right] == digit][:5]
    others = right[labels[right] != digit]
    holdout = np.setdiff1d(np.flatnonzero(labels != digit), others[:30])
    protected = sorted({int(label) for label in labels[holdout]})
    ranking = rank_components(attributions, targets, others[:30], "lower")
    curve = ranking.sweep(experiment, [1, 2, 3, 4, 6], holdout, progress=False)
    edit = curve.choose(max_accuracy_drop=0.34, protect={"label": protected})
    before = model_fingerprint(digits_task.model)
    groups = [holdout[labels[holdout] == label] for label in protected]
    shares = [margins(digits_task, group) > 0 for group in [*groups, targets]]
    with edit.applied(digits_task.model):
        after = [margins(digits_task, group) for group in [*groups, targets]]
    drops = [was.mean() - (now > 0).mean() for was, now in zip(shares, after, strict=True)]
    assert drops[:-1] == pytest.approx(list(edit.provenance["protected_accuracy_drops"].values()))
    assert max(drops[:-1]) <= 0.34
    assert after[-1].mean() == pytest.approx(edit.provenance["target_output_after"], abs=1e-4)
    assert after[-1].mean() < edit.provenance["target_output_before"]
    assert model_fingerprint(digits_task.model) == before


def margins(task, examples):
    with torch.no_grad():
        return margin(task.model, task.batch(examples)).numpy()
