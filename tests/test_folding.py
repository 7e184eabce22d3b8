"""BatchNorm folded into convolutions: which pairs, and that gates mean the same afterwards."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import coar
from coar.components import ComponentGroup, ComponentSet
from coar.fingerprints import model_fingerprint
from coar.gates import GatedActivations, ScaledWeights, fold_batch_norm, make_sites
from coar.task import Task
from tests import naive
from tests.cases import random_numbers

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}  # of the largest output, if that is above 1
IMAGE = (2, 6, 6)


def randomised(model, seed=0):
    """No weight and no statistic is 0 or 1; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                tensor.data = torch.randn(tensor.shape, generator=generator) * 0.5
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean = torch.randn(len(module.running_mean), generator=generator)
            module.running_var = torch.rand(len(module.running_var), generator=generator) + 0.5
    return model.eval().requires_grad_(False)


class Net(nn.Module):
    """One convolution, one BatchNorm, and whatever a test does with them."""

    def __init__(self, conv=None, norm=None, use=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(2, 4, 3, padding=1)
        self.bn = norm or nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.use = use or (lambda net, x: net.bn(net.conv(x)))

    def forward(self, x):
        return self.use(self, x)


def images(count=3, dtype=torch.float32, shape=IMAGE):
    return random_numbers(count, *shape).to(dtype)


def folded(model, sites=(), inputs=None):
    model = copy.deepcopy(model)
    inputs = images(dtype=next(model.parameters()).dtype) if inputs is None else inputs
    return model, fold_batch_norm(model, sites, lambda: model(inputs))


def require_close(found, expected):
    tolerance = TOLERANCES[expected.dtype] * max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance


# ------------------------------------------------------------------------------------- pairs that fold


def without_bias(norm):
    norm.bias = None
    return norm


FOLDING = {
    "with a bias": (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), IMAGE),
    "without a bias": (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), IMAGE),
    "without weight and bias": (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), IMAGE),
    "neither anywhere": (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), IMAGE),
    "grouped": (nn.Conv2d(2, 4, 3, groups=2, stride=2), nn.BatchNorm2d(4), IMAGE),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.BatchNorm2d(4), (4, 6, 6)),
    "reflected": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), IMAGE),
    "another epsilon": (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.3, momentum=None), IMAGE),
    "weight without bias": (nn.Conv2d(2, 4, 3), without_bias(nn.BatchNorm2d(4)), IMAGE),
    "over time": (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), (2, 9)),
    "over volumes": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 4, 4, 4)),
}
CONVENTIONS = [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7), ("ablate", -1.5), ("keep", "mean")]


def make_pair(name, dtype=torch.float64):
    conv, norm, shape = FOLDING[name]
    pair = nn.Sequential(nn.Identity(), copy.deepcopy(conv), copy.deepcopy(norm), nn.ReLU())
    return randomised(pair).to(dtype), images(dtype=dtype, shape=shape)


def filters(module, count=4, **fields):
    fields = {"bias": "bias"} | fields
    name = fields.pop("name", module)
    return ComponentGroup(name, "conv_filter", module, "weight", 0, count, **fields)


def bias_of(module):
    return "bias" if module.bias is not None else None


def all_ways(model, inputs, components, bias, value, gates):
    """Outputs of scaled weights unfolded, then folded in every way that there is."""
    means = {"mean": {g.name: random_numbers(g.count * g.width).double().numpy() for g in components}}
    convention = bias, value, means.get(value)
    plain = ScaledWeights(copy.deepcopy(model), components, *convention)
    plain.set(gates)
    yield plain.model(inputs)
    private = copy.deepcopy(model)
    sites = make_sites(private, components, *convention)
    assert fold_batch_norm(private, sites, lambda: private(inputs)) == 1
    for fused in (False, True):
        activations = GatedActivations(private, components, sites=sites, fused=fused)
        row = torch.tensor(gates, dtype=inputs.dtype)
        for own in (row, row.expand(len(inputs), -1)):
            with activations.at(own):
                yield private(inputs)
    weights = ScaledWeights(private, components, sites=sites)
    for between in (1 - gates, gates):
        weights.set(between)
    yield private(inputs)


