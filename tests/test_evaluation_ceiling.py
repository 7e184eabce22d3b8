"""The linear ceiling against networks whose masks can all be run; reliability; both in an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

import coar
from coar.attributions import Attributions
from coar.axes import Axis
from coar.designs import Bernoulli, LeaveOneOut
from coar.errors import AxisError, CoarWarning, FitError, SettingError
from coar.evaluation import Evaluation, evaluate, linear_ceiling, split_half
from coar.evaluation import ceiling as ceiling_module
from coar.evaluation.ceiling import ceiling_from_replicates
from coar.metrics import Estimate
from coar.regression import fit
from coar.study import Study
from coar.testing import SubsetMean, linear_experiment
from coar.testing.enumerable import all_masks, all_outputs, exact_weights, mask_probabilities
from tests import cases
from tests.refused import refused


def study_of(folder, experiment, fraction, num_rows, seed=0):
    study = Study.create(folder, experiment, Bernoulli(ablation_fraction=fraction, seed=seed), num_rows)
    study.run(progress=False)
    return study


def exact_ceiling(experiment, output, fraction):
    """sqrt(a (1 - a) |w|^2 / var f) from every mask there is, mean over columns."""
    outputs = all_outputs(experiment)[output]
    chance = mask_probabilities(all_masks(len(experiment.components)), fraction)
    variance = chance @ (outputs - chance @ outputs) ** 2
    weights = exact_weights(outputs, fraction)
    return float(np.sqrt(fraction * (1 - fraction) * (weights**2).sum(axis=1) / variance).mean())


@pytest.fixture
def network():
    return cases.make_case("mlp").experiment()


# ---------------------------------------------------------------------------------- from rows


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_rows_tell_the_ceiling_of_a_network_whose_masks_are_all_run(network, tmp_path, fraction):
    output = next(iter(network.columns))
    found = linear_ceiling(study_of(tmp_path / "study", network, fraction, 3_000))
    assert found.value == pytest.approx(exact_ceiling(network, output, fraction), abs=0.01)
    assert found.low <= exact_ceiling(network, output, fraction) <= found.high


def linear_and_more(seed, rows, components=200, columns=30, fraction=0.1):
    """Sums over groups of a linear function plus noise, whose ceiling is sqrt(1 / 1.5)."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(columns, components))
    masks = rng.random((rows, components)) >= fraction
    noise = np.sqrt(0.5 * fraction * (1 - fraction) * (weights**2).sum(axis=1))
    outputs = 7 + masks @ weights.T + noise * rng.normal(size=(rows, columns))
    sums = ceiling_module._Sums(components, columns, 1 - fraction)
    for group, here in enumerate(np.array_split(np.arange(rows), ceiling_module.GROUPS)):
        sums.add(group, masks[here], outputs[here])
    return sums.ceiling()


def test_fewer_rows_than_components_make_it_uncertain_and_not_wrong():
    true = np.sqrt(1 / 1.5)
    few = [linear_and_more(seed, 150) for seed in range(40)]
    many = [linear_and_more(seed, 2_000) for seed in range(10)]
    assert np.mean([one.value for one in few]) == pytest.approx(true, abs=0.03)
    assert np.mean([one.low <= true <= one.high for one in few]) > 0.85
    assert np.mean([one.value for one in many]) == pytest.approx(true, abs=0.01)
    width = [np.mean([one.high - one.low for one in group]) for group in (few, many)]
    assert width[0] > 3 * width[1]


def test_what_is_cut_off_at_0_or_1_keeps_its_interval():
    """One column, far fewer rows than components: nothing is known, and nothing else is said."""
    found = [linear_and_more(seed, 60, columns=1) for seed in range(60)]
    assert any(one.value == 0 for one in found)
    assert any(one.value == 1 for one in found)
    assert min(one.high - one.low for one in found) > 0.3
    assert np.mean([one.low <= np.sqrt(1 / 1.5) <= one.high for one in found]) > 0.85


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_noise_of_r2_does_not_bias_the_mean_of_its_root(noise):
    rng = np.random.default_rng(0)
    true = rng.beta(8, 4, size=20_000)  # around 2/3
    seen = true + noise * rng.normal(size=len(true))
    found = ceiling_module.mean_root(seen, noise**2)
    assert found == pytest.approx(np.sqrt(true).mean(), abs=0.003)
    if noise > 0.1:  # as it would be without
        assert abs(np.sqrt(np.clip(seen, 0, 1)).mean() - np.sqrt(true).mean()) > 0.01


