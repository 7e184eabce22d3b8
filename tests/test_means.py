"""`value="mean"`: what is measured, and everything that depends on it."""

import copy
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

import coar
from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.editing import Edit
from coar.errors import AxisError, ComponentError, EditError, SettingError, StudyError
from coar.fingerprints import model_fingerprint
from coar.gates import ScaledWeights, measure_means, pick_means
from coar.recipes import task_factory
from coar.task import Task
from tests import naive
from tests.cases import random_numbers
from tests.refused import refused

CPU = torch.device("cpu")
DESIGN = coar.Bernoulli(ablation_fraction=0.4, seed=1)


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
    return model.eval().requires_grad_(False)


def outputs_of(name, module, **fields):
    fields = {"parameter": "weight", "bias": "bias", "dimension": 0, "kind": "unit"} | fields
    return ComponentGroup(name, module=module, **fields)


def entries_of(name, module, count, width=1, offset=0, dimension=1):
    return ComponentGroup(name, "entry", module, "weight", dimension, count, width, offset, side="input")


def heads(name, count, width):
    return entries_of(name, name, count, width)


@dataclass
class Case:
    """A model, what it is run on, its components, and what each of them reads or emits."""

    model: nn.Module
    data: list
    groups: list
    watched: dict  # group name -> (module, "output" or "input", dimension of the units, from the end)

    @property
    def components(self):
        return ComponentSet(self.groups, overlap=True)

    def batches(self, size):
        for start in range(0, len(self.data), size):
            yield torch.stack(self.data[start : start + size])

    def literal(self):
        """Hooks on real modules, every number into one list per entry, over one example at a time."""
        seen = {group.name: [[] for _ in range(group.stop)] for group in self.groups}

        def note(name, values, dimension):
            for entry, numbers in enumerate(seen[name]):
                numbers.extend(values.select(dimension, entry).flatten().tolist())

        hooks = []
        for name, (path, side, dimension) in self.watched.items():
            module = self.model.get_submodule(path)
            if side == "output":
                hook = module.register_forward_hook(
                    lambda _, __, y, name=name, dimension=dimension: note(name, y, dimension)
                )
            else:
                hook = module.register_forward_pre_hook(
                    lambda _, x, name=name, dimension=dimension: note(name, x[0], dimension)
                )
            hooks.append(hook)
        for example in self.data:
            self.model(example[None])
        for hook in hooks:
            hook.remove()
        return {
            group.name: np.array([np.mean(n) for n in seen[group.name][group.offset : group.stop]])
            for group in self.groups
        }


