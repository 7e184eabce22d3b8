import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from coar import outputs
from coar.errors import SettingError, TaskError
from coar.task import Task, require_runnable, resolve_device
from tests.cases import make_task
from tests.refused import refused

INPUTS = torch.arange(12.0).view(6, 2)
DATASET = TensorDataset(INPUTS, torch.tensor([0, 1, 0, 1, 0, 1]))


def small_task(model=None, dataset=DATASET, **options):
    return Task(nn.Linear(2, 2).eval() if model is None else model, dataset, device="cpu", **options)


class Changing:
    """Item 3 is another one every time it is read."""

    def __init__(self, changing=3):
        self.changing, self.reads = changing, 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.reads += 1
        return INPUTS[index] + (self.reads if index == self.changing else 0)


class TestModel:
    @pytest.mark.parametrize("part", ["", "bn1"])
    def test_train_mode_is_refused_wherever_it_is(self, part):
        task = make_task("residual")
        task.model.get_submodule(part).training = True
        name = part or "the model itself"
        with refused(
            TaskError, "train mode", "eval mode", f"1 modules in train mode, first: {name}", "eval()"
        ):
            small_task(task.model)

    @pytest.mark.parametrize("model", [None, "resnet", lambda x: x])
    def test_what_is_not_a_model_is_refused(self, model):
        with refused(TaskError, "not a torch model", "nn.Module", type(model).__name__):
            Task(model, DATASET)

    def test_is_kept_as_it_is(self):
        model = nn.Linear(2, 2).eval()
        assert small_task(model).model is model


class TestRunnable:
    """What no engine can run is refused when the task is made, not by a row."""

    def test_a_model_without_weights_is_refused(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).eval()
        with refused(TaskError, "has no weights", "0.weight on the meta device", "load_state_dict"):
            small_task(model)

    @pytest.mark.parametrize("part", ["1.weight", "1.running_mean"])
    def test_one_parameter_or_buffer_without_numbers_is_enough(self, part):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
        module, name = model.get_submodule(part[0]), part[2:]
        tensors = module._parameters if name == "weight" else module._buffers
        empty = torch.empty(3, device="meta")
        tensors[name] = nn.Parameter(empty) if name == "weight" else empty
        with refused(TaskError, "has no weights", f"{part} on the meta device"):
            small_task(model)

    def test_a_model_on_two_devices_is_refused(self):
        model = nn.Linear(2, 2).eval()
        with FakeTensorMode():  # torch's own stand-ins: they know where they would lie
            model.register_buffer("far", torch.empty(3, device="cuda:1"))
        with refused(TaskError, "several devices", "cpu, cuda:1", "one device"):
            small_task(model)

    def test_a_quantised_model_is_refused(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that quantisation moves to another package
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).eval()
        with refused(TaskError, "quantised", "floating-point weights", "0 is Linear", "unquantised"):
            small_task(model)

    def test_a_model_without_parameters_and_one_in_half_precision_run(self):
        for model in (nn.Identity(), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2, dtype=torch.complex64)):
            assert require_runnable(model.eval()) is model


class TestDataset:
    @pytest.mark.parametrize("shuffle", [False, True])
    def test_a_loader_is_refused_with_the_way_out(self, shuffle):
        with refused(TaskError, "DataLoader", "map-style", "loader.dataset", "collate="):
            small_task(dataset=DataLoader(DATASET, shuffle=shuffle))

    @pytest.mark.parametrize("dataset", [iter(INPUTS), (x for x in INPUTS), {1, 2}, 3, None])
    def test_what_cannot_be_indexed_is_refused(self, dataset):
        with refused(TaskError, "cannot be indexed", "dataset[i]", type(dataset).__name__):
            small_task(dataset=dataset)

    def test_an_iterable_dataset_is_refused(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(INPUTS)

        with refused(TaskError, "cannot be indexed", "Stream"):
            small_task(dataset=Stream())

    def test_an_empty_one_is_refused(self):
        with refused(TaskError, "empty", "at least one"):
            small_task(dataset=[])

    def test_an_item_that_changes_between_reads_is_named(self):
        with refused(TaskError, "item 3", "same example every time", "two different", "augmentation"):
            small_task(dataset=Changing()).data_fingerprint()

    def test_an_item_that_stays_is_not(self):
        assert small_task(dataset=Changing(changing=None)).data_fingerprint()


class TestBatches:
    @pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 100])
    def test_go_through_all_examples_in_order_once(self, batch_size):
        batches = list(small_task().batches(batch_size))
        assert np.concatenate([indices for indices, _ in batches]).tolist() == [0, 1, 2, 3, 4, 5]
        assert torch.equal(torch.cat([inputs for _, (inputs, _) in batches]), INPUTS)
        assert max(len(indices) for indices, _ in batches) == min(batch_size, 6)

    def test_collate_decides_what_a_batch_is(self):
        task = small_task(collate=lambda items: {"count": len(items), "first": items[0][0]})
        batch = task.batch(np.array([4, 5]))
        assert batch["count"] == 2
        assert batch["first"].tolist() == [8.0, 9.0]


