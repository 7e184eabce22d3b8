"""Filters and neurons really removed, held to the ablated model."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import coar
from coar.components import ComponentGroup, ComponentSet
from coar.editing import Edit
from coar.editing.removal import removed, run_model
from coar.errors import ComponentError, EditError
from coar.fingerprints import model_fingerprint
from coar.tasks.cifar_networks import resnet8
from tests.architectures import ARCHITECTURES, build, randomise
from tests.cases import random_numbers
from tests.refused import refused

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
MOVED = "its constant is in the layers that read it"
BORDER = "zero padding: its constant is none at the border"


def prepared(model, dtype=torch.float64, seed=0):
    """Random parameters and statistics, eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomise(model)
    return model.eval().to(dtype)


def edit_of(model, components, indices, bias="keep", value="zero"):
    picked = components.pick(indices)
    names = tuple(group.name for group in picked)
    return Edit(names, picked, bias, value, {"model": model_fingerprint(model)})


def neurons(model, *include, kinds=("neuron",)):
    return coar.find_components(model, kinds=list(kinds), include=list(include) or None)


def require_same(model, edit, example, found=None, inputs=()):
    """The result computes what the ablated model does, and the model is as it was."""
    before = model_fingerprint(model)
    found = found or removed(model, edit, example)
    assert model_fingerprint(model) == before
    reference = edit.apply(model)
    for batch in (example, *inputs):
        for ours, theirs in zip(run_model(found.model, batch), run_model(reference, batch), strict=True):
            assert torch.allclose(ours, theirs, rtol=EXACT[ours.dtype], atol=EXACT[ours.dtype])
    assert [o.component for o in found.outcomes] == list(edit.names)
    assert all(o.reason for o in found.outcomes)
    assert found.parameters_before == sum(p.numel() for p in model.parameters())
    assert found.parameters_after == sum(p.numel() for p in found.model.parameters())
    return found


def states(found):
    return [outcome.state for outcome in found.outcomes]


def reasons(found):
    return [outcome.reason for outcome in found.outcomes]


# ------------------------------------------------------------------------------------------- MLPs


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.Sigmoid()])
@pytest.mark.parametrize(("bias", "value"), [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7)])
def test_neurons_of_an_mlp_are_removed_under_every_convention(dtype, activation, bias, value):
    model = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 3))
    model = prepared(model, dtype)
    edit = edit_of(model, neurons(model), [0, 3, 7, 9, 12], bias, value)
    found = require_same(model, edit, random_numbers(4, 5).to(dtype))
    assert states(found) == ["removed"] * 5
    assert [tuple(found.model[i].weight.shape) for i in (0, 2, 4)] == [(5, 5), (4, 5), (3, 4)]
    assert (found.model[2].in_features, found.model[2].out_features) == (5, 4)
    assert found.parameters_after == 5 * 6 + 4 * 6 + 3 * 5


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_subset_of_any_small_mlp(data):
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    activation = data.draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Identity]))
    layers = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths)]
    model = prepared(nn.Sequential(*layers, nn.Linear(widths[-1], 2, bias=data.draw(st.booleans()))))
    components = neurons(model)
    indices = data.draw(st.lists(st.integers(0, len(components) - 1), min_size=1, unique=True))
    value = data.draw(st.sampled_from(["zero", -1.5, 0.5]))
    edit = edit_of(model, components, indices, data.draw(st.sampled_from(["keep", "ablate"])), value)
    found = require_same(model, edit, random_numbers(3, widths[0]).double())
    # Of each layer all go, but for the last of a layer without others, and those that the model returns.
    outputs = [o for o in found.outcomes if o.component.startswith(f"{len(layers)}[")]
    assert {o.state for o in outputs} <= {"zeroed"}
    assert {o.reason for o in outputs} <= {"the model returns it"}
    others = [o for o in found.outcomes if o not in outputs and o.state == "zeroed"]
    assert {o.reason for o in others} <= {"a layer has at least one unit"}
    assert len(others) <= len(layers)


