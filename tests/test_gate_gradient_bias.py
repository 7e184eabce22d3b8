"""Gate gradients against weights from all 2^p masks: the limit eps -> 0, and the bias at any other eps.

The law of the gates, and what follows from it. With probability eps a component is a *probe*, its gate
uniform on (0, 1); else it is ablated with probability a', where a' (1 - eps) + eps / 2 = a (so eps <= 2 a).
Under this law L the probe mean of df/dg_i has the expectation E_L[G_i], G_i = f(g_i = 1) - f(g_i = 0): the
mean of the derivative over a uniform gate of i is that difference, whatever the gates of the others are.
The weight is E_B[G_i], where B is the law of ablations: 0 with probability a, else 1. For a function u of
one gate

    E_L u - E_B u = eps T u,   T u = integral_0^1 u dt - (u(0) + u(1)) / 2,

exactly, since (1 - eps) a' - a = -eps / 2, and so is (1 - eps) (1 - a') - (1 - a). T is the error of the
trapezoid rule (Peano): T u = - integral_0^1 u''(t) t (1 - t) / 2 dt = -h / 12, with h the mean of u'' over
t with density 6 t (1 - t). Components are independent, so that for p of them

    E_L[G_i] = product over j != i of (B_j + eps T_j), applied to G_i
             = w_i - (eps / 12) sum_{j != i} h_ij'' + O(eps^2),

    h_ij'' = E_B integral_0^1 6 t (1 - t) d^2 G_i / dg_j^2 (k_-ij, g_j = t) dt,

the second derivative *along gate j* of what component i adds, averaged over ablations of all others than i
and j. It is a polynomial in eps: no O(eps^2) that is not a product of curvatures of two different gates.
T_j of what is linear in g_j is 0, so a model that is affine in each gate has no bias whatever eps is.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import coar
from coar.errors import SettingError
from coar.gradients.draws import GateDraws, Gates
from coar.gradients.passes import GatePasses
from coar.testing.enumerable import all_masks, all_outputs, exact_weights, mask_probabilities

EXAMPLES = 3
NODES = 6  # of Gauss-Legendre on (0, 1): exact for polynomials up to degree 11


# ----------------------------------------------------------------------------------------- networks


class Convolutional(nn.Module):
    """Two convolutions with BatchNorm and ReLU, the second inside a residual connection; two outputs."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)) + hidden)
        return self.head(hidden.mean(dim=(2, 3)))


