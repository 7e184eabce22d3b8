"""The six edits: before, after, components, seconds, alternatives; a module each, three seeds each.

python -m benchmarks.editing [--small] [--json PATH]

Needs, in a data folder, `cifar10_jpeg.npz` and `tinyshakespeare.txt` (data/README.md); --small does without.
"""

from __future__ import annotations

from typing import Any

from benchmarks import (
    editing_backdoor,
    editing_error,
    editing_forget,
    editing_language,
    editing_subpopulation,
    editing_typographic,
)
from benchmarks.report import Report, main

PARTS = (
    editing_error,
    editing_forget,
    editing_subpopulation,
    editing_backdoor,
    editing_typographic,
    editing_language,
)
SUMMARY = "the six edits, means over seeds"


def run(report: Report) -> None:
    """All six, and the table of docs/editing.md."""
    lines: list[dict[str, Any]] = []
    for part in PARTS:
        print(f"\n== {part.__name__.rpartition('.')[2]}", flush=True)
        lines.append(part.measure(report))
    report.table(SUMMARY, lines)


if __name__ == "__main__":
    main("editing", run)
