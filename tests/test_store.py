"""Store: what is read is what was written, or an error that names the file."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coar.errors import OutputError, StoreError
from coar.store import Item, Shard, Store, first_unstorable, pack

ITEM = Item(0, 10, 14)


def make_store(directory, components=11, columns=3, dtype="float32", digest="a" * 64):
    return Store(directory, digest, components, {"y": columns}, {"y": dtype})


def make_shard(components=11, columns=3, rows=4, start=10, seed=0):
    rng = np.random.default_rng(seed)
    masks = rng.random((rows, components)) < 0.5
    outputs = rng.normal(size=(rows, columns)).astype(np.float32)
    return Shard(np.arange(start, start + rows), masks, {"y": outputs}, {"device": "cpu"})


@given(
    masks=hnp.arrays(bool, st.tuples(st.integers(0, 5), st.integers(1, 40))),
    columns=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float16"]),
    data=st.data(),
)
def test_any_shard_is_read_as_it_was_written(tmp_path_factory, masks, columns, dtype, data):
    width = 32 if dtype == "float32" else 16
    values = data.draw(hnp.arrays(dtype, (len(masks), columns), elements=st.floats(-1000, 1000, width=width)))
    store = make_store(tmp_path_factory.mktemp("store"), masks.shape[1], columns, dtype)
    item = Item(3, 7, 7 + len(masks))
    rows = np.arange(item.start, item.stop)
    assert store.write(item, Shard(rows, masks, {"y": values}, {"device": "cpu", "threads": 2}))
    found = store.read(item)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.masks, masks)
    np.testing.assert_array_equal(found.outputs["y"], values)
    assert found.outputs["y"].dtype == np.dtype(dtype)
    assert found.record == {"device": "cpu", "threads": 2}
    assert store.count(item) == len(masks)


def test_the_bit_order_of_masks_is_the_stated_one():
    mask = np.zeros((1, 10), dtype=bool)
    mask[0, [0, 9]] = True
    assert pack(mask).tolist() == [[0b00000001, 0b00000010]]


def test_an_equal_second_write_is_ignored(tmp_path):
    store = make_store(tmp_path)
    assert store.write(ITEM, make_shard())
    assert not store.write(ITEM, make_shard())
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["000000.safetensors"]


def test_a_second_write_with_other_contents_is_refused_and_changes_nothing(tmp_path):
    store = make_store(tmp_path)
    store.write(ITEM, make_shard(seed=0))
    with pytest.raises(StoreError, match="something else"):
        store.write(ITEM, make_shard(seed=1))
    np.testing.assert_array_equal(store.read(ITEM).outputs["y"], make_shard(seed=0).outputs["y"])


def test_the_first_of_two_execution_records_stays(tmp_path):
    store = make_store(tmp_path)
    store.write(ITEM, make_shard())
    other = make_shard()
    other = Shard(other.rows, other.masks, {"y": other.outputs["y"] + 1e-6}, {"device": "gpu"})
    assert not store.write(ITEM, other)
    assert store.read(ITEM).record == {"device": "cpu"}


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"000000\.safetensors is missing"):
        make_store(tmp_path).read(ITEM)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 50, 0.5, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    store = make_store(tmp_path)
    store.write(ITEM, make_shard())
    path = store.path(0)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(StoreError, match="000000"):
        store.read(ITEM)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    """A flipped byte anywhere gives an error that names the file, or the very same rows."""
    make_store(tmp_path).write(ITEM, make_shard())
    path = make_store(tmp_path).path(0)
    data = path.read_bytes()
    messages = []
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        try:
            found = make_store(tmp_path).read(ITEM)
        except StoreError as error:
            messages.append(str(error))
        else:
            np.testing.assert_array_equal(found.masks, make_shard().masks)
            np.testing.assert_array_equal(found.outputs["y"], make_shard().outputs["y"])
    assert len(messages) > 0.9 * len(data)
    assert all("000000" in message for message in messages)


def test_a_shard_of_another_study_is_refused(tmp_path):
    make_store(tmp_path, digest="b" * 64).write(ITEM, make_shard())
    with pytest.raises(StoreError, match="another study"):
        make_store(tmp_path).read(ITEM)


def test_a_shard_under_another_number_is_refused(tmp_path):
    store = make_store(tmp_path)
    store.write(ITEM, make_shard())
    store.path(0).rename(store.path(1))
    with pytest.raises(StoreError, match="damaged"):
        store.read(Item(1, 14, 18))


def test_a_safetensors_file_that_is_no_shard_is_refused(tmp_path):
    from safetensors.numpy import save_file

    path = make_store(tmp_path).path(0)
    path.parent.mkdir()
    save_file({"rows": np.arange(4)}, path)
    with pytest.raises(StoreError, match="damaged"):
        make_store(tmp_path).read(ITEM)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("coar.store.FORMAT", 2)
    make_store(tmp_path).write(ITEM, make_shard())
    monkeypatch.setattr("coar.store.FORMAT", 1)
    with pytest.raises(StoreError, match="newer"):
        make_store(tmp_path).read(ITEM)


@pytest.mark.parametrize("length", [2**63, 2**40, 101 * 2**20])
def test_an_absurd_header_length_is_refused(tmp_path, length):
    path = make_store(tmp_path).path(0)
    path.parent.mkdir()
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(StoreError, match="damaged"):
        make_store(tmp_path).read(ITEM)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (1, 3), (4, 1)])
def test_an_output_of_another_shape_is_refused_not_broadcast(tmp_path, shape):
    shard = make_shard()
    with pytest.raises(OutputError, match="wrong length"):
        make_store(tmp_path).write(
            ITEM, Shard(shard.rows, shard.masks, {"y": np.zeros(shape, np.float32)}, {})
        )
    assert not (tmp_path / "shards").exists()


def test_partial_and_foreign_names_are_not_shards(tmp_path):
    store = make_store(tmp_path)
    store.write(ITEM, make_shard())
    for name in ("000001.safetensors.partial-host-1-ab", "notes.safetensors", "000002.json"):
        (tmp_path / "shards" / name).write_text("x")
    assert store.present() == {0}


def test_failed_rows_are_recorded_once_and_read_in_order(tmp_path):
    store = make_store(tmp_path)
    for row in (12, 3, 12):
        store.fail(row, OutputError(f"row {row} is NaN", got="nan"))
    assert [record["row"] for record in store.failures()] == [3, 12]


def test_a_damaged_failure_record_is_named(tmp_path):
    store = make_store(tmp_path)
    store.fail(3, OutputError("NaN", got="nan"))
    (tmp_path / "failures" / "000000003.json").write_text(json.dumps({"row": "three"}))
    with pytest.raises(StoreError, match="000000003"):
        list(store.failures())


def test_nan_infinity_and_overflow_are_found_where_they_are():
    assert first_unstorable(np.array([1.0, -7.0]), "float32") is None
    assert first_unstorable(np.array([1.0, np.nan, np.inf]), "float32") == 1
    assert first_unstorable(np.array([1.0, 2.0, -np.inf]), "float32") == 2
    assert first_unstorable(np.array([65504.0, 65520.0]), "float16") == 1
    assert first_unstorable(np.array([65504.0, 65520.0]), "float32") is None
