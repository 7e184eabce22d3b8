"""docs/evaluation.md: its code runs as printed."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    names = {"__name__": "page"}
    exec(compile(example, "docs/evaluation.md", "exec"), names)
    means = names["evaluation"].means().query("ablation_fraction == 0.10").set_index("method")
    assert means.correlation["gate gradients"] > means.correlation["neuron conductance"]
    assert abs(means.correlation["random"]) < 0.2
    assert means.share["gate gradients"] > 0.8
    assert "linear ceiling" in capsys.readouterr().out
    assert len(names["ax"].get_lines()) >= 4
