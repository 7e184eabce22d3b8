import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar import randomness
from coar.errors import SettingError
from coar.randomness import check_seed, half_words, integers, permutation, uniform, words
from tests.refused import refused

seeds = st.integers(0, 2**63 - 1)
streams = st.text(min_size=1, max_size=20)
indices = st.integers(0, 2**63)


class TestGoldenValues:
    """Typed in, not computed: stored studies rest on them, on every machine and NumPy version."""

    def test_words(self):
        assert words(0, "fit", 0, 2).tolist() == [16382452237685020495, 13240956030083083045]
        assert words(12345, "evaluation", 2**40, 3).tolist() == [
            16126419419560915924,
            5995410993888637431,
            1337313150193481781,
        ]

    def test_half_words_are_the_halves_low_one_first(self):
        low, high = 16382452237685020495 % 2**32, 16382452237685020495 >> 32
        assert half_words(0, "fit", 0, 3).tolist() == [low, high, 13240956030083083045 % 2**32]

    def test_uniform_numbers_are_the_upper_53_bits(self):
        expected = [(16382452237685020495 >> 11) / 2**53, (13240956030083083045 >> 11) / 2**53]
        assert uniform(0, "fit", 0, 2).tolist() == expected

    def test_permutation_sorts_the_words(self):
        # 16126..., 5995..., 1337...: largest, middle, smallest
        assert permutation(12345, "evaluation", 2**40, 3).tolist() == [2, 1, 0]


class TestAddresses:
    @given(seeds, streams, indices, st.integers(0, 40), st.integers(0, 40))
    def test_a_longer_draw_begins_with_the_shorter_one(self, seed, stream, index, short, more):
        longer = words(seed, stream, index, short + more)
        assert longer[:short].tolist() == words(seed, stream, index, short).tolist()

    @given(seeds, streams, indices, st.integers(0, 2**63))
    def test_another_index_is_another_draw(self, seed, stream, index, other):
        same = words(seed, stream, index, 2).tolist() == words(seed, stream, other, 2).tolist()
        assert same == (index == other)

    @given(seeds, streams, streams)
    def test_another_stream_is_another_draw(self, seed, stream, other):
        same = words(seed, stream, 0, 2).tolist() == words(seed, other, 0, 2).tolist()
        assert same == (stream == other)

    @given(seeds, seeds)
    def test_another_seed_is_another_draw(self, seed, other):
        same = words(seed, "fit", 0, 2).tolist() == words(other, "fit", 0, 2).tolist()
        assert same == (seed == other)

    def test_long_draws_of_neighbouring_indices_do_not_overlap(self):
        drawn = np.concatenate([words(0, "fit", index, 5000) for index in range(4)])
        assert len(np.unique(drawn)) == len(drawn)

    def test_numpys_own_generators_are_not_touched(self):
        before = np.random.get_state()[1].tolist()
        uniform(0, "fit", 0, 1000)
        assert np.random.get_state()[1].tolist() == before


class TestStatistics:
    """Bounds are 5 standard deviations of what is bounded."""

    COUNT = 200_000

    def test_every_bit_is_one_half_of_the_time(self):
        bits = np.unpackbits(words(1, "bits", 0, self.COUNT).view(np.uint8).reshape(-1, 8), axis=1)
        np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=5 * 0.5 / self.COUNT**0.5)

    def test_uniform_numbers_have_mean_one_half_and_variance_one_twelfth(self):
        drawn = uniform(1, "uniform", 0, self.COUNT)
        assert 0 <= drawn.min() < drawn.max() < 1
        assert drawn.mean() == pytest.approx(1 / 2, abs=5 * (1 / 12 / self.COUNT) ** 0.5)
        assert drawn.var() == pytest.approx(1 / 12, abs=5 * (1 / 180 / self.COUNT) ** 0.5)

    def test_neighbours_within_a_draw_and_across_indices_are_uncorrelated(self):
        across = np.stack([uniform(1, "rows", index, 500) for index in range(400)])
        bound = 5 / across.size**0.5
        assert abs(np.corrcoef(across[:, :-1].ravel(), across[:, 1:].ravel())[0, 1]) < bound
        assert abs(np.corrcoef(across[:-1].ravel(), across[1:].ravel())[0, 1]) < bound

    def test_integers_are_equally_likely(self):
        counts = np.bincount(integers(1, "dice", 0, self.COUNT, below=6))
        assert len(counts) == 6
        np.testing.assert_allclose(counts, self.COUNT / 6, atol=5 * (self.COUNT * 5 / 36) ** 0.5)

    def test_all_orders_are_equally_likely(self):
        orders = [tuple(permutation(1, "orders", index, 3).tolist()) for index in range(3000)]
        counts = [orders.count(order) for order in itertools.permutations(range(3))]
        np.testing.assert_allclose(counts, 500, atol=5 * (3000 * 5 / 36) ** 0.5)


@given(seeds, indices, st.integers(0, 50))
def test_a_permutation_has_each_number_once(seed, index, count):
    assert sorted(permutation(seed, "split", index, count).tolist()) == list(range(count))


@given(seeds, st.integers(1, 2**31))
def test_integers_stay_below_the_limit(seed, below):
    drawn = integers(seed, "numbers", 0, 20, below)
    assert drawn.min() >= 0
    assert drawn.max() < below


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "0", None])
def test_a_seed_that_is_not_a_whole_number_in_range_is_refused(seed):
    with refused(SettingError, "0 <= seed < 2**63", repr(seed)):
        check_seed(seed)
    with refused(SettingError, "0 <= seed < 2**63"):
        words(seed, "fit", 0, 1)


def test_seeds_of_numpy_are_taken():
    assert check_seed(np.int64(5)) == 5
    assert type(check_seed(np.int64(5))) is int
    assert check_seed(randomness.SEED_LIMIT - 1) == 2**63 - 1
