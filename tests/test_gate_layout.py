"""Layout: whatever was asked for in whatever steps, each pass of each example is in one item, for ever."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coar.errors import SettingError
from coar.gradients.layout import MOST_ITEMS, REPLICATES, Layout, Step, require_few_items


@st.composite
def steps(draw, most=3):
    """Steps that a study may take: some examples first, then more rounds, more examples, or both."""
    order = draw(st.permutations(range(9)))
    found, used, rounds = [], 0, 0
    for number in range(draw(st.integers(1, most))):
        new = draw(st.integers(0 if number else 1, min(4, len(order) - used)))
        rounds += draw(st.integers(0 if number and new else 1, 9))
        found.append(Step(tuple(sorted(order[used : used + new])), rounds))
        used += new
    return found


sizes = st.tuples(st.integers(1, 5), st.integers(1, 10))


def passes(items):
    """(example, replicate, round) of everything in some items, with multiplicity."""
    return Counter(
        (example, item.replicate, round_)
        for item in items
        for example in item.examples
        for round_ in range(item.start, item.stop)
    )


@given(steps(), sizes)
def test_items_are_all_passes_once(asked, cut):
    layout = Layout(asked, *cut)
    examples = {example for step in asked for example in step.new}
    everything = {(e, r, k) for e in examples for r in range(REPLICATES) for k in range(asked[-1].rounds)}
    assert passes(layout.items()) == Counter(everything)
    assert [item.index for item in layout.items()] == list(range(len(layout.items())))
    assert sorted(layout.examples) == sorted(examples)
    assert sum(map(len, layout.items())) == len(everything)


@given(steps(), sizes)
def test_items_are_no_larger_than_asked_and_lie_within_a_block(asked, cut):
    layout = Layout(asked, *cut)
    for item in layout.items():
        assert 0 < item.stop - item.start <= cut[1]
        assert len(item.examples) <= cut[0]
        assert item.examples == layout.blocks[item.block]
        # a border at every power of two, to look at figures
        assert (item.start, item.stop) == (0, 1) or item.stop <= 2 ** item.start.bit_length()


@given(steps(most=4), sizes)
def test_a_step_more_changes_nothing_that_was_there(asked, cut):
    assume(len(asked) > 1)
    before, after = Layout(asked[:-1], *cut), Layout(asked, *cut)
    old = before.items()
    assert after.items()[: len(old)] == old
    assert after.blocks[: len(before.blocks)] == before.blocks
    before.add(asked[-1])
    assert before.items() == after.items()


@given(steps(), sizes, st.data())
def test_complete_rounds_are_those_that_every_example_has_had_in_every_replicate(asked, cut, data):
    layout = Layout(asked, *cut)
    items = layout.items()
    done = set(range(len(items))) - data.draw(st.sets(st.sampled_from(range(len(items))), max_size=3))
    there = set(passes(item for item in items if item.index in done))

    def complete(rounds):
        wanted = itertools.product(layout.examples, range(REPLICATES), range(rounds))
        split = any(item.start < rounds < item.stop for item in items)
        return there.issuperset(wanted) and not split

    assert layout.complete_rounds(done) == max(filter(complete, range(layout.rounds + 1)))


@given(steps(), sizes)
def test_by_block_gives_the_items_of_each_block_within_the_rounds(asked, cut):
    layout = Layout(asked, *cut)
    for rounds in range(layout.rounds + 1):
        for block, items in enumerate(layout.by_block(rounds)):
            wanted = [i for i in layout.items() if i.block == block and i.stop <= rounds]
            assert items == wanted
            if rounds:
                assert {item.replicate for item in items} == set(range(REPLICATES))


def test_blocks_that_came_later_are_not_counted_with_fewer_rounds_than_the_others():
    """Old examples are cut at 3, new ones at 4: while 3 to 4 of the old is missing, all have 2."""
    layout = Layout([Step((0,), 3), Step((1,), 8)], 4, 99)
    done = {item.index for item in layout.items() if item.start != 3}
    rounds = layout.complete_rounds(done)
    assert {items[-1].stop for items in layout.by_block(rounds)} == {rounds} == {2}


def test_rounds_are_cut_at_powers_of_two_and_where_steps_end():
    layout = Layout([Step((0,), 3)], block_examples=4, item_rounds=3)
    layout.add(Step((), 12))
    mine = [(item.start, item.stop) for item in layout.items() if item.replicate == 0]
    assert mine == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)]


def test_an_item_says_what_it_is():
    (item, *_) = Layout([Step((4, 7), 1)], 8, 8).items()
    assert str(item) == "examples 4 to 7, rounds 0 to 1"
    assert len(item) == 2


@pytest.mark.parametrize("new", [(), (5,)])
def test_examples_are_in_the_order_of_blocks(new):
    layout = Layout([Step((2, 3), 1), Step(new, 2)], 1, 8)
    np.testing.assert_array_equal(layout.examples, [2, 3, *new])


@given(st.integers(1, 60), sizes)
def test_the_bound_on_items_is_one(rounds, cut):
    """Against the items of one block, counted: no more than the bound pass, and half of it does."""
    each = len(Layout([Step((0,), rounds)], *cut).items())
    require_few_items(MOST_ITEMS // (2 * each) * cut[0], rounds, *cut)
    with pytest.raises(SettingError, match="too many files"):
        require_few_items((MOST_ITEMS // each + 1) * cut[0], rounds, *cut)
