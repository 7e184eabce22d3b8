"""From noisy means of derivatives to weights: two estimates of each weight, mixed by how noisy they are.

For every column and component there are two means of the derivative by its gate: over passes in which
it was a probe (P: right on average, noisy, one pass in ten or so) and over all others (K: less noisy, but
the derivative at the ends of the path, nearly always the kept one, instead of along it). With the
noise s2 of P known from replicates, and b the slope of P on K,

    w = b K + t / (t + s2) (P - b K),    t = max(0, mean (P - b K)^2 - s2)

(empirical Bayes, James and Stein). Noise, slope and t are each component's own, over the columns at hand,
drawn towards those of its group as far as columns are few. Pooling (an option) also draws P - b K
towards its mean over all columns, and over the columns of its class.

All that is needed of the columns are sums over them, so that columns may come in blocks of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PRIOR_COLUMNS = 16  # as many columns' worth of the group is added to each component's own figures
_TINY = 1e-30


@dataclass(frozen=True)
class Mixed:
    """Weights of a block of columns.

    Attributes:
        weights: [columns, components].
        errors: standard errors, [columns, components]: of the replicates, and of what mixing leaves out.
        signal: sum of squared exact weights, estimated without bias from pairs of replicates, [columns];
            it may be negative.
        noise: sum of the variances of P, [columns].
        agreement: sum of products of weights and exact ones, likewise: each replicate's P against weights
            that know nothing of it, from the other replicates and figures that they alone gave.
    """

    weights: np.ndarray
    errors: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    agreement: np.ndarray


class MixStatistics:
    """Sums over columns, from which `mixing` is found.

    Args:
        num_components: length of a column.
        num_classes: pool over so many classes; 0 does not pool.
    """

    def __init__(self, num_components: int, num_classes: int = 0) -> None:
        self.columns = 0
        self.pp, self.pk, self.kk, self.spread = np.zeros((4, num_components))
        self.counts = np.zeros(num_classes)
        self.p_sums, self.k_sums = np.zeros((2, num_classes, num_components))

    def add(self, probe: np.ndarray, kept: np.ndarray, classes: np.ndarray | None = None) -> None:
        """Add columns.

        Args:
            probe: P of each replicate, [replicates, columns, components].
            kept: K likewise.
            classes: of each column, where classes are pooled over.
        """
        p, k = probe.mean(axis=0, dtype=np.float64), kept.mean(axis=0, dtype=np.float64)
        self.columns += len(p)
        self.pp += (p**2).sum(axis=0)
        self.pk += (p * k).sum(axis=0)
        self.kk += (k**2).sum(axis=0)
        self.spread += probe.var(axis=0, ddof=1, dtype=np.float64).sum(axis=0) / len(probe)
        for label in range(len(self.counts)):
            here = classes == label
            self.counts[label] += np.count_nonzero(here)
            self.p_sums[label] += p[here].sum(axis=0)
            self.k_sums[label] += k[here].sum(axis=0)

    def mixing(self, groups: Sequence[slice]) -> Mixing:
        """How to mix, for components in these groups."""
        noise = _towards_group(self.spread / self.columns, groups, self.columns)
        slope = self._slope(noise, groups)
        rest = self.pp - 2 * slope * self.pk + slope**2 * self.kk  # sum of (P - b K)^2
        pooled = self._pooled(slope, noise, groups) if len(self.counts) else None
        if pooled is not None:
            sums = self.p_sums - slope * self.k_sums
            rest = rest + (self.counts[:, None] * pooled**2 - 2 * pooled * sums).sum(axis=0)
        return Mixing(slope, self._share(rest / self.columns, noise, groups), noise, pooled)

    def _slope(self, noise: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
        """Slope of P on K: each component's own, drawn towards its group's by how well it is known."""
        squares = self.kk + _TINY
        own = self.pk / squares
        for group in groups:
            together = self.pk[group].sum() / squares[group].sum()
            doubt = noise[group] / squares[group]
            weight = squares[group] / squares[group].sum()
            between = max(0.0, float((weight * ((own[group] - together) ** 2 - doubt)).sum()))
            own[group] = together + between / (between + doubt + _TINY) * (own[group] - together)
        return own

    def _share(self, rest: np.ndarray, noise: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
        """Part of what is left that is signal, [components]."""
        signal = rest - noise
        for group in groups:
            ratio = max(0.0, float(signal[group].sum() / max(noise[group].sum(), _TINY)))
            prior = PRIOR_COLUMNS * ratio * noise[group]
            signal[group] = (self.columns * signal[group] + prior) / (self.columns + PRIOR_COLUMNS)
        signal = np.maximum(signal, 0.0)
        return np.asarray(signal / (signal + noise + _TINY))

    def _pooled(self, slope: np.ndarray, noise: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
        """Mean of P - b K over columns and those of a class, as far as believed: [classes, components]."""
        sums = self.p_sums - slope * self.k_sums
        overall = _believed(sums.sum(axis=0) / self.columns, noise / self.columns, groups)
        found = np.empty_like(sums)
        for label, count in enumerate(self.counts):
            mean = sums[label] / max(count, 1.0) - overall
            found[label] = overall + (_believed(mean, noise / count, groups) if count else 0.0)
        return found


@dataclass(frozen=True)
class Mixing:
    """How P and K are mixed.

    Attributes:
        slope: b, [components].
        share: t / (t + s2), the part of P - b K that is believed, [components].
        noise: s2, variance of P, [components].
        pooled: what P - b K is drawn to, [classes, components]; None does not pool.
        without: the same from all replicates but one, for each of them: to tell how good weights are,
            which figures found from the same noise would overstate. Of two replicates it is the whole's.
    """

    slope: np.ndarray
    share: np.ndarray
    noise: np.ndarray
    pooled: np.ndarray | None = None
    without: tuple[Mixing, ...] = ()

    def mix(self, probe: np.ndarray, kept: np.ndarray, classes: np.ndarray | None = None) -> Mixed:
        """Weights of some columns; arguments as of `MixStatistics.add`."""
        weights = self.weights(probe, kept, classes)
        own = probe * self.share + kept * (self.slope * (1 - self.share))  # of each replicate
        variance = own.var(axis=0, ddof=1, dtype=np.float64) / len(probe)
        # What is left of P - b K by shrinking has the variance (1 - share)^2 t = share (1 - share) s2.
        errors = np.sqrt(variance + self.share * (1 - self.share) * self.noise)
        noise = probe.var(axis=0, ddof=1, dtype=np.float64).sum(axis=1) / len(probe)
        agreement = self._agreement(weights, probe, kept, classes)
        return Mixed(weights, errors, _products(probe), noise, agreement)

    def _agreement(
        self, weights: np.ndarray, probe: np.ndarray, kept: np.ndarray, classes: np.ndarray | None
    ) -> np.ndarray:
        """v.w: weights without a replicate times its P, in proportion to their squares: so for all."""
        products, squares = np.zeros((2, len(weights)))
        for left_out, mixing in enumerate(self.without):
            others = np.arange(len(probe)) != left_out
            found = mixing.weights(probe[others], kept[others], classes)
            products += np.einsum("cp,cp->c", found, probe[left_out])
            squares += (found**2).sum(axis=1)
        return np.asarray(products / np.maximum(squares, _TINY) * (weights**2).sum(axis=1))

    def weights(self, probe: np.ndarray, kept: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
        """b K + pooled + share (P - b K - pooled), [columns, components]."""
        p, k = probe.mean(axis=0, dtype=np.float64), kept.mean(axis=0, dtype=np.float64)
        base = self.slope * k + (0.0 if self.pooled is None else self.pooled[classes])
        return np.asarray(base + self.share * (p - base))


def mixing_of(
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    groups: Sequence[slice],
    num_components: int,
    num_classes: int = 0,
) -> Mixing:
    """How to mix, from (probe, kept, classes) of all columns, block by block; see `MixStatistics`."""
    together = MixStatistics(num_components, num_classes)
    without: list[MixStatistics] = []
    for probe, kept, classes in blocks:
        together.add(probe, kept, classes)
        if len(probe) < 3:  # of one replicate the noise is not known
            continue
        without = without or [MixStatistics(num_components, num_classes) for _ in probe]
        for left_out, statistics in enumerate(without):
            others = np.arange(len(probe)) != left_out
            statistics.add(probe[others], kept[others], classes)
    whole = together.mixing(groups)
    parts = tuple(statistics.mixing(groups) for statistics in without)
    return dataclasses.replace(whole, without=parts or (whole, whole))


def _products(probe: np.ndarray) -> np.ndarray:
    """Sum over components of products of two different replicates, mean over pairs, [columns]."""
    count = len(probe)
    total = probe.sum(axis=0, dtype=np.float64)
    same = np.einsum("rcp,rcp->c", probe, probe, dtype=np.float64)
    return np.asarray((np.einsum("cp,cp->c", total, total) - same) / (count * (count - 1)))


def mix(
    probe: np.ndarray, kept: np.ndarray, groups: Sequence[slice], classes: np.ndarray | None = None
) -> Mixed:
    """Mix the two estimates of columns that are all at hand.

    Args:
        probe: P of each replicate, [replicates, columns, components].
        kept: K likewise.
        groups: components that belong together.
        classes: pool over all columns, and over those of one class, [columns]; None does not pool.

    >>> rng = np.random.default_rng(0)
    >>> truth = rng.normal(size=(50, 30))
    >>> probe = truth + rng.normal(size=(4, 50, 30))                # noisy, right on average
    >>> kept = 0.8 * truth + 0.05 * rng.normal(size=(4, 50, 30))    # hardly noisy, too small
    >>> mixed = mix(probe, kept, [slice(0, 30)])
    >>> bool(((mixed.weights - truth) ** 2).mean() < 0.1 * ((probe.mean(axis=0) - truth) ** 2).mean())
    True
    """
    num_classes = 0 if classes is None else int(classes.max()) + 1
    mixing = mixing_of([(probe, kept, classes)], groups, probe.shape[2], num_classes)
    return mixing.mix(probe, kept, classes)


def _towards_group(values: np.ndarray, groups: Sequence[slice], columns: int) -> np.ndarray:
    """Each component's figure, and `PRIOR_COLUMNS` columns' worth of its group's mean."""
    found = np.empty_like(values)
    for group in groups:
        own = values[group]
        found[group] = (columns * own + PRIOR_COLUMNS * own.mean()) / (columns + PRIOR_COLUMNS)
    return found


def _believed(mean: np.ndarray, doubt: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
    """Means, drawn to zero as far as they do not stand out of their noise."""
    found = np.empty_like(mean)
    for group in groups:
        signal = max(0.0, float((mean[group] ** 2 - doubt[group]).mean()))
        found[group] = mean[group] * signal / (signal + doubt[group] + _TINY)
    return found
