import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coar.components import ComponentGroup, ComponentSet
from coar.errors import ComponentError, SpecError
from coar.testing import check_components
from tests.cases import CASES, make_case, make_model
from tests.refused import refused


def group(name="conv", count=3, **options):
    options = {"kind": "conv_filter", "module": name, "parameter": "weight", "dimension": 0} | options
    return ComponentGroup(name, count=count, **options)


@st.composite
def component_sets(draw):
    names = draw(st.lists(st.text("ab.[]0", max_size=5), unique=True, min_size=1, max_size=5))
    counts = [draw(st.integers(1, 6)) for _ in names]
    return ComponentSet(group(name, count) for name, count in zip(names, counts, strict=True))


class TestIndicesAndNames:
    @given(component_sets())
    def test_a_name_leads_to_its_index_and_back(self, components):
        assert len(components.names) == len(components) == sum(g.count for g in components)
        if len(set(components.names)) == len(components):
            found = [components.index(name) for name in components.names]
            assert found == list(range(len(components)))

    @given(component_sets())
    def test_an_index_lies_where_the_slices_say(self, components):
        flat = 0
        for found, where in components.slices():
            assert where == slice(flat, flat + found.count)
            for number in range(found.count):
                assert components.locate(flat) == (found, number)
                assert components.names[flat] == f"{found.name}[{number}]"
                flat += 1
        assert flat == len(components)

    @given(component_sets())
    def test_json_and_back_is_the_same_set(self, components):
        again = ComponentSet.from_json(components.to_json(), "spec.json")
        assert again == components
        assert hash(again) == hash(components)
        assert again.names == components.names

    def test_an_unknown_name_is_refused_with_one_that_is_known(self):
        with refused(ComponentError, "no such component", "'conv[0]'", "'conv[3]'"):
            ComponentSet([group()]).index("conv[3]")

    @pytest.mark.parametrize("index", [-1, 3, 100])
    def test_an_index_out_of_range_is_refused(self, index):
        with refused(ComponentError, "out of range", "0 <= i < 3", str(index)):
            ComponentSet([group()]).locate(index)

    def test_two_groups_of_one_name_are_refused(self):
        with refused(ComponentError, "same name", "conv"):
            ComponentSet([group(), group()])


class TestKeepMask:
    components = ComponentSet([group("one", 2), group("two", 3)])

    def test_takes_indices_and_names(self):
        mask = self.components.keep_mask([0, "two[1]", np.int64(4)])
        assert mask.dtype == bool
        assert mask.tolist() == [False, True, True, False, False]

    def test_of_nothing_keeps_everything(self):
        assert self.components.keep_mask([]).all()

    @pytest.mark.parametrize("component", [5, -1, "two[3]"])
    def test_refuses_what_is_not_there(self, component):
        with refused(ComponentError, repr(component)):
            self.components.keep_mask([component])

    @pytest.mark.parametrize("mask", [[True, False, True, True, True], np.ones(5, dtype=bool)])
    def test_refuses_a_mask_in_place_of_indices(self, mask):
        with refused(ComponentError, "by index or name", "bool"):
            self.components.keep_mask(mask)


@pytest.mark.parametrize("name", CASES)
class TestPick:
    """An edit keeps some components as a set of its own."""

    def test_keeps_names_and_slices(self, name):
        case = make_case(name)
        chosen = [len(case.components) - 1, 0]
        picked = case.components.pick(chosen)
        picked.require_fits(case.task.model)
        assert [g.name for g in picked] == [case.components.names[i] for i in chosen]
        for index, found in zip(chosen, picked, strict=True):
            origin, number = case.components.locate(index)
            assert (found.count, found.offset) == (1, origin.offset + number * origin.width)

    def test_is_components_again(self, name):
        case = make_case(name)
        picked = case.components.pick([1, 2])
        batch = case.task.batch([0, 1, 2])
        inputs = batch["tokens"] if isinstance(batch, dict) else batch[0]
        check_components(case.task.model, picked, inputs)


class TestRequireFits:
    """Components of another model are refused before anything is ablated."""

    model = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.ReLU())

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (group("2"), ["module '2'", "no such module"]),
            (group("1"), ["no parameter 'weight'", "ReLU without it"]),
            (group("0", parameter="bias"), ["no parameter 'bias'", "Conv2d without it"]),
            (group("0", count=4), ["another shape", "at least 4 entries along dimension 0", "(3, 1, 2, 2)"]),
            (group("0", count=2, width=2), ["at least 4 entries"]),
            (group("0", count=3, offset=1), ["at least 4 entries"]),
            (group("0", dimension=4), ["along dimension 4"]),
            (group("0", dimension=-1, count=2), ["along dimension -1"]),
            (group("0", count=0), ["another shape"]),
            (group("0", count=2, width=0), ["another shape"]),
            (group("0", offset=-1), ["another shape"]),
        ],
    )
    def test_a_group_outside_the_model_is_named(self, bad, words):
        with refused(ComponentError, "components of another model", *words, "find_components"):
            ComponentSet([bad]).require_fits(self.model)

    def test_a_group_inside_passes(self):
        ComponentSet([group("0"), group("part", 1, module="0", offset=2)]).require_fits(self.model)

    def test_a_model_with_fewer_filters_is_another_model(self):
        components = make_case("grouped").components
        with refused(ComponentError, "components of another model"):
            components.require_fits(make_model("conv1d"))


class TestAxis:
    def test_names_groups_and_source(self):
        axis = ComponentSet([group("one", 2), group("two", 1)]).axis("m1", "bias=keep value=zero")
        assert axis.kind == "components"
        assert axis.names == ("one[0]", "one[1]", "two[0]")
        assert axis.fields["group"].tolist() == ["one", "one", "two"]
        assert next(iter(axis.source)) == "model"  # the first thing that an error compares

    @pytest.mark.parametrize("change", [{"dimension": 1}, {"offset": 1}, {"width": 2}, {"module": "x"}])
    def test_equal_names_of_other_slices_are_another_axis(self, change):
        ours = ComponentSet([group()]).axis("m1", "bias=keep value=zero")
        theirs = ComponentSet([group(**change)]).axis("m1", "bias=keep value=zero")
        assert ours.names == theirs.names
        assert ours != theirs


@pytest.mark.parametrize("value", [None, 3, [3], [{"name": "a"}], [group().__dict__ | {"colour": 1}]])
def test_damaged_groups_name_their_file(value):
    with refused(SpecError, "edits/fix.json", "groups are damaged"):
        ComponentSet.from_json(value, "edits/fix.json")


def test_the_summary_has_a_line_per_group_and_a_total():
    components = ComponentSet([group("conv1", 1200), group("", 3, kind="neuron")], left_out=["head"])
    assert components.summary().splitlines() == [
        "group     kind         components",
        "---------------------------------",
        "conv1     conv_filter       1,200",
        "(model)   neuron                3",
        "---------------------------------",
        "2 groups                    1,203",
        "left out unless included by name: head",
    ]