def test_all_neurons_of_a_layer_leave_one():
    model = prepared(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    found = require_same(model, edit_of(model, neurons(model, "0"), range(4)), random_numbers(2, 3).double())
    assert states(found).count("removed") == 3
    assert found.model[0].weight.shape == (1, 3)
    assert "a layer has at least one unit" in reasons(found)


def test_two_readers_behind_different_activations():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2, bias=False)

        def forward(self, x):
            x = self.first(x)
            return self.left(x.relu()) + self.right(torch.tanh(2 * x + 1))

    model = prepared(Branches())
    found = require_same(
        model, edit_of(model, neurons(model, "first"), [1, 2]), random_numbers(4, 3).double()
    )
    assert states(found) == ["removed"] * 2
    assert found.model.right.bias is not None
    assert model.right.bias is None


def test_hidden_units_named_by_what_reads_them():
    model = prepared(nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2)))
    group = ComponentGroup("hidden", "hidden", "2", "weight", 1, 6, side="input")
    for value in ("zero", 0.3):
        edit = edit_of(model, ComponentSet([group]), [0, 4, 5], value=value)
        found = require_same(model, edit, random_numbers(4, 3).double())
        assert states(found) == ["removed"] * 3
        assert found.model[0].out_features == found.model[2].in_features == 3


def test_a_unit_that_is_read_elsewhere_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            x = self.first(x)
            return self.left(x) + self.right(x)

    model = prepared(Twice())
    group = ComponentGroup("hidden", "hidden", "left", "weight", 1, 5, side="input")
    found = require_same(model, edit_of(model, ComponentSet([group]), [1]), random_numbers(4, 3).double())
    assert states(found) == ["zeroed"]
    assert "no constant where it is read" in reasons(found)[0]
    assert found.parameters_after == found.parameters_before


class GatedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dtype", EXACT)
def test_units_of_a_gated_mlp_go_from_both_of_its_layers(dtype):
    model = prepared(GatedMlp(), dtype)
    edits = {
        "up": edit_of(model, neurons(model, "up"), [1, 4]),
        "gate": edit_of(model, neurons(model, "gate"), [1, 4], "ablate"),
        "both": edit_of(model, neurons(model, "gate", "up"), [1, 4, 7, 10], value=0.5),
        "hidden": edit_of(
            model, ComponentSet([ComponentGroup("h", "h", "down", "weight", 1, 6, side="input")]), [1, 4]
        ),
    }
    for edit in edits.values():
        found = require_same(model, edit, random_numbers(3, 4).to(dtype))
        assert set(states(found)) == {"removed"}
        assert [len(layer.weight) for layer in (found.model.gate, found.model.up)] == [4, 4]
        assert found.model.down.weight.shape == (3, 4)


def test_half_of_a_gated_unit_that_is_no_zero_stays():
    model = prepared(GatedMlp())
    found = require_same(model, edit_of(model, neurons(model, "gate"), [1, 4]), random_numbers(3, 4).double())
    assert set(reasons(found)) == {"it is no constant where it is read"}
    assert found.parameters_after == found.parameters_before


# ----------------------------------------------------------------------------------- convolutions


