"""The check that a low precision must pass, and how studies keep to it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import coar
from coar.creation import plan
from coar.designs import Bernoulli, FixedSize, LeaveOneOut
from coar.errors import SettingError, StudyError
from coar.experiments.ablation import ComponentAblation
from coar.precision import ROWS, choose_precision, compare_precision
from coar.spec import ExecutionSpec
from coar.task import Task
from tests.cases import make_case, random_numbers
from tests.refused import refused

CPU = torch.device("cpu")
DESIGN = Bernoulli(ablation_fraction=0.3, seed=2)


class Difference(nn.Module):
    """A small difference of large numbers: what the units do is below the last digit of bfloat16."""

    def __init__(self, size=1000.0):
        super().__init__()
        self.hidden, self.size = nn.Linear(6, 8, bias=False), size
        self.hidden.weight.data = random_numbers(8, 6) / 10

    def forward(self, x):
        return (self.hidden(x).sum(dim=1) + self.size) - self.size


def score(model, batch):
    return model(batch)


def difference(size=1000.0, outputs=score):
    task = Task(Difference(size).eval(), list(random_numbers(20, 6)), outputs, device="cpu")
    return ComponentAblation(task, coar.find_components(task.model, ["neuron"], ["hidden"]))


def by_hand(experiment, design, precision, rows):
    """Correlation of every column by the textbook, the worst output's median and 5th percentile."""
    masks = design.masks(range(rows), len(experiment.components))
    exact, coarse = (experiment.prepare(CPU, precision=p)(masks) for p in ("float32", precision))
    medians, lows = [], []
    for name in exact:
        scores = []
        for column in range(exact[name].shape[1]):
            ours, theirs = (rows[name][:, column].astype(float) for rows in (exact, coarse))
            if np.ptp(ours) == 0:
                scores.append(1.0 if np.ptp(theirs) == 0 else -1.0)
            elif np.ptp(theirs) == 0:
                scores.append(-1.0)
            else:
                scores.append(np.corrcoef(ours, theirs)[0, 1])
        medians.append(np.median(scores))
        lows.append(np.percentile(scores, 5))
    return min(medians), min(lows)


