"""Derivatives by gates are finite differences, in every architecture and for every kind of component.

What reads what a gate hands out may work in place, ask for views, or compute where no gradient is taken:
such models give right derivatives, or are refused by name.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import coar
from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.errors import ComponentError
from coar.experiments.examples import move
from coar.experiments.private_model import cast
from coar.gates import (
    GatedActivations,
    PlacedActivations,
    fold_batch_norm,
    make_sites,
    require_agreement,
    require_derivatives,
    verify_ends,
)
from coar.gradients.draws import Gates
from coar.gradients.passes import GatePasses
from coar.testing.components import run_each
from tests.architectures import COUNTS, build
from tests.cases import random_numbers
from tests.refused import refused

CPU = torch.device("cpu")
PAIRS = [(name, kind) for name, counts in COUNTS.items() for kind in counts]
STEP = 1e-6
# Its branches end in a norm: gates before that cancel, except close to 0.
SCALE_FREE = {("gemma2", "block")}
# Under gates torch's attention is written out: equal up to rounding.
WRITTEN_OUT = {"vit", "torch_encoder"}


class Wide(TorchFunctionMode):
    """What a model computes in float32 wherever it runs (norms, softmax) is computed in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "float":
            return args[0].double()
        if name in ("to", "softmax"):
            args = tuple(_wide(value) for value in args)
            kwargs = {key: _wide(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value):
    return torch.float64 if value is torch.float32 else value


def projected(model, example):
    """One number per example, smooth in all that the model gives: [batch]."""
    with Wide():
        out = run_each(model, example)
    weights = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.tanh(out) @ weights.to(out.dtype) * out.shape[1] ** -0.5


def components_of(model, name, kind):
    # The MLP for position biases reads no examples: it has no gates for each of them.
    own = ["*"] if (name, kind) != ("swin_v2", "neuron") else ["*.mlp.*"]
    return find_components(model, kinds=[kind], include=own)


def some(components, count=12):
    """Positions of components, spread over groups."""
    middles = [(flat.start + flat.stop) // 2 for _, flat in components.slices()]
    lasts = [flat.stop - 1 for _, flat in components.slices()]
    spread = np.linspace(0, len(middles) - 1, count).astype(int)
    return sorted({(middles if turn % 2 else lasts)[group] for turn, group in enumerate(spread)})


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.8 + 0.1


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def make_gated(name, kind, placed, fused, bias="keep", value="zero"):
    """Gates of an architecture and its outputs; `fused` as passes have it: folded, channels last."""
    model, example = build(name)
    model = cast(model, torch.float64).requires_grad_(False)
    last = fused and any(isinstance(module, nn.Conv2d) for module in model.modules())
    model = model.to(memory_format=torch.channels_last) if last else model
    example = move(example, CPU, torch.float64, last)
    components = components_of(model, name, kind)
    sites = make_sites(model, components, bias, value)
    if fused:
        with torch.no_grad():
            fold_batch_norm(model, sites, lambda: run_each(model, example))
    of = PlacedActivations if placed else GatedActivations
    gated = of(model, components, sites=sites, fused=fused)
    if placed:
        gated.settle(lambda: projected(model, example))
    return gated, components, lambda: projected(model, example)


def derivatives(gated, gates, outputs):
    asked = gates.clone().requires_grad_()
    with gated.at(asked):
        found = outputs()
    return torch.autograd.grad(found.sum(), asked)[0]


def differences(gated, gates, outputs, position):
    """Of each example's output along one gate; along a gate that all share, of their sum."""
    change = torch.zeros_like(gates)
    change[..., position] = STEP
    ends = []
    with torch.no_grad():
        for end in (gates + change, gates - change):
            with gated.at(end):
                ends.append(outputs())
    found = (ends[0] - ends[1]) / (2 * STEP)
    return found.sum() if gates.ndim == 1 else found


def require_right(gated, components, outputs, gates, least=1e-3):
    found = derivatives(gated, gates, outputs)
    scale = float(found.abs().max())
    assert scale > least, "nothing depends on the gates: the comparison is empty"
    atol = 1e-6 * max(scale, 1e-3)
    for position in some(components):
        expected = differences(gated, gates, outputs, position)
        torch.testing.assert_close(found[..., position], expected, rtol=1e-5, atol=atol)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placed", "fused"),
    [(False, False), (False, True), (True, True)],
    ids=["plain", "plain as in passes", "placed as in passes"],
)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_derivatives_are_finite_differences(name, kind, placed, fused):
    gated, components, outputs = make_gated(name, kind, placed, fused)
    before = state_of(gated.model)
    with torch.no_grad():
        untouched = outputs()
    # CLIP compares the examples of a batch: there, gates are shared.
    gates = uniform(*(() if name == "clip" else (len(untouched),)), len(components))
    found = require_right(gated, components, outputs, gates, 1e-7 if (name, kind) in SCALE_FREE else 1e-3)
    for _ in range(2):
        assert torch.equal(derivatives(gated, gates, outputs), found)
    with gated.at(torch.ones_like(gates)):
        ones = outputs()
    if fused or name in WRITTEN_OUT:
        torch.testing.assert_close(ones, untouched, rtol=1e-10, atol=1e-12)
    else:
        assert torch.equal(ones, untouched)
    with torch.no_grad():
        assert torch.equal(outputs(), untouched)
    assert same_state(gated.model, before)


@pytest.mark.slow
@pytest.mark.parametrize("placed", [False, True], ids=["plain", "placed"])
@pytest.mark.parametrize(("bias", "value"), [("ablate", "zero"), ("keep", 0.3), ("ablate", 0.3)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mobilenet_v3", "conv_filter"),
        ("efficientnet", "conv_filter"),
        ("timm_resnet", "conv_filter"),
        ("timm_convnext", "neuron"),
        ("vit", "mlp_neuron"),
        ("bert", "attention_head"),
        ("llama", "neuron"),
    ],
)
def test_derivatives_under_other_conventions(name, kind, bias, value, placed):
    gated, components, outputs = make_gated(name, kind, placed, fused=True, bias=bias, value=value)
    require_right(gated, components, outputs, uniform(2, len(components)))


# ------------------------------------------------------------------------------------- through passes


class Wrapped(nn.Module):
    """A model and arguments that are no tensors."""

    def __init__(self, model, fixed):
        super().__init__()
        self.model, self.fixed = model, fixed
        self.eval()


class Examples(torch.utils.data.Dataset):
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def value(model, batch):
    return projected(model.model, batch | model.fixed if isinstance(batch, dict) else batch)


def task_of(name):
    model, example = build(name)
    if isinstance(example, torch.Tensor):
        return coar.Task(Wrapped(model, {}), Examples(example), {"value": value}, device="cpu")
    tensors = {key: entry for key, entry in example.items() if isinstance(entry, torch.Tensor)}
    fixed = {key: entry for key, entry in example.items() if key not in tensors}
    examples = [{key: entry[i] for key, entry in tensors.items()} for i in range(2)]
    return coar.Task(Wrapped(model, fixed), Examples(examples), {"value": value}, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "clip"])  # its examples meet
