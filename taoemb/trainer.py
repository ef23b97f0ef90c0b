"""Stage 2: Retrieval-GRPO. The index proposes, the rewards judge, a group-relative policy update moves the encoder.

Left out on purpose, because all rewards of a group are known: estimators of the KL, and, unless asked for, sampled candidates.
Dropout is off, so that the policy that is updated is the policy that retrieved.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from taoemb import early_stopping, losses
from taoemb.advantages import zero_variance
from taoemb.callbacks import Callbacks
from taoemb.candidates import CandidateSampler, Group, GroupBuffer
from taoemb.catalog import Catalog
from taoemb.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from taoemb.contrastive import (
    Positions,
    Positives,
    check_matryoshka,
    draw_prefix,
    set_learning_rate,
)
from taoemb.distributed import World
from taoemb.early_stopping import EarlyStopping
from taoemb.encoder import Encoder
from taoemb.gradcache import GradCache
from taoemb.health import CollapseAlarm, group_health
from taoemb.index.refresh import Encode, IndexRefresher, build_index
from taoemb.judge.oracle import OracleJudge
from taoemb.list_rewards import ListScorer
from taoemb.objective import Batch, Objective
from taoemb.policy import effective_rank, entropy, kl_divergence, log_probs
from taoemb.rewards import RelevanceReward, gate, gather, name_of
from taoemb.store import EmbeddingStore, encode_corpus, ids_hash
from taoemb.tracking import Backend, Tracker
from taoemb.trainer_config import RetrievalGRPOConfig
from taoemb.types import FloatArray, RewardFunction

CONSOLE = ("loss", "reward/relevance/mean", "reward/quality/mean", "reward/exclusivity/mean", "kl", "overlap@K")
PROBE = 256
"""Training queries on which the staleness of the index is measured at a refresh; our choice."""


class RetrievalGRPOTrainer:
    """Trains an encoder in place against reward functions.

    Args:
        encoder: the stage-1 model; its embeddings at this moment are the reference of the KL and anchor terms.
        catalog: items, and queries of split ``train``.
        reward_functions: one per objective (`taoemb.rewards`, or your own by TRL's contract).
        reward_weights: weight of each, in the same order.
        config: everything else.
        run_dir: the run folder; checkpoints go to ``checkpoints/NAME``, logs to ``logs/NAME.jsonl``.

    Raises ValueError when the catalog has fewer than two items, no training query, or no positives while
    ``infonce_weight`` is not 0.
    """

    def __init__(
        self,
        encoder: Encoder,
        catalog: Catalog,
        reward_functions: Sequence[RewardFunction],
        reward_weights: Sequence[float],
        config: RetrievalGRPOConfig | None = None,
        *,
        run_dir: str | Path,
        name: str = "retrieval_grpo",
        trackers: Sequence[Backend] = ("console", "jsonl"),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.encoder, self.catalog, config = encoder, catalog, config or RetrievalGRPOConfig()
        self.learning_rate = config.learning_rate or _learning_rate(encoder, reward_functions)
        self.config = dataclasses.replace(config, learning_rate=self.learning_rate)
        self.world = World.join()
        self.run_dir, self.name, self.trackers = Path(run_dir), name, trackers
        if len(reward_functions) != len(reward_weights) or not reward_functions:
            raise ValueError(f"{len(reward_functions)} reward functions, {len(reward_weights)} weights: give one each")
        self._sort_rewards(reward_functions, reward_weights)
        self.query_texts, self.item_texts = catalog.queries.texts, encoder.item_texts(catalog.items)
        self.train_queries: Positions = np.array([i for i, q in enumerate(catalog.queries) if q.split == "train"])
        if len(catalog.items) < 2:
            raise ValueError(f"the catalog has {len(catalog.items)} item; a group needs at least 2 to compare")
        if not len(self.train_queries):
            raise ValueError("the catalog has no query of split 'train'; write some with `taoemb data queries`")
        check_matryoshka(self.config.matryoshka_dims, encoder)
        self.positives = self._known_positives()
        self.sampler = CandidateSampler(encoder, catalog.queries, self.train_queries, len(catalog.items), self.positives,
                                        self._encode_positions, self.config)  # fmt: skip
        self.buffer = GroupBuffer()
        self.item_encodings = 0
        self.probe_queries = catalog.queries.select("validation", catalog.qrels)
        check_probe(self.config, catalog)
        self.stopping = EarlyStopping(self.config.eval_patience)
        self.alarm = CollapseAlarm(self.config.collapse_ratio)
        self.callbacks = Callbacks(callbacks, self.config, self.run_dir, self.world.rank, model=encoder.model)
        self._seconds: dict[str, float] = {}
        self._next: Group | None = None  # retrieved ahead of its step

    def _sort_rewards(self, functions: Sequence[RewardFunction], weights: Sequence[float]) -> None:
        """Tell the rewards of items from those of lists (``of_lists``)."""
        given = list(zip(functions, weights, strict=True))
        items = [pair for pair in given if not getattr(pair[0], "of_lists", False)]
        lists = [pair for pair in given if pair not in items]
        self.reward_functions, self.reward_names = [f for f, _ in items], [name_of(f) for f, _ in items]
        self.objective = Objective(self.config, self.reward_names, [weight for _, weight in items])
        self.lists = ListScorer([f for f, _ in lists], [weight for _, weight in lists], self.catalog, self.world)
        names = ", ".join(self.lists.names)
        if names and self.config.policy != "pl_rloo":
            raise ValueError(
                f"policy={self.config.policy!r} rewards items, and {names} rewards lists: use policy=pl_rloo"
            )
        if names and "relevance" not in self.reward_names:
            raise ValueError(f"{names} needs the relevance of a list's items: add a RelevanceReward, with weight 0 if it shall not "
                             "count by itself")  # fmt: skip
        if names and self.config.refill:
            raise ValueError(
                f"refill=true replaces groups whose items have equal rewards, and {names} rewards lists; turn it off"
            )

    def _known_positives(self) -> Positives | None:
        try:
            return Positives(self.catalog, self.item_texts)
        except ValueError as error:
            if self.config.infonce_weight:
                raise ValueError(f"infonce_weight={self.config.infonce_weight} needs positives: {error}") from None
            return None

    def train(self) -> int:
        """Run, or go on from the last checkpoint, to ``config.steps``; returns the item encodings spent.

        Raises FloatingPointError when the loss or its gradient stops being a number; that step is not taken. Raises
        CollapseError when the embeddings collapse.
        """
        config, encoder, owner = self.config, self.encoder, self.world.owner
        encoder.model.eval()
        optimizer = self.world.adamw(encoder.trainable_parameters(), self.learning_rate)
        folder, identity = self.run_dir / "checkpoints" / self.name, self._identity()
        self._begin()
        with self.world.owner_first():
            start = self._restore(load_checkpoint(folder, encoder=encoder, optimizer=optimizer, identity=identity))
        with ExitStack() as stack:
            if owner:
                stack.callback(self.refresher.close)
            self._judging = stack.enter_context(ThreadPoolExecutor(1, "taoemb-judge"))
            tracker = stack.enter_context(
                Tracker(self.trackers if owner else (), self.run_dir, self.name, identity["config"], start_step=start,
                        total_steps=config.steps, console_every=50, console_keys=CONSOLE)
            )  # fmt: skip
            self.callbacks.call("on_train_begin", start, optimizer=optimizer)
            verdicts = self._ask(self._next) if self._next else None
            for step in range(start, start if self.stopping.over else config.steps):
                self._seconds = {}
                self.callbacks.call("on_step_begin", step, optimizer=optimizer)
                rate = set_learning_rate(optimizer, self.learning_rate, config.warmup_ratio, step, config.steps)
                group = self._next or self.retrieve(step)
                rewards_BKR, refilled = self.judge(group, verdicts, step)
                if config.prefetch:
                    self._next = self.retrieve(step + 1) if step + 1 < config.steps else None
                    verdicts = self._ask(self._next) if self._next else None
                for _ in range(config.num_iterations):
                    metrics = self.update(group, rewards_BKR, optimizer, np.random.default_rng([config.seed, step, 1]))
                metrics |= {"learning_rate": rate, **refilled, **self._evaluate(step + 1)}
                if owner:
                    metrics |= self._health(step, group)
                    tracker.log(step, metrics)
                self.callbacks.call("on_step_end", step + 1, optimizer=optimizer)
                self.callbacks.log(step + 1, metrics)
                self.alarm.check(step, metrics["effective_rank"])
                asked_stop, asked_save = self.world.from_owner((self.callbacks.should_stop, self.callbacks.should_save))
                stop = self.stopping.over or asked_stop
                if (step + 1) % config.save_steps == 0 or step + 1 == config.steps or stop or asked_save:
                    self.world.collect(optimizer)
                    if owner:
                        save_checkpoint(folder, step=step + 1, encoder=encoder, optimizer=optimizer, identity=identity,
                                        extra=self._extra(), arrays=self._arrays())  # fmt: skip
                    self.callbacks.call("on_save", step + 1)
                if stop:
                    break
            self.callbacks.call("on_train_end", self.callbacks.state.global_step, optimizer=optimizer)
        if self.stopping.points:
            self.world.wait()
            load_weights(encoder, self._best)
        return self.world.from_owner(self.item_encodings)

    def _begin(self) -> None:
        """The embeddings of the start, which are the reference, and by the owner the index over them."""
        config, encoder = self.config, self.encoder
        items = queries = None
        if self.world.owner:
            begin = time.perf_counter()
            store = encode_corpus(encoder, self.catalog.items)
            spent = time.perf_counter() - begin
            items = torch.from_numpy(np.ascontiguousarray(store.vectors))
            queries = torch.from_numpy(encoder.encode_query(self.query_texts))
            refresh = config.refresh
            if encoder.items_fixed or config.candidates == "in_batch":
                refresh = dataclasses.replace(refresh, steps=0, probe_steps=0)  # nothing to refresh, or no use for it
            self.refresher = IndexRefresher(self._encoder_of_now, self._build_index, store, refresh, probe=self._probe,
                                            k=config.num_candidates, progress="console" in self.trackers)  # fmt: skip
            if "console" in self.trackers:
                tqdm.write(self.refresher.forecast(config.steps, spent), file=sys.stderr)
        self.item_encodings = len(self.item_texts)
        cpu = torch.device("cpu")  # a step needs a few thousand rows of them
        self.reference_ND = self.world.tensor_from_owner(items, cpu)
        self.reference_QD = self.world.tensor_from_owner(queries, cpu)

    @property
    def _best(self) -> Path:
        return self.run_dir / "checkpoints" / f"{self.name}-best.safetensors"

    def _evaluate(self, steps: int) -> dict[str, float]:
        """Where an evaluation is due, its figures; the model is kept where they are on the Pareto front."""
        if not self.config.eval_steps or steps % self.config.eval_steps:
            return {}
        with self._timed("evaluate"):
            owner = self.world.owner
            point = self.world.from_owner(
                early_stopping.probe(self.encoder, self.catalog, self.probe_queries) if owner else ()
            )
            if self.stopping.improves(point) and owner:
                save_weights(self.encoder, self._best)
        found = {f"eval/{name}": value for name, value in zip(early_stopping.METRICS, point, strict=True)}
        self.callbacks.call("on_evaluate", steps, metrics=found)
        return found

    def _probe(self) -> FloatArray:
        """Vectors of the training queries on which the index is measured."""
        return self.encoder.encode_query([self.query_texts[q] for q in self.train_queries[:PROBE]])

    def retrieve(self, step: int) -> Group:
        """The groups of a step; the index is refreshed before, where that is due."""
        group = None
        if self.world.owner:
            encoded = self.refresher.encoded
            with self._timed("refresh"):
                self.refresher.refresh_if_due(step)
            self.item_encodings += self.refresher.encoded - encoded
            with self._timed("retrieve"):
                rng = np.random.default_rng([self.config.seed, step])
                group = self.sampler.draw(self.refresher.index, self.config.batch_size * self.world.size, rng)
                self.refresher.note_retrieved(group.items_BK)
        found = self.world.from_owner(group)
        assert found is not None  # the owner has one
        return found

    def _ask(self, group: Group) -> Future[FloatArray]:
        """Have this process's share of the candidates judged in the background."""
        return self._judging.submit(self._verdicts, group)

    def _verdicts(self, group: Group) -> FloatArray:
        """The rewards of this process's share of a batch, ``[B', K, R]``, NaN where a reward function abstains."""
        rows = self.world.share(len(group.queries))
        items_BK = group.items_BK[rows]
        if not len(items_BK):
            return np.zeros((0, items_BK.shape[1], len(self.reward_functions)), np.float32)
        query_positions, item_positions = np.repeat(group.queries[rows], items_BK.shape[1]), items_BK.ravel()
        return gather(
            self.reward_functions,
            queries=[self.catalog.queries[q] for q in query_positions.tolist()],
            items=[self.catalog.items[i] for i in item_positions.tolist()],
            query_positions=query_positions,
            item_positions=item_positions,
        ).reshape(*items_BK.shape, len(self.reward_functions))

    def judge(
        self, group: Group, verdicts: Future[FloatArray] | None = None, step: int = 0
    ) -> tuple[FloatArray, dict[str, float]]:
        """The rewards of every candidate, ``[B, K, R]``, gated if asked; groups that teach nothing are replaced if asked."""
        with self._timed("judge"):
            mine = torch.from_numpy(verdicts.result() if verdicts else self._verdicts(group)).to(self.encoder.device)
            group.rewards_BKR = self.world.gather(mine, len(group.queries)).cpu().numpy()
            rewards = self._gated(group.rewards_BKR)
            if not self.config.refill:
                return rewards, {}
            equal_B = zero_variance(torch.from_numpy(rewards), self.objective.weights_R).numpy()
            rng = np.random.default_rng([self.config.seed, step, 2])
            replaced = self.buffer.refill(group, equal_B, rng)
            return self._gated(group.rewards_BKR), {"refilled_share": replaced / len(equal_B)}

    def _gated(self, rewards_BKR: FloatArray) -> FloatArray:
        chosen = self.config.rewards
        if not chosen.gate or "relevance" not in self.reward_names:
            return rewards_BKR
        return gate(rewards_BKR, self.reward_names.index("relevance"), chosen.gate_threshold)

    def update(
        self, group: Group, rewards: FloatArray, optimizer: torch.optim.Optimizer, rng: np.random.Generator
    ) -> dict[str, float]:
        """One optimiser step on ``-J + beta KL + infonce_weight InfoNCE + anchor_weight anchor``; returns its metrics."""
        config, encoder, device = self.config, self.encoder, self.encoder.device
        cache = GradCache(encoder, config.chunk_size, self.world)
        paired, positives, negatives = self._contrast(group, rng)
        pieces = np.concatenate([group.items_BK.ravel(), positives, negatives])
        distinct, where = np.unique(pieces, return_inverse=True)
        places = torch.from_numpy(where.ravel()).to(device)
        place_BK, own = places[: group.items_BK.size].view(group.items_BK.shape), places[group.items_BK.size :]
        with self._timed("forward"):
            reference_UD = self.reference_ND[torch.from_numpy(distinct)].to(device)
            reference_BD = self.reference_QD[torch.from_numpy(group.queries)].to(device)
            query_BD = cache.encode([self.query_texts[q] for q in group.queries], "query")
            item_UD = reference_UD
            if not encoder.items_fixed:
                item_UD = cache.encode([self.item_texts[i] for i in distinct], "document")
                self.item_encodings += len(distinct)
                if self.world.owner:
                    self.refresher.touch(distinct, item_UD.detach().cpu().numpy())
            contrast = None
            if self.positives is not None and len(paired):
                rows = torch.from_numpy(paired).to(device)
                masked = torch.from_numpy(self.positives.masked(group.queries[paired], positives, distinct)).to(device)
                contrast = rows, own[: len(paired)], masked.scatter(1, place_BK[rows], True)
            dims = [encoder.dimension, *draw_prefix(config.matryoshka_dims, rng)]
            terms = []
            for d in reversed(dims):  # what is logged is of the full embeddings
                vectors = (losses.prefix(v, d) for v in (query_BD, item_UD, reference_BD, reference_UD))
                loss, metrics = self._loss(group, rewards, *vectors, place_BK, contrast, rng)  # type: ignore[call-arg,arg-type]
                terms.append(loss)
            loss = torch.stack(terms).mean()
            if config.anchor_weight:
                drift = losses.anchor(query_BD, reference_BD) + losses.anchor(item_UD, reference_UD)
                loss = loss + config.anchor_weight * drift
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} ({metrics}); lower learning_rate or check the rewards"
            )
        with self._timed("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
            cache.backward()
            norm = torch.nn.utils.clip_grad_norm_(encoder.trainable_parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {float(norm)} ({metrics}); lower learning_rate")
            optimizer.step()
            optimizer.zero_grad()
        cosine = float((query_BD.detach() * reference_BD).sum(-1).mean())
        return {"loss": float(loss.detach()), **metrics, "grad_norm": float(norm),
                "effective_rank": effective_rank(query_BD), "cosine_to_reference": cosine}  # fmt: skip

    def _loss(
        self,
        group: Group,
        rewards: FloatArray,
        query_BD: Tensor,
        item_UD: Tensor,
        reference_BD: Tensor,
        reference_UD: Tensor,
        place_BK: Tensor,
        contrast: tuple[Tensor, Tensor, Tensor] | None,
        rng: np.random.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss but for the anchor of embeddings of one dimension; ``contrast`` holds for InfoNCE the rows of the queries, the
        places of their positives and the masked items."""
        config, D = self.config, query_BD.shape[-1]
        scores_BU = query_BD @ item_UD.T
        logp_BK = log_probs(scores_BU.gather(1, place_BK), config.temperature)
        logp_reference_BK = log_probs((reference_BD @ reference_UD.T).gather(1, place_BK), config.temperature)
        if self.encoder.dimension == D and D not in group.logp_old:
            self.objective.follow_constraints(logp_BK.detach(), torch.from_numpy(group.rewards_BKR).to(logp_BK.device))
        logp_old_BK = group.logp_old.setdefault(D, logp_BK.detach())
        kl = kl_divergence(logp_BK, logp_reference_BK).mean()
        rewards_BKR = torch.from_numpy(rewards).to(logp_BK.device)
        lists = self.lists.of(group, self.reward_names.index("relevance")) if self.lists.names else None
        batch = Batch(logp_BK, logp_old_BK, logp_reference_BK, rewards_BKR, lists)
        objective, metrics = self.objective(batch, rng)
        loss = -objective + config.beta * kl
        if contrast is not None:
            rows, own, masked = contrast
            nce = losses.info_nce(scores_BU[rows], own, masked, config.temperature)
            loss = loss + config.infonce_weight * nce
            metrics["infonce"] = float(nce.detach())
        return loss, metrics | {"kl": float(kl.detach()), "entropy": float(entropy(logp_BK.detach()).mean())}

    def _contrast(self, group: Group, rng: np.random.Generator) -> tuple[Positions, Positions, Positions]:
        """For InfoNCE: the rows of the queries with known positives, a positive of each, and the global negatives."""
        none = np.zeros(0, np.int64)
        if self.positives is None or not self.config.infonce_weight:
            return none, none, none
        paired = np.flatnonzero(np.isin(group.queries, self.positives.queries))
        count = min(self.config.global_negatives, len(self.item_texts))
        negatives = rng.choice(len(self.item_texts), count, replace=False)
        return paired, self.positives.sample(group.queries[paired], rng), negatives

    def _health(self, step: int, group: Group) -> dict[str, float]:
        metrics = group_health(group, self.reward_names)
        if self.config.constraint_rate:
            weights = zip(self.reward_names, self.objective.weights_R.tolist(), strict=True)
            metrics |= {f"reward/{name}/weight": weight for name, weight in weights}
        metrics |= {f"reward/{name}/mean": mean for name, mean in self.lists.means.items()}
        ahead = int(self._next is not None)  # then the index is that of the next step
        metrics |= {"index_age": self.refresher.age(step + ahead), "refreshes": float(self.refresher.refreshes)}
        measured = {"overlap@K": self.refresher.overlap, "index_drift": self.refresher.drift,
                    "index_recall": self.refresher.recall}  # fmt: skip
        metrics |= {name: value for name, value in measured.items() if not np.isnan(value)}
        for function in self.reward_functions:
            if isinstance(function, RelevanceReward):
                metrics["judge_calls"] = float(function.calls)
                metrics["judge_cache_hit_rate"] = function.hits / max(1, function.hits + function.calls)
        metrics["item_encodings"] = float(self.item_encodings)
        return metrics | {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}

    def _encoder_of_now(self) -> Encode:
        """Encodes items as the model stands at this moment; in the background, by a copy that training does not change."""
        encoder = self.encoder.copy() if self.config.refresh_async else self.encoder
        beside = self.config.refresh_async and encoder.device.type == "cuda"
        stream: Any = torch.cuda.Stream(encoder.device) if beside else None  # type: ignore[no-untyped-call]

        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(encoder.device))  # which still copies the weights

        def encode(positions: Positions) -> FloatArray:
            with torch.cuda.stream(stream):
                return encoder.encode_document([self.item_texts[i] for i in positions.tolist()])

        return encode

    def _build_index(self, store: EmbeddingStore) -> Any:
        return build_index(store, self.config.index_factory, str(self.encoder.device))

    def _encode_positions(self, positions: Positions) -> Tensor:
        """Embeddings of items without gradient, ``[U, D]``; position -1 gives a zero row."""
        rows = positions[positions >= 0]
        missing = torch.zeros(len(positions) - len(rows), self.encoder.dimension, device=self.encoder.device)
        if self.encoder.items_fixed:
            return torch.cat([missing, self.reference_ND[torch.from_numpy(rows)].to(missing.device)])
        texts = [self.item_texts[i] for i in rows.tolist()]
        self.item_encodings += len(texts)
        return torch.cat([missing, torch.from_numpy(self.encoder.encode_document(texts)).to(missing.device)])

    def _identity(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "rewards": [*self.reward_names, *self.lists.names],
            "reward_weights": [*self.objective.weights_R.tolist(), *self.lists.weights],
            "judges": [f.judge.fingerprint for f in self.reward_functions if isinstance(f, RelevanceReward)],
            "processes": self.world.size,
            "start_model": self.encoder.fingerprint,
            **({"tower_sharing": share} if (share := self.encoder.tower_sharing) else {}),
            "items": ids_hash(self.catalog.items.ids),
            "queries": ids_hash(self.catalog.queries.ids),
        }

    def _extra(self) -> dict[str, Any]:
        return {
            "item_encodings": self.item_encodings,
            "running_std": self.objective.running_std_R.tolist(),
            "effective_ranks": self.alarm.ranks,
            "levels": self.objective.levels,
            "evaluations": self.stopping.points,
            "waited": self.stopping.waited,
            "reward_weights": self.objective.weights_R.tolist(),
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        ahead = {"next_queries": self._next.queries, "next_items": self._next.items_BK} if self._next else {}
        return {**self.refresher.state(), **self.buffer.state(), **ahead}

    def _restore(self, found: Any) -> int:
        if found is None:
            return 0
        self.item_encodings = found.extra["item_encodings"]
        self.objective.running_std_R = torch.tensor(found.extra["running_std"])
        self.alarm.ranks, self.objective.levels = found.extra["effective_ranks"], found.extra["levels"]
        self.objective.weights_R = torch.tensor(found.extra["reward_weights"])
        points = [tuple(point) for point in found.extra["evaluations"]]
        self.stopping = EarlyStopping(self.config.eval_patience, points, found.extra["waited"])
        self.buffer.restore(found.arrays)
        if "next_queries" in found.arrays:
            self._next = Group(found.arrays["next_queries"], found.arrays["next_items"])
        if self.world.owner:
            self.refresher.restore(found.arrays)
        return int(found.step)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def check_probe(config: RetrievalGRPOConfig, catalog: Catalog) -> None:
    """Raises ValueError where the run shall be evaluated on the way and no validation query has grades."""
    if config.eval_steps and not len(catalog.queries.select("validation", catalog.qrels)):
        raise ValueError(
            f"eval_steps={config.eval_steps} needs graded queries of split 'validation'; the catalog has none"
        )


def _learning_rate(encoder: Encoder, functions: Sequence[RewardFunction]) -> float:
    """The default: of static embeddings as far as the judge is right (benchmarks/LOG.md, "The learning rate")."""
    if not encoder.static:
        return 5e-6
    judges = [function.judge for function in functions if isinstance(function, RelevanceReward)]
    right = [isinstance(judge, OracleJudge) and not judge.flip_noise for judge in judges]
    return 2e-2 if right and all(right) else 3e-3
