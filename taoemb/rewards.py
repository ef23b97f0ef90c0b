"""What a candidate is worth: relevance, quality and exclusivity, gated and gathered.

A reward function follows TRL's contract (`taoemb.types.RewardFunction`): columns by keyword in, one number per candidate
out, ``None`` abstains, ``async def`` is accepted. Source of the three objectives: R-GRPO (arXiv 2511.13885),
``r(q, d) = f_relevance + g_quality + h_exclusivity``; the gate, the weights and the ``membership`` form are our choice.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Items, Query
from taoemb.index.channels import BM25Channel, Channel, ranked_channels
from taoemb.types import FloatArray, RelevanceJudge, RewardFunction

if TYPE_CHECKING:
    from taoemb.contrastive import Positives

ExclusivityMode = Literal["membership", "soft_rank", "lexical", "list"]


@dataclass(frozen=True)
class RewardConfig:
    """Weights and forms of the rewards. R-GRPO sums the three with weight 1 and publishes no scales: all are our choice."""

    relevance: float = 1.0
    """Weight of relevance, the judge's score in [0, 1]."""
    quality: float = 0.5
    """Weight of quality in [0, 1]; 0 leaves it out."""
    exclusivity: float = 0.2
    """Weight of exclusivity in [0, 1]; 0 leaves it out."""
    gate: bool = True
    """Quality and exclusivity count only for candidates whose relevance reaches ``gate_threshold``; off as published.
    Relevance is the reward function of that name; without one nothing is gated."""
    gate_threshold: float = 0.5
    """Lowest relevance of a good item: half way between the values of grades 1 (.33) and 2 (.67)."""
    quality_column: str = "quality"
    """Numeric item column in [0, 1]; without it, how complete an item's data are within its category."""
    exclusivity_mode: ExclusivityMode = "membership"
    """``membership``: 1 when no channel's Top-N holds the item; ``soft_rank``: rising from 0 to 1 around rank N; ``lexical``: 1 -
    term overlap with BM25's terms, the published proxy; ``list``: the share of good candidates that a list adds to what the
    channels find (``policy=pl_rloo``)."""
    exclusivity_top_n: int = 100
    """N of ``membership``, ``soft_rank`` and ``list``."""
    exclusivity_softness: float = 10.0
    """T of ``soft_rank``: it is .27 at rank N - T, .5 at N, .73 at N + T."""
    flips: tuple[float, float] = (0.0, 0.0)
    """Shares in which the judge calls a bad item good and a good one bad; relevance is corrected by them."""
    uncertain: tuple[float, float] = (0.0, 0.0)
    """The judge's scores strictly between these two say nothing: the pair gets no relevance."""
    click_floor: float = 0.0
    """The relevance of an item clicked for the query is at least this, whatever the judge says; 0 leaves clicks out."""
    diversity: float = 0.0
    """Weight of the share of different ``diversity_field`` values among a list's places (``policy=pl_rloo``); 0 leaves it out."""
    diversity_field: str = "brand"
    """Item field in which the good items of a list shall differ: brand, category, or the name of an attribute."""

    def __post_init__(self) -> None:
        for name in ("relevance", "quality", "exclusivity", "diversity"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a weight of 0 or more")
        if self.relevance == self.quality == self.exclusivity == self.diversity == 0:
            raise ValueError(
                "every reward weight is 0; give at least one of relevance, quality, exclusivity, diversity a weight"
            )
        if not 0 <= self.click_floor <= 1:
            raise ValueError(f"click_floor={self.click_floor}: give a relevance from 0 to 1")
        if not 0 <= self.gate_threshold <= 1:
            raise ValueError(f"gate_threshold={self.gate_threshold}: give a relevance from 0 to 1")
        if self.exclusivity_mode not in get_args(ExclusivityMode):
            raise ValueError(
                f"exclusivity_mode={self.exclusivity_mode!r}: give one of {', '.join(get_args(ExclusivityMode))}"
            )
        if not 0 < self.exclusivity_softness < np.inf:
            raise ValueError(f"exclusivity_softness={self.exclusivity_softness}: give more than 0 ranks")
        if min(self.flips) < 0 or not sum(self.flips) < 1:
            raise ValueError(f"flips={self.flips}: give two shares of 0 or more that sum to less than 1")
        if not 0 <= self.uncertain[0] <= self.uncertain[1] <= 1:
            raise ValueError(f"uncertain={self.uncertain}: give two scores from 0 to 1, the lower one first")
        if self.exclusivity_top_n < 1:
            raise ValueError(f"exclusivity_top_n={self.exclusivity_top_n}: give at least 1")

    @property
    def relevance_alone(self) -> bool:
        """Whether no other reward has a weight."""
        return self.quality == self.exclusivity == self.diversity == 0


class RelevanceReward:
    """The judge's score of each pair, each distinct pair judged once in a run.

    Args:
        judge: gives scores in [0, 1].
        flips: shares ``(rho_0, rho_1)`` in which a noisy judge calls a bad item good and a good one bad. The reward is then
            ``(score - rho_0) / (1 - rho_0 - rho_1)``, whose mean is the reward without the noise (Natarajan et al., 2013); it can
            leave [0, 1].
        uncertain: scores strictly between these two abstain (our choice).
        clicked: the known positives; with ``click_floor`` no reward of theirs is lower than it, and none abstains (our choice).
    """

    __name__ = "relevance"

    def __init__(
        self,
        judge: RelevanceJudge,
        *,
        flips: tuple[float, float] = (0.0, 0.0),
        uncertain: tuple[float, float] = (0.0, 0.0),
        clicked: Positives | None = None,
        click_floor: float = 0.0,
    ) -> None:
        self.judge, self.flips, self.uncertain = judge, flips, uncertain
        self.clicked, self.click_floor = clicked, click_floor
        self.calls = 0
        self.hits = 0
        self._known: dict[tuple[int, int], float] = {}

    def __call__(
        self,
        *,
        queries: Sequence[Query],
        items: Sequence[Item],
        query_positions: npt.NDArray[np.int64],
        item_positions: npt.NDArray[np.int64],
        **_: Any,
    ) -> FloatArray:
        """Relevance of ``N`` candidates, NaN where the judge abstains or is uncertain."""
        keys = list(zip(query_positions.tolist(), item_positions.tolist(), strict=True))
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            verdicts = self.judge.score([(queries[i], items[i]) for i in new])
            self._known.update({keys[i]: float(score) for i, score in zip(new, verdicts.score, strict=True)})
        self.calls += len(new)
        self.hits += len(keys) - len(new)
        scores = np.array([self._known[key] for key in keys], dtype=np.float32)
        scores[(scores > self.uncertain[0]) & (scores < self.uncertain[1])] = np.nan
        rewards = np.asarray((scores - self.flips[0]) / (1 - sum(self.flips)), dtype=np.float32)
        if self.clicked is not None and self.click_floor:
            clicked = self.clicked.known(query_positions, item_positions)
            rewards[clicked] = np.fmax(rewards[clicked], self.click_floor)  # a number, also where the judge abstains
        return rewards


class QualityReward:
    """A number per item that does not depend on the query."""

    __name__ = "quality"

    def __init__(self, quality_N: npt.ArrayLike) -> None:
        self.quality_N = np.asarray(quality_N, dtype=np.float32)

    def __call__(self, *, item_positions: npt.NDArray[np.int64], **_: Any) -> FloatArray:
        """Quality of ``N`` candidates in [0, 1], NaN where it is unknown."""
        return self.quality_N[item_positions]


class ExclusivityReward:
    """Whether another recall channel would find the item anyway; R-GRPO has one channel, the inverted index.

    Args:
        channels: any channel, also your own, or several: what one of them finds is not exclusive.
        mode: see `RewardConfig`.
        top_n: N of ``membership`` and ``soft_rank``.
        softness: T of ``soft_rank``, in ranks.

    Raises:
        TypeError: one is no channel.
        ValueError: there is none, two have the same name, or ``lexical`` is asked of anything but one `BM25Channel`.
    """

    __name__ = "exclusivity"

    def __init__(
        self, channels: Channel | Sequence[Channel], mode: ExclusivityMode, top_n: int, softness: float = 10.0
    ) -> None:
        self.channels = list(ranked_channels(channels).values())
        self.mode, self.top_n, self.softness = mode, top_n, softness
        if mode == "lexical" and not (len(self.channels) == 1 and isinstance(self.channels[0], BM25Channel)):
            raise ValueError("exclusivity_mode='lexical' compares words, which one BM25Channel alone can do; got "
                             f"{[c.name for c in self.channels]}: use 'membership'")  # fmt: skip

    def __call__(
        self,
        *,
        queries: Sequence[Query],
        items: Sequence[Item],
        item_positions: npt.NDArray[np.int64],
        **_: Any,
    ) -> FloatArray:
        """Exclusivity of ``N`` candidates in [0, 1]: ``lexical`` is 1 - term overlap [R-GRPO's proxy], ``membership``
        is 1 for an item outside every channel's Top-``top_n``, and ``soft_rank`` is ``prod_c (1 - sigmoid((N - rank_c) / T))``, with
        ranks looked up to ``N + 5 T`` and 1 beyond."""
        texts = [query.text for query in queries]
        if self.mode == "lexical":
            bm25 = cast(BM25Channel, self.channels[0])
            return 1.0 - bm25.term_overlap(texts, item_positions[:, None])[:, 0]
        ids = np.array([[item.id] for item in items], dtype=object).reshape(-1, 1)
        if self.mode == "soft_rank":
            depth = int(np.ceil(self.top_n + 5 * self.softness))
            ranks = [channel.ranks(texts, ids, depth)[:, 0] for channel in self.channels]
            kept = [
                np.where(rank > 0, (1 + np.tanh((rank - self.top_n) / (2 * self.softness))) / 2, 1.0) for rank in ranks
            ]
            return np.asarray(np.prod(kept, axis=0), dtype=np.float32)
        known = np.logical_or.reduce([channel.membership(texts, ids, self.top_n)[:, 0] for channel in self.channels])
        return np.where(known, 0.0, 1.0).astype(np.float32)


class ListExclusivityReward:
    """What a list adds to the other channels: ``Recall(channels and list) - Recall(channels)``, the items to be found being the
    good candidates of the query's group.

    Args:
        channels: as of `ExclusivityReward`.
        top_n: what a channel finds is in its Top-N.
        threshold: the lowest relevance of a good item.
    """

    __name__ = "list_exclusivity"
    of_lists = True

    def __init__(self, channels: Channel | Sequence[Channel], top_n: int, threshold: float) -> None:
        self.channels, self.top_n, self.threshold = list(ranked_channels(channels).values()), top_n, threshold

    def __call__(
        self,
        *,
        queries: Sequence[Query],
        items: Sequence[Sequence[Item]],
        relevance: FloatArray,
        group_relevance: FloatArray,
        **_: Any,
    ) -> FloatArray:
        """One number in [0, 1] for each of ``n`` lists; 0 where the group holds no good item."""
        texts = [query.text for query in queries]
        ids = np.array([[item.id for item in row] for row in items], dtype=object)
        known = np.logical_or.reduce([channel.membership(texts, ids, self.top_n) for channel in self.channels])
        added = ((relevance >= self.threshold) & ~known).sum(1)
        return np.asarray(added / np.maximum(1, (group_relevance >= self.threshold).sum(1)), dtype=np.float32)


class ListDiversityReward:
    """How many different values of a field the good items of a list have, as a share of its places; an item without the field
    adds none.

    Args:
        field: ``brand``, ``category``, or the name of an attribute.
        threshold: the lowest relevance of a good item.
    """

    __name__ = "diversity"
    of_lists = True

    def __init__(self, field: str, threshold: float) -> None:
        self.field, self.threshold = field, threshold

    def __call__(self, *, items: Sequence[Sequence[Item]], relevance: FloatArray, **_: Any) -> FloatArray:
        """One number in [0, 1] for each of ``n`` lists."""
        values = [
            {self._value(item) for item, good in zip(row, goods, strict=True) if good} - {""}
            for row, goods in zip(items, relevance >= self.threshold, strict=True)
        ]
        return np.array([len(v) / max(1, relevance.shape[1]) for v in values], dtype=np.float32)

    def _value(self, item: Item) -> str:
        if self.field in ("brand", "category"):
            return str(getattr(item, self.field) or "")
        return str(item.attributes.get(self.field, ""))


def item_quality(items: Items, column: str = "quality") -> npt.NDArray[np.float64]:
    """Quality of every item in [0, 1]: the column, or without one the percentile, within the item's category, of how
    many fields and attributes are filled in (a proxy of our choice, for catalogs without ratings or sales).

    Raises ValueError when the column leaves [0, 1], or when one was asked for by name and is not there.
    """
    values = items.column(column)
    if values is None and column != RewardConfig.quality_column:
        raise ValueError(
            f"quality_column={column!r}: the items have no such column; they have {items.table.column_names}"
        )
    if values is not None:
        if np.nanmin(values) < 0 or np.nanmax(values) > 1:
            raise ValueError(f"item column {column!r} ranges from {np.nanmin(values):g} to {np.nanmax(values):g}; "
                             "scale it to [0, 1], for example to percentiles")  # fmt: skip
        return values
    filled = np.array([
        len(i.attributes) + bool(i.description) + bool(i.brand) + (i.price is not None) for i in items
    ], dtype=np.float64)  # fmt: skip
    category = np.unique(np.array([i.category for i in items]), return_inverse=True)[1].ravel()
    quality = np.zeros(len(items))
    for group in range(int(category.max()) + 1):
        rows = np.flatnonzero(category == group)
        below = np.searchsorted(np.sort(filled[rows]), filled[rows], side="left")
        upto = np.searchsorted(np.sort(filled[rows]), filled[rows], side="right")
        quality[rows] = (below + upto) / (2 * len(rows))
    return quality


def name_of(function: RewardFunction) -> str:
    """What a reward function is called in logs and messages."""
    return str(getattr(function, "__name__", type(function).__name__))


def gather(functions: Sequence[RewardFunction], **columns: Any) -> FloatArray:
    """Call every reward function once, the async ones together: ``[N, R]`` float32, NaN where one abstains.

    Raises ValueError naming the function whose answer is no list, has a wrong length or an infinite value.
    """
    answers = [function(**columns) for function in functions]
    waiting = [answer for answer in answers if inspect.isawaitable(answer)]
    if waiting:
        done = iter(asyncio.run_coroutine_threadsafe(_wait_for(waiting), _event_loop()).result())
        answers = [next(done) if inspect.isawaitable(answer) else answer for answer in answers]
    count = len(columns["item_positions"])
    rewards = np.empty((count, len(functions)), dtype=np.float32)
    for r, (function, answer) in enumerate(zip(functions, answers, strict=True)):
        name = name_of(function)
        if not hasattr(answer, "__len__"):
            raise ValueError(f"reward function {name!r} gave {answer!r}; give one number, or None, for each candidate")
        if not isinstance(answer, np.ndarray) or answer.dtype == object:
            answer = [np.nan if v is None else v for v in cast(Sequence[Any], answer)]
        values = np.asarray(answer, dtype=np.float32)
        if values.shape != (count,):
            raise ValueError(f"reward function {name!r} gave {values.shape} values for {count} candidates")
        if np.isinf(values).any():
            raise ValueError(f"reward function {name!r} gave an infinite reward; give a number, or None to abstain")
        rewards[:, r] = values
    return rewards


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for every step, in a thread of its own: what an async client keeps open stays usable, and a caller may run
    a loop itself, as notebooks do."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="taoemb-rewards", daemon=True).start()
    return loop


async def _wait_for(answers: list[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*answers))


def gate(rewards: FloatArray, relevance: int, threshold: float) -> FloatArray:
    """``r = f + 1[f >= theta] (w_q g + w_e h)``, column by column: every objective but column ``relevance`` becomes 0 for
    a candidate that is not relevant, and NaN where relevance has abstained (our choice; R-GRPO has no gate).

    Without it exclusivity can be hacked: an item that has nothing to do with the query overlaps with no channel.
    """
    gated = rewards.copy()
    others = [r for r in range(rewards.shape[-1]) if r != relevance]
    relevant = rewards[..., relevance]
    for r in others:
        gated[..., r] = np.where(relevant >= threshold, rewards[..., r], 0.0)
        gated[..., r][np.isnan(relevant)] = np.nan
    return gated
