"""The cosine of a frozen encoder as a verdict. Never use the encoder that is being trained: it would grade itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Items, Query
from taoemb.judge.verdicts import CUTS, SOFTNESS, fingerprint, ordered_probs, output
from taoemb.types import EmbeddingModel, FloatArray, JudgeOutput

_QUERY_CACHE = 65_536


class BiEncoderJudge:
    """Cosine between a query and an item under a frozen encoder.

    ``item_vectors`` is ``[N, D]`` in the order of ``items`` (rows are normalised when read). The score of a pair is its
    cosine, mapped so that ``low`` gives 0 and ``high`` gives 1, cut to [0, 1]. The defaults are our choice for
    all-MiniLM-L6-v2; with another encoder set them or put the judge into an `EnsembleJudge`, which learns the scale.
    Query vectors are cached by text.

    Raises ValueError when shapes do not fit or ``low >= high``; `score` raises KeyError on an item outside ``items``.
    """

    def __init__(
        self, model: EmbeddingModel, items: Items, item_vectors: npt.NDArray[np.floating], *,
        low: float = 0.15, high: float = 0.6, name: str = "bi_encoder",
    ) -> None:  # fmt: skip
        if item_vectors.shape != (len(items), model.dimension):
            expected = (len(items), model.dimension)
            raise ValueError(f"item_vectors have shape {item_vectors.shape}, but items and model need {expected}")
        if not low < high:
            raise ValueError(f"low={low!r} must be below high={high!r}")
        self.name, self.model, self.items, self.item_vectors = name, model, items, item_vectors
        self.low, self.high = low, high
        self._queries: dict[str, FloatArray] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the encoder, the item vectors and the cut points."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self.item_vectors), 65_536):
            digest.update(np.ascontiguousarray(self.item_vectors[start : start + 65_536]).tobytes())
        ids = fingerprint(self.items.ids)
        mapping = (self.low, self.high, CUTS, SOFTNESS)
        return fingerprint("bi_encoder", self.model.fingerprint, digest.hexdigest(), ids, mapping)

    def cosines(self, pairs: Sequence[tuple[Query, Item]]) -> FloatArray:
        """Cosine of ``N`` pairs, float32."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        queries = self._encode([query.text for query, _ in pairs])
        rows = np.asarray(self.item_vectors[self.items.positions(item.id for _, item in pairs)], dtype=np.float32)
        cosine: FloatArray = np.einsum("nd,nd->n", queries, _unit(rows))
        return np.clip(cosine, -1.0, 1.0)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs."""
        return output(ordered_probs(self.relevance(pairs)))

    def relevance(self, pairs: Sequence[tuple[Query, Item]]) -> FloatArray:
        """The mapped cosine in [0, 1] of ``N`` pairs, before it is turned into grades."""
        mapped = (self.cosines(pairs) - self.low) / (self.high - self.low)
        relevance: FloatArray = np.clip(mapped, 0.0, 1.0)
        return relevance

    def _encode(self, texts: Sequence[str]) -> FloatArray:
        if len(self._queries) > _QUERY_CACHE:
            self._queries.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._queries]
        if new:
            vectors = _unit(np.asarray(self.model.encode_query(new), dtype=np.float32))
            self._queries.update(zip(new, vectors, strict=True))
        return np.stack([self._queries[text] for text in texts])


def _unit(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: FloatArray = (rows / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
