"""Conductance and internal influence against captum, literal hooks, and what they must sum to."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import coar
from coar.baselines import internal_influence, neuron_conductance
from coar.baselines.layer_activations import LayerActivations
from coar.baselines.path_passes import Point
from coar.errors import ComponentError, OutputError, SettingError, TaskError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import move
from coar.experiments.private_model import cast
from coar.fingerprints import model_fingerprint
from coar.gates import GatedActivations, make_sites
from coar.outputs import margin, token_margin
from coar.task import Task
from coar.testing import SubsetMean, linear_experiment
from coar.testing.components import run_each
from tests import cases, naive
from tests.architectures import COUNTS, build
from tests.conftest import require_or_skip
from tests.refused import refused

BOTH = [neuron_conductance, internal_influence]
both = pytest.mark.parametrize("baseline", BOTH)


def quiet(method, experiment, *more, **options):
    return method(experiment, *more, progress=False, **options)


def seeded(kind, *arguments):
    """A model of a class with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return kind(*arguments)


def experiment_of(model, inputs, components, output=margin):
    dataset = [(x, torch.tensor(i % cases.CLASSES)) for i, x in enumerate(inputs)]
    return ComponentAblation(Task(model.eval(), dataset, {output.__name__: output}, device="cpu"), components)


def require_close(found, expected, tolerance=1e-4):
    """Apart by no more than the tolerance, of the largest that is expected."""
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert np.abs(expected).max() > 1e-4


def gpt2_experiment(kinds):
    """Two sequences of 6 tokens."""
    model, batch = build("gpt2")
    dataset = [{"input_ids": tokens} for tokens in batch["input_ids"]]
    task = Task(model, dataset, {"token_margin": token_margin}, device="cpu")
    return ComponentAblation(task, coar.find_components(model, kinds=kinds))


# ------------------------------------------------------------------------------------------ captum


def captum_says(experiment, method, steps, baselines=0, forward=None, inputs=None, more=None):
    """Attributions by captum of the same components, summed over positions, [columns, components]."""
    require_or_skip("captum", find_spec("captum") is not None, 'pip install "torch-coar[baselines]"')
    from captum.attr import InternalInfluence, LayerConductance

    kind = LayerConductance if method is neuron_conductance else InternalInfluence
    model = experiment.task.model
    if forward is None:
        inputs, more = experiment.task.batch(range(len(experiment.task)))

        def forward(x, labels):
            return margin(model, (x, labels))

    found = []
    for group in experiment.component_set.groups:
        module = model.get_submodule(group.module)
        said = kind(forward, module).attribute(
            inputs,
            baselines=baselines,
            additional_forward_args=more,
            n_steps=steps,
            attribute_to_layer_input=group.side == "input",
        )
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        rows = said.detach().double().movedim(channels, -1).reshape(len(inputs), -1, said.shape[channels])
        own = rows.sum(dim=1)[:, group.offset : group.stop]
        found.append(own.unflatten(1, (group.count, group.width)).sum(dim=2))
    return torch.cat(found, dim=1).numpy()


@both
@pytest.mark.parametrize("name", ["residual", "mlp", "grouped"])
@pytest.mark.parametrize("steps", [5, 50])
def test_captum_says_the_same(baseline, name, steps):
    experiment = cases.make_case(name).experiment()
    found = quiet(baseline, experiment, steps).weights
    expected = captum_says(experiment, baseline, steps)
    require_close(found, expected)


@both
def test_captum_says_the_same_from_another_baseline(baseline):
    experiment = cases.make_case("residual").experiment()
    start = cases.random_numbers(*cases.Residual.input_shape, seed=9)
    found = quiet(baseline, experiment, 7, baseline=start.numpy()).weights
    expected = captum_says(experiment, baseline, 7, baselines=start[None])
    require_close(found, expected)
    assert np.abs(found - quiet(baseline, experiment, 7).weights).max() > 0.01 * np.abs(expected).max()


