"""Fit files: ours round trip between YAML and JSON, the original's are translated, bad ones are named."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import coar
from coar.errors import CoarWarning, SpecError
from coar.regression.fast_l1 import FastL1
from coar.regression.fit_file import SOLVERS, Auto, FitSettings, fit_with, load
from coar.regression.fit_file_text import MAX_BYTES, read_text, write_text
from coar.regression.lasso import Lasso
from coar.regression.ridge import Ridge
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
    memory=st.none() | st.integers(1, 2**50) | st.sampled_from(["8 GiB", "1.5 TB", "7"]),
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
        with pytest.raises(SpecError, match="no such columns"):
            FitSettings(columns=columns).column_positions(7)

    def test_arguments_go_before_the_file(self):
        found = FitSettings(
            solver=Ridge(penalties=0.5), output="loss", columns=(0, 5), save_as="half", notes=("x",)
        )
        assert found.changed({"solver": None, "output": "", "columns": None}) == found
        assert found.changed({"solver": "ridge", "save_as": "other"}).solver == Ridge(penalties=0.5)
        changed = found.changed({"solver": "lasso", "columns": (2, None), "memory": "1 GiB"})
        assert changed.solver == Lasso()
        assert (changed.columns, changed.memory, changed.output) == ((2, None), "1 GiB", "loss")
        with pytest.raises(SpecError, match="arguments"):
            found.changed({"memory": "much"})

    def test_attributions_are_named_after_the_solver_unless_said_otherwise(self):
        names = [FitSettings(), FitSettings(solver=Lasso()), FitSettings(solver=FastL1(), save_as="gpu")]
        assert [found.name for found in names] == ["ridge", "lasso", "gpu"]

    def test_fits_as_asked(self, tmp_path):
        design = coar.Bernoulli(ablation_fraction=0.3, seed=0)
        study = coar.Study.create(tmp_path / "study", SubsetMean(4, 6), design, 60)
        study.run(progress=False)
        asked = FitSettings(solver=Ridge(penalties=0.0), columns=(1, 3), save_as="two", notes=("a remark",))
        found = fit_with(study, asked)
        expected = coar.fit(study, Ridge(penalties=0.0), columns=[1, 2])
        np.testing.assert_array_equal(found.weights, expected.weights)
        assert found.provenance["remarks"] == ["a remark"]
        assert study.attributions_path("two").exists()
        assert fit_with(study, FitSettings()).provenance["method"] == "ridge"

    def test_yaml_is_not_loaded_before_it_is_needed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)  # importing it is now an error
        path = write(tmp_path, '{"format": 1}', "fit.json")
        assert load(path) == FitSettings()


class TestOriginal:
    def test_the_published_file_is_least_squares_and_every_key_is_named(self, tmp_path):
        found, text = original(tmp_path)
        assert found.solver == Ridge(penalties=0.0)
        assert (found.columns, found.output, found.save_as) == (None, None, None)
        keys = (
            "data.num_train data.num_val cfg.num_workers cfg.k cfg.batch_size cfg.lr cfg.eps cfg.true_random"
        )
        keys = [*keys.split(), "cfg.manual_max_lambda", "early_stopping.check_every", "early_stopping.eps"]
        for key in keys:
            assert f"  {key}: " in text
        assert {note.split(": ")[0] for note in found.notes} == set(keys)
        assert all(note in text for note in found.notes)
        assert "cfg.lr: ignored: a step size" in text
        assert "cfg.k: read as least squares: no penalty" in text

    def test_a_path_becomes_a_lasso(self, tmp_path):
        changes = [("k: 1\n", "k: 100\n"), ("eps: 1e-4", "eps: 1e-6"), ("  manual_max_lambda: 0\n", "")]
        found, text = original(tmp_path, changes)
        assert found.solver == Lasso(num_penalties=100, smallest=1e-6, held_out=10)
        assert "cfg.k: read as num_penalties" in text
        assert "data.num_val: read as a share: every row number 10 is held out" in text

    def test_one_penalty_from_the_data_is_least_squares_with_a_reservation(self, tmp_path):
        found, text = original(tmp_path, [("manual_max_lambda: 0", "manual_max_lambda: -1")])
        assert found.solver == Ridge(penalties=0.0)
        assert "also tries its largest penalty" in text

    def test_a_penalty_given_is_that_of_all_columns(self, tmp_path):
        changes = [("manual_max_lambda: 0", "manual_max_lambda: 0.25")]
        found, text = original(tmp_path, changes)
        assert found.solver == Lasso(penalties=0.25)
        assert "the original also tries none" in text
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
        assert text.count("read as columns") == lines.count("\n")

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
        assert "cfg.lr: read as learning_rate" in text
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
        assert "solver.ridge.penalties" in caught.value.expected
        assert "columns: start and stop, with start < stop" in caught.value.expected

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
