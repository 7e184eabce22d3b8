"""Gated activations against python loops, literal rebuilds and finite differences."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.errors import ComponentError
from coar.fingerprints import model_fingerprint
from coar.gates import GatedActivations, ScaledWeights
from tests.cases import random_numbers
from tests.refused import refused

CONVENTIONS = [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7)]
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64


def numbers(*shape, seed=0):
    return random_numbers(*shape, seed=seed).double()


def some_gates(*shape, seed=1):
    """In [0, 1], both ends among them."""
    gates = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (gates * 1.4 - 0.2).clamp(0, 1)


def randomised(model, seed=0):
    """No parameter and no statistic at 0 or 1, float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.7
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.data = module.running_var.abs() + 0.5
    return model.requires_grad_(False)


def units(module, count, bias="bias", **fields):
    fields = {"parameter": "weight", "dimension": 0, "kind": "unit"} | fields
    return ComponentGroup(fields.pop("name", module), module=module, count=count, bias=bias, **fields)


def one_set(*groups):
    return ComponentSet(groups, overlap=True)


def gated(model, components, gates, *inputs, **options):
    with GatedActivations(model, components, **options).at(gates):
        return model(*inputs)


def scaled(model, components, gates, bias="keep", value="zero"):
    """A copy with scaled weights: the other implementation, which has tests of its own."""
    weights = ScaledWeights(copy.deepcopy(model), components, bias, value)
    weights.set(gates.numpy())
    return weights.model


# ------------------------------------------------------------------------------------------ one layer

# Layer, input of a batch of three, dimension of the units in what one example gets, units, where they lie.
SINGLE = {
    "linear": (nn.Linear(4, 6), (3, 4), 0, 6, {}),
    "linear without bias": (nn.Linear(4, 6, bias=False), (3, 4), 0, 6, {"bias": None}),
    "linear on tokens": (nn.Linear(4, 6), (3, 5, 4), 1, 6, {}),
    "linear on images": (nn.Linear(4, 6), (3, 2, 5, 4), 2, 6, {}),
    "conv1d": (nn.Conv1d(2, 4, 3), (3, 2, 7), 0, 4, {}),
    "conv2d": (nn.Conv2d(2, 4, 3, padding=1), (3, 2, 5, 5), 0, 4, {}),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (3, 4, 5, 5), 0, 6, {}),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (3, 4, 5, 5), 0, 4, {"bias": None}),
    "conv2d reflected": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (3, 2, 5, 5), 0, 4, {}),
    "conv3d": (nn.Conv3d(2, 3, 2), (3, 2, 3, 3, 3), 0, 3, {}),
    "transposed1d": (nn.ConvTranspose1d(2, 4, 3), (3, 2, 5), 0, 4, {"dimension": 1}),
    "transposed2d": (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        (3, 4, 5, 5),
        0,
        6,
        {"dimension": 1, "blocks": 2},
    ),
    "transposed3d": (
        nn.ConvTranspose3d(4, 4, 2, groups=4, bias=False),
        (3, 4, 3, 3, 3),
        0,
        4,
        {"dimension": 1, "blocks": 4, "bias": None},
    ),
    "hugging face conv1d": (Conv1D(6, 4), (3, 5, 4), 1, 6, {"dimension": 1}),
    "hugging face conv1d on vectors": (Conv1D(6, 4), (3, 4), 0, 6, {"dimension": 1}),
    "batch norm of vectors": (nn.BatchNorm1d(4), (3, 4), 0, 4, {}),
    "batch norm of images": (nn.BatchNorm2d(4), (3, 4, 5, 5), 0, 4, {}),
    "batch norm of volumes": (nn.BatchNorm3d(4), (3, 4, 2, 2, 2), 0, 4, {}),
    "layer norm": (nn.LayerNorm(4), (3, 5, 4), 1, 4, {}),
}


def make_single(name):
    layer, shape, dimension, count, fields = SINGLE[name]
    layer = randomised(copy.deepcopy(layer))
    return layer, one_set(units("", count, name="units", **fields)), numbers(*shape), dimension


def literal(layer, y, gates, dimension, bias, value):
    """The definition, unit by unit and example by example."""
    y = y.clone()
    for example, row in enumerate(gates):
        for unit, gate in enumerate(row):
            part = y[example].select(dimension, unit)
            rest = 0.0 if layer.bias is None or bias == "ablate" else layer.bias[unit]
            rest = rest if value == "zero" else value
            part.copy_(gate * part + (1 - gate) * rest)
    return y


@pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
@pytest.mark.parametrize("name", SINGLE)
class TestSingleLayers:
    def test_follow_the_definition_example_by_example(self, name, bias, value):
        layer, components, x, dimension = make_single(name)
        gates = some_gates(3, len(components))
        expected = literal(layer, layer(x), gates, dimension, bias, value)
        for fused in (False, True):
            found = gated(layer, components, gates, x, bias=bias, value=value, fused=fused)
            torch.testing.assert_close(found, expected, **EXACT)

    def test_one_gate_vector_is_that_of_every_example_and_of_scaled_weights(self, name, bias, value):
        layer, components, x, _ = make_single(name)
        gates = some_gates(len(components))
        each = gated(layer, components, gates.expand(3, -1), x, bias=bias, value=value)
        for fused in (False, True):
            found = gated(layer, components, gates, x, bias=bias, value=value, fused=fused)
            torch.testing.assert_close(found, each, **EXACT)
        torch.testing.assert_close(scaled(layer, components, gates, bias, value)(x), each, **EXACT)

    def test_gates_of_one_are_the_untouched_layer_bit_for_bit(self, name, bias, value):
        layer, components, x, _ = make_single(name)
        untouched = layer(x)
        for shape in ((len(components),), (3, len(components))):
            gates = torch.ones(shape, dtype=torch.float64)
            assert torch.equal(gated(layer, components, gates, x, bias=bias, value=value), untouched)

    def test_the_layer_is_left_as_it_was(self, name, bias, value):
        layer, components, x, _ = make_single(name)
        before, names = model_fingerprint(layer), [n for n, _ in layer.named_parameters()]
        gated(layer, components, some_gates(len(components)), x, bias=bias, value=value)
        assert model_fingerprint(layer) == before
        assert [n for n, _ in layer.named_parameters()] == names

    def test_gradients_are_finite_differences(self, name, bias, value):
        layer, components, x, _ = make_single(name)
        require_finite_differences(layer, components, x, 3, bias=bias, value=value)


def weighted(outputs):
    """A smooth number of each example that depends on every output."""
    flat = outputs.flatten(1)
    return (torch.sin(flat) * torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)).sum(dim=1)


def gradients(model, components, gates, x, **options):
    gates = gates.clone().requires_grad_()
    outputs = weighted(gated(model, components, gates, x, **options))
    return torch.autograd.grad(outputs.sum(), gates)[0]