class Twice(nn.Module):
    """A layer called twice for each example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up, self.norm = nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.up(torch.tanh(self.conv(x)))).mean(dim=(2, 3))


class Tokens(nn.Module):
    """Rows flattened before one layer, and pieces of layers as components."""

    def __init__(self):
        super().__init__()
        self.up, self.mixed, self.norm, self.down = (
            nn.Linear(4, 6),
            Conv1D(6, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        return self.down(self.norm(torch.tanh(self.mixed(torch.tanh(self.up(x))))))


def make_twice():
    watched = {"layer": ("layer", "output", -1), "read": ("layer", "input", -1)}
    groups = [outputs_of("layer", "layer", count=4), entries_of("read", "layer", 2, width=2)]
    return Case(randomised(Twice()), list(random_numbers(7, 4)), groups, watched)


def make_images():
    groups = [
        outputs_of("conv", "conv", count=4),
        outputs_of("up", "up", count=3, dimension=1),
        outputs_of("norm", "norm", count=1, width=3, whole=True),
    ]
    watched = {"conv": ("conv", "output", -3), "up": ("up", "output", -3), "norm": ("norm", "output", -3)}
    return Case(randomised(Images()), list(random_numbers(7, 2, 5, 5)), groups, watched)


def make_tokens():
    groups = [
        outputs_of("units", "up", count=2, width=2, offset=1),
        outputs_of("mixed", "mixed", count=6, dimension=1),
        entries_of("rows", "mixed", 6, dimension=0),
        outputs_of("norm", "norm", count=6),
        entries_of("heads", "down", 2, width=2, offset=2),
    ]
    watched = {
        "units": ("up", "output", -1),
        "mixed": ("mixed", "output", -1),
        "rows": ("mixed", "input", -1),
        "norm": ("norm", "output", -1),
        "heads": ("down", "input", -1),
    }
    return Case(randomised(Tokens()), list(random_numbers(7, 5, 4)), groups, watched)


CASES = {"a layer called twice": make_twice, "images": make_images, "tokens": make_tokens}


@pytest.mark.parametrize("name", CASES)
class TestMeasured:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
    def test_are_those_of_everything_that_hooks_see(self, name, batch_size):
        case = CASES[name]()
        found = measure_means(case.model, case.components, case.batches(batch_size), run)
        expected = case.literal()
        assert found.keys() == expected.keys()
        for group, values in found.items():
            assert values.dtype == np.float64
            np.testing.assert_allclose(values, expected[group], rtol=1e-5, atol=1e-6)

    def test_measuring_leaves_the_model_alone(self, name):
        case = CASES[name]()
        before = model_fingerprint(case.model)
        measure_means(case.model, case.components, case.batches(2), run)
        assert model_fingerprint(case.model) == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_a_vector_without_examples_counts_once():
    layer, rows = randomised(nn.Linear(4, 3)), list(random_numbers(5, 4))
    found = measure_means(layer, ComponentSet([outputs_of("units", "", count=3)]), rows, run)
    expected = torch.stack([layer(row) for row in rows]).mean(dim=0)
    np.testing.assert_allclose(found["units"], expected, rtol=1e-5, atol=1e-6)


def run(model, batch):
    return model(batch)


# -------------------------------------------------------------------------------------------- masks


def padded(lengths=(4, 2, 5, 1), width=4):
    items = [random_numbers(length, width, seed=length) for length in lengths]
    mask = pad_sequence([torch.ones(length, dtype=torch.int64) for length in lengths], batch_first=True)
    return items, {"x": pad_sequence(items, batch_first=True) + 0.0, "attention_mask": mask}


class TestPadding:
    """Tokens that an attention mask hides are no tokens."""

    components = ComponentSet(
        [outputs_of("out", "0", count=3), entries_of("in", "2", 3), outputs_of("last", "2", count=2)],
        overlap=True,
    )

    def model(self):
        return randomised(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
    @pytest.mark.parametrize("flat", [False, True])
    def test_does_not_count(self, dtype, flat):
        model = self.model()
        items, batch = padded()
        batch = {"x": batch["x"] + 5.0 * (1 - batch["attention_mask"])[..., None]} | {
            "attention_mask": batch["attention_mask"].to(dtype)
        }
        found = measure_means(
            model, self.components, [batch], lambda m, b: m(b["x"].flatten(0, 1) if flat else b["x"])
        )
        tokens = torch.cat(items)
        hidden = model[0](tokens)
        for name, expected in (("out", hidden), ("in", torch.tanh(hidden)), ("last", model(tokens))):
            np.testing.assert_allclose(found[name], expected.mean(dim=0), rtol=1e-5, atol=1e-6)

    def test_counts_where_the_layer_sees_something_else(self):
        """Pooled tokens are one row per example, whatever the mask."""
        model, (_, batch) = self.model(), padded()
        found = measure_means(model, self.components, [batch], lambda m, b: m(b["x"].mean(dim=1)))
        expected = model[0](batch["x"].mean(dim=1)).mean(dim=0)
        np.testing.assert_allclose(found["out"], expected, rtol=1e-5, atol=1e-6)

    def test_is_not_taken_for_examples_where_time_comes_first(self):
        """As many numbers, in another order: no token is dropped, least of all a wrong one."""
        model, (_, batch) = self.model(), padded()
        found = measure_means(model, self.components, [batch], lambda m, b: m(b["x"].transpose(0, 1)))
        expected = model[0](batch["x"]).flatten(0, 1).mean(dim=0)
        np.testing.assert_allclose(found["out"], expected, rtol=1e-5, atol=1e-6)

    def test_in_batches_of_different_lengths_every_token_weighs_the_same(self):
        model = self.model()
        items, _ = padded()
        batches = [
            {"x": part[None], "attention_mask": torch.ones(1, len(part), dtype=torch.int64)} for part in items
        ]
        found = measure_means(model, self.components, batches, lambda m, b: m(b["x"]))
        together = measure_means(model, self.components, [padded()[1]], lambda m, b: m(b["x"]))
        for name, values in together.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7)

    @given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    @settings(max_examples=15)
    def test_whatever_the_lengths(self, lengths):
        model = self.model()
        items, batch = padded(lengths)
        found = measure_means(model, self.components, [batch], lambda m, b: m(b["x"]))
        expected = model[0](torch.cat(items)).mean(dim=0)
        np.testing.assert_allclose(found["out"], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("which", ["self", "cross", "keys with positions"])
def test_rows_of_a_fused_projection_are_measured_on_what_they_read(which, batch_first):
    """Of queries, keys and values each sees its own input only; heads are what is joined."""
    model = randomised(nn.MultiheadAttention(4, 2, batch_first=batch_first))
    query, other = random_numbers(3, 5, 4), random_numbers(3, 7, 4, seed=1)
    inputs = {
        "self": (query, query, query),
        "cross": (query, other, other),
        "keys with positions": (query, query + 1, query),
    }[which]
    components = ComponentSet(
        [
            outputs_of("rows", "", count=12, parameter="in_proj_weight", bias="in_proj_bias"),
            outputs_of("part", "", count=5, offset=2, parameter="in_proj_weight", bias="in_proj_bias"),
            heads("out_proj", 2, 2),
        ],
        overlap=True,
    )
    batch = tuple(part if batch_first else part.transpose(0, 1) for part in inputs)
    if which == "self":
        batch = (batch[0],) * 3
    found = measure_means(model, components, [batch], lambda m, b: m(*b)[0])
    weights, biases = model.in_proj_weight.chunk(3), model.in_proj_bias.chunk(3)
    parts = [functional.linear(*triple) for triple in zip(inputs, weights, biases, strict=True)]
    rows = torch.cat([part.mean(dim=(0, 1)) for part in parts])
    np.testing.assert_allclose(found["rows"], rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["part"], rows[2:7], rtol=1e-5, atol=1e-6)
    joined = torch.cat(
        [
            torch.softmax(q @ k.transpose(1, 2) / 2**0.5, dim=-1) @ v
            for q, k, v in zip(*(part.split(2, dim=-1) for part in parts), strict=True)
        ],
        dim=-1,
    )
    np.testing.assert_allclose(found["out_proj"], joined.mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ refused


def test_a_layer_that_was_never_called_is_named():
    model = randomised(nn.ModuleDict({"used": nn.Linear(4, 3), "spare": nn.Linear(4, 3)}))
    components = ComponentSet([outputs_of(name, name, count=3) for name in ("used", "spare")])
    with refused(ComponentError, "never called", "spare"):
        measure_means(model, components, [random_numbers(2, 4)], lambda m, b: m["used"](b))


def test_a_layer_read_in_a_way_that_nobody_can_watch_is_refused():
    model = randomised(nn.Linear(4, 3))
    with refused(ComponentError, "no mean", "units"):
        measure_means(
            model,
            ComponentSet([outputs_of("units", "", count=3)]),
            [random_numbers(2, 4)],
            lambda m, b: b @ m.weight.T,
        )


@pytest.mark.parametrize("means", [None, {}, {"other": np.zeros(4)}])
def test_weights_cannot_be_scaled_to_means_that_nobody_measured(means):
    case = make_twice()
    with refused(SettingError, "needs the mean of every component", "layer"):
        ScaledWeights(case.model, case.components, value="mean", means=means)


def test_means_of_picked_components_are_theirs():
    case = make_tokens()
    means = {g.name: np.arange(g.count * g.width) + 10.0 * i for i, g in enumerate(case.groups)}
    picked = case.components.pick([1, 3, 16])
    found = pick_means(means, case.components, [1, 3, 16])
    assert found.keys() == {group.name for group in picked}
    assert found["units[1]"].tolist() == [2, 3]
    assert found["mixed[1]"].tolist() == [11]
    assert found["norm[2]"].tolist() == [32]
    assert pick_means(None, case.components, [1]) is None


# --------------------------------------------------------------------------------------- experiments


class Small(nn.Module):
    """Filters, units and pairs of inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv1d(2, 3, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(torch.tanh(self.conv(x)).mean(dim=2))))


