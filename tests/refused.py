"""How tests say that bad input is refused: by the class of the error and by the words it must contain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coar.errors import CoarError


@contextmanager
def refused(kind: type[CoarError], *words: str) -> Iterator[None]:
    """Assert that the block raises a `kind` whose message (what, expected, got, to do) has all words."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in the message:\n{message}"