def require_finite_differences(model, components, x, batch, **options):
    """Of each example's gates and of gates for all; every third component, for speed."""
    step = 1e-6
    for shape in ((batch, len(components)), (len(components),)):
        gates = 0.1 + 0.8 * some_gates(*shape)
        found = gradients(model, components, gates, x, **options)
        torch.testing.assert_close(
            found, gradients(model, components, gates, x, fused=True, **options), rtol=1e-8, atol=1e-8
        )
        for component in range(0, len(components), 3):
            up, down = gates.clone(), gates.clone()
            up[..., component] += step
            down[..., component] -= step
            change = weighted(gated(model, components, up, x, **options))
            change = (change - weighted(gated(model, components, down, x, **options))) / (2 * step)
            expected = change if len(shape) == 2 else change.sum()
            torch.testing.assert_close(found[..., component], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv2d grouped", "conv3d", "transposed2d"])
class TestUnbatchedImages:
    def test_are_gated_along_their_channels(self, name):
        layer, components, x, dimension = make_single(name)
        gates = some_gates(len(components))
        expected = literal(layer, layer(x), gates.expand(3, -1), dimension, "keep", "zero")[1]
        for own in (gates, gates[None]):
            for fused in (False, True):
                found = gated(layer, components, own, x[1], fused=fused)
                torch.testing.assert_close(found, expected, **EXACT)


def test_channels_last_and_contiguous_images_are_gated_alike():
    """Also with few channels innermost, for which half precision has a loop of its own."""
    layer, components, x, _ = make_single("conv2d")
    gates = some_gates(3, len(components))
    expected = gated(layer, components, gates, x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    for fused in (False, True):
        images = x.contiguous(memory_format=torch.channels_last)
        for own in (gates, gates[0]):
            expected = gated(layer, components, own, x)
            found = gated(last, components, own, images, fused=fused)
            torch.testing.assert_close(found, expected, **EXACT)


# ---------------------------------------------------------------------------------------- small models


class InPlace(nn.Module):
    """A ReLU writes over what the gated layers emit."""

    inputs, groups = (2, 5, 5), (units("conv", 4), units("head", 3))

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.relu(self.head(self.relu(self.conv(x)).mean(dim=(2, 3))))


class Shared(nn.Module):
    """One layer called twice, and once more through its weight alone."""

    inputs, groups = (4,), (units("layer", 4),)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return functional.linear(x, self.layer.weight, self.layer.bias)


class TwoNames(nn.Module):
    """One module under two names."""

    inputs, groups = (4,), (units("second", 4),)

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.first(torch.tanh(self.second(x)))


class PartOfALayer(nn.Module):
    """Runs of units and of inputs, not all of them."""

    inputs = (4,)
    groups = (
        units("up", 2, width=2, offset=1),
        units("down", 2, bias=None, dimension=1, width=2, offset=2, side="input"),
    )

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Windows(nn.Module):
    """Examples are cut into windows along the first dimension, and tokens into rows."""

    inputs, groups = (6, 4), (units("windows", 4), units("rows", 4), units("mixed", 4, dimension=1))

    def __init__(self):
        super().__init__()
        self.windows, self.rows, self.mixed = nn.Linear(4, 4), nn.Linear(4, 4), Conv1D(4, 4)

    def forward(self, x):
        parts = torch.tanh(self.windows(x.reshape(-1, 2, 4)))  # [batch * 3, 2, 4]
        rows = torch.tanh(self.rows(parts.reshape(-1, 4)))  # [batch * 6, 4]
        return self.mixed(rows.reshape(x.shape))


class Patches(nn.Module):
    """Examples are cut into patches that a convolution reads."""

    inputs, groups = (1, 4, 4), (units("conv", 3), units("norm", 3))

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        patches = x.reshape(len(x) * 2, 1, 2, 4)
        return self.norm(self.conv(patches)).reshape(len(x), -1)


SMALL = [InPlace, Shared, TwoNames, PartOfALayer, Windows, Patches]


@pytest.mark.parametrize("bias", ["keep", "ablate"])
@pytest.mark.parametrize("make", SMALL)
class TestSmallModels:
    @pytest.fixture
    def case(self, make):
        return randomised(make()), one_set(*make.groups), numbers(4, *make.inputs)

    def test_a_batch_equals_its_examples_alone_under_scaled_weights(self, case, bias):
        model, components, x = case
        gates = some_gates(4, len(components))
        found = gated(model, components, gates, x, bias=bias)
        for example in range(4):
            alone = scaled(model, components, gates[example], bias)(x[example : example + 1])
            torch.testing.assert_close(found[example : example + 1], alone, **EXACT)

    def test_gradients_of_a_batch_are_those_of_its_examples_alone(self, case, bias):
        model, components, x = case
        gates = some_gates(4, len(components))
        found = gradients(model, components, gates, x, bias=bias)
        assert found.abs().max() > 1e-3
        for example in range(4):
            own = slice(example, example + 1)
            for shape in (gates[own], gates[example]):
                alone = gradients(model, components, shape, x[own], bias=bias).reshape(-1)
                torch.testing.assert_close(found[example], alone, rtol=1e-8, atol=1e-8)

    def test_gradients_are_finite_differences(self, case, bias):
        model, components, x = case
        require_finite_differences(model, components, x[:3], 3, bias=bias)

    def test_gates_of_one_change_no_bit(self, case, bias):
        model, components, x = case
        ones = torch.ones(4, len(components), dtype=torch.float64)
        assert torch.equal(gated(model, components, ones, x, bias=bias), model(x))

    def test_fused_is_the_same_up_to_rounding(self, case, bias):
        model, components, x = case
        gates = some_gates(4, len(components))
        plain, fused = (gated(model, components, gates, x, bias=bias, fused=f) for f in (False, True))
        torch.testing.assert_close(fused, plain, **EXACT)


@given(st.integers(0, 1000))
@settings(max_examples=15)
def test_gates_of_other_examples_do_not_matter(seed):
    model, components = randomised(Windows()), one_set(*Windows.groups)
    x, gates = numbers(4, *Windows.inputs), some_gates(4, len(components), seed=seed)
    others = gates.clone()
    others[[0, 1, 3]] = some_gates(3, len(components), seed=seed + 1)
    ours, theirs = (gated(model, components, g, x) for g in (gates, others))
    assert torch.equal(ours[2], theirs[2])
    assert not torch.equal(ours[0], theirs[0])


# --------------------------------------------------------------- parameters that no known layer reads


class Scale(nn.Module):
    """Four factors, used in several ways."""

    def __init__(self, use):
        super().__init__()
        self.weight, self.bias, self.use = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4)), use

    def forward(self, x):
        return self.use(x, self.weight, self.bias)


def in_place(x, weight, bias):
    return x.clone().mul_(weight).add_(bias)


def with_operators(x, weight, bias):
    x = x.clone()
    x *= weight
    x += bias
    return x