class Layers(nn.Module):
    """Layers of 3 units with biases and one activation, and something curved or not at the end."""

    def __init__(self, activation, end, layers=2):
        super().__init__()
        widths = [5, *[3] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(3, 2)
        self.activation, self.end = activation, end

    def forward(self, x, gates=None):
        """With gates [batch, components]: the definition, after the activation, between kept and ablated."""
        for number, layer in enumerate(self.hidden):
            x = self.activation(layer(x))
            if gates is not None:
                ablated = self.activation(layer.bias)
                x = ablated + gates[..., 3 * number : 3 * number + 3] * (x - ablated)
        return self.end(self.head(x))


def identity(logits):
    return logits


def losses(logits):
    """Cross-entropy of either class, times 2: curved in the logits."""
    return -2 * functional.log_softmax(logits, dim=-1)


def convolutional():
    torch.manual_seed(4)
    model = Convolutional()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.7, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.running_mean.normal_(std=0.2)
        norm.running_var.uniform_(0.1, 0.6)
    return model, torch.randn(EXAMPLES, 2, 3, 3, dtype=torch.float64)


def layered(activation, end, layers=2, scale=3.0, seed=0):
    torch.manual_seed(seed)
    model = Layers(activation, end, layers)
    for layer in model.hidden:
        layer.weight.data.mul_(scale)
    model.head.weight.data.mul_(2)
    return model, torch.randn(EXAMPLES, 5, dtype=torch.float64)


NETWORKS = {
    "conv": convolutional,
    "gelu": functools.partial(layered, functional.gelu, identity, seed=2),
    "loss": functools.partial(layered, torch.tanh, losses, seed=3),
    "linear": functools.partial(layered, identity, identity, scale=2.0),
    "additive": functools.partial(layered, torch.tanh, identity, layers=1),
}
CURVED, SMOOTH = ["conv", "gelu", "loss"], ["gelu", "loss"]


class Enumerable:
    """A network, its engine, and its outputs under all masks."""

    def __init__(self, name):
        model, inputs = NETWORKS[name]()
        self.model, self.inputs = model.double().eval().requires_grad_(False), inputs
        outputs = {"value": lambda model, batch: model(batch)}
        self.task = coar.Task(self.model, list(inputs), outputs=outputs, device="cpu")
        kind = "conv_filter" if name == "conv" else "neuron"
        components = coar.find_components(self.model, kinds=[kind], exclude=["head"])
        self.experiment = coar.ComponentAblation(self.task, components)
        self.engine = GatePasses(self.experiment, ("value",), torch.device("cpu"), precision="float64")
        self.size = len(components)
        self.outputs = all_outputs(self.experiment)["value"]

    def exact(self, fraction):
        """Weights from all masks, [examples, values, components]."""
        return exact_weights(self.outputs, fraction).reshape(EXAMPLES, 2, self.size)

    def derivatives(self, owners, gates):
        """The engine's derivatives for gates [rows, components] of these examples, [rows, values, ...]."""
        drawn = Gates(gates, np.zeros(gates.shape, bool))
        found = self.engine.derivatives(self.inputs[torch.from_numpy(owners)], drawn)["value"]
        return found.by_gate.reshape(len(owners), 2, self.size).astype(np.float64)

    def on(self, gates):
        """Derivatives of every example under the same gates, [examples, rows, values, components]."""
        owners = np.repeat(np.arange(EXAMPLES), len(gates))
        return self.derivatives(owners, np.tile(gates, (EXAMPLES, 1))).reshape(EXAMPLES, -1, 2, self.size)

    @functools.cached_property
    def grid(self):
        """Derivatives at all combinations of `points`, and the combinations [rows, components] of numbers."""
        combinations = np.indices((NODES + 2,) * self.size).reshape(self.size, -1).T
        return combinations, self.on(points()[combinations])

    def expected(self, eps, fraction):
        """Mean of the probe derivatives under the law of the gates: a sum over `grid`, nothing drawn."""
        combinations, found = self.grid
        probes = np.concatenate([[0, 0], quadrature()[1]])
        others = eps * probes + (1 - eps) * lowered(eps, fraction) * (np.arange(NODES + 2) == 0)
        others += (1 - eps) * (1 - lowered(eps, fraction)) * (np.arange(NODES + 2) == 1)
        chance = []
        for component in range(self.size):
            own = np.take(probes, combinations[:, component])
            chance.append(own * np.delete(others[combinations], component, axis=1).prod(axis=1))
        return np.einsum("ervc,cr->evc", found, np.array(chance))

    def curvature(self, fraction):
        """Sum over j of h_ij'' by the definition above, with plain torch, [examples, values, components]."""
        rest, nodes = all_masks(self.size - 2), list(zip(*quadrature(), strict=True))
        settings = list(itertools.product(itertools.permutations(range(self.size), 2), nodes, (0, 1)))
        gates, along = np.zeros((2, len(settings), len(rest), self.size))
        for number, ((own, other), (node, _), end) in enumerate(settings):
            gates[number][:, np.delete(np.arange(self.size), [own, other])] = rest
            gates[number][:, own], gates[number][:, other] = end, node
            along[number][:, other] = 1
        bent = second_derivatives(self.model, self.inputs, gates, along)
        total = np.zeros((EXAMPLES, 2, self.size))
        for ((own, _), (node, weight), end), found in zip(settings, bent, strict=True):
            density = weight * 6 * node * (1 - node) * (1 if end else -1)
            total[..., own] += density * np.einsum("r,rev->ev", mask_probabilities(rest, fraction), found)
        return total

    def curvature_by_parts(self, fraction, nodes=24):
        """The same from first derivatives, also where they jump: h = integral (12 t - 6) u'(t) dt."""
        total = np.zeros((EXAMPLES, 2, self.size))
        masks = all_masks(self.size - 1)
        for other in range(self.size):
            rest = [c for c in range(self.size) if c != other]
            for node in (np.arange(nodes) + 0.5) / nodes:
                slopes = self.on(np.insert(masks.astype(float), other, node, axis=1))[..., other]
                values = slopes.transpose(1, 0, 2).reshape(len(masks), -1)
                added = exact_weights(values, fraction).reshape(EXAMPLES, 2, self.size - 1)
                total[..., rest] += (12 * node - 6) / nodes * added
        return total


def second_derivatives(model, inputs, gates, along):
    """Of the outputs, along one gate each, by differentiating twice, [settings, rows, examples, values]."""
    gates = torch.from_numpy(gates)[:, :, None].repeat(1, 1, EXAMPLES, 1).requires_grad_()
    along = torch.from_numpy(along)[:, :, None]
    outputs = model(inputs.expand(*gates.shape[:-1], -1), gates)
    found = []
    for value in range(2):
        (first,) = torch.autograd.grad(outputs[..., value].sum(), gates, create_graph=True)
        (second,) = torch.autograd.grad((first * along).sum(), gates, retain_graph=True)
        found.append((second * along).sum(dim=-1))
    return torch.stack(found, dim=-1).numpy()


@functools.cache
def network(name):
    return Enumerable(name)


def quadrature():
    """Nodes and weights of Gauss-Legendre on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return (nodes + 1) / 2, weights / 2


def points():
    """Where a gate may be: ablated, kept, or one of the nodes between."""
    return np.concatenate([[0.0, 1.0], quadrature()[0]])


# ------------------------------------------------------------------------------------------- the draws


def lowered(eps, fraction):
    """Probability that a component which is no probe is ablated: a' of a' (1 - eps) + eps / 2 = a."""
    found = (fraction - eps / 2) / (1 - eps)
    assert found >= 0
    return found


def drawn(rng, rows, size, eps, fraction):
    """Independent probes. Rows without any are left out: they say nothing of any probe."""
    probes = rng.random((rows, size)) < eps
    probes = probes[probes.any(axis=1)]
    others = rng.random(probes.shape) >= lowered(eps, fraction)
    return Gates(np.where(probes, rng.random(probes.shape), others), probes)


def probe_means(net, eps, fraction, rows, seed=0):
    """Mean over passes in which a component was a probe, and its standard error, [examples, values, ...]."""
    rng = np.random.default_rng(seed)
    means, errors = [], []
    for example in range(EXAMPLES):
        gates = drawn(rng, rows, net.size, eps, fraction)
        found = net.derivatives(np.full(len(gates.probes), example), gates.gates)
        own = [found[gates.probes[:, c], :, c] for c in range(net.size)]  # each [probes, values]
        means.append(np.stack([part.mean(axis=0) for part in own], axis=1))
        errors.append(np.stack([part.std(axis=0, ddof=1) / len(part) ** 0.5 for part in own], axis=1))
    return np.array(means), np.array(errors)


def round_means(net, fraction, replicates, rounds, seed=0):
    """The same from the project's own draws: whole rounds, each replicate an example number of its own."""
    draws = GateDraws(fraction, seed, net.size)
    numbers = np.arange(EXAMPLES * replicates)
    total = np.zeros((len(numbers), 2, net.size))
    for index in range(rounds):
        for gates in draws.round(0, index, numbers):
            found = net.derivatives(numbers % EXAMPLES, gates.gates)
            total += found * gates.probes[:, None] / rounds
    total = total.reshape(replicates, EXAMPLES, 2, net.size)
    return total.mean(axis=0), total.std(axis=0, ddof=1) / replicates**0.5


def scores(means, errors, truth):
    """z-scores of all examples, values and components."""
    return ((means - truth) / errors).ravel()


def require_unbiased(z):
    """Standard normal as far as so many numbers can tell: the largest, and their mean square."""
    assert np.abs(z).max() < 4.2  # one in 37,000 each, a few dozen of them
    # The two values of an example are correlated: half as many degrees of freedom as numbers, at least.
    assert abs((z**2).mean() - 1) < 3 * np.sqrt(2 / (len(z) / 2))


def size_of(difference, truth):
    """Norm relative to another."""
    return np.linalg.norm(difference) / np.linalg.norm(truth)


# ----------------------------------------------------------------------------------------- exact weights


class TestExactWeights:
    @pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5])
    @pytest.mark.parametrize("name", CURVED)
    def test_they_are_the_least_squares_weights_over_all_masks(self, name, fraction):
        net = network(name)
        masks = all_masks(net.size)
        root = np.sqrt(mask_probabilities(masks, fraction))[:, None]
        design = np.column_stack([masks, np.ones(len(masks))])
        fitted = np.linalg.lstsq(root * design, root * net.outputs, rcond=None)[0]
        np.testing.assert_allclose(exact_weights(net.outputs, fraction), fitted[:-1].T, atol=1e-9)

    def test_a_product_of_components_is_worth_the_chance_of_the_others(self):
        masks = all_masks(4)
        outputs = np.stack([masks[:, 0] & masks[:, 2], 5.0 * masks[:, 1] - 2.0 * masks[:, 3]], axis=1)
        expected = [[0.7, 0, 0.7, 0], [0, 5, 0, -2]]
        np.testing.assert_allclose(exact_weights(outputs, 0.3), expected, atol=1e-12)

    def test_masks_are_those_of_ablation(self):
        """The kept bias included: the runner's outputs are those of the gated definition at both ends."""
        for name in SMOOTH:
            net = network(name)
            gates = torch.from_numpy(all_masks(net.size).astype(float))
            rows = torch.stack([net.model(x.expand(len(gates), -1), gates) for x in net.inputs], dim=1)
            np.testing.assert_allclose(net.outputs, rows.reshape(len(gates), -1), atol=1e-12)

    @pytest.mark.parametrize("components", [0, 17, 64])
    def test_too_many_masks_are_refused(self, components):
        with pytest.raises(SettingError, match="number of components"):
            all_masks(components)

    @pytest.mark.parametrize("rows", [3, 12, 100])
    def test_rows_that_are_not_all_masks_are_refused(self, rows):
        with pytest.raises(SettingError, match="all masks"):
            exact_weights(np.ones((rows, 1)), 0.1)


