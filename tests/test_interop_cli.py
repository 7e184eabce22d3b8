"""`coar import` and `coar export`: a store there and back by the command line."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from coar import cli
from coar.interop import read_beton
from tests.test_interop_store import example, files, write_store


@pytest.fixture
def coar(monkeypatch, capsys):
    """`coar("import", ...)` is that command; returns exit status, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["coar", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def test_a_store_is_imported_fitted_and_exported(coar, tmp_path):
    arrays = example()
    count = int(arrays["_completed"].sum())
    write_store(tmp_path / "store", **arrays)
    (tmp_path / "names").write_text("\n".join("abcdefg"), encoding="utf-8")
    study = tmp_path / "study"
    status, out, err = coar("import", tmp_path / "store", study, "--components", tmp_path / "names")
    assert (status, err) == (0, "")
    assert f"{count} of 40 rows" in out
    kept = arrays["masks"][arrays["_completed"]].mean()
    assert f"1 output margins (float16, 3 columns), 7 components, masks keep {kept:.1%}" in out
    assert f"{count} of 40 rows" in coar("status", study)[1]
    assert coar("fit", study)[0] == 0
    assert coar("export", study, tmp_path / "again", "--layout", "original")[0] == 0
    assert coar("export", study, tmp_path / "a.beton", "--layout", "beton")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "_completed.npy"), arrays["_completed"])
    assert sorted(files(tmp_path / "again")) == sorted(files(tmp_path / "store"))
    np.testing.assert_array_equal(read_beton(tmp_path / "a.beton")["idx"], arrays["_completed"].nonzero()[0])


def test_bad_input_is_a_short_error(coar, tmp_path):
    status, _, err = coar("import", tmp_path / "nowhere", tmp_path / "study")
    assert status == 1
    assert err.startswith("coar: StoreError: ")
    assert "Traceback" not in err
    write_store(tmp_path / "store", **example())
    assert coar("import", tmp_path / "store", tmp_path / "study")[0] == 0
    assert "coar: SettingError: an imported study" in coar("extend", tmp_path / "study", "--num-rows", 99)[2]
    next((tmp_path / "study" / "shards").iterdir()).unlink()
    assert "coar: StudyError: the rows of this study were imported" in coar("run", tmp_path / "study")[2]


def test_outputs_can_be_named_one_by_one(coar, tmp_path):
    arrays = example()
    write_store(tmp_path / "store", losses=arrays["margins"], indices=np.arange(40), **arrays)
    status, _, err = coar("import", tmp_path / "store", tmp_path / "study")
    assert status == 1
    assert "--output losses --output margins" in err
    named = ["--output", "losses", "--output", "margins"]
    status, out, _ = coar("import", tmp_path / "store", tmp_path / "study", *named)
    assert status == 0
    assert "2 outputs " in out


def test_the_page_on_interop_works_as_printed(coar, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "interop.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arrays = example(rows=60)
    write_store(tmp_path / "coar_store", test_margins=arrays.pop("margins"), **arrays)
    (tmp_path / "component_names.txt").write_text("\n".join("abcdefg"), encoding="utf-8")
    weight = torch.randn(7, 3)
    weight[0, 0] = float("nan")
    torch.save({"weight": weight.half(), "bias": torch.zeros(3), "lam": torch.zeros(3)}, "published.pt")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash", *["python"] * 4]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/interop.md", "exec"), {})
            continue
        for line in block.splitlines():
            assert coar(*shlex.split(line)[1:])[0] == 0, line
