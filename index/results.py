"""What every index checks on the way in and gives on the way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from taoemb.types import FloatArray

SearchResult: TypeAlias = tuple[npt.NDArray[np.object_], FloatArray]
"""ids ``[B, k]`` (str) and scores ``[B, k]``, best first; a missing place is ("", -inf)."""


def check_vectors(vectors: npt.ArrayLike, ids: Sequence[str], dimension: int | None = None) -> FloatArray:
    """Item vectors as float32 ``[N, D]``; raises ValueError on a wrong shape, NaN or infinity, or repeated ids."""
    array = _finite_matrix(vectors, "item vectors")
    if dimension is not None and array.shape[1] != dimension:
        raise ValueError(f"item vectors have {array.shape[1]} dimensions, the index has {dimension}")
    if len(array) != len(ids):
        raise ValueError(f"{len(ids)} ids for {len(array)} vectors; there must be one id per vector")
    check_unique(ids)
    return array


def check_unique(ids: Sequence[str]) -> None:
    """Raises ValueError where an id comes twice."""
    if len(set(ids)) != len(ids):
        raise ValueError("ids must be unique; update an item instead of adding it twice")


def as_queries(vectors: npt.ArrayLike, dimension: int) -> FloatArray:
    """Query vectors as float32 ``[B, D]``; raises ValueError on a wrong dimension, NaN or infinity."""
    array = _finite_matrix(vectors, "query vectors")
    if len(array) and array.shape[1] != dimension:
        raise ValueError(f"query vectors have {array.shape[1]} dimensions, the index has {dimension}")
    return array


def known_ids(ids: Sequence[str], known: Iterable[str]) -> set[str]:
    """``ids`` as a set; raises KeyError naming the first that is not ``known``."""
    wanted = set(ids)
    absent = wanted.difference(known)
    if absent:
        raise KeyError(f"{len(absent)} of {len(wanted)} ids are not in the index, the first is {min(absent)!r}")
    return wanted


def check_fingerprint(index: object, fingerprint: str) -> None:
    """Raises ValueError where an index says that it was built with another encoder than the one with this fingerprint; one of
    which nothing is known passes."""
    built = getattr(index, "fingerprint", "")
    if built and fingerprint and built != fingerprint:
        raise ValueError(f"the index was built with encoder {built}, the queries come from {fingerprint}: encode and build it "
                         "again, or search with the encoder that it was built with")  # fmt: skip


def check_k(k: int) -> int:
    """``k``, when it is at least 1."""
    if k < 1:
        raise ValueError(f"k={k}: ask for at least 1 item")
    return k


def as_result(
    positions: npt.NDArray[np.int64], scores: FloatArray, ids: npt.NDArray[np.object_], k: int
) -> SearchResult:
    """Catalog positions (-1 where nothing was found) and scores as ids and scores, padded to ``k``."""
    found_ids = np.full((len(positions), k), "", dtype=object)
    found_scores = np.full((len(positions), k), -np.inf, dtype=np.float32)
    width = positions.shape[1]
    if width and len(ids):
        hit = positions >= 0
        found_ids[:, :width] = np.where(hit, ids[np.where(hit, positions, 0)], "")
        found_scores[:, :width] = np.where(hit, scores, -np.inf)
    return found_ids, found_scores


def overlap(stale: np.ndarray, fresh: np.ndarray) -> float:
    """overlap@K: the share of the fresh Top-K positions ``[B, K]`` that the stale Top-K holds too.

    A position of -1 is an empty place and counts on neither side; without any fresh position it is 1.
    """
    found = fresh >= 0
    shared = [np.isin(b[b >= 0], a).sum() for a, b in zip(stale, fresh, strict=True)]
    return float(np.sum(shared) / found.sum()) if found.any() else 1.0


def _finite_matrix(vectors: npt.ArrayLike, what: str) -> FloatArray:
    array = np.asarray(vectors)
    if array.ndim != 2:
        raise ValueError(f"{what} must be a matrix [rows, dimensions], but have shape {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{what} have dtype {array.dtype}; give numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused below
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise ValueError(f"{what}: row {row} holds NaN or infinity")
    return array
