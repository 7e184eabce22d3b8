"""Progress bars: one per stage, on standard error, silent where nobody watches."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, show: bool = True) -> Any:
    """A tqdm bar; `update(n)` moves it. Used as a context manager."""
    disable = None if show else True  # None: off where standard error is not a terminal
    return tqdm(total=total, desc=f"{description:<24}", disable=disable, leave=True, dynamic_ncols=True)
