"""ComponentAblation against naive rebuilds, and everything that it must refuse or leave alone."""

import pickle
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset, default_collate

import coar
from coar import outputs
from coar.designs import Bernoulli
from coar.discovery import find_components
from coar.errors import ComponentError, OutputError, SettingError, TaskError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment, Runner
from coar.fingerprints import model_fingerprint
from coar.task import Task
from coar.testing import SubsetMean, check_experiment, linear_experiment
from tests import naive
from tests.cases import CASES, OUTPUT_UNITS, make_case, make_model, random_numbers
from tests.refused import refused

CPU = torch.device("cpu")
CONVENTIONS = [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7)]


def some_masks(experiment, rows=4):
    """The first keeps everything, the last nothing."""
    masks = Bernoulli(ablation_fraction=0.3, seed=2).masks(range(rows), len(experiment.components))
    masks[0], masks[-1] = True, False
    return masks


def run(experiment, masks, **options):
    return experiment.prepare(CPU, **options)(masks)


def ablation_of(model, functions, dataset=None, **task_options):
    dataset = list(random_numbers(5, 6)) if dataset is None else dataset
    task = Task(model, dataset, functions, device="cpu", **task_options)
    return ComponentAblation(task, find_components(model, kinds=["neuron"]))


class TestContract:
    @pytest.mark.parametrize("name", CASES)
    def test_small_models(self, name):
        check_experiment(make_case(name).experiment())

    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    def test_conventions(self, bias, value):
        check_experiment(make_case("grouped").experiment(bias, value))

    @pytest.mark.parametrize("experiment", [linear_experiment()[0], SubsetMean()])
    def test_toy_experiments(self, experiment):
        check_experiment(experiment)

    @pytest.mark.slow
    def test_digits(self, digits_task):
        check_experiment(ComponentAblation(digits_task, find_components(digits_task.model)))

    @pytest.mark.parametrize("experiment", [make_case("mlp").experiment(), SubsetMean()])
    def test_experiments_and_runners_have_the_methods_of_the_protocol(self, experiment):
        assert isinstance(experiment, Experiment)
        assert isinstance(experiment.prepare(CPU), Runner)


class TestRows:
    @pytest.mark.parametrize("name", CASES)
    def test_equal_naive_rebuilds_example_by_example(self, name):
        experiment = make_case(name).experiment()
        masks = some_masks(experiment)
        self.require_close(run(experiment, masks), naive.rows(experiment, masks))

    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    @pytest.mark.parametrize("name", OUTPUT_UNITS)
    def test_equal_them_in_float64_to_ten_digits(self, name, bias, value):
        case = make_case(name)
        found = run(case.experiment(bias, value), some_masks(case.experiment()), precision="float64")
        case.task.model.double()
        case.task.dataset[:] = [(inputs.double(), label) for inputs, label in case.task.dataset]
        experiment = case.experiment(bias, value)
        expected = naive.rows(experiment, some_masks(experiment))
        assert found["margin"].dtype == np.float64
        self.require_close(found, expected, tolerance=1e-10)

    def test_of_a_linear_model_are_known_in_closed_form(self):
        experiment, weights = linear_experiment()
        masks = some_masks(experiment)
        np.testing.assert_allclose(run(experiment, masks)["score"], masks @ weights.T, atol=1e-5)

    @given(st.integers(0, 10_000))
    @settings(max_examples=15)
    def test_depend_on_their_mask_alone(self, seed):
        experiment = make_case("mlp").experiment()
        runner = experiment.prepare(CPU)
        masks = Bernoulli(ablation_fraction=0.5, seed=seed).masks(range(4), len(experiment.components))
        together = runner(masks)["margin"]
        for row in (2, 0, 3, 1):
            assert np.array_equal(runner(masks[[row]])["margin"][0], together[row])

    @pytest.mark.parametrize("name", CASES)
    def test_hardly_depend_on_the_batch_size(self, name):
        experiment = make_case(name).experiment()
        masks = some_masks(experiment)
        expected = run(experiment, masks)
        for batch_size in (1, 2, 4, 5, 100):
            self.require_close(run(experiment, masks, batch_size=batch_size), expected)

    @pytest.mark.parametrize("name", CASES)
    def test_are_bit_identical_for_equal_batch_sizes(self, name):
        experiment = make_case(name).experiment()
        first, second = (experiment.prepare(CPU, batch_size=2) for _ in range(2))
        masks = some_masks(experiment)
        assert first.record() == second.record()
        for output, values in first(masks).items():
            assert np.array_equal(values, second(masks)[output]), output

    @staticmethod
    def require_close(found, expected, tolerance=1e-5):
        assert found.keys() == expected.keys()
        for output, values in found.items():
            np.testing.assert_allclose(values, expected[output], atol=tolerance, rtol=tolerance)