# ------------------------------------------------------------------------------------- small and large eps


class TestIndependentProbes:
    @pytest.mark.slow
    @pytest.mark.parametrize(("eps", "rows"), [(0.02, 50_000), (0.005, 800_000)])
    @pytest.mark.parametrize("name", CURVED)
    def test_as_eps_goes_to_0_the_probe_mean_is_the_weight(self, name, eps, rows):
        net = network(name)
        means, errors = probe_means(net, eps, 0.3, rows)
        exact = net.exact(0.3)
        require_unbiased(scores(means, errors, exact))
        assert size_of(errors, exact) < 0.04  # or nothing was tested

    @pytest.mark.parametrize("name", CURVED)
    def test_at_large_eps_the_bias_of_a_curved_network_shows(self, name):
        """The same number of probes and the same scores as above: they see what there is to see."""
        net = network(name)
        means, errors = probe_means(net, 0.4, 0.3, 10_000)
        z = scores(means, errors, net.exact(0.3))
        assert np.abs(z).max() > 8
        assert (z**2).mean() > 10

    @pytest.mark.parametrize("eps", [0.1, 0.4])
    @pytest.mark.parametrize("name", [*SMOOTH, "linear"])
    def test_what_is_drawn_has_the_expectation_that_quadrature_finds(self, name, eps):
        net = network(name)
        means, errors = probe_means(net, eps, 0.3, round(4_000 / eps), seed=1)
        require_unbiased(scores(means, errors, net.expected(eps, 0.3)))

    @pytest.mark.parametrize("fraction", [0.05, 0.3])
    @pytest.mark.parametrize("name", SMOOTH)
    def test_the_limit_without_noise(self, name, fraction):
        """No other component is a probe: a mean over masks of the others, of an integral along the gate."""
        net = network(name)
        np.testing.assert_allclose(net.expected(0.0, fraction), net.exact(fraction), atol=1e-4)
        assert size_of(net.expected(0.0, fraction) - net.exact(fraction), net.exact(fraction)) < 1e-5


