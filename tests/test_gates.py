import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

from coar.components import ComponentGroup, ComponentSet
from coar.errors import ComponentError, SettingError
from coar.fingerprints import model_fingerprint
from coar.gates import ScaledWeights, ablated_copy, check_convention
from coar.randomness import uniform
from tests import naive
from tests.cases import CASES, OUTPUT_UNITS, make_case
from tests.refused import refused

CONVENTIONS = [("keep", "zero"), ("ablate", "zero"), ("keep", 0.7), ("ablate", -1.5), ("keep", 0.0)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def inputs_of(case, dtype=torch.float32):
    batch = case.task.batch(range(len(case.task)))
    return (batch["tokens"] if isinstance(batch, dict) else batch[0]).to(dtype)


def conventions_of(name):
    """Components that are not output units of a layer have no constant to be replaced by."""
    return [c for c in CONVENTIONS if name != "slices" or c[1] == "zero"]


CASES_AND_CONVENTIONS = [(name, *convention) for name in CASES for convention in conventions_of(name)]


@pytest.mark.parametrize(("name", "bias", "value"), CASES_AND_CONVENTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
class TestAgainstALiteralRebuild:
    def test_random_masks(self, name, bias, value, dtype):
        case = make_case(name)
        model = case.task.model.to(dtype)
        gates = ScaledWeights(copy.deepcopy(model), case.components, bias, value)
        for row in range(6):
            keep = uniform(0, "masks", row, len(case.components)) >= 0.4
            gates.set(keep)
            rebuilt = naive.ablated(model, case.components, keep, bias, value)
            self.require_equal(gates.model, rebuilt, inputs_of(case, dtype))

    def test_every_component_ablated(self, name, bias, value, dtype):
        case = make_case(name)
        model = case.task.model.to(dtype)
        nothing = np.zeros(len(case.components), dtype=bool)
        rebuilt = naive.ablated(model, case.components, nothing, bias, value)
        self.require_equal(
            ablated_copy(model, case.components, nothing, bias, value), rebuilt, inputs_of(case, dtype)
        )

    @staticmethod
    def require_equal(ours, theirs, inputs):
        with torch.no_grad():
            tolerance = TOLERANCE[inputs.dtype]
            torch.testing.assert_close(ours(inputs), theirs(inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("bias", "value"), CONVENTIONS)
@pytest.mark.parametrize("name", OUTPUT_UNITS)
@given(st.integers(0, 1000))
def test_fractional_gates_are_gates_on_activations_as_defined(name, bias, value, seed):
    case = make_case(name)
    model, inputs = case.task.model.double(), inputs_of(case, torch.float64)
    gates = uniform(seed, "gates", 0, len(case.components))
    scaled = ScaledWeights(copy.deepcopy(model), case.components, bias, value)
    scaled.set(gates)
    with torch.no_grad():
        expected = naive.gated(model, case.components, gates, bias, value)(inputs)
        torch.testing.assert_close(scaled.model(inputs), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "bias", "value"), CASES_AND_CONVENTIONS)
class TestBitForBit:
    def test_gates_of_one_are_the_untouched_model_before_and_after(self, name, bias, value):
        case = make_case(name)
        inputs = inputs_of(case)
        gates = ScaledWeights(copy.deepcopy(case.task.model), case.components, bias, value)
        everything = np.ones(len(case.components))
        with torch.no_grad():
            untouched = case.task.model(inputs)
            for between in (everything, 0 * everything, uniform(0, "gates", 0, len(everything))):
                gates.set(between)
                gates.set(everything)
                assert torch.equal(gates.model(inputs), untouched)

    def test_a_mask_is_the_same_whatever_came_before_it(self, name, bias, value):
        case = make_case(name)
        mask = uniform(0, "masks", 0, len(case.components)) >= 0.4
        states = []
        for before in ([], [np.zeros(len(mask))], [uniform(0, "gates", 0, len(mask)), ~mask]):
            gates = ScaledWeights(copy.deepcopy(case.task.model), case.components, bias, value)
            for other in before:
                gates.set(other)
            gates.set(mask)
            states.append(model_fingerprint(gates.model))
        assert len(set(states)) == 1

    def test_a_mask_changed_in_place_is_another_mask(self, name, bias, value):
        case = make_case(name)
        gates = ScaledWeights(copy.deepcopy(case.task.model), case.components, bias, value)
        mask = np.ones(len(case.components))
        gates.set(mask)
        mask[0] = 0
        gates.set(mask)
        expected = ablated_copy(case.task.model, case.components, mask, bias, value)
        assert model_fingerprint(gates.model) == model_fingerprint(expected)

    def test_the_original_is_left_alone(self, name, bias, value):
        case = make_case(name)
        before = model_fingerprint(case.task.model)
        edited = ablated_copy(
            case.task.model, case.components, np.zeros(len(case.components), dtype=bool), bias, value
        )
        assert model_fingerprint(case.task.model) == before != model_fingerprint(edited)
        assert all(parameter.requires_grad for parameter in case.task.model.parameters())


class TestByHand:
    """One Linear unit, 2 x + 3, gated by one half."""

    @pytest.mark.parametrize(
        ("bias", "value", "expected"),
        [
            ("keep", "zero", 0.5 * 2 + 3),
            ("ablate", "zero", 0.5 * (2 + 3)),
            ("keep", 7.0, 0.5 * (2 + 3) + 0.5 * 7),
            ("ablate", 7.0, 0.5 * (2 + 3) + 0.5 * 7),
        ],
    )
    def test_conventions(self, bias, value, expected):
        unit = torch.nn.Linear(1, 1)
        unit.weight.data.fill_(2.0)
        unit.bias.data.fill_(3.0)
        gates = ScaledWeights(unit, one_unit(), bias, value)
        gates.set(np.array([0.5]))
        assert unit(torch.ones(1, 1)).item() == expected


def one_unit():
    from coar.components import ComponentGroup, ComponentSet

    return ComponentSet([ComponentGroup("unit", "neuron", "", "weight", 0, 1, bias="bias")])


class TestAblatedCopy:
    def test_keeps_what_can_be_trained(self):
        case = make_case("residual")
        case.task.model.conv1.weight.requires_grad_(False)
        edited = ablated_copy(case.task.model, case.components, np.zeros(len(case.components), dtype=bool))
        ours = {name: p.requires_grad for name, p in case.task.model.named_parameters()}
        assert {name: p.requires_grad for name, p in edited.named_parameters()} == ours

    def test_a_bias_added_for_a_constant_is_not_trained(self):
        case = make_case("conv1d")
        keep = case.components.keep_mask(["conv2[0]"])
        edited = ablated_copy(case.task.model, case.components, keep, value=2.0)
        assert case.task.model.conv2.bias is None
        assert edited.conv2.bias.tolist() == [2.0, 0.0, 0.0, 0.0]
        assert not edited.conv2.bias.requires_grad

    @given(npst.arrays(bool, len(make_case("mlp").components)))
    def test_of_a_picked_set_equals_that_of_the_whole(self, keep):
        case = make_case("mlp")
        whole = ablated_copy(case.task.model, case.components, keep, value=0.5)
        picked = case.components.pick(np.flatnonzero(~keep))
        part = ablated_copy(case.task.model, picked, np.zeros(len(picked), dtype=bool), value=0.5)
        assert model_fingerprint(part) == model_fingerprint(whole)


class TestBadInput:
    @pytest.mark.parametrize("bias", ["drop", None, True])
    def test_an_unknown_bias_convention(self, bias):
        with refused(SettingError, "bias convention", "'keep' or 'ablate'", repr(bias)):
            check_convention(bias, "zero")

    @pytest.mark.parametrize("value", ["median", None, True, float("nan"), float("inf")])
    def test_an_unknown_value(self, value):
        with refused(SettingError, "ablation value", "'zero', 'mean' or a finite number", repr(value)):
            check_convention("keep", value)

    def test_a_constant_for_what_a_convolution_reads(self):
        """At the padding, a constant would be no constant."""
        model = nn.Conv2d(4, 2, 3, padding=1)
        group = ComponentGroup("images", "channel", "", "weight", dimension=1, count=4, side="input")
        words = ["cannot be replaced by a constant", "channel in Conv2d", 'value="zero"']
        with refused(ComponentError, *words):
            ScaledWeights(model, ComponentSet([group]), value=1.0)

    def test_components_of_another_model(self):
        with refused(ComponentError, "components of another model"):
            ScaledWeights(make_case("mlp").task.model, make_case("conv1d").components)

    @pytest.mark.parametrize("count", [1, 3, 20])
    def test_a_mask_of_another_length(self, count):
        case = make_case("mlp")
        gates = ScaledWeights(copy.deepcopy(case.task.model), case.components)
        with refused(ComponentError, "one gate per component", "(13,)", f"({count},)"):
            gates.set(np.zeros(count))
        assert model_fingerprint(gates.model) == case.task.model_fingerprint()
