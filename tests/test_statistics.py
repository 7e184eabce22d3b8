"""Statistics: the same for any shards, parts and interruptions; kept between fits; refused when damaged."""

import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coar
from coar.errors import CoarWarning, FitError, OutputError, SettingError, StoreError
from coar.regression import collection, sums
from coar.regression.problem import ArrayRows, Problem
from coar.regression.statistics import MaskStatistics
from coar.regression.study_rows import StudyRows
from coar.store import Store
from coar.testing import SubsetMean

DESIGN = coar.Bernoulli(ablation_fraction=0.3, seed=2)
EVERYTHING = slice(0, 6)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows and ranges of 64, so that a few hundred rows have many of both."""
    for module in ("collection", "problem", "study_rows"):
        monkeypatch.setattr(f"coar.regression.{module}.BLOCK_ROWS", 16)
    monkeypatch.setattr("coar.regression.collection.RANGE_ROWS", 64)


def make_study(path, num_rows, rows_per_shard=30):
    experiment = SubsetMean()
    study = coar.Study.create(path, experiment, DESIGN, num_rows, rows_per_shard=rows_per_shard)
    study.run(progress=False)
    return study


def problem_of(study, held_out=0, keep=False):
    return Problem(StudyRows(study, "mean", np.arange(6), keep), held_out)


def arrays_of(problem, part="all"):
    masks, outputs = problem.masks(part), problem.outputs(EVERYTHING, part)
    return [masks.rows, masks.counts, masks.gram, outputs.cross, outputs.total, outputs.squares]


def require_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def slow(masks, outputs, shift):
    """The definitions, in float64."""
    masks, shifted = masks.astype(np.float64), outputs.astype(np.float64) - shift
    sums = [masks.T @ masks, masks.T @ shifted, shifted.sum(axis=0), (shifted**2).sum(axis=0)]
    return [len(masks), masks.sum(axis=0), *sums]


def require_close(ours, expected, shifted_size):
    require_equal(ours[:3], expected[:3])
    for mine, other in zip(ours[3:], expected[3:], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6 * shifted_size)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 90), st.integers(1, 12), st.integers(0, 6), st.integers(0, 99))
def test_they_are_the_definitions(rows, components, held_out, seed):
    held_out = 0 if held_out < 2 else held_out
    rng = np.random.default_rng(seed)
    masks, outputs = rng.random((rows, components)) < 0.8, rng.normal(size=(rows, 6)).astype(np.float32)
    problem = Problem.from_arrays(masks, outputs, held_out)
    shift = outputs[0].astype(np.float64)
    require_close(arrays_of(problem), slow(masks, outputs, shift), rows * 4)
    if held_out:
        away = np.arange(rows) % held_out == held_out - 1
        require_close(arrays_of(problem, "held_out"), slow(masks[away], outputs[away], shift), rows * 4)
        require_close(arrays_of(problem, "train"), slow(masks[~away], outputs[~away], shift), rows * 4)


@pytest.mark.usefixtures("small_blocks")
def test_parts_add_up_to_all_bit_by_bit(tmp_path):
    study = make_study(tmp_path / "s", 300)
    require_equal(arrays_of(problem_of(study, held_out=7)), arrays_of(problem_of(study)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("held_out", [0, 7])
def test_shards_of_any_size_give_the_same_bits(tmp_path, held_out):
    sizes = (1, 13, 64, 300)
    studies = [make_study(tmp_path / str(size), 300, size) for size in sizes]
    first, *others = [arrays_of(problem_of(study, held_out)) for study in studies]
    for other in others:
        require_equal(other, first)


def test_threads_do_not_matter(tmp_path):
    study = make_study(tmp_path / "s", 300)
    found = arrays_of(problem_of(study))
    try:
        torch.set_num_threads(2)
        require_equal(arrays_of(problem_of(study)), found)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("small_blocks")
class TestKept:
    """Sums that stay in the study."""

    def count_reads(self, monkeypatch):
        reads = []
        original = Store.read

        def read(store, item):
            reads.append(item.start)
            return original(store, item)

        monkeypatch.setattr(Store, "read", read)
        return reads

    @pytest.mark.parametrize("held_out", [0, 7])
    def test_a_second_fit_reads_only_the_rows_of_the_last_block(self, tmp_path, monkeypatch, held_out):
        study = make_study(tmp_path / "s", 300)
        fresh = arrays_of(problem_of(study, held_out))
        require_equal(arrays_of(problem_of(study, held_out, keep=True)), fresh)
        reads = self.count_reads(monkeypatch)
        require_equal(arrays_of(problem_of(study, held_out, keep=True)), fresh)
        assert reads == [270]  # rows 288 to 300 are no whole block

    @pytest.mark.parametrize("first", [20, 64, 100, 200])
    def test_new_rows_continue_the_sums_bit_by_bit(self, tmp_path, monkeypatch, first):
        study = make_study(tmp_path / "s", first)
        arrays_of(problem_of(study, keep=True))
        study.extend(300)
        study.run(progress=False)
        fresh = arrays_of(problem_of(study))
        reads = self.count_reads(monkeypatch)
        require_equal(arrays_of(problem_of(study, keep=True)), fresh)
        assert min(reads) >= first - 30
        starts = [path.name.split("-")[2] for path in (study.directory / "statistics").glob("masks-*")]
        assert len(starts) == len(set(starts)), "a shorter range is deleted when a longer one is written"

    def test_other_rows_of_a_shard_that_is_missing_are_not_kept(self, tmp_path):
        study = make_study(tmp_path / "s", 300)
        study.store.path(4).unlink()  # rows 120 to 150
        problem = problem_of(study, keep=True)
        require_equal(arrays_of(problem), arrays_of(problem_of(study)))
        ends = {int(p.stem.split("-")[3]) for p in (study.directory / "statistics").glob("masks-*")}
        assert ends == {64, 112}
        study.run(progress=False)
        require_equal(arrays_of(problem_of(study, keep=True)), arrays_of(problem_of(study)))

    def test_another_output_shares_the_products_of_masks(self, tmp_path):
        study = make_study(tmp_path / "s", 300)
        arrays_of(problem_of(study, keep=True))
        some = Problem(StudyRows(study, "mean", np.array([3, 1]), True))
        np.testing.assert_array_equal(
            some.outputs(slice(0, 2)).cross, problem_of(study).outputs(EVERYTHING).cross[:, [3, 1]]
        )
        masks = {p.name.split("-")[1] for p in (study.directory / "statistics").glob("masks-*")}
        assert len(masks) == 1

    @pytest.mark.parametrize("columns", [[0, 2, 1, 3], [0, 3, 5], [5, 4, 3], [0, 4, 2, 3]])
    def test_sums_of_other_columns_are_not_taken(self, tmp_path, columns):
        study = make_study(tmp_path / "s", 300)
        coar.fit(study), coar.fit(study, columns=[0, 1, 2, 3])
        whole = coar.fit(study, keep_statistics=False)
        np.testing.assert_allclose(coar.fit(study, columns=columns).weights, whole.rows(columns), rtol=1e-6)

    def test_sums_of_rows_that_were_redone_are_not_taken(self, tmp_path):
        """Rows that had failed are computed after all: their shards are others, and so are the sums."""
        study = make_study(tmp_path / "s", 300)
        item = study.items()[2]
        shard = study.store.read(item)
        few = type(shard)(shard.rows[5:], shard.masks[5:], {k: v[5:] for k, v in shard.outputs.items()}, {})
        study.store.path(2).unlink()
        study.store.write(item, few)
        assert problem_of(study, keep=True).masks().rows == 295
        study.store.path(2).unlink()
        study.run(progress=False)
        require_equal(arrays_of(problem_of(study, keep=True)), arrays_of(problem_of(study)))
        assert problem_of(study, keep=True).masks().rows == 300

    def test_a_shard_that_is_lost_after_a_fit_is_not_half_remembered(self, tmp_path):
        study = make_study(tmp_path / "s", 300)
        coar.fit(study, columns=[0, 1, 2])
        study.store.path(0).unlink()
        found = coar.fit(study, columns=[3, 4], partial=True)
        assert found.provenance["rows"] == 270
        fresh = coar.fit(study, columns=[3, 4], partial=True, keep_statistics=False)
        np.testing.assert_array_equal(found.weights, fresh.weights)

    def test_a_file_that_another_process_replaces_meanwhile_is_looked_for_again(self, tmp_path, monkeypatch):
        study = make_study(tmp_path / "s", 300)
        expected = arrays_of(problem_of(study, keep=True))
        original, gone = sums._load, []

        def load(path, arrays=True):
            if not gone:
                gone.append(path)
                raise FileNotFoundError(path)
            return original(path, arrays)

        monkeypatch.setattr(sums, "_load", load)
        require_equal(arrays_of(problem_of(study, keep=True)), expected)
        assert gone

    def test_a_study_that_cannot_be_written_to_is_fitted_all_the_same(self, tmp_path):
        study = make_study(tmp_path / "s", 300)
        (study.directory / "statistics").write_text("not a folder")
        with pytest.warns(CoarWarning, match="not kept"):
            found = coar.fit(study)
        np.testing.assert_array_equal(found.weights, coar.fit(study, keep_statistics=False).weights)

    def test_what_a_killed_writer_left_is_removed(self, tmp_path):
        study = make_study(tmp_path / "s", 300)
        arrays_of(problem_of(study, keep=True))
        left = study.directory / "statistics" / f"x.partial-{socket.gethostname()}-999999999-{'0' * 32}"
        left.write_text("half")
        arrays_of(problem_of(study, keep=True))
        assert not left.exists()

    def test_damage_is_named_and_refused(self, tmp_path):
        study = make_study(tmp_path / "s", 300)
        arrays_of(problem_of(study, keep=True))
        path = min((study.directory / "statistics").glob("masks-*"))
        content = path.read_bytes()
        for damaged in (content[:-5], content[:-1] + bytes([content[-1] ^ 1]), b"", content[:200]):
            path.write_bytes(damaged)
            with pytest.raises(StoreError, match=path.name):
                arrays_of(problem_of(study, keep=True))
        path.unlink()
        require_equal(arrays_of(problem_of(study, keep=True)), arrays_of(problem_of(study)))

    def test_those_of_another_study_are_refused(self, tmp_path):
        ours, other = (
            make_study(tmp_path / "a", 300),
            coar.Study.create(
                tmp_path / "b", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3, seed=3), 300
            ),
        )
        other.run(progress=False)
        arrays_of(problem_of(other, keep=True))
        (tmp_path / "b/statistics").rename(tmp_path / "a/statistics")
        with pytest.raises(StoreError, match="another study"):
            arrays_of(problem_of(ours, keep=True))

    def test_too_large_sums_are_not_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr("coar.regression.study_rows.KEPT_BYTES", 1000)
        study = make_study(tmp_path / "s", 300)
        arrays_of(problem_of(study, keep=True))
        assert not list((study.directory / "statistics").glob("masks-*"))


def test_a_row_that_comes_twice_is_named():
    masks, outputs = np.ones((6, 2), bool), np.zeros((6, 1))
    masks[0] = False
    rows = ArrayRows(masks, outputs, np.zeros(1), np.array([0, 1, 4, 5, 5, 7]))
    with pytest.raises(FitError, match="row 5 comes twice"):
        Problem(rows).masks()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_named(value):
    masks, outputs = np.random.default_rng(0).random((30, 4)) < 0.5, np.zeros((30, 3))
    outputs[17, 2] = value
    with pytest.raises(OutputError, match=r"row 17.*column 2"):
        Problem.from_arrays(masks, outputs).masks()


def test_what_does_not_belong_together_is_not_added():
    rng = np.random.default_rng(0)
    problems = [Problem.from_arrays(rng.random((30, n)) < 0.5, rng.normal(size=(30, 2))) for n in (4, 5, 4)]
    with pytest.raises(FitError, match="different components"):
        problems[0].masks() + problems[1].masks()
    with pytest.raises(FitError, match="shifts"):
        problems[0].outputs(slice(0, 2)) + problems[2].outputs(slice(0, 2))
    with pytest.raises(FitError, match="belong together"):
        Problem.from_arrays(np.ones((3, 2), bool), np.ones((4, 2)))
    with pytest.raises(SettingError, match="no such part"):
        problems[0].masks("validation")


def test_the_correlation_matrix_is_that_of_numpy():
    masks = np.random.default_rng(0).random((200, 30)) < 0.7
    masks[:, 7], masks[:, 9] = True, False
    found = MaskStatistics.from_gram(200, (masks.astype(np.int32).T @ masks)).correlation()
    varying = np.setdiff1d(np.arange(30), [7, 9])
    expected = np.corrcoef(masks[:, varying].astype(float).T)
    np.testing.assert_allclose(found[np.ix_(varying, varying)], expected, atol=1e-14)
    np.testing.assert_array_equal(found[[7, 9]], np.eye(30)[[7, 9]])


def test_small_differences_to_a_large_untouched_output_are_not_rounded_away(tmp_path):
    """Stored as float16 differences: they are summed as such, not after adding 30,000 in float32."""
    from coar.regression.collection import BLOCK_ROWS
    from coar.rows import row_blocks

    study = coar.Study.create(tmp_path / "s", SubsetMean(), DESIGN, 60, dtypes={"mean": "float16"})
    study.run(progress=False)
    far = {"mean": np.full(6, 3e4, np.float32)}
    (block,) = row_blocks(study.store, study.finished(), "mean", far["mean"], BLOCK_ROWS)
    shards = [study.store.read(item) for item in study.finished()]
    stored = np.concatenate([shard.outputs["mean"] for shard in shards])
    np.testing.assert_array_equal(block.outputs - 3e4, (stored + np.float64(3e4)) - 3e4)
    np.testing.assert_allclose(block.outputs - 3e4, stored, atol=1e-11)


@pytest.mark.parametrize("values", [np.full((50, 3), 0.3), np.full((50, 3), 2), np.full((50, 3), np.nan)])
def test_masks_that_are_not_masks_are_refused(values):
    with pytest.raises(FitError, match="0 or 1"):
        Problem.from_arrays(values, np.zeros((50, 1)))
    ones = np.random.default_rng(0).integers(2, size=(50, 3))
    assert Problem.from_arrays(ones, np.zeros((50, 1))).masks().rows == 50


def test_many_columns_and_few_components_stay_within_the_budget():
    problem = Problem.from_arrays(np.zeros((2048, 10), bool), np.zeros((2048, 4000)), budget=2**28)
    assert max(s.stop - s.start for s in problem.column_slices) * 2048 * 25 < 2**28 / 8


def test_held_out_rows_go_by_their_number():
    assert np.flatnonzero(collection.is_held_out(np.arange(30), 10)).tolist() == [9, 19, 29]
