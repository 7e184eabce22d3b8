"""When passes are enough: targets, what is said where they are missed, and whether the figures are true."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import coar
from coar.errors import CoarWarning
from coar.gradients import GateGradientStudy, gate_gradients
from tests.gate_networks import FRACTION, OPTIONS, make_experiment, same_bits, same_files


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(12)


@pytest.fixture
def create(tmp_path, experiment):
    """`create("name", passes=40)` is a study of 12 examples in blocks of 4."""

    def made(name="study", **options):
        return GateGradientStudy.create(tmp_path / name, experiment, FRACTION, **(OPTIONS | options))

    return made


class TestStopping:
    def test_auto_stops_by_its_target(self, tmp_path):
        experiment = make_experiment(12, layers=3)
        study = GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, **OPTIONS)
        assert study.status().adaptive
        assert study.status().num_passes == 20
        status = study.run(progress=False)
        found = study.progress()
        assert found.correlation >= 0.95
        assert 20 < status.passes < 400
        assert study.attributions().provenance["correlation"] == found.correlation
        before = sorted(study.directory.rglob("*"))
        assert study.run(progress=False) == status
        assert sorted(study.directory.rglob("*")) == before

    def test_in_memory_stops_where_the_study_stops(self, create, experiment):
        study = create(target_correlation=0.99)
        study.run(progress=False)
        memory = gate_gradients(
            experiment, FRACTION, target_correlation=0.99, output="value", batch_size=4, progress=False
        )
        assert study.status().passes > 20
        same_bits(study.attributions(), memory)

    def test_a_higher_target_takes_more_passes_and_is_met(self, create):
        passes = []
        for number, target in enumerate((0.9, 0.98, 0.99)):
            study = create(f"study {number}", target_correlation=target)
            passes.append(study.run(progress=False).passes)
            assert study.progress().correlation >= target
        assert passes == sorted(passes)
        assert passes[0] < passes[-1]

    def test_target_error(self, create):
        study = create(target_error=0.012)
        status = study.run(progress=False)
        assert 20 < status.passes <= 400
        assert study.progress().error <= 0.012
        assert np.median(study.attributions().errors) == pytest.approx(study.progress().error, rel=0.3)

    def test_a_missed_target_is_a_warning_with_what_to_do(self, create):
        study = create(passes=50, target_correlation=0.99999)
        with pytest.warns(CoarWarning, match=r"60 passes have not reached.*0\.99999.*passes=120"):
            status = study.run(progress=False)
        assert (status.passes, status.complete) == (60, True)  # 50, rounded up to whole rounds
        with pytest.warns(CoarWarning, match="60 passes"):
            study.run(progress=False)

    def test_a_new_target_on_an_old_study_goes_on_to_it(self, create):
        study = create(passes=20)
        study.run(progress=False)
        assert study.progress().correlation < 0.99
        again = create(passes="auto", target_correlation=0.99)
        again.run(progress=False)
        assert again.progress().correlation >= 0.99

    def test_after_an_interruption_it_goes_on(self, create):
        """The driver is stopped in its second step, by what a user's Ctrl-C raises."""
        study, whole = create("stopped", target_correlation=0.99), create(target_correlation=0.99)
        whole.run(progress=False)
        with pytest.raises(KeyboardInterrupt):
            study.run(_Interrupted(18), progress=False)
        assert not study.status().complete
        opened = GateGradientStudy.open(study.directory)
        opened.run(progress=False)
        same_files(opened, whole)
        same_bits(opened.attributions(), whole.attributions())


class _Interrupted:
    """Serial, until so many items are done."""

    def __init__(self, count):
        self.left = count

    def run(self, session, items):
        for done in coar.Serial().run(session, items):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield done


# --------------------------------------------------------------------------- are the figures true?


class Saturating(nn.Sequential):
    """Four tanh layers of 12 units whose gates are far from linear."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            layers = [nn.Linear(8, 12), *(nn.Linear(12, 12) for _ in range(3))]
            super().__init__(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(12, 2))
        for layer in layers:
            layer.weight.data.mul_(6)


def log_odds(model, batch):
    values = model(batch)
    return -functional.softplus(-(values[:, 0] - values[:, 1]))


@pytest.fixture(scope="module")
def saturating():
    model = Saturating().eval().requires_grad_(False)
    data = list(torch.randn(100, 8, generator=torch.Generator().manual_seed(2)))
    task = coar.Task(model, data, {"value": log_odds}, device="cpu")
    return coar.ComponentAblation(task, coar.find_components(model, kinds=["neuron"]))


@pytest.fixture(scope="module")
def exact(saturating):
    """So many passes that noise no longer counts."""
    return gate_gradients(saturating, FRACTION, passes=1_600, seed=99, progress=False).weights


def cosines(found, exact):
    """Of each column's weights and exact ones: components are ablated alone and as often as each other."""
    lengths = np.linalg.norm(found.weights, axis=1) * np.linalg.norm(exact, axis=1)
    return (found.weights * exact).sum(axis=1) / lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "examples", "within"),
    # Slope and share are fitted to the noise that they are judged by: from few columns, that flatters.
    [(20, 100, 0.03), (40, 100, 0.03), (20, 20, 0.09), (80, 20, 0.03)],
)
def test_the_expected_correlation_is_the_true_one(saturating, exact, passes, examples, within):
    expected, true = [], []
    for seed in range(6):
        found = gate_gradients(
            saturating, FRACTION, passes=passes, seed=seed, examples=range(examples), progress=False
        )
        expected.append(found.provenance["correlation"])
        true.append(cosines(found, exact[:examples]).mean())
    assert np.mean(true) < 0.97  # or there is nothing to tell
    assert np.mean(expected) == pytest.approx(np.mean(true), abs=within)


@pytest.mark.slow
def test_signal_is_unbiased_and_agreement_nearly(saturating, exact):
    """Over seeds: the sum of squared exact weights, and of products with them."""
    signals, agreements = [], []
    for seed in range(16):
        found = gate_gradients(saturating, FRACTION, passes=20, seed=seed, progress=False)
        signals.append(found.detail("signal").sum())
        agreements.append(found.detail("agreement").sum() / (found.weights * exact).sum())
    truth, doubt = (exact.astype(np.float64) ** 2).sum(), np.std(signals, ddof=1) / 4
    assert np.mean(signals) == pytest.approx(
        truth, abs=4 * doubt + 0.01 * truth
    )  # exact ones have noise, too
    assert doubt < 0.05 * truth
    assert np.mean(agreements) == pytest.approx(1, abs=0.06)


@pytest.mark.slow
def test_predictions_correlate_as_well_as_was_expected(saturating, exact):
    """The figure is about predictions on masks: those by few passes against those by very many."""
    found = gate_gradients(saturating, FRACTION, passes=40, seed=1, progress=False)
    masks = coar.Bernoulli(ablation_fraction=FRACTION, seed=3).masks(range(1_000), found.weights.shape[1])
    ours, theirs = (masks @ weights.T.astype(np.float64) for weights in (found.weights, exact))
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours.T, theirs.T, strict=True)]
    assert found.provenance["correlation"] == pytest.approx(np.mean(correlations), abs=0.04)