# -------------------------------------------------------------------------------------------- the formula


class TestBiasFormula:
    @pytest.mark.parametrize(("fraction", "eps"), [(0.05, 0.1), (0.1, 0.2), (0.3, 0.2)])  # the defaults
    @pytest.mark.parametrize("name", SMOOTH)
    def test_it_is_the_bias_at_the_default_eps(self, name, fraction, eps):
        net = network(name)
        assert GateDraws(fraction, 0, net.size).probe_fraction == pytest.approx(eps)
        bias = net.expected(eps, fraction) - net.exact(fraction)
        assert size_of(bias, net.exact(fraction)) > 0.008  # there is one
        assert size_of(bias + eps / 12 * net.curvature(fraction), bias) < 0.1

    @pytest.mark.parametrize("fraction", [0.1, 0.3])
    @pytest.mark.parametrize("name", SMOOTH)
    def test_what_it_leaves_falls_with_the_square_of_eps(self, name, fraction):
        net = network(name)
        exact, curvature = net.exact(fraction), net.curvature(fraction)
        left = [
            np.linalg.norm(net.expected(eps, fraction) - exact + eps / 12 * curvature)
            for eps in (0.2, 0.1, 0.05)
        ]
        assert left[0] / left[1] == pytest.approx(4, abs=0.2)
        assert left[1] / left[2] == pytest.approx(4, abs=0.2)

    @pytest.mark.parametrize("name", SMOOTH)
    def test_second_derivatives_are_those_of_the_engine(self, name):
        net = network(name)
        curvature = net.curvature(0.3)
        assert size_of(net.curvature_by_parts(0.3) - curvature, curvature) < 0.01

    @pytest.mark.slow
    def test_it_holds_across_kinks(self):
        """ReLU: the second derivative is a mass wherever a unit of a later layer sets in."""
        net, eps = network("conv"), 0.3
        means, errors = probe_means(net, eps, 0.3, 40_000)
        bias, predicted = means - net.exact(0.3), -eps / 12 * net.curvature_by_parts(0.3)
        slope = (bias * predicted / errors**2).sum() / (predicted**2 / errors**2).sum()
        assert slope == pytest.approx(1, abs=0.1)
        assert 1 / np.sqrt((predicted**2 / errors**2).sum()) < 0.02  # the slope's standard error
        assert size_of(bias - predicted, bias) < 0.35  # noise and O(eps^2)

    def test_two_components_by_hand(self):
        """G_1 = g_2^2: T u = 1/3 - 1/2 = -1/6, h = 2; the formula has no remainder for two components."""
        eps, fraction = 0.2, 0.3
        square = eps / 3 + (1 - eps) * (1 - lowered(eps, fraction))  # E_L of g_2^2
        assert square - (1 - fraction) == pytest.approx(-eps / 12 * 2)