@task_factory
def make_task(seed: int = 0, count: int = 9) -> Task:
    data = [(x, torch.tensor(i % 3)) for i, x in enumerate(random_numbers(count, 2, 6, seed=seed))]
    return Task(randomised(Small()), data, {"margin": coar.outputs.margin}, device="cpu")


def components_of():
    return ComponentSet(
        [
            outputs_of("conv", "conv", count=3),
            outputs_of("hidden", "hidden", count=4),
            entries_of("pairs", "head", 2, width=2),
        ]
    )


def make_experiment(seed=0, value="mean", **options):
    return coar.ComponentAblation(make_task(seed=seed, **options), components_of(), value=value)


def measured(task):
    """Means by hand: conv, hidden, and what the head reads."""
    model, x = task.model, torch.stack([item[0] for item in task.dataset])
    conv = model.conv(x)
    hidden = model.hidden(torch.tanh(conv).mean(dim=2))
    return {
        "conv": conv.mean(dim=(0, 2)),
        "hidden": hidden.mean(dim=0),
        "pairs": torch.tanh(hidden).mean(dim=0),
    }


def rebuilt(task, keep):
    """The model with what is not kept replaced by its mean, with hooks."""
    model, means = copy.deepcopy(task.model), measured(task)
    conv, hidden, pairs = np.split(~np.asarray(keep), [3, 7])
    model.conv.register_forward_hook(
        lambda _, __, y: torch.where(torch.tensor(conv)[:, None], means["conv"][:, None], y)
    )
    model.hidden.register_forward_hook(lambda _, __, y: torch.where(torch.tensor(hidden), means["hidden"], y))
    model.head.register_forward_pre_hook(
        lambda _, x: torch.where(torch.tensor(np.repeat(pairs, 2)), means["pairs"], x[0])
    )
    return model


