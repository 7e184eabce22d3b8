"""fast_l1: recorded answers of the original become mask units and are checked; its faults are harmless."""

import json
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.metrics import r2_score

from coar.errors import CoarWarning, FitError, MissingDependencyError, SettingError
from coar.regression.fast_l1 import FastL1, FastL1Fitter
from coar.regression.fast_l1_backend import OriginalBackend, _IndicesFollow
from coar.regression.fast_l1_loader import COUNTING, Batches, Rows, Watch
from coar.regression.problem import Problem
from coar.regression.ridge import Ridge

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")


class Recording:
    """A backend that answers what the original answered, if it is asked the same."""

    device = CPU

    def __init__(self, name):
        with np.load(DATA / f"fast_l1_{name}.npz") as file:
            self.arrays = dict(file)
        plain = json.loads(str(self.arrays["plain"]))
        self.settings, self.calls = FastL1(**plain["settings"]), plain["calls"]
        self.outputs, self.number = self.arrays["outputs"], 0
        bits = self.arrays["masks"]
        self.masks = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)

    def train(self, weight, bias, rows, held_out, **settings):
        plain = {key: value for key, value in settings.items() if not isinstance(value, torch.Tensor)}
        plain |= {"stop": rows.stop, "size": rows.size, "held_out": held_out is not None}
        assert plain == self.calls[self.number]
        given = {"weight_before": weight, "bias_before": bias, "start": settings["start_lams"]}
        for name, tensor in given.items():
            assert np.allclose(tensor, self.answer(name), rtol=1e-5, atol=1e-6), name
        weight.copy_(torch.from_numpy(self.answer("weight")))
        self.number += 1
        return torch.from_numpy(self.arrays[f"{self.number - 1}.chosen"])

    def answer(self, name):
        return self.arrays[f"{self.number}.{name}"]

    def problem(self):
        return Problem.from_arrays(self.masks, self.outputs)

    def fit(self, **changes):
        settings = FastL1(**self.settings.model_dump() | changes)
        return FastL1Fitter(settings, self.problem(), self).fit(slice(0, self.outputs.shape[1]))


def standardised(masks):
    deviation = masks.std(axis=0)
    return (masks - masks.mean(axis=0)) / np.where(deviation == 0, 1, deviation), deviation


def lasso(masks, output, penalty):
    """scikit-learn's solution, in output units per component kept."""
    design, deviation = standardised(masks)
    model = Lasso(alpha=penalty, tol=1e-10, max_iter=100_000) if penalty else LinearRegression()
    weights = model.fit(design, output.astype(np.float64)).coef_
    return np.where(deviation == 0, 0, weights / np.where(deviation == 0, 1, deviation))


