"""The six edits: before, after, components, seconds, alternatives; a module each, three seeds each.

python -m benchmarks.editing [--small] [--json PATH]

Needs, in a data folder, `cifar10_jpeg.npz` and `tinyshakespeare.txt` (data/README.md); --small does without.
With COAR_BENCHMARK_EDITS=FOLDER every finished edit is kept there, so that a run goes on where it was
stopped; delete a file to measure that edit again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
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
    report.table(SUMMARY, [measured(part, report) for part in PARTS])


def measured(part: ModuleType, report: Report) -> dict[str, Any]:
    """A line of the table: measured now, or what was kept of an earlier run of the same size."""
    name = part.__name__.rpartition(".")[2] + ("_small" if report.small else "")
    folder = os.environ.get("COAR_BENCHMARK_EDITS")
    kept = Path(folder) / f"{name}.json" if folder else None
    print(f"\n== {name}", flush=True)
    if kept and kept.exists():
        found = json.loads(kept.read_text())
    else:
        own = Report(report.name, report.small)
        line = part.measure(own)
        found = {"line": line, "measured": own.measured, "tables": own.tables}
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
    report.measured |= found["measured"]
    report.tables |= found["tables"]
    return dict(found["line"])


if __name__ == "__main__":
    main("editing", run)
