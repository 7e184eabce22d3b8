"""Run the notebooks: `notebooks/NAME.py` (jupytext's percent format) -> `NAME.ipynb` with its outputs.

    python -m scripts.make_notebooks [NAME ...]

The same source and the same numbers give the same file: no times, no random cell names. Results of their
studies go to runs/, and what is there is not computed again.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
MOST_BYTES = 500_000
SECONDS_PER_CELL = 24 * 3600  # on full data a cell may take long


def main(names: list[str]) -> None:
    """Run notebooks by name, all of them by default, and write them."""
    sources = [FOLDER / f"{name}.py" for name in names] or sorted(FOLDER.glob("*.py"))
    for source in sources:
        target = source.with_suffix(".ipynb")
        text = run(source)
        if len(text) > MOST_BYTES:
            sys.exit(
                f"{target.name} would have {len(text):,} bytes, more than {MOST_BYTES:,}: smaller figures"
            )
        target.write_text(text, encoding="utf-8")
        print(f"{target.relative_to(ROOT)}: {len(text):,} bytes")


def run(source: Path) -> str:
    """Text of the notebook after all cells have run, from the root of the checkout.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    book = jupytext.read(source)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    resources = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(
        book, timeout=SECONDS_PER_CELL, kernel_name="python3", resources=resources, record_timing=False
    )
    client.execute()
    _tidy(book)
    return nbformat.writes(book) + "\n"


def _smaller(png: str) -> str:
    """A picture, in base 64, with 256 colours: a third of the bytes, and the eye sees no difference."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    written = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def _tidy(book: Any) -> None:
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(book.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _smaller(output["data"]["image/png"])


if __name__ == "__main__":
    main(sys.argv[1:])
