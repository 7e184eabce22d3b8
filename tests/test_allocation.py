import subprocess
import sys

import pytest

PROBE = """if True:
    import resource, torch
    from coar.experiments.allocation import keep_freed_memory
    print(keep_freed_memory())
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each, freed together
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
def test_freed_blocks_are_not_faulted_in_again_unless_switched_off():
    switched_off, faults_before = probe(COAR_KEEP_MEMORY="0")
    assert not switched_off
    kept, faults = probe()
    if not kept:
        pytest.skip("another C library than glibc")
    assert faults < 1_000  # of 40 blocks of 1,024 pages of 4 kB
    assert faults < 0.2 * faults_before
