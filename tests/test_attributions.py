"""Attributions: what they compute, and that the disk changes nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar import attribution_blocks as module
from coar.attribution_blocks import Block, write_blocks
from coar.attributions import Attributions
from coar.axes import Axis
from coar.errors import AxisError, OutputError, StoreError
from coar.files import digest_json
from tests.refused import refused

COMPONENTS = Axis("components", ["a[0]", "a[1]", "b[0]"], {"model": "m"}, {"group": ["a", "a", "b"]})
COLUMNS = Axis("columns", ["x", "y", "z"], {"data": "d"})
WEIGHTS = np.array([[1.0, -2.0, 0.5], [2.0, -4.0, 1.0], [0.0, 0.0, -3.0]])
INTERCEPT = np.array([10.0, 20.0, 30.0])


@pytest.fixture
def toy():
    return Attributions(
        WEIGHTS,
        INTERCEPT,
        COMPONENTS,
        COLUMNS,
        "margin",
        errors=np.array([[0.1, 0.2, np.inf]] * 3),
        details={"penalty": np.array([1.0, 2.0, 3.0])},
        provenance={"method": "ridge"},
    )


@pytest.fixture
def folder(toy, tmp_path, monkeypatch):
    """The toy on disk, one column per block."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    return toy.save(tmp_path / "toy")


# ------------------------------------------------------------------------------- what they compute


def test_prediction_is_weights_times_mask_plus_intercept(toy):
    predicted = toy.predict(np.array([[True, True, True], [False, True, False]]))
    assert predicted.tolist() == [[9.5, 19.0, 27.0], [8.0, 16.0, 30.0]]


def test_one_mask_is_one_row(toy):
    assert toy.predict(np.array([True, False, False])).tolist() == [[11.0, 22.0, 30.0]]


def test_masks_of_another_length_are_refused(toy):
    with refused(AxisError, "masks of another length", "[rows, 3]", "(2, 4)"):
        toy.predict(np.ones((2, 4), dtype=bool))


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("magnitude", ["a[1]", "a[0]", "b[0]"]),
        ("positive", ["a[0]", "b[0]", "a[1]"]),
        ("negative", ["a[1]", "b[0]", "a[0]"]),
    ],
)
def test_top_orders_by(toy, by, names):
    assert toy.top("x", by=by).component.tolist() == names


def test_top_takes_so_many_and_keeps_the_order_of_ties(toy):
    assert toy.top("z", count=2).component.tolist() == ["b[0]", "a[0]"]


def test_top_refuses_an_unknown_order(toy):
    with refused(AxisError, "unknown order", "magnitude, positive, negative", "'size'"):
        toy.top("x", by="size")


def test_groups_are_summed(toy):
    table = toy.by_group()
    assert table.columns.tolist() == ["a", "b"]
    assert table.index.tolist() == ["x", "y", "z"]
    assert table.to_numpy().tolist() == [[-1.0, 0.5], [-2.0, 1.0], [0.0, -3.0]]


def test_nearest_is_by_direction_not_by_length(toy):
    found = toy.nearest("x")
    assert found.column.tolist() == ["y", "z"]
    assert found.similarity.to_numpy() == pytest.approx([1.0, -0.5 / np.sqrt(5.25)])


def test_a_column_without_effects_is_near_to_nothing():
    zero = Attributions(WEIGHTS * [[1], [1], [0]], INTERCEPT, COMPONENTS, COLUMNS, "margin")
    assert zero.nearest("z").similarity.tolist() == [0.0, 0.0]


def test_a_column_as_a_table(toy):
    table = toy.to_dataframe(1)
    assert table.columns.tolist() == ["component", "group", "weight", "error"]
    assert table.component.tolist() == list(COMPONENTS.names)
    assert table.group.tolist() == ["a", "a", "b"]
    assert table.weight.tolist() == [2.0, -4.0, 1.0]
    assert table.error.to_numpy() == pytest.approx([0.1, 0.2, np.inf])


def test_no_errors_no_column_of_errors():
    bare = Attributions(WEIGHTS, INTERCEPT, COMPONENTS, COLUMNS, "margin")
    assert bare.errors is None
    assert "error" not in bare.to_dataframe(0)


def test_components_without_groups_are_one_group():
    components = Axis("components", ["p", "q", "r"], {})
    bare = Attributions(WEIGHTS, INTERCEPT, components, COLUMNS, "mean")
    assert bare.by_group()["all"].tolist() == [-0.5, -1.0, -3.0]


def test_a_subset_knows_where_it_comes_from(toy):
    part = toy.subset(["z", "x"])
    assert part.columns.names == ("z", "x")
    assert part.columns.source == COLUMNS.source
    assert part.weights.tolist() == WEIGHTS[[2, 0]].tolist()
    assert part.intercept.tolist() == [30.0, 10.0]
    assert part.detail("penalty").tolist() == [3.0, 1.0]
    assert part.errors.shape == (2, 3)
    assert part.provenance == {"method": "ridge"}


