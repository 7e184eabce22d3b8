"""What all benchmarks share: options, claims and their bars, the printed table, the JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
NOT_MEASURED = "not run"


@dataclass
class Report:
    """Collects measurements of one benchmark and holds them against `claims.toml`."""

    name: str
    small: bool
    measured: dict[str, float | str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def measure(self, claim: str, value: float) -> None:
        """Record the figure of a claim, by its id without the benchmark's name."""
        self.measured[f"{self.name}.{claim}"] = value

    def not_run(self, claim: str, reason: str) -> None:
        """Say why a claim could not be tested here; it counts as false."""
        self.measured[f"{self.name}.{claim}"] = f"{NOT_MEASURED}: {reason}"

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Keep and print a table of measurements: ours, the peer, the limit."""
        self.tables[title] = rows
        print(f"\n{title}\n{_formatted(rows)}", flush=True)

    def claims(self) -> list[dict[str, Any]]:
        """One entry per claim of this benchmark in `claims.toml`."""
        return [self._claim(f"{self.name}.{key}", entry) for key, entry in _claims(self.name).items()]

    def _claim(self, identifier: str, entry: dict[str, Any]) -> dict[str, Any]:
        value = self.measured.get(identifier, f"{NOT_MEASURED}: the benchmark does not report it")
        bar = entry["small" if self.small else "full"]
        holds: bool | str = value if isinstance(value, str) else _holds(value, bar, entry["holds"])
        measured = None if isinstance(value, str) else value
        return {"id": identifier, "claim": entry["claim"], "measured": measured, "bar": bar, "holds": holds}

    def finish(self, path: Path | None) -> int:
        """Print the claims, write the JSON; exit status 1 where a claim does not hold."""
        claims = self.claims()
        rows = [{key: claim[key] for key in ("id", "measured", "bar", "holds")} for claim in claims]
        print(f"\nclaims\n{_formatted(rows)}")
        if path:
            record = {"benchmark": self.name, "small": self.small, **_machine(), "claims": claims}
            path.write_text(json.dumps(record | {"tables": self.tables}, indent=1) + "\n")
        return int(any(claim["holds"] is not True for claim in claims))


def main(name: str, run: Callable[[Report], None]) -> None:
    """Entry point of a benchmark: `python -m benchmarks.NAME [--small] [--json PATH]`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--small", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    options = parser.parse_args()
    report = Report(name, options.small)
    run(report)
    sys.exit(report.finish(options.json))


def median_seconds(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time actions in turn, A B A B ..., after a warm-up each: a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(ours: list[float], other: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def _claims(benchmark: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "benchmarks/claims.toml").read_text())[benchmark]  # type: ignore[no-any-return]


def _holds(value: float, bar: float, how: str) -> bool:
    return value <= bar if how == "at_most" else value >= bar


def _machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _formatted(rows: list[dict[str, Any]]) -> str:
    texts = [[_text(value) for value in row.values()] for row in rows]
    head = list(rows[0])
    widths = [max(len(row[i]) for row in [head, *texts]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [head, *texts]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
