import errno
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import safe_open

from coar import files
from coar.errors import SettingError, StoreError
from coar.files import (
    canonical_json,
    digest_array,
    digest_json,
    partial_path,
    read_json,
    remove_abandoned,
    require_keys,
    safe_name,
    write_arrays_once,
    write_json_once,
    write_once,
)
from tests.refused import refused


class TestSafeName:
    @pytest.mark.parametrize("name", ["digits", "0001", "a.json", "Fix_2-b", "x" * 100])
    def test_accepts_plain_names(self, name):
        assert safe_name(name, "name") == name

    @pytest.mark.parametrize(
        "name",
        [
            *("", ".", "..", "../x", "a/b", "/etc", "a\\b", "C:x", ".hidden", "-rf", "a b", "a\n", "é"),
            *("x" * 101, "a.partial-b", None, 3),
        ],
    )
    def test_refuses_names_that_could_leave_the_folder_or_confuse_readers(self, name):
        with refused(SettingError, "edit name", "stay inside its folder", repr(name), "choose another name"):
            safe_name(name, "edit name")

    @given(st.text(max_size=12))
    def test_what_is_accepted_is_a_file_of_that_folder(self, name):
        try:
            safe_name(name, "name")
        except SettingError:
            return
        folder = Path("/somewhere/folder")
        assert (folder / name).resolve().parent == folder


class TestWriteOnce:
    def test_the_first_writer_wins_and_the_second_is_told(self, tmp_path):
        path = tmp_path / "deep" / "a.txt"
        assert write_once(path, lambda p: p.write_text("one")) is True
        assert write_once(path, lambda p: p.write_text("one")) is False
        assert path.read_text() == "one"

    def test_another_content_is_refused_and_the_first_stays(self, tmp_path):
        path = tmp_path / "a.txt"
        write_once(path, lambda p: p.write_text("one"))
        with refused(StoreError, str(path), "something else", "digest", "nothing was overwritten"):
            write_once(path, lambda p: p.write_text("two"))
        assert path.read_text() == "one"

    def test_nobody_sees_the_name_before_the_file_is_whole(self, tmp_path):
        path = tmp_path / "a.txt"

        def write(partial):
            partial.write_text("half")
            assert not path.exists()
            partial.write_text("whole")

        write_once(path, write)
        assert path.read_text() == "whole"

    def test_a_failing_writer_leaves_nothing(self, tmp_path):
        def write(partial):
            partial.write_text("half")
            raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_once(tmp_path / "a.txt", write)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_named_and_leaves_nothing(self, tmp_path):
        def write(partial):
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with refused(StoreError, str(tmp_path / "a.txt"), "No space left", "free space"):
            write_once(tmp_path / "a.txt", write)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_way_of_the_folder_is_named(self, tmp_path):
        (tmp_path / "folder").write_text("a file")
        with refused(StoreError, "cannot write", str(tmp_path / "folder" / "a.txt")):
            write_once(tmp_path / "folder" / "a.txt", lambda p: p.write_text("one"))

    def test_no_partial_file_remains(self, tmp_path):
        for content in ("one", "one"):
            write_once(tmp_path / "a.txt", lambda p, content=content: p.write_text(content))
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]

    def test_of_many_writers_at_once_exactly_one_wins(self, tmp_path):
        path = tmp_path / "a.txt"

        def write(number):
            try:
                return write_once(path, lambda p: p.write_text(f"{number}" * 1000))
            except StoreError:
                return None

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(write, range(8)))
        assert results.count(True) == 1
        assert results.count(None) == 7
        assert path.read_text() == f"{results.index(True)}" * 1000

    def test_file_systems_without_hard_links_do_as_well(self, tmp_path, monkeypatch):
        def no_links(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", no_links)
        path = tmp_path / "a.txt"
        assert write_once(path, lambda p: p.write_text("one")) is True
        assert write_once(path, lambda p: p.write_text("one")) is False
        with refused(StoreError, "something else"):
            write_once(path, lambda p: p.write_text("two"))
        assert path.read_text() == "one"


def test_json_is_written_for_people_and_read_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": "ä"}
    assert write_json_once(tmp_path / "a.json", value) is True
    assert read_json(tmp_path / "a.json") == value
    assert len((tmp_path / "a.json").read_text().splitlines()) > 3


def test_json_that_nobody_else_could_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_once(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


class TestReadJson:
    @pytest.mark.parametrize(
        "content", [b"", b"{", b'{"a": 1} trailing', b"\xff\xfe{}", b"[" * 100_000, b"\x00" * 64]
    )
    def test_damage_is_named_with_the_file(self, tmp_path, content):
        path = tmp_path / "spec.json"
        path.write_bytes(content)
        with refused(StoreError, str(path), "not a readable spec", "JSON in UTF-8"):
            read_json(path, "spec")

    def test_a_missing_file_is_named(self, tmp_path):
        with refused(StoreError, str(tmp_path / "no.json"), "is missing", "a spec", "check the path"):
            read_json(tmp_path / "no.json", "spec")

    def test_a_folder_is_named(self, tmp_path):
        with refused(StoreError, str(tmp_path), "spec"):
            read_json(tmp_path, "spec")

    def test_a_runaway_file_is_refused_before_it_is_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
        (tmp_path / "a.json").write_text("[" + "1," * 20 + "1]")
        with refused(StoreError, "too large", "at most 10 bytes", "got:      43 bytes"):
            read_json(tmp_path / "a.json")


class TestRequireKeys:
    PATH = Path("shards/index.json")

    def test_returns_an_object_that_has_them(self):
        value = {"rows": 3, "name": "a", "more": None}
        assert require_keys(value, {"rows": int, "name": (str, int)}, self.PATH) is value

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ([], ["a JSON object", "list"]),
            ({}, ["'rows'", "nothing"]),
            ({"rows": "3"}, ["'rows'", "int", "got:      str"]),
        ],
    )
    def test_names_file_and_key(self, value, words):
        with refused(StoreError, "shards/index.json", *words):
            require_keys(value, {"rows": int}, self.PATH)


