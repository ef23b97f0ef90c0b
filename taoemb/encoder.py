"""The encoder: a sentence-transformers model, its prompts and the item template, as one saved thing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router, StaticEmbedding, Transformer
from torch import Tensor, nn
from tqdm import tqdm

from taoemb.backends import EXACT, Backend, Run, load_backend
from taoemb.catalog import Item, ItemTemplate
from taoemb.config import from_dict
from taoemb.files import replace_folder
from taoemb.pretrained import (
    Kind,
    adapters,
    check_towers,
    distill_static,
    load_model,
    route,
    save_model,
    weights_digest,
)
from taoemb.types import FloatArray

__all__ = ["Encoder", "Kind", "check_device", "distill_static"]

TEMPLATE_FILE = "taoemb.json"
_TOKEN_CACHE_TEXTS = 500_000
_TOKENISED_TEXTS = 1024  # of similar length, tokenised together
CPU_BATCH_TOKENS = 1024  # a thread: what a layer writes stays in the cache of its core
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Encoder:
    """Embeds queries and items into one space of unit vectors.

    Args:
        model: folder or hub id of any sentence-transformers model or of a bare decoder LLM, which gets last-token
            pooling, or a loaded ``SentenceTransformer``. A model that does not end in ``Normalize`` gets one appended, so
            that the inner product is the cosine everywhere. Weights become float32: 4 bytes a parameter.
        template: how an item becomes text; by default the one saved with the model, else ``ItemTemplate()``.
        device: torch device; by default what sentence-transformers picks.
        batch_size: texts per forward pass of `encode_query` and `encode_document`, at most; by default 64, and 2,048
            for static embeddings (our choice). Transformers on a CPU get fewer long texts: 1,024 tokens a thread.
        backend: what encodes. ``torch`` also trains; the others run transformers on the CPU, faster and without
            gradient: ``onnx``, ``openvino`` give torch's vectors, ``openvino-bf16``, ``onnx-int8`` and
            ``openvino-int8`` nearly so, and their `fingerprint` is another. They export the model when it is loaded,
            so later changes of its weights change nothing, and use as many threads as torch.
        cache: folder in which the exports of the backends are kept, for the next start; by default nowhere.

    Attributes set by `taoemb.backbone.prepare`: ``bf16``, forward passes compute in bfloat16 (vectors and weights stay
    float32); ``merge_lora``, `save` merges LoRA adapters into plain weights instead of writing them as adapters;
    ``tower_sharing``, what `share_gradients` adds to each of two towers.

    >>> Encoder("no-such-folder/model")
    Traceback (most recent call last):
    ...
    FileNotFoundError: 'no-such-folder/model' is neither a folder nor a model that could be loaded from the hub: ...
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        *,
        template: ItemTemplate | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        backend: Backend = "torch",
        cache: str | Path | None = None,
    ) -> None:
        if device is not None:
            check_device(device)
        if backend != "torch" and device is None and not isinstance(model, SentenceTransformer):
            device = "cpu"
        saved = None
        if not isinstance(model, SentenceTransformer):
            saved = _saved_template(Path(model))
            model = load_model(str(model), device)
        elif device is not None:
            model = model.to(device)
        if model.truncate_dim is not None:
            raise ValueError(f"truncate_dim={model.truncate_dim}: truncated embeddings are no unit vectors; load the model "
                             "without it")  # fmt: skip
        check_towers(model)
        if backend != "torch" and isinstance(model[0], Router):
            raise ValueError(f"backend {backend!r} cannot run a model with two towers; use backend='torch'")
        if not isinstance(model[-1], Normalize):
            model.append(Normalize())
        self.model = model.float().eval()  # distilled static models are saved as float16, in which Adam overflows
        self.template = template or saved or ItemTemplate()
        self.bf16 = self.merge_lora = False
        self.tower_sharing = 0.0
        self._tokens: dict[Kind, dict[str, npt.NDArray[np.int32]]] = {"query": {}, "document": {}}
        self.batch_size = batch_size or (2048 if self.static else 64)
        documents = (model.prompts[name] for name in _DOCUMENT_PROMPTS if model.prompts.get(name))
        self.prompts: dict[Kind, str | None] = {
            "query": model.prompts.get("query") or None,
            "document": next(documents, None),
        }
        # Flattened features (flash attention) have no padding that could be saved.
        self._padded = {kind: isinstance(route(model, kind)[0], Transformer)
                        and "attention_mask" in model.preprocess(["a"], task=kind) for kind in self._tokens}  # fmt: skip
        self.backend: Backend = backend
        self._run: Run | None = None
        self._exported: hashlib._Hash | None = None  # of the weights in `_run`
        if backend != "torch":
            self._exported = weights_digest(self.model)
            identity = f"{self._exported.hexdigest()} {list(self._module_settings())}"
            self._run = load_backend(self.model, backend, Path(cache) if cache else None, identity)

    @property
    def dimension(self) -> int:
        """Number of dimensions ``D``."""
        dimension = self.model.get_embedding_dimension()
        if dimension is None:
            raise ValueError("the model does not say how many dimensions its embeddings have")
        return dimension

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The weights that training changes, each once; all others are frozen."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def share_gradients(self) -> None:
        """Add to the gradient of each tower ``tower_sharing`` times the other's: ``g_q + s g_i`` and ``g_i + s g_q``.

        Words that only the queries (or the items) of a training log hold are so learned by both towers, and yet a word may come to mean
        something else in a query than in an item. s = 0 are two towers as usually trained; s = 1 would be one (but for the clipping of the
        gradient, whose norm has both towers in it). Does nothing for other models."""
        first = self.model[0]
        if not self.tower_sharing or not isinstance(first, Router):
            return
        towers = (first.sub_modules[kind].parameters() for kind in ("query", "document"))
        for query, item in zip(*towers, strict=True):
            if query.grad is not None and item.grad is not None and query is not item:
                both = query.grad + item.grad  # g_q + s g_i = (1 - s) g_q + s (g_q + g_i)
                query.grad.lerp_(both, self.tower_sharing)
                item.grad.lerp_(both, self.tower_sharing)

    @property
    def items_fixed(self) -> bool:
        """Whether training cannot change the embedding of an item: no weight on its way is trainable."""
        modules = route(self.model, "document")
        return not any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def encode_query(self, texts: Sequence[str], progress: bool = False) -> FloatArray:
        """Embed ``B`` query texts: float32 ``[B, D]``, unit rows (a text without tokens gives a zero row)."""
        return self._encode(texts, "query", progress)

    def encode_document(self, items: Sequence[str | Item], progress: bool = False) -> FloatArray:
        """Embed ``N`` items, or texts that are already rendered: float32 ``[N, D]``, unit rows."""
        _check_list(items)
        return self._encode(self.item_texts(items), "document", progress)

    def item_texts(self, items: Sequence[str | Item]) -> list[str]:
        """The texts that the model reads; strings pass unchanged."""
        return [item if isinstance(item, str) else self.template.render(item) for item in items]

    def _encode(self, texts: Sequence[str], kind: Kind, progress: bool) -> FloatArray:
        _check_list(texts)
        if not len(texts):
            return np.zeros((0, self.dimension), dtype=np.float32)
        with self._evaluating():
            if self._padded[kind]:
                return self._encode_padded(texts, kind, progress)
            return self._encode_batches(texts, kind, progress)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout, also in the middle of training."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            yield
        finally:
            for module in training:
                module.training = True

    @property
    def static(self) -> bool:
        """Whether both kinds of text get static embeddings, which have no layers."""
        return self._is_static("query") and self._is_static("document")

    def _is_static(self, kind: Kind) -> bool:
        return isinstance(route(self.model, kind)[0], StaticEmbedding)

    @torch.inference_mode()
    def _encode_batches(self, texts: Sequence[str], kind: Kind, progress: bool) -> FloatArray:
        """Encode texts of similar length together, by letters."""
        rows = np.arange(len(texts)) if self._is_static(kind) else np.argsort([-len(text) for text in texts])
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in tqdm(range(0, len(rows), self.batch_size), disable=None if progress else True):
            part = rows[start : start + self.batch_size]
            vectors[part] = self.forward([texts[row] for row in part], kind).cpu().numpy()
        return vectors

    def _encode_padded(self, texts: Sequence[str], kind: Kind, progress: bool) -> FloatArray:
        """Encode in batches of texts with nearly the same number of tokens: padding costs as much as text."""
        run = self._run or (lambda features: self._run_torch(features, kind))
        tokens = CPU_BATCH_TOKENS * torch.get_num_threads() if self.device.type == "cpu" else None
        by_length = sorted(range(len(texts)), key=lambda row: -len(texts[row]))  # first by letters, which cost nothing
        vectors: FloatArray | None = None
        with tqdm(total=len(texts), unit="text", disable=None if progress else True) as bar:
            for start in range(0, len(texts), _TOKENISED_TEXTS):
                rows = np.asarray(by_length[start : start + _TOKENISED_TEXTS])
                features = self._features([texts[row] for row in rows], kind)
                for part, batch in token_batches(features, self.batch_size, tokens):
                    found = run(batch)
                    if vectors is None:
                        vectors = np.empty((len(texts), found.shape[1]), dtype=np.float32)
                    vectors[rows[part]] = found
                    bar.update(len(part))
        assert vectors is not None  # there is a text
        return vectors

    @torch.inference_mode()
    def _run_torch(self, features: dict[str, Any], kind: Kind) -> FloatArray:
        vectors: FloatArray = self._embed(features, kind).cpu().numpy()
        return vectors

    def forward(self, texts: Sequence[str], kind: Kind) -> Tensor:
        """Embed texts with gradient: float32 ``[N, D]`` on the model's device; the same vectors as `encode_query` and
        `encode_document` give. Where items are fixed, theirs have no gradient, and no dropout either.

        Raises ValueError with another backend than torch."""
        if self.backend != "torch":
            raise ValueError(f"backend {self.backend!r} only encodes; forward and training need backend='torch'")
        _check_list(texts)
        if not len(texts):
            return torch.zeros(0, self.dimension, device=self.device)
        features = self._features(texts, kind)
        with self._evaluating() if kind == "document" and self.items_fixed else nullcontext():
            if not self._padded[kind] or self.device.type != "cpu":
                return self._embed(features, kind)
            rows, parts = zip(
                *token_batches(features, self.batch_size, CPU_BATCH_TOKENS * torch.get_num_threads()), strict=True
            )
            places = torch.from_numpy(np.argsort(np.concatenate(rows)))
            return torch.cat([self._embed(part, kind) for part in parts])[places]

    def _features(self, texts: Sequence[str], kind: Kind) -> dict[str, Any]:
        """What the model reads, on the CPU."""
        if self._is_static(kind):
            return self._token_features(texts, kind)
        features = self.model.preprocess(list(texts), prompt=self.prompts[kind], task=kind)
        mask = features.get("attention_mask")
        if mask is not None and not mask.shape[1]:  # no text has a token, and no transformer takes rows without any
            blank = torch.zeros(len(texts), 1, dtype=torch.int64)
            features.update({name: blank for name, value in features.items() if isinstance(value, Tensor)})
        return features

    def _embed(self, features: dict[str, Any], kind: Kind) -> Tensor:
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in features.items()}
        precision: AbstractContextManager[object] = (
            torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        )
        with precision:
            embedding: Tensor = self.model(moved, task=kind)["sentence_embedding"]
        if embedding.dtype == torch.float32:
            return embedding
        return nn.functional.normalize(embedding.float(), dim=-1)  # again: a unit vector in bfloat16 is off by 1e-3

    def _token_features(self, texts: Sequence[str], kind: Kind) -> dict[str, Tensor]:
        """What ``StaticEmbedding.preprocess`` gives, with token ids kept: tokenising costs ten times the embedding."""
        prompt, tokens = self.prompts[kind], self._tokens[kind]
        texts = [prompt + text for text in texts] if prompt else texts
        new = list(dict.fromkeys(text for text in texts if text not in tokens))
        found: dict[str, npt.NDArray[np.int32]] = {}
        if new:
            encoded = route(self.model, kind)[0].tokenizer.encode_batch(new, add_special_tokens=False)
            found = {text: np.asarray(e.ids, dtype=np.int32) for text, e in zip(new, encoded, strict=True)}
        rows = [found[text] if text in found else tokens[text] for text in texts]
        # The first texts stay, not the last: a larger catalog, encoded in order again and again, would find none of the last
        tokens.update(islice(found.items(), max(_TOKEN_CACHE_TEXTS - len(tokens), 0)))
        offsets = np.cumsum([0, *(len(row) for row in rows[:-1])])
        return {
            "input_ids": torch.from_numpy(np.concatenate(rows).astype(np.int64)),
            "offsets": torch.from_numpy(offsets),
        }

    def __getstate__(self) -> dict[str, Any]:
        if self._run is not None:  # it holds a session of its runtime
            raise TypeError(f"an encoder with backend {self.backend!r} cannot go to another process; one process with as "
                            "many threads does the same")  # fmt: skip
        return self.__dict__

    def forget_tokens(self) -> None:
        """Drop the token ids that are kept of the first 500,000 texts encoded (static models keep them: training encodes a
        text many times)."""
        for tokens in self._tokens.values():
            tokens.clear()

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides an embedding: weights, modules and their settings, prompts and item template.

        The backends ``onnx`` and ``openvino`` share torch's, whose vectors they give up to float32 rounding; those of
        lower precision have their own.
        """
        digest = self._exported.copy() if self._exported else weights_digest(self.model)
        settings: dict[str, object] = {
            "modules": list(self._module_settings()),
            "prompts": self.prompts,
            "template": dataclasses.asdict(self.template),
        }
        if self.backend not in EXACT:
            settings["backend"] = self.backend
        if self.bf16:
            settings["bf16"] = True
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    def _module_settings(self) -> Iterator[list[object]]:
        first: Any = self.model[0]
        if not isinstance(first, Router):
            yield from module_settings(self.model)
            return
        for kind, tower in first.sub_modules.items():
            yield [kind, *module_settings(typing.cast("nn.Sequential", tower))]
        yield from module_settings(list(self.model)[1:])

    def save(self, folder: str | Path) -> None:
        """Write a sentence-transformers folder plus the item template; the folder appears complete or not at all.

        LoRA adapters are merged into plain weights where ``merge_lora`` says so. Else the folder holds the adapters,
        and beside them, in ``base``, the start model that they refer to by its absolute path. This encoder does not
        change in either case.
        """
        folder = Path(folder)
        with replace_folder(folder, "modules.json") as beside:
            save_model(self.model, beside, folder, self.merge_lora)
            template = json.dumps({"item_template": dataclasses.asdict(self.template)}, indent=2)
            (beside / TEMPLATE_FILE).write_text(template + "\n", encoding="utf-8")

    def copy(self) -> Encoder:
        """An independent encoder with the same weights; what another backend exported is shared, as nothing changes it.
        The copy of a compiled model runs without compilation."""
        other = Encoder(copy.deepcopy(self.model), template=self.template, batch_size=self.batch_size)
        other.backend, other._run, other._exported = self.backend, self._run, self._exported
        other.bf16, other.merge_lora, other.tower_sharing = self.bf16, self.merge_lora, self.tower_sharing
        return other


def module_settings(modules: Iterable[Any]) -> Iterator[list[object]]:
    """What decides a model's outputs besides weights, module by module."""
    for module in modules:
        config = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        lora = [[name, c.r, c.lora_alpha] for model in adapters(module) for name, c in model.peft_config.items()]
        yield [type(module).__name__, config, getattr(module, "max_seq_length", None), *lora]


