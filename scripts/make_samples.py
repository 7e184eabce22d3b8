"""Make the small data that come with a checkout: `python -m scripts.make_samples`.

Needs the folder named by $COAR_DATA with cifar10_jpeg.npz and tinyshakespeare.txt; data/README.md says
what they are. Only data that train nothing go in: test images, and the test part of the text.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from coar.files import sha256
from coar.tasks.cifar import IMAGES, LABELS, SAMPLE
from coar.tasks.data_folder import SAMPLES, find_data
from coar.tasks.gpt2_network import POSITIONS
from scripts import train_gpt2, train_models

NUM_IMAGES, NUM_PASSAGES = train_models.NUM_SAMPLE, 200
PASSAGES = "shakespeare_sample.txt"


def main() -> None:
    """Write both samples and their checksums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder of samples.json")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    images = {"images": NUM_IMAGES, "from": train_models.IMAGES, "part": "the first of its test images"}
    write_sample(folder, SAMPLE, image_sample(), images)
    passages = {"passages": NUM_PASSAGES, "from": train_gpt2.TEXT, "part": "its last 5 %, at even distances"}
    write_sample(folder, PASSAGES, passage_sample(), passages)


def image_sample() -> bytes:
    """The first test images with their labels, as an .npz file."""
    with np.load(find_data(train_models.IMAGES)) as arrays:
        chosen = {name: arrays[name][:NUM_IMAGES] for name in (IMAGES, LABELS)}
    content = io.BytesIO()
    np.savez_compressed(content, **chosen)
    return content.getvalue()


def passage_sample() -> bytes:
    """Disjoint passages as long as the small GPT-2 reads, one JSON string per line."""
    text = train_gpt2.split_text(train_gpt2.read_text())["test"]
    starts = np.arange(NUM_PASSAGES) * (len(text) - POSITIONS) // (NUM_PASSAGES - 1)
    return "".join(json.dumps(text[start : start + POSITIONS]) + "\n" for start in starts).encode()


def write_sample(folder: Path, name: str, content: bytes, origin: dict[str, Any]) -> None:
    """Write a file and record it."""
    (folder / name).write_bytes(content)
    entry = {"sha256": sha256(content), "bytes": len(content), **origin}
    train_models.write_record(folder / SAMPLES, name, entry)
    print(name, json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
