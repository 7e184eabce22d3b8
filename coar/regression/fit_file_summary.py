"""What a fit has found, in a few lines."""

from __future__ import annotations

import numpy as np

from coar.attributions import Attributions


def fit_summary(found: Attributions, num_rows: int) -> str:
    """Algorithm, penalties, sparsity and fit of some attributions; their blocks are read once.

    Args:
        found: what was fitted.
        num_rows: of the study.
    """
    details = _details(found)
    notes = found.provenance["notes"]
    lines = [
        repr(found),
        f"{notes.get('algorithm', found.provenance['method'])}: {notes.get('why', 'as asked')}",
    ]
    if len(details.get("penalty", ())):
        chosen = f" ({notes['penalty']})" if "penalty" in notes else ""
        lines.append(f"penalty: {_range(details['penalty'])}{chosen}")
    if len(details.get("nonzeros", ())):
        counts = details["nonzeros"]
        none = int((counts == 0).sum())
        lines.append(
            f"nonzero weights: {np.median(counts):g} of {len(found.components)} components (median); "
            f"{none} of {len(counts)} columns have none"
        )
    lines += [f"standard errors: {notes['errors']}"] if "errors" in notes else []
    rows = f"{found.provenance['rows']:,} of {num_rows:,} rows"
    r2 = f"the median R2 is {np.median(details['r2']):.3f}"
    return "\n".join([*lines, f"from {rows}, on which {r2} (fitted, not held out)"])


def _details(found: Attributions) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for block in found.blocks():
        for key, values in (block.details or {}).items():
            parts.setdefault(key, []).append(values)
    return {key: np.concatenate(values) for key, values in parts.items()}


def _range(values: np.ndarray) -> str:
    low, middle, high = values.min(), np.median(values), values.max()
    return f"{middle:.3g}" if low == high else f"{middle:.3g} (median), {low:.3g} to {high:.3g}"