class TestCompare:
    @pytest.mark.parametrize("name", ["residual", "mlp", "grouped", "several_outputs"])
    @pytest.mark.parametrize("precision", ["bfloat16", "float16", "float64"])
    @pytest.mark.parametrize("design", [DESIGN, FixedSize(ablation_fraction=0.3, seed=1), LeaveOneOut()])
    def test_is_what_correlations_by_hand_give(self, name, precision, design):
        experiment = make_case(name).experiment()
        rows = min(32, len(experiment.components)) if isinstance(design, LeaveOneOut) else 32
        found = compare_precision(experiment, design, precision, CPU)
        median, low = by_hand(experiment, design, precision, rows)
        assert found["precision"] == precision
        assert found["rows"] == rows
        assert found["median"] == pytest.approx(median, abs=1e-9)
        assert found["percentile_5"] == pytest.approx(low, abs=1e-9)
        assert found["passes"] == (median >= 0.999 and low >= 0.99)

    def test_takes_at_least_32_rows(self):
        assert ROWS >= 32

    def test_float32_passes_against_itself(self):
        for name in ("residual", "several_outputs"):
            found = compare_precision(make_case(name).experiment(), DESIGN, "float32", CPU)
            assert (found["median"], found["percentile_5"]) == pytest.approx((1, 1))
            assert found["passes"]

    @pytest.mark.parametrize("batch_size", [1, 3, None])
    def test_hardly_depends_on_the_batch_size(self, batch_size):
        experiment = make_case("residual").experiment()
        found = compare_precision(experiment, DESIGN, "bfloat16", CPU, batch_size)
        expected = compare_precision(experiment, DESIGN, "bfloat16", CPU)
        assert found["median"] == pytest.approx(expected["median"], abs=1e-3)

    def test_the_worst_output_decides(self):
        """One output is a small difference of large numbers; the other is not."""

        def plain(model, batch):
            return model.hidden(batch).sum(dim=1)

        found = compare_precision(
            difference(outputs={"plain": plain, "difference": score}), DESIGN, "bfloat16", CPU
        )
        assert compare_precision(difference(outputs={"plain": plain}), DESIGN, "bfloat16", CPU)["passes"]
        assert not found["passes"]

    def test_a_few_bad_columns_are_too_many(self):
        """Half the columns and more are fine; one in ten is a small difference of large numbers."""

        def output(model, batch):
            large = 1e4 * (batch[:, 0] > 1.2).to(batch.dtype)
            return (model.hidden(batch).sum(dim=1) + large) - large

        experiment = difference(outputs={"x": output})
        bad = sum(float(x[0]) > 1.2 for x in experiment.task.dataset)
        assert 1 <= bad <= 4
        found = compare_precision(experiment, DESIGN, "bfloat16", CPU)
        assert found["median"] > 0.999
        assert found["percentile_5"] < 0.99
        assert not found["passes"]

    def test_the_mean_of_a_column_does_not_help(self):
        """With their mean, two nearly constant columns would look alike."""
        found = compare_precision(difference(), DESIGN, "bfloat16", CPU)
        assert found["median"] < 0.9

    @given(st.integers(1, 5))
    @settings(max_examples=5)
    def test_a_column_that_no_mask_moves_is_right(self, still):
        """Examples of zeros: the units emit their biases, which stay."""
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)).eval()
        for seed, parameter in enumerate(model.parameters()):
            parameter.data = random_numbers(*parameter.shape, seed=seed)
        data = [torch.zeros(4)] * still + list(random_numbers(6 - still, 4))
        task = Task(model, data, {"x": lambda m, b: m(b)[:, 0]}, device="cpu")
        experiment = ComponentAblation(task, coar.find_components(model, ["neuron"], ["0"]))
        found = compare_precision(experiment, DESIGN, "bfloat16", CPU)
        median, low = by_hand(experiment, DESIGN, "bfloat16", 32)
        assert (found["median"], found["percentile_5"]) == pytest.approx((median, low), abs=1e-9)
        if still > 3:
            assert found["median"] == 1.0

    def test_a_column_that_moves_in_low_precision_alone_is_wrong(self):
        """Masks that float32 does not notice."""

        def output(model, batch):
            values = model(batch)
            return values * (values.dtype == torch.bfloat16)

        found = compare_precision(difference(1.0, {"x": output}), DESIGN, "bfloat16", CPU)
        assert found["median"] == -1.0

    def test_a_column_that_low_precision_does_not_move_is_wrong(self):
        found = compare_precision(difference(1e5), DESIGN, "bfloat16", CPU)
        assert found["median"] == -1.0
        assert not found["passes"]

    def test_numbers_that_overflow_are_wrong_and_warn_nobody(self):
        """Above 65504 there is nothing in float16: infinity, or the difference of two infinities."""

        def large(model, batch):
            return model.hidden(batch).sum(dim=1) * 1e5 + 1e6

        for experiment in (difference(1e5), difference(outputs={"large": large})):
            found = compare_precision(experiment, DESIGN, "float16", CPU)
            assert found["median"] == found["percentile_5"] == -1.0
            assert not found["passes"]


class Recording:
    """An experiment that says which precisions it was prepared for."""

    def __init__(self, experiment):
        self.experiment, self.prepared = experiment, []
        self.components = experiment.components

    def prepare(self, device, batch_size=None, precision="float32"):
        self.prepared.append((str(device), batch_size, precision))
        return self.experiment.prepare(CPU, batch_size, precision)


class TestChoose:
    def test_auto_on_the_cpu_is_float32_and_runs_nothing(self):
        experiment = Recording(difference())
        assert choose_precision(experiment, DESIGN, CPU) == ("float32", None)
        assert experiment.prepared == []

    @pytest.mark.parametrize("asked", ["float32", "float64"])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_high_ones_are_taken_unchecked(self, asked, device):
        experiment = Recording(difference())
        assert choose_precision(experiment, DESIGN, torch.device(device), asked=asked) == (asked, None)
        assert experiment.prepared == []

    @pytest.mark.parametrize("asked", ["bfloat16", "float16"])
    def test_a_low_one_that_passes_comes_with_its_check(self, asked):
        experiment = Recording(smooth())
        found, check = choose_precision(experiment, DESIGN, CPU, 5, asked)
        assert found == asked
        assert check == compare_precision(smooth(), DESIGN, asked, CPU, 5)
        assert check["passes"]
        assert {entry[1:] for entry in experiment.prepared} == {(5, "float32"), (5, asked)}

    @pytest.mark.parametrize("asked", ["bfloat16", "float16"])
    def test_a_low_one_that_fails_is_refused_with_figures(self, asked):
        check = compare_precision(difference(3000.0), DESIGN, asked, CPU)
        figures = f"{check['median']:.5f} and {check['percentile_5']:.5f}"
        words = [f"{asked} is too coarse", "0.999", "0.99", figures, "32 rows", 'precision="float32"']
        with refused(SettingError, *words):
            choose_precision(difference(3000.0), DESIGN, CPU, asked=asked)

    def test_auto_on_a_gpu_falls_back_to_float32_where_bfloat16_fails(self):
        """The experiment here runs on the CPU whatever it is told: what is tested is the choice."""
        experiment = Recording(difference())
        found, check = choose_precision(experiment, DESIGN, torch.device("cuda"))
        assert found == "float32"
        assert check == compare_precision(difference(), DESIGN, "bfloat16", CPU)
        assert not check["passes"]
        assert [entry[2] for entry in experiment.prepared] == ["float32", "bfloat16"]

    def test_auto_on_a_gpu_is_bfloat16_where_it_passes(self):
        found, check = choose_precision(Recording(smooth()), DESIGN, torch.device("cuda"))
        assert found == "bfloat16"
        assert check["passes"]