class TestExperiments:
    def test_a_gate_of_zero_puts_the_mean_in_place(self):
        experiment = make_experiment()
        masks = DESIGN.masks(range(8), 9)
        masks[0], masks[-1] = True, False
        found = experiment.prepare(CPU)(masks)["margin"]
        for row, mask in zip(found, masks, strict=True):
            expected = naive.outputs_of(experiment.task, rebuilt(experiment.task, mask))["margin"]
            np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
        assert np.ptp(found, axis=0).max() > 0.1

    @pytest.mark.parametrize("batch_size", [1, 2, 100])
    def test_means_do_not_depend_on_how_rows_are_run(self, batch_size):
        experiment = make_experiment()
        masks = DESIGN.masks(range(4), 9)
        found = experiment.prepare(CPU, batch_size)(masks)["margin"]
        np.testing.assert_allclose(
            found, make_experiment().prepare(CPU)(masks)["margin"], rtol=1e-5, atol=1e-6
        )
        for name, values in measured(experiment.task).items():
            np.testing.assert_allclose(experiment.means[name], values, rtol=1e-5, atol=1e-6)

    def test_other_conventions_measure_nothing(self):
        for value in ("zero", 0.0, 0.7):
            assert make_experiment(value=value).means is None

    def test_the_model_of_the_task_is_left_alone(self):
        experiment = make_experiment()
        before = model_fingerprint(experiment.task.model)
        experiment.prepare(CPU)(DESIGN.masks(range(2), 9))
        assert model_fingerprint(experiment.task.model) == before

    @pytest.mark.parametrize("precision", ["float64", "bfloat16"])
    def test_other_precisions_take_the_same_means(self, precision):
        experiment = make_experiment()
        masks = DESIGN.masks(range(4), 9)
        expected = experiment.prepare(CPU)(masks)["margin"]
        found = experiment.prepare(CPU, precision=precision)(masks)["margin"]
        tolerance = {"float64": 1e-5, "bfloat16": 0.05}[precision]
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


class TestIdentity:
    """Means are of the data: over other data it is another ablation."""

    def test_other_data_are_another_ablation(self):
        ours, theirs = make_experiment(seed=0), make_experiment(seed=1)
        assert ours.fingerprint()["ablation"] != theirs.fingerprint()["ablation"]
        assert ours.components != theirs.components
        with refused(AxisError, "ablation"):
            ours.components.require_same(theirs.components, "ours", "theirs")

    def test_the_same_data_are_the_same(self):
        assert make_experiment().components == make_experiment().components
        assert make_experiment().fingerprint() == make_experiment().fingerprint()

    def test_for_other_conventions_data_do_not_matter(self):
        ours, theirs = (make_experiment(seed=seed, value="zero") for seed in (0, 1))
        assert ours.components == theirs.components
        assert ours.components != make_experiment().components

    def test_attributions_over_other_data_are_not_compared(self, tmp_path):
        study = coar.Study.create(tmp_path / "s", make_experiment(), DESIGN, 6)
        with pytest.raises(StudyError, match="ablation"):
            coar.Study.open(tmp_path / "s", make_experiment(seed=1))
        assert study.spec.experiment.value == "mean"


