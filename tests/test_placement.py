"""Gates after a unit's own nonlinearity: the ends of the ablation, the formulas, and where they are."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import coar
from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.errors import ComponentError
from coar.experiments.examples import move
from coar.experiments.private_model import PrivateModel, cast
from coar.gates import (
    GatedActivations,
    PlacedActivations,
    ScaledWeights,
    fold_batch_norm,
    make_sites,
    verify_ends,
)
from coar.gates.elementwise import step_of
from coar.gates.placed_gate import gate_between
from coar.gates.placing import Placing
from coar.testing.components import run_each
from tests.architectures import COUNTS, build
from tests.cases import MODELS, make_model, random_numbers
from tests.refused import refused

CPU = torch.device("cpu")
CONVENTIONS = [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7)]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def numbers(*shape, seed=0):
    return random_numbers(*shape, seed=seed).double()


def uniform(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model):
    """No parameter and no statistic at 0 or 1, float64, eval mode."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.7
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.data = module.running_var.abs() + 0.5
    return model.requires_grad_(False)


def placed(model, components, *inputs, bias="keep", value="zero", sites=None):
    sites = make_sites(model, components, bias, value) if sites is None else sites
    gated = PlacedActivations(model, components, sites=sites)
    gated.settle(lambda: run_each(model, list(inputs)).sum())
    return gated


def outputs(gated, gates, *inputs):
    with gated.at(gates):
        return torch.cat(
            [gated.model(*inputs)]
        )  # read by a function under the gates, as by an output function


def literal(gated, components, keep, *inputs):
    """Scaled weights, example by example."""
    scaled = ScaledWeights(gated.model, components, sites=gated.sites)
    found = []
    for example, row in enumerate(keep):
        scaled.set(row.numpy())
        found.append(gated.model(*inputs)[example])
    scaled.set(np.ones(len(components)))
    return torch.stack(found)


def filters(model):
    return find_components(model, kinds=["conv_filter"])


def neurons(model, **selection):
    return find_components(model, kinds=["neuron"], **selection)


# ------------------------------------------------------------------------------- every architecture


def ends_differ(name, dtype, bias, value):
    """The largest difference from scaled weights, of the largest output, over kinds of components."""
    worst = 0.0
    model, example = build(name)
    model = cast(model, dtype).requires_grad_(False)
    example = move(example, CPU, dtype)
    for kind in COUNTS[name]:
        own = ["*"] if name != "swin_v2" or kind != "neuron" else ["*.mlp.*"]  # cpb_mlp reads no examples
        components = find_components(model, kinds=[kind], include=own)
        gated = PlacedActivations(model, components, sites=make_sites(model, components, bias, value))
        gated.settle(lambda: run_each(model, example).sum())
        # CLIP compares the examples of a batch: there, gates are shared.
        shared = name == "clip"
        keep = (uniform(2, len(components), seed=len(kind)) > 0.3).to(dtype)
        with torch.no_grad(), gated.at(keep[0] if shared else keep):
            found = run_each(model, example)
        scaled = ScaledWeights(model, components, sites=gated.sites)
        for row in range(1 if shared else 2):
            scaled.set(keep[row].numpy())
            with torch.no_grad():
                expected = run_each(model, example)
            rows = slice(None) if shared else slice(row, row + 1)
            difference = (found[rows] - expected[rows]).abs().max() / max(1.0, float(expected.abs().max()))
            worst = max(worst, float(difference))
        scaled.set(np.ones(len(components)))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
class TestArchitectures:
    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    def test_both_ends_are_those_of_the_ablation(self, name, bias, value):
        if name == "swin_v2" and value != "zero":
            pytest.skip("it sets biases of keys to 0 on their way: refused by require_reached")
        if name == "convnext" and value != "zero":
            pytest.skip("its branches end in a factor that no layer reads")
        assert ends_differ(name, torch.float64, bias, value) < 1e-10

    def test_in_float32_too(self, name):
        assert ends_differ(name, torch.float32, "keep", "zero") < 1e-5


