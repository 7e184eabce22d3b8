"""Fit files: ours round trip between YAML and JSON, the original's are translated, bad ones are named."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import coar
from coar.errors import CoarWarning, SettingError, SpecError, StoreError, StudyError
from coar.regression.fast_l1 import FastL1
from coar.regression.fit_file import SOLVERS, Auto, FitSettings, load
from coar.regression.fit_file_run import fit_with
from coar.regression.fit_file_summary import fit_summary
from coar.regression.fit_file_text import MAX_BYTES, read_text, write_text
from coar.regression.lasso import Lasso
from coar.regression.ridge import Ridge
from coar.saved_attributions import by_columns, saved_attributions, saved_names
from coar.testing.toys import SubsetMean
from tests.conftest import require_or_skip

EXAMPLES = sorted((Path(__file__).parents[1] / "specs" / "fit").glob("*.yaml"))
# With the keys of the published files, in their order.
ORIGINAL = """
data:
  data_path: ~
  num_train: 45000
  num_val: 5000
cfg:
  out_dir: ~
  num_workers: 8
  k: 1
  batch_size: 2500
  lr: 1e-3
  eps: 1e-4
  true_random: true
  manual_max_lambda: 0
early_stopping:
  check_every: 3
  eps: 1e-10
"""

share = st.floats(1e-12, 1, exclude_max=True)
positive = st.floats(1e-12, 1e12)
solvers = st.one_of(
    st.builds(Auto),
    st.builds(
        Ridge,
        penalties=positive | st.lists(positive, min_size=1, max_size=3).map(tuple),
        choose=st.sampled_from(["gcv", "loo"]),
        errors=st.booleans(),
        tolerance=share,
    ),
    st.builds(Lasso, num_penalties=st.integers(2, 200), smallest=share, held_out=st.integers(2, 50)),
    st.builds(
        FastL1,
        num_penalties=st.sampled_from([0, 2, 100]),
        learning_rate=positive | st.just("auto"),
        together=st.booleans(),
    ),
)
columns = st.none() | st.tuples(st.integers(0, 99), st.none() | st.integers(100, 2**40))
settings = st.builds(
    FitSettings,
    solver=solvers,
    output=st.none() | st.text(max_size=20),
    columns=columns,
    memory=st.none() | st.integers(2**20, 2**60) | st.sampled_from(["8 GiB", "1.5 TB", "7g"]),
    save_as=st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
    notes=st.lists(st.text(max_size=20), max_size=2).map(tuple),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write(folder, text, name="fit.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def original(tmp_path, changes=(), fast_l1=False):
    """The published file, lines replaced, read; settings and the text of its warning."""
    text = ORIGINAL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    with pytest.warns(CoarWarning, match="regression file of the published code") as caught:
        found = load(write(tmp_path, text), fast_l1)
    assert len(caught) == 1
    return found, str(caught[0].message)


class TestRoundTrips:
    @given(settings)
    def test_yaml_and_json_say_the_same(self, tmp_path_factory, found):
        folder = tmp_path_factory.mktemp("fit")
        for ending in ("yaml", "json", "yml"):
            found.save(folder / f"fit.{ending}")
            again = load(folder / f"fit.{ending}")
            assert again == found
            assert type(again.solver) is type(found.solver)

    @given(plain)
    def test_text_of_any_plain_value(self, tmp_path_factory, value):
        folder = tmp_path_factory.mktemp("text")
        for name in ("value.yaml", "value.json"):
            write_text(value, folder / name)
            again = read_text(folder / name)
            assert json.dumps(again) == json.dumps(value)

    @pytest.mark.parametrize(
        "text", ["no", "1e-3", "0o17", "1:30", "2020-01-01", "null", "~", "<<", "on", "1_000"]
    )
    def test_text_that_looks_like_something_else_stays_text(self, tmp_path, text):
        FitSettings(output=text).save(tmp_path / "fit.yaml")
        assert load(tmp_path / "fit.yaml").output == text

    def test_numbers_are_what_they_look_like(self, tmp_path):
        text = "format: 1\nsolver: {name: ridge, penalties: [1e-3, 1E2, 5, .5, 010, +2.]}\noutput: no\n"
        found = load(write(tmp_path, text))
        assert found.solver.grid == (1e-3, 100.0, 5.0, 0.5, 10.0, 2.0)
        assert found.output == "no"


@pytest.fixture
def study(tmp_path):
    design = coar.Bernoulli(ablation_fraction=0.3, seed=0)
    found = coar.Study.create(tmp_path / "study", SubsetMean(4, 6), design, 60)
    found.run(progress=False)
    return found


class TestUse:
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
    def test_examples_are_valid_and_named_after_what_they_save(self, path):
        found = load(path)
        assert found.solver_setting().name == found.solver.name
        assert found.save_as in (None, found.solver.name, path.stem)

    def test_there_is_an_example_for_every_solver(self):
        require_or_skip("specs", bool(EXAMPLES), "an installation without specs/")
        assert {load(path).solver.name for path in EXAMPLES} == set(SOLVERS) - {"auto"}

    @pytest.mark.parametrize("solver", ["", "solver: auto\n", "solver: {name: auto}\n"])
    def test_auto_is_the_default(self, tmp_path, solver):
        assert load(write(tmp_path, f"format: 1\n{solver}")).solver_setting() == "auto"

    @pytest.mark.parametrize(
        ("columns", "expected"),
        [(None, None), ((2, 5), range(2, 5)), ((3, None), range(3, 7)), ((0, 7), range(7))],
    )
    def test_columns_are_positions(self, columns, expected):
        assert FitSettings(columns=columns).column_positions(7) == expected

    @pytest.mark.parametrize("columns", [(2, 8), (7, None)])
    def test_columns_beyond_the_last_are_refused(self, columns):
        with pytest.raises(SpecError, match=r"fit\.yaml: no such columns") as caught:
            FitSettings(columns=columns).column_positions(7, "fit.yaml")
        assert "columns: [START, STOP] with 0 <= START < STOP <= 7" in caught.value.expected

    def test_columns_and_rows_to_hold_out_name_the_keys_of_the_original(self):
        notes = ("data.num_val: read as a share", "data.target_end_ind: read as columns")
        found = FitSettings(solver=Lasso(held_out=90), columns=(0, 9), notes=notes)
        with pytest.raises(SpecError, match=r"x: no such columns \(data.target_end_ind\)"):
            found.column_positions(7, "x")
        with pytest.raises(SpecError, match=r"x: no row would be held out \(data.num_val\)"):
            found.require_held_out(89, "x")
        found.require_held_out(90)
        for solver in (Ridge(), Lasso(held_out=90, penalties=1.0), FastL1(held_out=90, num_penalties=0)):
            FitSettings(solver=solver).require_held_out(5)

    @pytest.mark.parametrize(
        ("text", "expected"), [("0:10", (0, 10)), (":10", (0, 10)), ("3:", (3, None)), (":", (0, None))]
    )
    def test_columns_may_be_text(self, tmp_path, text, expected):
        assert load(write(tmp_path, f'format: 1\ncolumns: "{text}"\n')).columns == expected

    def test_a_solver_may_be_given_by_name(self):
        assert FitSettings(solver="lasso") == FitSettings(solver=Lasso())
        with pytest.raises(SettingError, match="did you mean 'lasso'"):
            FitSettings(solver="laso")

    def test_arguments_go_before_the_file(self):
        found = FitSettings(
            solver=Ridge(penalties=0.5), output="loss", columns=(0, 5), save_as="half", notes=("x",)
        )
        assert found.changed({"solver": None, "output": "", "columns": None}) == found
        assert found.changed({"solver": "ridge", "save_as": "other"}).solver == Ridge(penalties=0.5)
        with pytest.warns(CoarWarning, match="--solver lasso replaces solver ridge of f: its penalties are"):
            changed = found.changed({"solver": "lasso", "columns": (2, None), "memory": "1 GiB"}, "f")
        assert changed.solver == Lasso()
        assert (changed.columns, changed.memory, changed.output) == ((2, None), "1 GiB", "loss")
        with pytest.raises(SpecError, match="arguments"):
            found.changed({"memory": "much"})

    def test_attributions_are_named_after_the_solver_unless_said_otherwise(self):
        names = [FitSettings(), FitSettings(solver=Lasso()), FitSettings(solver=FastL1(), save_as="gpu")]
        assert [found.name for found in names] == ["ridge", "lasso", "gpu"]

    def test_fits_as_asked(self, study):
        asked = FitSettings(solver=Ridge(penalties=0.0), columns=(1, 3), save_as="two", notes=("a remark",))
        found = fit_with(study, asked)
        expected = coar.fit(study, Ridge(penalties=0.0), columns=[1, 2])
        np.testing.assert_array_equal(found.weights, expected.weights)
        assert found.provenance["remarks"] == ["a remark"]
        assert study.attributions_path("two").exists()
        assert fit_with(study, FitSettings()).provenance["method"] == "ridge"

    def test_the_same_again_is_harmless_and_another_of_that_name_refused_at_once(self, study, monkeypatch):
        settings = FitSettings(solver=Ridge(penalties=0.5), columns=(1, 3), notes=("x",))
        first = fit_with(study, settings)
        np.testing.assert_array_equal(fit_with(study, settings).weights, first.weights)
        monkeypatch.setattr("coar.regression.fit_file_run.fit", None)  # nothing is fitted any more
        others = [
            ({"solver": {"name": "ridge", "penalties": 0.25}}, r"ridge \(penalties=0.25\), 60 rows"),
            ({"columns": (0, 2)}, "2 columns from 'feature 0', ridge, 60 rows"),
            ({"columns": (0, 3)}, "3 columns, ridge, 60 rows"),
            ({"notes": ("y",)}, "other remarks"),
        ]
        for change, expected in others:
            asked = FitSettings.from_json(settings.to_json() | change)
            with pytest.raises(StudyError, match=r"attributions 'ridge' exist: .* ridge.*60 rows") as caught:
                fit_with(study, asked)
            assert re.search(expected, caught.value.got)
            assert "--name NAME (save_as=)" in caught.value.todo
        study.extend(70)
        study.run(progress=False)
        with pytest.raises(StudyError) as caught:
            fit_with(study, settings)
        assert "70 rows" in caught.value.got

    def test_attributions_are_found_by_name(self, study):
        with pytest.raises(StoreError, match="no attributions in") as caught:
            saved_attributions(study)
        assert "coar fit" in caught.value.todo
        fit_with(study, FitSettings(save_as="b"))
        fit_with(study, FitSettings(save_as="a"))
        fit_with(study, FitSettings(save_as="part", columns=(0, 2)))
        (study.directory / "attributions" / "unfinished").mkdir()
        assert list(saved_attributions(study)) == saved_names(study) == ["a", "b", "part"]
        assert [list(group) for group in by_columns(saved_attributions(study))] == [["a", "b"], ["part"]]
        with pytest.raises(StoreError, match="no attributions 'c', 'd' in") as caught:
            saved_attributions(study, ["a", "c", "d"])
        assert caught.value.expected == "one of: a, b, part"

    def test_a_summary_counts_and_gives_medians(self, study):
        text = fit_summary(fit_with(study, FitSettings(solver=Lasso(penalties=1e9))), 60)
        assert "\npenalty: 1e+09\n" in text
        assert "nonzero weights: 0 of 4 components (median); 6 of 6 columns have none" in text
        text = fit_summary(fit_with(study, FitSettings(solver=Ridge(algorithm="conjugate_gradient"))), 90)
        assert re.search(r"penalty: \S+( \(median\), \S+ to \S+)? \(smallest squared error", text)
        assert "standard errors: none" in text
        assert "from 60 of 90 rows" in text

    def test_yaml_is_not_loaded_before_it_is_needed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)  # importing it is now an error
        path = write(tmp_path, '{"format": 1}', "fit.json")
        assert load(path) == FitSettings()


class TestOriginal:
    def test_the_published_file_is_least_squares_and_every_key_is_named(self, tmp_path):
        found, text = original(tmp_path)
        assert found.solver == Ridge(penalties=0.0)
        assert (found.columns, found.output, found.save_as) == (None, None, "fit")
        keys = (
            "data.num_train data.num_val cfg.num_workers cfg.k cfg.batch_size cfg.lr cfg.eps cfg.true_random"
        )
        keys = [*keys.split(), "cfg.manual_max_lambda", "early_stopping.check_every", "early_stopping.eps"]
        assert {note.split(": ")[0] for note in found.notes} == set(keys)
        first, second = text.splitlines()
        assert first.startswith(str(tmp_path / "fit.yaml"))
        assert first.endswith(" = ridge, penalties 0.0, all columns")
        ignored = second.removeprefix("ignored: ").removesuffix(" (reasons in the provenance)").split(", ")
        assert {*ignored, "cfg.k", "cfg.manual_max_lambda"} == set(keys)
        assert "cfg.lr: ignored: a step size" in "\n".join(found.notes)
        assert "cfg.k: read as least squares: no penalty" in "\n".join(found.notes)

    def test_a_path_becomes_a_lasso(self, tmp_path):
        changes = [("k: 1\n", "k: 100\n"), ("eps: 1e-4", "eps: 1e-6"), ("  manual_max_lambda: 0\n", "")]
        found, text = original(tmp_path, changes)
        assert found.solver == Lasso(num_penalties=100, smallest=1e-6, held_out=10)
        assert "= lasso, num_penalties 100, smallest 1e-06, held_out 10, all columns\n" in text
        notes = "\n".join(found.notes)
        assert "cfg.k: read as num_penalties" in notes
        assert "data.num_val: read as a share: every row number 10 is held out" in notes

    def test_one_penalty_from_the_data_is_least_squares_with_a_reservation(self, tmp_path):
        found, _ = original(tmp_path, [("manual_max_lambda: 0", "manual_max_lambda: -1")])
        assert found.solver == Ridge(penalties=0.0)
        assert "also tries its largest penalty" in "\n".join(found.notes)

    def test_a_penalty_given_is_that_of_all_columns(self, tmp_path):
        changes = [("manual_max_lambda: 0", "manual_max_lambda: 0.25")]
        found, _ = original(tmp_path, changes)
        assert found.solver == Lasso(penalties=0.25)
        assert "the original also tries none" in "\n".join(found.notes)
        with pytest.raises(SpecError, match="manual_max_lambda"):
            load(tmp_path / "fit.yaml", fast_l1=True)

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0, -1, None),
            (5, -1, (5, None)),
            (0, 10, (0, 10)),
            (5, 10, (5, 10)),
            (None, 10, (0, 10)),
            (5, None, (5, None)),
        ],
    )
    def test_a_slice_of_targets_becomes_columns(self, tmp_path, start, end, expected):
        given = [("start", start), ("end", end)]
        lines = "".join(f"  target_{name}_ind: {x}\n" for name, x in given if x is not None)
        found, text = original(tmp_path, [("  num_train", f"{lines}  num_train")])
        assert found.columns == expected
        assert "\n".join(found.notes).count("read as columns") == lines.count("\n")
        start, stop = expected or (None, None)
        shown = f"columns {start} to {stop or 'the last'}" if expected else "all columns"
        assert text.splitlines()[0].endswith(f", {shown}")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("cifar (1).yaml", "cifar-1-"), ("_x.yaml", "x"), ("a.b.yml", "a.b"), ("é.yaml", None)],
    )
    def test_attributions_are_named_after_the_file(self, tmp_path, name, expected):
        with pytest.warns(CoarWarning, match="published code"):
            assert load(write(tmp_path, ORIGINAL, name)).save_as == expected

    def test_another_solver_drops_what_was_said_of_the_file_s(self, tmp_path):
        found, _ = original(tmp_path, [("  num_train", "  target_end_ind: 3\n  num_train")])
        with pytest.warns(CoarWarning, match="--solver lasso replaces solver ridge of here"):
            changed = found.changed({"solver": "lasso"}, "here")
        kept = [note.split(": ")[0] for note in changed.notes]
        assert kept == ["data.target_end_ind", "cfg.num_workers", "cfg.true_random"]
        assert changed.solver == Lasso()
        assert "data.target_end_ind" not in "".join(found.changed({"columns": "0:2"}).notes)

    def test_other_keys_are_ignored_and_said_why(self, tmp_path):
        more = "  seed: 3\n  data_path: rows.beton\n  num_train"
        changes = [
            ("  data_path: ~\n", ""),
            ("  num_train", more),
            ("out_dir: ~", "out_dir: here\n  use_bias: 1"),
        ]
        found, _ = original(tmp_path, changes)
        reasons = dict(note.split(": ignored: ") for note in found.notes if ": ignored: " in note)
        assert {"data.seed", "data.data_path", "cfg.out_dir", "cfg.use_bias"} <= set(reasons)
        assert "save_as" in reasons["cfg.out_dir"]

    def test_may_ask_for_the_original_solver(self, tmp_path):
        found, text = original(tmp_path, fast_l1=True)
        asked = {"learning_rate": 1e-3, "batch_size": 2500, "check_every": 3, "threshold": 1e-10}
        assert found.solver == FastL1(num_penalties=0, **asked)
        assert "= fast_l1, num_penalties 0, learning_rate 0.001" in text
        assert "cfg.lr: read as learning_rate" in "\n".join(found.notes)
        assert found.changed({"solver": "fast_l1"}) == found
        changes = [
            ("k: 1\n", "k: 20\n"),
            ("  manual_max_lambda: 0\n", ""),
            ("num_val: 5000", "num_val: 45000"),
        ]
        found, _ = original(tmp_path, changes, fast_l1=True)
        assert found.solver == FastL1(num_penalties=20, smallest=1e-4, held_out=2, **asked)

    def test_notes_are_kept_in_our_format(self, tmp_path):
        found, _ = original(tmp_path)
        found.save(tmp_path / "ours.yaml")
        assert load(tmp_path / "ours.yaml") == found

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("k: 1\n", "k: 1.5\n", "cfg.k"),
            ("k: 1\n", "k: many\n", "cfg.k"),
            ("k: 1\n", "k: true\n", "cfg.k"),
            ("k: 1\n", "k: 0\n", "cfg.k"),
            ("  k: 1\n", "", "cfg.k is missing"),
            ("k: 1\n", "k: 5\n", "cfg.manual_max_lambda"),
            ("manual_max_lambda: 0", "manual_max_lambda: -3.5", "cfg.manual_max_lambda"),
            ("manual_max_lambda: 0", "manual_max_lambda: 1e999", "cfg.manual_max_lambda"),
            ("lr: 1e-3", "lr: [1]", "cfg.lr"),
            ("lr: 1e-3", "leraning_rate: 1", "unknown key 'leraning_rate'"),
            ("num_val", "num_vals", "unknown key 'num_vals'; did you mean 'num_val'?"),
            ("early_stopping:", "early_stoping:", "did you mean 'early_stopping'?"),
            ("data:", "data: 3\nx:", "unknown key 'x'"),
            ("  num_val", "  target_start_ind: -3\n  num_val", "data.target_start_ind"),
            ("  num_val", "  target_start_ind: 3\n  target_end_ind: 3\n  num_val", "data.target_end_ind"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, old, new, expected):
        path = write(tmp_path, ORIGINAL.replace(old, new, 1))
        with pytest.raises(SpecError) as caught:
            load(path)
        assert str(caught.value).startswith(str(path))
        assert expected in caught.value.what

    @pytest.mark.parametrize(("old", "new"), [("eps: 1e-4", "eps: 2"), ("num_val: 5000", "num_val: 0")])
    def test_a_path_needs_a_range_and_held_out_rows(self, tmp_path, old, new):
        text = ORIGINAL.replace("k: 1\n", "k: 9\n").replace("  manual_max_lambda: 0\n", "").replace(old, new)
        with pytest.raises(SpecError, match=new.split(":")[0]):
            load(write(tmp_path, text))


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "holds no settings"),
            ("- 1\n", "holds no settings"),
            ("solver: auto\n", "has no format"),
            ("format: 2\n", "newer version"),
            ("format: one\n", "has no format"),
            ("format: 1\nsovler: auto\n", "unknown key 'sovler'; did you mean 'solver'?"),
            ("format: 1\nsolver: {name: ridge, penalites: 1}\n", "solver: unknown key 'penalites'; did you"),
            ("format: 1\nsolver: {name: rigde}\n", "solver; did you mean 'ridge'?"),
            ("format: 1\nsolver: {penalties: 1}\n", "solver"),
            ("format: 1\nsolver: [ridge]\n", "solver"),
            ("format: 1\nsolver: {name: [ridge]}\n", "solver"),
            ("format: 1\noutput: 3\n", "1 setting not accepted"),
            ("format: 1\nsave_as: ../other\n", "1 setting not accepted"),
            ("format: 1\nmemory: much\n", "1 setting not accepted"),
            ("format: 1\ncolumns: [5, 5]\n", "1 setting not accepted"),
            ("format: 1\ncolumns: [-1, 5]\n", "1 setting not accepted"),
            ("format: 1\ncolumns: 5\n", "1 setting not accepted"),
            ("format: 1\ncolumns: '5'\n", "1 setting not accepted"),
            ("format: 1\ncolumns: '5:2'\n", "1 setting not accepted"),
            ("format: 1\ncolumns: 'a:b'\n", "1 setting not accepted"),
            ("format: 1\nmemory: 4\n", "1 setting not accepted"),
            ("format: 1\nsolver: {name: lasso, n_alphas: 9}\n", "did you mean 'num_penalties'?"),
            ("format: 1\nsolver: {name: fast_l1, learning_rate: fast}\n", "1 setting not accepted"),
            ("format: 1\nformat: 1\n", "key 'format' is given twice (line 2)"),
            ("format: 1\nsolver:\n  name: auto\n  name: ridge\n", "key 'name' is given twice (line 4)"),
            ("format: 1\n1: 2\n", "cannot be read"),
            ("format: 1\n<<: {output: x}\n", "unknown key '<<'"),
            ("format: 1\noutput: !!python/object/apply:os.getcwd []\n", "cannot be read"),
            ("format: 1\noutput: !!timestamp x\n", "cannot be read"),
            ("format: 1\noutput: &a [x]\nsolver: *a\n", "cannot be read"),
            ("format: 1\n---\nformat: 1\n", "cannot be read"),
            ("format: [1\n", "cannot be read"),
            ("format: 1\n\toutput: x\n", "cannot be read"),
            (f"format: 1{'0' * 5000}\n", "cannot be read"),
            ("[" * 50_000, "cannot be read"),
        ],
    )
    def test_yaml(self, tmp_path, text, expected):
        path = write(tmp_path, text)
        with pytest.raises(SpecError) as caught:
            load(path)
        assert str(caught.value).startswith(str(path))
        assert expected in caught.value.what

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"format": 1, "format": 1}', "key 'format' is given twice"),
            ('{"format": 1, "solver": {"name": "ridge", "penalties": NaN}}', "cannot be read"),
            ('{"format": 1, "solver": {"name": "ridge", "penalties": 1e999}}', "not accepted"),
            ('{"format": 1, "solver": {"name": "ridge", "errors": "yes"}}', "1 setting not accepted"),
            ('{"format": true}', "has no format"),
            ('{"format": 0}', "1 setting not accepted"),
            ("{format: 1}", "cannot be read"),
            ("[" * 100_000, "cannot be read"),
        ],
    )
    def test_json(self, tmp_path, text, expected):
        path = write(tmp_path, text, "fit.json")
        with pytest.raises(SpecError) as caught:
            load(path)
        assert str(caught.value).startswith(str(path))
        assert expected in caught.value.what

    def test_a_wrong_setting_is_named_with_its_key(self, tmp_path):
        with pytest.raises(SpecError) as caught:
            load(write(tmp_path, "format: 1\nsolver: {name: ridge, penalties: -1}\ncolumns: [3, 1]\n"))
        parts = caught.value.expected.split("; ")
        assert parts[0] == "solver.penalties: a number >= 0, or a list of them"
        assert parts[1].startswith('columns: [START, STOP] or "START:STOP"')
        assert parts[1].endswith("START < STOP")
        assert "2 settings not accepted" in caught.value.what

    def test_a_few_words_that_stand_for_a_billion_are_not_unfolded(self, tmp_path):
        lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        with pytest.raises(SpecError, match="cannot be read") as caught:
            load(write(tmp_path, "\n".join(lines)))
        assert caught.value.got == "*a0, line 2"

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(SpecError, match="is missing"):
            load(tmp_path / "nothing.yaml")
        with pytest.raises(SpecError, match="what kind of file"):
            load(write(tmp_path, "format: 1", "fit.toml"))
        with pytest.raises(SpecError, match="what kind of file"):
            FitSettings().save(tmp_path / "fit")
        (tmp_path / "folder.yaml").mkdir()
        with pytest.raises(SpecError, match="cannot read"):
            load(tmp_path / "folder.yaml")
        (tmp_path / "bytes.yaml").write_bytes(b"format: \xff")
        with pytest.raises(SpecError, match="cannot be read"):
            load(tmp_path / "bytes.yaml")
        with pytest.raises(SpecError, match="too large for settings"):
            load(write(tmp_path, "#" * (MAX_BYTES + 1)))