@pytest.mark.slow
@both
@pytest.mark.parametrize("kind", ["attention_head", "mlp_neuron", "neuron"])
def test_captum_says_the_same_of_a_language_model_that_reads_embeddings(baseline, kind):
    experiment = gpt2_experiment([kind])
    model, batch = experiment.task.model, experiment.task.batch([0, 1])

    def forward(embeddings, tokens):
        return token_margin(lambda **_: model(inputs_embeds=embeddings), {"input_ids": tokens})

    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    found = quiet(baseline, experiment, 6)
    expected = captum_says(experiment, baseline, 6, 0, forward, embeddings, batch["input_ids"])
    assert found.provenance["path"] == "embedding"
    require_close(found.weights, expected)


# ------------------------------------------------------------------------------- literal definitions


@both
@pytest.mark.parametrize("name", ["residual", "mlp", "grouped", "conv1d", "conv3d", "slices"])
def test_hooks_say_the_same(baseline, name):
    experiment = cases.make_case(name).experiment()
    expected = naive.path_integral(experiment, "margin", 4, baseline is neuron_conductance)
    require_close(quiet(baseline, experiment, 4).weights, expected)


@both
@pytest.mark.parametrize("output", ["one", "many", "ragged"])
def test_hooks_say_the_same_of_several_columns_per_example(baseline, output):
    experiment = cases.make_case("several_outputs").experiment()
    start = cases.random_numbers(3, seed=4)  # of a token: it broadcasts
    found = quiet(baseline, experiment, 3, output=output, baseline=start, batch_size=2)
    expected = naive.path_integral(experiment, output, 3, baseline is neuron_conductance, start)
    assert found.columns == experiment.columns[output]
    require_close(found.weights, expected)


@both
@pytest.mark.parametrize("kind", ["attention_head", "mlp_neuron"])
def test_hooks_say_the_same_of_a_transformer(baseline, kind):
    experiment = gpt2_experiment([kind])
    conducts = baseline is neuron_conductance
    expected = naive.path_integral(experiment, "token_margin", 3, conducts, embedding="transformer.wte")
    require_close(quiet(baseline, experiment, 3).weights, expected)


