"""docs/gate-gradients.md: its code runs, its commands exist, its numbers of the figure can be made again."""

import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer

import coar
from coar import baselines, checking
from coar.attributions import Attributions
from coar.cli import app
from coar.gradients.draws import GateDraws
from scripts import draw_gate_gradients as figure

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/gate-gradients.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_code_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:  # one session, as a reader's would be
        exec(compile(example, "docs/gate-gradients.md", "exec"), names)
    assert names["study"].status().passes == 40
    assert isinstance(Attributions.load(tmp_path / "runs/gates/attributions/gates"), Attributions)
    assert "no problem found" in capsys.readouterr().out


def test_every_command_and_option_exists():
    commands = typer.main.get_command(app).commands
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    assert [words[1] for words in lines] == ["plan", "init", "run", "fit", "check", "evaluate"]
    for program, verb, *words in lines:
        assert program == "coar"
        commands[verb].make_context(verb, words)  # parses, runs nothing; a wrong option is a UsageError


def test_every_baseline_and_check_is_named_and_every_name_exists():
    assert [name for name in baselines.__all__ if f"`{name}`" not in PAGE] == []
    for name in set(re.findall(r"coar\.(checking\.\w+|baselines\.\w+|[a-zA-Z_]+)\b", PAGE)):
        owner = coar
        for part in name.split("."):
            assert hasattr(owner, part) or (ROOT / "coar" / part).exists(), name
            owner = getattr(owner, part, owner)
    assert {"check", "calibrate"} <= set(checking.__all__)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_gates_of_a_pass_are_as_described():
    for fraction, passes, least in ((0.05, 10, 40), (0.1, 5, 20)):
        draws = GateDraws(fraction, 0, 3)
        assert (draws.passes_per_round, 4 * draws.passes_per_round) == (passes, least)
        assert draws.ablated == 0
    assert GateDraws(0.3, 0, 3).probe_fraction == 0.2


def test_the_arithmetic_of_the_large_model():
    components = 16 * 8_192 + 16 * 32
    assert f"{components:,} components" in " ".join(PAGE.split())
    forward = 2 * 1e9 * 100 * 64
    assert forward == pytest.approx(1.3e13, rel=0.02)
    assert [40 * forward * k for k in (2, 3)] == pytest.approx([1.0e15, 1.5e15], rel=0.03)
    sums = 8 * components * 100 * 4
    assert [sums, sums * 5 / 4] == pytest.approx([420e6, 530e6], rel=0.01)
    rows = components * 0.2 / 0.8
    assert rows == pytest.approx(33_000, rel=0.01)
    assert [rows / (40 * k) for k in (2, 3)] == pytest.approx([400, 300], rel=0.1)
    assert 1 / math.sqrt(1 + 1 / (40 * 0.1)) == pytest.approx(0.89, abs=0.005)


class TestFigure:
    def test_a_straight_way_has_no_error(self):
        gate = np.linspace(0, 1, 5)
        straight = figure.Along(np.stack([2 * gate, 1 - gate]), np.array([2.0, -1.0]))
        np.testing.assert_allclose(straight.effect, [2, -1])
        np.testing.assert_allclose(straight.error, 0)

    def test_of_a_parabola_the_kept_end_gives_twice_the_effect(self):
        gate = np.linspace(0, 1, 5)
        np.testing.assert_allclose(figure.Along(gate[None] ** 2, np.array([2.0])).error, 1)

    @pytest.mark.slow
    def test_the_script_draws_it(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(figure, "PAIRS", 20)
        monkeypatch.setattr(figure, "IMAGES", 8)
        monkeypatch.setattr("sys.argv", ["draw", "--output", str(tmp_path / "idea.png")])
        figure.main()
        assert (tmp_path / "idea.png").stat().st_size > 10_000
        assert "both gates have equal ends" in capsys.readouterr().out