class TestWhere:
    """The expected placement, module by module."""

    def places(self, name, kinds):
        model, example = build(name)
        model = model.requires_grad_(False)
        gated = PlacedActivations(model, find_components(model, kinds=kinds))
        gated.settle(lambda: run_each(model, example).sum())
        return gated.placements()

    def test_of_a_resnet(self):
        found = self.places("resnet18", ["conv_filter"])
        shortcuts = {name for name in found if "downsample" in name}
        assert len(shortcuts) == 3
        assert {found[name] for name in shortcuts} == {"plain: read by add beside another gate"}
        assert {where for name, where in found.items() if name not in shortcuts} == {"after relu"}

    def test_of_a_vision_transformer(self):
        found = self.places("vit", ["neuron"])
        layer = "encoder.layers.encoder_layer_0"
        assert {name: where for name, where in found.items() if name.startswith(layer)} == {
            f"{layer}.self_attention.in_proj": "plain: read by unflatten",
            f"{layer}.self_attention.out_proj": "plain: read by transpose",
            f"{layer}.mlp.0": "after gelu",
            f"{layer}.mlp.3": "plain: read by layer_norm",
        }

    def test_of_gpt2(self):
        """Its GELU is written out, and its layers work on rows of tokens."""
        found = self.places("gpt2", ["neuron"])
        assert found["transformer.h.0.mlp.c_fc"] == "after pow, tanh, mul"
        assert found["transformer.h.0.mlp.c_proj"] == "plain: read by layer_norm"
        assert found["transformer.h.0.attn.c_attn"] == "plain: read by view"
        default = self.places("gpt2", ["attention_head", "mlp_neuron"])
        assert set(default.values()) == {"plain: on what the layer reads"}

    def test_of_a_gated_mlp(self):
        found = self.places("llama", ["neuron"])
        assert found["model.layers.0.mlp.gate_proj"] == "after silu"
        assert found["model.layers.0.mlp.up_proj"] == "plain: read by mul"
        assert found["model.layers.0.mlp.down_proj"].startswith("plain: ")
        assert self.places("phi3", ["neuron"])["model.layers.0.mlp.gate_up_proj"].startswith("after silu; ")

    def test_of_branches(self):
        assert set(self.places("resnet18", ["block"]).values()) == {"plain: a whole branch"}

    def test_of_quick_gelu(self):
        places = self.places("clip", ["neuron"])
        assert places["text_model.encoder.layers.0.mlp.fc1"] == "after sigmoid, mul"


# ---------------------------------------------------------------------------------------- formulas


class Residual(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        if self.relu.inplace:
            out += x
            self.relu(out)  # what is returned is not used
            return out
        return self.relu(x + out)


def by_hand(model, x, gates):
    """The formula of the residual network; rest of a filter is its bias."""
    gates = gates[:, :, None, None]

    def bn(norm, y):
        return functional.batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )

    def ends(act, conv, norm, x, g, s):
        kept = bn(norm, conv(x))
        rest = torch.zeros(1, 3, 1, 1).double() if conv.bias is None else conv.bias.view(1, 3, 1, 1)
        low, high = act(bn(norm, rest) + s), act(kept + s)
        return low + g * (high - low)

    x = ends(torch.relu, model.conv1, model.bn1, x, gates[:, :3], 0.0)
    return ends(torch.relu, model.conv2, model.bn2, x, gates[:, 3:], x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_convolution_batch_norm_residual_relu(inplace, folded):
    model, x = randomised(Residual(inplace)), numbers(4, 2, 5, 5)
    literal_model = copy.deepcopy(model)
    sites = make_sites(model, filters(model))
    if folded:
        with torch.no_grad():
            assert fold_batch_norm(model, sites, lambda: model(x)) == 2
    gated = placed(model, filters(model), x, sites=sites)
    assert gated.placements() == {"conv1": "after relu", "conv2": "after relu"}
    gates = uniform(4, 6)
    torch.testing.assert_close(outputs(gated, gates, x), by_hand(literal_model, x, gates), **EXACT)
    torch.testing.assert_close(outputs(gated, gates[0], x), by_hand(literal_model, x, gates[:1]), **EXACT)


ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu of tanh": nn.GELU("tanh"),
    "gelu written out": lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.045 * torch.pow(x, 3.0)))),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swish written out": lambda x: x / (1 + torch.exp(-x)),
    "silu in place": nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "leaky relu": nn.LeakyReLU(0.1, inplace=True),
    "elu": nn.ELU(),
    "relu6": nn.ReLU6(inplace=True),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "tanh in place": torch.tanh_,
    "sigmoid": torch.sigmoid,
    "relu_": functional.relu_,
    "squared relu": lambda x: torch.relu(x) ** 2,
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "clamped": lambda x: x.clamp(min=0),
    "dropout": lambda x: functional.dropout(functional.relu(x), training=False),
}


