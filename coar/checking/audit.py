"""Audit: does the derivative by a gate, added up along the gate, give what ablating the component does?

For some components, all other gates stay at one random mask. On the one side the model is really ablated,
with and without the component; on the other side the derivative is integrated from 0 to 1. For a
differentiable path the two are equal (fundamental theorem of calculus), whatever the path. They differ
where the output jumps along the way (JumpReLU, rounding, routing to the top k), where the graph is cut
(`detach`, `no_grad`), or where the gate is not where the component acts: there gate gradients are wrong
however many passes they get, and without a sign of it in their errors.

The integral is that of the midpoint rule with 3, 9, 27 and 81 nodes (each contains the one before), until
it agrees. A kink of the output (ReLU) makes the derivative jump, which the rule handles as well as anything:
its error is at most the derivative's variation over 2 n (Koksma's inequality).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from coar.attributions import Attributions
from coar.checking.audited import Audit, Audited
from coar.designs import Bernoulli
from coar.errors import SettingError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import Gates
from coar.gradients.passes import GatePasses
from coar.progress import progress_bar
from coar.randomness import permutation
from coar.work import require_storable

AUDIT = "audit"  # stream of the background and of what is audited
NODES = (3, 9, 27, 81)
TOLERANCE = 0.02  # of the effect, in the root of the sum of squares over columns
ROUNDING = 1e-6  # of the largest output: what differences of float32 outputs do not tell
ENDS = 1e-3  # of the largest output: more is no rounding


def audit(
    experiment: ComponentAblation,
    attributions: Attributions,
    ablation_fraction: float,
    *,
    num_audited: int = 20,
    num_examples: int = 8,
    seed: int = 0,
    device: torch.device,
    batch_size: int | None = None,
    progress: bool = True,
) -> Audit:
    """Compare finite differences with integrals of derivatives.

    Args:
        experiment: whose components.
        attributions: which output and which examples.
        ablation_fraction: of the background.
        num_audited: components, from as many groups as possible.
        num_examples: to look at.
        seed: of components, examples and background.
        device: where.
        batch_size: of the passes; None chooses.
        progress: show a bar.

    Raises:
        OutputError: the output has no gradient at all.
    """
    if not isinstance(experiment, ComponentAblation):
        raise SettingError(
            "only component ablations have gates",
            expected="coar.ComponentAblation",
            got=type(experiment).__name__,
            todo="check with audited=False",
        )
    chosen = choose_components(experiment, num_audited, seed)
    examples = _choose_examples(attributions, num_examples, seed)
    path = _Path(experiment, attributions.output, ablation_fraction, examples, seed, device, batch_size)
    with progress_bar(len(chosen), "check: audit", progress) as bar:
        exact, base = path.differences(chosen)
        ends = np.abs(path.untouched() - base)
        scale = float(np.abs(base).max(initial=0.0)) + float(np.ptp(base))
        # What the two ways of running the same mask differ by is what neither can tell.
        rounding = max(ROUNDING * scale, 3 * float(np.sqrt((ends**2).mean())))
        found = path.audited(chosen, exact, min(rounding, ENDS * scale), bar)
    return Audit(
        components=tuple(found),
        columns=path.names,
        ends=float(ends.max(initial=0.0)),
        ends_agree=bool(ends.max(initial=0.0) <= ENDS * max(scale, 1e-6)),
        placements=path.engine.placements,
        fallen=path.engine.fallen,
        rows=len(chosen) + 1,
        passes=path.passes,
        examples=len(examples),
        num_groups=len(_occupied(experiment)),
    )


def choose_components(experiment: ComponentAblation, count: int, seed: int) -> list[int]:
    """Flat indices: one of each group in random order, then a second one of each, ..."""
    queues = []
    slices = _occupied(experiment)
    for place in permutation(seed, f"{AUDIT}: groups", 0, len(slices)):
        flat = slices[place]
        own = permutation(seed, f"{AUDIT}: components", int(place), flat.stop - flat.start)
        queues.append([flat.start + int(number) for number in own])
    longest = max(len(queue) for queue in queues)
    turns = (queue[turn] for turn in range(longest) for queue in queues if turn < len(queue))
    return [component for component, _ in zip(turns, range(count), strict=False)]


def _occupied(experiment: ComponentAblation) -> list[slice]:
    """Flat indices of each group that has components."""
    return [flat for _, flat in experiment.component_set.slices() if flat.stop > flat.start]


def _choose_examples(attributions: Attributions, count: int, seed: int) -> np.ndarray:
    known = np.unique(attributions.columns.fields["example"])
    return np.sort(known[permutation(seed, f"{AUDIT}: examples", 0, len(known))[:count]])


class _Path:
    """Some examples under one background."""

    def __init__(
        self,
        experiment: ComponentAblation,
        output: str,
        fraction: float,
        examples: np.ndarray,
        seed: int,
        device: torch.device,
        batch_size: int | None,
    ) -> None:
        self.experiment, self.output, self.examples = experiment, output, examples
        axis = experiment.columns[output]
        self._columns = np.flatnonzero(np.isin(axis.fields["example"], examples))
        self._counts = np.bincount(axis.fields["example"], minlength=len(experiment.task))
        self._all_names = axis.names
        self.names = tuple(axis.names[column] for column in self._columns)
        design = Bernoulli(ablation_fraction=fraction, seed=seed, stream=AUDIT)
        self._background = design.masks([0], len(experiment.components))[0]
        self._device, self._batch_size = device, batch_size
        self.engine = GatePasses(
            experiment, (output,), device, batch_size, derivatives=False
        )  # the audit tells
        self.passes = 0

    def differences(self, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """By literal ablation: effects [components chosen, columns], and outputs under the background."""
        runner = self.experiment.prepare(self._device, self._batch_size)

        def outputs(mask: np.ndarray) -> np.ndarray:
            values = runner(mask[None])[self.output][0]
            require_storable(values, 0, self.output, self._all_names)
            return np.asarray(values[self._columns], np.float64)

        base = outputs(self._background)
        effects = np.empty((len(chosen), len(base)))
        for place, component in enumerate(chosen):
            other = self._background.copy()
            other[component] = not other[component]
            sign = 1.0 if self._background[component] else -1.0
            effects[place] = sign * (base - outputs(other))
        return effects, base

    def untouched(self) -> np.ndarray:
        """Outputs under gates that are the background, [columns]."""
        owners, counts = self.examples, self._counts[self.examples]
        found = np.empty(int(counts.sum()))
        ends = np.cumsum(counts)
        for here, batch in self.engine.batches(owners):
            gates = np.tile(self._background.astype(np.float32), (here.stop - here.start, 1))
            taken = self.engine.derivatives(batch, Gates(gates, gates > 1))[self.output]
            found[ends[here.start] - counts[here.start] : ends[here.stop - 1]] = taken.values
        self.passes += len(owners)
        return found

    def audited(self, chosen: Sequence[int], exact: np.ndarray, rounding: float, bar: Any) -> list[Audited]:
        """Integrate until the integral agrees, or the nodes are exhausted."""
        found: dict[int, Audited] = {}
        slopes: dict[int, dict[float, np.ndarray]] = {place: {} for place in range(len(chosen))}
        for nodes in NODES:
            left = [place for place in slopes if place not in found]
            new = [(place, t) for place in left for t in midpoints(nodes) if t not in slopes[place]]
            taken = self._along([chosen[place] for place, _ in new], [t for _, t in new])
            for (place, t), slope in zip(new, taken, strict=True):
                slopes[place][t] = slope
            for place in left:
                along = np.stack([slopes[place][t] for t in sorted(slopes[place])])
                one = self._compared(chosen[place], exact[place], along, rounding)
                if one.agrees or nodes == NODES[-1]:
                    found[place] = one
                    bar.update(1)
        return [found[place] for place in range(len(chosen))]

    def _compared(self, component: int, exact: np.ndarray, along: np.ndarray, rounding: float) -> Audited:
        integral = along.mean(axis=0)
        # The size of an effect that is the difference of a rise and a fall is that of both.
        size = np.maximum(np.abs(exact), np.abs(along).mean(axis=0))
        lacking = np.abs(exact - integral)
        last = len(along) == NODES[-1]
        unsure = np.abs(np.diff(along, axis=0)).sum(axis=0) / (2 * len(along)) if last else 0.0
        hidden = rounding * float(np.sqrt(exact.size))
        allowed = TOLERANCE * _norm(size) + hidden
        name, effect = self.experiment.components.names[component], _norm(size)
        return Audited(
            name=name,
            group=self.experiment.component_set.locate(component)[0].name,
            exact=exact,
            integral=integral,
            nodes=len(along),
            rounding=hidden,
            missed=_norm(lacking) / effect if effect else 0.0,
            agrees=bool(_norm(np.maximum(lacking - unsure, 0.0)) <= allowed),  # False for NaN
        )

    def _along(self, components: Sequence[int], gates: Sequence[float]) -> np.ndarray:
        """Derivatives by one gate at one place each, [jobs, columns]; jobs share batches."""
        jobs, each = len(components), len(self.examples)
        if not jobs:
            return np.empty((0, len(self._columns)))
        owners = np.tile(self.examples, jobs)
        which, where = np.repeat(components, each), np.repeat(gates, each)
        parts = []
        for here, batch in self.engine.batches(owners):
            size = here.stop - here.start
            own = np.tile(self._background.astype(np.float32), (size, 1))
            own[np.arange(size), which[here]] = where[here]
            taken = self.engine.derivatives(batch, Gates(own, own > 1))[self.output].by_gate
            mine = np.repeat(which[here], self._counts[owners[here]])
            parts.append(taken[np.arange(len(taken)), mine])
        self.passes += len(owners)
        return np.concatenate(parts).astype(np.float64).reshape(jobs, -1)


def midpoints(nodes: int) -> list[float]:
    """Middle of each of `nodes` equal parts of [0, 1]; those of 3 nodes are among those of 9.

    >>> midpoints(3)[1] in midpoints(9)
    True
    """
    # In whole numbers over the same denominator, so that equal nodes are equal floats.
    share = NODES[-1] // nodes
    return [(2 * share * k + share) / (2 * NODES[-1]) for k in range(nodes)]


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt((np.asarray(values) ** 2).sum()))