def chain(padding, activation=None, mode="zeros", tail=None, bias=True):
    """conv-BN-activation-conv-BN-pool-flatten-Linear on [2, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(8),
        activation or nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=padding, padding_mode=mode, bias=bias),
        nn.BatchNorm2d(6),
        *(tail or [nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)]),
    )


TAILS = {
    "max_pool": [nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.LazyLinear(3)],
    "avg_pool": [nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3)],
    "adaptive": [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.LazyLinear(3)],
}


def filters(model, *include):
    return neurons(model, *include, kinds=("conv_filter",))


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("bias", ["keep", "ablate"])
def test_without_padding_every_filter_goes(dtype, bias):
    model = prepared(chain(0), dtype)
    edit = edit_of(model, filters(model), [0, 1, 2, 8, 10], bias)
    found = require_same(model, edit, random_numbers(3, 2, 8, 8).to(dtype))
    assert states(found) == ["removed"] * 5
    assert found.model[0].weight.shape[0] == found.model[3].weight.shape[1] == 5
    assert len(found.model[1].running_mean) == len(found.model[1].weight) == found.model[1].num_features == 5
    assert found.model[8].weight.shape == (3, 4 * 4)


@pytest.mark.parametrize("tail", TAILS)
def test_filters_before_pooling_and_flattening(tail):
    model = chain(0, tail=copy.deepcopy(TAILS[tail]))
    model.eval()(torch.zeros(1, 2, 8, 8))
    model = prepared(model)
    found = require_same(
        model, edit_of(model, filters(model, "3"), [1, 2]), random_numbers(3, 2, 8, 8).double()
    )
    assert states(found) == ["removed"] * 2


def test_pooling_that_pads_with_zeros_keeps_its_filters():
    model = chain(0, tail=[nn.AvgPool2d(2, padding=1), nn.Flatten(), nn.Linear(6 * 9, 3)])
    model = prepared(model)
    found = require_same(model, edit_of(model, filters(model, "3"), [1]), random_numbers(3, 2, 8, 8).double())
    assert states(found) == ["zeroed"]
    assert "avg_pool2d" in reasons(found)[0]


def with_constants(constants):
    """A padded chain whose ablated filters of the first layer are these numbers before the ReLU."""
    model = prepared(chain(1, bias=False))
    norm = model[1]
    with torch.no_grad():
        wanted = torch.tensor(constants, dtype=torch.float64)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        norm.bias[: len(constants)] = wanted + (norm.running_mean * scale)[: len(constants)]
    return model


def test_padding_lets_go_what_relu_turns_to_zero():
    model = with_constants([-1.0, -0.5, 0.4])
    found = require_same(
        model, edit_of(model, filters(model, "0"), range(3)), random_numbers(2, 2, 8, 8).double()
    )
    assert states(found) == ["removed", "removed", "zeroed"]
    assert reasons(found) == [MOVED, MOVED, BORDER]
    assert found.model[3].weight.shape == (6, 6, 3, 3)


def test_one_filter_stands_for_all_constants_at_a_border():
    model = with_constants([0.3, -1.0, 0.9, 0.5])
    found = require_same(
        model, edit_of(model, filters(model, "0"), range(4)), random_numbers(2, 2, 8, 8).double()
    )
    assert states(found) == ["removed", "removed", "zeroed", "removed"]
    assert reasons(found)[2] == BORDER
    assert reasons(found)[1] == MOVED
    assert all("unit 2" in reasons(found)[i] for i in (0, 3))


def test_other_paddings_than_zeros_leave_a_constant_constant():
    model = prepared(chain(1, nn.GELU(), mode="circular"))
    found = require_same(
        model, edit_of(model, filters(model, "0"), [0, 5]), random_numbers(2, 2, 8, 8).double()
    )
    assert reasons(found) == [MOVED, MOVED]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("value", ["zero", 0.5])
def test_a_residual_network_loses_filters_inside_its_blocks(dtype, value):
    model = prepared(resnet8(), dtype)
    components = filters(model)
    indices = [i for i in range(len(components)) if i % 3 == 0]
    image = random_numbers(2, 3, 32, 32).to(dtype)
    found = require_same(model, edit_of(model, components, indices, value=value), image)
    by_name = {o.component: o for o in found.outcomes}
    for stage in ("stage1", "stage2", "stage3"):
        inside = [o for name, o in by_name.items() if name.startswith(f"{stage}.0.conv1[")]
        assert sum(o.state == "zeroed" for o in inside) <= 1  # the one that stands for all
        assert len(inside) > 4
    outside = [o for name, o in by_name.items() if ".conv1[" not in name]
    assert {o.state for o in outside} == {"zeroed"}
    assert any("residual sum" in o.reason for o in outside)
    assert found.parameters_after < 0.8 * found.parameters_before
    assert found.report.columns.tolist() == ["component", "state", "reason"]
    assert found.report.component.tolist() == [components.names[i] for i in indices]
    assert len(found.report) == len(indices)


def test_an_edit_of_an_experiment_is_removed():
    model = prepared(chain(1))
    data = [(x, torch.tensor(0)) for x in random_numbers(4, 2, 8, 8).double()]
    task = coar.Task(model, data, outputs={"margin": coar.outputs.margin}, device="cpu")
    experiment = coar.ComponentAblation(task, filters(model), value="mean")
    edit = Edit.of(experiment, [0, 4, 9])
    found = require_same(model, edit, random_numbers(2, 2, 8, 8).double())
    assert "removed" in states(found)


# ------------------------------------------------------------------------------- what cannot be cut


class Blocked(nn.Module):
    """A layer of 4 units and one that reads them, and what stands between them."""

    def __init__(self, between, layer=None, reader=None, **more):
        super().__init__()
        self.layer, self.reader = layer or nn.Linear(4, 4), reader or nn.Linear(4, 2)
        self.between = between
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.reader(self.between(self, x))


BLOCKED = {
    "residual": (lambda: Blocked(lambda m, x: x + m.layer(x)), "residual sum"),
    "norm": (lambda: Blocked(lambda m, x: m.norm(m.layer(x)), norm=nn.LayerNorm(4)), "layer_norm"),
    "softmax": (lambda: Blocked(lambda m, x: m.layer(x).softmax(-1)), "softmax"),
    "twice": (lambda: Blocked(lambda m, x: m.layer(m.layer(x))), "several times"),
    "weight": (lambda: Blocked(lambda m, x: functional.linear(m.layer(x), m.layer.weight)), "several times"),
    "prelu": (lambda: Blocked(lambda m, x: m.act(m.layer(x)), act=nn.PReLU(4)), "prelu"),
    "batch_norm": (
        lambda: Blocked(lambda m, x: m.norm(m.layer(x)), norm=nn.BatchNorm1d(4, track_running_stats=False)),
        "BatchNorm",
    ),
    "size": (
        lambda: Blocked(lambda m, x: m.layer(x).reshape(-1, 4)),
        "the forward pass counts on the layer's size",
    ),
    "sum": (lambda: Blocked(lambda m, x: m.layer(x) + m.up(x), up=nn.Linear(4, 4)), "residual sum"),
    "scaled": (lambda: Blocked(lambda m, x: m.layer(x) * m.up(x), up=nn.Linear(4, 1)), "mul reads it"),
    "computed": (lambda: Blocked(lambda m, x: m.layer(x) * x.mean()), "mul reads it"),
    "index": (lambda: Blocked(lambda m, x: m.layer(x)[:, [3, 2, 1, 0]]), "getitem"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_cannot_be_cut_stays_and_says_why(name):
    make, reason = BLOCKED[name]
    model = prepared(make())
    found = require_same(
        model, edit_of(model, neurons(model, "layer"), [1, 2]), random_numbers(4, 4).double()
    )
    assert states(found) == ["zeroed"] * 2
    assert all(reason in text for text in reasons(found)), reasons(found)
    assert found.parameters_after == found.parameters_before


@pytest.mark.parametrize("place", [0, 1])
def test_grouped_convolutions_stay(place):
    layers = [nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)]
    layers[place] = nn.Conv1d(4, 4, 1, groups=2)
    model = prepared(nn.Sequential(*layers, nn.Conv1d(4, 1, 1)))
    found = require_same(model, edit_of(model, filters(model, "0"), [1]), random_numbers(4, 4, 5).double())
    assert "grouped" in reasons(found)[0]


def test_heads_stay():
    attention = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
    model = prepared(nn.Sequential(attention, nn.Linear(8, 2)))
    both = neurons(model, kinds=("attention_head",)) + neurons(model, "0.linear1")
    found = require_same(model, edit_of(model, both, [0, 3, 5]), random_numbers(2, 6, 8).double())
    assert states(found) == ["zeroed", "removed", "removed"]


def test_a_layer_that_two_modules_share_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model = prepared(model)
    group = ComponentGroup("0", "neuron", "0", "weight", 0, 4, bias="bias")
    found = require_same(model, edit_of(model, ComponentSet([group]), [1]), random_numbers(2, 4).double())
    assert "several times" in reasons(found)[0]


def test_hooks_keep_their_layer():
    model = prepared(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    model[0].register_forward_hook(lambda _module, _given, y: y * torch.arange(4.0).double())
    found = require_same(model, edit_of(model, neurons(model, "0"), [1]), random_numbers(2, 4).double())
    assert "no units of a plain" in reasons(found)[0]


# ------------------------------------------------------------------------------------------ errors


def test_a_difference_is_refused():
    """What a pass on the example does not show: another branch for other inputs."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.first(x)
            total = hidden.sum(-1, keepdim=True) if x.mean() != 1 else 0
            return self.second(hidden) + total

    model = prepared(Branching())
    edit = edit_of(model, neurons(model, "first"), [1])
    with refused(EditError, "equal outputs, up to", "edit.apply(model)"):
        removed(model, edit, torch.ones(2, 3, dtype=torch.float64))


