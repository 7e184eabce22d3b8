"""Original stores: finished rows and nothing else arrive, bit by bit, and go out again as they came."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import coar
from coar.axes import Axis
from coar.errors import AxisError, CoarError, CoarWarning, OutputError, SettingError, StoreError, StudyError
from coar.experiments.imported import ImportedRows
from coar.interop import export_beton, export_store, import_store
from coar.interop.original_store import OriginalStore
from coar.spec import build_experiment, can_rebuild
from coar.testing import SubsetMean, check_experiment, linear_experiment
from tests.refused import refused


def write_store(folder, **arrays):
    """As the original does: a memory map per array."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        out = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=array.dtype, shape=array.shape
        )
        out[:] = array
        out.flush()
    return folder


def example(rows=40, components=7, columns=3, dtype="float16", seed=0, finished=0.7):
    """Arrays of a store; rows that are not finished hold what must never be seen."""
    rng = np.random.default_rng(seed)
    masks = rng.random((rows, components)) < 0.8
    outputs = (masks @ rng.normal(size=(components, columns)) + 5).astype(dtype)
    completed = rng.random(rows) < finished
    completed[rows // 2] = True
    outputs[~completed], masks[~completed] = np.nan, False
    return {"_completed": completed, "masks": masks, "margins": outputs}


@pytest.fixture
def store(tmp_path):
    arrays = example()
    return write_store(tmp_path / "store", **arrays), arrays


def write_header(path, header):
    """Give a .npy file another header, of whatever length."""
    head = header.encode()
    body = path.read_bytes()[128:]
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class TestImport:
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("rows_per_shard", [None, 1, 7])
    def test_finished_rows_keep_their_numbers_and_bits(self, tmp_path, dtype, rows_per_shard):
        arrays = example(dtype=dtype)
        arrays["margins"][arrays["_completed"].nonzero()[0][0], 1] = -0.0
        folder = write_store(tmp_path / "store", **arrays)
        study = import_store(folder, tmp_path / "study", rows_per_shard=rows_per_shard)
        done = arrays["_completed"]
        assert same_bits(study.masks[:], arrays["masks"][done])
        assert same_bits(study.outputs["margins"][:], arrays["margins"][done].astype(np.float32))
        numbers = np.concatenate([study.store.read(item).rows for item in study.items()])
        np.testing.assert_array_equal(numbers, np.flatnonzero(done))

    def test_status_counts_finished_rows(self, tmp_path, store):
        folder, arrays = store
        status = import_store(folder, tmp_path / "study").status()
        count = int(arrays["_completed"].sum())
        assert (status.rows, status.absent_rows, status.complete) == (count, 40 - count, True)
        assert f"{count} of 40 rows" in status.summary()
        assert f"{40 - count} rows were not finished" in status.summary()

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_a_fit_is_that_of_the_finished_rows_alone(self, tmp_path, dtype):
        from sklearn.linear_model import LinearRegression

        arrays = example(rows=60, dtype=dtype)
        study = import_store(write_store(tmp_path / "store", **arrays), tmp_path / "study")
        found = coar.fit(study, coar.Ridge(penalties=0.0))
        done = arrays["_completed"]
        expected = LinearRegression().fit(arrays["masks"][done], arrays["margins"][done].astype(np.float64))
        np.testing.assert_allclose(found.weights, expected.coef_, atol=1e-4)
        np.testing.assert_allclose(found.intercept, expected.intercept_, atol=1e-4)

    def test_outputs_can_be_chosen_and_each_has_its_type(self, tmp_path, store):
        folder, arrays = store
        write_store(folder, losses=arrays["margins"].astype(np.float64)[:, :2])
        both = import_store(folder, tmp_path / "both")
        assert {name: output.dtype for name, output in both.spec.outputs.items()} == {
            "losses": "float32",
            "margins": "float16",
        }
        one = import_store(folder, tmp_path / "one", outputs=["losses"])
        assert list(one.columns) == ["losses"]
        with refused(StoreError, "no output 'accuracy'", "losses, margins"):
            import_store(folder, tmp_path / "none", outputs=["accuracy"])

    def test_a_single_name_is_one_output(self, tmp_path, store):
        folder, arrays = store
        write_store(folder, losses=arrays["margins"])
        study = import_store(folder, tmp_path / "study", outputs="margins")
        assert list(study.columns) == ["margins"]
        again = export_store(import_store(folder, tmp_path / "both"), tmp_path / "again", "losses")
        assert sorted(files(again)) == ["_completed.npy", "losses.npy", "masks.npy"]

    def test_masks_that_keep_less_than_half_are_warned_of(self, tmp_path, store):
        folder, arrays = store
        kept = arrays["masks"][arrays["_completed"]].mean()
        assert kept > 0.5
        study = import_store(folder, tmp_path / "study")
        assert study.provenance["imported"]["kept_fraction"] == pytest.approx(kept)
        write_store(folder, masks=~arrays["masks"])
        with pytest.warns(CoarWarning, match=f"keep {1 - kept:.1%}.*True means kept"):
            import_store(folder, tmp_path / "inverted")

    def test_masks_of_other_types_that_are_0_and_1_are_masks(self, tmp_path):
        arrays = example()
        expected = arrays["masks"][arrays["_completed"]]
        for dtype in ("uint8", "int64", "float32"):
            folder = write_store(tmp_path / dtype, **arrays | {"masks": arrays["masks"].astype(dtype)})
            assert same_bits(import_store(folder, tmp_path / f"{dtype} study").masks[:], expected)

    def test_equal_stores_are_equal_studies_however_they_are_cut(self, tmp_path, store):
        digests = {
            import_store(store[0], tmp_path / str(size), rows_per_shard=size).spec.digest for size in (3, 40)
        }
        assert len(digests) == 1
        write_store(store[0], margins=np.nextafter(store[1]["margins"], np.float16(100)))
        assert import_store(store[0], tmp_path / "other").spec.digest not in digests

    def test_an_import_that_is_refused_leaves_nothing(self, tmp_path, store):
        folder, arrays = store
        row = int(np.flatnonzero(arrays["_completed"])[-1])
        arrays["margins"][row, 2] = np.inf
        write_store(folder, margins=arrays["margins"])
        with refused(OutputError, f"row {row}, column 2", "margins.npy", "inf"):
            import_store(folder, tmp_path / "study")
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    def test_a_store_that_changes_meanwhile_is_refused(self, tmp_path, store, monkeypatch):
        from coar.interop import importing

        folder, arrays = store
        write = importing.write_head

        def disturb(*args):
            write_store(folder, margins=np.nan_to_num(arrays["margins"]) + np.float16(1))
            return write(*args)

        monkeypatch.setattr(importing, "write_head", disturb)
        with refused(StoreError, "changed while it was read"):
            import_store(folder, tmp_path / "study")
        assert not (tmp_path / "study").exists()

    def test_memory_does_not_grow_with_rows(self, tmp_path):
        peaks = []
        for rows in (2_000, 16_000):
            arrays = example(rows=rows, components=50, columns=200, dtype="float32")
            folder = write_store(tmp_path / f"store {rows}", **arrays)
            del arrays
            tracemalloc.start()
            import_store(folder, tmp_path / f"study {rows}", rows_per_shard=500)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.3 * peaks[0]


class TestUntouched:
    """Nobody stored the outputs with every component kept: what stands for them is said."""

    def told(self, study):
        return study.provenance["imported"]["untouched"]["margins"]

    def test_float16_is_stored_as_it_was(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        assert "zeros" in self.told(study)
        assert not study.untouched["margins"].any()

    def test_a_row_that_keeps_everything_is_what_is_needed(self, tmp_path):
        arrays = example(dtype="float32")
        row = int(np.flatnonzero(arrays["_completed"])[3])
        arrays["masks"][row] = True
        arrays["masks"][arrays["_completed"] & (np.arange(40) < row), 0] = False
        study = import_store(write_store(tmp_path / "store", **arrays), tmp_path / "study")
        assert f"row {row}," in self.told(study)
        np.testing.assert_array_equal(study.untouched["margins"], arrays["margins"][row])

    def test_else_the_mean_of_the_first_rows_keeps_sums_small(self, tmp_path):
        arrays = example(rows=600, dtype="float32", finished=0.9)
        arrays["masks"][:, 0] = False
        arrays["margins"] += 1e4
        study = import_store(write_store(tmp_path / "store", **arrays), tmp_path / "s", rows_per_shard=90)
        first = np.flatnonzero(arrays["_completed"])[:256]
        expected = arrays["margins"][first].astype(np.float64).mean(axis=0)
        assert "mean of the first 256" in self.told(study)
        np.testing.assert_allclose(study.untouched["margins"], expected, rtol=1e-7)


class TestNames:
    def test_default_to_numbers_that_belong_to_the_store(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        assert study.components.names == tuple("0123456")
        assert study.columns["margins"].names == ("0", "1", "2")
        assert study.components.source == {"store": study.provenance["fingerprint"]["store"]}

    def test_come_from_lists_and_text_files(self, tmp_path, store):
        names = [f"conv1 [{i}]" for i in range(7)]
        (tmp_path / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        by_file = import_store(
            store[0], tmp_path / "a", components=tmp_path / "names.txt", columns=["x", "y", "z"]
        )
        by_list = import_store(
            store[0], tmp_path / "b", components=names, columns={"margins": ["x", "y", "z"]}
        )
        assert by_file.components.names == tuple(names)
        assert by_file.columns["margins"].names == ("x", "y", "z")
        assert by_file.components == by_list.components
        assert coar.fit(by_file).components == by_list.components

    def test_the_axis_of_an_experiment_makes_attributions_that_it_accepts(self, tmp_path):
        experiment, _ = linear_experiment(num_components=7, num_examples=3)
        folder = write_store(tmp_path / "store", **example())
        axes = {"components": experiment.components, "columns": experiment.columns["score"]}
        study = import_store(folder, tmp_path / "study", **axes)
        coar.fit(study).components.require_same(experiment.components, "attributions", "experiment")
        again = coar.Study.open(tmp_path / "study").experiment
        assert again.components == experiment.components
        assert again.columns["margins"] == experiment.columns["score"]

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ({"components": ["a"] * 7}, ["unique", "'a'"]),
            ({"components": ["a", "b"]}, ["7 components", "2 components"]),
            ({"columns": Axis("components", ["a", "b", "c"], {})}, ["3 columns", "3 components"]),
            ({"columns": {"losses": ["a"]}}, ["unknown output", "losses"]),
        ],
    )
    def test_that_do_not_fit_are_refused(self, tmp_path, store, names, words):
        with refused(AxisError, *words):
            import_store(store[0], tmp_path / "study", **names)

    def test_that_cannot_be_read_are_refused(self, tmp_path, store):
        (tmp_path / "names").write_bytes(b"\xff\xfe\xff")
        for path in ("names", "nowhere"):
            with refused(StoreError, path, "one name per line"):
                import_store(store[0], tmp_path / "study", components=tmp_path / path)


class TestWhatCannotBeDone:
    """The model is not there: what needs it says so."""

    def test_the_experiment_knows_its_axes_and_refuses_to_run(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        experiment = build_experiment(study.spec)
        assert isinstance(experiment, ImportedRows)
        assert can_rebuild(experiment)
        assert experiment.components == study.components
        assert experiment.columns == study.columns
        with refused(StudyError, "imported", "ComponentAblation"):
            check_experiment(experiment)
        with refused(StudyError, "no model"):
            coar.evaluate(experiment, {"ridge": coar.fit(study)}, [0.1], 3)

    def test_running_has_nothing_to_do_and_a_lost_shard_cannot_be_redone(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study", rows_per_shard=10)
        assert study.run(progress=False).complete
        study.store.path(2).unlink()
        assert not study.status().complete
        with refused(StudyError, "imported", "import again"):
            study.run(progress=False)

    def test_rows_cannot_be_added_nor_masks_drawn(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        with refused(SettingError, "imported study", "40 rows", "import again"):
            study.extend(50)
        assert study.status().num_rows == 40
        with refused(SettingError, "cannot be drawn again"):
            study.spec.design.masks([3], 7)

    def test_a_folder_that_holds_something_is_left_alone(self, tmp_path, store):
        import_store(store[0], tmp_path / "study")
        with refused(StudyError, "not empty", "spec.json"):
            import_store(store[0], tmp_path / "study")


SPEC = {
    "num_models": 40,
    "schema": {"masks": {"dtype": "bool_", "shape": [7]}, "margins": {"dtype": "float16", "shape": [3]}},
}


class TestSpec:
    def write(self, tmp_path, path=(), value=None):
        spec = json.loads(json.dumps(SPEC))
        part = spec
        for key in path[:-1]:
            part = part[key]
        if path and value is None:
            del part[path[-1]]
        elif path:
            part[path[-1]] = value
        (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        return tmp_path / "spec.json"

    def test_that_fits_is_accepted(self, tmp_path, store):
        assert import_store(store[0], tmp_path / "study", spec=self.write(tmp_path)).status().complete

    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            (("num_models",), 41, ["masks.npy", "'num_models'", "(41, 7)", "(40, 7)"]),
            (("num_models",), True, ["'num_models'"]),
            (("num_models",), None, ["'num_models'", "nothing"]),
            (("schema",), [], ["'schema'"]),
            (("schema", "masks", "shape"), [8], ["masks.npy", "schema.masks.shape"]),
            (("schema", "masks", "shape"), 7, ["schema.masks.shape", "list"]),
            (("schema", "margins", "dtype"), "float32", ["margins.npy", "schema.margins.dtype", "float16"]),
            (("schema", "margins", "dtype"), "os.system", ["schema.margins.dtype", "os.system"]),
            (("schema", "margins", "dtype"), 16, ["schema.margins.dtype"]),
            (("schema", "margins", "dtype"), "object_", ["schema.margins.dtype"]),
            (("schema", "margins"), None, ["schema.margins", "margins.npy"]),
            (("schema", "masks"), None, ["schema.masks"]),
            (("schema", "margins", "shape"), None, ["schema.margins", "shape"]),
            (("schema", "_completed"), {"dtype": "bool_", "shape": []}, ["schema._completed"]),
        ],
    )
    def test_that_does_not_is_refused_naming_file_and_key(self, tmp_path, store, path, value, words):
        with refused(StoreError, "spec.json", *words):
            import_store(store[0], tmp_path / "study", spec=self.write(tmp_path, path, value))

    def test_of_this_package_is_recognised(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        with refused(StoreError, "not a spec of the original code", "a spec of this package"):
            import_store(store[0], tmp_path / "again", spec=study.directory / "spec.json")

    def test_that_is_no_json_is_refused(self, tmp_path, store):
        (tmp_path / "spec.json").write_text("num_models: 40", encoding="utf-8")
        with refused(StoreError, "spec.json", "JSON"):
            import_store(store[0], tmp_path / "study", spec=tmp_path / "spec.json")


class TestBadStores:
    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("_completed", None, ["_completed.npy is missing"]),
            ("masks", None, ["masks.npy is missing", "True = kept", "margins.npy"]),
            ("margins", None, ["no outputs", "test_margins.npy"]),
            ("_completed", lambda a: a[:-1], ["_completed.npy", "(40,)", "(39,)"]),
            ("_completed", lambda a: a[:, None], ["_completed.npy", "(40,)"]),
            ("_completed", lambda a: a & False, ["no row", "40 rows"]),
            ("_completed", lambda a: a * 2, ["_completed.npy", "neither 0 nor 1", "row"]),
            ("margins", lambda a: a[:-1], ["margins.npy", "rows as in masks.npy", "(39, 3)"]),
            ("margins", lambda a: a[:, 0], ["margins.npy", "(40,)"]),
            ("margins", lambda a: a[:, :, None], ["margins.npy", "(40, 3, 1)"]),
            ("margins", lambda a: a[:, :0], ["margins.npy", "(40, 0)"]),
            ("margins", lambda a: a > 0, ["margins.npy", "float16", "bool"]),
            ("margins", lambda a: (a > 0).astype(int), ["margins.npy", "int64"]),
            ("margins", lambda a: a.astype(complex), ["margins.npy", "complex"]),
            ("margins", lambda a: a.astype("f8") * 1e300, ["margins.npy", "row", "column 0", "finite"]),
            ("margins", lambda a: a * np.float16(np.nan), ["margins.npy", "row", "column 0", "nan"]),
            ("masks", lambda a: a * 2, ["masks.npy", "neither 0 nor 1", "component", "2"]),
            ("masks", lambda a: a * 0.5, ["masks.npy", "neither 0 nor 1", "0.5"]),
            ("masks", lambda a: (a * 3).astype("u1").view(bool), ["masks.npy", "neither 0 nor 1", "3"]),
            ("masks", lambda a: a[:, 0], ["masks.npy", "(40,)"]),
            ("masks", lambda a: a[0, 0], ["masks.npy", "()"]),
            ("masks", lambda a: a.astype("S1"), ["masks.npy", "bool or numbers"]),
        ],
    )
    def test_are_refused_with_what_is_wrong(self, tmp_path, name, change, words):
        arrays = example()
        folder = write_store(tmp_path / "store", **{k: v for k, v in arrays.items() if k != name})
        if change is not None:
            with np.errstate(invalid="ignore"):
                np.save(folder / f"{name}.npy", change(arrays[name]))
        with refused(CoarError, *words):
            import_store(folder, tmp_path / "study")
        assert not (tmp_path / "study").exists()

    @pytest.mark.parametrize(
        ("name", "array", "words"),
        [
            ("indices", np.arange(40), ["(40,)", "reshape(40, 1)"]),
            ("labels", np.zeros((40, 2), int), ["int64"]),
            ("names", np.array([{}] * 40), ["not a readable array"]),
            ("a copy", np.zeros((40, 3), "f2"), ["file name"]),
        ],
    )
    def test_an_array_that_is_no_output_is_told_how_to_leave_it_out(
        self, tmp_path, store, name, array, words
    ):
        np.save(store[0] / f"{name}.npy", array, allow_pickle=True)
        advice = ["move it away", "import_store(outputs=['margins'])", "--output margins"]
        with refused(CoarError, name, *words, *advice):
            import_store(store[0], tmp_path / "study")
        assert list(import_store(store[0], tmp_path / "study", outputs=["margins"]).columns) == ["margins"]

    def test_an_output_that_was_asked_for_is_not_to_be_moved_away(self, tmp_path, store):
        np.save(store[0] / "losses.npy", np.zeros(40, "f2"))
        with pytest.raises(StoreError, match="reshape") as caught:
            import_store(store[0], tmp_path / "study", outputs=["losses", "margins"])
        assert "move it away" not in str(caught.value)

    def test_a_study_is_no_store(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        with refused(StoreError, "is a study of coar already", "coar status"):
            import_store(study.directory, tmp_path / "again")

    def test_pickled_objects_are_not_opened(self, tmp_path, store):
        np.save(store[0] / "margins.npy", np.array([{"a": 1}] * 40, dtype=object), allow_pickle=True)
        with refused(StoreError, "margins.npy", "not a readable array"):
            import_store(store[0], tmp_path / "study")

    def test_an_archive_is_no_array(self, tmp_path, store):
        with (store[0] / "margins.npy").open("wb") as file:
            np.savez(file, margins=store[1]["margins"])
        with refused(StoreError, "margins.npy", "not a readable array"):
            import_store(store[0], tmp_path / "study")

    def test_no_folder_and_a_file_are_refused(self, tmp_path):
        with refused(StoreError, "nowhere", "nothing"):
            import_store(tmp_path / "nowhere", tmp_path / "study")
        (tmp_path / "file").touch()
        with refused(StoreError, "file", "a file"):
            import_store(tmp_path / "file", tmp_path / "study")

    @pytest.mark.parametrize(
        "header",
        [
            "{'descr': '<f2', 'fortran_order': False, 'shape': (40, 3), }}",
            "{'descr': '<f2', 'fortran_order': False, 'shape': (40, 3), ",
            "{'descr': '<f2', 'fortran_order': False, 'shape': (40, '''",
            "{'descr': '<f2', 'fortran_order': False, 'shape': (40, 3), 3: 4}",
            "{'descr': '<f2', 'fortran_order': False, 'shape': (40, 3), []: 4}",
            "{'descr': '<f2', 'fortran_order': False, 'shape': (40, '\\N{')}",
            "{'descr': [[]], 'fortran_order': False, 'shape': (40, 3)}",
            "{'descr': '<f2', 'fortran_order': False, 'shape': (-40, 3)}",
        ],
    )
    def test_headers_that_are_no_literals_are_named_errors(self, tmp_path, store, header):
        write_header(store[0] / "margins.npy", header)
        with refused(StoreError, "margins.npy", "not a readable array"):
            import_store(store[0], tmp_path / "study")
        assert not (tmp_path / "study").exists()

    @given(data=st.data())
    def test_any_header_gives_an_array_or_a_named_error(self, tmp_path_factory, data):
        folder = write_store(tmp_path_factory.mktemp("fuzz"), **example(rows=6, columns=2))
        header = "{'descr': '<f2', 'fortran_order': False, 'shape': (6, 2), }"
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(header)))
            stop = start + data.draw(st.integers(0, 3))
            piece = data.draw(st.text("(){}[],:'\"\\\n #<>fOVb026-+jLN{e", max_size=3))
            header = header[:start] + piece + header[stop:]
        write_header(folder / "margins.npy", header)
        try:
            rows = OriginalStore(folder).read(0, 6)
        except CoarError:
            return
        assert rows.outputs["margins"].shape[1] > 0

    @given(data=st.data())
    def test_damaged_headers_are_named_errors(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("fuzz")
        write_store(folder / "store", **example(rows=6, columns=2))
        name = data.draw(st.sampled_from(["_completed", "masks", "margins"]))
        path = folder / "store" / f"{name}.npy"
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            study = import_store(folder / "store", folder / "study")
        except CoarError:
            return
        assert study.masks.shape[1] == len(study.components)


class TestExport:
    def test_is_what_the_original_opens(self, tmp_path):
        experiment = SubsetMean()
        study = coar.Study.create(
            tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.3), 20, rows_per_shard=6
        )
        study.run(progress=False)
        study.store.path(1).unlink()
        folder = export_store(study, tmp_path / "store")
        assert sorted(files(folder)) == ["_completed.npy", "masks.npy", "mean.npy"]
        found = {
            n: np.lib.format.open_memmap(folder / f"{n}.npy", mode="r")
            for n in ("_completed", "masks", "mean")
        }
        expected = np.ones(20, dtype=bool)
        expected[6:12] = False
        assert same_bits(np.array(found["_completed"]), expected)
        assert same_bits(found["masks"][expected], study.masks[:])
        assert same_bits(found["mean"][expected], study.outputs["mean"][:])
        assert not found["masks"][~expected].any()
        assert not found["mean"][~expected].any()

    def test_failed_rows_are_not_finished(self, tmp_path):
        from tests.test_study import Sometimes

        study = coar.Study.create(
            tmp_path / "s",
            Sometimes(np.nan, when=lambda mask: not mask[0]),
            coar.Bernoulli(ablation_fraction=0.3, seed=2),
            20,
        )
        with pytest.raises(OutputError):
            study.run(progress=False)
        folder = export_store(study, tmp_path / "store")
        failed = list(study.status().failed_rows)
        np.testing.assert_array_equal(np.flatnonzero(~np.load(folder / "_completed.npy")), failed)
        assert not np.load(folder / "mean.npy")[failed].any()

    def test_float16_is_written_in_output_units(self, tmp_path):
        study = coar.Study.create(
            tmp_path / "s", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 9, dtypes={"mean": "float16"}
        )
        study.run(progress=False)
        found = np.load(export_store(study, tmp_path / "store") / "mean.npy")
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, study.outputs["mean"][:].astype(np.float16))

    def test_float16_that_overflows_in_output_units_is_refused(self, tmp_path):
        experiment = SubsetMean()
        experiment.values[:, 4] += 1e5
        study = coar.Study.create(
            tmp_path / "s", experiment, coar.Bernoulli(ablation_fraction=0.3), 9, dtypes={"mean": "float16"}
        )
        study.run(progress=False)
        with refused(OutputError, "row 0", "feature 4", "65504", ".beton"):
            export_store(study, tmp_path / "store")
        assert not (tmp_path / "store").exists()

    def test_a_folder_in_use_is_left_alone(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        before = files(store[0])
        with refused(StudyError, "not empty"):
            export_store(study, store[0])
        assert files(store[0]) == before

    @pytest.mark.parametrize("export", [export_store, export_beton])
    def test_a_path_is_no_study(self, tmp_path, store, export):
        study = import_store(store[0], tmp_path / "study")
        for path in (study.directory, str(study.directory)):
            with refused(SettingError, "open it first", f"coar.Study.open({str(study.directory)!r})"):
                export(path, tmp_path / "target")

    def test_names_that_belong_to_the_other_layout_are_refused(self, tmp_path, store):
        study = import_store(store[0], tmp_path / "study")
        for name in ("a.beton", "a.npz", "a.npy"):
            with refused(SettingError, name, "is a folder", "--layout beton"):
                export_store(study, tmp_path / name)
        for name in ("a", "a.npz"):
            with refused(SettingError, name, "ends in .beton", "--layout original"):
                export_beton(study, tmp_path / name)
        assert not list(tmp_path.glob("a*"))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:the masks of:coar.errors.CoarWarning")  # small ones may keep few
    @given(
        rows=st.integers(1, 30),
        components=st.integers(1, 20),
        columns=st.integers(1, 6),
        dtype=st.sampled_from(["float16", "float32"]),
        finished=st.sampled_from([0.0, 0.5, 1.0]),
        size=st.integers(1, 12),
        seed=st.integers(0, 99),
    )
    def test_export_import_export_is_exact(
        self, tmp_path_factory, rows, components, columns, dtype, finished, size, seed
    ):
        folder = tmp_path_factory.mktemp("trip")
        arrays = example(rows, components, columns, dtype, seed, finished)
        write_store(folder / "a", **arrays)
        one = import_store(folder / "a", folder / "study 1", rows_per_shard=size)
        export_store(one, folder / "b")
        two = import_store(folder / "b", folder / "study 2")
        export_store(two, folder / "c")
        assert files(folder / "b") == files(folder / "c")
        done = arrays["_completed"]
        assert same_bits(np.load(folder / "b" / "margins.npy")[done], arrays["margins"][done])
        assert same_bits(np.load(folder / "b" / "masks.npy")[done], arrays["masks"][done])
        assert same_bits(np.load(folder / "b" / "_completed.npy"), done)
        assert one.spec.digest == two.spec.digest
