"""The real FFCV on the other side: it reads what we write, and we read what it writes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import coar
from coar.interop import export_beton, read_beton, write_beton
from coar.testing import SubsetMean

SECONDS = 240  # a loader that fails inside numba hangs for ever

READ = """
import sys
import numpy as np
from ffcv.fields.basics import FloatDecoder, IntDecoder
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor

if __name__ == "__main__":
    source, target, *decoders = sys.argv[1:]
    kinds = {"array": NDArrayDecoder, "int": IntDecoder, "float": FloatDecoder}
    pairs = [decoder.split("=") for decoder in decoders]
    pipelines = {name: [kinds[kind](), ToTensor()] for name, kind in pairs}
    options = dict(batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
    for cache in (True, False):
        loader = Loader(source, os_cache=cache, pipelines=pipelines, **options)
        batches = [[part.numpy().copy() for part in batch] for batch in loader]
        arrays = {name: np.concatenate(parts) for (name, _), parts in zip(pairs, zip(*batches))}
        np.savez(f"{target} {cache}", **arrays)
"""

WRITE = """
import sys
import numpy as np
from ffcv.fields import FloatField, IntField, NDArrayField
from ffcv.writer import DatasetWriter

class Samples:
    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, i):
        return tuple(array[i] for array in self.arrays)

def field(array):
    if array.ndim == 1:
        return IntField() if array.dtype.kind == "i" else FloatField()
    return NDArrayField(array.dtype, array.shape[1:])

if __name__ == "__main__":
    source, target, workers = sys.argv[1:]
    arrays = dict(np.load(source))
    fields = {name: field(array) for name, array in arrays.items()}
    writer = DatasetWriter(target, fields, num_workers=int(workers))
    writer.from_indexed_dataset(Samples(list(arrays.values())), chunksize=3)
"""


@pytest.fixture
def ffcv(require, tmp_path):
    """`ffcv(program, *arguments)` runs it where FFCV is, and ends it when it hangs."""
    found = importlib.util.find_spec("ffcv") is not None
    require("ffcv", found, "FFCV is not installed: see docs/interop.md")

    def run(program, *arguments):
        script = tmp_path / "program.py"
        script.write_text(program, encoding="utf-8")
        words = [sys.executable, str(script), *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    return run


def arrays(samples=11):
    rng = np.random.default_rng(0)
    return {
        "mask": rng.random((samples, 37)) < 0.9,
        "bytes": rng.integers(0, 2, (samples, 5)).astype("u1"),
        "targets": rng.normal(size=(samples, 6)).astype("f4"),
        "half": rng.normal(size=(samples, 3)).astype("f2").view("i2"),
        "cube": rng.normal(size=(samples, 2, 3, 4)),
        "idx": np.arange(samples) * 7,
        "value": rng.normal(size=samples),
    }


DECODERS = [
    "mask=array",
    "bytes=array",
    "targets=array",
    "half=array",
    "cube=array",
    "idx=int",
    "value=float",
]


def loaded(target):
    """What FFCV read by way of the page cache of the system, and by its own."""
    return [dict(np.load(f"{target} {cache}.npz")) for cache in (True, False)]


@pytest.mark.slow
@pytest.mark.system
class TestWithFFCV:
    def test_it_reads_what_we_write(self, ffcv, tmp_path):
        expected = arrays()
        path = write_beton(tmp_path / "a.beton", expected)
        ffcv(READ, path, tmp_path / "out", *DECODERS)
        for found in loaded(tmp_path / "out"):
            for name, array in expected.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_array_equal(found[name].reshape(array.shape), array)
            halves = found["half"].view(np.float16)  # numba has no float16 on the CPU
            np.testing.assert_array_equal(halves, expected["half"].view(np.float16))

    def test_it_reads_samples_of_many_pages(self, ffcv, tmp_path):
        values = np.random.default_rng(0).normal(size=(9, 2**20)).astype("f4")  # two to a page
        path = write_beton(tmp_path / "a.beton", {"targets": values, "idx": np.arange(9)})
        ffcv(READ, path, tmp_path / "out", "targets=array", "idx=int")
        for found in loaded(tmp_path / "out"):
            np.testing.assert_array_equal(found["targets"], values)
            np.testing.assert_array_equal(found["idx"].ravel(), np.arange(9))

    @pytest.mark.parametrize("workers", [1, 3])
    def test_we_read_what_it_writes(self, ffcv, tmp_path, workers):
        expected = arrays(samples=40) | {
            "half": np.random.default_rng(1).normal(size=(40, 3)).astype("f2"),
            "large": np.random.default_rng(2).normal(size=(40, 10**5)),  # ten to a page
        }
        np.savez(tmp_path / "arrays.npz", **expected)
        ffcv(WRITE, tmp_path / "arrays.npz", tmp_path / "a.beton", workers)
        found = read_beton(tmp_path / "a.beton")
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)

    def test_it_reads_the_rows_of_a_study(self, ffcv, tmp_path):
        study = coar.Study.create(
            tmp_path / "s", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 30, rows_per_shard=7
        )
        study.run(progress=False)
        path: Path = export_beton(study, tmp_path / "a.beton")
        ffcv(READ, path, tmp_path / "out", "mask=array", "targets=array", "idx=int")
        for found in loaded(tmp_path / "out"):
            np.testing.assert_array_equal(found["mask"], study.masks[:])
            np.testing.assert_array_equal(found["targets"], study.outputs["mean"][:])
            np.testing.assert_array_equal(found["idx"].ravel(), np.arange(30))
