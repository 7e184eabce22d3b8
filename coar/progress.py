"""Progress bars: one per stage, on a terminal or in a notebook, silent where nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, show: bool = True, done: int = 0) -> Any:
    """A tqdm bar; `update(n)` moves it; what was done before does not count for its speed."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    disable = not (show and watched)
    return tqdm(total=total, desc=f"{description:<24}", disable=disable, initial=done, dynamic_ncols=True)
