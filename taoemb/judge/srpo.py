"""Stepwise rewards (TaoSR-SHE, arXiv 2510.07972): which tokens of a chain belong to which step, what each step is worth, and the advantage of
each token.

Published is the idea of SRPO, without formulas or constants: step-level rewards from a generative step reward model and an offline verifier.
The formulas and constants here are our design.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taoemb.advantages import normalize
from taoemb.catalog import Item, Query
from taoemb.judge.examples import GRADE_LINE, LINES, Style

Mask = Literal["none", "critical", "first_error"]
STEPS = (GRADE_LINE, *LINES)
"""The steps of a chain, by what their lines begin with; the label is the first, wherever it stands."""
CRITICAL = (0, *(n for n, name in enumerate(STEPS) if name in ("Category:", "Attributes:")))
"""The steps that the label follows from, and the label."""
StepModel = Callable[[Sequence[tuple[Query, Item]], Sequence[str], Sequence[str]], Sequence[float | None]]
"""Pairs, the lines of the reasons before a step, and the step -> how likely each step is right, 0 to 1; None abstains."""


@dataclass(frozen=True)
class SRPOConfig:
    """Stepwise advantages. All constants are ours."""

    weight: float = 0.0
    """Share of the step's own advantage inside a step; 0 is plain GRPO."""
    model: str = ""
    """Folder of a language model, trained with ``scheme=step``, that judges the steps which the examples' own reasons do not verify."""
    mask: Mask = "none"
    """Which steps are trained: ``none`` all; ``critical`` the two verdicts and the label; ``first_error`` of each completion the label, and the steps
    up to its first wrong one."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: give 0, for plain GRPO, to 1")
        if self.mask not in get_args(Mask):
            raise ValueError(f"mask={self.mask!r}: give one of {', '.join(get_args(Mask))}")


def segment(text: str, style: Style = "post") -> list[tuple[int, int, int]]:
    """(step, begin, end) of the lines of a chain, in characters; positions in `STEPS`. Of a step that is there twice the first counts, and
    lines that begin with none of the names belong to no step.

    >>> segment("4\\nCategory: exact")
    [(0, 0, 1), (3, 2, 17)]
    """
    found: dict[int, tuple[int, int, int]] = {}
    for number, line in enumerate(re.finditer(r"[^\n]+", text)):
        begins = line.group().lstrip()
        step = next((n for n, name in enumerate(STEPS) if begins.startswith(name)), None)
        if style != "pre":
            step = 0 if number == 0 else step or None  # the label is the first line, and no other
        if step is not None and step not in found:
            found[step] = (step, line.start(), line.end())
    return sorted(found.values(), key=lambda span: span[1])


def token_steps(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], style: Style = "post"
) -> npt.NDArray[np.int64]:
    """Of each token of a completion the step that it is written in, ``-1`` in none, ``[T]``; a token over two lines belongs to the later one.
    ``decode`` turns tokens into text."""
    ends = [len(decode(ids[: n + 1])) for n in range(len(ids))]
    spans = segment(decode(ids), style)
    steps = np.full(len(ids), -1, dtype=np.int64)
    begin = 0
    for n, end in enumerate(ends):
        inside = [step for step, first, last in spans if first < end and last > begin]
        if inside and end > begin:
            steps[n] = inside[-1]
        elif n and begin == end < ends[-1]:  # bytes of a character that is not whole yet
            steps[n] = steps[n - 1]
        begin = end
    return steps


def verified(
    text: str, reference: str, style: Style = "post", *, verdicts_only: bool = False
) -> npt.NDArray[np.float64]:
    """The offline verifier: of each of `STEPS` 1 where a chain's line says what the line of the correct chain says, 0 where it says
    something else, NaN where either lacks it. Capitals and spaces do not count. ``verdicts_only``: of the label and the two verdicts, for
    reasons in free words."""
    said, right = (
        {step: "".join(chain[a:b].lower().split()) for step, a, b in segment(chain, style)}
        for chain in (text, reference)
    )
    known = [step for step in (CRITICAL if verdicts_only else range(len(STEPS))) if step in said and step in right]
    values = np.full(len(STEPS), np.nan)
    values[known] = [float(said[step] == right[step]) for step in known]
    return values


def step_advantages(
    outcome_B: Tensor, steps_BT: Tensor, values_BS: Tensor, group: int, config: SRPOConfig, clip: float = 2.0
) -> Tensor:
    """Advantage of each token, ``[B, T]``.

    On the label and between the steps it is the completion's ``outcome_B``. In step ``s`` it is ``(1 - weight) * outcome + weight * z`` with
    ``z`` the step's value in standard deviations over those of its group that have one (0 where they are equal), clamped to ±``clip``; where
    the value is unknown the outcome alone. ``steps_BT`` is of `token_steps`, ``-1`` also for padding; rows of a group of ``group`` stand
    together. Masked steps get 0.

    Raises ValueError when ``B`` is no multiple of ``group``.
    """
    if len(outcome_B) % group:
        raise ValueError(f"{len(outcome_B)} completions in groups of {group}: give whole groups")
    values = values_BS.view(-1, group, values_BS.shape[1]).transpose(1, 2)
    z = normalize(values, torch.ones_like(values)).clamp(-clip, clip).transpose(1, 2).reshape(values_BS.shape)
    mixed = (1 - config.weight) * outcome_B[:, None] + config.weight * z
    mixed = torch.where(values_BS.isnan(), outcome_B[:, None], mixed)
    mixed[:, 0] = outcome_B
    if config.mask == "critical":
        mixed[:, [n for n in range(values_BS.shape[1]) if n not in CRITICAL]] = 0
    inside = steps_BT >= 0
    advantages = torch.where(inside, mixed.gather(1, steps_BT.clamp(min=0)), outcome_B[:, None])
    if config.mask == "first_error":
        wrong = torch.where(inside, (values_BS < 0.5).gather(1, steps_BT.clamp(min=0)) & (steps_BT > 0), False)
        after = wrong.cumsum(1) > 0
        step_of_error = torch.where(after.any(1), steps_BT.gather(1, after.int().argmax(1)[:, None])[:, 0], -1)
        later = after & (steps_BT != step_of_error[:, None]) & (steps_BT > 0)
        advantages = advantages.masked_fill(later, 0.0)
    return advantages