def test_the_ceiling_does_not_depend_on_how_rows_were_sharded(tmp_path):
    experiment, design = SubsetMean(), Bernoulli(ablation_fraction=0.3)
    found = []
    for size in (7, 50):
        study = Study.create(tmp_path / str(size), experiment, design, 400, rows_per_shard=size)
        study.run(progress=False)
        found.append(linear_ceiling(study).to_json())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_some_columns_have_a_ceiling_of_their_own(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean(), 0.3, 400)
    names = study.columns["mean"].names
    each = [linear_ceiling(study, columns=[name]).value for name in names]
    assert linear_ceiling(study, columns=names) == linear_ceiling(study)
    assert np.mean(each) == pytest.approx(linear_ceiling(study).value, abs=0.01)  # noise apart
    assert np.std(each) > 0


def test_too_few_rows_and_other_designs_are_refused(tmp_path):
    with refused(FitError, "needs rows", "at least 40", "30"):
        linear_ceiling(study_of(tmp_path / "few", SubsetMean(), 0.3, 30))
    one_out = Study.create(tmp_path / "out", SubsetMean(), LeaveOneOut())
    with refused(SettingError, "ablated independently", "coar.Bernoulli", "leave_one_out"):
        linear_ceiling(one_out)


def test_constant_outputs_have_none():
    sums = ceiling_module._Sums(5, 2, 0.9)
    for group in range(ceiling_module.GROUPS):
        sums.add(group, np.ones((6, 5), bool), np.full((6, 2), 3.0))
    with refused(FitError, "nothing to explain"):
        sums.ceiling()


# ---------------------------------------------------------------------------------- from replicates


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_gate_gradients_tell_the_same_ceiling(network, fraction):
    output = next(iter(network.columns))
    found = coar.gate_gradients(network, fraction, passes=400, output=output, progress=False)
    masks = Bernoulli(ablation_fraction=fraction, seed=4).masks(range(400), len(network.components))
    truth = network.prepare(network.device)(masks)[output]
    ceiling = ceiling_from_replicates([found], truth, [found.predict(masks)], fraction=fraction, seed=0)
    true = exact_ceiling(network, output, fraction)
    assert ceiling.value == pytest.approx(true, abs=0.02)
    assert ceiling.low < true < ceiling.high


def test_replicates_that_agree_on_nothing_tell_none(network):
    output = next(iter(network.columns))
    shape = len(network.columns[output]), len(network.components)
    axes = network.components, network.columns[output]
    none = Attributions(
        np.ones(shape),
        np.zeros(shape[0]),
        *axes,
        output,
        details={"signal": -np.ones(shape[0]), "agreement": -np.ones(shape[0])},
    )
    masks = Bernoulli(ablation_fraction=0.3).masks(range(10), shape[1])
    truth = network.prepare(network.device)(masks)[output]
    assert ceiling_from_replicates([none], truth, [none.predict(masks)], fraction=0.3, seed=0) is None


# -------------------------------------------------------------------------------- in an evaluation


def test_shares_are_correlations_over_ceilings(network, tmp_path):
    output = next(iter(network.columns))
    study = study_of(tmp_path / "study", network, 0.2, 400)
    methods = {
        "gate gradients": coar.gate_gradients(network, 0.1, passes=100, output=output, progress=False),
        "regression": fit(study),
    }
    found = evaluate(
        network, methods, [0.1, 0.2], 50, ceiling=[methods["gate gradients"], study], progress=False
    )
    assert set(found.ceilings) == {0.1, 0.2}
    assert found.ceilings[0.2] == linear_ceiling(study)
    means = found.means()
    assert (means.correlation / means.ceiling).to_numpy() == pytest.approx(means.share.to_numpy())
    for text in (f"{100 * share:.0f} %" for share in means.share):
        assert text in found.summary()
    assert str(found.ceilings[0.1]) in found.summary().split("linear ceiling")[1]
    alone = evaluate(network, {"regression": methods["regression"]}, [0.1, 0.2], 50, progress=False)
    assert not alone.ceilings
    assert "ceiling" not in alone.summary()
    assert alone.means().share.isna().all()
    automatic = evaluate(network, methods, [0.1, 0.2], 50, progress=False)
    assert automatic.ceilings == {0.1: found.ceilings[0.1]}


def test_what_does_not_tell_a_ceiling_is_refused():
    experiment, weights = linear_experiment()
    axes = experiment.components, experiment.columns["score"]
    plain = Attributions(weights, np.zeros(len(weights)), *axes, "score")
    with refused(SettingError, "does not tell the linear ceiling", "gate gradients", "ceiling=None"):
        evaluate(experiment, {"plain": plain}, 0.1, 5, ceiling=plain, progress=False)


# ------------------------------------------------------------------------- sources that do not fit