class TestStudies:
    def rows(self, path, experiment, executor=None):
        study = coar.Study.create(path, experiment, DESIGN, 6, rows_per_shard=3)
        study.run(*([executor] if executor else []), progress=False)
        return study

    def test_spec_and_back(self, tmp_path):
        experiment = make_experiment()
        assert experiment.to_spec()["value"] == "mean"
        study = self.rows(tmp_path / "a", experiment)
        again = coar.Study.from_spec(tmp_path / "b", coar.spec.StudySpec.load(tmp_path / "a/spec.json"))
        again.run(progress=False)
        np.testing.assert_array_equal(again.outputs["margin"], study.outputs["margin"])
        assert again.experiment.value == "mean"

    def test_a_pickled_experiment_gives_the_same_rows(self):
        experiment = make_experiment()
        masks = DESIGN.masks(range(5), 9)
        expected = experiment.prepare(CPU)(masks)["margin"]
        for other in (experiment, make_experiment()):  # measured before it travels, and after
            sent = pickle.loads(pickle.dumps(other))
            np.testing.assert_array_equal(sent.prepare(CPU)(masks)["margin"], expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_processes_give_the_rows_of_serial(self, tmp_path, in_memory):
        experiment = make_experiment()
        if in_memory:
            experiment.task.recipe = None
        threads = torch.get_num_threads()
        ours = self.rows(tmp_path / "a", experiment)
        theirs = self.rows(tmp_path / "b", experiment, coar.Processes(workers=2, threads=threads))
        np.testing.assert_array_equal(ours.outputs["margin"], theirs.outputs["margin"])


class TestEdits:
    """An edit carries the means that it needs."""

    chosen = (1, 4, 8)

    def expected(self, task):
        keep = np.ones(9, dtype=bool)
        keep[list(self.chosen)] = False
        return naive.outputs_of(task, rebuilt(task, keep))["margin"]

    def test_applied_replaces_by_means(self):
        experiment = make_experiment()
        edit = Edit.of(experiment, self.chosen)
        found = naive.outputs_of(experiment.task, edit.apply(experiment.task.model))["margin"]
        np.testing.assert_allclose(found, self.expected(experiment.task), rtol=1e-4, atol=1e-5)

    def test_loaded_where_the_task_is_not_is_the_same(self, tmp_path):
        experiment = make_experiment()
        edit = Edit.of(experiment, self.chosen)
        edited = edit.apply(experiment.task.model)
        edit.save(tmp_path / "edit.json")
        model, task = copy.deepcopy(experiment.task.model), experiment.task
        del experiment
        loaded = Edit.load(tmp_path / "edit.json")
        assert loaded == edit
        assert model_fingerprint(loaded.apply(model)) == model_fingerprint(edited)
        found = naive.outputs_of(task, loaded.apply(model))["margin"]
        np.testing.assert_allclose(found, self.expected(task), rtol=1e-4, atol=1e-5)
        assert loaded.save(tmp_path / "edit.json")  # the same file again

    def test_without_its_means_cannot_be_applied(self, tmp_path):
        edit = Edit.of(make_experiment(), self.chosen)
        text = edit.save(tmp_path / "edit.json").read_text()
        assert '"means"' in text
        (tmp_path / "bare.json").write_text(text.replace('"means"', '"meens"'))
        with refused(SettingError, "needs the mean of every component"):
            Edit.load(tmp_path / "bare.json").apply(make_experiment().task.model)

    def test_effect_is_that_of_the_experiment_it_was_made_for(self):
        experiment = make_experiment()
        edit = Edit.of(experiment, self.chosen)
        effect = edit.effect(experiment, [0, 3], "margin")
        np.testing.assert_allclose(effect.after, self.expected(experiment.task)[[0, 3]], rtol=1e-4, atol=1e-5)
        with refused(EditError, "ablation differs"):
            edit.effect(make_experiment(seed=1), [0], "margin")

    def test_whether_folded_or_not(self):
        """Means of a convolution are those before the BatchNorm that folding puts into it."""

        class Normed(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

            def forward(self, x):
                return self.head(torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3)))

        model = randomised(Normed())
        model.bn.running_mean.copy_(random_numbers(4))
        data = [(x, torch.tensor(i % 3)) for i, x in enumerate(random_numbers(6, 2, 5, 5))]
        task = Task(model, data, device="cpu")
        experiment = coar.ComponentAblation(task, find_components(model), value="mean")
        edit = Edit.of(experiment, [0, 2])
        masks = np.array([[False, True, False, True]])
        found = experiment.prepare(CPU)
        assert found.record()["folded"] == 1
        expected = naive.outputs_of(task, edit.apply(model))["margin"]
        np.testing.assert_allclose(found(masks)["margin"][0], expected, rtol=1e-4, atol=1e-5)
        means = model.conv(torch.stack([x for x, _ in data])).mean(dim=(0, 2, 3))
        np.testing.assert_allclose(experiment.means["conv"], means, rtol=1e-5, atol=1e-6)