class TestColumns:
    def test_of_one_value_per_example_are_the_examples(self):
        experiment = make_case("several_outputs").experiment()
        assert experiment.columns["one"].names == ("d", "b", "e", "c", "a")

    def test_of_several_values_name_example_and_position(self):
        axis = make_case("several_outputs").experiment().columns["many"]
        assert axis.names[:5] == ("d:0", "d:1", "d:2", "d:3", "b:0")
        assert axis.fields["example"].tolist() == [e for e in range(5) for _ in range(4)]
        assert axis.fields["position"].tolist() == 5 * [0, 1, 2, 3]

    def test_of_ragged_values_are_as_many_as_there_are(self):
        axis = make_case("several_outputs").experiment().columns["ragged"]
        assert np.bincount(axis.fields["example"]).tolist() == [4, 2, 5, 3, 1]
        assert axis.names[-4:] == ("c:0", "c:1", "c:2", "a:0")

    def test_of_another_output_or_other_data_are_another_axis(self):
        ours = ablation_of(make_model("mlp"), {"a": first_logit, "b": first_logit})
        theirs = ablation_of(
            make_model("mlp"), {"a": first_logit}, dataset=list(random_numbers(5, 6, seed=1))
        )
        assert ours.columns["a"] != ours.columns["b"]
        assert ours.columns["a"] != theirs.columns["a"]

    def test_repeated_ids_are_refused(self):
        experiment = ablation_of(make_model("mlp"), first_logit, metadata={"id": [1, 2, 2, 3, 4]})
        with refused(ValueError, "names of columns must be unique", "'2' more than once"):
            _ = experiment.columns


def first_logit(model, batch):
    return model(batch)[:, 0]


def second_logit(model, batch):
    return model(batch)[:, 1]


class TestForwardPasses:
    """Several outputs of one batch share a forward pass, and never get each other's."""

    @staticmethod
    def counting_model():
        class Counting(nn.Module):
            count = 0

            def __init__(self):
                super().__init__()
                self.mlp = make_model("mlp")

            def forward(self, x):
                Counting.count += 1
                return self.mlp(x)

        return Counting().eval(), Counting

    @pytest.mark.parametrize(
        "functions", [{"a": first_logit}, {"a": first_logit, "b": second_logit, "c": first_logit}]
    )
    def test_one_per_batch_and_mask_however_many_outputs(self, functions):
        model, counter = self.counting_model()
        experiment = ablation_of(model, functions)
        runner = experiment.prepare(CPU, batch_size=2)
        counter.count = 0
        runner(some_masks(experiment, rows=4))
        assert counter.count == 4 * 3  # four masks, batches of 2, 2 and 1 examples

    def test_outputs_that_feed_the_model_other_inputs_do_not_share(self):
        functions = {
            f"times {factor}": lambda model, batch, factor=factor: model(batch * factor)[:, 0]
            for factor in (1, 2, 3, -1, 0)
        }
        experiment = ablation_of(make_model("mlp"), functions)
        masks = some_masks(experiment)
        TestRows.require_close(run(experiment, masks), naive.rows(experiment, masks))

    def test_an_output_may_call_parts_of_the_model(self):
        functions = {"hidden": lambda model, batch: model.hidden1(batch)}
        experiment = ablation_of(make_model("mlp"), functions)
        masks = some_masks(experiment)
        with pytest.warns(UserWarning, match="nothing reads the parameters of 1 groups .* hidden2"):
            found = run(experiment, masks)
        TestRows.require_close(found, naive.rows(experiment, masks))


