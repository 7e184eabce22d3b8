"""Writes docs/benchmarks.md from the committed results: `python -m benchmarks.docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
HEAD = """# Benchmarks

Made by `python -m benchmarks.docs` from the last full runs in `benchmarks/results/`; do not edit.
Each section is one `python -m benchmarks.NAME`, which measures ours, the peer and the limit in one run,
in turn, and exits with 1 where a claim does not hold.

In tables of correlations, r2 and slope are medians over columns: 1 is perfect, an r2 below 0 is worse than
predicting the mean, a slope below 1 means that predictions are too large; undefined counts columns whose
output is constant.
"""


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(result) for result in results)])


def load() -> list[dict[str, Any]]:
    """All committed results, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def _section(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['date']}, commit {result['commit'][:10]}; {result['machine']}; {versions}."
    parts = [f"## {result['benchmark']}\n\n{where}\n", _table(_claims(result["claims"]))]
    parts += [f"### {title}\n\n{_table(rows)}" for title, rows in result["tables"].items()]
    return "\n".join(parts)


def _claims(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "claim": claim["claim"],
            "measured": claim["measured"],
            "bar": claim["bar"],
            "holds": {True: "yes", False: "**no**"}.get(claim["holds"], claim["holds"]),
        }
        for claim in claims
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    Path(PAGE).write_text(page(load()))