@pytest.mark.parametrize("column", [3, -1, "w"])
@pytest.mark.parametrize("ask", ["top", "nearest", "to_dataframe"])
def test_an_unknown_column_is_refused(toy, ask, column):
    with refused(AxisError, "no such column", "0 .. 2", "'x'", repr(column)):
        getattr(toy, ask)(column)


@pytest.mark.parametrize("ask", ["rows", "subset"])
def test_unknown_columns_are_refused_never_made_up(toy, ask):
    with refused(AxisError, "no such column", "0 .. 2", "3"):
        getattr(toy, ask)([0, 3])
    with refused(AxisError, "no columns", "at least one"):
        getattr(toy, ask)([])


def test_an_unknown_figure_is_refused(toy):
    with refused(AxisError, "no such figure", "penalty", "'r2'"):
        toy.detail("r2")


@pytest.mark.parametrize("name", ["weights", "intercept"])
def test_nan_is_refused_and_its_column_named(name):
    arrays = {"weights": WEIGHTS.copy(), "intercept": INTERCEPT.copy()}
    arrays[name][1] = np.nan
    with refused(OutputError, f"{name} of column 1 is not finite"):
        Attributions(**arrays, components=COMPONENTS, columns=COLUMNS, output="margin")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("weights", WEIGHTS[:2]),
        ("weights", WEIGHTS.T[:, :2]),
        ("intercept", INTERCEPT[:1]),
        ("errors", WEIGHTS[:1]),
    ],
)
def test_arrays_of_another_shape_are_refused(name, array):
    arrays = {"weights": WEIGHTS, "intercept": INTERCEPT} | {name: array}
    with refused(AxisError, f"{name} has the wrong shape", str(array.shape)):
        Attributions(**arrays, components=COMPONENTS, columns=COLUMNS, output="margin")


# ----------------------------------------------------------------------------------------- on disk


@given(
    columns=st.integers(1, 9),
    components=st.integers(1, 5),
    block_bytes=st.integers(1, 200),
    errors=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_saved_is_loaded(columns, components, block_bytes, errors, seed):
    made = random_attributions(columns, components, errors, seed)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "BLOCK_BYTES", block_bytes):
        made.save(folder)
        assert_same(made, Attributions.load(folder))


def random_attributions(columns, components, errors, seed):
    random = np.random.default_rng(seed)
    axes = [
        Axis(kind, [f"{kind} {i}" for i in range(count)], {"of": str(seed)})
        for kind, count in (("components", components), ("columns", columns))
    ]
    weights = random.normal(size=(columns, components))
    return Attributions(
        weights,
        random.normal(size=columns),
        *axes,
        "out",
        errors=abs(weights) if errors else None,
        details={"r2": random.normal(size=columns)},
        provenance={"method": "random", "seed": seed},
    )


