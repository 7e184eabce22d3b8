"""make_edit, its alternatives and fine-tuning, where the right answer is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.editing import EditParts, compare_edits, fine_tune, make_edit
from coar.editing.choice import Sizes
from coar.editing.fine_tuning import last_layer
from coar.errors import AxisError, CoarWarning, EditError, GuardError
from coar.experiments.ablation import ComponentAblation
from coar.task import Task
from tests.contributions import make_attributions, make_experiment
from tests.refused import refused

# Components 0 and 1 hold examples 0 to 5 back, and it takes both; component 2 holds everything up.
HELD_BACK = [[-2.0, -1.9, 1.5, -0.55, 0.0]] * 6
OTHERS = [[0.1, 0.2, 1.5, -0.5, 0.0], [0.0, 0.1, 1.5, -0.6, 0.1]] * 7
CONTRIBUTIONS = np.array(HELD_BACK + OTHERS)
PARTS = EditParts(
    targets=[0, 1],
    references=range(6, 10),
    holdout=range(10, 15),
    report=range(15, 20),
    target_holdout=[2, 3],
    target_report=[4, 5],
)


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(CONTRIBUTIONS)


@pytest.mark.parametrize("score", ["welch", "difference", "contrast", "cautious", "best"])
@pytest.mark.parametrize("method", ["gate_gradients", "derivative"])
def test_the_components_that_hold_targets_back_are_found(experiment, method, score):
    found = make_edit(experiment, PARTS, method=method, score=score, sizes=[1, 2, 3], passes=8)
    assert set(found.edit.names) == {experiment.components.names[i] for i in (0, 1)}
    change = -CONTRIBUTIONS[0, :2].sum()
    for effect in (found.targets, found.target_report):
        np.testing.assert_allclose(effect.after - effect.before, change, rtol=1e-5)
    np.testing.assert_allclose(found.targets.predicted, found.targets.after, rtol=1e-4)
    assert found.target_report.predicted is None  # those were not attributed
    np.testing.assert_allclose(found.report.before, CONTRIBUTIONS[15:].sum(axis=1), rtol=1e-5)
    assert found.judged is found.target_report
    assert 0 < found.seconds < 60


def test_effects_are_those_of_the_edited_model(experiment):
    found = make_edit(experiment, PARTS, sizes=[1, 2], passes=8)
    model = found.edit.apply(experiment.task.model)
    with torch.no_grad():
        outputs = model(torch.eye(len(CONTRIBUTIONS))).numpy()
    np.testing.assert_allclose(found.report.after, outputs[15:20], rtol=1e-6)
    np.testing.assert_allclose(found.target_report.after, outputs[4:6], rtol=1e-6)


def test_sizes_are_compared_by_the_further_targets():
    """One component is enough for the targets, but examples like them need two."""
    contributions = CONTRIBUTIONS.copy()
    contributions[:2, 1] = -0.3
    experiment = make_experiment(contributions)
    alone = EditParts(PARTS.targets, PARTS.references, PARTS.holdout, PARTS.report)
    sizes = {"sizes": [1, 2], "method": make_attributions(contributions, experiment)}
    assert len(make_edit(experiment, alone, **sizes).edit.names) == 1
    assert len(make_edit(experiment, PARTS, **sizes).edit.names) == 2


def test_attributions_of_targets_and_references_are_enough(experiment):
    some = coar.gate_gradients(experiment, 0.05, passes=8, examples=[0, 1, 6, 7, 8, 9], progress=False)
    given = make_edit(experiment, PARTS, method=some, sizes=[1, 2])
    assert set(given.edit.names) == {experiment.components.names[i] for i in (0, 1)}
    with refused(EditError, "not columns of the attributions"):
        make_edit(experiment, PARTS, method=some.subset([0, 2, 3]), sizes=[1, 2])


def test_attributions_of_another_model_are_refused(experiment):
    other = make_attributions(CONTRIBUTIONS + 1)
    with refused(AxisError, "model differs"):
        make_edit(experiment, PARTS, method=other, sizes=[1, 2])


def test_of_two_scores_the_one_that_does_more_is_taken(experiment):
    """Welch's t is drawn to component 4, whose small weight never varies; the difference is not."""
    weights = CONTRIBUTIONS.copy()
    weights[:, 4] = np.where(np.arange(20) < 6, -0.01, 0.0)
    given = make_attributions(weights, experiment)
    names = {
        score: make_edit(experiment, PARTS, method=given, score=score, sizes=[2]).edit.names
        for score in ("welch", "difference", "best")
    }
    assert "hidden[4]" in names["welch"]
    assert names["best"] == names["difference"] == ("hidden[0]", "hidden[1]")


