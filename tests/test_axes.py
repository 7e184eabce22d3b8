import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.axes import Axis
from coar.errors import AxisError, StoreError
from tests.refused import refused


def components(names=("a", "b", "c"), model="model one", ablation="bias=keep"):
    source = {"model": model, "ablation": ablation}
    return Axis("components", names, source, {"group": [name.upper() for name in names]})


names_lists = st.lists(st.text(max_size=8), unique=True, max_size=8)


class TestEquality:
    def test_equal_parts_make_equal_axes(self):
        assert components() == components()
        assert hash(components()) == hash(components())

    @pytest.mark.parametrize(
        "other",
        [
            components(["a", "b"]),
            components(["b", "a", "c"]),
            components(model="model two"),
            components(ablation="bias=ablate"),
            Axis("columns", ["a", "b", "c"], components().source),
            ("a", "b", "c"),
        ],
    )
    def test_kind_source_names_and_order_all_count(self, other):
        assert components() != other

    @given(names_lists, names_lists)
    def test_fingerprints_tell_names_apart(self, ours, theirs):
        first, second = (Axis("columns", names, {"data": "d"}) for names in (ours, theirs))
        assert (first.fingerprint == second.fingerprint) == (ours == theirs)


@given(names_lists)
def test_json_and_back_is_the_same_axis(names):
    axis = Axis("columns", names, {"data": "d"}, {"example": np.arange(len(names))})
    again = Axis.from_json(axis.to_json(), "index.json")
    assert again == axis
    assert again.fields["example"].tolist() == list(range(len(names)))


@given(names_lists, st.data())
def test_a_subset_is_located_where_it_was_taken(names, data):
    axis = Axis("columns", names, {"data": "d"})
    chosen = data.draw(st.lists(st.integers(0, len(names) - 1), unique=True) if names else st.just([]))
    part = axis.subset(chosen)
    assert part.names == tuple(names[i] for i in chosen)
    assert part.locate(axis, "attributions", "experiment").tolist() == chosen


def test_a_subset_takes_its_fields_along():
    assert components().subset([2, 0]).fields["group"].tolist() == ["C", "A"]


def test_a_mask_is_not_a_list_of_positions():
    with refused(AxisError, "positions", "bool", "flatnonzero"):
        components().subset(np.array([True, False, True]))


def test_positions_of_names():
    assert components().positions == {"a": 0, "b": 1, "c": 2}
    assert len(components()) == 3


class TestRequireSame:
    def test_equal_axes_pass(self):
        components().require_same(components(), "attributions", "experiment")

    def test_another_model_is_said_to_be_another_model(self):
        words = ["model differs", "model model two (experiment)", "model model one (attributions)"]
        with refused(AxisError, *words, "made with this very model"):
            components().require_same(components(model="model two"), "attributions", "experiment")

    def test_another_convention_is_said_to_be_one(self):
        with refused(AxisError, "ablation differs", "bias=ablate", "bias=keep"):
            components().require_same(components(ablation="bias=ablate"), "attributions", "experiment")

    def test_other_names_are_shown_where_they_part(self):
        words = ["position 1: 'x'", "position 1: 'b'", "3 components (study)", "for this study"]
        with refused(AxisError, *words):
            components().require_same(components(["a", "x", "c"]), "attributions", "study")

    def test_a_shorter_axis_ends_where_the_other_goes_on(self):
        with refused(AxisError, "expected: 2 components", "position 2: nothing", "position 2: 'c'"):
            components().require_same(components(["a", "b"]), "attributions", "study")

    def test_another_kind_is_refused(self):
        with pytest.raises(AxisError):
            components().require_same(Axis("columns", ["a", "b", "c"], components().source), "one", "two")


class TestLocate:
    def test_a_name_that_is_not_there_is_shown(self):
        with refused(AxisError, "1 components of the edit are not in the study", "such as 'a'", "'z'"):
            components(["b", "z"]).locate(components(), "edit", "study")

    def test_another_source_is_refused_even_if_names_agree(self):
        with refused(AxisError, "model differs", "(study)", "(edit)"):
            components(["b"], model="model two").locate(components(), "edit", "study")

    def test_nothing_is_found_in_nothing(self):
        with refused(AxisError, "not in the study", "'a'"):
            components(["a"]).locate(components([]), "edit", "study")


def test_a_repeated_name_is_refused():
    with refused(AxisError, "names of columns must be unique", "'7' more than once"):
        Axis("columns", ["3", "7", "7"], {"data": "d"})


@pytest.mark.parametrize("values", [[1, 2], [[1], [2], [3]]])
def test_a_field_of_another_length_is_refused(values):
    with refused(AxisError, "field 'example' of columns", "(3,)", str(np.shape(values))):
        Axis("columns", ["a", "b", "c"], {"data": "d"}, {"example": values})


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "columns"},
        components().to_json() | {"names": None},
        components().to_json() | {"names": ["a", "a", "a"]},
        components().to_json() | {"fields": {"x": [1]}},
    ],
)
def test_a_damaged_axis_names_its_file(value):
    with refused(StoreError, "attributions/index.json", "an axis is damaged"):
        Axis.from_json(value, "attributions/index.json")
