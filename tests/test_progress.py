"""Progress bars: on a terminal, and nowhere else."""

from __future__ import annotations

import io

import pytest

from coar.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "show", "shown"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
    ids=["terminal", "terminal, not wanted", "file"],
)
def test_bars_are_shown_on_a_terminal_where_they_are_wanted(monkeypatch, stream, show, shown):
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(3, "rows", show) as bar:
        bar.update(3)
    assert ("rows" in stream.getvalue() and "3/3" in stream.getvalue()) is shown
    assert shown or stream.getvalue() == ""


def test_nothing_goes_to_standard_output(capsys):
    with progress_bar(1, "rows") as bar:
        bar.update(1)
    assert capsys.readouterr().out == ""
