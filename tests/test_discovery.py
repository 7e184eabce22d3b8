import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from coar.components import ComponentGroup
from coar.discovery import component_rule, find_components, kinds
from coar.errors import ComponentError
from coar.kinds import registry
from coar.tasks.digits import DigitsResNet
from coar.testing import check_components
from tests.cases import CASES, make_case, make_model
from tests.refused import refused


class MyLinear(nn.Linear):
    """A subclass, as attention and quantisation libraries have them."""


class Scale(nn.Module):
    """A layer that no rule knows."""

    def __init__(self, size=3):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.factors


def counts(components):
    return {group.name: group.count for group in components}


@pytest.mark.parametrize("name", CASES)
def test_components_of_every_small_model_keep_the_contract(name):
    case = make_case(name)
    batch = case.task.batch(range(3))
    check_components(
        case.task.model, case.components, batch["tokens"] if name == "several_outputs" else batch[0]
    )


class TestWhatIsFound:
    def test_filters_of_all_convolutions_in_the_order_of_modules(self):
        found = find_components(make_model("grouped"))
        assert counts(found) == {"plain": 4, "grouped": 6, "depthwise": 6, "pointwise": 3}
        assert {group.kind for group in found} == {"conv_filter"}

    def test_shortcut_convolutions_count_like_all_others(self):
        found = find_components(DigitsResNet())
        assert len(found) == 312
        assert counts(found)["block2.shortcut.0"] == 32

    def test_kinds_can_be_joined(self):
        found = find_components(make_model("grouped"), kinds=["neuron", "conv_filter"])
        assert list(counts(found)) == ["plain", "grouped", "depthwise", "pointwise", "hidden"]

    def test_the_bias_that_belongs_to_a_unit_is_known(self):
        biases = {group.name: group.bias for group in find_components(make_model("grouped"))}
        assert biases == {"plain": "bias", "grouped": None, "depthwise": "bias", "pointwise": "bias"}

    def test_filters_of_transposed_convolutions_are_columns_of_their_groups(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 6, 3, groups=2)).eval()
        found = find_components(model)
        assert counts(found) == {"0": 2, "1": 6}
        check_components(model, found, torch.randn(2, 1, 5, 5))

    def test_a_model_that_is_one_layer_has_components_too(self):
        found = find_components(nn.Conv2d(1, 2, 3))
        assert found.names == ("[0]", "[1]")

    def test_a_subclass_is_recognised_by_its_base(self):
        model = nn.Sequential(MyLinear(2, 3), nn.Linear(3, 2))
        assert counts(find_components(model, kinds=["neuron"])) == {"0": 3}

    def test_the_projection_of_attention_is_ablated_although_its_hooks_never_fire(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
        found = find_components(layer, kinds=["neuron"], include=["self_attn.out_proj", "linear1", "linear2"])
        assert counts(found) == {"self_attn.out_proj": 4, "linear1": 8, "linear2": 4}
        check_components(layer, found, torch.randn(2, 3, 4))

    def test_torchvision_models_have_the_filters_of_their_papers(self, require):
        installed = importlib.util.find_spec("torchvision") is not None
        require("torchvision", installed, "torchvision is not installed")
        from torchvision.models import resnet18

        with torch.device("meta"):
            model = resnet18(weights=None)
        assert len(find_components(model)) == 4800
        assert find_components(model, kinds=["neuron"], include=["fc"]).names[-1] == "fc[999]"


class TestTheLastLinear:
    """Ablating its units removes classes, not parts of the computation."""

    model = make_model("mlp")

    def test_is_left_out(self):
        found = find_components(self.model, kinds=["neuron"])
        assert counts(found) == {"hidden1": 7, "hidden2": 6}
        assert found.left_out == ("head",)
        assert "left out unless included by name: head" in found.summary()

    @pytest.mark.parametrize("include", [["head"], ["h*d"], ["hidden1", "head"]])
    def test_is_found_if_named(self, include):
        found = find_components(self.model, kinds=["neuron"], include=include)
        assert counts(found)["head"] == 4
        assert found.left_out == ()

    def test_alone_is_said_to_be_left_out(self):
        with refused(ComponentError, "no component found", "left out", "include=['head']"):
            find_components(make_model("residual"), kinds=["neuron"])


class TestPatterns:
    model = make_model("residual")

    def test_include_and_exclude(self):
        assert counts(find_components(self.model, include=["conv1"])) == {"conv1": 5}
        assert counts(find_components(self.model, exclude=["conv1"])) == {"conv2": 5}
        assert counts(find_components(self.model, include=["conv?"], exclude=["*2"])) == {"conv1": 5}

    def test_what_was_asked_for_is_kept_for_the_spec(self):
        found = find_components(self.model, include=["conv?"], exclude=["*2"])
        assert found.selection == {"kinds": ["conv_filter"], "include": ["conv?"], "exclude": ["*2"]}
        assert find_components(self.model, **found.selection) == found

    def test_a_group_is_found_by_its_own_name_too(self):
        model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
        assert counts(find_components(model, kinds=["neuron"], include=["0.in_proj"])) == {"0.in_proj": 12}

    def test_an_include_pattern_that_matches_no_module_is_refused(self):
        with refused(ComponentError, "'layer9.*' finds no component", "no module of that name", "patterns"):
            find_components(self.model, include=["conv1", "layer9.*"])

    def test_an_include_pattern_that_matches_only_other_layers_says_which(self):
        with refused(ComponentError, "'bn*' finds no component", "Conv2d", "bn1 (BatchNorm2d)"):
            find_components(self.model, include=["conv1", "bn*"])

    def test_excluding_everything_leaves_nothing(self):
        with refused(ComponentError, "no component found", "conv_filter"):
            find_components(self.model, exclude=["*"])


class TestBadInput:
    def test_an_unknown_kind_is_refused_with_those_that_exist(self):
        with refused(
            ComponentError, "unknown component kind", "conv_filter, mlp_neuron", "'filter'", "component_rule"
        ):
            find_components(make_model("mlp"), kinds=["filter"])

    def test_a_string_of_kinds_is_not_a_list_of_letters(self):
        with refused(ComponentError, "kinds is a list", "['conv_filter']"):
            find_components(make_model("residual"), kinds="conv_filter")

    def test_no_kinds_find_nothing(self):
        with refused(ComponentError, "no component found"):
            find_components(make_model("residual"), kinds=[])

    def test_layers_that_no_rule_knows_are_named(self):
        with refused(ComponentError, "no component found", "Conv1d, Conv2d, Conv3d", "got:      Scale"):
            find_components(nn.Sequential(Scale(), nn.ReLU()))

    def test_a_shared_parameter_is_refused_with_both_owners(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        model[1].weight = model[0].weight
        words = ["0 shares its weight", "tied", "0.weight, 1.weight", "exclude=['0']"]
        with refused(ComponentError, *words):
            find_components(model, kinds=["neuron"])
        with pytest.raises(ComponentError):  # tied to a module that is no component is tied, too
            find_components(model, kinds=["neuron"], include=["1"])

    def test_a_module_used_twice_is_one_group(self):
        layer = nn.Linear(3, 3)
        model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(3, 2))
        assert counts(find_components(model, kinds=["neuron"])) == {"0": 3}

    def test_a_weight_that_is_computed_from_others_is_refused(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(1, 2, 3)))
        with refused(ComponentError, "no parameter 'weight' in module '0'", "remove weight norm"):
            find_components(model)