class TestRecord:
    def test_says_what_the_numbers_may_depend_on(self):
        record = make_case("mlp").experiment().prepare(CPU, batch_size=3, precision="float64").record()
        assert record["device"] == "cpu"
        assert (record["batch_size"], record["precision"]) == (3, "float64")
        assert record["torch"] == torch.__version__
        assert record["threads"] == torch.get_num_threads()

    def test_the_batch_size_is_no_larger_than_the_data(self):
        assert make_case("mlp").experiment().prepare(CPU, batch_size=100).record()["batch_size"] == 5

    def test_an_unknown_precision_is_refused(self):
        with refused(SettingError, "precision", "float32 or float64", "float8"):
            make_case("mlp").experiment().prepare(CPU, precision="float8")


class TestFingerprint:
    def test_of_equal_experiments_is_equal(self):
        assert make_case("mlp").experiment().fingerprint() == make_case("mlp").experiment().fingerprint()

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (lambda case: case.task.model.hidden1.weight.data.mul_(2), "model"),
            (lambda case: case.task.dataset.reverse(), "data"),
            (lambda case: case.task.outputs.update(margin=outputs.loss), "outputs"),
        ],
    )
    def test_says_what_changed(self, change, part):
        ours, theirs = make_case("mlp"), make_case("mlp")
        change(theirs)
        found, expected = theirs.experiment().fingerprint(), ours.experiment().fingerprint()
        assert {key for key in found if found[key] != expected[key]} == {part}

    def test_knows_the_convention_and_the_components(self):
        case = make_case("mlp")
        fewer = ComponentAblation(case.task, find_components(case.task.model, ["neuron"], ["hidden1"]))
        expected = case.experiment().fingerprint()
        assert case.experiment("ablate").fingerprint()["ablation"] != expected["ablation"]
        assert fewer.fingerprint()["components"] != expected["components"]
        assert fewer.fingerprint()["model"] == expected["model"]


class TestRefused:
    @pytest.mark.parametrize(
        "function",
        [
            lambda model, batch: model(batch)[:1, 0],
            lambda model, batch: model(batch)[:, 0].mean(),
            lambda model, batch: model(batch)[:, 0].mean()[None],
            lambda model, batch: model(batch)[None],
            lambda model, batch: list(model(batch)[1:]),
            lambda model, batch: model(batch)[:, :, None],
            lambda model, batch: {"logits": model(batch)},
        ],
    )
    def test_an_output_of_another_length_that_would_broadcast(self, function):
        with refused(
            OutputError, "output 'score' has the wrong length", "[5], [5, k] or a list of 5", "broadcast"
        ):
            _ = ablation_of(make_model("mlp"), {"score": function}).columns

    def test_an_output_whose_length_depends_on_the_mask(self):
        def positive(model, batch):
            return [row[row > 0] for row in model(batch)]

        experiment = ablation_of(make_model("mlp"), {"positive": positive})
        with refused(
            OutputError, "'positive' of example", "changes its length", "values", "whatever the mask"
        ):
            run(experiment, some_masks(experiment, rows=8))

    @pytest.mark.parametrize(
        "noise", [lambda x: functional.dropout(x, 0.5, training=True), lambda x: x + torch.randn(x.shape)]
    )
    def test_a_random_model(self, noise):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.mlp = make_model("mlp")

            def forward(self, x):
                return noise(self.mlp(x))

        experiment = ablation_of(Noisy().eval(), {"a": first_logit})
        torch.manual_seed(0)  # else the outcome depends on the tests before this one
        before = global_state()
        with refused(TaskError, "output 'a'", "differs between two runs", "deterministic", "dropout"):
            _ = experiment.columns
        assert global_state() == before

    def test_a_model_changed_after_the_experiment_was_made(self):
        experiment = make_case("mlp").experiment()
        with torch.no_grad():
            experiment.task.model.head.bias[0] += 1
        with refused(
            TaskError, "task.model has changed", experiment.components.source["model"][:12], "again"
        ):
            experiment.prepare(CPU)

    def test_a_model_put_into_train_mode_afterwards(self):
        experiment = make_case("residual").experiment()
        experiment.task.model.bn2.train()
        with refused(TaskError, "train mode", "first: bn2", "model.eval()"):
            experiment.prepare(CPU)

    def test_components_of_another_model(self):
        with refused(ComponentError, "components of another model", "find_components on this very model"):
            ComponentAblation(make_case("mlp").task, make_case("residual").components)

    def test_an_unknown_convention(self):
        with refused(SettingError, "'keep' or 'ablate'", "'drop'"):
            make_case("mlp").experiment(bias="drop")

    @pytest.mark.parametrize("count", [1, 12, 14])
    def test_masks_of_another_length(self, count):
        with refused(ComponentError, "one gate per component", "(13,)", f"({count},)"):
            run(make_case("mlp").experiment(), np.zeros((2, count), dtype=bool))

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_a_batch_size_of_nothing(self, batch_size):
        with refused(SettingError, "batch_size", "at least 1", str(batch_size)):
            make_case("mlp").experiment().prepare(CPU, batch_size=batch_size)


