"""What stage 2 maximises over the groups of a batch, by the policy's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taoemb import losses
from taoemb.advantages import group_advantages, group_moments, total_reward, zero_variance
from taoemb.health import WINDOW
from taoemb.policy import POLICY_ETA, candidate_weights, gumbel_top_k, plackett_luce_log_probs
from taoemb.trainer_config import RetrievalGRPOConfig

ListRewards = Callable[[Tensor], Tensor]
"""The weighted rewards that only whole lists have: places in the groups ``[B, N, T]`` to ``[B, N]``."""


@dataclass
class Batch:
    """What an objective is computed from: log-probabilities now, before the first update and of the stage-1 policy ``[B, K]``,
    gated rewards ``[B, K, R]``, and the rewards of lists."""

    logp_BK: Tensor
    logp_old_BK: Tensor
    logp_reference_BK: Tensor
    rewards_BKR: Tensor
    list_rewards: ListRewards | None = None


class Objective:
    """The policy's objective; holds the weights of the rewards and follows their deviations."""

    def __init__(self, config: RetrievalGRPOConfig, names: Sequence[str], weights: Sequence[float]) -> None:
        self.config, self.names = config, list(names)
        self.weights_R = torch.tensor(list(weights), dtype=torch.float32)
        self.running_std_R = torch.zeros(len(self.names))
        self.levels: list[list[float]] = []
        """Of the objectives in the first steps, where there are constraints."""

    def __call__(self, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """To be maximised, mean over the batch; and what it says of the rewards. Groups whose rewards are all equal count 0."""
        weights_R = self.weights_R.to(batch.logp_BK.device)
        metrics = {"zero_variance_share": float(zero_variance(batch.rewards_BKR, weights_R).float().mean())}
        if self.config.multi_objective_aggregation != "separate_losses":
            value, more = self._value(batch, weights_R, slice(None), rng)
            return value, metrics | more
        values = []
        for r, weight in enumerate(weights_R):
            alone = replace(batch, rewards_BKR=batch.rewards_BKR[..., r : r + 1])
            value, more = self._value(alone, torch.ones_like(weights_R[:1]), slice(r, r + 1), rng)
            values.append(weight * value)
        return torch.stack(values).sum(), metrics | more

    def _value(
        self, batch: Batch, weights_R: Tensor, columns: slice, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The objective of the rewards of a batch, which are these columns of all rewards."""
        config = self.config
        metrics: dict[str, float] = {}
        equal_B = zero_variance(batch.rewards_BKR, weights_R)
        total_BK = total_reward(batch.rewards_BKR, weights_R)
        if config.policy in POLICY_ETA:
            value, metrics = self._surrogate(batch, weights_R, columns)
        elif config.policy == "pl_rloo":
            value = self._lists(batch, total_BK, rng).mean()
        else:
            value = -torch.where(equal_B, 0.0, self._cost(batch, total_BK, self.names[columns], rng)).mean()
        if config.distill_weight:
            distance_B = losses.distillation(batch.logp_BK, total_BK, config.distill_temperature)
            value = value - config.distill_weight * torch.where(equal_B, 0.0, distance_B).mean()
        return value, metrics

    def follow_constraints(self, logp_BK: Tensor, rewards_BKR: Tensor) -> None:
        """Dual ascent on the weights of all rewards but the first (Lagrange multipliers, never negative): the level of an
        objective is its mean under the policy, ``sum_i pi_i r_i`` over the batch, before the gate."""
        if not self.config.constraint_rate:
            return
        known = ~rewards_BKR.isnan()
        mass_BKR = torch.where(known, logp_BK.exp()[..., None], 0.0)
        levels_R = ((mass_BKR * rewards_BKR.nan_to_num()).sum((0, 1)) / mass_BKR.sum((0, 1)).clamp_min(1e-12)).cpu()
        if len(self.levels) < WINDOW:
            self.levels.append(levels_R.tolist())
            return
        gaps_R = torch.tensor(self.levels).mean(0) - levels_R
        gaps_R[0] = 0.0
        self.weights_R = (self.weights_R + self.config.constraint_rate * gaps_R).clamp_min(0.0)

    def _surrogate(self, batch: Batch, weights_R: Tensor, columns: slice) -> tuple[Tensor, dict[str, float]]:
        """The clipped surrogate of the advantages (R-GRPO, eq. 7, and its relatives)."""
        config, logp_BK, logp_old_BK = self.config, batch.logp_BK, batch.logp_old_BK
        weights_BK = candidate_weights(logp_old_BK, POLICY_ETA[config.policy])
        self._follow_std(batch.rewards_BKR, weights_BK, columns)
        aggregation = config.multi_objective_aggregation
        if aggregation == "separate_losses":  # there is one objective
            aggregation = "normalize_then_sum"
        advantages_BK = group_advantages(
            batch.rewards_BKR, weights_R, weights_BK, aggregation=aggregation, scale=config.scale_rewards,
            std_floors_R=config.std_floor * self.running_std_R[columns].to(logp_BK.device),
        )  # fmt: skip
        down = 0.0 if config.policy == "positive_only" else config.neg_adv_weight
        advantages_BK = torch.where(advantages_BK < 0, down * advantages_BK, advantages_BK)
        advantages_BK = torch.where(advantages_BK.abs() < config.dead_zone, 0.0, advantages_BK)
        ratio = (logp_BK.detach() - logp_old_BK).exp()
        clipped = ((advantages_BK > 0) & (ratio > 1 + config.epsilon_high)
                   | (advantages_BK < 0) & (ratio < 1 - config.epsilon))  # fmt: skip
        metrics = {"ratio": float(ratio.mean()), "clip_share": float(clipped.float().mean())}
        surrogate_B = losses.clipped_surrogate(logp_BK, logp_old_BK, advantages_BK, weights_BK,
                                               config.epsilon, config.epsilon_high)  # fmt: skip
        return surrogate_B.mean(), metrics

    def _cost(self, batch: Batch, total_BK: Tensor, names: Sequence[str], rng: np.random.Generator) -> Tensor:
        """The cost of each group, ``[B]``, where it is no sum of advantages."""
        config, logp_BK = self.config, batch.logp_BK
        if config.policy == "kl_distill":
            return losses.distillation(logp_BK, total_BK, config.distill_temperature)
        if config.policy == "kl_optimum":
            return losses.distillation(logp_BK, total_BK, config.distill_temperature, batch.logp_reference_BK)
        if config.policy == "listnet":
            return losses.distillation(logp_BK, total_BK, 1.0)
        if config.policy == "lambda":
            return losses.lambda_loss(logp_BK, total_BK)
        if config.policy == "dpo_pairs":
            return losses.dpo_pairs(logp_BK, batch.logp_reference_BK, total_BK, config.dpo_beta)
        if config.policy == "infonce_hard":
            judged = "relevance" in names
            values = batch.rewards_BKR[..., names.index("relevance")] if judged else total_BK
            level: Any = config.rewards.gate_threshold if judged else values.nanmean(-1, keepdim=True)
            return losses.hard_negative_nce(logp_BK, values >= level, values < level)
        lists, discounts = self._draw_lists(logp_BK, rng)
        return -losses.pl_rank(logp_BK, _known(total_BK), lists, discounts)

    def _lists(self, batch: Batch, total_BK: Tensor, rng: np.random.Generator) -> Tensor:
        """``pl_rloo``: REINFORCE over drawn lists, whose reward is the discounted sum of their items' and that of the list."""
        lists, discounts = self._draw_lists(batch.logp_BK, rng)
        B, N, T = lists.shape
        values_BN = (_known(total_BK).gather(1, lists.reshape(B, N * T)).view(B, N, T) * discounts).sum(-1)
        if batch.list_rewards is not None:
            values_BN = values_BN + batch.list_rewards(lists)
        return losses.pl_rloo(plackett_luce_log_probs(batch.logp_BK, lists), values_BN)

    def _draw_lists(self, logp_BK: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Lists of the Plackett-Luce policy ``[B, N, T]`` and the discounts of their places, as in nDCG."""
        length = min(self.config.list_length, logp_BK.shape[-1])
        generator = torch.Generator(logp_BK.device).manual_seed(int(rng.integers(2**31)))
        discounts = 1 / torch.log2(torch.arange(length, device=logp_BK.device) + 2.0)
        return gumbel_top_k(logp_BK, self.config.list_samples, length, generator), discounts

    def _follow_std(self, rewards_BKR: Tensor, weights_BK: Tensor, columns: slice) -> None:
        """Update each objective's running deviation from the groups in which at least two candidates have a reward."""
        running_std_R = self.running_std_R[columns]  # a view
        for r, known in enumerate(running_std_R.tolist()):
            values_BK = rewards_BKR[..., r]
            std = group_moments(values_BK, weights_BK)[1][(~values_BK.isnan()).sum(-1) > 1]
            if std.numel():
                running_std_R[r] = 0.95 * known + 0.05 * std.mean() if known > 0 else std.mean()


def _known(total_BK: Tensor) -> Tensor:
    """Totals with the mean of its group in the place of one that is NaN (0 where all are)."""
    return torch.where(total_BK.isnan(), total_BK.nanmean(-1, keepdim=True).nan_to_num(), total_BK)
