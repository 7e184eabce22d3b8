import subprocess
import sys

import pytest

PROBE = """if True:
    import resource, torch
    from coar.experiments.memory import keep_freed_memory
    print(keep_freed_memory())
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            blocks = [torch.ones(2**21 * (1 + i % 3)) for i in range(12)]  # 8 to 24 MiB, freed together
            del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    faults()
    print(faults())
"""


def probe(**environment):
    command = [sys.executable, "-c", PROBE]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    kept, faults = found.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_blocks_are_not_faulted_in_again():
    kept, faults = probe()
    if not kept:
        pytest.skip("another C library than glibc")
    assert faults < 1_000  # of 60 blocks of 2,048 to 6,144 pages; without it mostly above 80,000


@pytest.mark.slow
def test_it_can_be_switched_off():
    assert probe(COAR_KEEP_MEMORY="0")[0] is False
