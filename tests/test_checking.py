"""Trust: checks find what is wrong and nothing else; calibration gives the scale of real ablations."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import coar
import coar.checking.audit as auditing
from coar.attributions import Attributions
from coar.checking import calibrate, check
from coar.checking.audit import audit, choose_components, midpoints
from coar.checking.figures import ceiling_of, correlation_of, r2_of, slope_of
from coar.checking.findings import problems_of_audit, problems_of_rows
from coar.designs import EVALUATION, FIT, Bernoulli
from coar.errors import AxisError, FitError, OutputError, SettingError
from coar.metrics import Estimate, per_column
from coar.testing import SubsetMean, linear_experiment
from tests import cases, naive
from tests.architectures import build
from tests.refused import refused

CPU = torch.device("cpu")


def quiet(experiment, attributions, **more):
    return check(experiment, attributions, progress=False, **more)


def attributions_of(experiment, weights=None, output=None, intercept=None, **more):
    output = output or next(iter(experiment.columns))
    axes = experiment.components, experiment.columns[output]
    weights = np.zeros((len(axes[1]), len(axes[0]))) if weights is None else weights
    intercept = np.zeros(len(weights)) if intercept is None else intercept
    return Attributions(weights, intercept, *axes, output, **more)


@pytest.fixture
def linear():
    experiment, weights = linear_experiment()
    return experiment, attributions_of(experiment, weights, provenance={"ablation_fraction": 0.2})


class Deep(nn.Module):
    """Two hidden layers; the activations of both are to be chosen."""

    def __init__(self, first=torch.tanh, second=torch.tanh, hidden=6):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(5, hidden), nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 1)
        self.first, self.second = first, second

    def forward(self, x):
        return self.head(self.second(self.two(self.first(2 * self.one(x)))))[:, 0]


class Parallel(nn.Module):
    """Two branches, one of which may be cut off from gradients."""

    def __init__(self, cut):
        super().__init__()
        torch.manual_seed(0)
        self.open, self.cut = nn.Linear(5, 6), nn.Linear(5, 6)
        self.head, self.is_cut = nn.Linear(6, 1), cut

    def forward(self, x):
        other = torch.tanh(self.cut(x))
        return self.head(torch.tanh(self.open(x)) + (other.detach() if self.is_cut else other))[:, 0]


class Routed(nn.Module):
    """The best of four experts, or a soft mixture of them."""

    def __init__(self, hard):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.router = nn.Linear(5, 12), nn.Linear(12, 4)
        self.experts, self.hard = nn.Linear(12, 4), hard

    def forward(self, x):
        hidden = torch.tanh(self.one(x))
        shares = torch.softmax(3 * self.router(hidden), dim=1)
        if self.hard:
            best, which = shares.topk(1, dim=1)
            shares = torch.zeros_like(shares).scatter(1, which, best)
        return (shares * 5 * self.experts(hidden)).sum(dim=1)


def jump_relu(x):
    return x * (x > 0.5)


def rounded(x):
    return torch.round(2 * torch.relu(x)) / 2


def score(model, batch):
    return model(batch[0])


def experiment_of(model, examples=12, output=score, kinds=("neuron",), data=None, **options):
    inputs = cases.random_numbers(examples, 5) if data is None else data
    task = coar.Task(model.eval(), [(x, 0) for x in inputs], outputs={"score": output}, device="cpu")
    return coar.ComponentAblation(task, coar.find_components(model, kinds=list(kinds), **options))


def audit_of(experiment, output=None, fraction=0.2, **more):
    attributions = attributions_of(experiment, output=output)
    return audit(experiment, attributions, fraction, device=CPU, progress=False, **more)


def every_mask(experiment, fraction):
    """All masks, their probabilities, and outputs [masks, columns] in float64."""
    masks = np.array(list(itertools.product([False, True], repeat=len(experiment.components))))
    (outputs,) = experiment.prepare(CPU, precision="float64")(masks).values()
    chance = (1 - fraction) ** masks.sum(axis=1) * fraction ** (~masks).sum(axis=1)
    return masks, chance, outputs


def exact_weights(experiment, fraction):
    masks, chance, outputs = every_mask(experiment, fraction)
    kept = (masks * chance[:, None]).T @ outputs / (1 - fraction)
    ablated = (~masks * chance[:, None]).T @ outputs / fraction
    return (kept - ablated).T


# ------------------------------------------------------------------------------------ the audit


def transformer():
    model, x = build("torch_encoder")
    wrapped = nn.Sequential(model, nn.Flatten(), nn.Linear(40, 1), nn.Flatten(0))
    cases.random_numbers(1)
    return experiment_of(wrapped, data=x, kinds=["mlp_neuron", "attention_head"])


SOUND = {
    "residual, relu": lambda: cases.make_case("residual").experiment(),
    "gelu": lambda: cases.make_case("grouped").experiment(),
    "margin of tanh": lambda: cases.make_case("mlp").experiment(),
    "slices of inputs": lambda: cases.make_case("slices").experiment(),
    "heads": transformer,
    "relu twice": lambda: experiment_of(Deep(torch.relu, torch.relu)),
    "one relu unit after the other": lambda: experiment_of(Deep(torch.relu, torch.relu, 1), examples=3),
    "two branches": lambda: experiment_of(Parallel(cut=False)),
    "soft routing": lambda: experiment_of(Routed(hard=False)),
    "means": lambda: cases.make_case("residual").experiment("ablate", "mean"),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_false_alarm(name, seed):
    found = audit_of(SOUND[name](), seed=seed)
    assert [one.name for one in found.disagreeing] == []
    assert found.ends_agree
    assert found.missed < 0.03
    assert problems_of_audit(found) == []
    assert any(one.exact.any() for one in found.components)  # there was something to agree about


BROKEN = {
    "jump relu": lambda: Deep(jump_relu),
    "jump relu later": lambda: Deep(torch.relu, jump_relu),
    "rounding": lambda: Deep(rounded),
    "rounding later": lambda: Deep(torch.tanh, rounded),
    "detach": lambda: Parallel(cut=True),
    "top-k routing": lambda: Routed(hard=True),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_jumps_and_cut_graphs_are_found_and_named(name, seed):
    experiment = experiment_of(BROKEN[name]())
    found = audit_of(experiment, seed=seed)
    assert found.disagreeing
    assert found.missed > 0.05
    problems = problems_of_audit(found)
    worst = found.disagreeing[0]
    assert f"{worst.name} (group {worst.group})" in problems[0]
    column = np.argmax(np.abs(worst.exact - worst.integral))
    assert f"{worst.exact[column]:.4g}" in problems[0]
    assert f"{worst.integral[column]:.4g}" in problems[0]
    assert "coar.Study" in problems[-1]


def test_groups_that_nobody_looked_at_are_counted():
    experiment = cases.make_case("grouped").experiment()  # 5 groups
    attributions = attributions_of(experiment, provenance={"ablation_fraction": 0.2})

    def remarks(count):
        found = quiet(experiment, attributions, num_rows=3, audited=True, num_audited=count)
        return [text for text in found.remarks if "groups were not audited" in text]

    assert remarks(3) == ["2 of 5 groups were not audited: num_audited=5 looks at each"]
    assert remarks(5) == remarks(20) == []


class Leaking(Parallel):
    """Two branches, of one of which 30 % of the gradient are left."""

    def __init__(self, offset):
        super().__init__(cut=True)
        self.offset = offset

    def forward(self, x):
        other = torch.tanh(self.cut(x))
        other = 0.3 * other + 0.7 * other.detach()
        return self.head(torch.tanh(self.open(x)) + other)[:, 0] + self.offset


def test_what_rounding_hides_is_said_and_not_taken_for_agreement():
    def remarks(offset):
        experiment = experiment_of(Leaking(offset))
        attributions = attributions_of(experiment, provenance={"ablation_fraction": 0.2})
        found = quiet(experiment, attributions, num_rows=3, audited=True, num_audited=12)
        hidden = [text for text in found.remarks if "rounding of the outputs hides" in text]
        return len(found.audit.disagreeing), sum(one.hidden for one in found.audit.components), hidden

    wrong, hidden, said = remarks(0.0)
    assert (wrong, hidden, said) == (6, 0, [])
    wrong, hidden, (said,) = remarks(1e6)
    assert wrong == 0
    assert hidden >= 10  # a few components' differences are rounded to 0
    assert f"{hidden} of 12 audited" in said


def test_only_the_branch_that_is_cut_is_named():
    found = audit_of(experiment_of(Parallel(cut=True)), num_audited=12)
    assert {one.group for one in found.disagreeing} == {"cut"}
    assert len(found.disagreeing) == 6
    assert all(one.still for one in found.disagreeing)
    assert "the graph is cut" in problems_of_audit(found)[0]


def test_of_a_linear_model_both_sides_are_its_weights():
    experiment, weights = linear_experiment()
    found = audit_of(experiment, num_examples=10, num_audited=12)
    for one in found.components:
        expected = weights[:, experiment.components.positions[one.name]]
        assert one.exact == pytest.approx(expected, abs=1e-5)
        assert one.integral == pytest.approx(expected, abs=1e-5)
        assert one.nodes == 3


def test_rounding_of_large_outputs_is_no_jump():
    def far(model, batch):
        return model(batch[0]) + 1e5  # float32 has steps of 0.008 there

    found = audit_of(experiment_of(Deep(), output=far))
    assert found.disagreeing == []
    assert max(one.missed for one in found.components) > auditing.TOLERANCE


class Corner(nn.Module):
    """The output rises from 0 only on the last bit of the way."""

    def __init__(self, rise):
        super().__init__()
        self.one, self.start = nn.Linear(5, 1, bias=False), 1 - rise
        nn.init.ones_(self.one.weight)

    def forward(self, x):
        return torch.relu(self.one(x) @ torch.ones(1, 1) - self.start)[:, 0]


@pytest.mark.parametrize("rise", [0.007, 0.0075])
def test_a_kink_close_to_an_end_is_no_jump(rise):
    experiment = experiment_of(Corner(rise), data=torch.eye(5), include=["one"])
    (one,) = audit_of(experiment).components
    assert one.exact == pytest.approx([rise] * 5, abs=1e-6)
    assert one.nodes == 81
    assert one.missed > auditing.TOLERANCE  # which is the quadrature's fault, and known
    assert one.agrees


def test_the_nodes_are_nested_midpoints():
    assert midpoints(3) == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    for few, many in itertools.pairwise(auditing.NODES):
        assert set(midpoints(few)) < set(midpoints(many))
        assert len(set(midpoints(many))) == many


def test_components_come_from_as_many_groups_as_possible():
    experiment = cases.make_case("grouped").experiment()
    groups = experiment.components.fields["group"]
    assert len(set(groups)) == 5
    for count in (3, 5, 9):
        chosen = choose_components(experiment, count, seed=0)
        assert len(set(chosen)) == count
        assert len(set(groups[chosen])) == min(count, 5)
    assert sorted(choose_components(experiment, 10**6, 0)) == list(range(len(groups)))
    assert choose_components(experiment, 6, 0) == choose_components(experiment, 6, 0)
    assert choose_components(experiment, 6, 0) != choose_components(experiment, 6, 1)


def test_the_exact_side_is_a_literal_rebuild():
    experiment = cases.make_case("residual").experiment()
    found = audit_of(experiment, fraction=0.3, num_examples=5, num_audited=4)
    background = Bernoulli(ablation_fraction=0.3, seed=0, stream="audit").masks([0], 10)[0]
    for one in found.components:
        masks = np.stack([background, background])
        masks[:, experiment.components.positions[one.name]] = True, False
        kept, ablated = naive.rows(experiment, masks)["margin"]
        assert one.exact == pytest.approx(kept - ablated, abs=1e-5)


def test_several_values_per_example_and_the_batch_size():
    experiment = cases.make_case("several_outputs").experiment()
    whole, small = (audit_of(experiment, "ragged", batch_size=size) for size in (None, 3))
    assert whole.columns == experiment.columns["ragged"].names  # all five examples
    assert whole.disagreeing == []
    for one, other in zip(whole.components, small.components, strict=True):
        assert one.integral == pytest.approx(other.integral, abs=1e-6)
        assert one.exact == pytest.approx(one.integral, rel=0.05, abs=1e-5)


def test_costs_are_counted(monkeypatch):
    counted = []

    class Counting(auditing.GatePasses):
        def derivatives(self, batch, gates):
            counted.append(len(gates.gates))
            return super().derivatives(batch, gates)

    monkeypatch.setattr(auditing, "GatePasses", Counting)
    found = audit_of(experiment_of(Parallel(cut=True)), num_audited=5, num_examples=4)
    assert found.passes == sum(counted)
    assert found.examples == 4
    assert found.rows == 6
    assert max(one.nodes for one in found.components) == 81


def test_examples_are_those_of_the_attributions():
    experiment = experiment_of(Deep())
    some = attributions_of(experiment).subset([7, 2, 9])
    found = audit(experiment, some, 0.2, device=CPU, progress=False)
    assert found.columns == tuple(experiment.columns["score"].names[i] for i in (2, 7, 9))


def test_an_output_without_gradient_is_refused():
    def hit(model, batch):
        return (model(batch[0]) > 0).float()

    with refused(OutputError, "no gradient", "coar.Study"):
        audit_of(experiment_of(Deep(), output=hit))


# -------------------------------------------------------------------------------- fresh ablations


def test_true_attributions_pass(linear):
    experiment, truth = linear
    found = quiet(experiment, truth, audited=True)
    assert found.ok
    assert found.rows == 60
    assert found.correlation.value == pytest.approx(1, abs=1e-5)
    assert found.slope.value == pytest.approx(1, abs=1e-5)
    assert found.r2 == pytest.approx(1, abs=1e-5)
    assert found.summary().endswith("no problem found")
    json.dumps(found.to_json())


def test_rows_are_really_ablated_models_that_nobody_else_uses():
    experiment = cases.make_case("residual").experiment()
    found = quiet(experiment, attributions_of(experiment), num_rows=4, ablation_fraction=0.3, seed=9)
    masks = {
        stream: Bernoulli(ablation_fraction=0.3, seed=9, stream=stream).masks(range(4), 10)
        for stream in ("check", "calibration", FIT, EVALUATION)
    }
    assert found.truth == pytest.approx(naive.rows(experiment, masks.pop("check"))["margin"], abs=1e-5)
    for others in masks.values():
        assert not np.allclose(found.truth, naive.rows(experiment, others)["margin"], atol=1e-3)


def test_figures_are_those_of_the_columns():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(30, 9))
    predicted = 0.5 * truth + rng.normal(size=(30, 9))
    each = per_column(truth, predicted)
    found = correlation_of(truth, predicted, seed=0)
    assert found.value == pytest.approx(each["pearson"].mean())
    assert found.low < found.value < found.high
    assert r2_of(truth, predicted) == pytest.approx(np.median(each["r2"]))
    y, p = truth - truth.mean(axis=0), predicted - predicted.mean(axis=0)
    slope = slope_of(truth, predicted, seed=0)
    assert slope.value == pytest.approx((y * p).sum() / (p * p).sum())
    assert slope.low < slope.value < slope.high


@pytest.mark.parametrize("offset", [0, 1e6, -1e9])
@pytest.mark.parametrize("size", [1, 1e-3])
def test_an_offset_does_not_change_the_slope(offset, size):
    """Predictions far from 0 move as well as others, down to the rounding of their numbers."""
    masks = np.random.default_rng(0).random((60, 8)) < 0.9
    truth = offset + size * (masks @ np.ones((8, 3)))
    found = slope_of(truth, truth, 0)
    assert found.to_json() == pytest.approx([1, 1, 1])
    assert slope_of(truth, 2 * truth, 0).value == pytest.approx(0.5)
    assert np.isnan(slope_of(truth, np.full_like(truth, offset + 0.1), 0).value)
    noise = np.random.default_rng(1).integers(-2, 3, truth.shape) * np.spacing(offset + 0.1)
    assert np.isnan(slope_of(truth, offset + 0.1 + noise, 0).value)  # rounding does not move


def test_a_slope_that_is_not_known_is_a_problem():
    sure = Estimate(0.9, 0.8, 0.95)
    assert problems_of_rows(sure, Estimate(1.0, 0.9, 1.1)) == []
    for slope in (Estimate(*[float("nan")] * 3), Estimate(float("inf"), 0.9, float("inf"))):
        (problem,) = problems_of_rows(sure, slope)
        assert "the slope is not known" in problem


def test_the_slope_has_the_interval_that_it_needs():
    """Over repetitions the truth is inside as often as promised."""
    inside = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        predicted = rng.normal(size=(60, 5))
        truth = 0.8 * predicted + rng.normal(size=(60, 1)) * rng.normal(size=(60, 5))
        slope = slope_of(truth, predicted, seed)
        inside += slope.low <= 0.8 <= slope.high
    assert 68 <= inside <= 80


def test_a_constant_column_is_left_out_and_said(linear):
    experiment, truth = linear
    weights = truth.weights.copy()
    weights[3] = 0
    found = quiet(experiment, attributions_of(experiment, weights), ablation_fraction=0.2)
    assert "1 columns are constant" in found.summary()
    assert found.correlation.value == pytest.approx(1, abs=1e-5)


def test_what_has_nothing_to_do_with_the_outputs_is_a_problem(linear):
    experiment, truth = linear
    weights = np.random.default_rng(5).normal(size=truth.weights.shape)
    found = quiet(experiment, attributions_of(experiment, weights), ablation_fraction=0.2)
    assert not found.ok
    assert "not known to have to do with" in found.summary()
    zero = quiet(experiment, attributions_of(experiment), ablation_fraction=0.2)
    assert "no column in which" in zero.problems[0]


@pytest.mark.parametrize(("factor", "word"), [(2.0, "too large"), (0.5, "too small")])
def test_a_wrong_scale_is_a_problem(linear, factor, word):
    experiment, truth = linear
    found = quiet(experiment, attributions_of(experiment, factor * truth.weights), ablation_fraction=0.2)
    assert found.slope.value == pytest.approx(1 / factor, abs=1e-5)
    assert word in found.problems[0]


def test_gradients_are_audited_and_others_where_asked():
    experiment = experiment_of(Deep(jump_relu), examples=20)
    weights = exact_weights(experiment, 0.2)
    said = {"ablation_fraction": 0.2}
    regression = attributions_of(experiment, weights, provenance={"method": "ridge"} | said)
    gradients = attributions_of(experiment, weights, provenance={"method": "gate gradients"} | said)
    assert quiet(experiment, regression).audit is None
    assert quiet(experiment, regression).ok
    assert quiet(experiment, gradients, audited=False).ok
    for found in (quiet(experiment, gradients), quiet(experiment, regression, audited=True)):
        assert not found.ok
        assert "fit a regression" in found.summary()
        assert f"{found.audit.passes:,} forward and backward" in found.summary()


def test_data_points_have_no_gates():
    experiment = SubsetMean()
    masks = Bernoulli(ablation_fraction=0.3, seed=5).masks(range(300), 15)
    outputs = experiment.prepare(CPU)(masks)["mean"]
    design = np.column_stack([masks, np.ones(300)])
    fitted = np.linalg.lstsq(design, outputs, rcond=None)[0]
    attributions = attributions_of(experiment, fitted[:-1].T, intercept=fitted[-1])
    assert quiet(experiment, attributions, ablation_fraction=0.3).ok
    with refused(SettingError, "only component ablations have gates", "audited=False"):
        quiet(experiment, attributions, ablation_fraction=0.3, audited=True)


# -------------------------------------------------------------------------------- the linear ceiling


def noisy_weights(noise, scale=1.0, spread=0.0, columns=150, components=300, fraction=0.1):
    """A linear model plus residuals; weights shrunk from four noisy replicates, and the true ceiling."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(sigma=spread, size=(columns, 1)) if spread else 1.0
    weights = rng.normal(size=(columns, components)) * sizes
    variance = fraction * (1 - fraction) * (weights**2).sum(axis=1)
    masks = rng.random((200, components)) >= fraction
    truth = masks @ weights.T + np.sqrt(0.5 * variance) * rng.normal(size=(200, columns))
    replicates = scale * (weights + noise * rng.normal(size=(4, columns, components)))
    believed = (weights**2).mean() / ((weights**2).mean() + noise**2 / 4)
    own = believed * replicates.mean(axis=0)
    total = (replicates.sum(axis=0) ** 2).sum(axis=1) - (replicates**2).sum(axis=(0, 2))
    figures = {"signal": total / 12, "agreement": believed * total / 12}
    correlation = correlation_of(truth, masks @ own.T, seed=0)
    return correlation, truth, (own**2).sum(axis=1), figures, np.sqrt(1 / 1.5)