class Hidden(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(3, 5), nn.Linear(5, 2), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
class TestOneHiddenLayer:
    @pytest.fixture
    def case(self, name, bias, value):
        model, x = randomised(Hidden(ACTIVATIONS[name])), numbers(4, 6, 3)
        components = neurons(model, include=["up"])
        return model, x, components, placed(model, components, x, bias=bias, value=value)

    def test_follows_the_formula(self, name, bias, value, case):
        model, x, _, gated = case
        gates = uniform(4, 5)
        rest = (
            torch.full((5,), value, dtype=torch.float64)
            if value != "zero"
            else model.up.bias * (bias == "keep")
        )
        low, high = ACTIVATIONS[name](rest.clone()), ACTIVATIONS[name](model.up(x))
        expected = model.down(low + gates[:, None] * (high - low))
        torch.testing.assert_close(outputs(gated, gates, x), expected, **EXACT)

    def test_is_a_straight_line_along_each_gate(self, case):
        _, x, components, gated = case
        for unit in range(len(components)):
            points = uniform(1, 5).expand(3, 5).clone()
            points[:, unit] = torch.tensor([0.25, 0.5, 0.75])
            low, middle, high = (outputs(gated, row, x) for row in points)
            torch.testing.assert_close((low + high) / 2, middle, **EXACT)

    def test_gates_of_one_change_no_bit(self, case):
        model, x, _, gated = case
        assert torch.equal(outputs(gated, torch.ones(4, 5), x), model(x))


def test_the_plain_gate_is_bent_where_the_other_is_straight():
    model, x = randomised(Hidden(nn.GELU())), numbers(4, 3)
    plain = GatedActivations(model, neurons(model, include=["up"]))
    low, middle, high = (outputs(plain, torch.full((5,), g), x) for g in (0.0, 0.5, 1.0))
    assert not torch.allclose((low + high) / 2, middle, atol=1e-3)


class GatedMlp(nn.Module):
    """gate and up projections in one layer."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


def test_gated_mlp():
    model, x, gates = randomised(GatedMlp()), numbers(4, 3), uniform(4, 8)
    gated = placed(model, neurons(model, include=["both"]), x)
    assert gated.placements() == {"both": "after silu; plain: read by mul"}
    low, high = functional.silu(model.both.bias[:4]), functional.silu(model.both(x)[:, :4])
    up = torch.lerp(model.both.bias[4:].expand(4, -1), model.both(x)[:, 4:], gates[:, 4:])
    expected = model.down((low + gates[:, :4] * (high - low)) * up)
    torch.testing.assert_close(outputs(gated, gates, x), expected, **EXACT)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.short = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return torch.relu(self.main(x) + self.short(x))


def test_of_two_branches_one_is_gated_before():
    model, x, gates = randomised(TwoBranches()), numbers(5, 3), uniform(5, 8)
    components = neurons(model, include=["main", "short"])
    gated = placed(model, components, x)
    assert gated.placements() == {"main": "after relu", "short": "plain: read by add beside another gate"}
    s = torch.lerp(model.short.bias.expand(5, -1), model.short(x), gates[:, 4:])
    low, high = torch.relu(model.main.bias + s), torch.relu(model.main(x) + s)
    torch.testing.assert_close(outputs(gated, gates, x), torch.lerp(low, high, gates[:, :4]), **EXACT)
    keep = gates.round()
    torch.testing.assert_close(outputs(gated, keep, x), literal(gated, components, keep, x), **EXACT)


class PreActivation(nn.Module):
    """What the first layer emits is read by a norm, and by a residual connection after it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.conv2(torch.relu(self.bn(x)))
        return torch.relu(self.last(x))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return torch.relu(torch.cat([self.one(x), self.two(x)], dim=1))


class Windows(nn.Module):
    """Examples cut into windows and rows."""

    def __init__(self):
        super().__init__()
        self.windows, self.rows, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):  # [batch, 2, 5, 4]
        shortcut = x.reshape(-1, 5, 4)
        parts = torch.relu(self.windows(shortcut) + shortcut)  # [batch * 2, 5, 4]
        rows = self.rows(parts.reshape(-1, 4)).view(-1, 5, 4)
        return self.out(functional.gelu(rows)).view(x.shape[0], -1)


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return torch.relu(self.layer(torch.relu(y)) + y)


class Unknown(nn.Module):
    """One activation in a place that no list knows, one in a function that takes no gradient in it."""

    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return grad * (s + x * s * (1 - s))

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.special.erfc(self.one(x))
        x = self.Swish.apply(self.two(x))
        return torch.tanh(torch.cumsum(self.three(x), dim=1))