class TestRecorded:
    """What the original answered, on a CPU, with torch in place of cupy (scripts/record_fast_l1.py)."""

    def test_least_squares_is_that_of_scikit_learn_and_ours(self):
        recording = Recording("least_squares")
        block = recording.fit()
        peer = LinearRegression().fit(recording.masks, recording.outputs)
        ours = Ridge(penalties=0.0).prepare(recording.problem()).fit(slice(0, 24))
        for weights, intercept in [(peer.coef_, peer.intercept_), (ours.weights, ours.intercept)]:
            np.testing.assert_allclose(block.weights, weights, atol=2e-4)
            np.testing.assert_allclose(block.intercept, intercept, atol=1e-3)
        predicted = recording.masks @ block.weights.T + block.intercept
        np.testing.assert_allclose(predicted, peer.predict(recording.masks), atol=1e-3)
        r2 = r2_score(recording.outputs, predicted, multioutput="raw_values")
        np.testing.assert_allclose(block.details["r2"], r2, atol=1e-5)

    def test_a_component_that_never_varied_has_no_weight(self):
        block = Recording("least_squares").fit()
        assert np.flatnonzero((block.weights == 0).all(axis=0)).tolist() == [7]

    def test_raw_weights_are_not_in_mask_units_and_the_raw_bias_is_the_mean(self):
        recording = Recording("least_squares")
        raw, bias = recording.arrays["0.weight"].T, recording.arrays["0.bias"]
        block, varied = recording.fit(), np.arange(recording.masks.shape[1]) != 7
        deviation = recording.masks.std(axis=0)[varied]
        np.testing.assert_allclose(block.weights[:, varied] * deviation, raw, atol=1e-6)
        assert np.abs(block.weights[:, varied] - raw).max() > 0.5
        np.testing.assert_allclose(bias, 0, atol=1e-4)  # outputs were centred before
        assert np.abs(block.intercept - recording.outputs.mean(axis=0)).min() > 0.01

    def test_each_column_of_a_path_is_the_lasso_at_its_penalty(self):
        recording = Recording("path")
        block = recording.fit()
        penalties = block.details["penalty"]
        assert len(set(penalties.round(6))) > 5
        assert block.details["kkt"].max() < 1e-3
        for column, penalty in enumerate(penalties):
            expected = lasso(recording.masks, recording.outputs[:, column], penalty)
            np.testing.assert_allclose(block.weights[column], expected, atol=2e-4)

    def test_wrong_start_penalties_are_found(self):
        """Run as published, columns that change places are solved for the penalty of another column."""
        recording = Recording("as_published")
        with pytest.warns(CoarWarning, match="did not solve 11 of 24 columns"):
            block = recording.fit()
        expected = [
            lasso(recording.masks, recording.outputs[:, column], penalty)
            for column, penalty in enumerate(block.details["penalty"])
        ]
        wrong = np.abs(block.weights - expected).max(axis=1) > 1e-3
        assert wrong.sum() == 11
        np.testing.assert_array_equal(block.details["kkt"] > 1e-2, wrong)

    def test_and_refused_unless_asked_otherwise(self):
        with pytest.raises(FitError, match="did not solve 11 of 24 columns") as caught:
            Recording("as_published").fit(uncertified="refuse")
        assert "of the largest penalty" in str(caught.value)
        assert "coar.Lasso()" in caught.value.todo

    @pytest.mark.parametrize("name", ["least_squares", "path", "as_published"])
    def test_recordings_are_small(self, name):
        assert (DATA / f"fast_l1_{name}.npz").stat().st_size < 100_000


# A solver with the faults of the original and none of its code: proximal gradient steps, from a table of
# gradients that a thread fills. CHANGE_PLACES solves each column for the penalty of the next.
CARELESS = """
    import time
    from threading import Thread
    import torch

    CHANGE_PLACES = False

    def train_saga(weight, bias, loader, val_loader, *, lr, start_lams, lam_decay, num_lambdas,
                   early_stop_freq, early_stop_eps, min_lams_to_try=10):
        count = sum(len(index) for _, _, index in loader)
        next(iter(loader))
        kept = torch.cat([masks for masks, _, _ in loader])
        mean, deviation = kept.mean(dim=0), kept.std(dim=0, correction=0)
        penalty = start_lams * lam_decay ** (num_lambdas // 2 if val_loader else 0)
        chosen = penalty.clone()
        if CHANGE_PLACES and not val_loader:
            penalty = penalty.roll(1)
        try:
            while True:
                table, before, seen = torch.zeros_like(weight), weight.clone(), 0
                for masks, outputs, index in loader:
                    masks = (masks - mean) / (deviation + 1e-32)
                    gradient = masks.T @ (masks @ weight + bias - outputs)

                    def keep(gradient):
                        time.sleep(KEEP_SECONDS)
                        table.add_(gradient)

                    thread = Thread(target=keep, args=(gradient,))
                    thread.start()
                    seen += len(index)
                    if seen > count - len(index):  # the last batch
                        weight -= lr * table / seen
                        weight.copy_(torch.sign(weight) * torch.clamp(weight.abs() - lr * penalty, min=0))
                print("epoch")
                change = ((weight - before) * deviation[:, None]).square().amax(dim=0)
                if bool((change < early_stop_eps).all()):
                    break
        except KeyboardInterrupt:
            print("interrupted")
        return chosen
"""