def test_a_model_that_fails_on_other_inputs_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.first(x)
            return self.second(hidden if x.mean() == 1 else hidden + torch.ones(4))

    model = prepared(Branching())
    edit = edit_of(model, neurons(model, "first"), [1])
    with refused(EditError, "RuntimeError", "edit.apply(model)"):
        removed(model, edit, torch.ones(2, 3, dtype=torch.float64))


def test_training_mode_and_other_models_are_refused():
    model = prepared(nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)))
    edit = edit_of(model, neurons(model, "0"), [1])
    with refused(EditError, "model.eval()", "(model)"):
        removed(copy.deepcopy(model).train(), edit, torch.ones(2, 3).double())
    with refused(EditError, "another model"):
        removed(prepared(copy.deepcopy(model), seed=1), edit, torch.ones(2, 3).double())


# ------------------------------------------------------------------------------------------- GPT-2


@pytest.mark.slow
def test_neurons_and_hidden_units_of_gpt2():
    transformers = pytest.importorskip("transformers", reason=coar.errors.install_hint("language"))
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = prepared(transformers.GPT2LMHeadModel(config))
    tokens = torch.arange(10).view(2, 5) % 11
    up = neurons(model, "*mlp.c_fc")
    edit = edit_of(model, up, [0, 5, 33, 40])
    others = [{"input_ids": tokens.flip(0)}, {"input_ids": tokens[:, :3]}]
    found = require_same(model, edit, {"input_ids": tokens}, inputs=others)
    assert states(found) == ["removed"] * 4
    assert found.model.transformer.h[0].mlp.c_fc.nf == 30 == found.model.transformer.h[0].mlp.c_proj.nx
    assert found.parameters_before - found.parameters_after == 4 * 17
    rows = coar.find_components(model, kinds=["conv1d_input_row"])
    picked = [rows.names[rows.index(f"transformer.h.1.{name}[2]")] for name in ("mlp.c_proj", "attn.c_attn")]
    found = require_same(model, edit_of(model, rows, picked), {"input_ids": tokens})
    assert states(found) == ["removed", "zeroed"]


# ----------------------------------------------------------------------------------- architectures

FUSED = {"phi3"}  # both halves of its gated MLP are one layer, cut in two by chunk


def as_float64(value):
    if isinstance(value, dict):
        return {key: as_float64(entry) for key, entry in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def units_of(model):
    """All filters and all neurons that there are."""
    classes = {"neuron": ("Linear", "Conv1D"), "conv_filter": ("Conv1d", "Conv2d")}
    found = ComponentSet([])
    for kind, names in classes.items():
        try:
            found = found + neurons(model, kinds=(kind,))
        except ComponentError:
            assert kind == "conv_filter" or sum(type(m).__name__ in names for m in model.modules()) < 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_third_unit_of_known_architectures(name):
    """Whatever a forward pass does with its layers: what is cut is cut right, and the rest says why."""
    model, example = build(name)
    model, example = model.double(), as_float64(example)
    components = units_of(model)
    edit = edit_of(model, components, range(0, len(components), 3), value=0.25)
    larger = [torch.cat([example, -example, example])] if isinstance(example, torch.Tensor) else []
    found = require_same(model, edit, example, inputs=larger)
    assert ("removed" in states(found)) == (name not in FUSED)