@pytest.mark.parametrize("direction", ["raise", "lower"])
def test_two_scores_leave_alone_what_references_need(direction):
    """Component 1 tells targets from references most, because references need it."""
    sign = 1 if direction == "raise" else -1
    weights = sign * np.array([[-1.0, 0.0, 0.2], [-1.0, 0.0, 0.2], [0.1, 5.0, 0.1], [-0.1, 5.0, 0.1]])
    given = make_attributions(weights)
    rankings = {
        score: coar.rank_components(given, [0, 1], [2, 3], direction, score)
        for score in ("difference", "contrast", "cautious")
    }
    orders = {score: ranking.order.tolist() for score, ranking in rankings.items()}
    assert orders == {"difference": [1, 0, 2], "contrast": [0, 1, 2], "cautious": [0, 2, 1]}
    np.testing.assert_allclose(rankings["cautious"].scores, sign * np.array([-1, 5, 0.3]))
    needed = np.sqrt((weights[2:] ** 2).mean(axis=0))
    expected = weights[:2].mean(axis=0) / np.hypot(needed, np.quantile(needed, 0.05))
    np.testing.assert_allclose(rankings["contrast"].scores, expected)


def test_contrast_where_references_need_nothing():
    given = make_attributions(np.array([[0.0, -1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    ranking = coar.rank_components(given, [0], [1, 2], "raise", "contrast")
    assert ranking.scores.tolist() == [0, -np.inf, np.inf]
    assert ranking.order.tolist() == [1, 0, 2]


def test_the_guard_may_be_in_output_units(experiment):
    unsigned = UnsignedOutputs(experiment)
    with refused(EditError, "does not say whether a prediction is right", "max_output_drop"):
        make_edit(unsigned, PARTS, sizes=[1, 2], passes=8)
    free = make_edit(unsigned, PARTS, sizes=[1, 2], passes=8, max_output_drop=1.0)
    effects = free.curve.effects()
    lost = CONTRIBUTIONS[10:15, :2].mean(axis=0)  # of the holdout, by component
    np.testing.assert_allclose(effects.output_drops["holdout"], [0, lost[0], lost.sum()], atol=1e-6)
    assert len(free.edit.names) == 2  # no accuracy to gain: the largest change
    assert free.edit.provenance["holdout_accuracy_drop"] is None
    np.testing.assert_allclose(free.edit.provenance["holdout_output_drop"], lost.sum(), atol=1e-6)
    tight = make_edit(unsigned, PARTS, sizes=[1, 2], passes=8, max_output_drop=float(lost[0]) + 1e-6)
    assert tight.edit.names == ("hidden[0]",)
    with refused(EditError, "nothing was applied", "holdout output down by at most", "least harm: 1 comp"):
        make_edit(unsigned, PARTS, sizes=[1, 2], passes=8, max_output_drop=0.0)
    assert "(+0.000)" not in free.summary()
    assert "others" in free.summary()


def test_protected_groups_are_guarded_in_output_units_as_well():
    sizes = Sizes(
        np.array([0, 1, 2]),
        np.array([0.0, 1.0, 2.0]),
        np.zeros(3),
        {"holdout": np.full(3, np.nan), "g": np.full(3, np.nan)},
        {"holdout": np.array([0.0, 0.1, 0.2]), "g": np.array([0.0, 0.1, 0.5])},
    )
    assert sizes.best(0.0, None, 0.5) == 2
    assert sizes.best(0.0, None, 0.4) == 1  # the group loses more than the whole


class UnsignedOutputs(ComponentAblation):
    """The same experiment, but the sign of its output says nothing."""

    accuracy_outputs = frozenset()

    def __init__(self, experiment):
        super().__init__(experiment.task, experiment.component_set)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, ("unknown method", "gate_gradients", "magic")),
        ({"score": "t"}, ("unknown score", "welch", "'t'")),
        ({"sizes": [6]}, ("sizes out of range", "1 .. 5")),
        ({"max_accuracy_drop": 5}, ("is a fraction", "5")),
        ({"max_size": 0}, ("no size is within max_size", "at least 1")),
        ({"sizes": 4}, ("sizes out of range", "a list", "1 .. 5")),
        ({"direction": "forget"}, ("unknown direction", "raise or lower", "'forget'")),
        ({"max_output_drop": -1}, ("max_output_drop", "0 or more")),
        ({"sizes": [5]}, ("nothing was applied", "best for the targets: 5 components", "down 100.00%")),
        ({"protect_components": ["nothing*"]}, ("matches no component",)),
    ],
)
def test_what_cannot_be_made_is_refused(experiment, options, words):
    lowered = EditParts([6, 7], range(6), range(8, 14), range(14, 20))
    parts = lowered if "direction" in options else PARTS
    with refused(EditError, *words):
        make_edit(experiment, parts, **{"sizes": [1], "passes": 8, "max_accuracy_drop": 0.0} | options)


def test_targets_that_are_right_already_are_told(experiment):
    parts = EditParts([6, 7], [8, 9, 10], [11, 12, 13], [14, 15])
    with pytest.warns(CoarWarning, match="all targets are right without any edit"):
        make_edit(experiment, parts, sizes=[1, 2], passes=8, max_accuracy_drop=1.0)


def test_a_size_that_puts_most_right_is_taken_although_an_outlier_falls():
    sizes = Sizes(
        np.array([0, 1]),
        np.array([0.0, -0.2]),  # of the mean: one of many falls far
        np.array([0.1, 0.9]),
        {"holdout": np.zeros(2)},
    )
    assert sizes.best(0.0) == 1


def test_of_output_guards_the_gentlest_size_is_told():
    sizes = Sizes(
        np.array([0, 1, 2, 4]),
        np.array([0.0, 1.0, 2.0, 9.0]),
        np.zeros(4),
        {"holdout": np.full(4, np.nan)},
        {"holdout": np.array([0.0, 0.9, 0.3, 5.0])},
    )
    with refused(GuardError, "best for the targets: 2 comp", "output down 0.3", "at most 0.1") as _:
        sizes.best(0.0, max_size=2, max_output_drop=0.1)  # and not the 4, which may not be taken
    both = Sizes(sizes.sizes, sizes.gain, sizes.done, {"holdout": np.zeros(4)}, sizes.output_drops)
    with refused(GuardError, "accuracy down 0.00%, holdout output down 0.3"):
        both.best(0.0, max_output_drop=0.1)


def test_attributions_of_another_output_are_refused(experiment):
    twice = UnsignedOutputs(experiment)
    twice.task.outputs["twice"] = twice.task.outputs["margin"]
    try:
        given = coar.gate_gradients(twice, 0.05, passes=8, output="margin", progress=False)
        with refused(EditError, "of another output", "twice", "margin"):
            make_edit(twice, PARTS, method=given, output="twice", sizes=[1], max_output_drop=1.0)
    finally:
        del twice.task.outputs["twice"]


def test_gradients_that_are_switched_off_are_switched_on(experiment):
    with torch.no_grad():
        found = make_edit(experiment, PARTS, sizes=[2], passes=8)
        assert not torch.is_grad_enabled()
    assert set(found.edit.names) == {"hidden[0]", "hidden[1]"}


def test_other_arguments_are_refused_by_name(experiment):
    with refused(EditError, "first argument is an experiment", "Task"):
        make_edit(experiment.task, PARTS)
    with refused(EditError, "which example plays which part", "dict"):
        make_edit(experiment, {"targets": [0]})
    with refused(EditError, "targets are positions or names", "np.flatnonzero"):
        EditParts(np.array([True, False]), [1], [2], [3]).located(experiment.columns["margin"])


def test_a_comparison_is_read_as_text(experiment):
    text = compare_edits(experiment, PARTS, sizes=[1, 2], passes=8).summary()
    lines = text.splitlines()
    assert lines[0].split() == ["method", "components", "seconds", "targets", "others"]
    assert "0.0% -> 100.0%" in next(line for line in lines if line.startswith("gate_gradients"))
    assert next(line for line in lines if line.startswith("weight_norm")).endswith("nothing within the guard")
    assert max(map(len, lines[:6])) < 100


# ------------------------------------------------------------------------------------------- alternatives


def test_the_largest_weights_come_first_for_weight_norm(experiment):
    curve = make_edit(experiment, PARTS, method="weight_norm", sizes=[1, 5], max_accuracy_drop=1.0).curve
    norms = np.linalg.norm(CONTRIBUTIONS, axis=0)  # column i of the weights belongs to component i
    assert curve.ranking.order.tolist() == np.argsort(-norms, kind="stable").tolist()
    assert np.isnan(curve.table.target_predicted).all()  # an order predicts nothing


def test_a_random_order_is_its_seeds_and_spares_what_is_protected(experiment):
    options = {"method": "random", "sizes": [1, 2, 3], "max_accuracy_drop": 1.0}
    protected = [experiment.components.names[i] for i in (0, 4)]
    orders = [
        make_edit(experiment, PARTS, seed=seed, protect_components=protected, **options).curve.ranking.order
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert all(sorted(order) == [1, 2, 3] for order in orders)
    assert orders[0].tolist() == orders[1].tolist()
    assert len({tuple(order) for order in orders}) > 1


def test_all_methods_side_by_side(experiment):
    found = compare_edits(experiment, PARTS, sizes=[1, 2], passes=8, seed=1)
    table = found.table.set_index("method")
    assert list(table.index) == ["gate_gradients", "derivative", "weight_norm", "random", "fine_tuning"]
    assert (table.targets_before == 0).all()
    assert (table.others_before == 1).all()
    assert table.targets_after["gate_gradients"] == table.targets_after["derivative"] == 1
    assert table.components["gate_gradients"] == 2
    missed = found.results["weight_norm"]  # component 2 holds the others up
    assert missed is None
    assert table.targets_after["weight_norm"] == 0
    assert "nothing within the guard: best" in table.note["weight_norm"]
    for name, result in found.results.items():
        if result is not None:
            assert table.targets_after[name] == result.judged.accuracy_after


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["magic"]}, ("unknown method", "fine_tuning")),
        ({"score": "t"}, ("unknown score",)),  # and not a line that says that nothing could be done
        ({"sizes": [9]}, ("sizes out of range",)),
    ],
)
def test_what_is_wrong_for_all_methods_is_refused(experiment, options, words):
    with refused(EditError, *words):
        compare_edits(experiment, PARTS, **{"passes": 8, "sizes": [1]} | options)