# ------------------------------------------------------------------------------- models without any bias


class TestWithoutCurvature:
    @pytest.mark.parametrize("eps", [0.05, 0.2, 0.6])
    def test_a_model_that_is_affine_in_each_gate_has_no_bias_at_any_eps(self, eps):
        net = network("linear")
        np.testing.assert_allclose(net.expected(eps, 0.3), net.exact(0.3), atol=1e-6)
        # Its layers multiply, so that this is about means: single passes are far off.
        means, errors = probe_means(net, eps, 0.3, round(3_000 / eps))
        require_unbiased(scores(means, errors, net.exact(0.3)))
        assert errors.max() > 0.003 * np.abs(net.exact(0.3)).max()

    def test_every_pass_gives_the_weights_of_an_additive_model(self):
        net = network("additive")
        gates = np.random.default_rng(0).random((200, net.size))
        found, exact = net.on(gates), net.exact(0.3)
        np.testing.assert_allclose(found, np.broadcast_to(exact[:, None], found.shape), atol=1e-6)
        np.testing.assert_allclose(exact, net.exact(0.05), atol=1e-9)
        assert np.abs(exact).min() > 0.01


# -------------------------------------------------------------------------------------- the project's draws

REPLICATES, ROUNDS = 600, 4


@functools.cache
def balanced(name, fraction):
    return round_means(network(name), fraction, REPLICATES, ROUNDS)


@pytest.mark.slow
class TestGateDraws:
    @pytest.mark.parametrize("fraction", [0.05, 0.3])
    @pytest.mark.parametrize("name", SMOOTH)
    def test_balance_and_strata_leave_the_expectation_where_it_is(self, name, fraction):
        """Components choose their passes independently, so the others' law is L whoever is a probe."""
        net = network(name)
        eps = GateDraws(fraction, 0, net.size).probe_fraction
        require_unbiased(scores(*balanced(name, fraction), net.expected(eps, fraction)))

    @pytest.mark.parametrize("fraction", [0.05, 0.3])
    @pytest.mark.parametrize("name", SMOOTH)
    def test_the_default_is_off_by_what_the_formula_says_and_noise(self, name, fraction):
        net = network(name)
        eps = GateDraws(fraction, 0, net.size).probe_fraction
        means, errors = balanced(name, fraction)
        predicted = np.linalg.norm(eps / 12 * net.curvature(fraction))
        assert np.linalg.norm(means - net.exact(fraction)) < 1.5 * predicted + np.linalg.norm(errors)

    def test_fraction_is_honoured(self):
        """Estimates for .05, .10 and .30 are each closest to the exact weights of their own fraction."""
        fractions = (0.05, 0.1, 0.3)
        exact = [network("loss").exact(fraction) for fraction in fractions]
        found = [balanced("loss", fraction)[0] for fraction in fractions]
        away = np.array([[size_of(estimate - weights, weights) for weights in exact] for estimate in found])
        assert away.argmin(axis=1).tolist() == [0, 1, 2]
        assert away.argmin(axis=0).tolist() == [0, 1, 2]
        assert np.diag(away).max() < 0.7 * away[~np.eye(3, dtype=bool)].min()