def test_passes_of_an_experiment(name):
    task = task_of(name)
    kinds = ["attention_head", "mlp_neuron"] if "attention_head" in COUNTS[name] else ["conv_filter"]
    components = find_components(task.model, kinds=kinds)
    passes = GatePasses(coar.ComponentAblation(task, components), ["value"], CPU, precision="float64")
    before = state_of(passes._private.model)
    _, batch = next(passes.batches(np.arange(2)))
    gates = uniform(2, len(components)).numpy()

    def along(change):
        return passes.derivatives(batch, Gates(gates + change, gates > 1))["value"]

    found = along(0.0)
    scale = np.abs(found.by_gate).max()
    assert scale > 1e-4
    for position in some(components):
        step = np.zeros(len(components))
        step[position] = STEP
        expected = (along(step).values - along(-step).values) / (2 * STEP)
        np.testing.assert_allclose(found.by_gate[:, position], expected, rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_array_equal(along(0.0).by_gate, found.by_gate)
    assert same_state(passes._private.model, before)


def test_a_pass_that_fails_leaves_nothing_behind():
    gated, components, outputs = make_gated("mobilenet_v2", "block", placed=True, fused=True)
    before, gates = state_of(gated.model), uniform(2, len(components))
    expected = derivatives(gated, gates, outputs)

    def failing():
        outputs()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        derivatives(gated, gates, failing)
    assert same_state(gated.model, before)
    assert torch.equal(derivatives(gated, gates, outputs), expected)


# ------------------------------------------------------------------------------------------- in place

IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "mish": nn.Mish(inplace=True),
    "elu": nn.ELU(inplace=True),
    "selu": nn.SELU(inplace=True),
    "celu": nn.CELU(inplace=True),
    "leaky relu": nn.LeakyReLU(0.1, inplace=True),
    "threshold": nn.Threshold(0.1, 0.0, inplace=True),
    "rrelu": nn.RReLU(inplace=True),
    "tanh_": torch.tanh_,
    "sigmoid_": torch.sigmoid_,
    "add": lambda x: x.add_(1).mul_(1.5).sub_(0.2),
    "assigned": lambda x: x.__setitem__((slice(None), 0), 1.0) or x,
    "on a view": lambda x: x.flatten(1).tanh_().reshape(x.shape) + x,
    "on a half": lambda x: (x.chunk(2, dim=1)[0].clone().sigmoid_(), torch.tanh(x))[1],
    "filled": lambda x: x.masked_fill_(x < -1, 0.0),
}