def assert_same(ours, theirs):
    assert (ours.components, ours.columns, ours.output) == (theirs.components, theirs.columns, theirs.output)
    assert ours.provenance == theirs.provenance
    for name in ("weights", "intercept", "errors"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert np.array_equal(ours.detail("r2"), theirs.detail("r2"))


def test_loaded_lazily_every_answer_is_that_of_memory(toy, folder):
    loaded = Attributions.load(folder)
    assert len(loaded.ranges) == 3
    masks = np.array([[True, False, True], [False, True, True]])
    assert np.array_equal(loaded.predict(masks), toy.predict(masks))
    assert np.array_equal(loaded.rows([2, 0, 2]), toy.rows([2, 0, 2]))
    for table in ("top", "nearest", "to_dataframe"):
        assert getattr(loaded, table)("y").equals(getattr(toy, table)("y"))
    assert loaded.by_group().equals(toy.by_group())
    assert np.array_equal(loaded.subset([2, 1]).errors, toy.subset([2, 1]).errors)


def test_numbers_in_memory_are_those_that_loading_gives(tmp_path):
    third = Attributions(WEIGHTS / 3, INTERCEPT / 3, COMPONENTS, COLUMNS, "margin")
    loaded = Attributions.load(third.save(tmp_path / "third"))
    everything = np.ones((1, 3), dtype=bool)
    assert np.array_equal(third.predict(everything), loaded.predict(everything))


def test_only_the_blocks_concerned_are_read(toy, folder):
    loaded = Attributions.load(folder)
    (folder / "000001.safetensors").unlink()
    assert np.array_equal(loaded.rows([0, 2]), toy.rows([0, 2]))
    assert loaded.subset([2]).intercept.tolist() == [30.0]
    assert loaded.top("z", count=1).weight.tolist() == [-3.0]
    with refused(StoreError, "000001.safetensors"):
        loaded.rows([1])


def test_blocks_may_be_larger_in_a_copy(toy, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**20)
    copy = Attributions.load(Attributions.load(folder).save(tmp_path / "copy"))
    assert np.array_equal(copy.weights, toy.weights)
    assert np.array_equal(copy.rows([1, 2]), toy.rows([1, 2]))


def test_blocks_are_written_as_they_come(tmp_path):
    def blocks():
        for start in range(3):
            assert len(list(tmp_path.glob("toy/*.safetensors"))) == start
            yield Block(start, WEIGHTS[start : start + 1], INTERCEPT[start : start + 1])
        assert not (tmp_path / "toy" / "index.json").exists()

    write_blocks(tmp_path / "toy", blocks(), COMPONENTS, COLUMNS, "margin", {})
    assert np.array_equal(Attributions.load(tmp_path / "toy").weights, WEIGHTS)


def test_equal_attributions_may_be_saved_again_and_others_may_not(toy, folder):
    toy.save(folder)
    other = Attributions(WEIGHTS + 1, INTERCEPT, COMPONENTS, COLUMNS, "margin")
    with refused(StoreError, "exists and holds something else", "000000.safetensors"):
        other.save(folder)
    assert np.array_equal(Attributions.load(folder).weights, WEIGHTS)


DAMAGE = {
    "truncated": lambda data: data[:-5],
    "empty": lambda _: b"",
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
}


@pytest.mark.parametrize("how", [*DAMAGE, "missing", "another block"])
def test_a_damaged_block_is_named_and_the_others_are_read(toy, folder, how):
    path = folder / "000001.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "another block":
        path.write_bytes((folder / "000002.safetensors").read_bytes())
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    loaded = Attributions.load(folder)
    with refused(StoreError, "000001.safetensors", "fit again"):
        _ = loaded.weights
    assert np.array_equal(loaded.rows([2]), toy.rows([2]))


@pytest.mark.parametrize("how", ["truncated", "empty"])
def test_a_damaged_index_is_named(folder, how):
    path = folder / "index.json"
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    with refused(StoreError, "index.json", "JSON"):
        Attributions.load(folder)


def test_a_missing_index_is_named(tmp_path):
    with refused(StoreError, "no attributions in", "nowhere", "index.json is missing", "coar fit"):
        Attributions.load(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["format", "output", "components", "columns", "blocks", "provenance"])
def test_an_index_without_a_key_is_refused(folder, key):
    change_index(folder, lambda index: index.pop(key))
    with refused(StoreError, "index.json", key):
        Attributions.load(folder)


def test_a_newer_format_is_refused_whatever_its_keys(folder):
    (folder / "index.json").write_text('{"format": 2, "tables": []}')
    with refused(StoreError, "newer version", "format 1", "format 2", "upgrade"):
        Attributions.load(folder)


@pytest.mark.parametrize(
    "name", ["../000000.safetensors", "/000000.safetensors", "a/000000.safetensors", "..", ""]
)
def test_a_file_name_that_leaves_the_folder_is_refused(folder, name):
    change_index(folder, lambda index: index["blocks"][0].update(file=name))
    with refused(StoreError, "index.json", "not a block of this folder", repr(name)):
        Attributions.load(folder)


CHANGES = {
    "the last block is missing": lambda blocks: blocks.pop(),
    "the first block is missing": lambda blocks: blocks.pop(0),
    "a gap": lambda blocks: blocks.pop(1),
    "an overlap": lambda blocks: blocks[1].update(start=0),
    "another order": lambda blocks: blocks.reverse(),
    "all missing": lambda blocks: blocks.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_do_not_cover_the_columns_are_refused(folder, change):
    change_index(folder, lambda index: CHANGES[change](index["blocks"]))
    with refused(StoreError, "index.json", "do not cover the columns", "from 0 to 3"):
        Attributions.load(folder)


@pytest.mark.parametrize("entry", [None, {}, {"file": 3}, {"start": "0"}, {"digests": {}}])
def test_a_damaged_entry_of_the_index_is_refused(folder, entry):
    def change(index):
        index["blocks"][0] = entry if not entry else index["blocks"][0] | entry

    change_index(folder, change)
    with refused(StoreError, "index.json", "damaged"):
        Attributions.load(folder)


def test_an_index_changed_behind_its_digest_is_refused(folder):
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"margin"', '"martin"').replace('"y"', '"z"'))
    with refused(StoreError, "index.json", "digest differs"):
        Attributions.load(folder)


def change_index(folder: Path, change) -> None:
    """Change the index as somebody who knows of its digest would."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    del index["digest"]
    change(index)
    path.write_text(json.dumps(index | {"digest": digest_json(index)}))