class SeveralReaders(nn.Module):
    """The same number is read by an activation, by a pool, by an index and in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        z = torch.tanh(y) + y.mean(dim=(2, 3), keepdim=True)
        y += 1.0
        y.relu_()
        w = y[:, :, 0, 0]
        return self.out(z * y) + w.sum(dim=1)[:, None, None, None]


class PartOfALayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x):
        return torch.tanh(self.up(x))


def parts_of_a_layer(_model):
    """Units 4 and 5, then units 1 and 2: in this order."""
    group = {"kind": "unit", "module": "up", "parameter": "weight", "dimension": 0, "bias": "bias"}
    behind = ComponentGroup("behind", count=1, width=2, offset=4, **group)
    return ComponentSet([behind, ComponentGroup("ahead", count=2, offset=1, **group)])


SMALL = {
    "residual": (Residual, (2, 5, 5), filters, {"conv1": "after relu", "conv2": "after relu"}),
    "residual in place": (lambda: Residual(True), (2, 5, 5), filters, {"conv2": "after relu"}),
    "pre-activation": (
        PreActivation,
        (2, 4, 4),
        filters,
        {"conv1": "after relu; plain: read by add beside another gate", "conv2": "after relu"},
    ),
    "concatenated": (
        Concatenated,
        (2, 4, 4),
        filters,
        {"one": "plain: read by cat", "two": "plain: read by cat"},
    ),
    "windows": (
        Windows,
        (2, 5, 4),
        lambda model: neurons(model, include=["windows", "rows"]),
        {"windows": "after relu", "rows": "after gelu"},
    ),
    "shared": (Shared, (4,), lambda model: neurons(model, include=["layer"]), {"layer": "after relu"}),
    "unknown": (
        Unknown,
        (4,),
        lambda model: neurons(model, include=["one", "two", "three"]),
        {
            "one": "plain: read by special_erfc",
            "two": "plain: gradients do not reach two.weight",
            "three": "plain: read by cumsum",
        },
    ),
    "several readers": (SeveralReaders, (2, 4, 4), filters, {"conv": "after tanh; plain: read by mean"}),
    "part of a layer": (
        PartOfALayer,
        (4,),
        parts_of_a_layer,
        {"behind": "after tanh", "ahead": "after tanh"},
    ),
}


@pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
@pytest.mark.parametrize("name", SMALL)
class TestSmallModels:
    @pytest.fixture
    def case(self, name, bias, value):
        make, shape, select, _ = SMALL[name]
        model, x = randomised(make()), numbers(4, *shape)
        components = select(model)
        return model, x, components, placed(model, components, x, bias=bias, value=value)

    def test_are_placed_as_expected(self, name, case):
        found = case[-1].placements()
        assert {group: found[group] for group in SMALL[name][3]} == SMALL[name][3]

    def test_have_the_ends_of_the_ablation(self, case):
        _, x, components, gated = case
        for share in (0.2, 0.5, 0.8):
            keep = (uniform(4, len(components)) < share).double()
            found = outputs(gated, keep, x)
            torch.testing.assert_close(found, literal(gated, components, keep, x), **EXACT)
            one = outputs(gated, keep[1], x)[1]
            torch.testing.assert_close(one, found[1], **EXACT)

    def test_have_gradients_that_are_finite_differences(self, case):
        _, x, components, gated = case
        gates, step = 0.1 + 0.8 * uniform(4, len(components)), 1e-6

        def weighted(gates):
            flat = outputs(gated, gates, x).flatten(1)
            return (torch.sin(flat) * torch.linspace(0.5, 1.5, flat.shape[1])).sum(dim=1)

        asked = gates.clone().requires_grad_()
        (found,) = torch.autograd.grad(weighted(asked).sum(), asked)
        assert found.abs().max() > 1e-3
        for component in range(len(components)):
            change = torch.zeros_like(gates)
            change[:, component] = step
            expected = (weighted(gates + change) - weighted(gates - change)) / (2 * step)
            torch.testing.assert_close(found[:, component], expected, rtol=1e-6, atol=1e-7)

    def test_gates_of_one_change_no_bit(self, case):
        model, x, components, gated = case
        assert torch.equal(outputs(gated, torch.ones(4, len(components)), x), model(x))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("several_outputs", "slices")])
def test_verified_ends_of_the_usual_cases(name):
    model = randomised(make_model(name))
    components, x = find_components(model, kinds=type(model).kinds), numbers(6, *model.input_shape)
    gated = PlacedActivations(model, components, sites=make_sites(model, components))
    assert verify_ends(gated, components, lambda: model(x)[:, 0], 6) == {}
    assert any(where.startswith("after") for where in gated.placements().values())


def test_a_gate_between_two_ends_has_the_right_gradients():
    for lower in (
        numbers(1, 3, 1),
        numbers(2, 3, 4, seed=1).requires_grad_(),
        numbers(2, 1, 4).requires_grad_(),
    ):
        upper, gates = numbers(2, 3, 4, seed=2).requires_grad_(), uniform(2, 3, 1).requires_grad_()
        assert torch.autograd.gradcheck(gate_between, (upper, lower, gates))


# --------------------------------------------------------------------- whatever is not seen or not right


class Blind(Hidden):
    """The activation reads its tensor where no mode sees it."""

    def __init__(self):
        super().__init__(None)
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        y = torch.tanh(self.up(torch.relu(self.first(x))))
        kept = self.up(x)
        with torch._C.DisableTorchFunction():
            blind = torch.relu(kept)
        return self.down(y + blind)[:, 0] + torch.relu(kept).sum(dim=1)


class TestVerification:
    def test_a_group_that_disagrees_falls_back_alone(self):
        model, x = randomised(Blind()), numbers(6, 3)
        components = neurons(model, include=["up", "first"])
        gated = PlacedActivations(model, components, sites=make_sites(model, components))
        with pytest.warns(
            UserWarning, match="gates of up stay at the layer rather than after relu; after tanh"
        ):
            fallen = verify_ends(gated, components, lambda: model(x), 6)
        assert list(fallen) == ["up"]
        assert "differ by" in fallen["up"]
        assert gated.placements() == {"first": "after relu", "up": f"plain: {fallen['up']}"}
        keep = uniform(6, len(components)).round()
        torch.testing.assert_close(outputs(gated, keep, x), literal(gated, components, keep, x), **EXACT)

    def test_what_disagrees_at_the_layer_too_is_refused(self):
        class Scripted(Hidden):
            def forward(self, x):
                with torch._C.DisableTorchFunction():
                    return self.down(torch.relu(functional.linear(x, self.up.weight, self.up.bias)))

        model, x = randomised(Scripted(None)), numbers(6, 3)
        components = neurons(model, include=["up"])
        gated = PlacedActivations(model, components, sites=make_sites(model, components))
        with refused(ComponentError, "differ from scaled weights"):
            verify_ends(gated, components, lambda: model(x)[:, 0], 6)

    def test_leaves_the_weights_as_they_were(self):
        model, x = randomised(Residual()), numbers(4, 2, 5, 5)
        before = copy.deepcopy(model.state_dict())
        components = filters(model)
        gated = PlacedActivations(model, components, sites=make_sites(model, components))
        verify_ends(gated, components, lambda: model(x).flatten(1).sum(dim=1), 4)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_pass_before_anybody_has_looked_is_refused():
    model = randomised(Hidden(nn.ReLU()))
    gated = PlacedActivations(model, neurons(model, include=["up"]))
    for action in (lambda: gated.at(torch.ones(5)), gated.placements):
        with refused(ComponentError, "nobody has looked yet", "settle"):
            action()


def test_what_leaves_the_model_is_gated_at_the_layer():
    model, x = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), numbers(5, 3)
    components = neurons(model, include=["0", "2"])
    gated = PlacedActivations(model, components)
    kept = []
    gated.settle(lambda: kept.append(model(x)))
    assert gated.placements() == {"0": "after relu", "2": "plain: it leaves the forward pass"}
    hook = model[0].register_forward_hook(lambda *call: kept.append(call[2]))
    gated.settle(lambda: model(x))
    assert gated.placements()["0"] == "plain: it leaves the forward pass"
    hook.remove()


def test_another_way_through_the_model_is_refused_where_it_would_be_wrong():
    class Ways(Hidden):
        early = False

        def forward(self, x):
            y = self.up(x)
            return y if self.early else self.down(torch.relu(y))

    model, x = randomised(Ways(None)), numbers(4, 3)
    gated = placed(model, neurons(model, include=["up"]), x)
    model.early = True
    with refused(ComponentError, "what up emits leaves the forward pass", "settle"), gated.at(torch.zeros(5)):
        kept = model(x)
    assert torch.equal(kept, model(x)), "it would have gone out ungated"


def test_an_exception_inside_passes_through_and_gates_go_off():
    model, x = randomised(Hidden(nn.ReLU())), numbers(4, 3)
    gated = placed(model, neurons(model, include=["up"]), x)

    def fail(*_):
        raise ZeroDivisionError

    hook = model.down.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), gated.at(torch.zeros(5)):
        model(x)
    hook.remove()
    assert not torch.equal(outputs(gated, torch.zeros(5), x), model(x))


def test_nothing_is_held_after_a_pass():
    """Neither after the pass, nor, without gradients, once nobody else holds it."""
    seen = []
    model, x = randomised(Residual()), numbers(4, 2, 5, 5)
    gated = placed(model, filters(model), x)
    model.bn2.register_forward_hook(lambda *call: seen.append(weakref.ref(call[2])))
    with torch.no_grad(), gated.at(torch.full((4, 6), 0.5)) as mode:
        assert isinstance(mode, Placing)
        result = model(x).sum()
        assert seen[0]() is None
        assert len(mode._register) == 0
    gates = torch.full((4, 6), 0.5, requires_grad=True)
    with gated.at(gates) as mode:
        result = model(x).sum()
    assert len(mode._register) == 0
    del result
    gc.collect()
    assert seen[1]() is None


def test_only_functions_that_work_entry_by_entry_are_passed():
    x = torch.randn(2, 3)
    assert step_of(torch.relu, (x,), {}) is not None
    for func, args, kwargs in [
        (torch.softmax, (x, 1), {}),
        (torch.Tensor.pow, (x, -1), {}),
        (functional.dropout, (x,), {"p": 0.5, "training": True}),
        (functional.batch_norm, (x, None, None), {"training": True}),
        (torch.add, (x, x), {"out": x}),
        (torch.Tensor.sqrt, (x,), {}),
    ]:
        assert step_of(func, args, kwargs) is None


# --------------------------------------------------------------------------------- as it will be used


def test_on_a_private_copy_with_folded_batch_norm():
    model = make_model("residual")
    examples = [(x, i % 4) for i, x in enumerate(random_numbers(8, 2, 6, 6))]
    task = coar.Task(model, examples, outputs={"margin": coar.outputs.margin}, device="cpu")
    components = filters(model)
    private = PrivateModel(task, (components, "keep", "zero", None), CPU, "float32")
    assert private.folded == 2
    gated = PlacedActivations(private.model, components, sites=private.sites, fused=True)
    batch = move(task.batch(range(8)), CPU, private.dtype, private.channels_last)

    def run():
        return coar.outputs.margin(private.model, batch)

    assert verify_ends(gated, components, run, 8) == {}
    assert set(gated.placements().values()) == {"after relu"}
    masks = (uniform(1, len(components)) > 0.4).numpy()
    expected = coar.ComponentAblation(task, components).prepare(CPU)(masks)["margin"][0]
    with gated.at(torch.tensor(masks[0], dtype=torch.float32)):
        np.testing.assert_allclose(run().detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = randomised(Residual()).to(dtype), numbers(4, 2, 5, 5).to(dtype)
    gated = placed(model, filters(model), x)
    assert torch.equal(outputs(gated, torch.ones(4, 6), x), model(x))
    gates = uniform(4, 6).float().requires_grad_()
    (found,) = torch.autograd.grad(outputs(gated, gates, x).float().sum(), gates)
    exact = randomised(Residual())
    expected_of = placed(exact, filters(exact), x.double())
    wide = gates.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(outputs(expected_of, wide, x.double()).sum(), wide)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@pytest.mark.slow
def test_compiled_passes_are_the_same():
    """In one graph: also of the residual case, and of a GELU that is written out."""
    model = nn.Sequential(Residual(), nn.Flatten(), Hidden(ACTIVATIONS["gelu written out"]))
    model[2].up = nn.Linear(75, 5)
    model, x = randomised(model), numbers(4, 2, 5, 5)
    components = find_components(model, kinds=["conv_filter", "neuron"])
    gated = placed(model, components, x)
    assert sum(where.startswith("after") for where in gated.placements().values()) == 3

    def run(gates):
        with gated.at(gates):
            return model(x)[:, 0]

    gates = uniform(4, len(components)).requires_grad_()
    expected = torch.autograd.grad(run(gates).sum(), gates)[0]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gates), run(gates), **EXACT)
    found = torch.autograd.grad(compiled(gates).sum(), gates)[0]
    torch.testing.assert_close(found, expected, **EXACT)
