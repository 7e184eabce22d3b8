"""Writes docs/benchmarks.md, and tables in other pages, from the committed results.

python -m benchmarks.docs
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
GATES = ROOT / "docs/gate-gradients.md"
EVALUATION = ROOT / "docs/evaluation.md"
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


def gates_table(result: dict[str, Any]) -> str:
    """Gate gradients of few passes next to ridge and attribution patching, a network a line."""
    rows = []
    for title, found in result["tables"].items():
        known = re.match(r"(\w+), ([\d,]+) components, (?!margin)(\w+), .* linear ceiling ([\d.]+)", title)
        if known is None:
            continue
        network, count, output, ceiling = known.groups()
        own = {r["passes or rows"]: r["correlation"] for r in found if r["method"] == "gate gradients"}
        last = max((r for r in found if r["method"] == "ridge"), key=lambda r: int(r["passes or rows"]))
        row = {"network": network, "components": count, "output": output}
        row |= {f"{passes} passes": f"{own[passes]:.3f}" for passes in (20, 40, 60, 80)}
        row |= {"ridge (rows)": f"{last['correlation']:.3f} ({last['passes or rows']:,})"}
        rows.append(row | _patching(result, network) | {"linear ceiling": ceiling})
    return _table(rows)


def _patching(result: dict[str, Any], network: str) -> dict[str, str]:
    """Attribution patching with gates at 1 and near the masks, where it was run."""
    tables = (rows for title, rows in result["tables"].items() if title.startswith(f"{network}: baselines"))
    found = [r["correlation"] for r in next(tables, []) if r["method"].startswith("attribution patching")]
    return {"attribution patching: gates at 1, at .95": ", ".join(f"{value:.3f}" for value in found)}


def reproduction_tables(result: dict[str, Any]) -> str:
    """The paper's table, once for each fraction that attributions were made for."""
    found = [(title, rows) for title, rows in result["tables"].items() if title.startswith("made for")]
    return "\n".join(f"*{title}*\n\n{_table(rows)}" for title, rows in found)


def with_table(page: str, name: str, table: str) -> str:
    """A page with what is between its marks `measured: NAME` and `end` replaced."""
    begin, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
    before, rest = page.split(begin)
    return before + begin + table + rest[rest.index(end) :]


def pages() -> dict[Path, str]:
    """All pages with measured tables, as the committed results have them."""
    results = load()
    by_name = {result["benchmark"]: result for result in results}
    measured = {
        GATES: ("gate_gradients", gates_table),
        EVALUATION: ("reproduction", reproduction_tables),
    }
    found = {PAGE: page(results)}
    for path, (name, make) in measured.items():
        table = make(by_name[name]) if name in by_name else ""
        found[path] = with_table(path.read_text(), name, table)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