class Product(nn.Module):
    """First hidden unit times the second."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.hidden(x).prod(dim=1)


def call(model, batch):
    return model(batch[0])


def test_of_a_product_each_factor_gets_half_and_has_half_of_the_other_as_influence():
    model = seeded(Product)
    inputs = cases.random_numbers(4, 3)
    experiment = experiment_of(
        model, inputs, coar.find_components(model, kinds=["neuron"], include=["hidden"]), call
    )
    factors = model.hidden(inputs).detach().numpy()
    halves = np.repeat(factors.prod(axis=1)[:, None] / 2, 2, axis=1)
    assert quiet(neuron_conductance, experiment, 400).weights == pytest.approx(halves, abs=5e-3)
    assert quiet(internal_influence, experiment, 3).weights == pytest.approx(factors[:, ::-1] / 2, abs=1e-6)


PAIRS = [(name, kind) for name, counts in COUNTS.items() for kind in counts]
SHARED = {("swin_v2", "neuron")}  # among them layers that run once for all examples


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_derivative_times_activation_is_the_derivative_by_a_gate(name, kind):
    """In every architecture and for every kind, functional calls, windows and packed projections too."""
    model, example = build(name)
    model = cast(copy.deepcopy(model), torch.float64).requires_grad_(False)
    example = move(example, torch.device("cpu"), torch.float64)
    example = example[:1] if (name, kind) in SHARED else example
    components = coar.find_components(model, kinds=[kind])
    watch = LayerActivations(make_sites(model, components))
    with watch:
        values = run_each(model, example).square().sum(dim=1)
    point = Point(values, np.ones(len(values), dtype=int), watch.seen)
    found = point.contributions([seen.values.detach() for seen in watch.seen], len(components))
    gates = torch.ones(len(values), len(components), dtype=torch.float64, requires_grad=True)
    with GatedActivations(model, components, bias="ablate").at(gates):
        (expected,) = torch.autograd.grad(run_each(model, example).square().sum(), gates)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * max(1, float(expected.abs().max())))


# ------------------------------------------------------------------------------------ completeness


@pytest.mark.parametrize(
    ("name", "layers"), [("mlp", ["hidden1", "hidden2"]), ("grouped", ["plain", "grouped", "hidden"])]
)
@pytest.mark.parametrize("start", ["zero", 0.7])
def test_conductance_of_a_layer_sums_to_the_change_of_the_output(name, layers, start):
    """A layer that all paths go through; the error of the rule shrinks with its steps."""
    experiment = cases.make_case(name).experiment()
    inputs, labels = experiment.task.batch(range(len(experiment.task)))
    model, origin = experiment.task.model, torch.full_like(inputs, 0.0 if start == "zero" else start)
    ends = [margin(model, (x, labels)).detach().numpy() for x in (inputs, origin)]
    change = ends[0] - ends[1]
    errors = []
    for steps in (25, 400):
        found = quiet(neuron_conductance, experiment, steps, baseline=start).weights
        groups = experiment.component_set.slices()
        sums = {group.name: found[:, flat].sum(axis=1) for group, flat in groups}
        errors.append(max(np.abs(sums[layer] - change).max() for layer in layers))
    assert errors[1] < 0.02 * np.abs(change).max()
    assert errors[1] < errors[0] / 5


# ------------------------------------------------------------------------- what must not matter


@both
def test_of_a_linear_model_conductance_is_the_truth_and_influence_is_one(baseline):
    experiment, truth = linear_experiment()
    found = quiet(baseline, experiment, 500)
    expected = truth if baseline is neuron_conductance else np.ones_like(truth)
    assert found.weights == pytest.approx(expected, abs=1e-3)


@both
def test_all_components_kept_predict_the_untouched_output(baseline):
    experiment = cases.make_case("residual").experiment()
    everything = np.ones((1, len(experiment.components)), dtype=bool)
    untouched = experiment.prepare(experiment.device)(everything)["margin"]
    assert quiet(baseline, experiment, 3).predict(everything) == pytest.approx(untouched, abs=1e-5)


@both
@pytest.mark.parametrize("case", ["residual", "mlp", "gpt2"])
def test_batches_do_not_matter(baseline, case):
    heads = case == "gpt2"
    experiment = gpt2_experiment(["attention_head"]) if heads else cases.make_case(case).experiment()
    whole, single = (quiet(baseline, experiment, 4, batch_size=size) for size in (5, 1))
    np.testing.assert_allclose(single.weights, whole.weights, rtol=1e-4, atol=1e-6)


class Chain(nn.Module):
    """A convolution called twice, and ReLUs that may write in place."""

    def __init__(self, inplace):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        for layer in (self.first, self.twice, self.twice):
            x = self.relu(layer(x))
        return x.sum(dim=(2, 3))


@both
def test_in_place_nonlinearities_do_not_matter(baseline):
    plain, in_place = seeded(Chain, False), seeded(Chain, True)
    inputs = cases.random_numbers(3, 2, 5, 5)
    made = [
        experiment_of(model, inputs, coar.find_components(model, kinds=["conv_filter"]))
        for model in (plain, in_place)
    ]
    expected, found = (quiet(baseline, experiment, 5).weights for experiment in made)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_a_layer_called_twice_counts_both_times():
    """Each call cuts the network: its filters conduct the change of the output twice."""
    model, inputs = seeded(Chain, False), cases.random_numbers(3, 2, 5, 5)
    experiment = experiment_of(model, inputs, coar.find_components(model, kinds=["conv_filter"]))
    found = quiet(neuron_conductance, experiment, 150).weights
    first, twice = found[:, :4].sum(axis=1), found[:, 4:].sum(axis=1)
    assert np.abs(first).max() > 0.01
    assert twice == pytest.approx(2 * first, abs=0.05 * float(np.abs(first).max()))


@both
def test_the_model_and_the_generator_are_not_touched(baseline):
    experiment = cases.make_case("residual").experiment()
    model = experiment.task.model
    before, random = model_fingerprint(model), torch.get_rng_state()
    quiet(baseline, experiment, 2)
    assert model_fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "forward" not in vars(model)


def test_provenance_says_what_was_spent():
    experiment = cases.make_case("mlp").experiment()
    first, second = (quiet(method, experiment, 10).provenance for method in BOTH)
    assert (first["method"], second["method"]) == ("neuron_conductance", "internal_influence")
    assert (first["steps"], first["passes"], first["forwards"]) == (10, 10, 30 + 1 + 1)
    assert (second["steps"], second["passes"], second["forwards"]) == (10, 10, 30 + 1)
    assert {first["ablation_fraction"], first["seed"]} == {None}
    assert (first["baseline"], first["path"]) == ("zero", "input")
    other = quiet(internal_influence, experiment, 2, baseline=np.full(6, 0.5)).provenance["baseline"]
    assert other not in (
        "zero",
        quiet(internal_influence, experiment, 2, baseline=0.5).provenance["baseline"],
    )


class Masked(nn.Module):
    """Reads a float mask, which is no input."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, cases.CLASSES)

    def forward(self, x, attention_mask):
        return self.hidden(x) * attention_mask


