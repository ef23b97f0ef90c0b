"""The groups that stage 2 trains on: which queries, and which items of each are compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taoemb.catalog import Query, QuerySet
from taoemb.contrastive import Positions, Positives
from taoemb.encoder import Encoder
from taoemb.index.refresh import AnyIndex
from taoemb.trainer_config import RetrievalGRPOConfig
from taoemb.types import FloatArray

_FIRST, _SURELY = 1e6, 2e6  # above any score: places that are taken before the index's
_KEPT = 4
"""Batches of groups that the refill keeps; our choice."""


@dataclass
class Group:
    """The candidates of ``B`` queries: catalog positions ``[B, K]``, their rewards ``[B, K, R]`` before the gate once they are
    judged, and for each dimension that is trained their log-probabilities ``[B, K]`` before the first update, which sets them."""

    queries: Positions
    items_BK: Positions
    rewards_BKR: FloatArray | None = None
    logp_old: dict[int, Tensor] = field(default_factory=dict)


class CandidateSampler:
    """Draws queries and makes their groups: the index proposes, and what is asked for besides takes places of its own.

    Args:
        encoder: the model in training.
        queries: the catalog's queries; those of ``train_queries`` (positions) are drawn.
        size: items of the catalog.
        positives: the known positives, where there are any.
        encode_items: embeds items by position, ``[U, D]``; position -1 gives a zero row.
        config: the settings of stage 2.

    Raises ValueError when the settings need positives or frequencies that there are not.
    """

    def __init__(
        self,
        encoder: Encoder,
        queries: QuerySet,
        train_queries: Positions,
        size: int,
        positives: Positives | None,
        encode_items: Callable[[Positions], Tensor],
        config: RetrievalGRPOConfig,
    ) -> None:
        self.encoder, self.size, self.positives, self.config = encoder, size, positives, config
        self.query_texts, self.train_queries = queries.texts, train_queries
        self._encode_items = encode_items
        if config.candidates != "index" and positives is None:
            raise ValueError(f"candidates={config.candidates!r} takes the positives of the batch, and no training query has "
                             "one; give clicks or grades, or use candidates=index")  # fmt: skip
        self._chances = draw_chances([queries[i] for i in train_queries.tolist()], config.tail_power)

    @torch.no_grad()
    def draw(self, index: AnyIndex, batch_size: int, rng: np.random.Generator) -> Group:
        """``B`` queries and their groups, by the encoder and the index of this moment."""
        config = self.config
        count = min(batch_size, len(self.train_queries))
        queries = rng.choice(self.train_queries, count, replace=False, p=self._chances)
        query_BD = self.encoder.forward([self.query_texts[q] for q in queries], "query")
        K = min(config.num_candidates, self.size)
        positives = self._sample_positives(queries, rng)
        batch = self._from_batch(query_BD, positives, K)
        proposed, scores = self._from_index(index, query_BD, K, rng)
        drawn = rng.integers(self.size, size=(len(queries), config.random_candidates))
        pool_BM = np.concatenate([batch, proposed, drawn, positives[:, None]], axis=1)
        asked_M = np.ones(pool_BM.shape[1], dtype=bool)  # columns that get their places, whatever their scores
        asked_M[batch.shape[1] : batch.shape[1] + proposed.shape[1]] = asked_M[-1] = False
        if config.overfetch > 1:
            distinct, where = np.unique(pool_BM, return_inverse=True)  # -1, nothing found, comes first
            item_UD = self._encode_items(distinct)
            places = torch.from_numpy(where.reshape(pool_BM.shape)).to(item_UD.device)
            scores_BM = torch.einsum("bd,bmd->bm", query_BD, item_UD[places]).cpu()
        else:
            scores_BM = torch.full(pool_BM.shape, -2.0)
            scores_BM[:, batch.shape[1] : batch.shape[1] + proposed.shape[1]] = torch.from_numpy(scores)
        if config.exploration:
            uniform = rng.random(scores_BM.shape).clip(1e-12, 1 - 1e-7)
            scores_BM = (
                scores_BM - config.exploration * config.temperature * torch.from_numpy(np.log(-np.log(uniform))).float()
            )
        unusable_BM = _absent_or_repeated(pool_BM)
        scores_BM[torch.from_numpy(unusable_BM)] = -torch.inf
        K = min(K, int((~unusable_BM[:, :-1]).sum(1).min()))  # what was drawn at random may repeat
        if K < 2:
            raise ValueError(f"candidates={config.candidates!r}: {len(queries)} queries give a group of {K}, with nothing to compare; "
                             "raise batch_size, or use candidates=index")  # fmt: skip
        return Group(queries, np.take_along_axis(pool_BM, self._choose(scores_BM, pool_BM, queries, asked_M, K), 1))

    def _from_index(
        self, index: AnyIndex, query_BD: Tensor, K: int, rng: np.random.Generator
    ) -> tuple[Positions, FloatArray]:
        """What the index proposes, ``[B, overfetch * K]`` each: items, and their scores by its vectors."""
        if self.config.candidates == "in_batch":
            return np.zeros((len(query_BD), 0), np.int64), np.zeros((len(query_BD), 0), np.float32)
        proposed, scores = index.search_positions(query_BD.cpu().numpy(), self.config.overfetch * K)
        missing = proposed < 0  # an approximate index may find fewer
        if missing.any():
            proposed = np.where(missing, rng.integers(self.size, size=proposed.shape), proposed)
            scores = np.where(missing, np.float32(-2), scores)
        return proposed, scores

    def _from_batch(self, query_BD: Tensor, positives: Positions, K: int) -> Positions:
        """For each query the best of the positives of all queries of the batch: all of its group but the random items, or half."""
        config = self.config
        places = {"index": 0, "in_batch": K - config.random_candidates, "mixed": K // 2}[config.candidates]
        distinct = np.unique(positives[positives >= 0])
        if not places or not len(distinct):
            return np.zeros((len(query_BD), 0), np.int64)
        scores = query_BD @ self._encode_items(distinct).T
        return np.asarray(distinct[scores.topk(min(places, len(distinct))).indices.cpu().numpy()])

    def _choose(
        self, scores_BM: Tensor, pool_BM: Positions, queries: Positions, asked_M: np.ndarray, K: int
    ) -> Positions:
        """Columns of the pool that make the group: those asked for, the Top of the index's, and a positive if asked."""
        priority = scores_BM.clone()
        asked = torch.from_numpy(asked_M)
        priority[:, asked] = torch.where(priority[:, asked].isinf(), -torch.inf, _FIRST)
        if self.positives is not None and self.config.force_positives:
            top = priority.topk(K).indices.numpy()
            for b, query in enumerate(queries.tolist()):
                known = self.positives.of(query)
                if len(known) and not np.isin(pool_BM[b, top[b]], known).any():
                    priority[b, np.flatnonzero(pool_BM[b] == pool_BM[b, -1])[0]] = _SURELY
        else:
            priority[:, -1] = -torch.inf
        return np.asarray(priority.topk(K).indices.numpy())

    def _sample_positives(self, queries: Positions, rng: np.random.Generator) -> Positions:
        """One known positive per query, -1 where none is known."""
        sampled = np.full(len(queries), -1, dtype=np.int64)
        if self.positives is not None:
            known = np.isin(queries, self.positives.queries)
            sampled[known] = self.positives.sample(queries[known], rng)
        return sampled


