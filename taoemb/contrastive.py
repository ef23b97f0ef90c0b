"""Stage 1: supervised fine-tuning with in-batch and global negatives (R-GRPO, section on SFT).

No hard negatives are mined: global negatives are drawn uniformly from the whole catalog, so that items nobody ever
clicked are trained too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from taoemb.catalog import Catalog
from taoemb.checkpoint import load_checkpoint, save_checkpoint
from taoemb.distributed import World
from taoemb.encoder import Encoder
from taoemb.gradcache import GradCache
from taoemb.losses import info_nce, prefix
from taoemb.store import ids_hash
from taoemb.tracking import Backend, Tracker
from taoemb.types import GOOD_GRADE

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ContrastiveConfig:
    """Stage 1. R-GRPO publishes the loss, none of these numbers: the defaults are our choice, for static embeddings."""

    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 128
    """Queries per step, each with one positive item; of each process where several train."""
    global_negatives: int = 512
    """Items drawn uniformly from the catalog per step and shared by the batch."""
    temperature: float = 0.05
    """tau of the softmax over cosines."""
    learning_rate: float = 1e-2
    """Peak learning rate of AdamW; about 1e-2 for static embeddings, 2e-5 for transformers."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    matryoshka_dims: tuple[int, ...] = ()
    """Shorter dimensions that the embeddings shall serve too, cut off and scaled to length 1: each step trains the full ones and,
    drawn at random, one of these, half and half (Matryoshka; Kusupati et al., 2022)."""
    chunk_size: int = 0
    """Texts per forward and backward pass (GradCache); lower it when memory is short. 0: 256 for transformers, for static
    embeddings all, whose activations are small."""
    save_steps: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of every random choice."""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "temperature", "learning_rate", "save_steps")
        check_optimiser(self.warmup_ratio, self.max_grad_norm)
        for name in ("global_negatives", "chunk_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")


class Positives:
    """Which items are known to answer a query, from clicks or, without clicks, from good grades.

    Only queries with at least one positive take part; ``queries`` are their positions in the query set.
    """

    def __init__(self, catalog: Catalog, texts: Sequence[str], queries: Positions | None = None) -> None:
        position = {query_id: i for i, query_id in enumerate(catalog.queries.ids)}
        pairs: dict[int, dict[int, float]] = {}
        allowed = None if queries is None else set(queries.tolist())
        for query_id, item, weight in _labelled_pairs(catalog):
            query = position[query_id]
            if weight > 0 and (allowed is None or query in allowed):
                known = pairs.setdefault(query, {})
                known[item] = known.get(item, 0.0) + weight  # clicks at several positions
        if not pairs:
            raise ValueError(
                "no training query has a known positive item: give clicks or grades of at least 2 for queries of the "
                "train split, or write training queries with `taoemb data queries`"
            )
        self.queries: Positions = np.array(sorted(pairs), dtype=np.int64)
        self._items = {q: np.array(sorted(items), dtype=np.int64) for q, items in pairs.items()}
        self._cumulative = {q: _cumulative([pairs[q][i] for i in items.tolist()]) for q, items in self._items.items()}
        self._size = len(catalog.items)
        self._keys = np.sort(np.concatenate([q * self._size + items for q, items in self._items.items()]))
        codes: dict[str, int] = {}
        self._text_of_item = np.array([codes.setdefault(text, len(codes)) for text in texts], dtype=np.int64)

    def of(self, query: int) -> Positions:
        """Positions of the known positive items of a query; empty where none is known."""
        return self._items.get(query, np.zeros(0, np.int64))

    def sample(self, queries: Positions, rng: np.random.Generator) -> Positions:
        """One positive item for each of ``B`` queries that have one, in proportion to its clicks."""
        drawn = zip(queries.tolist(), rng.random(len(queries)).tolist(), strict=True)
        places = [(q, np.searchsorted(self._cumulative[q], u, side="right")) for q, u in drawn]
        return np.array([self._items[q][place] for q, place in places], dtype=np.int64)

    def known(self, queries: Positions, items: Positions) -> npt.NDArray[np.bool_]:
        """Whether the items are known positives of the queries; the two are broadcast against each other."""
        keys = queries * self._size + items
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.asarray(self._keys[place] == keys)

    def masked(self, queries: Positions, positives: Positions, candidates: Positions) -> npt.NDArray[np.bool_]:
        """Which of ``M`` candidates must not be a negative of which of ``B`` queries, ``[B, M]``: the query's known
        positives, and items whose text is that of the positive."""
        known = self.known(queries[:, None], candidates[None, :])
        same_text = self._text_of_item[positives][:, None] == self._text_of_item[candidates][None, :]
        return np.asarray(known | same_text)


def _labelled_pairs(catalog: Catalog) -> list[tuple[str, int, float]]:
    train = {q.id for q in catalog.queries if q.split == "train"}
    if catalog.clicks is not None:
        ids = catalog.clicks.column("query_id").to_pylist()
        items = catalog.items.positions(catalog.clicks.column("item_id").to_pylist()).tolist()
        has_counts = "clicks" in catalog.clicks.column_names
        counts = catalog.clicks.column("clicks").to_pylist() if has_counts else [1] * len(ids)
        rows = zip(ids, items, counts, strict=True)
        return [(query, item, 1.0 if count is None else float(count)) for query, item, count in rows if query in train]
    pairs = [(q, i) for q in train for i, grade in catalog.qrels.get(q, {}).items() if grade >= GOOD_GRADE]
    items = catalog.items.positions([i for _, i in pairs]).tolist()
    return [(query, item, 1.0) for (query, _), item in zip(pairs, items, strict=True)]


def _cumulative(weights: Sequence[float]) -> npt.NDArray[np.float64]:
    sums = np.cumsum(weights)
    return np.asarray(sums / sums[-1])


def train_contrastive(
    encoder: Encoder,
    catalog: Catalog,
    config: ContrastiveConfig | None = None,
    *,
    run_dir: str | Path,
    name: str = "stage1",
    trackers: Sequence[Backend] = ("console", "jsonl"),
) -> int:
    """Fine-tune ``encoder`` in place on the train split's clicks (or good grades); returns the item encodings spent.

    ``L = -log e^{s(q,d+)/tau} / (sum_in-batch e^{s/tau} + sum_global e^{s/tau})``. Checkpoints go to
    ``run_dir/checkpoints/name``; a call after a kill goes on from the last one and ends with the same weights.

    Raises ValueError when no training query has a positive, CheckpointError when ``run_dir`` holds another run, and
    FloatingPointError when the loss or its gradient stops being a number; that step is not taken.
    """
    config = config or ContrastiveConfig()
    check_matryoshka(config.matryoshka_dims, encoder)
    folder, world = Path(run_dir) / "checkpoints" / name, World.join()
    texts = encoder.item_texts(catalog.items)
    positives = Positives(catalog, texts)
    optimizer = world.adamw(encoder.trainable_parameters(), config.learning_rate)
    settings = dataclasses.asdict(config)
    identity = {
        "config": settings,
        "processes": world.size,
        "start_model": encoder.fingerprint,
        "items": ids_hash(catalog.items.ids),
        "queries": ids_hash(catalog.queries.ids),
    }
    with world.owner_first():
        found = load_checkpoint(folder, encoder=encoder, optimizer=optimizer, identity=identity)
    start, encodings = (found.step, found.extra["item_encodings"]) if found else (0, 0)
    cache = GradCache(encoder, config.chunk_size, world)
    encoder.model.train()
    with Tracker(
        trackers if world.owner else (),
        run_dir,
        name,
        settings,
        start_step=start,
        total_steps=config.steps,
        console_every=100,
    ) as tracker:
        for step in range(start, config.steps):
            rng = np.random.default_rng([config.seed, step])
            seeds = np.random.SeedSequence([config.seed, step, world.rank])  # dropout: of the step alone, for a resume
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            count = min(config.batch_size * world.size, len(positives.queries))
            queries = rng.choice(positives.queries, count, replace=False)
            items = positives.sample(queries, rng)
            negatives = rng.choice(len(texts), min(config.global_negatives, len(texts)), replace=False)
            distinct, where = np.unique(np.concatenate([items, negatives]), return_inverse=True)

            rate = set_learning_rate(optimizer, config.learning_rate, config.warmup_ratio, step, config.steps)
            query_BD = cache.encode([catalog.queries.texts[q] for q in queries], "query")
            item_UD = cache.encode([texts[i] for i in distinct], "document")
            masked_BU = torch.from_numpy(positives.masked(queries, items, distinct)).to(encoder.device)
            own_B = torch.from_numpy(where[: len(items)]).to(encoder.device)
            dims = [encoder.dimension, *draw_prefix(config.matryoshka_dims, rng)]
            loss = torch.stack([
                info_nce(prefix(query_BD, d) @ prefix(item_UD, d).T, own_B, masked_BU, config.temperature) for d in dims
            ]).mean()  # fmt: skip
            torch.autograd.backward(loss)
            cache.backward()
            norm = torch.nn.utils.clip_grad_norm_(encoder.trainable_parameters(), config.max_grad_norm)
            value = float(loss.detach())
            if not np.isfinite([value, float(norm)]).all():
                raise FloatingPointError(f"{name}: at step {step} the loss is {value} and the norm of its gradient "
                                         f"{float(norm)}; lower learning_rate")  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
            encodings += len(distinct)
            tracker.log(step, {"loss": value, "learning_rate": rate, "grad_norm": float(norm),
                               "item_encodings": encodings})  # fmt: skip
            if (step + 1) % config.save_steps == 0 or step + 1 == config.steps:
                world.collect(optimizer)
                if world.owner:
                    save_checkpoint(folder, step=step + 1, encoder=encoder, optimizer=optimizer, identity=identity,
                                    extra={"item_encodings": encodings})  # fmt: skip
    encoder.model.eval()
    return encodings


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peak: float, warmup_ratio: float, step: int, steps: int
) -> float:
    """Linear warm-up and linear fall to 0, a function of the step alone, so that a resume needs no scheduler state."""
    warmup = max(1, round(warmup_ratio * steps))
    rate = peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def check_matryoshka(dims: Sequence[int], encoder: Encoder) -> None:
    """Raise ValueError where one of these dimensions is no shorter one of the encoder's."""
    if any(not 1 <= d < encoder.dimension or d != int(d) for d in dims):
        raise ValueError(f"matryoshka_dims={list(dims)}: give whole numbers from 1 to below the {encoder.dimension} dimensions of the "
                         "embeddings")  # fmt: skip


def draw_prefix(dims: Sequence[int], rng: np.random.Generator) -> list[int]:
    """One of these dimensions, drawn at random, where there are any."""
    return [int(rng.choice(dims))] if len(dims) else []


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError naming the first of these settings that is not greater than 0."""
    for name in names:
        if not 0 < getattr(config, name) < np.inf:
            raise ValueError(f"{name}={getattr(config, name)}: give a number greater than 0")


def check_optimiser(warmup_ratio: float, max_grad_norm: float) -> None:
    """Raise ValueError when the warm-up share or the gradient norm makes no sense."""
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"warmup_ratio={warmup_ratio}: give a share from 0 to below 1")
    if not 0 < max_grad_norm < np.inf:
        raise ValueError(f"max_grad_norm={max_grad_norm}: give a number greater than 0")
