"""From scores to verdicts: the arithmetic that the cheap judges share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taoemb.types import MAX_GRADE, FloatArray, JudgeOutput

GRADES = MAX_GRADE + 1
CUTS = (0.25, 0.5, 0.75)
"""A score of CUTS[k - 1] is as likely below grade k as not; our choice, even steps."""
SOFTNESS = 0.08
"""Width of the smoothed steps between grades, in units of the score; our choice."""


def output(probs: npt.ArrayLike) -> JudgeOutput:
    """A `JudgeOutput` of grade probabilities ``[N, 4]``; a row that holds NaN abstains."""
    rows = np.asarray(probs, dtype=np.float32).reshape(-1, GRADES)
    rows[np.isnan(rows).any(axis=1)] = np.nan
    values = np.arange(GRADES, dtype=np.float32) / MAX_GRADE
    return JudgeOutput(rows, np.clip(rows @ values, 0.0, 1.0))


def ordered_probs(scores: npt.ArrayLike, cuts: Sequence[float] = CUTS, softness: float = SOFTNESS) -> FloatArray:
    """Grade probabilities ``[N, 4]`` of scores ``[N]``; NaN gives a row of NaN.

    The ordered logistic model: ``P(grade >= k) = sigmoid((score - cuts[k - 1]) / softness)`` (McCullagh 1980).
    """
    score = np.asarray(scores, dtype=np.float64).reshape(-1, 1)
    reached = 0.5 * (1.0 + np.tanh((score - np.asarray(cuts)) / (2.0 * softness)))
    edges = np.hstack([np.ones_like(score), reached, np.zeros_like(score)])
    probs = edges[:, :-1] - edges[:, 1:]
    probs[np.isnan(score[:, 0])] = np.nan
    narrow: FloatArray = probs.astype(np.float32)
    return narrow


def fingerprint(*parts: object) -> str:
    """Hex digest of parts that are told apart by their ``repr``."""
    return hashlib.blake2b("\0".join(map(repr, parts)).encode(), digest_size=16).hexdigest()