@pytest.fixture
def careless():
    module = ModuleType("careless")
    module.KEEP_SECONDS = 0.0
    exec(textwrap.dedent(CARELESS), vars(module))
    return OriginalBackend(module, CPU)


def make_rows(rows=120, components=8, columns=5, seed=0):
    random = np.random.default_rng(seed)
    masks = random.random((rows, components)) < 0.7
    outputs = 3 + masks @ random.normal(size=(components, columns))
    return masks, outputs + 0.3 * random.normal(size=(rows, columns))


def fit(backend, budget=None, rows=None, **settings):
    masks, outputs = rows or make_rows()
    problem = Problem.from_arrays(masks, outputs, budget=budget)
    settings = {"num_penalties": 0, "learning_rate": 0.5, "batch_size": 40, "threshold": 1e-14} | settings
    fitter = FastL1Fitter(FastL1(**settings), problem, backend)
    return fitter.fit(slice(0, outputs.shape[1]))


class TestGuards:
    def test_a_thread_that_nobody_waits_for_has_done_its_work(self, careless):
        masks, outputs = make_rows()
        careless.regressor.KEEP_SECONDS = 0.005
        found = fit(careless, threshold=1e-10).weights
        np.testing.assert_allclose(found, LinearRegression().fit(masks, outputs).coef_, atol=1e-3)

    def test_without_the_guard_it_has_not(self, careless):
        """The fault is there, or the test before could not fail."""
        masks, outputs = make_rows()
        careless.regressor.KEEP_SECONDS = 0.005
        rows = Rows(
            np.packbits(masks, axis=1, bitorder="little"), np.ones(8, bool), outputs.astype("f4"), 120
        )
        weight, bias = torch.zeros(8, 5), torch.from_numpy(outputs.mean(axis=0)).float()
        watch = Watch(weight, torch.ones(8), 1e-10, 10_000, together=False)
        batches = Batches(rows, 0, 120, 40, CPU, watch=watch)
        settings = {"lam_decay": 1.0, "num_lambdas": 0, "early_stop_freq": 1, "early_stop_eps": 1e-10}
        careless.regressor.train_saga(
            weight, bias, batches, None, lr=0.5, start_lams=torch.zeros(5), **settings
        )
        expected = LinearRegression().fit(masks, outputs).coef_.T * masks.std(axis=0)[:, None]
        assert np.abs(weight.numpy() - expected).max() > 0.01

    def test_endless_epochs_end(self, careless):
        with pytest.raises(FitError, match="did not solve") as caught:
            fit(careless, threshold=1e-300, max_epochs=3)
        assert "stopped after max_epochs=3" in caught.value.got
        with pytest.warns(CoarWarning, match="after 3 epochs"):
            fit(careless, threshold=1e-300, max_epochs=3, uncertified="keep")

    def test_a_good_solution_may_take_all_the_epochs_there_are(self, careless):
        block = fit(careless, threshold=1e-300, max_epochs=300)
        np.testing.assert_allclose(block.weights, LinearRegression().fit(*make_rows()).coef_, atol=1e-4)

    def test_a_path_that_does_not_end_has_no_choice_to_return(self, careless):
        with pytest.raises(FitError, match="end of the path in max_epochs=3"):
            fit(careless, num_penalties=10, max_epochs=3, uncertified="keep")

    def test_nan_ends_it_at_once(self, careless):
        with pytest.raises(FitError, match="diverged in 5 of 5 columns in epoch") as caught:
            fit(careless, learning_rate=1e30)
        assert 'learning_rate="auto"' in caught.value.todo

    def test_penalties_of_other_columns_are_found(self, careless):
        fit(careless, num_penalties=10, tolerance=1e-4)
        careless.regressor.CHANGE_PLACES = True
        with pytest.raises(FitError, match="did not solve 5 of 5 columns"):
            fit(careless, num_penalties=10, tolerance=1e-4)

    def test_ctrl_c_is_not_a_result(self, careless, monkeypatch):
        end = Watch.end

        def interrupted(watch):
            end(watch)
            raise KeyboardInterrupt

        monkeypatch.setattr(Watch, "end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(careless)

    def test_it_prints_nothing_and_is_left_as_it_was(self, careless, capfd):
        before = dict(vars(careless.regressor))
        fit(careless)
        assert capfd.readouterr() == ("", "")
        assert vars(careless.regressor) == before

    def test_columns_are_told_to_go_on_until_all_have_converged(self):
        weight = torch.zeros(2, 3)
        watch = Watch(weight, torch.ones(2), threshold=0.5, max_epochs=10, together=True)
        for changes, verdict in [([0, 1, 0], -1.0), ([0, 0.1, 0], torch.inf), ([2, 2, 2], -1.0)]:
            watch.begin()
            weight += torch.tensor(changes)
            watch.end()
            assert watch.threshold.tolist() == [verdict] * 3

    def test_indices_follow_the_tensor_that_they_index(self):
        class Elsewhere(torch.Tensor):
            def cpu(self):
                return torch.tensor([2, 0])

        table, elsewhere = torch.arange(12).reshape(4, 3), torch.tensor([1]).as_subclass(Elsewhere)
        with _IndicesFollow():
            assert torch.equal(table[elsewhere], table[[2, 0]])
            assert torch.equal(table[elsewhere, :2], table[[2, 0], :2])
            assert torch.equal(table[1:, 0], torch.tensor([3, 6, 9]))


class TestFitter:
    def test_a_path_is_the_lasso_at_the_penalty_chosen(self, careless):
        masks, outputs = make_rows()
        block = fit(careless, num_penalties=10, smallest=1e-2)
        for column, penalty in enumerate(block.details["penalty"]):
            expected = lasso(masks, outputs[:, column], penalty)
            np.testing.assert_allclose(block.weights[column], expected, atol=1e-4)
        np.testing.assert_allclose(
            (masks @ block.weights.T + block.intercept).mean(axis=0), outputs.mean(axis=0), atol=1e-5
        )

    def test_how_many_columns_fit_into_memory_changes_nothing(self, careless):
        whole, parts = fit(careless, num_penalties=5), fit(careless, num_penalties=5, budget=12 * 120 * 2)
        for name, array in whole.arrays().items():
            np.testing.assert_allclose(parts.arrays()[name], array, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("batch_size", [7, 50, 1_000])
    def test_rows_need_not_fill_batches(self, careless, batch_size):
        masks, outputs = make_rows(rows=100)
        rows = masks, outputs * 0 + masks @ np.arange(8.0)[:, None]  # no noise: any batch has the answer
        found = fit(careless, rows=rows, batch_size=batch_size).weights
        np.testing.assert_allclose(found, np.tile(np.arange(8.0), (5, 1)), atol=1e-3)

    def test_held_out_rows_are_those_of_other_solvers(self, careless):
        _, outputs = make_rows()
        seen = []
        train = careless.train

        class Spy(OriginalBackend):
            def train(self, weight, bias, rows, held_out, **settings):
                if held_out is not None:
                    seen.append(torch.cat([outputs for _, outputs, _ in held_out]).numpy())
                return train(weight, bias, rows, held_out, **settings)

        fit(Spy(careless.regressor, CPU), num_penalties=5, held_out=4)
        np.testing.assert_allclose(seen[0], (outputs - outputs.mean(axis=0))[3::4], atol=1e-5)

    @pytest.mark.parametrize(
        "settings", [{"num_penalties": 1}, {"smallest": 1.0}, {"learning_rate": 0.0}, {"threshold": np.nan}]
    )
    def test_settings_out_of_range_are_refused(self, settings):
        with pytest.raises(SettingError, match="FastL1"):
            FastL1(**settings)


class TestBatches:
    @given(rows=st.integers(2, 60), size=st.integers(1, 60), components=st.integers(1, 20))
    def test_counting_sees_every_row_and_epochs_full_batches(self, rows, size, components):
        size = min(size, rows)
        masks, outputs = make_rows(rows, components, columns=2)
        bits = np.packbits(masks, axis=1, bitorder="little")
        kept = Rows(bits, np.arange(components) % 3 < 2, outputs.astype(np.float32), rows)
        watch = Watch(torch.zeros(1, 2), torch.ones(1), 1.0, 100, together=False)
        batches = Batches(kept, 0, rows, size, CPU, seed=1, watch=watch)
        for number in range(1, COUNTING + 3):
            found = list(batches)
            positions = np.concatenate([index.numpy() for _, _, index in found])
            assert len(set(positions.tolist())) == len(positions)
            counting = number <= COUNTING
            assert len(positions) == (rows if counting else rows // size * size)
            assert counting or {len(index) for _, _, index in found} == {size}
            seen = torch.cat([masks for masks, _, _ in found]).numpy()
            np.testing.assert_array_equal(seen, masks[positions][:, kept.varied])
            np.testing.assert_array_equal(torch.cat([y for _, y, _ in found]), kept.outputs[positions])
        assert watch.epochs == 2

    def test_every_row_takes_part_sooner_or_later(self):
        rows = Rows(np.ones((25, 1), np.uint8), np.ones(8, bool), np.zeros((25, 1), np.float32), 25)
        watch = Watch(torch.zeros(8, 1), torch.ones(8), 1.0, 100, together=False)
        batches = Batches(rows, 0, 25, 10, CPU, watch=watch)
        batches.passes = COUNTING
        epochs = [tuple(np.concatenate([index.numpy() for _, _, index in batches])) for _ in range(20)]
        assert len(set(epochs)) == 20
        assert {row for epoch in epochs for row in epoch} == set(range(25))


class TestMissing:
    def test_says_what_is_missing_how_to_install_it_and_what_does_the_same(self):
        with pytest.raises(MissingDependencyError, match="cannot run here") as caught:
            FastL1().prepare(Problem.from_arrays(*make_rows()))
        text = str(caught.value)
        for part in ("CUDA", "github.com/MadryLab/fast_l1", "cupy-cuda12x", "coar.Lasso()", "coar.Ridge("):
            assert part in text

    def test_another_module_of_that_name_is_not_it(self, tmp_path, monkeypatch):
        for name in ("cupy", "fast_l1"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
        monkeypatch.delitem(sys.modules, "fast_l1.regressor", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(MissingDependencyError, match="cannot run here") as caught:
            OriginalBackend.load(torch.device("cuda"))
        assert "fast_l1" in caught.value.got


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False])
def test_the_original_solves_a_path(together):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    pytest.importorskip("fast_l1.regressor", reason="pip install git+https://github.com/MadryLab/fast_l1")
    masks, outputs = make_rows(rows=2_000, components=40, columns=24)
    problem = Problem.from_arrays(masks, outputs)
    problem.device = torch.device("cuda", 0)
    tolerance = 1e-2 if together else 10.0  # as published, start penalties are mixed up
    block = (
        FastL1(num_penalties=20, together=together, tolerance=tolerance).prepare(problem).fit(slice(0, 24))
    )
    assert np.isfinite(block.weights).all()
    for column in np.flatnonzero(block.details["kkt"] < 1e-3):
        expected = lasso(masks, outputs[:, column], block.details["penalty"][column])
        np.testing.assert_allclose(block.weights[column], expected, atol=2e-3)
    assert not together or (block.details["kkt"] < 1e-3).all()