# -------------------------------------------------------------------------------------------- fine-tuning


def make_digits():
    """Two blobs and a few points of the second that the classifier takes for the first."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 4, generator=generator) + torch.tensor([2.0, 0, 0, 0])
    points[30:] -= torch.tensor([4.0, 0, 0, 0])
    points[50:] += torch.tensor([4.0, 3.0, 0, 0])  # these are misread
    labels = torch.tensor([0] * 30 + [1] * 30)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        model[0].weight[:4] = torch.eye(4)
        model[0].weight[4:] = -torch.eye(4)
        model[2].weight[0, 0], model[2].weight[1, 4] = 1.0, 1.0
    task = Task(model, torch.utils.data.TensorDataset(points, labels), device="cpu")
    return ComponentAblation(task, coar.find_components(model, kinds=["neuron"], include=["0"]))


TUNED = EditParts([50, 51, 52], range(8), [*range(8, 18), *range(30, 40)], [*range(18, 30), *range(40, 50)],
                  [53, 54, 55], [56, 57, 58, 59])  # fmt: skip


def test_fine_tuning_trains_a_copy_of_the_last_layer_alone():
    experiment = make_digits()
    before = copy.deepcopy(experiment.task.model.state_dict())
    found = fine_tune(experiment, TUNED, learning_rate=0.02, max_accuracy_drop=0.15)
    after = experiment.task.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in experiment.task.model.parameters())
    tuned = found.model.state_dict()
    assert {key for key in before if not torch.equal(before[key], tuned[key])} <= {"2.weight", "2.bias"}
    assert not torch.equal(before["2.weight"], tuned["2.weight"])
    assert found.layer == "2"
    assert found.judged.accuracy_after > found.judged.accuracy_before
    assert found.report.accuracy_before - found.report.accuracy_after <= 0.2
    with torch.no_grad():
        outputs = coar.outputs.margin(found.model, experiment.task.batch(range(56, 60)))
    np.testing.assert_allclose(found.target_report.after, outputs.numpy(), atol=1e-6)


def test_fine_tuning_is_guarded_for_groups_as_well():
    experiment = make_digits()
    task = experiment.task
    group = {"group": ["a" if i in range(30, 50) else "b" for i in range(60)]}
    grouped = Task(task.model, task.dataset, metadata=group, device="cpu")
    experiment = ComponentAblation(grouped, experiment.component_set)
    options = {"learning_rate": 0.02, "max_accuracy_drop": 0.07}
    free = fine_tune(experiment, TUNED, **options)
    assert fine_tune(experiment, TUNED, protect={"group": ["a"]}, **options).steps == free.steps
    guarded = fine_tune(experiment, TUNED, protect="group", **options)
    assert guarded.steps < free.steps  # group b loses twice as much as the whole


def test_fine_tuning_within_no_guard_is_refused():
    with refused(GuardError, "nothing was applied"):
        fine_tune(make_digits(), TUNED, direction="lower", max_accuracy_drop=0.0, learning_rate=1e-12)


def test_the_last_layer_is_the_one_that_runs_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(3, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.body(x))

    model = Backwards().eval()
    assert last_layer(model, Task(model, [(torch.zeros(3), 0)] * 3, device="cpu"), "margin") == "head"
    with refused(EditError, "no linear layer"):
        task = Task(nn.Identity().eval(), [(torch.zeros(3), 0)] * 3, device="cpu")
        last_layer(task.model, task, "margin")


class TwoHeads(nn.Module):
    """Two linear heads on one body; which one runs depends on the output that is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, head):
        return getattr(self, head)(torch.relu(self.body(x)))


