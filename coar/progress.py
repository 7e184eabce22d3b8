"""Progress bars: one per stage, on a terminal or in a notebook, silent where nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, show: bool = True) -> Any:
    """A tqdm bar; `update(n)` moves it. Used as a context manager."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    disable = not (show and watched)
    return tqdm(total=total, desc=f"{description:<24}", disable=disable, leave=True, dynamic_ncols=True)