class TestRules:
    @pytest.fixture
    def scale_rule(self, monkeypatch):
        for kind in registry.RULES:
            monkeypatch.setitem(registry.RULES, kind, dict(registry.RULES[kind]))
        monkeypatch.setitem(registry.RULES, "factor", {})

        @component_rule("factor", f"{Scale.__module__}.{Scale.__qualname__}")
        def factors(name, module):
            return [ComponentGroup(name, "factor", name, "factors", 0, len(module.factors))]

    @pytest.mark.usefixtures("scale_rule")
    def test_ones_own_rule_makes_a_kind(self):
        model = nn.Sequential(Scale(), nn.Linear(3, 2)).eval()
        assert "factor" in kinds()
        found = find_components(model, kinds=["factor"])
        assert counts(found) == {"0": 3}
        check_components(model, found, torch.ones(2, 3), per_example=False)

    @pytest.mark.usefixtures("scale_rule")
    def test_the_rule_of_the_nearest_base_decides(self):
        class Sub(Scale):
            pass

        @component_rule("factor", f"{Sub.__module__}.{Sub.__qualname__}")
        def pairs(name, _):
            return [ComponentGroup(name, "factor", name, "factors", 0, 2, width=2)]

        found = find_components(nn.Sequential(Scale(4), Sub(4)), kinds=["factor"])
        assert counts(found) == {"0": 4, "1": 2}

    def test_the_kinds_of_the_package_are_these(self):
        assert kinds() == [
            *("attention_head", "attention_neuron", "block", "conv1d_input_row"),
            *("conv_filter", "mlp_neuron", "neuron"),
        ]

    @pytest.mark.parametrize("classes", [(), ("Scale",), (3,)])
    def test_a_rule_without_a_qualified_class_is_refused(self, classes):
        with refused(ComponentError, "a rule for 'factor'", "class"):
            component_rule("factor", *classes)

    @pytest.mark.usefixtures("scale_rule")
    @pytest.mark.parametrize(
        ("returned", "got"),
        [
            (None, "NoneType"),
            (ComponentGroup("0", "factor", "0", "factors", 0, 3), "ComponentGroup"),
            ([ComponentGroup("0", "scale", "0", "factors", 0, 3)], "scale"),
        ],
    )
    def test_a_rule_that_returns_something_else_is_named(self, returned, got):
        @component_rule("factor", Scale)
        def careless(*_):
            return returned

        with refused(ComponentError, "the rule for 'factor' in Scale", got, "careless"):
            find_components(nn.Sequential(Scale()), kinds=["factor"])


class TestHints:
    def test_other_kinds_that_find_something_are_listed_with_their_numbers(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with refused(ComponentError, "'attention_head' (2)", "'mlp_neuron' (16)", "'block' (2)"):
            find_components(layer, kinds=["conv_filter"])

    def test_a_container_named_without_its_insides(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Conv2d(2, 2, 3))
        with refused(ComponentError, "include pattern '0' finds no component", "include=['0.*']"):
            find_components(model, include=["0"])

    def test_what_is_no_model(self):
        with refused(ComponentError, "not a torch model", "nn.Module"):
            find_components({"weight": torch.ones(3)})


def test_sets_of_different_layers_are_joined():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    heads = find_components(layer, kinds=["attention_head"])
    joined = heads + find_components(layer, kinds=["block"], include=["linear2"])
    assert joined.names == ("self_attn[0]", "self_attn[1]", "linear1[0]")
    joined.require_separate(layer)
    check_components(layer, joined, torch.randn(2, 5, 8))
    with refused(ComponentError, "overlap"):
        (heads + find_components(layer, kinds=["attention_neuron"])).require_separate(layer)