@dataclass
class GroupBuffer:
    """Judged groups whose rewards differ; they take the places of groups that teach nothing, at no judge call."""

    rows: deque[tuple[int, Positions, FloatArray]] = field(default_factory=deque)

    def refill(self, group: Group, equal_B: np.ndarray, rng: np.random.Generator) -> int:
        """Replace the groups marked in ``equal_B`` by kept ones of other queries and the same K, keep the rest; returns how many
        were replaced."""
        assert group.rewards_BKR is not None
        held, K, replaced = set(group.queries.tolist()), group.items_BK.shape[1], 0
        fitting = [i for i, (query, items, _) in enumerate(self.rows) if query not in held and len(items) == K]
        order = iter(rng.permutation(fitting).tolist())
        kept = [(int(q), i.copy(), r.copy())
                for q, i, r, equal in zip(group.queries, group.items_BK, group.rewards_BKR, equal_B, strict=True) if not equal]  # fmt: skip
        for b in np.flatnonzero(equal_B):
            for chosen in order:
                if self.rows[chosen][0] not in held:
                    group.queries[b], group.items_BK[b], group.rewards_BKR[b] = self.rows[chosen]
                    held.add(self.rows[chosen][0])
                    replaced += 1
                    break
        self.rows.extend(kept)
        while len(self.rows) > _KEPT * len(group.queries):
            self.rows.popleft()
        return replaced

    def state(self) -> dict[str, np.ndarray]:
        """For a checkpoint; see `restore`. Groups of fewer candidates are filled up with item -1."""
        if not self.rows:
            return {}
        K = max(len(items) for _, items, _ in self.rows)
        items = [np.pad(items, (0, K - len(items)), constant_values=-1) for _, items, _ in self.rows]
        rewards = [np.pad(rewards, ((0, K - len(rewards)), (0, 0))) for _, _, rewards in self.rows]
        return {"kept_queries": np.array([query for query, _, _ in self.rows]), "kept_items": np.stack(items),
                "kept_rewards": np.stack(rewards)}  # fmt: skip

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up what `state` gave."""
        if "kept_queries" in arrays:
            rows = zip(*(arrays[f"kept_{name}"] for name in ("queries", "items", "rewards")), strict=True)
            self.rows = deque((int(query), items[items >= 0], rewards[items >= 0]) for query, items, rewards in rows)


def draw_chances(queries: Sequence[Query], power: float) -> npt.NDArray[np.float64] | None:
    """The chance of each query to be drawn, ``frequency ** -power`` scaled to sum to 1; None with power 0, all alike.

    Raises ValueError where the frequencies are all the same or some are 0.
    """
    if not power:
        return None
    frequencies = np.array([query.frequency for query in queries], dtype=np.float64)
    if not (frequencies > 0).all() or np.ptp(frequencies) == 0:
        raise ValueError(
            f"tail_power={power} needs the frequencies of the training queries; all are the same, or some are 0"
        )
    chances = np.exp(-power * np.log(frequencies / frequencies.min()))
    return np.asarray(chances / chances.sum())


def _absent_or_repeated(pool_BM: Positions) -> np.ndarray:
    """Places of a pool that hold nothing (-1), or an item that stands further left in the same row already."""
    order = np.argsort(pool_BM, axis=1, kind="stable")
    ordered = np.take_along_axis(pool_BM, order, 1)
    repeated = np.zeros_like(ordered, dtype=bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    marked = np.zeros_like(repeated)
    np.put_along_axis(marked, order, repeated, axis=1)
    return marked | (pool_BM < 0)
