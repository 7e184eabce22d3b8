"""The gates of a pass: which components are probes, and where on their way from ablated to kept.

In each pass a component is a probe with probability `probe_fraction`; a probe's gate is uniform on
(0, 1), all others are kept, or ablated with a probability so lowered that a component is on average
away as often as in the ablations that are to be predicted (the gate law of uniform gradient sampling,
Li and Janson, arXiv 2409.09951).

Passes come in rounds in which every component of every example is a probe exactly once: within a pass
components are independent, over a round their probes are balanced, over rounds the gates of probes
are spread evenly (a shifted van der Corput sequence). What is drawn depends on (seed, replicate, round,
example) alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import numpy as np

from coar.errors import SettingError
from coar.randomness import check_seed, half_words

LARGEST_PROBE_FRACTION = 0.2
_SCALE = 2.0**-32


@dataclass(frozen=True)
class Gates:
    """Of one pass over some examples.

    Attributes:
        gates: float32 [examples, components].
        probes: bool [examples, components].
    """

    gates: np.ndarray
    probes: np.ndarray


class GateDraws:
    """Draws the gates of all passes.

    Args:
        ablation_fraction: of the ablations that attributions are to predict.
        seed: of the draws.
        num_components: length of a gate vector.

    Attributes:
        passes_per_round: in a round each component is a probe once.
        probe_fraction: 1 / passes_per_round, at most 0.2, twice the ablation fraction, twice what is kept.
        ablated: probability that a component that is no probe is ablated.

    >>> draws = GateDraws(0.05, seed=0, num_components=100)
    >>> draws.passes_per_round, draws.ablated
    (10, 0.0)
    >>> int(sum(one.probes.sum() for one in draws.round(0, 0, np.arange(3))))
    300
    """

    def __init__(self, ablation_fraction: float, seed: int, num_components: int) -> None:
        number = isinstance(ablation_fraction, Real) and not isinstance(ablation_fraction, bool)
        if not number or not 0 < ablation_fraction < 1:
            raise SettingError(
                "ablation_fraction out of range",
                expected="a number above 0 and below 1",
                got=repr(ablation_fraction),
                todo="0.05 to 0.1 is usual: the share of components that are ablated at random",
            )
        self.ablation_fraction, self.seed = float(ablation_fraction), check_seed(seed)
        self.num_components = num_components
        # A probe is away by one half on average: more probes would be too many, or leave too many kept.
        most = min(2 * self.ablation_fraction, 2 - 2 * self.ablation_fraction, LARGEST_PROBE_FRACTION)
        self.passes_per_round = math.ceil(1 / most - 1e-9)
        self.probe_fraction = 1 / self.passes_per_round
        ablated = (self.ablation_fraction - self.probe_fraction / 2) / (1 - self.probe_fraction)
        self.ablated = min(1.0, max(0.0, round(ablated, 12)))

    def round(self, replicate: int, index: int, examples: np.ndarray) -> Iterator[Gates]:
        """The passes of one round, for examples by their numbers."""
        turn = self._words(f"probe, replicate {replicate}, round {index}", examples)
        # Which pass of the round: the high half of a product is as good as uniform.
        turn = (turn.astype(np.uint64) * np.uint64(self.passes_per_round)) >> np.uint64(32)
        shift = self._words(f"gate, replicate {replicate}", examples) * _SCALE
        own = ((shift + van_der_corput(index)) % 1.0).astype(np.float32)
        for number in range(self.passes_per_round):
            probes = turn == number
            others = self._others(
                f"background, replicate {replicate}, round {index}, pass {number}", examples
            )
            yield Gates(np.where(probes, own, others), probes)

    def _others(self, stream: str, examples: np.ndarray) -> np.ndarray:
        if not self.ablated:
            return np.ones((len(examples), self.num_components), np.float32)
        return (self._words(stream, examples) * _SCALE >= self.ablated).astype(np.float32)

    def _words(self, stream: str, examples: np.ndarray) -> np.ndarray:
        drawn = [half_words(self.seed, f"gates: {stream}", int(e), self.num_components) for e in examples]
        return np.stack(drawn)


def van_der_corput(index: int) -> float:
    """The bits of a number mirrored behind the point: 0, 1/2, 1/4, 3/4, 1/8, ...

    >>> [van_der_corput(k) for k in range(5)]
    [0.0, 0.5, 0.25, 0.75, 0.125]
    """
    found, share = 0.0, 0.5
    while index:
        found += share * (index & 1)
        index, share = index >> 1, share / 2
    return found
