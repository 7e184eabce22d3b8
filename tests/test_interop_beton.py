"""Files of FFCV in NumPy: held to a slow and obvious reader and writer, and to anything but crashing."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import coar
from coar.errors import CoarError, CoarWarning, SettingError, StoreError
from coar.interop import Beton, BetonField, export_beton, read_beton, write_beton, write_beton_blocks
from coar.testing import SubsetMean
from tests.refused import refused

PAGE = 2**21
TYPES = ["?", "u1", "i1", "u2", "i2", "i4", "i8", "u8", "f2", "f4", "f8"]


def naive_read(path):
    """The format, field by field and sample by sample."""
    data = path.read_bytes()
    version, num_fields, page, samples, table = struct.unpack_from("<HHIQQ", data)
    assert version == 2
    found, sizes = {}, []
    for f in range(num_fields):
        at = 24 + f * 1041
        kind, name = data[at], data[at + 1 : at + 17].rstrip(b"\0").decode()
        arguments = data[at + 17 : at + 1041]
        values = []
        for i in range(samples):
            cell = 24 + 1041 * num_fields + 8 * (num_fields * i + f)
            if kind in (0, 1):
                values.append(struct.unpack_from("<d" if kind == 0 else "<q", data, cell)[0])
                continue
            shape = [n for n in struct.unpack_from("<32Q", arguments) if n]
            (length,) = struct.unpack_from("<Q", arguments, 256)
            dtype = np.dtype([tuple(x) for x in json.loads(arguments[264 : 264 + length])])[0]
            (start,) = struct.unpack_from("<Q", data, cell)
            count = int(np.prod(shape))
            assert start // page == (start + count * dtype.itemsize - 1) // page, "an array crosses pages"
            sizes.append((i, start, count * dtype.itemsize))
            values.append(np.frombuffer(data, dtype, count, start).reshape(shape))
        found[name] = np.array(values)
    entries = [struct.unpack_from("<QQQ", data, at) for at in range(table, len(data), 24)]
    assert sorted(entries) == sorted(sizes)
    return found


def naive_write(path, arrays, order):
    """Arrays of each sample in a page of their own, samples in any order, as several workers leave them."""
    samples = len(next(iter(arrays.values())))
    head = 24 + len(arrays) * (1041 + 8 * samples)
    start = -(-head // PAGE) * PAGE
    cells, pages, table = np.zeros((samples, len(arrays)), "<u8"), bytearray(), []
    for page, i in enumerate(order):
        content = b""
        for f, array in enumerate(arrays.values()):
            if array.ndim == 1:
                cells[i, f] = array[i : i + 1].view("<u8")[0]
                continue
            place = start + page * PAGE + len(content)
            content += array[i].tobytes()
            cells[i, f] = place
            table.append(struct.pack("<QQQ", i, place, array[i].nbytes))
        pages += content.ljust(PAGE, b"\0")
    described = b""
    for name, array in arrays.items():
        arguments, kind = b"", {"f": 0, "i": 1}.get(array.dtype.kind)
        if array.ndim > 1:
            text, kind = json.dumps(array.dtype.descr).encode(), 4
            shape = (array.shape[1:] + (0,) * 32)[:32]
            arguments = struct.pack("<32QQ", *shape, len(text)) + text
        described += bytes([kind]) + name.encode().ljust(16, b"\0") + arguments.ljust(1024, b"\0")
    header = struct.pack("<HHIQQ", 2, len(arrays), PAGE, samples, start + len(pages))
    path.write_bytes((header + described + cells.tobytes()).ljust(start, b"\0") + pages + b"".join(table))


def example(samples=5, components=9, columns=4):
    rng = np.random.default_rng(0)
    return {
        "mask": rng.random((samples, components)) < 0.5,
        "targets": rng.normal(size=(samples, columns)).astype("f4"),
        "idx": np.arange(samples),
        "weight": rng.normal(size=samples),
    }


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@st.composite
def fields(draw):
    samples = draw(st.integers(1, 7))
    found = {}
    for i in range(draw(st.integers(1, 4))):
        dtype = np.dtype(draw(st.sampled_from(TYPES)))
        shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        if draw(st.booleans()):
            dtype, shape = np.dtype(draw(st.sampled_from(["i8", "f8"]))), []
        found[f"field {i}"] = draw(hnp.arrays(dtype, (samples, *shape)))
    return found


class TestRoundTrip:
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:FFCV:coar.errors.CoarWarning")  # the next test
    @given(arrays=fields())
    def test_what_is_written_is_read_and_is_what_the_format_says(self, tmp_path_factory, arrays):
        path = write_beton(tmp_path_factory.mktemp("trip") / "a.beton", arrays)
        same(read_beton(path), arrays)
        for name, values in naive_read(path).items():
            np.testing.assert_array_equal(values, arrays[name])

    def test_float16_arrays_are_written_with_the_way_round_ffcv(self, tmp_path):
        half = np.arange(6, dtype=np.float16).reshape(2, 3)
        with pytest.warns(CoarWarning, match=r"hangs.*\(half\).*view\(np.int16\)"):
            write_beton(tmp_path / "a.beton", {"half": half})
        same(read_beton(tmp_path / "a.beton"), {"half": half})
        write_beton(tmp_path / "b.beton", {"half": half.view(np.int16), "number": half[:, 0]})

    def test_a_float16_study_becomes_float32(self, tmp_path):
        study = coar.Study.create(
            tmp_path / "s", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 9, dtypes={"mean": "float16"}
        )
        study.run(progress=False)
        found = read_beton(export_beton(study, tmp_path / "a.beton"))
        assert found["targets"].dtype == np.float32
        np.testing.assert_array_equal(found["targets"], study.outputs["mean"][:])

    def test_other_orders_of_pages_and_of_the_table_are_read(self, tmp_path):
        arrays = example()
        naive_write(tmp_path / "a.beton", arrays, [3, 0, 4, 2, 1])
        same(read_beton(tmp_path / "a.beton"), arrays)
        same(Beton(tmp_path / "a.beton").read(1, 3), {name: array[1:3] for name, array in arrays.items()})

    def test_blocks_of_any_size_give_the_same_file_and_are_read_back(self, tmp_path):
        arrays = example(samples=11)
        whole = write_beton(tmp_path / "a.beton", arrays)
        described = {
            "mask": BetonField(np.dtype(bool), (9,)),
            "targets": BetonField(np.dtype("f4"), (4,)),
            "idx": BetonField(np.dtype("i8")),
            "weight": BetonField(np.dtype("f8")),
        }
        for size in (1, 4, 11):
            blocks = [{n: a[i : i + size] for n, a in arrays.items()} for i in range(0, 11, size)]
            path = write_beton_blocks(tmp_path / f"{size}.beton", described, 11, blocks)
            assert path.read_bytes() == whole.read_bytes()
            parts = list(Beton(path).blocks(size))
            assert len(parts) == len(blocks)
            same({name: np.concatenate([part[name] for part in parts]) for name in arrays}, arrays)

    def test_samples_fill_pages_and_large_ones_get_larger_pages(self, tmp_path):
        small = {"a": np.arange(5 * 2**21, dtype="u1").reshape(5, 2**21)}  # 4 to a page of 2**23
        path = write_beton(tmp_path / "small.beton", small)
        assert Beton(path).page_size == 2**23
        assert path.stat().st_size == 3 * 2**23 + 5 * 24
        same(read_beton(path), small)
        large = {"a": np.arange(2 * (2**23 + 1), dtype="u1").reshape(2, -1)}
        path = write_beton(tmp_path / "large.beton", large)
        assert Beton(path).page_size == 2**24
        same(read_beton(path), large)

    def test_numbers_are_widened_only_where_nothing_is_lost(self, tmp_path):
        path = write_beton(
            tmp_path / "a.beton", {"half": np.float16([0.1, np.nan]), "byte": np.uint8([3, 255])}
        )
        found = read_beton(path)
        np.testing.assert_array_equal(found["half"], np.float16([0.1, np.nan]).astype("f8"))
        np.testing.assert_array_equal(found["byte"], [3, 255])
        with refused(SettingError, "'a'", "int64", "uint64"):
            write_beton(tmp_path / "b.beton", {"a": np.uint64([2**63 + 1])})
        with refused(SettingError, "'a'", "int64", "float64"):
            write_beton_blocks(
                tmp_path / "b.beton", {"a": BetonField(np.dtype("i8"))}, 1, [{"a": np.array([np.nan])}]
            )


class TestStudy:
    def test_rows_that_are_there_become_samples(self, tmp_path):
        study = coar.Study.create(
            tmp_path / "s", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 30, rows_per_shard=7
        )
        study.run(progress=False)
        study.store.path(1).unlink()
        found = read_beton(export_beton(study, tmp_path / "a.beton"))
        assert list(found) == ["mask", "targets", "idx"]
        np.testing.assert_array_equal(found["idx"], [*range(7), *range(14, 30)])
        np.testing.assert_array_equal(found["mask"], study.masks[:])
        np.testing.assert_array_equal(found["targets"], study.outputs["mean"][:])
        assert found["targets"].dtype == np.float32

    def test_memory_does_not_grow_with_rows(self, tmp_path):
        peaks = []
        for rows in (500, 5_000):
            study = coar.Study.create(
                tmp_path / f"{rows}",
                SubsetMean(50, 400),
                coar.Bernoulli(ablation_fraction=0.3),
                rows,
                rows_per_shard=250,
            )
            study.run(progress=False)
            tracemalloc.start()
            export_beton(study, tmp_path / f"{rows}.beton")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.5 * peaks[0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({}, ["none"]),
            ({"a": np.zeros((2, 3)), "b": np.zeros(3)}, ["lengths", "(2, 3)"]),
            ({"a": np.zeros((0, 3))}, ["at least 1"]),
            ({"a": np.float64(3)}, ["lengths"]),
            ({"a": np.zeros((2, 0))}, ["'a'", "(0,)"]),
            ({"a": np.array([True])}, ["'a'", "[samples, 1]"]),
            ({"a": np.array([["x"]])}, ["'a'", "<U1"]),
            ({"a": np.zeros((2, 3), complex)}, ["'a'", "complex"]),
            ({"": np.zeros(2)}, ["''", "16 ASCII"]),
            ({"ä": np.zeros(2)}, ["'ä'", "16 ASCII"]),
            ({"a" * 17: np.zeros(2)}, ["16 ASCII"]),
            ({"a\0": np.zeros(2)}, ["16 ASCII"]),
        ],
    )
    def test_that_cannot_be_written_is_refused(self, tmp_path, arrays, words):
        with refused(SettingError, *words):
            write_beton(tmp_path / "a.beton", arrays)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("counts", [[2], [2, 2], []])
    def test_another_number_of_samples_than_was_said_is_refused(self, tmp_path, counts):
        described = {"a": BetonField(np.dtype("f4"), (3,))}
        blocks = [{"a": np.zeros((count, 3), "f4")} for count in counts]
        with refused(SettingError, "number of samples", "3"):
            write_beton_blocks(tmp_path / "a.beton", described, 3, blocks)
        assert not list(tmp_path.iterdir())

    def test_values_of_another_type_or_shape_are_refused(self, tmp_path):
        described = {"a": BetonField(np.dtype("f4"), (3,))}
        for values in (np.zeros((1, 3)), np.zeros((1, 4), "f4")):
            with refused(SettingError, "'a'", "float32 [samples, 3]", str(values.dtype)):
                write_beton_blocks(tmp_path / "a.beton", described, 1, [{"a": values}])

    def test_a_file_that_exists_is_left_alone(self, tmp_path):
        (tmp_path / "a.beton").write_text("mine", encoding="utf-8")
        with refused(StoreError, "a.beton exists"):
            write_beton(tmp_path / "a.beton", example())
        assert (tmp_path / "a.beton").read_text(encoding="utf-8") == "mine"


def changed(path, at, layout, *values):
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, at, *values)
    path.write_bytes(content)
    return path


ARGUMENTS = 24 + 17  # of the first field
CELLS = 24 + 4 * 1041  # of a file with four fields


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """The bytes of a whole file that is small: its pages begin where they would with pages of 1 byte."""
    path = tmp_path_factory.mktemp("whole") / "a.beton"
    arrays = example()
    write_beton(path, arrays)
    content = bytearray(path.read_bytes())
    head, size = CELLS + 5 * 4 * 8, 5 * (9 + 16)
    pages, table = content[2**23 : 2**23 + size], content[2 * 2**23 :]
    content = content[:head] + pages + table
    struct.pack_into("<Q", content, 16, head + size)
    for sample in range(5):
        for field, offset in ((0, 0), (1, 9)):
            place = head + 25 * sample + offset
            struct.pack_into("<Q", content, CELLS + 8 * (4 * sample + field), place)
            struct.pack_into("<Q", content, head + size + 24 * (2 * sample + field) + 8, place)
    path.write_bytes(content)
    same(read_beton(path), arrays)
    return bytes(content)


class TestDamagedFiles:
    @pytest.fixture
    def beton(self, tmp_path):
        return write_beton(tmp_path / "a.beton", example())

    @pytest.mark.parametrize(
        ("at", "layout", "value", "words"),
        [
            (0, "<H", 1, ["version 2"]),
            (2, "<H", 0, ["some fields"]),
            (2, "<H", 65535, ["the fields"]),
            (8, "<Q", 0, ["some samples"]),
            (8, "<Q", 6, ["a table of"]),
            (8, "<Q", 2**63, ["pages between"]),
            (16, "<Q", 2**64 - 1, ["pages between"]),
            (16, "<Q", 30, ["pages between"]),
            (24, "<B", 2, ["'mask'", "an image", "FFCV itself"]),
            (24, "<B", 77, ["'mask'", "type 77"]),
            (25, "<B", 0, ["names"]),
            (25, "<B", 200, ["names"]),
            (24 + 1041 + 1, "<8s", b"mask", ["different names"]),
            (ARGUMENTS, "<Q", 0, ["a shape of mask"]),
            (ARGUMENTS, "<Q", 2**63, ["bytes of arrays"]),
            (ARGUMENTS, "<32Q", [2] * 32, ["a shape of mask"]),
            (ARGUMENTS, "<31Q", [2**64 - 1] * 31, ["bytes of arrays"]),
            (ARGUMENTS + 8, "<2Q", [0, 3], ["a shape of mask"]),
            (ARGUMENTS + 256, "<Q", 0, ["the type of mask"]),
            (ARGUMENTS + 256, "<Q", 2**64 - 1, ["the type of mask"]),
            (ARGUMENTS + 264, "<12s", b'[["", "|O8"]', ["the type of mask"]),
            (ARGUMENTS + 264, "<12s", b"[" * 12, ["the type of mask"]),
            (CELLS, "<Q", 0, ["table"]),
            (CELLS, "<Q", 2**64 - 1, ["table"]),
            (2**23, "<B", 2, ["0 or 1 in mask"]),
        ],
    )
    def test_are_refused_with_what_is_wrong(self, beton, at, layout, value, words):
        changed(beton, at, layout, *(value if isinstance(value, list) else [value]))
        with refused(StoreError, "a.beton", *words):
            read_beton(beton)

    def test_arrays_that_overlap_cannot_make_a_small_file_large(self, tmp_path):
        """All samples in the same page: each array is in the file, all together would not be."""
        path = write_beton(tmp_path / "a.beton", {"a": np.zeros((4, 2**22), "u1")})
        cells, table = 24 + 1041, 3 * 2**23
        assert path.stat().st_size == table + 4 * 24
        for i in range(4):
            changed(path, cells + 8 * i, "<Q", 2**23)
            changed(path, table + 24 * i + 8, "<Q", 2**23)
        with refused(StoreError, "apart from each other"):
            read_beton(path)

    def test_a_table_that_points_outside_the_pages_is_refused(self, beton):
        table = 2 * 2**23
        for place in (24, table - 3, 2**64 - 4):
            changed(beton, CELLS, "<Q", place)
            changed(beton, table + 8, "<Q", place)
            with refused(StoreError, "arrays in the pages"):
                read_beton(beton)

    def test_folders_pipes_and_nothing_are_refused(self, tmp_path):
        with refused(StoreError, "missing"):
            read_beton(tmp_path / "nowhere")
        with refused(StoreError, "is not a file"):
            read_beton(tmp_path)
        os.mkfifo(tmp_path / "pipe")
        with refused(StoreError, "is not a file"):
            read_beton(tmp_path / "pipe")

    @given(data=st.data())
    def test_anything_else_is_a_named_error_or_an_array(self, tmp_path_factory, compact, data):
        content = bytearray(compact)
        places = st.one_of(
            st.integers(0, 23),
            st.integers(24, 24 + 330),
            st.integers(CELLS, len(compact) - 1),
            st.integers(0, len(compact) - 1),
        )
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(places)] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        path = tmp_path_factory.mktemp("fuzz") / "a.beton"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            found = read_beton(path)
            assert len({len(array) for array in found.values()}) == 1
        except CoarError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**20 + 20 * len(content)