def masked_margin(model, batch):
    return model(batch[0], attention_mask=torch.full((len(batch[0]), 1), 2.0))[:, 0]


def test_masks_do_not_move():
    model = seeded(Masked)
    inputs = cases.random_numbers(3, 4)
    components = coar.find_components(model, kinds=["neuron"], include=["hidden"])
    found = quiet(internal_influence, experiment_of(model, inputs, components, masked_margin), 3)
    assert found.weights == pytest.approx(np.tile([2.0, 0, 0, 0], (3, 1)), abs=1e-6)


# -------------------------------------------------------------------------------------- refused


@both
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, 20_000])
def test_steps_are_a_whole_number(baseline, steps):
    with refused(SettingError, "steps must be a whole number", repr(steps)):
        quiet(baseline, cases.make_case("mlp").experiment(), steps)


@both
@pytest.mark.parametrize("start", [np.zeros(7), np.zeros((1, 6)), np.zeros((5, 6))])
def test_a_baseline_that_does_not_fit_is_refused(baseline, start):
    with refused(SettingError, "does not fit an example's input", "[6]", str(list(start.shape)), "zero"):
        quiet(baseline, cases.make_case("mlp").experiment(), 2, baseline=start)


@both
@pytest.mark.parametrize("start", ["mean", float("nan"), None, ["a", "b"]])
def test_a_baseline_that_is_no_input_is_refused(baseline, start):
    with refused(SettingError, "a baseline is an input", '"zero"', repr(start)):
        quiet(baseline, cases.make_case("mlp").experiment(), 2, baseline=start)


@both
def test_other_experiments_are_refused(baseline):
    with refused(SettingError, "derivatives by activations need a component ablation", "SubsetMean"):
        quiet(baseline, SubsetMean(), 2)


@both
def test_an_output_must_be_named_and_batches_have_an_example(baseline):
    with refused(SettingError, "which output?", "one, many, ragged"):
        quiet(baseline, cases.make_case("several_outputs").experiment(), 2)
    with refused(SettingError, "batch_size", "0"):
        quiet(baseline, cases.make_case("mlp").experiment(), 2, batch_size=0)


def blind(model, batch):
    return model(batch[0]).argmax(dim=1).float()


def inner(model, batch):
    return model.head(torch.tanh(model.hidden2(torch.tanh(model.hidden1(batch[0])))))[:, 0]


def root(model, batch):
    return (0 * margin(model, batch)).sqrt()


@both
@pytest.mark.parametrize(
    ("output", "words"),
    [
        (blind, ["'blind' has no gradient"]),
        (inner, ["does not call the model", "model(...)"]),
        (root, ["not finite: example 0", "hidden1"]),
    ],
)
def test_outputs_without_what_a_path_needs_are_refused(baseline, output, words):
    model = cases.make_model("mlp")
    experiment = experiment_of(
        model, cases.random_numbers(3, 6), coar.find_components(model, kinds=["neuron"]), output
    )
    with refused(OutputError, *words):
        quiet(baseline, experiment, 2)


