"""Two-pass backward (GradCache, Gao et al. 2021): a batch of any size with the activations of one chunk in memory.

The first pass embeds without a graph, the loss gives each embedding its gradient, and the second pass embeds chunk by
chunk again and pushes those gradients into the weights. The result is the gradient of one big batch. What fits in one
chunk keeps its graph and is embedded once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taoemb.distributed import World

if TYPE_CHECKING:
    from taoemb.encoder import Encoder, Kind


_TRANSFORMER_CHUNK = 256  # our choice


@dataclass
class _Part:
    texts: list[str]
    kind: Kind
    leaf: Tensor
    share: slice
    graph: Tensor | None
    rng_states: list[Tensor]


class GradCache:
    """Embeds texts so that a loss over all of them can be back-propagated in chunks.

    ``encode`` gives leaf tensors; after ``loss.backward()`` one call of `backward` moves their gradients into the
    encoder's weights. The random state of each chunk is replayed, so that dropout is the same in both passes. Of several
    processes each embeds its share of the texts, and all get every embedding and the summed gradients.
    """

    def __init__(self, encoder: Encoder, chunk_size: int, world: World | None = None) -> None:
        if chunk_size < 0:
            raise ValueError(f"chunk_size={chunk_size}: give the texts of a chunk, or 0 for what suits the model")
        self.encoder = encoder
        self.chunk_size = chunk_size or (sys.maxsize if encoder.static else _TRANSFORMER_CHUNK)
        self.world = world or World()
        self._parts: list[_Part] = []

    def encode(self, texts: list[str], kind: Kind) -> Tensor:
        """Embed texts into a leaf ``[N, D]`` that collects gradients."""
        count, share = len(texts), self.world.share(len(texts))
        texts = texts[share]
        if len(texts) <= self.chunk_size:
            graph = self.encoder.forward(texts, kind)
            leaf = self.world.gather(graph.detach(), count).requires_grad_()
            part = _Part(texts, kind, leaf, share, graph, [])
        else:
            states, vectors = [], []
            with torch.no_grad():
                for start in range(0, len(texts), self.chunk_size):
                    states.append(_rng_state(self.encoder.device))
                    vectors.append(self.encoder.forward(texts[start : start + self.chunk_size], kind))
            leaf = self.world.gather(torch.cat(vectors), count).requires_grad_()
            part = _Part(texts, kind, leaf, share, None, states)
        self._parts.append(part)
        return part.leaf

    def backward(self) -> None:
        """Push the gradients of every `encode` since the last call into the encoder's weights."""
        after = _rng_state(self.encoder.device)
        for part in self._parts:
            fixed = part.kind == "document" and self.encoder.items_fixed
            if part.leaf.grad is None or not part.texts or fixed:
                continue
            gradient = part.leaf.grad[part.share]
            if part.graph is not None:
                torch.autograd.backward(part.graph, gradient)
                continue
            for state, start in zip(part.rng_states, range(0, len(part.texts), self.chunk_size), strict=True):
                _set_rng_state(state, self.encoder.device)
                vectors = self.encoder.forward(part.texts[start : start + self.chunk_size], part.kind)
                torch.autograd.backward(vectors, gradient[start : start + self.chunk_size])
        self._parts.clear()
        self.world.sum_gradients(self.encoder.trainable_parameters())
        self.encoder.share_gradients()
        _set_rng_state(after, self.encoder.device)


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