class TestMetadata:
    def test_a_dictionary_becomes_a_table(self):
        task = small_task(metadata={"label": [0, 1, 0, 1, 0, 1], "id": list("abcdef")})
        assert isinstance(task.metadata, pd.DataFrame)
        assert task.example_ids() == list("abcdef")

    def test_a_table_is_kept(self):
        table = pd.DataFrame({"label": range(6)})
        assert small_task(metadata=table).metadata is table

    def test_examples_without_ids_are_numbered(self):
        assert small_task().example_ids() == list("012345")
        assert small_task(metadata={"label": [0] * 6}).example_ids() == list("012345")

    def test_another_length_is_refused(self):
        with refused(TaskError, "metadata", "6 rows", "4 rows"):
            small_task(metadata={"id": list("abcd")})

    @pytest.mark.parametrize("metadata", [{"id": list("abcdef"), "label": [1, 2]}, {"label": 1}])
    def test_columns_that_do_not_fit_together_are_refused(self, metadata):
        with refused(TaskError, "metadata", "one entry per example"):
            small_task(metadata=metadata)


class TestOutputs:
    def test_the_default_is_the_margin(self):
        assert small_task().outputs == {"margin": outputs.margin}

    def test_one_function_goes_by_its_own_name(self):
        assert small_task(outputs=outputs.loss).outputs == {"loss": outputs.loss}

    def test_none_at_all_is_refused(self):
        with refused(TaskError, "at least one output", "margin"):
            small_task(outputs={})

    def test_what_is_not_a_function_is_refused_by_name(self):
        with refused(TaskError, "output 'odds' is not a function", "(model, batch) -> [batch]", "log_odds"):
            small_task(outputs={"odds": "log_odds"})


class TestFingerprints:
    def test_equal_tasks_have_equal_fingerprints(self):
        ours, theirs = make_task("grouped"), make_task("grouped")
        assert ours.model_fingerprint() == theirs.model_fingerprint()
        assert ours.data_fingerprint() == theirs.data_fingerprint()

    def test_one_weight_changes_that_of_the_model_alone(self):
        ours, theirs = make_task("mlp"), make_task("mlp")
        theirs.model.hidden1.weight.data[0, 0] += 1e-6
        assert ours.model_fingerprint() != theirs.model_fingerprint()
        assert ours.data_fingerprint() == theirs.data_fingerprint()

    @pytest.mark.parametrize(
        "options",
        [
            {"dataset": TensorDataset(INPUTS + 1e-6, DATASET.tensors[1])},
            {"dataset": TensorDataset(INPUTS, 1 - DATASET.tensors[1])},
            {"dataset": TensorDataset(INPUTS[:5], DATASET.tensors[1][:5])},
            {"metadata": {"label": [0, 1, 0, 1, 0, 1]}},
            {"metadata": {"id": list("abcdef")}},
        ],
    )
    def test_items_length_labels_and_ids_change_that_of_the_data(self, options):
        model = nn.Linear(2, 2).eval()
        ours, theirs = small_task(model), small_task(model, **options)
        assert ours.data_fingerprint() != theirs.data_fingerprint()
        assert ours.model_fingerprint() == theirs.model_fingerprint()

    def test_other_metadata_does_not_count(self):
        assert small_task(metadata={"note": range(6)}).data_fingerprint() == small_task().data_fingerprint()

    def test_of_a_large_data_set_64_items_are_read_twice(self):
        class Counting(list):
            reads = 0

            def __getitem__(self, index):
                type(self).reads += 1
                return super().__getitem__(index)

        dataset = Counting(torch.arange(1000.0))
        small_task(dataset=dataset).data_fingerprint()
        assert Counting.reads == 2 * 64

    def test_the_model_is_only_read(self):
        task = make_task("residual")
        before = copy.deepcopy(task.model.state_dict())
        task.model_fingerprint()
        for name, tensor in task.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name


class TestDevice:
    def test_auto_is_a_device_of_this_machine(self):
        assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_names_and_devices_are_taken(self):
        assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")

    def test_an_unknown_one_is_refused(self):
        with refused(SettingError, "unknown device", "auto, cpu, cuda", "tpu9"):
            small_task_on("tpu9")


def small_task_on(device):
    return Task(nn.Linear(2, 2).eval(), DATASET, device=device)


def test_a_task_says_what_it_is():
    assert repr(small_task()) == "Task(Linear, 6 examples, outputs ['margin'])"


def test_a_lambda_and_a_list_are_no_named_outputs():
    for nameless in (lambda model, batch: model(batch), ["margin"], "margin"):
        with refused(TaskError, "at least one output, by name", "give a lambda a name"):
            Task(nn.Linear(2, 2).eval(), [torch.zeros(2)], outputs=nameless)


def test_a_pair_of_arrays_is_no_data_set():
    pair = torch.zeros(5, 2), torch.zeros(5)
    for arrays in (pair, list(pair)):
        with refused(TaskError, "first dimension", "TensorDataset"):
            Task(nn.Linear(2, 2).eval(), arrays)