def token_batches(
    features: dict[str, Any], most_texts: int, most_tokens: int | None
) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Any]]]:
    """Cut padded features (tensors ``[N, T]``) into batches: rows, and their features without needless padding.

    The rows go from many tokens to few; a batch holds ``most_tokens`` at most, padding counted, but at least one row.
    """
    mask = features["attention_mask"]
    lengths = mask.sum(dim=1).numpy()
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]), 1)
        count = most_texts if most_tokens is None else max(min(most_texts, most_tokens // width), 1)
        rows = order[start : start + count]
        used = mask[rows].any(dim=0).nonzero()  # a run of columns, at the left or, with left padding, at the right
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
        yield (
            rows,
            {
                name: value[rows, columns].contiguous() if isinstance(value, Tensor) else value
                for name, value in features.items()
            },
        )
        start += count


def _check_list(texts: Sequence[object]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, got one text: {texts[:40]!r}; put it in a list")


def check_device(device: str) -> None:
    """Raises ValueError for a torch device that there is none of."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: give cpu, cuda or cuda:1, or mps") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: torch sees {torch.cuda.device_count()} GPUs")


def _saved_template(folder: Path) -> ItemTemplate | None:
    file = folder / TEMPLATE_FILE
    if not file.exists():
        return None
    return from_dict(ItemTemplate, json.loads(file.read_text(encoding="utf-8"))["item_template"])
