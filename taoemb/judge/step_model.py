"""A generative step reward model (TaoSR-SHE, arXiv 2510.07972): a language model that is asked whether the last step of a chain is right.

That a model rewards the steps is published; what it is asked and how it is trained is our design: it learns from chains of which some lines
are those of another example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from taoemb.catalog import Item, Query
from taoemb.judge.causal import CausalJudge
from taoemb.judge.examples import Example
from taoemb.judge.schemes import STEP

SPOILT = 0.25
"""Share of the lines before the last one that are another example's too."""


class StepJudge:
    """A `taoemb.judge.srpo.StepModel`. ``judge`` reads the labels of the scheme ``step``. Raises ValueError for another scheme."""

    def __init__(self, judge: CausalJudge) -> None:
        if judge.scheme != STEP:
            raise ValueError(
                f"the judge of steps has the scheme {judge.scheme.name!r}; give a model that was trained with scheme=step"
            )
        self.judge = judge

    def __call__(
        self, pairs: Sequence[tuple[Query, Item]], before: Sequence[str], steps: Sequence[str]
    ) -> list[float | None]:
        """The probability that each step is right; None where the model gives no number."""
        contexts = [f"{begin}\n{step}" if begin else step for begin, step in zip(before, steps, strict=True)]
        right = self.judge.score(pairs, contexts).probs[:, 1]
        return [None if np.isnan(value) else float(value) for value in right]


def step_examples(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """One pair to learn from for each example with reasons: its chain up to a line drawn at random (grade 3), or in half of the cases, where there
    is another one, with the line of that name of another example in its place (grade 0). Lines before it are another example's now
    and then (`SPOILT`), as they are in what a judge writes. Their context is the chain; for `JudgeTrainer` with ``scheme=step``.

    Raises ValueError when no example has reasons.
    """
    rng = np.random.default_rng([seed, 13])
    reasoned = [e for e in examples if e.reasons]
    if not reasoned:
        raise ValueError(
            "no example has reasons to make steps of; a step model learns from a generated shop, or from examples with reasons"
        )
    lines = [e.reasons.splitlines() for e in reasoned]
    by_name: dict[str, list[str]] = {}
    for line in dict.fromkeys(line for chain in lines for line in chain):
        by_name.setdefault(line.partition(":")[0], []).append(line)

    def other(line: str) -> str:
        """Another line of that name; the same where there is none."""
        rest = [one for one in by_name[line.partition(":")[0]] if one != line]
        return rest[int(rng.integers(len(rest)))] if rest else line

    found = []
    for example, chain in zip(reasoned, lines, strict=True):
        place = int(rng.integers(len(chain)))
        said = other(chain[place]) if rng.random() < 0.5 else chain[place]
        before = [other(line) if rng.random() < SPOILT else line for line in chain[:place]]
        grade = 3 if said == chain[place] else 0
        found.append(
            replace(example, grade=grade, category=None, attribute=None, reasons="", context="\n".join([*before, said]))
        )
    return found