def one(model, batch):
    model(batch[0], "two")  # runs as well, and before
    return model(batch[0], "one")  # two values per example


def test_fine_tuning_is_of_the_output_and_the_columns_asked_for():
    examples = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(12, dtype=torch.int64)
    model = TwoHeads().eval()
    dataset = torch.utils.data.TensorDataset(examples, labels)
    task = Task(model, dataset, outputs={"two": lambda m, b: m(b[0], "two")[:, 0], "one": one}, device="cpu")
    experiment = ComponentAblation(task, coar.find_components(model, kinds=["neuron"], include=["body"]))
    parts = EditParts([0], [2, 4], range(8, 16), range(16, 24))  # the first value of each example
    found = fine_tune(experiment, parts, output="one", max_output_drop=1e9)
    assert found.layer == "one"
    before, after = model.one, found.model.one
    assert not torch.equal(before.weight[0], after.weight[0])
    assert torch.equal(before.weight[1], after.weight[1])  # no column of the second value was given
    assert torch.equal(model.two.weight, found.model.two.weight)


def test_fine_tuning_leaves_tied_embeddings_alone():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    examples = [{"input_ids": torch.randint(11, (6,))} for _ in range(8)]
    outputs = {"token_log_probability": coar.outputs.token_log_probability}

    def collate(items):
        return {"input_ids": torch.stack([item["input_ids"] for item in items])}

    task = Task(model, examples, outputs, collate=collate, device="cpu")
    experiment = ComponentAblation(task, coar.find_components(model, kinds=["mlp_neuron"]))
    found = fine_tune(experiment, EditParts([0, 7], [1], [3, 4], [5, 6]), "raise", max_output_drop=1e9)
    assert found.layer == "lm_head"
    assert torch.equal(found.model.transformer.wte.weight, model.transformer.wte.weight)
    assert not torch.equal(found.model.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_without_a_last_layer_is_a_line_of_the_comparison():
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Flatten()).eval()
    examples = torch.randn(30, 1, 1, generator=torch.Generator().manual_seed(0))
    task = Task(model, torch.utils.data.TensorDataset(examples, torch.arange(30) % 3), device="cpu")
    experiment = ComponentAblation(task, coar.find_components(model, include=["0"]))
    parts = EditParts([0, 1], [2, 3, 4], range(5, 15), range(15, 30))
    found = compare_edits(
        experiment, parts, methods=["derivative", "fine_tuning"], sizes=[1], max_accuracy_drop=1.0
    )
    assert found.results["fine_tuning"] is None
    assert "no linear layer" in found.notes["fine_tuning"]
