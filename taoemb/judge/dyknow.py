"""DyKnow-RAG (arXiv 2510.11122): one chunk of context, used where it helps. Every input is answered without it and with it, and how much better
the answers with it are decides what the answers without it teach the prompt that has it.

Formulas and constants are published, but for what is marked as ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taoemb.advantages import normalize

GAIN, SLOPE, PRODUCT = 4.0, 4.0, 0.1
"""``beta = GAIN * sigmoid(SLOPE * gap)``, ``alpha = PRODUCT / beta`` [paper]."""
POOL_LIMIT = 0.7
"""Inputs of which the most probable label has less than this are trained on [paper]."""


@dataclass(frozen=True)
class DyKnowConfig:
    """Training with and without context."""

    context: bool = False
    """Whether the second half of each group is answered with the context: ``num_generations`` is then 2n."""
    transfer: bool = True
    """Whether answers without the context also teach the prompt with it (the third term); off, two plain groups are left."""
    scale: float | None = None
    """A fixed factor in the place of both alpha and beta, to compare with [ours]; by default they follow the accuracies [paper]."""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise ValueError(f"scale={self.scale}: give a number of 0 or more, or null to follow the accuracies")


def posterior_scaling(gap: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha`` and ``beta`` for the gap ``accuracy with - accuracy without`` the context, of any shape.

    >>> [round(float(x), 3) for x in posterior_scaling(torch.tensor(0.5))]
    [0.028, 3.523]
    """
    beta = GAIN * torch.sigmoid(SLOPE * gap)
    return PRODUCT / beta, beta


def transfer(
    without: Tensor,
    with_context: Tensor,
    right: Tensor,
    right_with: Tensor,
    *,
    scale: float | None = None,
    clip: float = math.inf,
) -> Tensor:
    """What each answer without the context teaches the prompt with it, ``T(A) [groups, n]``.

    ``A`` are the rewards ``without`` in deviations of both groups together, the advantages of one group of size 2n, clamped to ±``clip``; ``T(A) = alpha A`` where
    ``A > 0``, else ``beta A``, by the share of right labels in ``right`` and ``right_with``, bool ``[groups, n]``: where the context helps,
    its prompt unlearns wrong answers from memory; where it harms, right ones are kept.
    """
    both = torch.cat([without, with_context], dim=-1)
    union = normalize(both, torch.ones_like(both))[..., : without.shape[-1]].clamp(-clip, clip)
    if scale is not None:
        return scale * union
    alpha, beta = posterior_scaling(right_with.float().mean(-1, keepdim=True) - right.float().mean(-1, keepdim=True))
    return torch.where(union > 0, alpha * union, beta * union)


def transfer_objective(logps: Tensor, mask: Tensor, transferred: Tensor) -> Tensor:
    """The third term, of answers without the context under the prompt with it: for each the mean over its tokens of ``pi * T(A)``, probabilities,
    without ratio or clip; ``[B]`` from log-probabilities and mask ``[B, T]`` and ``T(A) [B]``."""
    return (logps.exp() * mask).sum(1) / mask.sum(1).clamp(min=1) * transferred


def uncertain(probs_NC: npt.ArrayLike, limit: float = POOL_LIMIT, count: int | None = None) -> list[int]:
    """The pool of the reinforcement stage: positions whose most probable label has less than ``limit``, the least sure first [paper: limit],
    at most ``count``; rows of NaN, abstentions, are left out.

    >>> uncertain([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    [2, 1]
    """
    top = np.asarray(probs_NC, dtype=np.float64).max(axis=1)
    found: Sequence[int] = [n for n in np.argsort(top, kind="stable").tolist() if top[n] < limit]
    return list(found[:count])