class TestDigests:
    @given(npst.arrays(npst.scalar_dtypes(), npst.array_shapes(min_dims=1, max_dims=3, max_side=4)))
    def test_an_array_is_recognised_whatever_its_memory_looks_like(self, array):
        digest = digest_array(array)
        assert digest_array(np.asfortranarray(array)) == digest
        assert digest_array(array.astype(array.dtype.newbyteorder(">"))) == digest
        assert digest_array(np.repeat(array[None], 2, axis=0)[1]) == digest

    @given(npst.arrays(np.int16, st.integers(1, 20)), st.data())
    def test_one_changed_value_changes_the_digest(self, array, data):
        other = array.copy()
        other[data.draw(st.integers(0, len(array) - 1))] ^= 1
        assert digest_array(other) != digest_array(array)

    def test_type_and_shape_count(self):
        zeros = [np.zeros(4, np.int32), np.zeros(4, np.float32), np.zeros(2, np.float64), np.zeros((2, 2))]
        assert len({digest_array(array) for array in zeros}) == 4

    def test_json_values_are_recognised_whatever_the_order_of_keys(self):
        assert digest_json({"a": 1, "b": {"c": 2, "d": 3}}) == digest_json({"b": {"d": 3, "c": 2}, "a": 1})
        assert digest_json({"a": [1, 2]}) != digest_json({"a": [2, 1]})

    def test_canonical_json_is_json(self):
        value = {"b": 1, "a": [True, None, "ä", 0.1]}
        assert json.loads(canonical_json(value)) == value

    @pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
    def test_canonical_json_has_no_nan(self, value):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(value)


class TestRemoveAbandoned:
    def test_removes_what_a_dead_process_of_this_machine_left(self, tmp_path):
        ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
        path = tmp_path / f"a.partial-{socket.gethostname()}-{int(ended.stdout)}-{'0' * 32}"
        path.write_text("half")
        assert remove_abandoned(tmp_path) == 1
        assert not path.exists()

    def test_keeps_what_a_living_process_writes(self, tmp_path):
        path = partial_path(tmp_path / "a")
        path.write_text("half")
        assert remove_abandoned(tmp_path) == 0
        assert path.exists()

    def test_keeps_what_belongs_to_other_machines_or_is_no_partial_file(self, tmp_path):
        names = [f"a.partial-elsewhere-1-{'0' * 32}", f"a.partial-{socket.gethostname()}-x-1", "a.txt"]
        for name in names:
            (tmp_path / name).write_text("something")
        assert remove_abandoned(tmp_path) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_two_writers_never_share_a_partial_file(tmp_path):
    first, second = partial_path(tmp_path / "a"), partial_path(tmp_path / "a")
    assert first != second
    assert first.parent == tmp_path
    assert f"-{os.getpid()}-" in first.name


class TestWriteArraysOnce:
    ARRAYS: ClassVar = {"masks": np.arange(6, dtype=np.uint8), "margin": np.array([[0.5, -1.0]], np.float32)}

    def test_arrays_and_header_come_back(self, tmp_path):
        path = tmp_path / "0.safetensors"
        assert write_arrays_once(path, self.ARRAYS, header='{"rows": 1}') is True
        with safe_open(path, "numpy") as opened:
            assert opened.metadata() == {"coar": '{"rows": 1}'}
            for name, array in self.ARRAYS.items():
                np.testing.assert_array_equal(opened.get_tensor(name), array)

    def test_equal_arrays_are_equal_files_whatever_the_order_of_names(self, tmp_path):
        path = tmp_path / "0.safetensors"
        write_arrays_once(path, self.ARRAYS, header="h")
        assert write_arrays_once(path, dict(reversed(self.ARRAYS.items())), header="h") is False

    def test_other_arrays_are_refused(self, tmp_path):
        path = tmp_path / "0.safetensors"
        write_arrays_once(path, self.ARRAYS)
        with refused(StoreError, str(path), "something else"):
            write_arrays_once(path, self.ARRAYS | {"masks": np.zeros(6, np.uint8)})