class Images(nn.Module):
    def __init__(self, act, channels=6):
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, channels, 3, padding=1), act
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        return self.out(self.act(self.conv(x))).flatten(1)


def double(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
    return model.eval().requires_grad_(False)


def gates_of(model, x, placed, kinds, fused=True, **selection):
    components = find_components(model, kinds=kinds, **selection)
    of = PlacedActivations if placed else GatedActivations
    gated = of(model, components, sites=make_sites(model, components), fused=fused)
    if placed:
        gated.settle(lambda: model(x))
    return gated, components


@pytest.mark.parametrize("placed", [False, True], ids=["plain", "placed"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("channels", [6, 40])  # few channels go another way
@pytest.mark.parametrize("name", IN_PLACE)
def test_functions_in_place(name, channels, last, fused, placed):
    model, x = double(Images(IN_PLACE[name], channels)), random_numbers(3, 2, 4, 4).double()
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    gated, components = gates_of(model, x, placed, ["conv_filter"], fused, include=["conv"])

    def outputs():
        return torch.tanh(model(x)).sum(dim=1)

    require_right(gated, components, outputs, uniform(3, channels))


def test_a_view_of_what_a_gate_emits_is_not_what_it_hands_out():
    """Or every function that works in place would copy its gradient."""
    for channels in (6, 40):
        model, x = double(Images(nn.Identity(), channels)), random_numbers(3, 2, 4, 4).double()
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        seen = []
        model.act.register_forward_hook(lambda *call, seen=seen: seen.append(call[2]._is_view()))
        for fused in (False, True):
            gated, _ = gates_of(model, x, False, ["conv_filter"], fused, include=["conv"])
            with gated.at(uniform(3, channels).requires_grad_()):
                model(x)
        assert seen == [False, False]


def test_a_linear_layer_on_a_single_pixel():
    """Its output has the layout of images with channels last, but not their channels."""
    model = double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten()))
    x = random_numbers(3, 1, 1, 4).double()
    for placed in (False, True):
        gated, components = gates_of(model, x, placed, ["neuron"])
        require_right(gated, components, lambda: torch.tanh(model(x)).sum(dim=1), uniform(3, len(components)))


# ------------------------------------------------------------- where gradients end, or come in late


class Ways(nn.Module):
    """Two hidden layers; `middle` says how the model gets from the first to the last."""

    def __init__(self, middle):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle = middle

    def forward(self, x):
        return self.out(self.middle(torch.tanh(self.one(x)), self.two))


def without_gradients(x, two):
    with torch.no_grad():
        return torch.tanh(two(x))


def in_inference_mode(x, two):
    with torch.inference_mode():
        return torch.tanh(two(x))


def activation_without_gradients(x, two):
    y = two(x)
    with torch.no_grad():
        weights = torch.sin(y)
    return y * weights


def changed_after_reading(x, two):
    y = two(x)
    x.add_(1.0)  # tanh has kept it
    return torch.tanh(y + x)


def straight_through(x, two):
    y = torch.tanh(two(x))
    return y + (torch.round(2 * y) / 2 - y).detach()


def changed_behind_the_back(x, two):
    y = two(x)
    y.data.mul_(0.5)
    return torch.tanh(y)


def reentrant(function, x):
    return checkpoint(function, x, use_reentrant=True)


def recomputed(function, x):
    return checkpoint(function, x, use_reentrant=False)


RIGHT = {
    "as it is": lambda x, two: torch.tanh(two(x)),
    "a checkpoint without gates": lambda x, two: recomputed(torch.tanh, two(x)),
    "a checkpoint of what a gate emits": lambda x, two: recomputed(lambda y: y.sin() + y.tanh() ** 2, two(x)),
    "a function nobody knows": lambda x, two: functional.softmax(two(x), dim=1).cumsum(dim=1),
}
REFUSED = {
    "a gated layer without gradients": (without_gradients, "gradients do not reach two.weight"),
    "a gated layer in inference mode": (in_inference_mode, "gradients do not reach two.weight"),
    "a reentrant checkpoint": (
        lambda x, two: reentrant(lambda y: torch.tanh(two(y)), x),
        "gradients do not reach two.weight",
    ),
    "a reentrant checkpoint without gates": (
        lambda x, two: reentrant(torch.tanh, two(x)),
        "cannot be differentiated",
    ),
    "a checkpoint": (lambda x, two: recomputed(lambda y: torch.tanh(two(y)), x), "cannot be differentiated"),
    "changed after reading": (changed_after_reading, "cannot be differentiated"),
    "cut": (lambda x, two: torch.tanh(two(x.detach())), "gates of one are 0 although ablating it changes"),
    "rounded": (lambda x, two: torch.round(two(x)), "gates of one are 0 although ablating it changes"),
}
WARNED = {
    "cut beside a way that is not": lambda x, two: torch.tanh(two(x.detach())) + 0.5 * x,
    "weights without gradients": activation_without_gradients,
    "straight through": straight_through,
    "changed behind the back": changed_behind_the_back,
}


def ways(middle, placed):
    model, x = double(Ways(middle)), random_numbers(16, 4).double()
    components = find_components(model, kinds=["neuron"], include=["one", "two"])
    of = PlacedActivations if placed else GatedActivations
    gated = of(model, components, sites=make_sites(model, components))

    def look():
        check = gated, components, lambda: model(x)[:, 0], len(x)
        return (
            verify_ends(*check, derivatives=True) if placed else require_agreement(*check, derivatives=True)
        )

    return gated, components, x, look


@pytest.mark.parametrize("placed", [False, True], ids=["plain", "placed"])
class TestWays:
    @pytest.mark.parametrize("name", RIGHT)
    def test_that_are_right(self, name, placed):
        gated, components, x, look = ways(RIGHT[name], placed)
        look()
        require_right(gated, components, lambda: gated.model(x)[:, 0], uniform(16, len(components)))

    @pytest.mark.parametrize("name", [name for name in REFUSED if name != "changed after reading"])
    def test_that_are_refused(self, name, placed):
        middle, words = REFUSED[name]
        gated, _, _, look = ways(middle, placed)
        before = state_of(gated.model)
        with warnings.catch_warnings():
            # Of rounding: both its derivatives are missing, and said so.
            warnings.filterwarnings("ignore", "derivatives by gates miss")
            warnings.filterwarnings("ignore", "gates of (one|two) stay at the layer")
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # a checkpoint's
            with refused(ComponentError, words, "regression"):
                look()
        assert same_state(gated.model, before)

    @pytest.mark.parametrize("name", WARNED)
    def test_that_are_warned_of(self, name, placed):
        _, _, _, look = ways(WARNED[name], placed)
        with pytest.warns(UserWarning, match="derivatives by gates miss .*coar.check"):
            look()


def test_what_cannot_be_differentiated_under_plain_gates_can_be_right_where_they_are_placed():
    """The activation that is overwritten is computed once more, for the gate."""
    gated, components, x, look = ways(changed_after_reading, placed=True)
    assert look() == {}
    require_right(gated, components, lambda: gated.model(x)[:, 0], uniform(16, len(components)))
    *_, look = ways(changed_after_reading, placed=False)
    with refused(ComponentError, "cannot be differentiated", "regression"):
        look()


def test_autocast_inside_of_a_model_is_refused():
    """A gate on activations rounds at other places than one on weights, by more than float32 allows."""

    def middle(x, two):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.tanh(two(x)).to(x.dtype)

    model, x = double(Ways(middle)).float(), random_numbers(16, 4)
    components = find_components(model, kinds=["neuron"], include=["one", "two"])
    gated = GatedActivations(model, components, sites=make_sites(model, components))
    with refused(ComponentError, "differ from scaled weights", "autocast"):
        require_agreement(gated, components, lambda: model(x)[:, 0], len(x))


def test_components_that_nothing_reads_are_no_cut_graph():
    model, x = double(Ways(RIGHT["as it is"])), random_numbers(16, 4).double()
    model.spare = copy.deepcopy(model.two)
    components = find_components(model, kinds=["neuron"], include=["one", "two", "spare"])
    gated = GatedActivations(model, components, sites=make_sites(model, components))
    require_derivatives(gated, components, lambda: model(x)[:, 0], len(x))


class Branch(nn.Module):
    """A residual branch that ends in a norm, or does not."""

    def __init__(self, normed):
        super().__init__()
        self.normed, self.one, self.two, self.out = normed, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        for layer in (self.one, self.two):
            y = layer(torch.tanh(x))
            x = x + (functional.rms_norm(y, (4,), eps=1e-6) if self.normed else y)
        return self.out(x)


@pytest.mark.parametrize("placed", [False, True], ids=["plain", "placed"])
def test_branches_that_undo_their_gates_are_refused(placed):
    """Between 1 and a thousandth the gate changes nothing: derivatives miss the whole ablation."""
    for normed in (False, True):
        model, x = double(Branch(normed)), random_numbers(16, 4).double()
        fields = {
            "kind": "block",
            "parameter": "weight",
            "dimension": 0,
            "count": 1,
            "width": 4,
            "whole": True,
        }
        components = ComponentSet(
            [ComponentGroup(name, module=name, bias="bias", **fields) for name in ("one", "two")]
        )
        of = PlacedActivations if placed else GatedActivations
        gated = of(model, components, sites=make_sites(model, components))
        if placed:
            gated.settle(lambda model=model, x=x: model(x))
        check = gated, components, lambda model=model, x=x: model(x)[:, 0], len(x)
        if normed:
            with refused(ComponentError, "undone by a norm", "one", "block", "coar.Study"):
                require_derivatives(*check)
        else:
            require_derivatives(*check)