def into_out(x, weight, bias):
    return torch.mul(x, weight, out=torch.empty_like(x)) + bias


USES = {
    "multiplied": lambda x, w, b: x * w + b,
    "multiplied, bias first": lambda x, w, b: torch.add(other=b, input=x * w),
    "in place": in_place,
    "with operators in place": with_operators,
    "into out": into_out,
    "in a list": lambda x, w, b: x * torch.cat([w[:2], w[2:]]) + torch.stack([b, b]).mean(0),
    "in parts": lambda x, w, b: x * torch.cat(w.chunk(2)) + torch.cat(b.split([1, 3])),
    "by name": lambda x, w, b: functional.group_norm(x, 2, weight=w, bias=b),
    "group norm": lambda x, w, b: functional.group_norm(x, 2, w, b),
    "rms norm": lambda x, w, b: functional.rms_norm(x, (4,), w) + b,
    "in float32": lambda x, w, b: x * w.to(x.dtype) + b.to(x.dtype),
    "after its shape": lambda x, w, b: x.reshape(-1, w.shape[0]).to(w.dtype) * w + b,
}


@pytest.mark.parametrize("use", USES)
class TestParametersReadElsewhere:
    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    def test_are_gated_as_scaled_weights_are(self, use, bias, value):
        model, components, x = (
            randomised(Scale(USES[use])),
            one_set(units("", 4, name="factors")),
            numbers(3, 4),
        )
        gates = some_gates(4)
        expected = scaled(model, components, gates, bias, value)(x)
        assert not torch.allclose(expected, model(x))
        found = gated(model, components, gates, x, bias=bias, value=value)
        torch.testing.assert_close(found, expected, **EXACT)

    def test_refuse_gates_for_each_example(self, use):
        model, components = randomised(Scale(USES[use])), one_set(units("", 4, name="factors"))
        with refused(ComponentError, "for each example do not reach", "Scale", "[components]"):
            gated(model, components, some_gates(3, 4), numbers(3, 4))


class ClonedBias(nn.Module):
    """As Swin V2: the bias is cloned before the projection that it belongs to."""

    def __init__(self, first=lambda bias: bias.clone()):
        super().__init__()
        self.linear, self.first = nn.Linear(4, 5), first

    def forward(self, x):
        bias = self.first(self.linear.bias)
        return functional.linear(x, self.linear.weight, bias)


@pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
def test_a_bias_that_is_cloned_on_its_way_is_gated_once(bias, value):
    model, components, x = randomised(ClonedBias()), one_set(units("linear", 5)), numbers(3, 4)
    gates = some_gates(3, 5)
    found = gated(model, components, gates, x, bias=bias, value=value)
    for example in range(3):
        alone = scaled(model, components, gates[example], bias, value)(x[example : example + 1])
        torch.testing.assert_close(found[example : example + 1], alone, **EXACT)
        same = gated(model, components, gates[example], x[example : example + 1], bias=bias, value=value)
        torch.testing.assert_close(same, alone, **EXACT)


def test_a_bias_that_changes_on_its_way_stays_as_it_arrives():
    """Swin V2 sets the biases of keys to zero."""
    changed = ClonedBias(lambda bias: bias * torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0]))
    model, components, x = randomised(changed), one_set(units("linear", 5)), numbers(3, 4)
    gates = some_gates(3, 5)
    for fused in (False, True):
        found = gated(model, components, gates, x, fused=fused)
        for example in range(3):
            alone = scaled(model, components, gates[example])(x[example : example + 1])
            torch.testing.assert_close(found[example : example + 1], alone, **EXACT)


def test_a_bias_read_before_a_weight_that_no_layer_reads_is_refused():
    class BiasFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x):
            bias = self.linear.bias.clone()
            return x @ self.linear.weight.T + bias

    model, components = randomised(BiasFirst()), one_set(units("linear", 5))
    with refused(ComponentError, "gates do not reach linear.weight", "Linear"):
        gated(model, components, some_gates(5), numbers(3, 4), bias="ablate")


def test_a_constant_for_a_layer_without_bias_adds_none_to_the_model():
    layer, components, x, _ = make_single("linear without bias")
    gated(layer, components, some_gates(6), x, value=0.7)
    assert layer.bias is None


def test_a_constant_that_has_nowhere_to_go_is_refused():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5, bias=False)

        def forward(self, x):
            return x @ self.linear.weight.T

    model, components = randomised(Transposed()), one_set(units("linear", 5))
    with refused(ComponentError, "constants do not reach linear.weight"):
        gated(model, components, some_gates(5), numbers(3, 4), value=0.7)
    assert model.linear.bias is None


# ------------------------------------------------------------------------------------------- attention