@pytest.mark.parametrize("scale", [1.0, 1.2])
@pytest.mark.parametrize("noise", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_ceiling_does_not_depend_on_noise_and_scale_of_the_weights(noise, scale, spread):
    correlation, truth, weights, figures, true = noisy_weights(noise, scale, spread)
    found = ceiling_of(correlation, truth, weights, **figures)
    assert found.value == pytest.approx(true, rel=0.03)
    assert found.low < true < found.high
    if noise > 1:
        assert correlation.value < true - 0.2
    if not spread or noise < 1:
        assert ceiling_of(correlation, truth, weights, figures["signal"]).value == pytest.approx(
            true, rel=0.03
        )


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_the_ceiling_of_a_network_whose_masks_are_all_run(fraction):
    experiment = experiment_of(Deep(), examples=20)
    weights = exact_weights(experiment, fraction)
    _, chance, outputs = every_mask(experiment, fraction)
    variance = chance @ (outputs - chance @ outputs) ** 2
    true = np.sqrt(fraction * (1 - fraction) * (weights**2).sum(axis=1) / variance).mean()
    exact = attributions_of(
        experiment,
        weights,
        details={"signal": (weights**2).sum(axis=1)},
        provenance={"ablation_fraction": fraction},
    )
    assert quiet(experiment, exact).ceiling.value == pytest.approx(true, abs=0.02)
    assert "linear ceiling" in quiet(experiment, exact).summary()
    elsewhere = quiet(experiment, exact, ablation_fraction=fraction / 2)  # a signal of other ablations
    assert elsewhere.ceiling is None


def test_gate_gradients_pass_and_know_their_ceiling():
    experiment = experiment_of(Deep(), examples=20)
    found = coar.gradients.gate_gradients(experiment, 0.1, passes=200, progress=False)
    checked = quiet(experiment, found)
    assert checked.ok, checked.summary()
    assert len(checked.audit.components) == 12
    assert checked.correlation.value > 0.95 * checked.ceiling.value
    words = ("correlation", "linear ceiling", "slope", "R2", "12 agree", "after tanh", "60 + 13 ablations")
    assert all(word in checked.summary() for word in words)


def test_wrong_derivatives_tell_no_ceiling():
    """Replicates agree about them as well as about right ones."""
    for first, known in ((torch.tanh, True), (jump_relu, False)):
        experiment = experiment_of(Deep(first), examples=20)
        found = coar.gradients.gate_gradients(experiment, 0.1, passes=200, progress=False)
        checked = quiet(experiment, found)
        assert bool(checked.audit.disagreeing) is not known
        assert (checked.ceiling is not None) is known
        assert ("linear ceiling" in checked.summary()) is known
        assert (checked.to_json()["ceiling"] is not None) is known
        assert ("the ceiling is not known where derivatives are wrong" in checked.summary()) is not known
        unaudited = quiet(experiment, found, audited=False)  # nobody knows: so it is believed
        assert unaudited.ceiling is not None


def test_more_noise_than_signal_gives_no_ceiling():
    correlation, truth, weights, figures, _ = noisy_weights(1.0)
    signal = figures["signal"]
    assert ceiling_of(correlation, truth, weights, -signal) is None
    assert ceiling_of(correlation, truth, weights, signal, -signal) is None
    assert ceiling_of(Estimate(-0.1, -0.2, 0.1), truth, weights, signal) is None
    assert ceiling_of(correlation, truth * 0, weights, signal) is None
    assert ceiling_of(correlation, truth, 0 * weights, signal) is None
    assert ceiling_of(correlation, truth, weights, 0.5 * weights).value == correlation.value


def test_below_the_ceiling_more_passes_are_advised(linear):
    experiment, truth = linear
    for factor, advised in ((1.0, False), (2.0, True)):
        noise = np.random.default_rng(0).normal(size=truth.weights.shape) * truth.weights.std()
        weights = truth.weights + noise
        signal = factor * (weights**2).sum(axis=1)
        noisy = attributions_of(
            experiment, weights, details={"signal": signal}, provenance={"ablation_fraction": 0.2}
        )
        assert ("more passes" in " ".join(quiet(experiment, noisy).remarks)) is advised


# ------------------------------------------------------------------------------------- calibration


def test_a_linear_model_is_calibrated_already(linear):
    experiment, truth = linear
    found = calibrate(experiment, truth, progress=False)
    said = found.provenance["calibration"]
    assert said["slope"] == pytest.approx(1, abs=1e-6)
    assert said["interval"] == pytest.approx([1, 1], abs=1e-6)
    assert said["rows"] == 60
    np.testing.assert_allclose(found.weights, truth.weights, rtol=1e-5)
    np.testing.assert_allclose(found.intercept, truth.intercept, atol=1e-5)


def test_too_large_weights_come_back_to_scale():
    fraction, size, seed = 0.3, 1.2, 0
    experiment = experiment_of(Deep(), examples=20)
    weights = exact_weights(experiment, fraction)
    large = attributions_of(
        experiment,
        size * weights,
        intercept=np.full(20, 7.0),
        errors=np.ones_like(weights),
        details={"signal": size**2 * (weights**2).sum(axis=1)},
        provenance={"ablation_fraction": fraction, "method": "by hand"},
    )
    found = calibrate(experiment, large, seed=seed, progress=False)
    said = found.provenance["calibration"]
    low, high = said["interval"]
    assert high - low < 0.3
    assert found.weights == pytest.approx(said["slope"] * large.weights, rel=1e-6)
    assert found.errors == pytest.approx(np.full_like(weights, said["slope"]), rel=1e-6)
    assert found.detail("signal") == pytest.approx((weights**2).sum(axis=1) * (size * said["slope"]) ** 2)
    assert found.provenance["method"] == "by hand"
    assert "calibration" not in large.provenance
    assert (large.intercept == 7).all()
    masks = Bernoulli(ablation_fraction=fraction, seed=seed, stream="calibration").masks(range(60), 12)
    outputs = naive.rows(experiment, masks[:6])["score"]
    assert outputs == pytest.approx(experiment.prepare(CPU)(masks[:6])["score"], abs=1e-5)
    means = experiment.prepare(CPU)(masks)["score"].mean(axis=0)
    assert found.predict(masks).mean(axis=0) == pytest.approx(means, abs=1e-5)
    assert quiet(experiment, found).slope.value == pytest.approx(1, abs=0.15)


def test_calibration_is_paid_for_and_everything_is_in_its_scale():
    experiment = experiment_of(Deep(), examples=20)
    made = coar.gradients.gate_gradients(experiment, 0.1, passes=40, progress=False)
    found = calibrate(experiment, made, num_rows=30, progress=False)
    slope = found.provenance["calibration"]["slope"]
    assert abs(slope - 1) > 1e-3  # or nothing is told
    assert made.provenance["forwards"] == 3 * 40
    assert found.provenance["forwards"] == 3 * 40 + 30
    assert found.provenance["error"] == pytest.approx(slope * made.provenance["error"])
    assert found.provenance["error"] == pytest.approx(np.median(np.median(found.errors, axis=1)), rel=1e-5)
    for name in ("signal", "noise", "agreement"):
        assert found.detail(name) == pytest.approx(slope**2 * made.detail(name), rel=1e-5)
    assert found.provenance["correlation"] == made.provenance["correlation"]
    by_hand = attributions_of(experiment, made.weights, provenance={"ablation_fraction": 0.1})
    assert calibrate(experiment, by_hand, progress=False).provenance.keys() == {
        "ablation_fraction",
        "calibration",
    }


def test_the_slope_is_inside_of_its_interval():
    """95 % of the time; of 20 draws of rows 15 are asked for."""
    experiment = experiment_of(Deep(), examples=20)
    weights = 1.2 * exact_weights(experiment, 0.3)
    large = attributions_of(experiment, weights, provenance={"ablation_fraction": 0.3})
    found = [calibrate(experiment, large, seed=seed, progress=False) for seed in range(20)]
    said = [one.provenance["calibration"] for one in found]
    assert sum(low < 1 / 1.2 < high for low, high in (one["interval"] for one in said)) >= 15
    assert np.mean([one["slope"] for one in said]) == pytest.approx(1 / 1.2, abs=0.02)


def test_calibrated_attributions_of_some_columns_are_kept_on_disk(linear, tmp_path):
    experiment, truth = linear
    found = calibrate(experiment, truth.subset([7, 2]), progress=False)
    assert found.columns.names == ("7", "2")
    again = Attributions.load(found.save(tmp_path / "calibrated"))
    assert again.provenance == found.provenance
    with refused(SettingError, "calibrated already"):
        calibrate(experiment, again, progress=False)


def test_what_rows_do_not_confirm_is_not_calibrated(linear):
    experiment, truth = linear
    for weights, word in ((-truth.weights, "a slope of -1"), (0 * truth.weights, "the same whatever")):
        with refused(FitError, "do not confirm", word):
            calibrate(experiment, attributions_of(experiment, weights), ablation_fraction=0.2, progress=False)


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("verb", [check, calibrate])
class TestRefused:
    def test_no_ablation_fraction(self, linear, verb):
        experiment, truth = linear
        unknown = attributions_of(experiment, truth.weights, provenance={"design": {"name": "leave_one_out"}})
        with refused(SettingError, "ablation_fraction=0.05"):
            verb(experiment, unknown, progress=False)
        design = Bernoulli(ablation_fraction=0.2).model_dump()
        verb(experiment, attributions_of(experiment, truth.weights, provenance={"design": design}))

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
    def test_senseless_fractions(self, linear, verb, fraction):
        with refused(SettingError, "ablation_fraction"):
            verb(*linear, ablation_fraction=fraction, progress=False)

    def test_rows_that_were_fitted(self, linear, verb):
        experiment, truth = linear
        design = Bernoulli(ablation_fraction=0.2, seed=4, stream={check: "check"}.get(verb, "calibration"))
        fitted = attributions_of(experiment, truth.weights, provenance={"design": design.model_dump()})
        with refused(SettingError, "the very rows", "seed 4"):
            verb(experiment, fitted, seed=4, progress=False)
        verb(experiment, fitted, seed=5, progress=False)

    def test_another_model_and_other_columns(self, linear, verb):
        other, weights = linear_experiment(num_components=9)
        foreign = attributions_of(other, weights, provenance={"ablation_fraction": 0.2})
        with refused(AxisError, "model"):
            verb(linear[0], foreign, progress=False)

    def test_too_few_rows(self, linear, verb):
        with refused(FitError, "at least 3"):
            verb(*linear, num_rows=2, progress=False)

    def test_an_output_that_is_not_there(self, linear, verb):
        experiment, truth = linear
        axes = experiment.components, experiment.columns["score"]
        other = Attributions(truth.weights, truth.intercept, *axes, "margin")
        with refused(SettingError, "no such output", "score"):
            verb(experiment, other, ablation_fraction=0.2, progress=False)

    def test_train_mode(self, linear, verb):
        experiment, truth = linear
        experiment.task.model.train()
        with pytest.raises(coar.errors.TaskError, match="train mode"):
            verb(experiment, truth, progress=False)
