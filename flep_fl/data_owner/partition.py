"""Seeded splits of a labelled data set: held-out test images, and each site's share.

Nothing here is secret, so NumPy's generators serve; each purpose draws from a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ConfigError, DataError

Indices = NDArray[np.int64]
"""int64, shape (N,): positions in the label array that was passed in."""

_SUBSET, _TEST, _SHARES, _PARTITION = range(4)  # one random stream per purpose
_DIRICHLET_TRIES = 50


def stratified_subset(labels: Sequence[int] | NDArray[np.integer], count: int, seed: int) -> Indices:
    """Choose ``count`` images so that every class keeps its share (largest remainders).

    Parameters
    ----------
    labels
        Class of every image, shape (N,).
    count
        1..N.
    seed
        >= 0.

    Returns
    -------
    int64 array, shape (count,)
        Sorted positions.

    Raises
    ------
    DataError
        ``count`` is out of range.
    """
    return _stratified(np.asarray(labels), count, np.random.default_rng([seed, _SUBSET]))


def split_test(
    labels: Sequence[int] | NDArray[np.integer], fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Split off a held-out test set, stratified by class.

    Parameters
    ----------
    labels
        Class of every image, shape (N,), N >= 2.
    fraction
        Share of the test set, 0..1 exclusive; at least one image lands on either side.
    seed
        >= 0.

    Returns
    -------
    train, test : int64 arrays
        Sorted, disjoint, together all positions.

    Raises
    ------
    ConfigError
        ``fraction`` is out of range.
    DataError
        There are fewer than two images.
    """
    values = np.asarray(labels)
    if not 0.0 < fraction < 1.0:
        raise ConfigError(
            "the test fraction is out of range", expected="between 0 and 1, exclusive", found=fraction
        )
    if len(values) < 2:
        raise DataError("a held-out split needs more images", expected=">= 2", found=len(values))
    count = min(max(round(fraction * len(values)), 1), len(values) - 1)
    test = _stratified(values, count, np.random.default_rng([seed, _TEST]))
    train = np.setdiff1d(np.arange(len(values), dtype=np.int64), test)
    return train, test


def held_out_shares(test: Indices, sites: int, seed: int) -> list[Indices]:
    """Deal the held-out images out in *equal* shares, so that the plain mean over sites is correct / all.

    Parameters
    ----------
    test
        Positions of the held-out images, at least one per site.
    sites
        Number of shares, >= 1.
    seed
        >= 0.

    Returns
    -------
    list of int64 arrays
        ``sites`` arrays of equal length; the remainder (fewer than ``sites`` images) is dropped.

    Raises
    ------
    DataError
        There are fewer images than sites.
    """
    _check_sites(len(test), sites, "held-out")
    order = np.random.default_rng([seed, _SHARES]).permutation(test)
    size = len(test) // sites
    return [np.sort(order[k * size : (k + 1) * size]) for k in range(sites)]


def partition(
    labels: Sequence[int] | NDArray[np.integer], sites: int, *, name: str, alpha: float = 0.5, seed: int
) -> list[Indices]:
    """Give every training image to exactly one site.

    Parameters
    ----------
    labels
        Class of every image, shape (N,).
    sites
        Number of sites, 1..N.
    name
        A key of :data:`PARTITIONS`: ``iid`` (equal sizes up to one) or ``dirichlet`` (the share of every
        class at each site is drawn from Dirichlet(alpha); unequal sizes; Hsu, Qi, Brown 2019).
    alpha
        Concentration, > 0; small values give one-sided sites. Only ``dirichlet`` uses it.
    seed
        >= 0.

    Returns
    -------
    list of int64 arrays
        One sorted, non-empty array per site; disjoint, together all positions.

    Raises
    ------
    ConfigError
        The name is unknown, or ``alpha`` is out of range.
    DataError
        There are fewer images than sites.
    """
    values = np.asarray(labels)
    if name not in PARTITIONS:
        raise ConfigError(
            "partition.name is unknown", expected="one of " + ", ".join(sorted(PARTITIONS)), found=name
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError("partition.alpha is out of range", expected="> 0", found=alpha)
    _check_sites(len(values), sites, "training")
    parts = PARTITIONS[name](values, sites, alpha, np.random.default_rng([seed, _PARTITION]))
    return [np.sort(part).astype(np.int64) for part in parts]


def _iid(labels: NDArray[np.integer], sites: int, _alpha: float, rng: np.random.Generator) -> list[Indices]:
    return list(np.array_split(rng.permutation(len(labels)), sites))


def _dirichlet(
    labels: NDArray[np.integer], sites: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    for _ in range(_DIRICHLET_TRIES):
        parts = _draw_dirichlet(labels, sites, alpha, rng)
        if all(len(part) for part in parts):
            return parts
    # Very small alpha (or very few images): an empty site takes one image from the largest.
    for k in range(sites):
        if not len(parts[k]):
            donor = max(range(sites), key=lambda j: len(parts[j]))
            parts[k], parts[donor] = parts[donor][:1], parts[donor][1:]
    return parts


def _draw_dirichlet(
    labels: NDArray[np.integer], sites: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(sites)]
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        shares = rng.dirichlet(np.full(sites, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for k, piece in enumerate(np.split(members, cuts)):
            parts[k].append(piece)
    return [np.concatenate(part) for part in parts]


PARTITIONS: dict[str, Callable[[NDArray[np.integer], int, float, np.random.Generator], list[Indices]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
}
"""Partitions by name; add one by adding an entry."""


def _stratified(labels: NDArray[np.integer], count: int, rng: np.random.Generator) -> Indices:
    if not 1 <= count <= len(labels):
        raise DataError(
            "a subset of that size cannot be drawn", expected=f"1..{len(labels)} images", found=count
        )
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    take = np.floor(exact).astype(np.int64)
    missing = count - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == value))[:number]
        for value, number in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _check_sites(images: int, sites: int, what: str) -> None:
    if sites < 1:
        raise ConfigError("federation.sites is out of range", expected=">= 1", found=sites)
    if images < sites:
        raise DataError(
            f"there are fewer {what} images than sites",
            expected=f">= {sites}",
            found=images,
            remedy="Use more images (data.limit) or fewer sites",
        )
