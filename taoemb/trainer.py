"""Stage 2: Retrieval-GRPO. The index proposes, the rewards judge, a group-relative policy update moves the encoder.

Left out on purpose, because all rewards of a group are known: sampling of candidates, and estimators of the KL.
Dropout is off, so that the policy that is updated is the policy that retrieved.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from taoemb import early_stopping, losses
from taoemb.advantages import group_advantages, group_moments, total_reward, zero_variance
from taoemb.catalog import Catalog
from taoemb.checkpoint import load_checkpoint, save_checkpoint
from taoemb.contrastive import Positions, Positives, make_optimizer, set_learning_rate
from taoemb.early_stopping import EarlyStopping
from taoemb.encoder import Encoder
from taoemb.gradcache import GradCache
from taoemb.index.refresh import Encode, IndexRefresher, build_index
from taoemb.policy import POLICY_ETA, candidate_weights, effective_rank, entropy, gumbel_top_k, kl_divergence, log_probs
from taoemb.rewards import RelevanceReward, gate, gather
from taoemb.store import EmbeddingStore, encode_corpus, ids_hash
from taoemb.tracking import Backend, Tracker
from taoemb.trainer_config import RetrievalGRPOConfig
from taoemb.types import FloatArray, RewardFunction

CONSOLE = ("loss", "reward/relevance/mean", "reward/quality/mean", "reward/exclusivity/mean", "kl", "overlap@K")
_WINDOW = 20
"""Steps over which the effective rank is averaged at the start and at the end; our choice."""
PROBE = 256
"""Training queries on which the staleness of the index is measured at a refresh; our choice."""


class CollapseError(ValueError):
    """The embeddings have fallen into few directions."""


@dataclass
class Group:
    """The candidates of ``B`` queries: catalog positions ``[B, K]``, and their log-probabilities under the policy before
    the first update, which sets them."""

    queries: Positions
    items_BK: Positions
    logp_old_BK: Tensor | None = None


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
    ) -> None:
        self.encoder, self.catalog, self.config = encoder, catalog, config or RetrievalGRPOConfig()
        self.run_dir, self.name, self.trackers = Path(run_dir), name, trackers
        if len(reward_functions) != len(reward_weights) or not reward_functions:
            raise ValueError(f"{len(reward_functions)} reward functions, {len(reward_weights)} weights: give one each")
        self.reward_functions = list(reward_functions)
        self.reward_names = [getattr(f, "__name__", type(f).__name__) for f in self.reward_functions]
        self.reward_weights_R = torch.tensor(list(reward_weights), dtype=torch.float32)
        self.query_texts, self.item_texts = catalog.queries.texts, encoder.item_texts(catalog.items)
        self.train_queries: Positions = np.array([i for i, q in enumerate(catalog.queries) if q.split == "train"])
        if len(catalog.items) < 2:
            raise ValueError(f"the catalog has {len(catalog.items)} item; a group needs at least 2 to compare")
        if not len(self.train_queries):
            raise ValueError("the catalog has no query of split 'train'; write some with `taoemb data queries`")
        self.positives = self._known_positives()
        self.item_encodings = 0
        self._running_std_R = torch.zeros(len(self.reward_functions))
        self.probe_queries = catalog.queries.select("validation", catalog.qrels)
        if self.config.eval_steps and not len(self.probe_queries):
            raise ValueError(
                f"eval_steps={self.config.eval_steps} needs graded queries of split 'validation'; the catalog has none"
            )
        self.stopping = EarlyStopping(self.config.eval_patience)
        self._seconds: dict[str, float] = {}
        self._levels: list[list[float]] = []  # of the objectives at the start, where there are constraints
        self._ranks: list[float] = []  # effective ranks of the first and the last steps

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
        config, encoder = self.config, self.encoder
        encoder.model.eval()
        optimizer = make_optimizer(encoder, config.learning_rate)
        folder, identity = self.run_dir / "checkpoints" / self.name, self._identity()
        begin = time.perf_counter()
        store = encode_corpus(encoder, self.catalog.items)
        spent = time.perf_counter() - begin
        self.reference_ND = torch.from_numpy(np.ascontiguousarray(store.vectors)).to(encoder.device)
        self.reference_QD = torch.from_numpy(encoder.encode_query(self.query_texts)).to(encoder.device)
        self.refresher = IndexRefresher(self._encoder_of_now, self._build_index, store, config.refresh, probe=self._probe,
                                        k=config.num_candidates, progress="console" in self.trackers)  # fmt: skip
        if "console" in self.trackers:
            tqdm.write(self.refresher.forecast(config.steps, spent), file=sys.stderr)
        self.item_encodings = len(store)
        start = self._restore(load_checkpoint(folder, encoder=encoder, optimizer=optimizer, identity=identity))
        with closing(self.refresher), Tracker(self.trackers, self.run_dir, self.name, identity["config"], start_step=start,
                     total_steps=config.steps, console_every=50, console_keys=CONSOLE) as tracker:  # fmt: skip
            for step in range(start, config.steps):
                if self.stopping.over:
                    break
                self._seconds = {}
                rng = np.random.default_rng([config.seed, step])
                self._refresh_if_due(step)
                rate = set_learning_rate(optimizer, config.learning_rate, config.warmup_ratio, step, config.steps)
                group = self.retrieve(rng)
                rewards_BKR = self.judge(group)
                for _ in range(config.num_iterations):
                    metrics = self.update(group, rewards_BKR, optimizer, np.random.default_rng([config.seed, step, 1]))
                evaluated = self._evaluate(step + 1)
                tracker.log(step, {**metrics, "learning_rate": rate, **self._health(step, group), **evaluated})
                self._check_collapse(step, metrics["effective_rank"])
                if (step + 1) % config.save_steps == 0 or step + 1 == config.steps or self.stopping.over:
                    save_checkpoint(folder, step=step + 1, encoder=encoder, optimizer=optimizer, identity=identity,
                                    extra=self._extra(), arrays=self.refresher.state())  # fmt: skip
        if self.stopping.points:
            encoder.model.load_state_dict(Encoder(self._best).model.state_dict())
        return self.item_encodings

    @property
    def _best(self) -> Path:
        return self.run_dir / "checkpoints" / f"{self.name}-best"

    def _evaluate(self, steps: int) -> dict[str, float]:
        """Where an evaluation is due, its figures; the model is kept where they are on the Pareto front."""
        if not self.config.eval_steps or steps % self.config.eval_steps:
            return {}
        with self._timed("evaluate"):
            point = early_stopping.probe(self.encoder, self.catalog, self.probe_queries)
            if self.stopping.improves(point):
                self.encoder.save(self._best)
        return {f"eval/{name}": value for name, value in zip(early_stopping.METRICS, point, strict=True)}

    def _refresh_if_due(self, step: int) -> None:
        encoded = self.refresher.encoded
        with self._timed("refresh"):
            self.refresher.refresh_if_due(step)
        self.item_encodings += self.refresher.encoded - encoded

    def _probe(self) -> FloatArray:
        """Vectors of the training queries on which the index is measured."""
        return self.encoder.encode_query([self.query_texts[q] for q in self.train_queries[:PROBE]])

    @torch.no_grad()
    def retrieve(self, rng: np.random.Generator) -> Group:
        """Draw ``B`` queries; the index proposes their candidates, and the current encoder re-scores them if over-fetched."""
        config, size = self.config, len(self.item_texts)
        with self._timed("retrieve"):
            queries = rng.choice(self.train_queries, min(config.batch_size, len(self.train_queries)), replace=False)
            query_BD = self.encoder.forward([self.query_texts[q] for q in queries], "query")
            K = min(config.num_candidates, size)
            proposed, scores = self.refresher.index.search_positions(query_BD.cpu().numpy(), config.overfetch * K)
            missing = proposed < 0  # an approximate index may find fewer
            if missing.any():
                proposed = np.where(missing, rng.integers(size, size=proposed.shape), proposed)
                scores = np.where(missing, np.float32(-2), scores)
            drawn = rng.integers(size, size=(len(queries), config.random_candidates))
            sampled = self._sample_positives(queries, rng)
            pool_BM = np.concatenate([proposed, drawn, sampled[:, None]], axis=1)
        if config.overfetch > 1:
            with self._timed("forward"):
                distinct, where = np.unique(pool_BM, return_inverse=True)  # -1, nothing found, comes first
                item_UD = self._encode_positions(distinct)
                places = torch.from_numpy(where.reshape(pool_BM.shape)).to(item_UD.device)
                scores_BM = torch.einsum("bd,bmd->bm", query_BD, item_UD[places]).cpu()
        else:
            unscored = np.full((len(queries), pool_BM.shape[1] - proposed.shape[1]), -2.0, dtype=np.float32)
            scores_BM = torch.from_numpy(np.concatenate([scores, unscored], axis=1))
        unusable_BM = _absent_or_repeated(pool_BM)
        scores_BM[torch.from_numpy(unusable_BM)] = -torch.inf
        K = min(K, int((~unusable_BM[:, :-1]).sum(1).min()))  # what was drawn at random may repeat
        chosen = self._choose(scores_BM, pool_BM, queries, K).numpy()
        group = Group(queries, np.take_along_axis(pool_BM, chosen, 1))
        self.refresher.note_retrieved(group.items_BK)
        return group

    def _choose(self, scores_BM: Tensor, pool_BM: Positions, queries: Positions, K: int) -> Tensor:
        """Columns of the pool that make the group: the random ones, the Top of the rest, and a positive if asked."""
        priority = scores_BM.clone()
        randoms = slice(pool_BM.shape[1] - 1 - self.config.random_candidates, pool_BM.shape[1] - 1)
        priority[:, randoms] = torch.where(priority[:, randoms].isinf(), -torch.inf, 10.0)
        if self.positives is not None and self.config.force_positives:
            top = priority.topk(K).indices.numpy()
            for b, query in enumerate(queries.tolist()):
                known = self.positives.of(query)
                if len(known) and not np.isin(pool_BM[b, top[b]], known).any():
                    priority[b, np.flatnonzero(pool_BM[b] == pool_BM[b, -1])[0]] = 20.0
        else:
            priority[:, -1] = -torch.inf
        return priority.topk(K).indices

    def _sample_positives(self, queries: Positions, rng: np.random.Generator) -> Positions:
        """One known positive per query, -1 where none is known."""
        sampled = np.full(len(queries), -1, dtype=np.int64)
        if self.positives is not None:
            known = np.isin(queries, self.positives.queries)
            sampled[known] = self.positives.sample(queries[known], rng)
        return sampled

    def judge(self, group: Group) -> FloatArray:
        """The rewards of every candidate, ``[B, K, R]``, NaN where a reward function abstains; gated if asked."""
        with self._timed("judge"):
            B, K = group.items_BK.shape
            query_positions, item_positions = np.repeat(group.queries, K), group.items_BK.ravel()
            rewards = gather(
                self.reward_functions,
                queries=[self.catalog.queries[q] for q in query_positions.tolist()],
                items=[self.catalog.items[i] for i in item_positions.tolist()],
                query_positions=query_positions,
                item_positions=item_positions,
            ).reshape(B, K, -1)
            self._raw_rewards = rewards
            config = self.config.rewards
            if config.gate and "relevance" in self.reward_names:
                rewards = gate(rewards, self.reward_names.index("relevance"), config.gate_threshold)
        return rewards

    def update(
        self, group: Group, rewards: FloatArray, optimizer: torch.optim.Optimizer, rng: np.random.Generator
    ) -> dict[str, float]:
        """One optimiser step on ``-J + beta KL + infonce_weight InfoNCE + anchor_weight anchor``; returns its metrics."""
        config, device = self.config, self.encoder.device
        cache = GradCache(self.encoder, config.chunk_size)
        paired, positives, negatives = self._contrast(group, rng)
        pieces = np.concatenate([group.items_BK.ravel(), positives, negatives])
        distinct, where = np.unique(pieces, return_inverse=True)
        places = torch.from_numpy(where.ravel()).to(device)
        place_BK, own = places[: group.items_BK.size].view(group.items_BK.shape), places[group.items_BK.size :]
        with self._timed("forward"):
            query_BD = cache.encode([self.query_texts[q] for q in group.queries], "query")
            item_UD = cache.encode([self.item_texts[i] for i in distinct], "document")
            self.item_encodings += len(distinct)
            self.refresher.touch(distinct, item_UD.detach().cpu().numpy())
            logp_BK = log_probs(torch.einsum("bd,bkd->bk", query_BD, item_UD[place_BK]), config.temperature)
            reference_UD = self.reference_ND[torch.from_numpy(distinct).to(device)]
            reference_BD = self.reference_QD[torch.from_numpy(group.queries).to(device)]
            reference_BK = torch.einsum("bd,bkd->bk", reference_BD, reference_UD[place_BK])
            logp_reference_BK = log_probs(reference_BK, config.temperature)
            kl = kl_divergence(logp_BK, logp_reference_BK).mean()
            if group.logp_old_BK is None:
                group.logp_old_BK = logp_BK.detach()
            self._follow_constraints(logp_BK.detach())
            objective, metrics = self.objective(
                logp_BK, group.logp_old_BK, torch.from_numpy(rewards).to(device), logp_reference_BK, rng
            )
            loss = -objective + config.beta * kl
            if self.positives is not None and len(paired):
                masked = torch.from_numpy(self.positives.masked(group.queries[paired], positives, distinct)).to(device)
                masked = masked.scatter(1, place_BK[torch.from_numpy(paired).to(device)], True)
                nce = losses.info_nce(query_BD[torch.from_numpy(paired).to(device)], item_UD, own[: len(paired)],
                                      masked, config.temperature)  # fmt: skip
                loss = loss + config.infonce_weight * nce
                metrics["infonce"] = float(nce.detach())
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
            norm = torch.nn.utils.clip_grad_norm_(self.encoder.model.parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {float(norm)} ({metrics}); lower learning_rate")
            optimizer.step()
            optimizer.zero_grad()
        cosine = float((query_BD.detach() * reference_BD).sum(-1).mean())
        return {"loss": float(loss.detach()), **metrics, "kl": float(kl.detach()), "entropy": float(entropy(logp_BK.detach()).mean()),
                "grad_norm": float(norm), "effective_rank": effective_rank(query_BD),
                "cosine_to_reference": cosine}  # fmt: skip

    def _contrast(self, group: Group, rng: np.random.Generator) -> tuple[Positions, Positions, Positions]:
        """For InfoNCE: the rows of the queries with known positives, a positive of each, and the global negatives."""
        none = np.zeros(0, np.int64)
        if self.positives is None or not self.config.infonce_weight:
            return none, none, none
        paired = np.flatnonzero(np.isin(group.queries, self.positives.queries))
        count = min(self.config.global_negatives, len(self.item_texts))
        negatives = rng.choice(len(self.item_texts), count, replace=False)
        return paired, self.positives.sample(group.queries[paired], rng), negatives

    def objective(
        self,
        logp_BK: Tensor,
        logp_old_BK: Tensor,
        rewards_BKR: Tensor,
        logp_reference_BK: Tensor,
        rng: np.random.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """The policy's objective, to be maximised, mean over the batch; and what it says of the rewards."""
        config, weights_R = self.config, self.reward_weights_R.to(logp_BK.device)
        equal = zero_variance(rewards_BKR, weights_R)
        metrics = {"zero_variance_share": float(equal.float().mean())}
        if config.policy not in POLICY_ETA:
            cost_B = self._cost(logp_BK, rewards_BKR, total_reward(rewards_BKR, weights_R), logp_reference_BK, rng)
            return -torch.where(equal, 0.0, cost_B).mean(), metrics
        weights_BK = candidate_weights(logp_old_BK, POLICY_ETA[config.policy])
        self._follow_std(rewards_BKR, weights_BK)
        advantages_BK = group_advantages(
            rewards_BKR, weights_R, weights_BK, aggregation=config.multi_objective_aggregation,
            scale=config.scale_rewards, std_floors_R=config.std_floor * self._running_std_R.to(logp_BK.device),
        )  # fmt: skip
        down = 0.0 if config.policy == "positive_only" else config.neg_adv_weight
        advantages_BK = torch.where(advantages_BK < 0, down * advantages_BK, advantages_BK)
        advantages_BK = torch.where(advantages_BK.abs() < config.dead_zone, 0.0, advantages_BK)
        ratio = (logp_BK.detach() - logp_old_BK).exp()
        clipped = ((advantages_BK > 0) & (ratio > 1 + config.epsilon_high)
                   | (advantages_BK < 0) & (ratio < 1 - config.epsilon))  # fmt: skip
        metrics |= {"ratio": float(ratio.mean()), "clip_share": float(clipped.float().mean())}
        surrogate_B = losses.clipped_surrogate(logp_BK, logp_old_BK, advantages_BK, weights_BK,
                                               config.epsilon, config.epsilon_high)  # fmt: skip
        return surrogate_B.mean(), metrics

    def _cost(
        self,
        logp_BK: Tensor,
        rewards_BKR: Tensor,
        total_BK: Tensor,
        logp_reference_BK: Tensor,
        rng: np.random.Generator,
    ) -> Tensor:
        """The cost of each group, ``[B]``, where it is no sum of advantages."""
        config = self.config
        if config.policy == "kl_distill":
            return losses.distillation(logp_BK, total_BK, config.distill_temperature)
        if config.policy == "kl_optimum":
            return losses.distillation(logp_BK, total_BK, config.distill_temperature, logp_reference_BK)
        if config.policy == "listnet":
            return losses.distillation(logp_BK, total_BK, 1.0)
        if config.policy == "lambda":
            return losses.lambda_loss(logp_BK, total_BK)
        if config.policy == "dpo_pairs":
            return losses.dpo_pairs(logp_BK, logp_reference_BK, total_BK, config.dpo_beta)
        if config.policy == "infonce_hard":
            judged = "relevance" in self.reward_names
            values = rewards_BKR[..., self.reward_names.index("relevance")] if judged else total_BK
            level = config.rewards.gate_threshold if judged else values.nanmean(-1, keepdim=True)
            return losses.hard_negative_nce(logp_BK, values >= level, values < level)
        length = min(config.list_length, logp_BK.shape[-1])
        known = torch.where(total_BK.isnan(), total_BK.nanmean(-1, keepdim=True).nan_to_num(), total_BK)
        generator = torch.Generator(logp_BK.device).manual_seed(int(rng.integers(2**31)))
        lists = gumbel_top_k(logp_BK, config.list_samples, length, generator)
        discounts = 1 / torch.log2(torch.arange(length, device=logp_BK.device) + 2.0)
        return -losses.pl_rank(logp_BK, known, lists, discounts)

    def _follow_std(self, rewards_BKR: Tensor, weights_BK: Tensor) -> None:
        """Update each objective's running deviation from the groups in which at least two candidates have a reward."""
        for r, known in enumerate(self._running_std_R.tolist()):
            values_BK = rewards_BKR[..., r]
            std = group_moments(values_BK, weights_BK)[1][(~values_BK.isnan()).sum(-1) > 1]
            if std.numel():
                self._running_std_R[r] = 0.95 * known + 0.05 * std.mean() if known > 0 else std.mean()

    def _health(self, step: int, group: Group) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for r, name in enumerate(self.reward_names):
            values = self._raw_rewards[..., r]
            known = values[~np.isnan(values)]
            metrics[f"reward/{name}/mean"] = float(known.mean()) if known.size else float("nan")
            metrics[f"reward/{name}/std"] = float(known.std()) if known.size else float("nan")
            if self.config.constraint_rate:
                metrics[f"reward/{name}/weight"] = float(self.reward_weights_R[r])
            metrics[f"reward/{name}/abstained"] = 1 - known.size / max(1, values.size)
        counts = np.unique(group.items_BK, return_counts=True)[1]
        spread = counts.std()
        metrics["hubness_skew"] = float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread else 0.0
        metrics |= {"index_age": self.refresher.age(step), "refreshes": float(self.refresher.refreshes)}
        measured = {"overlap@K": self.refresher.overlap, "index_drift": self.refresher.drift,
                    "index_recall": self.refresher.recall}  # fmt: skip
        metrics |= {name: value for name, value in measured.items() if not np.isnan(value)}
        for function in self.reward_functions:
            if isinstance(function, RelevanceReward):
                metrics["judge_calls"] = float(function.calls)
                metrics["judge_cache_hit_rate"] = function.hits / max(1, function.hits + function.calls)
        metrics["item_encodings"] = float(self.item_encodings)
        return metrics | {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}

    def _follow_constraints(self, logp_BK: Tensor) -> None:
        """Dual ascent on the weights of all rewards but the first (Lagrange multipliers, never negative): the level of an
        objective is its mean under the policy, ``sum_i pi_i r_i`` over the batch, before the gate."""
        if not self.config.constraint_rate:
            return
        rewards_BKR = torch.from_numpy(self._raw_rewards).to(logp_BK.device)
        known = ~rewards_BKR.isnan()
        mass_BKR = torch.where(known, logp_BK.exp()[..., None], 0.0)
        levels_R = ((mass_BKR * rewards_BKR.nan_to_num()).sum((0, 1)) / mass_BKR.sum((0, 1)).clamp_min(1e-12)).cpu()
        if len(self._levels) < _WINDOW:
            self._levels.append(levels_R.tolist())
            return
        gaps_R = torch.tensor(self._levels).mean(0) - levels_R
        gaps_R[0] = 0.0
        self.reward_weights_R = (self.reward_weights_R + self.config.constraint_rate * gaps_R).clamp_min(0.0)

    def _check_collapse(self, step: int, effective_rank: float) -> None:
        """Raises CollapseError when the queries' embeddings have fallen into few directions."""
        ranks = self._ranks = [*self._ranks, effective_rank]
        if len(ranks) > 2 * _WINDOW:
            del ranks[_WINDOW]  # the first ones are what it began with
            first, now = np.mean(ranks[:_WINDOW]), np.mean(ranks[_WINDOW:])
            if now < self.config.collapse_ratio * first:
                raise CollapseError(
                    f"step {step}: the effective rank of the query embeddings has fallen from {first:.1f} to {now:.1f}: they "
                    "collapse. Raise infonce_weight or beta, lower learning_rate, or take policy=exact; the last checkpoint is kept "
                    "(collapse_ratio=0 turns this alarm off)"
                )

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
        texts = [self.item_texts[i] for i in positions.tolist() if i >= 0]
        self.item_encodings += len(texts)
        size = self.config.chunk_size
        parts = [self.encoder.forward(texts[i : i + size], "document") for i in range(0, len(texts), size)]
        missing = torch.zeros(len(positions) - len(texts), self.encoder.dimension, device=self.encoder.device)
        return torch.cat([missing, *parts])

    def _identity(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "rewards": self.reward_names,
            "reward_weights": self.reward_weights_R.tolist(),
            "start_model": self.encoder.fingerprint,
            "items": ids_hash(self.catalog.items.ids),
            "queries": ids_hash(self.catalog.queries.ids),
        }

    def _extra(self) -> dict[str, Any]:
        return {
            "item_encodings": self.item_encodings,
            "running_std": self._running_std_R.tolist(),
            "effective_ranks": self._ranks,
            "levels": self._levels,
            "evaluations": self.stopping.points,
            "waited": self.stopping.waited,
            "reward_weights": self.reward_weights_R.tolist(),
        }

    def _restore(self, found: Any) -> int:
        if found is None:
            return 0
        self.item_encodings = found.extra["item_encodings"]
        self._running_std_R = torch.tensor(found.extra["running_std"])
        self._ranks, self._levels = found.extra["effective_ranks"], found.extra["levels"]
        self.reward_weights_R = torch.tensor(found.extra["reward_weights"])
        points = [tuple(point) for point in found.extra["evaluations"]]
        self.stopping = EarlyStopping(self.config.eval_patience, points, found.extra["waited"])
        self.refresher.restore(found.arrays)
        return int(found.step)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def _absent_or_repeated(pool_BM: Positions) -> np.ndarray:
    """Places of a pool that hold nothing (-1), or an item that stands further left in the same row already."""
    order = np.argsort(pool_BM, axis=1, kind="stable")
    ordered = np.take_along_axis(pool_BM, order, 1)
    repeated = np.zeros_like(ordered, dtype=bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    marked = np.zeros_like(repeated)
    np.put_along_axis(marked, order, repeated, axis=1)
    return marked | (pool_BM < 0)
