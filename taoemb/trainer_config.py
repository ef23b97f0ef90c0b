"""Settings of Retrieval-GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from taoemb.advantages import Aggregation, Scale
from taoemb.contrastive import check_optimiser, check_positive
from taoemb.index.refresh import RefreshConfig, RefreshMode
from taoemb.rewards import RewardConfig

Policy = Literal[
    "paper", "exact", "mixed", "positive_only", "pl_rank", "pl_rloo",
    "kl_optimum", "kl_distill", "listnet", "lambda", "infonce_hard", "dpo_pairs",
]  # fmt: skip
CandidateSource = Literal["index", "in_batch", "mixed"]
MultiObjective = Literal[Aggregation, "separate_losses"]


@dataclass(frozen=True)
class RetrievalGRPOConfig:
    """Stage 2. R-GRPO publishes the objective and none of these numbers: the defaults are our choice, for static
    embeddings; names follow TRL where TRL has the thing."""

    policy: Policy = "mixed"
    """``paper`` as published, ``exact`` policy gradient, ``mixed`` of both, ``positive_only``, ``pl_rank`` for the discounted reward of
    whole lists, ``pl_rloo`` for rewards that only a whole list has. Rivals without a policy gradient, on the same candidates and rewards: ``kl_optimum`` fits the best policy near the
    stage-1 one, ``kl_distill`` learns the softmax of the rewards, ``listnet`` the same at temperature 1, ``lambda`` is LambdaRank,
    ``infonce_hard`` sets good against bad candidates, ``dpo_pairs`` is DPO (R-GRPO's baseline)."""
    steps: int = 700
    """Retrievals; each is followed by ``num_iterations`` optimiser steps."""
    batch_size: int = 64
    """B: queries per step, of each process where several train."""
    num_candidates: int = 64
    """K: candidates of a query's group."""
    candidates: CandidateSource = "index"
    """Where they come from: the ``index``, the positives of the batch's other queries, gathered across processes (``in_batch``, as
    published), or half of the group each (``mixed``)."""
    overfetch: int = 1
    """The index proposes this many times K; above 1 the current encoder embeds them all once more and keeps its own Top-K.
    That repairs a stale index, at that many times the item encodings; refreshing more often is cheaper."""
    random_candidates: int = 0
    """How many of the K are random items instead."""
    force_positives: bool = True
    """A known positive takes the last place of a group that holds none."""
    exploration: float = 0.0
    """Scale of Gumbel noise on the logits when a group is chosen from ``overfetch`` times K: 1 draws it from the policy
    (Plackett-Luce), 0 takes the Top-K."""
    tail_power: float = 0.0
    """Queries are drawn in proportion to their frequency to the power of minus this: 0 all alike, above it rare ones more often."""
    refill: bool = False
    """Groups whose rewards are all equal give their places to earlier groups, judged already, of other queries."""
    prefetch: bool = False
    """Retrieve the next step's groups before the update, so that they are judged while it runs: for judges that take long. The
    queries are then embedded by the model of one step before."""
    temperature: float = 0.05
    """tau of the policy's softmax over cosines, and of InfoNCE."""
    num_iterations: int = 1
    """Optimiser steps per retrieval; with 1 the ratio is 1 and nothing is clipped."""
    epsilon: float = 0.2
    """Clip range of the ratio downwards."""
    epsilon_high: float = 0.28
    """Clip range of the ratio upwards."""
    beta: float = 0.02
    """Weight of KL(policy || stage-1 policy)."""
    infonce_weight: float = 2.0
    """Weight of stage 1's InfoNCE loss, the anchor that keeps the tail; 0 leaves it out (as published). The other queries'
    candidates serve as further negatives, which costs no encoding; a query's own are left to the policy."""
    global_negatives: int = 512
    """Random items per step in InfoNCE."""
    anchor_weight: float = 0.0
    """Weight of mean(1 - cosine to the stage-1 embedding)."""
    multi_objective_aggregation: MultiObjective = "normalize_then_sum"
    """``sum_then_normalize`` as published, or each objective on its own first (GDPO). ``separate_losses`` computes the policy's
    loss of each objective and adds them up by weight, where others compute one loss of the summed reward."""
    matryoshka_dims: tuple[int, ...] = ()
    """Shorter dimensions that the embeddings shall serve too, cut off and scaled to length 1: each step trains the full ones and,
    drawn at random, one of these, half and half (Matryoshka; Kusupati et al., 2022)."""
    scale_rewards: Scale = "group"
    """Divide advantages by the deviation of the ``group`` (as published), of the ``batch``, or not at all (``none``); ``rank`` takes the
    place of a reward in its group for the reward."""
    std_floor: float = 0.25
    """Share of an objective's running deviation that is added to each group's, against noise in almost equal rewards."""
    neg_adv_weight: float = 1.0
    """Factor on negative advantages; ``positive_only`` is 0."""
    dead_zone: float = 0.0
    """Advantages nearer to 0 than this are 0: differences that a noisy judge would not repeat."""
    collapse_ratio: float = 0.3
    """The run stops when the effective rank of the query batch, its mean over 20 steps, falls under this share of what it was at
    the start; 0 leaves the alarm out."""
    constraint_rate: float = 0.0
    """Above 0, relevance (the first reward) is maximised under the constraint that no other objective falls under its level at the
    start: each step raises the weight of one that has by this rate times the gap, and lowers that of one that has not, down
    to 0. The weights given are where they begin."""
    distill_weight: float = 4.0
    """Weight of ``kl_distill`` beside the policy: it holds the whole of a group to the judge's distribution while the policy sharpens its
    head. 0 leaves it out, as published; beside ``kl_distill`` the weights add up."""
    distill_temperature: float = 0.2
    """Temperature of the rewards' softmax in ``kl_distill`` and ``kl_optimum``."""
    dpo_beta: float = 0.1
    """Beta of ``dpo_pairs``."""
    list_length: int = 10
    """Places of a list in ``pl_rank`` and ``pl_rloo``, discounted as in nDCG."""
    list_samples: int = 16
    """Lists that they draw of each group."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW, which is how far the encoder follows its judge. None: for static embeddings 2e-2 where the judge is an
    `OracleJudge` without noise, whose grades are the catalog's own, and 3e-3 with any other; for transformers 5e-6, where LoRA wants more."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    refresh_steps: int = 100
    """Steps between refreshes of the index; 0 never refreshes."""
    refresh_mode: RefreshMode = "full"
    """What a refresh re-encodes: ``full`` everything; ``touched`` nothing, it takes the vectors that training made anyway;
    ``rolling`` a share besides; ``procrustes`` also turns what was not re-encoded."""
    refresh_share: float = 0.1
    """Share of the catalog that ``rolling`` and ``procrustes`` re-encode."""
    refresh_async: bool = False
    """Refresh in the background while training goes on; a resumed run then need not repeat itself bit for bit."""
    refresh_probe_steps: int = 0
    """Steps between looks at the index's staleness, which re-encode the candidates of 64 queries; 0 leaves them out."""
    refresh_min_overlap: float = 0.9
    """A look that finds less overlap@K refreshes the index at once."""
    refresh_min_recall: float = 0.95
    """Recall@K that an approximate index must reach on probe queries; as many lists or nodes are searched as that takes."""
    index_factory: str = "Flat"
    """FAISS factory string of the training index; ``Flat`` is exact."""
    chunk_size: int = 0
    """Texts per forward and backward pass (GradCache); lower it when memory is short. 0: 256 for transformers, for static
    embeddings all, whose activations are small."""
    save_steps: int = 100
    """Steps between checkpoints."""
    eval_steps: int = 0
    """Steps between evaluations on the graded queries of split ``validation``, each of which encodes the catalog; 0: none. The model
    at the end is then that of the last one on the Pareto front of Recall@100 and Goodrate@10."""
    eval_patience: int = 3
    """Training stops when so many evaluations in a row were at most as good in both figures as an earlier one."""
    seed: int = 0
    """Of every random choice."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """Weights and forms of the rewards."""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "overfetch", "temperature", "num_iterations", "save_steps",
                       "distill_temperature", "dpo_beta", "list_length", "list_samples", "eval_patience")  # fmt: skip
        if self.learning_rate is not None:
            check_positive(self, "learning_rate")
        check_optimiser(self.warmup_ratio, self.max_grad_norm)
        choices = {"policy": Policy, "multi_objective_aggregation": MultiObjective, "scale_rewards": Scale,
                   "candidates": CandidateSource}  # fmt: skip
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(get_args(choice))}")
        if self.num_candidates < 2:
            raise ValueError(f"num_candidates={self.num_candidates}: a group needs at least 2 to compare")
        if not 0 <= self.random_candidates < self.num_candidates:
            raise ValueError(f"random_candidates={self.random_candidates}: give 0 to num_candidates - 1")
        if self.candidates == "in_batch" and self.overfetch > 1:
            raise ValueError(f"overfetch={self.overfetch}: with candidates=in_batch the index proposes nothing; give 1")
        if self.multi_objective_aggregation == "separate_losses" and self.policy == "pl_rloo":
            raise ValueError(
                "multi_objective_aggregation=separate_losses: pl_rloo has one reward for each list; use another"
            )
        if self.exploration and self.overfetch == 1:
            raise ValueError(f"exploration={self.exploration} chooses from more than K: give overfetch=2 or more")
        if self.policy == "pl_rloo" and self.list_samples < 2:
            raise ValueError("list_samples=1: pl_rloo compares lists, give 2 or more")
        if self.policy != "pl_rloo" and (self.rewards.exclusivity_mode == "list" or self.rewards.diversity):
            raise ValueError(f"policy={self.policy!r} rewards items; exclusivity_mode=list and diversity reward whole lists, which "
                             "policy=pl_rloo can do")  # fmt: skip
        _ = self.refresh
        for name in (
            "beta",
            "infonce_weight",
            "anchor_weight",
            "std_floor",
            "global_negatives",
            "neg_adv_weight",
            "dead_zone",
            "collapse_ratio",
            "constraint_rate",
            "distill_weight",
            "eval_steps",
            "exploration",
            "chunk_size",
            "tail_power",
        ):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")
        if not 0 < self.epsilon < 1 or not 0 < self.epsilon_high < np.inf:
            raise ValueError(
                f"epsilon={self.epsilon}, epsilon_high={self.epsilon_high}: give 0 < epsilon < 1 and more than 0"
            )

    @classmethod
    def as_published(cls, **settings: Any) -> RetrievalGRPOConfig:
        """R-GRPO's own objective, eq. 7: the three rewards summed with weight 1 and without a gate, the published proxy of
        exclusivity, advantages over the group's deviation, clip and KL, candidates from the batch, and no InfoNCE. The numbers
        that it does not publish are ours, and like all others may be given."""
        rewards = RewardConfig(relevance=1, quality=1, exclusivity=1, gate=False, exclusivity_mode="lexical")
        published: dict[str, Any] = {
            "policy": "paper", "multi_objective_aggregation": "sum_then_normalize", "std_floor": 0.0, "infonce_weight": 0.0,
            "distill_weight": 0.0, "candidates": "in_batch", "epsilon_high": settings.get("epsilon", cls.epsilon), "rewards": rewards,
        }  # fmt: skip
        return cls(**published | settings)

    @property
    def refresh(self) -> RefreshConfig:
        """The refresher's settings; raises ValueError as `RefreshConfig` does."""
        try:
            return RefreshConfig(self.refresh_mode, self.refresh_steps, self.refresh_share, self.refresh_async,
                                 self.refresh_probe_steps, self.refresh_min_overlap, self.refresh_min_recall)  # fmt: skip
        except ValueError as error:
            raise ValueError(f"refresh_{error}") from None