def smooth():
    """One unit per component, and outputs that are their sum: low precision tells the same story."""

    def total(model, batch):
        return model(batch).float().sum(dim=1)

    model = nn.Sequential(nn.Linear(6, 8, bias=False)).eval()
    model[0].weight.data = random_numbers(8, 6)
    task = Task(model, list(random_numbers(20, 6, seed=1)), {"total": total}, device="cpu")
    return ComponentAblation(task, coar.find_components(model, ["neuron"], ["0"]))


def make(path, experiment, precision, num_rows=6):
    execution = ExecutionSpec(precision=precision)
    return coar.Study.create(path, experiment, DESIGN, num_rows, rows_per_shard=3, execution=execution)


class TestStudies:
    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_keep_the_check_and_run_in_what_passed(self, tmp_path, precision):
        study = make(tmp_path / "s", smooth(), precision)
        study.run(progress=False)
        provenance = json.loads((tmp_path / "s/provenance.json").read_text())
        assert provenance["precision"] == precision
        assert provenance["precision_check"] == compare_precision(smooth(), DESIGN, precision, CPU)
        assert provenance["record"]["precision"] == precision
        assert {study.store.read(item).record["precision"] for item in study.items()} == {precision}
        rows = smooth().prepare(CPU, precision=precision)(study.masks)["total"]
        np.testing.assert_array_equal(np.asarray(study.outputs["total"]), rows)
        exact = smooth().prepare(CPU)(study.masks)["total"]
        assert not np.array_equal(rows, exact)

    @pytest.mark.parametrize("precision", ["auto", "float32", "float64"])
    def test_without_a_check_say_so(self, tmp_path, precision):
        study = make(tmp_path / "s", smooth(), precision)
        expected = "float32" if precision == "auto" else precision
        assert study.provenance["precision"] == expected
        assert study.provenance["precision_check"] is None

    def test_one_that_is_too_coarse_leaves_no_folder(self, tmp_path):
        with refused(SettingError, "bfloat16 is too coarse for this study"):
            make(tmp_path / "s", difference(), "bfloat16")
        assert list(tmp_path.iterdir()) == []

    def test_opened_again_goes_on_in_its_precision(self, tmp_path):
        experiment = smooth()
        make(tmp_path / "s", experiment, "bfloat16")
        for again in ("auto", "bfloat16"):
            study = make(tmp_path / "s", experiment, again)
            assert study.provenance["precision"] == "bfloat16"
        with pytest.raises(StudyError, match=r"execution\.precision: float32, not bfloat16"):
            make(tmp_path / "s", experiment, "float32")
        study = coar.Study.open(tmp_path / "s", experiment)
        study.run(progress=False)
        assert study.store.read(study.items()[0]).record["precision"] == "bfloat16"

    def test_more_rows_are_in_the_same_precision(self, tmp_path):
        study = make(tmp_path / "s", smooth(), "bfloat16")
        study.extend(10)
        study.run(progress=False)
        records = [study.store.read(item).record for item in study.items()]
        assert sum(map(len, study.items())) == 10
        assert {record["precision"] for record in records} == {"bfloat16"}

    def test_a_plan_is_refused_like_the_study(self):
        with refused(SettingError, "bfloat16 is too coarse"):
            plan(difference(), DESIGN, 5, execution=ExecutionSpec(precision="bfloat16"))