EMBED, HEADS, BATCH, QUERIES, KEYS = 6, 2, 3, 4, 5
HEADS_AND_UNITS = one_set(
    units("out_proj", HEADS, name="heads", bias=None, dimension=1, width=EMBED // HEADS, side="input"),
    units("", 3 * EMBED, name="units", parameter="in_proj_weight", bias="in_proj_bias"),
)


def make_attention(batch_first=True, **options):
    return randomised(nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **options))


def sequences(which, layout):
    """Query, key and value, laid out as the module wants them."""
    x, y, z = (numbers(BATCH, n, EMBED, seed=n) for n in (QUERIES, KEYS, KEYS))
    z = z + 1
    if layout == "unbatched":
        x, y, z = x[0], y[0], z[0]
    elif layout == "sequence first":
        x, y, z = (part.transpose(0, 1).contiguous() for part in (x, y, z))
    return {
        "self": (x, x, x),
        "cross": (x, y, y),
        "all differ": (x, y, z),
        "positions in keys": (x, x, x + 1),
    }[which]


def padding(length):
    """The last tokens of some examples."""
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, -1] = mask[2, -2:] = True
    return mask


def masks(which, keys, layout):
    """Arguments of a call; True hides."""
    attend = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
    added = numbers(QUERIES, keys, seed=5)
    hidden = padding(keys)
    as_float = torch.zeros(BATCH, keys, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    if layout == "unbatched":
        hidden, as_float = hidden[1], as_float[1]
    heads = HEADS * (1 if layout == "unbatched" else BATCH)
    return {
        "nothing": {},
        "padding": {"key_padding_mask": hidden},
        "padding that is added": {"key_padding_mask": as_float},
        "hidden": {"attn_mask": attend},
        "added": {"attn_mask": added},
        "hidden and padding": {"attn_mask": attend, "key_padding_mask": hidden},
        "added and padding": {"attn_mask": added, "key_padding_mask": as_float},
        "per head": {"attn_mask": numbers(heads, QUERIES, keys, seed=6)},
        "causal": {"attn_mask": attend, "is_causal": True},
    }[which]


MASKS = (
    *("nothing", "padding", "padding that is added", "hidden", "added", "hidden and padding"),
    *("added and padding", "per head", "causal"),
)
WEIGHTS = (
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
)


def require_same(found, expected):
    out, weights = found
    torch.testing.assert_close(out, expected[0], **EXACT)
    assert (weights is None) == (expected[1] is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected[1], **EXACT)


@pytest.mark.parametrize("layout", ["examples first", "sequence first", "unbatched"])
@pytest.mark.parametrize("which", ["self", "cross", "all differ", "positions in keys"])
@pytest.mark.parametrize("mask", MASKS)
class TestAttention:
    @pytest.fixture
    def call(self, layout, which, mask):
        inputs = sequences(which, layout)
        keys = QUERIES if inputs[0].shape == inputs[1].shape else KEYS
        return make_attention(layout != "sequence first"), inputs, masks(mask, keys, layout)

    def test_gates_of_one_are_the_untouched_module(self, call):
        model, inputs, options = call
        for weights in WEIGHTS:
            expected = model(*inputs, **options, **weights)
            for fused in (False, True):
                context = GatedActivations(model, HEADS_AND_UNITS, fused=fused)
                with context.at(torch.ones(len(HEADS_AND_UNITS), dtype=torch.float64)):
                    require_same(model(*inputs, **options, **weights), expected)

    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    def test_gates_are_those_on_weights(self, call, bias, value):
        model, inputs, options = call
        for gates in (some_gates(len(HEADS_AND_UNITS)), some_gates(len(HEADS_AND_UNITS), seed=2).round()):
            expected = scaled(model, HEADS_AND_UNITS, gates, bias, value)
            for weights in WEIGHTS:
                with GatedActivations(model, HEADS_AND_UNITS, bias, value).at(gates):
                    found = model(*inputs, **options, **weights)
                require_same(found, expected(*inputs, **options, **weights))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("which", ["self", "cross", "all differ"])
def test_each_example_has_its_own_gates_in_attention(batch_first, which):
    model = make_attention(batch_first)
    query, key, value = sequences(which, "examples first" if batch_first else "sequence first")
    hidden = padding(key.shape[1 if batch_first else 0])
    gates = some_gates(BATCH, len(HEADS_AND_UNITS))
    with GatedActivations(model, HEADS_AND_UNITS).at(gates):
        found = model(query, key, value, key_padding_mask=hidden)[0]
    for example in range(BATCH):
        own = slice(example, example + 1)
        alone = [part[own] if batch_first else part[:, own] for part in (query, key, value)]
        if which == "self":
            alone = [alone[0]] * 3
        expected = scaled(model, HEADS_AND_UNITS, gates[example])
        expected = expected(*alone, key_padding_mask=hidden[own])[0]
        torch.testing.assert_close(found[own] if batch_first else found[:, own], expected, **EXACT)


def test_gradients_in_attention_are_finite_differences():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make_attention()

        def forward(self, x):
            return self.attention(x, x, x + 1, need_weights=False)[0]

    moved = [
        units("attention.out_proj", HEADS, name="heads", bias=None, dimension=1, width=3, side="input"),
        units("attention", 3 * EMBED, parameter="in_proj_weight", bias="in_proj_bias"),
    ]
    x = sequences("self", "examples first")[0]
    require_finite_differences(Pooled(), one_set(*moved), x, BATCH)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"add_bias_kv": True}, "bias_k"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 5, "vdim": 5}, "use_separate_proj_weight"),
    ],
)
def test_options_that_gates_do_not_follow_are_refused_by_name(options, word):
    model = make_attention(**options)
    query = sequences("self", "examples first")[0]
    key = query[..., : options.get("kdim", EMBED)]
    heads = one_set(HEADS_AND_UNITS.groups[0])
    with refused(ComponentError, "MultiheadAttention", word, "scaled weights"):
        gated(model, heads, torch.ones(HEADS), query, key, key)
    assert gated_elsewhere_runs(model, query, key)


