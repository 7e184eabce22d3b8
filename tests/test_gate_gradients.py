"""Gate gradients: unbiased where theory says so, exact for additive models, better with more passes."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import OutputError, SettingError
from coar.gradients import gate_gradients
from coar.gradients.draws import GateDraws, van_der_corput
from coar.gradients.mixing import mix


def network(seed=0, hidden=8, activation=nn.Tanh):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, hidden), activation(), nn.Linear(hidden, 1)).double().eval()
    return model.requires_grad_(False)


def experiment_of(model, output=None, examples=6, **options):
    torch.manual_seed(1)
    data = [(x, 0) for x in torch.randn(examples, 5, dtype=torch.float64)]

    def value(model, batch):
        return model(batch[0])[:, 0]

    task = coar.Task(model, data, outputs={"value": output or value}, device="cpu")
    return coar.ComponentAblation(task, coar.find_components(model, kinds=["neuron"], **options))


def exact_weights(experiment, fraction):
    """Mean difference between kept and ablated over all masks, weighted by their probability."""
    size = len(experiment.components)
    masks = np.array(list(itertools.product([False, True], repeat=size)))
    runner = experiment.prepare(torch.device("cpu"), precision="float64")
    outputs = runner(masks)["value"]
    chance = (1 - fraction) ** masks.sum(axis=1) * fraction ** (~masks).sum(axis=1)
    weights = np.empty((outputs.shape[1], size))
    for component in range(size):
        kept = masks[:, component]
        given = [(chance[here] / chance[here].sum()) @ outputs[here] for here in (kept, ~kept)]
        weights[:, component] = given[0] - given[1]
    return weights


class TestDraws:
    @pytest.mark.parametrize("fraction", [0.01, 0.025, 0.05, 0.1, 0.3, 0.7, 0.9, 0.95, 0.99])
    def test_components_are_away_as_often_as_in_ablations(self, fraction):
        draws = GateDraws(fraction, seed=0, num_components=400)
        gates = [g.gates for k in range(4) for g in draws.round(0, k, np.arange(20))]
        count = 400 * 20 * len(gates)
        assert 1 - np.mean(gates) == pytest.approx(fraction, abs=4 / np.sqrt(count))
        assert draws.probe_fraction <= min(0.2, 2 * fraction) + 1e-9

    def test_each_component_is_a_probe_once_a_round(self):
        draws = GateDraws(0.05, seed=3, num_components=50)
        rounds = [
            np.sum([g.probes for g in draws.round(r, k, np.arange(7))], axis=0)
            for r in (0, 1)
            for k in (0, 1)
        ]
        assert all((one == 1).all() for one in rounds)

    def test_within_a_pass_components_are_independent(self):
        draws = GateDraws(0.05, seed=0, num_components=2)
        both = [g.probes.all(axis=1) for g in draws.round(0, 0, np.arange(20_000))]
        assert np.mean(both) == pytest.approx(0.01, abs=0.001)

    def test_gates_of_probes_are_spread_over_rounds(self):
        draws = GateDraws(0.1, seed=0, num_components=30)
        for example in range(3):
            own = [
                np.sum([g.gates * g.probes for g in draws.round(0, k, np.array([example]))], axis=0)[0]
                for k in range(8)
            ]
            for gates in np.sort(own, axis=0).T:
                assert np.diff(gates).max() == pytest.approx(1 / 8, abs=1e-6)

    def test_what_is_drawn_depends_on_its_address_alone(self):
        draws = GateDraws(0.3, seed=5, num_components=20)
        alone = [g.gates for g in draws.round(1, 2, np.array([9]))]
        among = [g.gates[4] for g in draws.round(1, 2, np.array([1, 3, 5, 7, 9]))]
        np.testing.assert_array_equal(np.concatenate(alone), among)
        other = [g.gates for g in GateDraws(0.3, 6, 20).round(1, 2, np.array([9]))]
        assert not np.array_equal(alone, other)

    def test_the_sequence_fills_the_interval(self):
        found = sorted(van_der_corput(k) for k in range(64))
        np.testing.assert_allclose(found, np.arange(64) / 64)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), "0.1", True, None])
    def test_senseless_fractions_are_refused(self, fraction):
        with pytest.raises(SettingError, match="ablation_fraction"):
            GateDraws(fraction, 0, 10)


def test_an_additive_model_needs_one_round():
    """A hidden layer with a linear read-out: the output is additive in the units, gates come after tanh."""
    experiment = experiment_of(network())
    found = gate_gradients(experiment, 0.1, passes=1, progress=False, precision="float64")
    np.testing.assert_allclose(found.weights, exact_weights(experiment, 0.1), atol=1e-6)
    assert found.errors.max() < 1e-6
    assert set(found.provenance["placements"].values()) == {"after tanh"}


def deep(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)]
    model = nn.Sequential(*layers).double().eval()
    return model.requires_grad_(False)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_many_passes_come_close_to_the_exact_weights(fraction):
    """Two layers act together; what remains is the bias of fractional backgrounds, a few per cent."""
    experiment = experiment_of(deep())
    exact = exact_weights(experiment, fraction)
    found = gate_gradients(experiment, fraction, passes=2_000, progress=False, precision="float64")
    error = np.linalg.norm(found.weights - exact) / np.linalg.norm(exact)
    assert error < 0.08
    for column in range(6):
        assert np.corrcoef(found.weights[column], exact[column])[0, 1] > 0.995


def test_more_passes_are_more_reliable_and_errors_say_so():
    experiment = experiment_of(deep(), examples=40)
    few, many = (gate_gradients(experiment, 0.3, passes=n, progress=False) for n in (20, 320))
    assert np.median(many.errors) < 0.5 * np.median(few.errors)
    assert many.provenance["correlation"] >= few.provenance["correlation"]
    far = np.abs(few.weights - many.weights)
    assert np.mean(far < 4 * few.errors + 1e-3) > 0.9


def test_fraction_is_honoured():
    """Attributions made for a fraction are closest to the exact ones of that fraction."""
    experiment = experiment_of(deep(3))
    fractions = (0.02, 0.5)
    exact = [exact_weights(experiment, f) for f in fractions]
    for own, fraction in enumerate(fractions):
        found = gate_gradients(experiment, fraction, passes=1_000, progress=False).weights
        errors = [np.linalg.norm(found - e) for e in exact]
        assert errors[own] < errors[1 - own]


def test_the_batch_size_does_not_matter():
    experiment = experiment_of(deep(), examples=11)
    whole, small = (
        gate_gradients(experiment, 0.1, passes=40, batch_size=b, progress=False, precision="float64")
        for b in (11, 3)
    )
    np.testing.assert_allclose(small.weights, whole.weights, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(small.intercept, whole.intercept, rtol=1e-9)


def test_some_examples_are_those_of_a_whole_run_before_mixing():
    experiment = experiment_of(network(), examples=9)  # additive: mixing has nothing to do
    some = gate_gradients(experiment, 0.1, examples=[7, 2], passes=20, progress=False)
    whole = gate_gradients(experiment, 0.1, passes=20, progress=False)
    assert some.columns == whole.columns.subset(np.array([2, 7]))
    np.testing.assert_allclose(some.weights, whole.weights[[2, 7]], atol=1e-5)


def test_predictions_hold_on_held_out_ablations():
    experiment = experiment_of(deep(), examples=20)
    found = gate_gradients(experiment, 0.1, progress=False)
    table = coar.evaluate(experiment, {"gate gradients": found}, [0.1], num_rows=100, seed=1).means()
    assert table.correlation.min() > 0.9
    masks = coar.Bernoulli(ablation_fraction=0.1, seed=9).masks(range(200), 10)
    runner = experiment.prepare(torch.device("cpu"))
    np.testing.assert_allclose(
        found.predict(masks).mean(axis=0), runner(masks)["value"].mean(axis=0), atol=0.05
    )


def test_several_values_per_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval().requires_grad_(False)

    def values(model, batch):
        return model(batch[0])

    experiment = experiment_of(model, values, examples=4)
    found = gate_gradients(experiment, 0.1, passes=1, progress=False, precision="float64")
    assert found.weights.shape == (12, 6)
    np.testing.assert_allclose(found.weights, exact_weights(experiment, 0.1), atol=1e-6)


def test_pooling_is_said():
    experiment = experiment_of(deep(), examples=12)
    assert gate_gradients(experiment, 0.1, pool=True, passes=40, progress=False).provenance["pooled"] is True
    assert gate_gradients(experiment, 0.1, passes=40, progress=False).provenance["pooled"] is False


class TestRefused:
    def test_an_output_without_gradient_names_regression(self):
        def rounded(model, batch):
            return model(batch[0])[:, 0].detach()

        with pytest.raises(OutputError, match="no gradient") as error:
            gate_gradients(experiment_of(network(), rounded), 0.1, progress=False)
        assert "regression" in error.value.todo

    def test_argmax(self):
        def hit(model, batch):
            return (model(batch[0])[:, 0] > 0).double()

        with pytest.raises(OutputError, match="no gradient"):
            gate_gradients(experiment_of(network(), hit), 0.1, progress=False)

    def test_a_derivative_that_is_not_finite_names_example_and_component(self):
        def root(model, batch):
            return (model(batch[0])[:, 0] * 0).sqrt()

        with pytest.raises(OutputError, match="not finite") as error:
            gate_gradients(experiment_of(network(), root), 0.1, progress=False)
        assert "example 0" in error.value.what

    @pytest.mark.parametrize("examples", [[], [0, 0], [-1], [6]])
    def test_examples_that_are_not_there(self, examples):
        with pytest.raises(SettingError, match="examples"):
            gate_gradients(experiment_of(network()), 0.1, examples=examples, progress=False)

    @pytest.mark.parametrize("passes", [0, -1, 2.5, "many", True])
    def test_senseless_passes(self, passes):
        with pytest.raises(SettingError, match="passes"):
            gate_gradients(experiment_of(network()), 0.1, passes=passes, progress=False)

    def test_another_experiment(self):
        from coar.testing import SubsetMean

        with pytest.raises(SettingError, match="component ablation"):
            gate_gradients(SubsetMean(), 0.1)


class TestMixing:
    def data(self, columns=200, components=60, noise=1.0, seed=0):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=(columns, components)) * rng.lognormal(sigma=1.0, size=components)
        probe = truth + noise * rng.lognormal(sigma=1.0, size=components) * rng.normal(
            size=(4, columns, components)
        )
        kept = 0.7 * truth + 0.3 * rng.normal(size=(columns, components)) + np.zeros((4, 1, 1))
        return truth, probe, kept

    @pytest.mark.parametrize("columns", [1, 5, 50, 500])
    @pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
    def test_it_is_better_than_the_probe_mean_and_with_columns_to_learn_from_than_either(
        self, columns, noise
    ):
        truth, probe, kept = self.data(columns, noise=noise)
        error = np.mean((mix(probe, kept, [slice(0, 60)]).weights - truth) ** 2)
        alone = [np.mean((part.mean(axis=0) - truth) ** 2) for part in (probe, kept)]
        assert error < 1.02 * alone[0]
        if columns >= 50 and noise <= 1:
            assert error < min(alone)

    def test_without_noise_it_is_the_probe_mean(self):
        truth, _, kept = self.data()
        mixed = mix(np.stack([truth] * 4), kept, [slice(0, 60)])
        np.testing.assert_allclose(mixed.weights, truth, atol=1e-9)
        assert mixed.errors.max() < 1e-9

    @pytest.mark.parametrize(("replicates", "within"), [(4, 0.1), (2, 0.2)])
    def test_errors_are_how_far_weights_are_off(self, replicates, within):
        """Noise and what shrinking leaves out: root mean squares over repetitions and columns agree.

        That slope and share come from the same noise is not in them: with two replicates it shows.
        """
        off, errors = [], []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            truth, _, kept = self.data(40, 30)
            probe = truth + rng.normal(size=(replicates, 40, 30))
            mixed = mix(probe, kept[:replicates, :, :30], [slice(0, 30)])
            off.append((mixed.weights - truth) ** 2)
            errors.append(mixed.errors**2)
        assert np.sqrt(np.mean(errors)) == pytest.approx(np.sqrt(np.mean(off)), rel=within)

    def test_pooling_helps_where_columns_are_alike(self):
        rng = np.random.default_rng(0)
        classes = np.repeat(np.arange(4), 50)
        truth = rng.normal(size=(4, 60))[classes] + 0.1 * rng.normal(size=(200, 60))
        probe, kept = truth + 3 * rng.normal(size=(4, 200, 60)), rng.normal(size=(4, 200, 60))
        errors = [
            np.mean((mix(probe, kept, [slice(0, 60)], c).weights - truth) ** 2) for c in (None, classes)
        ]
        assert errors[1] < 0.3 * errors[0]
