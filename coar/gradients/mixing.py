"""From noisy means of derivatives to weights: two estimates of each weight, mixed by how noisy they are.

For every column and component there are two means of the derivative by its gate: over passes in which
it was a probe (P: right on average, noisy, one pass in ten or so) and over passes in which it was
kept (K: much less noisy, but the derivative at the end of the path instead of along it). With the
noise s2 of P known from replicates, and b the slope of P on K,

    w = b K + t / (t + s2) (P - b K),    t = max(0, mean (P - b K)^2 - s2)

(empirical Bayes, James and Stein). Noise, slope and t are each component's own, over the columns at hand,
drawn towards those of its group as far as columns are few. Pooling (an option) also draws P - b K
towards its mean over all columns, and over the columns of its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIOR_COLUMNS = 16  # as many columns' worth of the group is added to each component's own figures
_TINY = 1e-30


@dataclass(frozen=True)
class Mixed:
    """Weights and what they were mixed from.

    Attributes:
        weights: [columns, components].
        errors: standard errors from replicates, [columns, components]; None with one replicate.
        slope: b, [components].
        share: t / (t + s2), the part of P - b K that is believed, [components].
        noise: variance of P, [components]; NaN with one replicate.
    """

    weights: np.ndarray
    errors: np.ndarray | None
    slope: np.ndarray
    share: np.ndarray
    noise: np.ndarray


def mix(
    probe: np.ndarray,
    kept: np.ndarray,
    groups: Sequence[slice],
    classes: np.ndarray | None = None,
) -> Mixed:
    """Mix the two estimates.

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
    replicates, columns, _ = probe.shape
    p, k = probe.mean(axis=0, dtype=np.float64), kept.mean(axis=0, dtype=np.float64)
    if replicates == 1:
        return _unmixed(p, k, groups)
    spread = probe.var(axis=0, ddof=1, dtype=np.float64).mean(axis=0) / replicates
    noise = _towards_group(spread, groups, columns)
    slope = _slope(p, k, noise, groups)
    base = slope * k
    rest = p - base
    if classes is not None:
        pooled = _pooled(rest, noise, groups, classes)
        base, rest = base + pooled, rest - pooled
    share = _share(rest, noise, groups)
    own = probe * share + slope * kept * (1 - share)  # of each replicate, with the same slope and share
    errors = own.std(axis=0, ddof=1) / np.sqrt(replicates)
    return Mixed(base + share * rest, errors, slope, share, noise)


def _unmixed(p: np.ndarray, k: np.ndarray, groups: Sequence[slice]) -> Mixed:
    """With one replicate nothing is known of the noise: a quarter of the difference is believed."""
    slope = np.empty(p.shape[1])
    for group in groups:
        slope[group] = (p[:, group] * k[:, group]).sum() / max((k[:, group] ** 2).sum(), _TINY)
    share = np.full(p.shape[1], 0.25)
    return Mixed(slope * k + share * (p - slope * k), None, slope, share, np.full(p.shape[1], np.nan))


def _towards_group(values: np.ndarray, groups: Sequence[slice], columns: int) -> np.ndarray:
    """Each component's figure, and `PRIOR_COLUMNS` columns' worth of its group's mean."""
    found = np.empty_like(values)
    for group in groups:
        own = values[group]
        found[group] = (columns * own + PRIOR_COLUMNS * own.mean()) / (columns + PRIOR_COLUMNS)
    return found


def _slope(p: np.ndarray, k: np.ndarray, noise: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
    """Slope of P on K: each component's own, drawn towards its group's by how well it is known."""
    squares = (k**2).sum(axis=0) + _TINY
    own = (p * k).sum(axis=0) / squares
    for group in groups:
        together = (p[:, group] * k[:, group]).sum() / squares[group].sum()
        doubt = noise[group] / squares[group]
        weight = squares[group] / squares[group].sum()
        between = max(0.0, float((weight * ((own[group] - together) ** 2 - doubt)).sum()))
        own[group] = together + between / (between + doubt + _TINY) * (own[group] - together)
    return own


def _share(rest: np.ndarray, noise: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
    """Part of what is left that is signal, [components]."""
    columns = len(rest)
    signal = (rest**2).mean(axis=0) - noise
    for group in groups:
        ratio = max(0.0, float(signal[group].sum() / max(noise[group].sum(), _TINY)))
        prior = ratio * noise[group]
        signal[group] = (columns * signal[group] + PRIOR_COLUMNS * prior) / (columns + PRIOR_COLUMNS)
    signal = np.maximum(signal, 0.0)
    return np.asarray(signal / (signal + noise + _TINY))


def _pooled(rest: np.ndarray, noise: np.ndarray, groups: Sequence[slice], classes: np.ndarray) -> np.ndarray:
    """Mean of each component over all columns and over its class, as far as it stands out of the noise."""
    found = _believed_mean(rest, noise, groups) + np.zeros_like(rest)
    for label in np.unique(classes):
        here = classes == label
        found[here] += _believed_mean(rest[here] - found[here], noise, groups)
    return found


def _believed_mean(rest: np.ndarray, noise: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
    mean, doubt = rest.mean(axis=0), noise / len(rest)
    for group in groups:
        signal = max(0.0, float((mean[group] ** 2 - doubt[group]).mean()))
        mean[group] *= signal / (signal + doubt[group] + _TINY)
    return mean