def gated_elsewhere_runs(model, query, key):
    """Gates on another layer leave such an attention module alone."""
    both = nn.ModuleList([model, randomised(nn.Linear(EMBED, 2))])
    with GatedActivations(both, one_set(units("1", 2))).at(torch.zeros(2)):
        found = both[0](query, key, key)[0]
    return torch.equal(found, model(query, key, key)[0])


class TestFastPath:
    """An encoder in eval mode without gradients runs one fused kernel per layer, which knows no gates."""

    def encoder(self):
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, dim_feedforward=8, batch_first=True)
        return randomised(nn.TransformerEncoder(layer, num_layers=3))

    def components(self, model):
        kinds = ["attention_head", "mlp_neuron", "attention_neuron"]
        return find_components(model, kinds, overlap=True)

    @pytest.fixture
    def fused_calls(self, monkeypatch):
        kernel, calls = torch._transformer_encoder_layer_fwd, []
        monkeypatch.setattr(
            torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or kernel(*args)
        )
        return calls

    @pytest.mark.parametrize("hidden", [False, True])
    @pytest.mark.parametrize("shared", [True, False])
    def test_does_not_bypass_the_gates(self, fused_calls, hidden, shared):
        model, x = self.encoder(), numbers(BATCH, KEYS, EMBED)
        components = self.components(model)
        gates = some_gates(BATCH, len(components))
        gates = gates[:1].expand(BATCH, -1) if shared else gates
        visible = ~padding(KEYS) if hidden else torch.ones(BATCH, KEYS, dtype=torch.bool)
        options = {"src_key_padding_mask": ~visible} if hidden else {}
        with torch.no_grad():
            with GatedActivations(model, components).at(gates[0] if shared else gates):
                found = model(x, **options)
            assert not fused_calls
            for example in range(BATCH):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # nested tensors, which it makes, are new
                    expected = scaled(model, components, gates[example])(x, **options)
                assert fused_calls, "the reference is meant to run fused"
                seen = visible[example].nonzero().flatten()
                torch.testing.assert_close(
                    found[example, seen], expected[example, seen], rtol=1e-8, atol=1e-8
                )

    def test_attention_alone_does_not_either(self):
        model, x = make_attention(), numbers(BATCH, KEYS, EMBED)
        gates = some_gates(len(HEADS_AND_UNITS))
        with torch.no_grad():
            expected = scaled(model, HEADS_AND_UNITS, gates)(x, x, x)[0]
            found = gated(model, HEADS_AND_UNITS, gates, x, x, x)[0]
            assert not torch.allclose(found, model(x, x, x)[0])
        torch.testing.assert_close(found, expected, **EXACT)