def global_state():
    """Everything global that an engine could disturb."""
    return (
        torch.get_rng_state().numpy().tobytes(),
        pickle.dumps(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )


def model_state(model):
    """Everything about a model that an engine could disturb."""
    return (
        model_fingerprint(model),
        [(name, id(p), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, m.training, len(m._forward_hooks), len(m._parameters)) for name, m in model.named_modules()],
    )


class TestNothingElseChanges:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS[:2])
    def test_model_and_generators_are_bit_identical_after_every_call(self, name, bias, value):
        case = make_case(name)
        before = model_state(case.task.model), global_state()
        experiment = case.experiment(bias, value)
        runner = experiment.prepare(CPU, batch_size=2)
        for call in (
            lambda: experiment.columns,
            experiment.fingerprint,
            experiment.to_spec,
            lambda: repr(experiment),
            runner.check_repeatable,
            lambda: runner(some_masks(experiment)),
            runner.record,
        ):
            call()
            assert (model_state(case.task.model), global_state()) == before

    def test_a_constant_adds_no_bias_to_the_original(self):
        case = make_case("grouped")
        before = model_state(case.task.model)
        experiment = case.experiment(value=0.5)
        run(experiment, some_masks(experiment))
        assert model_state(case.task.model) == before
        assert case.task.model.grouped.bias is None

    def test_after_an_exception_inside_an_output_function_too(self):
        class OutputBrokeError(Exception):
            pass

        calls = []

        def breaks_at_the_sixth_call(model, batch):
            calls.append(len(batch))
            if len(calls) == 6:
                raise OutputBrokeError
            return first_logit(model, batch)

        experiment = ablation_of(make_model("mlp"), {"a": breaks_at_the_sixth_call})
        before = model_state(experiment.task.model), global_state()
        runner = experiment.prepare(CPU, batch_size=2)
        masks = some_masks(experiment)
        with pytest.raises(OutputBrokeError):
            runner(masks)
        assert (model_state(experiment.task.model), global_state()) == before
        # The runner is as good as new: the next rows do not remember the one that broke.
        assert np.array_equal(runner(masks)["a"], run(experiment, masks, batch_size=2)["a"])

    def test_parameters_that_cannot_be_trained_and_gradients_are_kept(self):
        case = make_case("mlp")
        case.task.model.hidden1.weight.requires_grad_(False)
        case.task.model.head.weight.grad = torch.ones_like(case.task.model.head.weight)
        before = model_state(case.task.model)
        run(case.experiment(), some_masks(case.experiment()))
        assert model_state(case.task.model) == before
        assert case.task.model.head.weight.grad.min() == 1

    def test_two_runners_do_not_disturb_each_other(self):
        experiment = make_case("residual").experiment()
        masks = some_masks(experiment)
        first, second = experiment.prepare(CPU), experiment.prepare(CPU)
        expected = first(masks)["margin"]
        second(~masks)
        assert np.array_equal(first(masks)["margin"], expected)


class TestSpec:
    def test_names_the_factory_and_what_was_selected(self):
        spec = make_case("mlp").experiment("ablate").to_spec()
        assert spec["task"] == {"factory": "tests.cases:make_task", "args": {"name": "mlp"}}
        assert spec["components"] == {"kinds": ["neuron"], "include": ["*"], "exclude": []}
        assert (spec["bias"], spec["value"]) == ("ablate", "zero")

    def test_lists_groups_that_were_made_by_hand(self):
        spec = make_case("slices").experiment().to_spec()
        assert spec["components"]["groups"][0]["module"] == "hidden2"

    def test_of_a_task_in_memory_has_no_factory(self):
        assert ablation_of(make_model("mlp"), first_logit).to_spec()["task"] == {"args": {}}