def test_sources_of_another_model_or_another_ablation_are_refused(tmp_path):
    (first, weights), (other, _) = linear_experiment(), linear_experiment(num_components=9)
    axes = first.components, first.columns["score"]
    methods = {"mine": Attributions(weights, np.zeros(len(weights)), *axes, "score")}
    options = {"progress": False, "num_rows": 5}
    study = study_of(tmp_path / "other", other, 0.2, 50)
    gates = coar.gate_gradients(other, 0.2, passes=40, progress=False)
    means = coar.ComponentAblation(first.task, first.component_set, value="mean")
    for source in (study, gates, study_of(tmp_path / "means", means, 0.2, 50)):
        with refused(AxisError, "components", "ceiling source", "experiment"):
            evaluate(first, methods, 0.2, ceiling=source, **options)
    own = coar.gate_gradients(first, 0.2, passes=40, progress=False)
    with refused(AxisError, "columns", "methods", "ceiling source"):
        evaluate(first, methods, 0.2, ceiling=own.subset([0, 1]), **options)
    for wrong in (True, 0.9, "runs/q", {0.2: own}, own.subset([0]).rows([0])):
        with refused(SettingError, "does not tell the linear ceiling", "a coar.Study"):
            evaluate(first, methods, 0.2, ceiling=wrong, **options)


def test_a_source_of_more_columns_tells_that_of_the_methods(network, tmp_path):
    output = next(iter(network.columns))
    study = study_of(tmp_path / "study", network, 0.2, 400)
    gates = coar.gate_gradients(network, 0.2, passes=100, output=output, progress=False)
    some = {"some": fit(study, columns=[3, 1])}
    for source in (study, gates):
        found = evaluate(network, some, 0.2, 50, ceiling=source, progress=False)
        assert 0 < found.ceilings[0.2].value <= 1
    assert found.ceiling_sources[0.2].startswith("gate gradients of")
    assert evaluate(network, some, 0.2, 50, ceiling=study, progress=False).ceilings[0.2] == linear_ceiling(
        study, columns=[3, 1]
    )


def test_a_source_of_a_fraction_that_is_not_tested_is_warned_of(network):
    output = next(iter(network.columns))
    gates = coar.gate_gradients(network, 0.1, passes=40, output=output, progress=False)
    with pytest.warns(CoarWarning, match="of 0.1, which is not among those tested: 0.2"):
        evaluate(network, {"gates": gates}, 0.2, 5, ceiling=gates, progress=False)
    assert not evaluate(network, {"gates": gates}, 0.2, 5, progress=False).ceilings  # "auto" only looks


def test_a_ceiling_of_zero_has_no_share():
    truth = np.random.default_rng(0).normal(size=(10, 3))
    columns = Axis("columns", ["a", "b", "c"], {})
    ceilings = {0.1: Estimate(0.0, 0.0, 0.3)}
    found = Evaluation(columns, {0.1: truth}, {"A": {0.1: truth}}, seed=0, ceilings=ceilings)
    assert found.means().share.isna().all()
    assert "0.000 [0.000, 0.300]" in found.summary()


def test_two_replicates_tell_none(network):
    output = next(iter(network.columns))
    few = coar.gate_gradients(network, 0.1, passes=10, output=output, progress=False)
    assert few.provenance["replicates"] == 2
    assert not evaluate(network, {"few": few}, 0.1, 5, progress=False).ceilings


# ------------------------------------------------------------------------------------- reliability


def test_halves_of_a_study_are_fitted_apart(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean(), 0.3, 200)
    halves = [fit(study, rows=rows).weights for rows in (range(100), range(100, 200))]
    found = split_half(study)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*halves, strict=True)]
    assert found.halves == pytest.approx(np.array(expected), abs=1e-9)
    whole = 2 * found.halves / (1 + found.halves)
    assert found.whole.value == pytest.approx(whole.mean())
    assert found.whole.low <= found.whole.value <= found.whole.high
    assert "two halves correlate by" in str(found)


def test_replicates_say_how_reliable_weights_are():
    """The squared cosine to exact weights, which the enumeration knows."""
    network = cases.make_case("mlp").experiment()
    output = next(iter(network.columns))
    found = coar.gate_gradients(network, 0.2, passes=200, output=output, progress=False)
    exact = exact_weights(all_outputs(network)[output], 0.2)
    own = found.weights.astype(np.float64)
    cosines = (own * exact).sum(axis=1) / np.sqrt((own**2).sum(axis=1) * (exact**2).sum(axis=1))
    assert split_half(found).whole.value == pytest.approx((cosines**2).mean(), abs=0.03)


def test_attributions_of_one_piece_cannot_be_split(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean(), 0.3, 100)
    with refused(SettingError, "nothing to split", "a study", "ridge"):
        split_half(fit(study))