# ------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
class TestLowPrecision:
    def model(self):
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.GELU(), nn.Conv2d(6, 40, 1), nn.GELU(), nn.Flatten(), nn.Linear(360, 4)
        )
        return randomised(model).float(), one_set(units("0", 6), units("2", 40), units("5", 4))

    def test_gates_of_one_change_no_bit(self, dtype, fused):
        model, components = self.model()
        x = numbers(8, 2, 5, 5).to(dtype)
        found = gated(model.to(dtype), components, torch.ones(8, len(components)), x, fused=fused)
        assert found.dtype == dtype
        if fused:
            torch.testing.assert_close(found, model(x), rtol=0.05, atol=0.5)
        else:
            assert torch.equal(found, model(x))

    @pytest.mark.parametrize("last", [False, True])
    def test_gradients_of_float32_gates_are_near_those_of_a_float32_model(self, dtype, fused, last):
        model, components = self.model()
        x = numbers(8, 2, 5, 5).float()
        gates = some_gates(8, len(components)).float()
        expected = self.gradients(model, components, gates, x, fused)
        low = copy.deepcopy(model).to(dtype)
        x = x.to(dtype)
        if last:
            low, x = (value.to(memory_format=torch.channels_last) for value in (low, x))
        found = self.gradients(low, components, gates, x, fused)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.999

    @staticmethod
    def gradients(model, components, gates, x, fused):
        gates = gates.clone().requires_grad_()
        outputs = gated(model, components, gates, x, fused=fused).float()[:, 0]
        return torch.autograd.grad(outputs.sum(), gates)[0]


# ------------------------------------------------------------------------------------ several gates


class Layer(nn.Module):
    """Attention and an MLP, each in a residual branch, as torch lays them out."""

    def __init__(self):
        super().__init__()
        self.attention = make_attention()
        self.up, self.down = nn.Linear(EMBED, 8), nn.Linear(8, EMBED)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.tanh(self.up(x)))


class TestSeveralGatesOnOneParameter:
    def test_heads_and_neurons_of_the_output_projection(self):
        model, x = randomised(Layer()), numbers(BATCH, KEYS, EMBED)
        components = one_set(
            units("attention.out_proj", HEADS, name="heads", bias=None, dimension=1, width=3, side="input"),
            units("attention.out_proj", EMBED, name="neurons"),
        )
        gates = some_gates(BATCH, HEADS + EMBED)
        found = gated(model, components, gates, x)
        for example in range(BATCH):
            edited = copy.deepcopy(model)
            weight = edited.attention.out_proj.weight
            for column in range(EMBED):
                weight[:, column] *= gates[example, column // 3]
            for row in range(EMBED):
                weight[row] *= gates[example, HEADS + row]
            torch.testing.assert_close(found[example], edited(x)[example], **EXACT)

    @pytest.mark.parametrize("bias", ["keep", "ablate"])
    def test_a_block_and_its_neurons(self, bias):
        model, x = randomised(Layer()), numbers(BATCH, KEYS, EMBED)
        # The block is named first, and acts last.
        components = one_set(
            units("down", 1, name="block", width=EMBED, whole=True), units("down", EMBED, name="neurons")
        )
        gates = some_gates(BATCH, 1 + EMBED)
        for fused in (False, True):
            found = gated(model, components, gates, x, bias=bias, fused=fused)
            for example in range(BATCH):
                block, neurons = gates[example, 0], gates[example, 1:]
                edited = copy.deepcopy(model)
                for row in range(EMBED):
                    edited.down.weight[row] *= block * neurons[row]
                    edited.down.bias[row] *= block * (neurons[row] if bias == "ablate" else 1)
                torch.testing.assert_close(found[example], edited(x)[example], **EXACT)

    def test_hidden_units_heads_and_rows_all_at_once(self):
        model, x = randomised(Layer()), numbers(BATCH, KEYS, EMBED)
        components = one_set(
            units("attention", 3 * EMBED, name="in", parameter="in_proj_weight", bias="in_proj_bias"),
            units("attention.out_proj", HEADS, name="heads", bias=None, dimension=1, width=3, side="input"),
            units("attention.out_proj", 1, name="block", width=EMBED, whole=True),
            units("up", 8),
            units("down", 8, name="hidden", bias=None, dimension=1, side="input"),
            units("down", 2, name="pairs", bias=None, dimension=1, width=4, side="input"),
        )
        for value in ("zero", 0.3):
            gates = some_gates(BATCH, len(components))
            found = gated(model, components, gates, x, value=value)
            for example in range(BATCH):
                expected = scaled(model, components, gates[example], value=value)(x)[example]
                torch.testing.assert_close(found[example], expected, **EXACT)

    def test_constants_of_two_gates_on_one_entry_follow_each_other(self):
        """The second moves what the first left: fully ablated twice is ablated once."""
        layer, x = randomised(nn.Linear(4, 3)), numbers(BATCH, 4)
        components = one_set(
            units("", 2, name="pairs", bias=None, dimension=1, width=2, side="input"),
            units("", 4, name="entries", bias=None, dimension=1, side="input"),
        )
        for seed in range(4):
            gates = some_gates(6, seed=seed)
            read = x.clone()
            for first in (0, 1):
                own = read[:, 2 * first : 2 * first + 2]
                own.copy_(gates[first] * own + (1 - gates[first]) * 0.5)
            read = gates[2:] * read + (1 - gates[2:]) * 0.5
            expected = functional.linear(read, layer.weight, layer.bias)
            torch.testing.assert_close(gated(layer, components, gates, x, value=0.5), expected, **EXACT)
            torch.testing.assert_close(scaled(layer, components, gates, value=0.5)(x), expected, **EXACT)


# --------------------------------------------------------------------------------------- what is refused


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.embed(x))))


