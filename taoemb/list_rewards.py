"""Asking the rewards of whole lists (``of_lists = True``) what the lists drawn from a batch's groups are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from taoemb.candidates import Group
from taoemb.catalog import Catalog
from taoemb.distributed import World
from taoemb.objective import ListRewards
from taoemb.rewards import gather, name_of
from taoemb.types import RewardFunction


class ListScorer:
    """The reward functions of lists, with their weights; ``means`` are of the lists asked about last.

    A function gets the columns of `taoemb.types.RewardFunction` with one row per list: ``items`` are lists of items,
    ``item_positions`` and ``relevance`` are ``[n, T]``, and ``group_relevance`` ``[n, K]`` is that of all candidates. One that abstains
    counts as the mean of the group's other lists.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], weights: Sequence[float], catalog: Catalog, world: World
    ) -> None:
        self.functions, self.weights, self.catalog, self.world = list(functions), list(weights), catalog, world
        self.names = [name_of(function) for function in functions]
        self.means: dict[str, float] = {}

    def of(self, group: Group, relevance: int) -> ListRewards:
        """The weighted rewards of lists of this group, whose relevance is reward column ``relevance``."""
        assert group.rewards_BKR is not None
        relevance_BK = group.rewards_BKR[..., relevance]

        def rewards(lists_BNT: Tensor) -> Tensor:
            mine = self.world.share(len(lists_BNT))  # of several processes each asks for its share
            B, N, T = lists_BNT[mine].shape
            rows, places = np.arange(len(lists_BNT))[mine, None], lists_BNT[mine].reshape(B, N * T).cpu().numpy()
            positions = group.items_BK[rows, places].reshape(B * N, T)
            query_positions = np.repeat(group.queries[mine], N)
            values = np.zeros((0, len(self.functions)), np.float32)
            if B:
                values = gather(
                    self.functions,
                    queries=[self.catalog.queries[q] for q in query_positions.tolist()],
                    items=[[self.catalog.items[i] for i in row] for row in positions.tolist()],
                    query_positions=query_positions,
                    item_positions=positions,
                    relevance=relevance_BK[rows, places].reshape(B * N, T),
                    group_relevance=np.repeat(relevance_BK[mine], N, axis=0),
                )
            shared = torch.from_numpy(values).view(B, N, len(self.functions)).to(lists_BNT.device)
            values_BNF = self.world.gather(shared, len(lists_BNT))
            means_BF = values_BNF.nanmean(1, keepdim=True).nan_to_num()
            self.means = dict(zip(self.names, means_BF.mean((0, 1)).tolist(), strict=True))
            known = torch.where(values_BNF.isnan(), means_BF, values_BNF)
            return (known * torch.tensor(self.weights, device=known.device)).sum(-1)

        return rewards