class Tokens(nn.Module):
    """Reads tokens, and says nowhere which layer embeds them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.hidden = nn.Linear(4, cases.CLASSES)

    def forward(self, tokens):
        return self.hidden(self.table(tokens)).mean(dim=1)


class TokensThatSay(Tokens):
    def get_input_embeddings(self):
        return self.table


@both
def test_tokens_need_a_model_that_says_what_embeds_them(baseline):
    inputs = torch.arange(9).view(3, 3)
    with refused(TaskError, "Tokens", "get_input_embeddings", "whole numbers"):
        model = seeded(Tokens)
        quiet(
            baseline,
            experiment_of(model, inputs, coar.find_components(model, kinds=["neuron"], include=["hidden"])),
            2,
        )
    model = seeded(TokensThatSay)
    experiment = experiment_of(
        model, inputs, coar.find_components(model, kinds=["neuron"], include=["hidden"])
    )
    assert quiet(baseline, experiment, 2, baseline=np.ones(4)).provenance["path"] == "embedding"
    with refused(SettingError, "does not fit an example's embedding", "[3, 4]", "[5]"):
        quiet(baseline, experiment, 2, baseline=np.ones(5))


class TimeFirst(nn.Module):
    """Turns examples and positions around before its layer: as many positions as examples or a multiple."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, cases.CLASSES)

    def forward(self, x):
        return torch.tanh(self.hidden(x.transpose(0, 1))).transpose(0, 1).mean(dim=1)


@both
@pytest.mark.parametrize("positions", [4, 5])
def test_rows_that_are_not_one_examples_are_refused(baseline, positions):
    model, inputs = seeded(TimeFirst), cases.random_numbers(4, positions, 3)
    experiment = experiment_of(
        model, inputs, coar.find_components(model, kinds=["neuron"], include=["hidden"])
    )
    with refused(ComponentError, "hidden", "4 examples", "batch_size=1"):
        quiet(baseline, experiment, 2)
    assert np.abs(quiet(baseline, experiment, 2, batch_size=1).weights).max() > 0.001


class Elsewhere(cases.Mlp):
    """One layer by a product, one without gradients."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "product":
            x = torch.tanh(x @ self.hidden1.weight.T)
        elif self.how == "no_grad":
            with torch.no_grad():
                x = torch.tanh(self.hidden1(x))
        else:
            x = checkpoint(lambda y: torch.tanh(self.hidden1(y)), x, use_reentrant=True)
        return self.head(torch.tanh(self.hidden2(x)))


@both
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of reentrant checkpoints
@pytest.mark.parametrize("how", ["product", "no_grad", "checkpoint"])
def test_activations_that_cannot_be_seen_are_refused(baseline, how):
    model = seeded(Elsewhere, how)
    components = coar.find_components(model, kinds=["neuron"], include=["hidden1"])
    experiment = experiment_of(model, cases.random_numbers(3, 6), components)
    with refused(ComponentError, "hidden1.weight", "called as linear", "leave_one_out"):
        quiet(baseline, experiment, 2)


class Growing(cases.Mlp):
    """Calls a layer again where the input is large."""

    def forward(self, x):
        x = torch.tanh(self.hidden1(x))
        if float(x.detach().abs().mean()) > self.limit:
            x = torch.tanh(self.hidden1(x[:, :6]))
        return self.head(torch.tanh(self.hidden2(x)))


def test_a_model_that_calls_its_layers_otherwise_on_the_way_is_refused():
    model = seeded(Growing)
    inputs = cases.random_numbers(3, 6)
    sizes = [float(torch.tanh(model.hidden1(t * inputs)).detach().abs().mean()) for t in (0.0, 1.0)]
    model.limit = sum(sizes) / 2
    experiment = experiment_of(
        model, inputs, coar.find_components(model, kinds=["neuron"], include=["hidden1"])
    )
    with refused(TaskError, "does not call its layers alike along the path"):
        quiet(neuron_conductance, experiment, 20)


class TwoInputs(nn.Module):
    """Adds its inputs up."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, cases.CLASSES)

    def forward(self, x, y):
        return self.hidden(x + y)


def of_both(model, batch):
    return model(batch[0], batch[0])[:, 0]


@both
def test_one_baseline_for_several_inputs_is_refused(baseline):
    model = seeded(TwoInputs)
    experiment = experiment_of(
        model,
        cases.random_numbers(3, 6),
        coar.find_components(model, kinds=["neuron"], include=["hidden"]),
        of_both,
    )
    quiet(baseline, experiment, 2)
    with refused(SettingError, "several inputs", "2 of them"):
        quiet(baseline, experiment, 2, baseline=1.0)