def test_outputs_that_tell_accuracy_are_known_by_name():
    functions = {"m": outputs.margin, "l": outputs.loss}
    dataset = [(x, torch.tensor(1)) for x in random_numbers(3, 6)]
    assert ablation_of(make_model("mlp"), functions, dataset).accuracy_outputs == {"m"}


class TestWhatTheRivalFound:
    """Models and tasks that once gave wrong numbers silently."""

    def test_complex_buffers_keep_their_imaginary_part(self):
        class Rotary(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 3)
                self.register_buffer("phase", torch.tensor([1j, -1j, 1 + 1j]))

            def forward(self, x):
                return (self.linear(x) * self.phase).imag

        task = small_task(Rotary())
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, ["neuron"], ["linear"]))
        untouched = experiment.prepare(CPU)(np.ones((1, 3), dtype=bool))["margin"][0]
        np.testing.assert_allclose(untouched, naive.outputs_of(task, task.model)["margin"], atol=1e-6)

    def test_a_complex_output_is_refused(self):
        task = small_task(outputs={"z": lambda model, batch: model(batch[0])[:, 0] * 1j})
        with refused(OutputError, "complex"):
            make(task).columns  # noqa: B018

    def test_an_output_function_that_changes_the_shared_result_is_refused(self):
        def in_place(model, batch):
            logits = model(batch[0])
            logits -= logits.amax(dim=1, keepdim=True)
            return logits[:, 0]

        task = small_task(outputs={"a": in_place, "logit": coar.outputs.logit})
        with refused(TaskError, "'logit'", "shared"):
            make(task).columns  # noqa: B018

    def test_output_functions_get_the_model_itself(self):
        def checks(model, batch):
            assert isinstance(model, nn.Module)
            return coar.outputs.margin(model, batch)

        task = small_task(outputs={"a": checks, "margin": coar.outputs.margin})
        values = make(task).prepare(CPU)(np.ones((1, 5), dtype=bool))
        np.testing.assert_array_equal(values["a"], values["margin"])

    def test_a_collate_function_that_sorts_is_refused(self):
        def by_size(items):
            return default_collate(sorted(items, key=lambda item: float(item[0].sum())))

        with refused(TaskError, "alone", "keep the order"):
            make(small_task(collate=by_size)).columns  # noqa: B018

    def test_named_tuples_are_batches_too(self):
        batch_type = namedtuple("batch_type", ["x", "label"])
        task = small_task(collate=lambda items: batch_type(*default_collate(items)))
        plain = make(small_task()).prepare(CPU)(np.ones((1, 5), dtype=bool))["margin"]
        np.testing.assert_array_equal(make(task).prepare(CPU)(np.ones((1, 5), dtype=bool))["margin"], plain)

    def test_components_that_overlap_are_refused(self):
        task = small_task()
        rows = coar.ComponentGroup("rows", "neuron", "0", "weight", dimension=0, count=5, bias="bias")
        columns = coar.ComponentGroup("columns", "input", "0", "weight", dimension=1, count=4, side="input")
        with refused(ComponentError, "overlap", "rows and columns"):
            coar.ComponentAblation(task, coar.ComponentSet([rows, columns]))

    def test_a_tied_bias_is_refused_where_biases_are_gated(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        model[1].bias = model[0].bias
        task = small_task(model)
        components = coar.find_components(model, ["neuron"])
        assert coar.ComponentAblation(task, components).bias == "keep"
        with refused(ComponentError, "shares its bias"):
            coar.ComponentAblation(task, components, bias="ablate")

    def test_weights_that_share_storage_are_refused(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        model[1].weight.data = model[0].weight.data
        with refused(ComponentError, "shares its weight"):
            coar.find_components(model, ["neuron"])


def small_task(model=None, **kwargs):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    data = TensorDataset(torch.randn(7, 4), torch.arange(7) % 3)
    return coar.Task(model.eval(), data, **{"outputs": {"margin": coar.outputs.margin}} | kwargs)


def make(task):
    return coar.ComponentAblation(task, coar.find_components(task.model, ["neuron"]))
