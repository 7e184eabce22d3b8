"""The engine below ComponentAblation: kept and streamed examples, layouts, lack of memory, precisions."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

import coar
from coar.components import ComponentGroup, ComponentSet
from coar.errors import OutputError, SettingError, TaskError
from coar.experiments import examples as examples_module
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import Examples, default_batch_size, example_bytes, move
from coar.task import Task
from tests import naive
from tests.cases import CASES, make_case, random_numbers
from tests.refused import refused

CPU = torch.device("cpu")
DESIGN = coar.Bernoulli(ablation_fraction=0.3, seed=2)


def masks_of(experiment, rows=4):
    masks = DESIGN.masks(range(rows), len(experiment.components))
    masks[0], masks[-1] = True, False
    return masks


def examples_of(task, **options):
    defaults = {"device": CPU, "dtype": torch.float32, "channels_last": False}
    return Examples(task, **defaults | options)


def image_task(count=7, outputs=None):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    data = [(x, torch.tensor(i % 3)) for i, x in enumerate(random_numbers(count, 2, 6, 6))]
    return Task(model.eval(), data, outputs or {"margin": coar.outputs.margin}, device="cpu")


def image_experiment(**options):
    task = image_task(**options)
    return ComponentAblation(task, coar.find_components(task.model))


class Counting(list):
    """A data set that counts how often an item is read."""

    reads = 0

    def __getitem__(self, index):
        Counting.reads += 1
        return super().__getitem__(index)


@pytest.fixture
def no_room(monkeypatch):
    """Nothing is kept: every batch is read for every mask."""
    monkeypatch.setattr(examples_module, "CACHE_BYTES", 0)


class TestKeptAndStreamed:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("batch_size", [1, 2, 100])
    def test_rows_are_the_same_bits(self, name, batch_size, monkeypatch):
        experiment = make_case(name).experiment()
        masks = masks_of(experiment)
        kept = experiment.prepare(CPU, batch_size)(masks)
        monkeypatch.setattr(examples_module, "CACHE_BYTES", 0)
        streamed = experiment.prepare(CPU, batch_size)(masks)
        assert kept.keys() == streamed.keys()
        for output, values in kept.items():
            assert np.array_equal(values, streamed[output])

    def test_kept_ones_are_read_from_the_data_set_once(self):
        task = image_task()
        task.dataset = Counting(task.dataset)
        examples = examples_of(task)
        Counting.reads = 0
        for _ in range(3):
            assert sum(count for count, _ in examples.batches(2)) == 7
        assert Counting.reads <= 7 + 1  # and one to learn their size

    @pytest.mark.usefixtures("no_room")
    def test_streamed_ones_are_read_every_time(self):
        task = image_task()
        task.dataset = Counting(task.dataset)
        examples = examples_of(task)
        Counting.reads = 0
        for _ in range(3):
            assert sum(count for count, _ in examples.batches(2)) == 7
        assert Counting.reads >= 21

    def test_the_limit_is_the_size_of_all_examples(self, monkeypatch):
        task = image_task()
        size = len(task) * (2 * 6 * 6 * 4 + 8)  # an image in float32 and a label
        assert example_bytes(task) * len(task) == size
        for room, kept in ((size, True), (size - 1, False)):
            monkeypatch.setattr(examples_module, "CACHE_BYTES", room)
            examples = examples_of(task)
            first, second = (next(iter(examples.batches(3)))[1][0] for _ in range(2))
            assert (first is second) == kept

    def test_forgotten_ones_come_in_other_batches(self):
        examples = examples_of(image_task())
        assert [count for count, _ in examples.batches(4)] == [4, 3]
        examples.forget()
        assert [count for count, _ in examples.batches(2)] == [2, 2, 2, 1]

    @pytest.mark.parametrize("when", ["before rows", "after rows"])
    def test_autograd_works_on_kept_batches(self, when):
        """They are made while rows run in inference mode, and are no inference tensors all the same."""
        runner = image_experiment().prepare(CPU)
        if when == "after rows":
            runner(np.ones((1, 7), dtype=bool))
        _, (images, labels) = next(iter(runner._batches()))
        assert not images.is_inference()
        assert not labels.is_inference()
        weight = torch.ones_like(images, requires_grad=True)
        (images * weight).sum().backward()
        torch.testing.assert_close(weight.grad, images)


class TestMove:
    def test_floating_point_numbers_take_the_dtype_and_others_stay(self):
        pair = namedtuple("pair", ["x", "y"])
        batch = {
            "a": torch.zeros(2, dtype=torch.float64),
            "b": [torch.ones(2, dtype=torch.int64), (torch.ones(1, dtype=torch.bool), "text")],
            "c": pair(torch.ones(3), None),
            "d": torch.ones(2, dtype=torch.complex64),
        }
        found = move(batch, CPU, torch.bfloat16)
        assert found["a"].dtype == torch.bfloat16
        assert found["b"][0].dtype == torch.int64
        assert found["b"][1][0].dtype == torch.bool
        assert found["b"][1][1] == "text"
        assert isinstance(found["c"], pair)
        assert found["c"].x.dtype == torch.bfloat16
        assert found["d"].dtype == torch.complex64
        assert batch["a"].dtype == torch.float64

    def test_only_images_take_the_layout(self):
        images, volumes, rows = (torch.rand(2, 3, *[4] * n) for n in (2, 3, 0))
        numbers = torch.ones(2, 3, 4, 4, dtype=torch.int64)
        found = move([images, volumes, rows, numbers], CPU, channels_last=True)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert all(found[i].is_contiguous() for i in (1, 2, 3))
        assert torch.equal(found[0], images)


class TestLayout:
    @pytest.mark.parametrize("name", ["residual", "grouped"])
    @pytest.mark.parametrize("fold", [True, False])
    def test_channels_last_gives_the_numbers_of_the_other_layout(self, name, fold):
        """The rebuilt models of the reference keep channels first."""
        experiment = make_case(name).experiment()
        masks = masks_of(experiment)
        runner = experiment.prepare(CPU, fold=fold)
        assert runner.record()["channels_last"] is True
        _, (images, _) = next(iter(runner._batches()))
        weights = [p for p in runner._model.parameters() if p.ndim == 4]
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (images, *weights))
        expected = naive.rows(experiment, masks)["margin"]
        np.testing.assert_allclose(runner(masks)["margin"], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["mlp", "conv1d", "conv3d", "several_outputs"])
    def test_models_without_images_keep_theirs(self, name):
        assert make_case(name).experiment().prepare(CPU).record()["channels_last"] is False

    def test_without_folding_untouched_outputs_are_the_models_own_bits(self):
        task = image_task()
        experiment = ComponentAblation(task, coar.find_components(task.model))
        found = experiment.prepare(CPU, fold=False)(np.ones((1, 7), dtype=bool))["margin"][0]
        task.model.to(memory_format=torch.channels_last)
        x, labels = task.batch(range(7))
        with torch.no_grad():
            expected = coar.outputs.margin(
                task.model, (x.contiguous(memory_format=torch.channels_last), labels)
            )
        np.testing.assert_array_equal(found, expected.numpy())


class TestBatchSize:
    @pytest.mark.parametrize(("side", "expected"), [(1, 256), (100, 16), (40, 128), (60, 64)])
    def test_is_a_power_of_two_by_the_size_of_an_example(self, side, expected):
        task = Task(nn.Identity().eval(), [torch.zeros(side, side)] * 3, {"x": len}, device="cpu")
        assert default_batch_size(task, CPU) == expected  # about 1 MiB, 16 to 256 examples

    @pytest.mark.parametrize(("largest", "expected"), [(1, 256), (2**20, 256), (2**25, 8), (2**30, 1)])
    def test_knows_what_the_model_makes_of_an_example(self, largest, expected):
        """Ten tokens, and logits for each of a large vocabulary."""

        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(2, 3)

            def forward(self, x):
                # As large as asked for, without that much memory.
                return self.linear(x).sum(dim=1) + torch.zeros(1).expand(largest // 4)[..., :1].sum()

        task = Task(Wide().eval(), [torch.zeros(2)] * 300, {"x": lambda m, b: m(b)}, device="cpu")
        runner = ComponentAblation(task, coar.find_components(task.model, ["neuron"], ["linear"])).prepare(
            CPU
        )
        assert default_batch_size(task, CPU, largest) == expected
        assert runner.record()["batch_size"] == expected


# ------------------------------------------------------------------------------------ out of memory


def hungry(limit, calls=None):
    """An output that needs absurdly much memory for more than `limit` examples."""

    def output(model, batch):
        images = batch[0]
        if calls is not None:
            calls.append(len(images))
        if len(images) > limit:
            torch.empty(2**50)
        return coar.outputs.margin(model, batch)

    return output


class TestOutOfMemory:
    @pytest.mark.parametrize(("limit", "batch_size", "left"), [(3, 7, 3), (1, 7, 1), (2, 4, 2), (3, 3, 3)])
    def test_smaller_batches_give_the_same_numbers(self, limit, batch_size, left):
        experiment = image_experiment(outputs={"margin": hungry(limit)})
        runner = experiment.prepare(CPU, batch_size)
        masks = masks_of(experiment)
        assert runner.record()["batch_size"] == batch_size
        found = runner(masks)["margin"]
        assert runner.record()["batch_size"] == left
        expected = image_experiment().prepare(CPU, left)(masks)["margin"]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(runner(masks)["margin"], expected)

    def test_the_first_half_of_a_pass_is_not_counted_twice(self):
        """Memory that runs out in the last batch: what came before is run again."""
        calls = []

        def output(model, batch):
            calls.append(len(batch[0]))
            if calls == [4, 3]:
                torch.empty(2**50)
            return coar.outputs.margin(model, batch)

        experiment = image_experiment(outputs={"margin": output})
        runner = experiment.prepare(CPU, 4)
        calls.clear()
        found = runner(np.ones((1, 7), dtype=bool))["margin"]
        assert calls == [4, 3, 2, 2, 2, 1]
        np.testing.assert_array_equal(
            found, image_experiment().prepare(CPU, 2)(np.ones((1, 7), dtype=bool))["margin"]
        )

    def test_halves_until_it_fits_and_stays_there(self):
        calls = []
        runner = image_experiment(outputs={"margin": hungry(2, calls)}).prepare(CPU, 7)
        calls.clear()
        runner(np.ones((2, 7), dtype=bool))
        assert calls == [7, 3, *[1] * 14]

    def test_several_outputs_share_their_passes_all_the_same(self):
        functions = {"first": hungry(3), "second": coar.outputs.loss}
        experiment = image_experiment(outputs=functions)
        runner = experiment.prepare(CPU, 7)
        masks = masks_of(experiment)
        expected = image_experiment(outputs={"second": coar.outputs.loss}).prepare(CPU, 3)(masks)["second"]
        np.testing.assert_array_equal(runner(masks)["second"], expected)

    @pytest.mark.usefixtures("no_room")
    def test_streamed_examples_come_in_smaller_batches_too(self):
        experiment = image_experiment(outputs={"margin": hungry(3)})
        runner = experiment.prepare(CPU, 7)
        masks = masks_of(experiment)
        found = runner(masks)["margin"]
        np.testing.assert_array_equal(found, image_experiment().prepare(CPU, 3)(masks)["margin"])

    def test_one_example_that_does_not_fit_is_said(self):
        limits = [7]

        def output(model, batch):
            return hungry(limits[-1])(model, batch)

        experiment = image_experiment(outputs={"margin": output})
        runner = experiment.prepare(CPU, 4)
        limits.append(0)
        said = "one example does not fit into the memory of cpu", "allocate", "precision"
        with refused(TaskError, *said):
            runner(np.ones((1, 7), dtype=bool))
        assert runner.record()["batch_size"] == 1
        with refused(TaskError, *said):
            experiment.prepare(CPU, 4)

    def test_checks_and_columns_fit_as_well(self):
        calls = []
        experiment = image_experiment(outputs={"margin": hungry(3, calls)})
        assert len(experiment.columns["margin"]) == 7
        assert max(calls) == 7
        runner = experiment.prepare(CPU, 7)
        runner.check_repeatable()
        assert runner.record()["batch_size"] == 3

    def test_a_study_is_made_and_says_how_it_was_run(self, tmp_path):
        experiment = image_experiment(outputs={"margin": hungry(3)})
        study = coar.Study.create(tmp_path / "s", experiment, DESIGN, 4)
        study.run(progress=False)
        assert study.store.read(study.items()[0]).record["batch_size"] == 3
        expected = image_experiment().prepare(CPU, 3)(study.masks)["margin"]
        np.testing.assert_array_equal(np.asarray(study.outputs["margin"]), expected)

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
            RuntimeError("out of luck"),
            ValueError("can't allocate memory"),
            KeyError("x"),
            OutputError("this one is the user's"),
        ],
    )
    def test_other_errors_are_not_swallowed(self, error):
        calls, broken = [], []

        def output(model, batch):
            calls.append(len(batch[0]))
            if broken:
                raise error
            return coar.outputs.margin(model, batch)

        runner = image_experiment(outputs={"margin": output}).prepare(CPU, 4)
        calls.clear()
        broken.append(True)
        with pytest.raises(type(error)) as caught:
            runner(np.ones((1, 7), dtype=bool))
        assert caught.value is error
        assert calls == [4]
        assert runner.record()["batch_size"] == 4
        with pytest.raises(type(error)) as caught:
            image_experiment(outputs={"margin": output}).prepare(CPU, 4)
        assert caught.value is error


# ---------------------------------------------------------------------------------------- precision


class TestPrecision:
    @pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "float16"])
    @pytest.mark.parametrize("name", CASES)
    def test_rows_are_near_those_of_float64(self, name, precision):
        experiment = make_case(name).experiment()
        masks = masks_of(experiment)
        runner = experiment.prepare(CPU, precision=precision)
        assert runner.record()["precision"] == precision
        expected = experiment.prepare(CPU, precision="float64")(masks)
        tolerance = {"float32": 1e-5, "float64": 0, "bfloat16": 0.05, "float16": 0.01}[precision]
        for output, values in runner(masks).items():
            assert values.dtype == (np.float64 if precision == "float64" else np.float32)
            scale = max(1.0, np.abs(expected[output]).max())
            np.testing.assert_allclose(values, expected[output], atol=tolerance * scale, rtol=0)

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_low_ones_are_really_used(self, precision):
        seen = []

        def output(model, batch):
            logits = model(batch[0])
            seen.append((batch[0].dtype, logits.dtype, next(model.parameters()).dtype))
            return logits[:, 0]

        experiment = image_experiment(outputs={"logit": output})
        found = experiment.prepare(CPU, precision=precision)(masks_of(experiment))["logit"]
        assert set(seen) == {(getattr(torch, precision),) * 3}
        exact = experiment.prepare(CPU)(masks_of(experiment))["logit"]
        assert not np.array_equal(found, exact)

    def test_folding_in_low_precision_is_done_before_casting(self):
        """A BatchNorm whose factors need more digits than the weights: folded late, they would be lost."""
        case = make_case("residual")
        experiment = case.experiment()
        masks = masks_of(experiment)
        folded, plain = (experiment.prepare(CPU, precision="bfloat16", fold=fold) for fold in (True, False))
        assert folded.record()["folded"] == 2
        exact = experiment.prepare(CPU, precision="float64")(masks)["margin"]
        errors = [np.abs(runner(masks)["margin"] - exact).mean() for runner in (folded, plain)]
        assert errors[0] < 2 * errors[1]
        assert all(p.dtype == torch.bfloat16 for p in folded._model.parameters())

    @pytest.mark.parametrize(("bias", "value"), [("ablate", "zero"), ("keep", 0.7)])
    def test_constants_are_in_the_dtype_of_the_model(self, bias, value):
        experiment = make_case("residual").experiment(bias, value)
        masks = masks_of(experiment)
        for fold in (True, False):
            found = experiment.prepare(CPU, precision="bfloat16", fold=fold)(masks)["margin"]
            expected = experiment.prepare(CPU, precision="float64")(masks)["margin"]
            np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())

    def test_the_model_of_the_task_keeps_its_own(self):
        experiment = make_case("residual").experiment()
        for precision in ("float64", "bfloat16"):
            experiment.prepare(CPU, precision=precision)(masks_of(experiment))
        assert {p.dtype for p in experiment.task.model.parameters()} == {torch.float32}

    def test_an_unknown_one_is_refused_with_those_there_are(self):
        with refused(SettingError, "unknown precision", "float32", "bfloat16", "float16", "auto"):
            make_case("mlp").experiment().prepare(CPU, precision="auto")


def test_groups_made_by_hand_run_in_every_precision():
    task = image_task()
    groups = [ComponentGroup("pairs", "pair", "0", "weight", 0, 2, width=2, bias="bias")]
    experiment = ComponentAblation(task, ComponentSet(groups), bias="ablate")
    rows = [
        experiment.prepare(CPU, precision=p)(np.zeros((1, 2), dtype=bool))["margin"]
        for p in ("float32", "bfloat16")
    ]
    np.testing.assert_allclose(rows[0], rows[1], atol=0.05)


def test_collate_that_makes_batches_of_another_type_runs(monkeypatch):
    """A dictionary with a list of tensors: as collate functions of libraries make them."""
    task = image_task()

    def collate(items):
        images, labels = default_collate(items)
        return {"parts": [images[:, :1], images[:, 1:]], "labels": labels}

    def output(model, batch):
        return coar.outputs.margin(model, (torch.cat(batch["parts"], dim=1), batch["labels"]))

    other = Task(task.model, task.dataset, {"margin": output}, collate=collate, device="cpu")
    rows = []
    for found in (task, other):
        experiment = ComponentAblation(found, coar.find_components(found.model))
        rows.append(experiment.prepare(CPU)(masks_of(experiment))["margin"])
        monkeypatch.setattr(examples_module, "CACHE_BYTES", 0)
        rows.append(experiment.prepare(CPU)(masks_of(experiment))["margin"])
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], rtol=1e-5, atol=1e-6)