@pytest.mark.parametrize("name", FOLDING)
class TestPairsThatFold:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_give_the_same_outputs(self, name, dtype):
        model, inputs = make_pair(name, dtype)
        found, count = folded(model, inputs=inputs)
        assert count == 1
        require_close(found(inputs), model(inputs))
        torch.testing.assert_close(
            found[1](inputs), model[2](model[1](inputs))
        )  # the convolution does it all

    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_gates_on_filters_mean_what_they_meant(self, name, bias, value, dtype):
        model, inputs = make_pair(name, dtype)
        components = ComponentSet([filters("1", bias=bias_of(model[1]))])
        for gates in (np.array([0.3, 1.0, 0.0, 0.8]), np.zeros(4), np.array([1.0, 0.0, 1.0, 1.0])):
            expected, *others = all_ways(model, inputs, components, bias, value, gates)
            for found in others:
                require_close(found, expected)

    def test_gradients_stay_what_they_were(self, name):
        model, inputs = make_pair(name)
        components = ComponentSet([filters("1", bias=bias_of(model[1]))])
        private = copy.deepcopy(model)
        sites = make_sites(private, components)
        fold_batch_norm(private, sites, lambda: private(inputs))
        plain = GatedActivations(model, components)
        rows = []
        for gated in (plain, GatedActivations(private, components, sites=sites)):
            gates = torch.full((len(inputs), 4), 0.6, dtype=torch.float64, requires_grad=True)
            with gated.at(gates):
                rows.append(torch.autograd.grad(gated.model(inputs).sin().sum(), gates)[0])
        torch.testing.assert_close(rows[1], rows[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
@pytest.mark.parametrize("name", [name for name, (_, norm, _) in FOLDING.items() if norm.affine])
class TestGatesOnTheNorm:
    @pytest.mark.parametrize("whole", [True, False])
    def test_mean_what_they_meant(self, name, bias, value, whole):
        model, inputs = make_pair(name)
        shape = {"count": 1, "width": 4} if whole else {"count": 4}
        components = ComponentSet([filters("2", **shape, whole=whole, bias=bias_of(model[2]))])
        for gates in (np.array([0.3, 1.0, 0.0, 0.8])[: shape["count"]], np.zeros(shape["count"])):
            expected, *others = all_ways(model, inputs, components, bias, value, gates)
            for found in others:
                require_close(found, expected)

    def test_and_those_on_filters_multiply_as_before(self, name, bias, value):
        model, inputs = make_pair(name)
        ours, theirs = bias_of(model[1]), bias_of(model[2])
        block = filters("2", 1, width=4, whole=True, name="block", bias=theirs)
        parts = [block, filters("2", bias=theirs), filters("1", bias=ours)]
        components = ComponentSet(parts, overlap=True)
        gates = np.array([0.6, 0.3, 1.0, 0.0, 0.8, 0.5, 0.0, 1.0, 0.7])
        expected, *others = all_ways(model, inputs, components, bias, value, gates)
        for found in others:
            require_close(found, expected)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_random_statistics_fold(seed):
    model = randomised(Net(), seed).double()
    inputs = images(dtype=torch.float64)
    found, count = folded(model)
    assert count == 1
    require_close(found(inputs), model(inputs))


# ------------------------------------------------------------------------------- pairs that must not


def also_added(net, x):
    hidden = net.conv(x)
    return net.bn(hidden) + hidden


def conv_twice(net, x):
    return net.bn(net.second(net.second(net.conv(x))))


def norm_twice(net, x):
    return net.bn(net.second(net.bn(net.conv(x))))


def norm_shared(net, x):
    hidden = net.conv(x)
    return net.bn(net.second(torch.relu(hidden))) + net.bn(torch.tanh(hidden))


def zeroed_between(net, x):
    hidden = net.conv(x)
    hidden[:, :, 0] = 0
    return net.bn(hidden)


def relu_in_place_between(net, x):
    hidden = net.conv(x)
    functional.relu_(hidden)
    return net.bn(hidden)


def into_out_between(net, x):
    hidden = net.conv(x)
    torch.exp(x.mean(1, keepdim=True).expand(-1, 4, -1, -1), out=hidden)
    return net.bn(hidden)


def looked_at(net, x):
    hidden = net.conv(x)
    return net.bn(hidden) + float(np.abs(hidden.numpy()).max())


def compared(net, x):
    hidden = net.conv(x)
    return net.bn(hidden) + torch.equal(hidden, hidden)


def read_by_name(net, x):
    hidden = net.conv(x)
    return net.bn(hidden) + functional.conv2d(
        input=hidden, weight=net.second.weight, bias=net.second.bias, padding=1
    )


def in_a_list(net, x):
    hidden = net.conv(x)
    return torch.cat([net.bn(hidden), hidden], dim=1)


def weight_read_elsewhere(net, x):
    return functional.conv_transpose2d(net.bn(net.conv(x)), net.conv.weight)


def bias_read_elsewhere(net, x):
    return net.bn(net.conv(x)) + net.conv.bias.sum()


def statistics_read_elsewhere(net, x):
    return net.bn(net.conv(x)) + net.bn.running_mean.sum()


def scale_read_elsewhere(net, x):
    return net.bn(net.conv(x)) * net.bn.weight.abs().sum()


def norm_by_function(net, x):
    norm = net.bn
    mean, variance = norm.running_mean, norm.running_var
    return functional.batch_norm(net.conv(x), mean, variance, norm.weight, norm.bias)


def conv_by_function(net, x):
    return net.bn(functional.conv2d(x, net.conv.weight, net.conv.bias, padding=1))


def statistics_of_the_batch(net, x):
    norm = net.bn
    return functional.batch_norm(net.conv(x), None, None, norm.weight, norm.bias, training=True)


NOT_FOLDING = {
    **{
        f.__name__: f
        for f in (also_added, conv_twice, norm_twice, norm_shared, zeroed_between, relu_in_place_between)
    },
    **{f.__name__: f for f in (into_out_between, looked_at, compared, read_by_name, in_a_list)},
    **{f.__name__: f for f in (weight_read_elsewhere, bias_read_elsewhere, statistics_read_elsewhere)},
    **{f.__name__: f for f in (scale_read_elsewhere, norm_by_function, conv_by_function)},
    "something between": lambda net, x: net.bn(torch.relu(net.conv(x))),
    "only the same memory": lambda net, x: net.bn(net.conv(x).contiguous()),
    "norm first": lambda net, x: net.second(net.bn(net.second(x.repeat(1, 2, 1, 1)) + 1)),
    "conv never called": lambda net, x: net.bn(x.repeat(1, 2, 1, 1)),
    "statistics_of_the_batch": statistics_of_the_batch,
}


@pytest.mark.parametrize("use", NOT_FOLDING)
def test_what_somebody_else_reads_is_not_folded(use):
    model = randomised(Net(use=NOT_FOLDING[use])).double()
    before = model_fingerprint(model)
    found, count = folded(model)
    assert count == 0
    assert model_fingerprint(found) == before
    assert torch.equal(found(images(dtype=torch.float64)), model(images(dtype=torch.float64)))


def doubled(*args):
    """A hook on what a module emits."""
    return args[2] * 2


def doubled_before(*args):
    """A hook on what a module reads."""
    return args[1][0] * 2


def nothing(*_):
    """A hook that changes nothing."""


def conv_own_forward(net):
    plain = net.conv.forward
    net.conv.forward = lambda x: plain(x) * 2


def norm_own_forward(net):
    plain = net.bn.forward
    net.bn.forward = lambda x: plain(x) * 2


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class DoublingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def without_statistics(net):
    net.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()


def weight_norm(net):
    nn.utils.parametrizations.weight_norm(net.conv)


def tied(net):
    net.second.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    net.conv = nn.Conv2d(4, 4, 3, padding=1)
    net.conv.weight = net.second.weight
    net.use = lambda net, x: net.bn(net.conv(net.second(x.repeat(1, 2, 1, 1))))


CHANGES = {
    "hook on the convolution": lambda net: net.conv.register_forward_hook(doubled),
    "hook on what the convolution reads": lambda net: net.conv.register_forward_pre_hook(doubled_before),
    "hook on the norm": lambda net: net.bn.register_forward_hook(doubled),
    "hook on what the norm reads": lambda net: net.bn.register_forward_pre_hook(doubled_before),
    "backward hook": lambda net: net.bn.register_full_backward_hook(nothing),
    "a forward of the convolution's own": conv_own_forward,
    "a forward of the norm's own": norm_own_forward,
    "a subclass of the convolution": lambda net: setattr(net, "conv", DoublingConv(2, 4, 3).eval()),
    "a subclass of the norm": lambda net: setattr(net, "bn", Doubling(4).eval()),
    "no running statistics": without_statistics,
    "train mode": lambda net: net.bn.train(),
    "a weight that is computed": weight_norm,
    "tied weights": tied,
    "another norm": lambda net: setattr(net, "bn", nn.InstanceNorm2d(4, track_running_stats=True).eval()),
    "a transposed convolution": lambda net: setattr(net, "conv", nn.ConvTranspose2d(2, 4, 3)),
    "a linear layer": lambda net: (
        setattr(net, "conv", nn.Linear(6, 6)),
        setattr(net, "use", lambda net, x: net.bn(net.conv(x).repeat(1, 2, 1, 1))),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_a_plain_pair_is_not_folded(change):
    model = randomised(Net())
    CHANGES[change](model)
    model = model.double()
    found, count = folded(model)
    assert count == 0
    for hidden in (model, found):  # what depends on the batch sees the same batch
        hidden.double()
    assert torch.equal(found(images(dtype=torch.float64)), model(images(dtype=torch.float64)))


# ------------------------------------------------------------------------------- pairs in whole models


class Block(nn.Module):
    """Two pairs, one after the other, and a shortcut with a pair of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.plain = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def features(self, x):
        hidden = functional.relu_(self.bn1(self.conv1(x)))
        assert hidden.shape[1] == 4
        return self.plain(functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x)))

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


def test_every_pair_of_a_model_is_folded_and_nothing_else():
    model = randomised(Block()).double()
    found, count = folded(model)
    assert count == 3
    require_close(found(images(dtype=torch.float64)), model(images(dtype=torch.float64)))
    assert torch.equal(found.plain.weight, model.plain.weight)
    assert found.conv1.bias is not None
    assert model.conv1.bias is None


def test_asking_for_shape_and_type_is_no_reading():
    def use(net, x):
        hidden = net.conv(x)
        assert hidden.shape[1] == hidden.size(1) == hidden.dim() == 4
        assert hidden.dtype == x.dtype
        assert hidden.is_contiguous()
        assert hidden.device == x.device
        return net.bn(hidden)

    assert folded(randomised(Net(use=use)))[1] == 1


def test_modules_under_two_names_fold_once_and_everywhere():
    class TwoNames(Net):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([self.conv, self.bn])
            self.hidden = [self.bn]  # not registered at all

        def forward(self, x):
            return self.hidden[0](self.layers[0](x))

    model = randomised(TwoNames()).double()
    found, count = folded(model)
    assert count == 1
    require_close(found(images(dtype=torch.float64)), model(images(dtype=torch.float64)))


def test_a_folded_norm_can_still_be_asked_for_its_size():
    model = randomised(Net(use=lambda net, x: net.bn(net.conv(x))[:, : net.bn.num_features]))
    found, count = folded(model)
    assert count == 1
    require_close(found(images()), model(images()))


def test_layout_and_trainability_stay():
    model = randomised(Net()).to(memory_format=torch.channels_last)
    for flag in (True, False):
        model.conv.weight.requires_grad_(flag)
        found, _ = folded(model)
        assert found.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert found.conv.weight.requires_grad == flag


def test_no_hook_of_ours_stays():
    found, _ = folded(randomised(Net()))
    assert not any(module._forward_pre_hooks for module in found.modules())
    again = randomised(Net(use=lambda net, x: net.missing(x)))
    with pytest.raises(AttributeError):
        fold_batch_norm(again, [], lambda: again(images()))
    assert not any(module._forward_pre_hooks for module in again.modules())


class TestSeveralRuns:
    """A pair must be one in each way in which the model is run."""

    def runs(self, *functions):
        model = randomised(Net(), seed=3)
        return fold_batch_norm(model, [], *(lambda function=f: function(model, images()) for f in functions))

    def test_that_use_the_pair_alike(self):
        assert self.runs(lambda net, x: net(x), lambda net, x: net(x + 1)) == 1

    def test_one_of_which_does_not_use_it(self):
        assert self.runs(lambda net, x: net(x), lambda net, x: net.second(x.repeat(1, 2, 1, 1))) == 1

    @pytest.mark.parametrize("position", [0, 1])
    @pytest.mark.parametrize("other", [also_added, lambda net, x: net.conv(x), norm_by_function])
    def test_one_of_which_uses_it_in_another_way(self, position, other):
        functions = [other, lambda net, x: net(x)]
        assert self.runs(*(functions if position else functions[::-1])) == 0

    def test_none_of_which_uses_it(self):
        assert self.runs(lambda net, x: net.second(x.repeat(1, 2, 1, 1))) == 0


# ------------------------------------------------------------------------------------ the whole runner


def experiment_of(model, functions=None, bias="keep", value="zero", components=None, count=5):
    data = [(x, torch.tensor(i % 3)) for i, x in enumerate(images(count))]
    task = Task(model, data, functions or {"margin": coar.outputs.margin}, device="cpu")
    components = components or coar.find_components(model, ["conv_filter"])
    return coar.ComponentAblation(task, components, bias, value)


def masks_of(experiment, rows=6):
    masks = np.random.default_rng(0).random((rows, len(experiment.components))) > 0.3
    masks[0], masks[-1] = True, False
    return masks


class TestTheRunner:
    @pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_folded_rows_are_the_unfolded_ones(self, bias, value, precision):
        experiment = experiment_of(randomised(Block()), bias=bias, value=value)
        masks = masks_of(experiment)
        runners = [experiment.prepare(CPU, precision=precision, fold=fold) for fold in (True, False)]
        assert [runner.record()["folded"] for runner in runners] == [3, 0]
        found, expected = (runner(masks)["margin"] for runner in runners)
        tolerance = {"float32": 1e-5, "float64": 1e-10}[precision]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
        assert np.ptp(expected, axis=0).max() > 0.1

    @pytest.mark.parametrize(("bias", "value"), [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7)])
    def test_folded_rows_are_those_of_a_literal_rebuild(self, bias, value):
        experiment = experiment_of(randomised(Block()), bias=bias, value=value)
        masks = masks_of(experiment)
        found = experiment.prepare(CPU)(masks)["margin"]
        np.testing.assert_allclose(found, naive.rows(experiment, masks)["margin"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bias", ["keep", "ablate"])
    def test_blocks_that_end_in_a_folded_norm(self, bias):
        model = randomised(Block())
        block = filters("bn2", 1, width=4, whole=True)
        experiment = experiment_of(model, bias=bias, components=ComponentSet([block]))
        runner = experiment.prepare(CPU)
        assert runner.record()["folded"] == 3
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.bn2.weight.zero_()
            without.bn2.bias.zero_()
        expected = naive.outputs_of(experiment.task, without)["margin"]
        found = runner(np.zeros((1, 1), dtype=bool))["margin"][0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_the_model_of_the_task_is_left_alone(self):
        model = randomised(Block())
        before, biases = model_fingerprint(model), model.conv1.bias
        experiment = experiment_of(model)
        experiment.prepare(CPU)(masks_of(experiment))
        assert model_fingerprint(model) == before
        assert model.conv1.bias is biases is None
        assert type(model.bn1) is nn.BatchNorm2d
        assert "forward" not in vars(model.bn1)

    @pytest.mark.parametrize("first", ["margin", "inside"])
    def test_an_output_that_looks_in_between_gets_what_it_asks_for(self, first):
        """Whichever output comes first: one that reads a convolution keeps its pair from being folded."""

        def inside(model, batch):
            return model.conv1(batch[0]).mean(dim=(2, 3))

        functions = {"margin": coar.outputs.margin, "inside": inside}
        functions = {name: functions[name] for name in (first, *(set(functions) - {first}))}
        experiment = experiment_of(randomised(Block()), functions)
        runner = experiment.prepare(CPU)
        assert runner.record()["folded"] == 2
        masks = masks_of(experiment)
        for name, values in naive.rows(experiment, masks).items():
            np.testing.assert_allclose(runner(masks)[name], values, rtol=1e-4, atol=1e-5)

    def test_outputs_that_run_the_model_each_on_its_own_inputs_fold(self):
        def mirrored(model, batch):
            return model(batch[0].flip(-1))[:, 0]

        experiment = experiment_of(randomised(Block()), {"margin": coar.outputs.margin, "mirrored": mirrored})
        runner = experiment.prepare(CPU)
        assert runner.record()["folded"] == 3
        masks = masks_of(experiment)
        for name, values in naive.rows(experiment, masks).items():
            np.testing.assert_allclose(runner(masks)[name], values, rtol=1e-4, atol=1e-5)

    def test_a_model_that_folding_would_change_is_run_as_it_is(self):
        """Where a reader escapes the trace, outputs tell."""

        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.head = Net(), nn.Linear(4, 3)

            def forward(self, x):
                hidden = self.net(x).mean(dim=(2, 3))
                with torch._C.DisableTorchFunction():  # no mode sees this
                    scale = self.net.conv.weight.std()
                return self.head(hidden) * scale

        experiment = experiment_of(randomised(Reads()))
        with pytest.warns(UserWarning, match="nothing reads .* net.second"):
            runner = experiment.prepare(CPU)
        masks = np.ones((1, len(experiment.components)), dtype=bool)
        expected = naive.outputs_of(experiment.task, experiment.task.model)["margin"]
        np.testing.assert_allclose(runner(masks)["margin"][0], expected, rtol=1e-4, atol=1e-5)
        assert runner.record()["folded"] == 0

    def test_constants_for_filters_of_a_transposed_convolution_still_work_beside_folding(self):
        class Decoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
                self.up, self.head = nn.ConvTranspose2d(4, 2, 3, bias=False), nn.Linear(2, 3)

            def forward(self, x):
                return self.head(torch.tanh(self.up(self.bn(self.conv(x)))).mean(dim=(2, 3)))

        experiment = experiment_of(randomised(Decoder()), value=0.4)
        masks = masks_of(experiment)
        found, expected = (experiment.prepare(CPU, fold=fold)(masks)["margin"] for fold in (True, False))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
