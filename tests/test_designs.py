import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.designs import Bernoulli, FixedSize, LeaveOneOut
from coar.errors import SettingError
from tests.refused import refused

fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**63 - 1)
rows_lists = st.lists(st.integers(0, 2**40), min_size=1, max_size=8)
counts = st.integers(2, 80)


@pytest.mark.parametrize("kind", [Bernoulli, FixedSize])
class TestAddressing:
    @given(fractions, seeds, rows_lists, counts)
    def test_a_row_is_the_same_alone_and_among_others(self, kind, fraction, seed, rows, count):
        design = kind(ablation_fraction=fraction, seed=seed)
        together = design.masks(rows, count)
        assert together.dtype == bool
        assert together.shape == (len(rows), count)
        for row, mask in zip(rows, together, strict=True):
            assert np.array_equal(design.masks([row], count)[0], mask)
            assert np.array_equal(design.masks(np.array([row + 1, row]), count)[1], mask)

    def test_seed_stream_and_row_each_give_other_masks(self, kind):
        base = kind(ablation_fraction=0.5, seed=1)
        masks = [
            base.masks([0], 100)[0],
            base.masks([1], 100)[0],
            kind(ablation_fraction=0.5, seed=2).masks([0], 100)[0],
            kind(ablation_fraction=0.5, seed=1, stream="evaluation").masks([0], 100)[0],
        ]
        assert len({mask.tobytes() for mask in masks}) == 4

    def test_rows_far_out_are_reached_at_once(self, kind):
        assert kind(ablation_fraction=0.5).masks([2**40], 10).shape == (1, 10)

    def test_no_rows_are_no_masks(self, kind):
        assert kind(ablation_fraction=0.5).masks([], 10).shape == (0, 10)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"ablation_fraction": 0}, ["ablation_fraction", "greater than 0"]),
            ({"ablation_fraction": 1.0}, ["ablation_fraction", "less than 1"]),
            ({"ablation_fraction": float("nan")}, ["ablation_fraction", "nan"]),
            ({"ablation_fraction": "0.1"}, ["ablation_fraction", "'0.1'"]),
            ({}, ["a key 'ablation_fraction'", "nothing"]),
            ({"ablation_fraction": 0.1, "seed": -1}, ["seed", "-1"]),
            ({"ablation_fraction": 0.1, "seed": 2**63}, ["seed", str(2**63)]),
            ({"ablation_fraction": 0.1, "stream": ""}, ["stream"]),
            ({"ablation_fraction": 0.1, "subsample_prob": 0.9}, ["no key 'subsample_prob'"]),
        ],
    )
    def test_settings_out_of_range_are_refused_by_name(self, kind, options, words):
        with refused(SettingError, kind.__name__, *words):
            kind(**options)


class TestBernoulli:
    @given(fractions, seeds)
    def test_the_share_ablated_is_within_binomial_bounds(self, fraction, seed):
        masks = Bernoulli(ablation_fraction=fraction, seed=seed).masks(range(40), 500)
        deviation = (fraction * (1 - fraction) / masks.size) ** 0.5
        assert abs((~masks).mean() - fraction) < 5 * deviation

    def test_components_and_rows_are_independent(self):
        ablated = ~Bernoulli(ablation_fraction=0.3, seed=3).masks(range(4000), 20)
        correlation = np.corrcoef(ablated.T) - np.eye(20)
        assert np.abs(correlation).max() < 5 / 4000**0.5
        assert abs(np.corrcoef(ablated[:-1].ravel(), ablated[1:].ravel())[0, 1]) < 5 / ablated.size**0.5

    @given(st.floats(0.01, 0.5), st.floats(0.5, 0.99), seeds)
    def test_a_larger_fraction_ablates_the_same_components_and_more(self, small, large, seed):
        few = ~Bernoulli(ablation_fraction=small, seed=seed).masks([3], 200)
        many = ~Bernoulli(ablation_fraction=large, seed=seed).masks([3], 200)
        assert not (few & ~many).any()

    def test_takes_any_number_of_rows(self):
        assert Bernoulli(ablation_fraction=0.1).check(3, 10**9) is None


class TestFixedSize:
    @given(fractions, seeds, counts)
    def test_every_row_ablates_exactly_the_rounded_number(self, fraction, seed, count):
        masks = FixedSize(ablation_fraction=fraction, seed=seed).masks(range(5), count)
        assert (~masks).sum(axis=1).tolist() == [round(fraction * count)] * 5

    def test_all_sets_are_equally_likely(self):
        masks = FixedSize(ablation_fraction=0.5, seed=0).masks(range(3000), 4)
        _, found = np.unique(masks, axis=0, return_counts=True)
        assert len(found) == 6  # two out of four
        np.testing.assert_allclose(found, 500, atol=5 * (3000 * 5 / 36) ** 0.5)

    @pytest.mark.parametrize(("fraction", "count"), [(0.01, 10), (0.99, 10), (0.3, 1)])
    def test_a_size_of_none_or_all_is_refused(self, fraction, count):
        with refused(SettingError, "ablate some components and keep some", f"1..{count - 1}", str(fraction)):
            FixedSize(ablation_fraction=fraction).check(count, 5)

    def test_a_size_between_is_not(self):
        assert FixedSize(ablation_fraction=0.1).check(10, 10**9) is None


class TestLeaveOneOut:
    @given(counts, st.data())
    def test_row_i_ablates_component_i_alone(self, count, data):
        rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
        masks = LeaveOneOut().masks(rows, count)
        assert [np.flatnonzero(~mask).tolist() for mask in masks] == [[row] for row in rows]

    def test_has_one_row_per_component(self):
        assert LeaveOneOut().check(5, 5) is None
        with refused(SettingError, "one row per component", "at most 5 rows", "got:      6"):
            LeaveOneOut().check(5, 6)


@pytest.mark.parametrize(
    "design", [Bernoulli(ablation_fraction=0.1), FixedSize(ablation_fraction=0.1), LeaveOneOut()]
)
def test_a_design_reads_its_own_json(design):
    assert type(design).model_validate_json(design.model_dump_json()) == design
