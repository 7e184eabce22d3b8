"""What gate gradients refuse, in memory and as a study, and what they say: nothing is left behind."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.designs import FixedSize
from coar.errors import (
    CoarError,
    CoarWarning,
    ComponentError,
    OutputError,
    SettingError,
    SpecError,
    StudyError,
    TaskError,
)
from coar.gradients import GateGradientStudy, gate_gradients, plan_gate_gradients
from coar.gradients.draws import GateDraws
from coar.gradients.schedule import Schedule
from coar.gradients.weights import classes_of
from coar.spec import StudySpec
from coar.studies import open_study
from coar.testing import SubsetMean
from tests.gate_networks import FRACTION, OPTIONS, make_experiment
from tests.refused import refused


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(12)


def experiment_of(model, output):
    examples = list(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    task = coar.Task(model, examples, {"value": output}, device="cpu")
    return coar.ComponentAblation(task, coar.find_components(model, kinds=["neuron"]))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


def first(model, batch):
    return model(batch)[:, 0]


class NoGrad(nn.Module):
    """A forward pass as one writes it for predictions."""

    def __init__(self, decorator):
        super().__init__()
        self.inner, self.decorator = network(), decorator

    def forward(self, x):
        with self.decorator():
            return self.inner(x)


class TestNoGradient:
    @pytest.fixture
    def refuses(self, tmp_path):
        def check(experiment, kind, *words):
            for call in (
                lambda: gate_gradients(experiment, FRACTION, passes=20, progress=False),
                lambda: plan_gate_gradients(experiment, FRACTION),
                lambda: GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, passes=20),
            ):
                with refused(kind, *words):
                    call()
            assert list(tmp_path.iterdir()) == []

        return check

    @pytest.mark.parametrize("decorator", [torch.no_grad, torch.inference_mode])
    def test_a_forward_without_gradients(self, refuses, decorator):
        words = ("gradients do not reach inner.0.weight", "no_grad", "regression")
        refuses(experiment_of(NoGrad(decorator).eval(), first), ComponentError, *words)

    @pytest.mark.parametrize(
        "output",
        [
            lambda model, batch: model(batch)[:, 0].detach(),
            lambda model, batch: model(batch).argmax(dim=1).float(),
            lambda model, batch: (model(batch)[:, 0] > 0).double(),
        ],
    )
    def test_outputs_without_gradients_send_to_regression(self, refuses, output):
        refuses(experiment_of(network(), output), OutputError, "no gradient", "regression", "coar.Study")

    def test_of_several_outputs_the_one_without_is_named(self, tmp_path):
        outputs = {"value": first, "hit": lambda model, batch: (model(batch)[:, 0] > 0).float()}
        whole = experiment_of(network(), first)
        task = coar.Task(whole.task.model, whole.task.dataset, outputs, device="cpu")
        experiment = coar.ComponentAblation(task, whole.component_set)
        with refused(OutputError, "'hit' has no gradient"):
            GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, passes=20)
        study = GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, passes=20, outputs=["value"])
        assert study.run(progress=False).complete

    def test_another_experiment(self, refuses):
        refuses(SubsetMean(), SettingError, "component ablation", "SubsetMean", "run a study and fit it")


class TestNotFinite:
    def test_example_component_and_output_are_named(self, tmp_path):
        """The root of a sum that is 0 for the third example alone: its derivative is infinite there."""

        def root(model, batch):
            values = model(batch)[:, 0]
            third = (batch == examples[2]).all(dim=1)
            return torch.cat(
                [(v * 0).sqrt() if here else v for v, here in zip(values[:, None], third, strict=True)]
            )

        experiment = experiment_of(network(), root)
        examples = torch.stack([experiment.task.dataset[i] for i in range(6)])
        words = ("'value' is not finite", "example 2", "'2[3]'", "sqrt")
        with refused(OutputError, *words):
            gate_gradients(experiment, FRACTION, passes=20, batch_size=2, progress=False)
        study = GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, passes=20, batch_size=2)
        with refused(OutputError, *words):
            study.run(progress=False)
        assert study.status().files > 0  # those of other examples are kept
        assert not study.status().complete

    def test_the_last_layer_concerned_is_named(self):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 1)

            def forward(self, x):
                hidden = torch.tanh(self.first(x))
                hidden = (hidden * 0).sum(dim=1, keepdim=True).sqrt() + hidden  # NaN for what is before
                return self.head(torch.tanh(self.second(hidden)))

        experiment = experiment_of(Root().eval(), lambda model, batch: model(batch)[:, 0])
        with refused(OutputError, "not finite", "'first["):
            gate_gradients(experiment, FRACTION, passes=20, progress=False)


class TestSettings:
    @pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), "0.1", None, True])
    def test_fractions(self, tmp_path, experiment, fraction):
        calls = (
            lambda: gate_gradients(experiment, fraction, output="value"),
            lambda: GateGradientStudy.create(tmp_path / "s", experiment, fraction),
            lambda: plan_gate_gradients(experiment, fraction),
        )
        for call in calls:
            with refused(CoarError, "ablation_fraction"):
                call()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "wrong",
        [
            {"passes": 0},
            {"passes": "many"},
            {"passes": 2.5},
            {"passes": True},
            {"target_correlation": 1.0},
            {"target_correlation": 0.0},
            {"target_error": 0.0},
            {"target_error": -1.0},
            {"target_error": float("inf")},
            {"target_error": "1"},
            {"target_error": True},
            {"target_correlation": "x"},
            {"target_correlation": 2},
            {"target_correlation": -1},
            {"batch_size": 0},
            {"batch_size": "x"},
            {"precision": "int8"},
            {"examples": 5},
            {"examples": []},
            {"examples": [0, 0]},
            {"examples": [-1]},
            {"examples": [12]},
            {"examples": [1.7]},
            {"examples": "12"},
            {"examples": np.array([True] * 12)},
        ],
    )
    def test_what_makes_no_sense_is_named(self, tmp_path, experiment, wrong):
        (name,) = wrong
        with refused(SettingError, name):
            gate_gradients(experiment, FRACTION, output="value", progress=False, **wrong)
        with refused(SettingError, name):
            plan_gate_gradients(experiment, FRACTION, **wrong)
        with refused(SettingError, name):
            GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, **(OPTIONS | wrong))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"target_correlation": 2}, ("above 0 and below 1", "2", "0.95")),
            ({"target_error": "1"}, ("above 0", "'1'", "output units")),
            ({"pool": "yes"}, ("pool", "True or False", "'yes'")),
            ({"directory": 5}, ("directory", "a path", "5")),
            ({"precision": "int8"}, ("precision", "float32 or", "bfloat16", "'int8'")),
            ({"precision": None}, ("precision", "None")),
            ({"examples": 5}, ("positions from 0 to 11", "5", "[0, 1, 2]")),
        ],
    )
    def test_in_memory_says_what_was_expected_and_got(self, experiment, wrong, words):
        with refused(SettingError, *words, "expected:", "got:", "to do:"):
            gate_gradients(experiment, FRACTION, output="value", progress=False, **wrong)

    @pytest.mark.parametrize(
        ("label", "words"),
        [
            (["a", None, "b", "a", "b", None], ("2 of 6", "1, 5", '"unlabelled"', "pool=False")),
            ([0.0, 1.0, 0.0, float("nan"), 1.0, 0.0], ("1 of 6", "NaN", "3")),
            (np.array(["a", np.nan, "b", "a", "b", "b"], object), ("1 of 6", "NaN", "1")),
            (np.array(["a", 1, "b", "a", "b", "b"], object), ("one class per example", "one type")),
            ([{"a": 1}, {"b": 1}] * 3, ("one class per example",)),
        ],
    )
    def test_pooling_needs_labels_and_says_so_before_any_pass(self, tmp_path, label, words):
        whole = experiment_of(network(), first)
        task = coar.Task(
            whole.task.model, whole.task.dataset, {"value": first}, metadata={"label": label}, device="cpu"
        )
        experiment = coar.ComponentAblation(task, whole.component_set)
        for more in ({}, {"directory": tmp_path / "s"}):
            with refused(SettingError, *words):
                gate_gradients(experiment, FRACTION, passes=20, pool=True, progress=False, **more)
        assert list(tmp_path.iterdir()) == []
        assert gate_gradients(experiment, FRACTION, passes=20, progress=False).provenance["pooled"] is False

    def test_labels_of_pandas_that_are_missing_are_found(self):
        pandas = pytest.importorskip("pandas")
        axis = experiment_of(network(), first).columns["value"]
        frame = pandas.DataFrame({"label": pandas.array([1, 2, None, 1, 2, 2], "Int64")})
        with refused(SettingError, "1 of 6", "2"):
            classes_of(frame, axis)
        frame = pandas.DataFrame({"label": pandas.Categorical(["b", "a", "a", "b", "c", "a"])})
        assert classes_of(frame, axis).tolist() == [1, 0, 0, 1, 2, 0]

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"batch_size": 0}, ("batch_size",)),
            ({"precision": "float8"}, ("precision", "bfloat16")),
            ({"outputs": ["loss"]}, ("loss", "both", "value")),
            ({"seed": -1}, ("seed",)),
        ],
    )
    def test_of_a_study(self, tmp_path, experiment, wrong, words):
        with refused(SettingError, *words):
            GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, **(OPTIONS | wrong))
        assert list(tmp_path.iterdir()) == []

    def test_whole_numbers_of_numpy_are_whole_numbers(self, tmp_path, experiment):
        options = {"passes": np.int64(20), "examples": np.arange(3), **OPTIONS}
        study = GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, **options)
        assert study.run(progress=False).examples == 3

    def test_in_memory_needs_no_executor_and_has_limits(self, experiment):
        with refused(SettingError, "executor", "directory=", "to do:", "leave executor= away"):
            gate_gradients(experiment, FRACTION, output="value", executor=coar.Serial())
        large = make_experiment(300, width=60)
        with refused(SettingError, "do not fit in memory", "directory=", "examples="):
            gate_gradients(large, FRACTION, output="value", memory="1 MiB")
        with refused(SettingError, "which output?", "value, both"):
            gate_gradients(experiment, FRACTION)

    def test_a_study_needs_an_executor(self, tmp_path, experiment):
        study = GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, passes=20)
        with refused(SettingError, "not an executor", "coar.Serial"):
            study.run("serial")

    @pytest.mark.parametrize(
        "layer", [nn.Dropout(0.5), nn.BatchNorm1d(6)], ids=["dropout", "batch normalisation"]
    )
    def test_train_mode(self, layer):
        model = nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(6, 3))
        with refused(TaskError, "eval"):
            experiment_of(model, first)
        experiment = experiment_of(model.eval(), first)
        model.train()
        with refused(TaskError, "train"):
            gate_gradients(experiment, FRACTION, passes=20, progress=False)


class TestLargeRounds:
    """At a tiny fraction the least that there can be is far more than was asked for."""

    @pytest.mark.parametrize(
        ("fraction", "options", "spent", "asked"),
        [
            (0.001, {"passes": 20}, "1,000", "20"),  # two replicates
            (0.001, {"passes": 20, "target_error": 0.1}, "2,000", "20"),
            (0.001, {"passes": "auto"}, "2,000", "400"),
            (0.999, {"passes": 300}, "1,000", "300"),
        ],
    )
    def test_warns_of_what_will_be_spent(self, fraction, options, spent, asked):
        with pytest.warns(
            CoarWarning, match=f"{spent} passes will be made, not {asked}: .* 500 passes"
        ) as said:
            schedule = Schedule(GateDraws(fraction, 0, 8), **options)
        assert len(said) == 1
        assert f"{schedule.passes(schedule.most):,}" == spent

    @pytest.mark.parametrize(
        ("fraction", "passes"), [(0.001, 400), (0.002, "auto"), (0.05, 1), (0.1, 1), (0.02, 20)]
    )
    def test_up_to_three_times_or_few_are_no_surprise(self, fraction, passes):
        Schedule(GateDraws(fraction, 0, 8), passes)  # warnings are errors

    def test_one_warning_is_shown_when_a_study_is_made_and_none_when_it_goes_on(self, tmp_path, experiment):
        options = {"passes": 1, "outputs": ["value"], "examples": [0]}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")  # as users have it
            study = GateGradientStudy.create(tmp_path / "s", experiment, 0.01, **options)
        assert ["100 passes will be made, not 1" in str(one.message) for one in said] == [True]
        assert study.schedule.passes(study.schedule.most) == 100
        assert GateGradientStudy.open(study.directory).schedule.most == 1


class TestSpecs:
    @pytest.fixture
    def study(self, tmp_path, experiment):
        return GateGradientStudy.create(tmp_path / "gates", experiment, FRACTION, passes=20)

    @pytest.fixture
    def rows(self, tmp_path, experiment):
        design = coar.Bernoulli(ablation_fraction=FRACTION, seed=0)
        return coar.Study.create(tmp_path / "rows", experiment, design, 10)

    def test_another_spec_is_named(self, tmp_path, experiment, study):
        with refused(StudyError, "another spec", "design.seed: 1, not 0"):
            GateGradientStudy.create(study.directory, experiment, FRACTION, passes=20, seed=1)
        with refused(StudyError, "another spec", "ablation_fraction: 0.2, not 0.1"):
            GateGradientStudy.create(study.directory, experiment, 0.2, passes=20)
        with refused(StudyError, "another spec", "examples"):
            GateGradientStudy.create(study.directory, experiment, FRACTION, passes=20, examples=[1])
        with refused(StudyError, "another spec", "precision: bfloat16, not float32"):
            GateGradientStudy.create(study.directory, experiment, FRACTION, passes=20, precision="bfloat16")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with refused(StudyError, "not empty"):
            GateGradientStudy.create(tmp_path / "full", experiment, FRACTION)

    def test_each_kind_refuses_the_folder_of_the_other(self, study, rows):
        with refused(StudyError, "another kind", "rows of random ablations", "coar.GateGradientStudy.open"):
            coar.Study.open(study.directory)
        with refused(StudyError, "another kind", "sums of gate gradients", "coar.Study.open"):
            GateGradientStudy.open(rows.directory)
        assert type(open_study(study.directory)) is GateGradientStudy
        assert type(open_study(rows.directory)) is coar.Study

    def test_a_spec_of_rows_makes_no_gate_study(self, tmp_path, study, rows):
        for folder in (tmp_path / "new", study.directory):
            with refused(StudyError, "another kind", "estimator 'rows'", "coar.Study.from_spec"):
                GateGradientStudy.from_spec(folder, rows.spec)
        assert not (tmp_path / "new").exists()

    def test_designs_of_dependent_ablations(self, tmp_path, study):
        design = FixedSize(ablation_fraction=0.2, seed=0)
        for other in (design, coar.LeaveOneOut()):
            spec = study.spec.model_copy(update={"design": other})
            with refused(SpecError, "independent ablations", '"name": "bernoulli"', repr(other.name)):
                GateGradientStudy.from_spec(tmp_path / "new", spec)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("part", "value", "word"),
        [
            ("outputs", {"value": {"dtype": "float16"}}, "float32"),
            ("outputs", {"loss": {"dtype": "float32"}}, "loss"),
            ("execution", {"compiled": True}, "not compiled"),
        ],
    )
    def test_execution_and_outputs(self, tmp_path, study, part, value, word):
        spec = StudySpec.from_json(study.spec.to_json() | {part: value})
        with refused(SettingError, word):
            GateGradientStudy.from_spec(tmp_path / "new", spec)
        assert not (tmp_path / "new").exists()

    def test_unknown_keys(self, study):
        value = study.spec.to_json()
        value["estimator"]["pases"] = 3
        with refused(SpecError, "estimator.pases", "did you mean 'passes'"):
            StudySpec.from_json(value)

    def test_a_gate_study_is_not_fitted(self, study):
        with refused(SettingError, "GateGradientStudy", "study.attributions()"):
            coar.fit(study)

    def test_another_model_is_refused(self, study):
        with refused(CoarError, "another"):
            GateGradientStudy.open(study.directory, make_experiment(12, width=7))

    def test_another_process_makes_the_experiment_again(self, study):
        assert GateGradientStudy.open(study.directory).run(progress=False).complete