def test_tied_weights_are_refused_with_both_owners_named():
    model = randomised(Tied())
    with refused(ComponentError, "shares its weight", "embed.weight", "out.weight"):
        find_components(model, ["neuron"], ["embed", "out"])


def test_beside_tied_weights_the_others_are_gated():
    model, x = randomised(Tied()), numbers(3, 4)
    components = find_components(model, ["neuron"], exclude=["embed", "out"])
    assert {group.module for group in components} == {"hidden"}
    gates = some_gates(4)
    found = gated(model, components, gates, x)
    hidden = torch.tanh(model.hidden(model.embed(x)) * gates + (1 - gates) * model.hidden.bias)
    torch.testing.assert_close(found, model.out(hidden), **EXACT)


@pytest.mark.parametrize("shape", [(), (3,), (5,), (3, 3), (3, 5), (2, 3, 4), (4, 1), (0,)])
def test_gates_of_another_shape_are_refused(shape):
    layer = nn.Linear(4, 4)
    with refused(ComponentError, "one gate per component", "[4] or [batch, 4]", str(tuple(shape))):
        GatedActivations(layer, one_set(units("", 4, name="units"))).at(torch.ones(shape))


class TestExamplesNotFirst:
    def test_time_first_is_refused(self):
        layer, components, _, _ = make_single("linear on tokens")
        with refused(
            ComponentError, "do not lie along the first dimension", "multiple of 3 rows", "(5, 3, 6)"
        ):
            gated(layer, components, some_gates(3, 6), numbers(5, 3, 4))

    def test_one_gate_vector_needs_no_examples(self):
        layer, components, _, _ = make_single("linear on tokens")
        x, gates = numbers(5, 3, 4), some_gates(6)
        found = gated(layer, components, gates, x)
        expected = gated(layer, components, gates, x.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(found, expected, **EXACT)

    def test_another_batch_is_refused(self):
        layer, components, x, _ = make_single("conv2d")
        with refused(ComponentError, "first dimension", "multiple of 2 rows"):
            gated(layer, components, some_gates(2, 4), x)


class TestNothingStaysBehind:
    def test_after_leaving(self):
        model, components, x = randomised(InPlace()), one_set(*InPlace.groups), numbers(3, 2, 5, 5)
        untouched, before = model(x), model_fingerprint(model)
        gated(model, components, torch.zeros(7), x)
        assert torch.equal(model(x), untouched)
        assert model_fingerprint(model) == before
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_after_an_exception(self):
        model, components, x = randomised(InPlace()), one_set(*InPlace.groups), numbers(3, 2, 5, 5)
        untouched = model(x)
        context = GatedActivations(model, components)
        with pytest.raises(RuntimeError), context.at(torch.zeros(7)):
            model(numbers(3, 4, 5, 5))  # four channels instead of two
        assert torch.equal(model(x), untouched)
        with pytest.raises(ComponentError), context.at(torch.zeros(2, 7)):
            model(x)
        assert torch.equal(model(x), untouched)
        with context.at(torch.ones(7)):
            assert torch.equal(model(x), untouched)

    def test_gates_inside_gates_multiply_and_the_outer_ones_go_on(self):
        model, components, x = randomised(InPlace()), one_set(*InPlace.groups), numbers(3, 2, 5, 5)
        context = GatedActivations(model, components)
        outer, inner = some_gates(7, seed=1), some_gates(7, seed=2)
        with context.at(outer):
            first = model(x)
            with context.at(inner):
                both = model(x)
            assert torch.equal(model(x), first)
        torch.testing.assert_close(both, gated(model, components, outer * inner, x), **EXACT)

    def test_another_model_is_not_gated(self):
        model, components, x = randomised(InPlace()), one_set(*InPlace.groups), numbers(3, 2, 5, 5)
        other = copy.deepcopy(model)
        with GatedActivations(model, components).at(torch.zeros(7)):
            assert torch.equal(other(x), randomised(InPlace())(x))
            assert not torch.equal(model(x), other(x))
