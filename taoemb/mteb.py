"""A taoemb encoder as a model of MTEB, the Massive Text Embedding Benchmark: ``mteb.evaluate(MTEBModel(folder), tasks)``.

Needs the extra ``mteb`` (its version 2). Left out: the prompts that MTEB's tasks bring along; an encoder has its own,
with which it was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taoemb.catalog import Item
from taoemb.encoder import Encoder
from taoemb.types import FloatArray

__all__ = ["MTEBModel"]


class MTEBModel:
    """What ``mteb.evaluate`` asks of a model (``EncoderProtocol``), over an `Encoder`.

    Queries go through `Encoder.encode_query`. Documents become items with their title and text, as `taoemb data import`
    makes them, and go through the encoder's item template: it cuts at ``max_chars``, 400 by default, which is what the
    model was trained on. For longer documents give ``Encoder(model, template=ItemTemplate(max_chars=...))``. Texts of
    tasks that know neither, such as similarity of sentences, go through the item side as they are.

    Args:
        model: an `Encoder`, or what one can be made of.
        name: name in MTEB's results, ``organisation/name``; by default taken from the folder.
        device: torch device where ``model`` is no `Encoder`.
    """

    def __init__(self, model: Encoder | str | Path, name: str | None = None, *, device: str | None = None) -> None:
        self.encoder = model if isinstance(model, Encoder) else Encoder(model, device=device)
        self.name = name or f"taoemb/{'encoder' if isinstance(model, Encoder) else _folder_name(Path(model))}"

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, precision: str | None = None,
        show_progress_bar: bool = False, **_: Any,
    ) -> FloatArray:  # fmt: skip
        """Embed the texts of all batches: float32 ``[N, D]``, unit rows.

        ``prompt_type`` is ``query``, ``document`` or None; the encoder makes its own batches, whatever ``batch_size`` says.
        Raises ValueError for batches without text and for another ``precision`` than float32.
        """
        if precision not in (None, "float32"):
            raise ValueError(f"precision={precision!r}: the embeddings are float32; leave it away")
        kind = None if prompt_type is None else getattr(prompt_type, "value", prompt_type)
        rows: list[str | Item] = []
        for batch in inputs:
            if "text" not in batch:
                raise ValueError(f"a batch holds {', '.join(batch)} and no text; this model reads texts alone")
            rows += _documents(batch) if kind == "document" else batch["text"]
        if kind == "query":
            return self.encoder.encode_query([str(row) for row in rows], progress=show_progress_bar)
        return self.encoder.encode_document(rows, progress=show_progress_bar)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines (inner products of unit vectors) of all pairs: ``[N, D]`` and ``[M, D]`` to ``[N, M]``."""
        return _rows(embeddings1) @ _rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of the pairs of rows: ``[N, D]`` and ``[N, D]`` to ``[N]``."""
        return (_rows(embeddings1) * _rows(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """The ``mteb.ModelMeta``; its revision is the encoder's fingerprint, so that MTEB's cache never gives the results
        of other weights. Raises ImportError without mteb."""
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ImportError:
            raise ImportError("mteb is not installed; pip install 'taoemb[mteb]'") from None
        parameters = sum(parameter.numel() for parameter in self.encoder.model.parameters())
        return ModelMeta.create_empty({
            "name": self.name, "revision": self.encoder.fingerprint, "embed_dim": self.encoder.dimension,
            "n_parameters": parameters, "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["Sentence Transformers", "PyTorch"],
        })  # fmt: skip


def _documents(batch: Mapping[str, Any]) -> list[Item]:
    bodies = batch.get("body", batch["text"])
    titles = batch.get("title", [""] * len(bodies))
    rows = zip(titles, bodies, strict=True)
    return [Item("", title, description=body) if title.strip() else Item("", body) for title, body in rows]


def _rows(embeddings: Any) -> Tensor:
    rows = torch.as_tensor(embeddings, dtype=torch.float32)
    return rows if rows.ndim == 2 else rows[None]


def _folder_name(folder: Path) -> str:
    """``x`` for ``runs/x/model``, where taoemb puts models."""
    return (folder.parent.name if folder.name == "model" else folder.name) or "model"
