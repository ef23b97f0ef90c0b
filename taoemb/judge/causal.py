"""A language model as a judge: the probabilities of the labels' answers, read off one forward pass.

Rules come first, then query, context and item, so that what all pairs begin with is computed once and kept, and what the
candidates of a query share once for all of them; the rest goes in batches of similar length.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.peft_utils import find_adapter_config_file

from taoemb.catalog import Item, Query
from taoemb.judge.prompts import JudgePrompt, ModelPrompt
from taoemb.judge.schemes import LabelScheme, ScoreFn
from taoemb.pretrained import loading, weights_digest
from taoemb.types import FloatArray, JudgeOutput

ENOUGH_MASS = 0.9
"""A mean label mass under this warns: the model would rather write something else than a label."""
_SHARING = 4  # candidates of a query from which on their common start pays for a pass of its own; our choice
_SAMPLES = (
    (Query("1", "red mug"), Item("1", "Acme mug")), (Query("2", "Lamp"), Item("2", "Desk lamp", "of metal, for reading at night, " * 12, price=4.5)),
    (Query("3", ""), Item("3", "")), (Query("4", '"'), Item("4", "\u4e2d")),
)  # fmt: skip
"""Pairs that begin as differently as pairs do: what their prompts have in common, all have."""
Pairs = Sequence[tuple[Query, Item]]


class CausalJudge:
    """Backend ``hf_causal``: a decoder LLM of transformers.

    The probability of a label is the softmax over the logits of the labels' answers at the first place of the model's turn
    (post-CoT; TaoSR1, arXiv 2508.12365). Where an answer takes several tokens in its place, or two begin alike, the whole answers'
    log-probabilities are compared instead, at one forward pass for each label.

    Args:
        model: folder or hub id of a causal language model or of a LoRA adapter of one (needs peft), a GGUF file (needs gguf), or
            a loaded model, then with its ``tokenizer``.
        prompt: what it reads, with a chat template as a chat, else as plain text; by default the one that it was trained with.
        score_fn: how the score is read off the probabilities (`LabelScheme.score`).
        batch_size: pairs in a forward pass, at most.
        device: torch device; by default cuda where there is one.
        dtype: of the weights, such as ``"bfloat16"``; by default float32 on a CPU, elsewhere what the model is stored in.

    Raises FileNotFoundError or ValueError when there is no such model, ValueError when the prompt leaves its answers no distinct
    tokens.
    """

    def __init__(
        self, model: str | Path | PreTrainedModel, *, tokenizer: Any = None, prompt: JudgePrompt | None = None,
        score_fn: ScoreFn = "expected", batch_size: int = 32, device: str | None = None, dtype: str | None = None,
        name: str = "hf_causal",
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        self.name, self.score_fn, self.batch_size = name, score_fn, batch_size
        saved = JudgePrompt.load(model) if isinstance(model, str | Path) else None
        self.prompt = prompt or saved or JudgePrompt()
        self.scheme.score(np.eye(len(self.scheme)), score_fn)  # a mistyped one must not come out after an hour
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("a loaded model needs its tokenizer: give tokenizer=")
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model, self.tokenizer = load_causal(model, device, dtype)
        self.model.train(False)
        self.device: torch.device = self.model.device
        self.reads = ModelPrompt(self.prompt, self.tokenizer)
        self._answers, self._lead = self._resolve_answers()
        self._head = _common_start([self._ids(query, item, "") for query, item in _SAMPLES])
        self._head_cache: DynamicCache | None = None
        self._reuses: bool | None = None  # whether the model's cache can be shared; known after the first pass
        self._warned = False

    @property
    def scheme(self) -> LabelScheme:
        """The labels."""
        return self.prompt.scheme

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and their type, the tokenizer's answers and the prompt; taken once: training the model makes it
        another judge."""
        digest = weights_digest(self.model)
        template = getattr(self.tokenizer, "chat_template", None)
        parts = [self.name, dataclasses.asdict(self.prompt), self.score_fn, self._answers, self._head, template]
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    def score(self, pairs: Pairs, contexts: Sequence[str] | None = None) -> JudgeOutput:
        """Judge ``N`` pairs, with a chunk of context each where ``contexts`` is given. Equal pairs are judged once.

        Warns once when the label mass of a call is under .9 in the mean.
        """
        contexts = contexts if contexts is not None else [""] * len(pairs)
        if len(contexts) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs, {len(contexts)} contexts: give one for each pair")
        rows: dict[tuple[int, ...], int] = {}  # tokens -> row
        group_of: list[str] = []
        where = []
        for (query, item), context in zip(pairs, contexts, strict=True):
            ids = tuple(self._ids(query, item, context))
            if ids not in rows:
                group_of.append(f"{query.text}\0{context}")
            where.append(rows.setdefault(ids, len(rows)))
        logp_RC = self._label_log_probs([list(ids) for ids in rows], group_of)
        logp_NC = logp_RC[where].astype(np.float64)
        mass_N = np.exp(logp_NC).sum(1).astype(np.float32)
        probs_NC = np.exp(logp_NC - logp_NC.max(1, keepdims=True)) if len(pairs) else logp_NC
        self._check_mass(mass_N)
        return self.scheme.output(probs_NC, self.score_fn, np.minimum(mass_N, 1.0))

    def explain(self, query: Query, item: Item, context: str = "", max_new_tokens: int = 200) -> str:
        """What the model writes about a pair, the label first, greedily; the reasons after it are worth what its training made of
        them."""
        ids = torch.tensor([self._ids(query, item, context)], device=self.device)
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                repetition_penalty=1.0, pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )  # type: ignore[operator] # fmt: skip
        return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    # -- from text to tokens -------------------------------------------------------------------------------------------

    def _ids(self, query: Query, item: Item, context: str) -> list[int]:
        """The tokens of a pair, up to where the answer begins."""
        return self.reads.encode(query, item, context, self.scheme.answers[0])[: -len(self._answers[0])]

    def _resolve_answers(self) -> tuple[list[list[int]], bool]:
        """The tokens of each answer in its place, and whether the first of each tells them apart."""
        found = []
        for query, item in _SAMPLES:
            whole = [self.reads.encode(query, item, "", answer) for answer in self.scheme.answers]
            start = len(_common_start(whole))
            found.append([ids[start:] for ids in whole])
        answers = found[0]
        if any(other != answers for other in found) or not all(answers) or len(set(map(tuple, answers))) < len(answers):
            raise ValueError(f"the answers {self.scheme.answers} have no tokens of their own after this prompt; use other answers "
                             "(LabelScheme.answering)")  # fmt: skip
        for one in answers:
            if any(one is not other and other[: len(one)] == one for other in answers):
                raise ValueError(f"the answers {self.scheme.answers}: one of them begins as another goes on, so that it is never less probable; "
                                 "use other answers (LabelScheme.answering)")  # fmt: skip
        return answers, all(len(ids) == 1 for ids in answers)

    # -- from tokens to probabilities ------------------------------------------------------------------------------------

    def _label_log_probs(self, rows: list[list[int]], group_of: Sequence[str]) -> FloatArray:
        """log P(answer of label c | row), ``[R, C]``."""
        if not rows:
            return np.zeros((0, len(self.scheme)), np.float32)
        logp_RC = torch.zeros(len(rows), len(self.scheme))
        if self._lead:
            wanted = torch.tensor([ids[0] for ids in self._answers], device=self.device)
            for indices, logp_BKV in self._last_log_probs(rows, group_of, keep=1):
                logp_RC[indices] = logp_BKV[:, -1].index_select(-1, wanted).cpu()
            return logp_RC.numpy()
        for c, ids in enumerate(self._answers):
            target = torch.tensor(ids, device=self.device)
            for indices, logp_BKV in self._last_log_probs([row + ids[:-1] for row in rows], group_of, keep=len(ids)):
                picked = logp_BKV.gather(-1, target.expand(len(indices), -1)[..., None])
                logp_RC[indices, c] = picked[..., 0].sum(-1).cpu()
        return logp_RC.numpy()

    def _last_log_probs(
        self, rows: list[list[int]], group_of: Sequence[str], keep: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of rows and the log-probabilities after each of their last ``keep`` tokens, ``[B, keep, V]``."""
        with torch.inference_mode():
            head = self._shared_head()
            alone: list[int] = []
            groups: dict[str, list[int]] = {}
            for index, group in enumerate(group_of):
                groups.setdefault(group, []).append(index)
            for members in groups.values():
                start = _common_start([rows[i][:-keep] for i in members])
                begins = start[: len(self._head)] == self._head
                if head is None or len(members) < _SHARING or not begins or len(start) == len(self._head):
                    alone += members
                    continue
                cache = copy.deepcopy(head)
                self._forward([start[len(self._head) :]], cache, 1)
                yield from self._batches(rows, members, start, cache, keep)
            length, usual, others = len(self._head), list[int](), list[int]()
            for i in alone:
                fits = head is not None and len(rows[i]) >= length + keep and rows[i][:length] == self._head
                (usual if fits else others).append(i)
            yield from self._batches(rows, usual, self._head, head, keep)
            yield from self._batches(rows, others, [], None, keep)

    def _batches(
        self, rows: list[list[int]], members: list[int], start: list[int], cache: DynamicCache | None, keep: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        members = sorted(members, key=lambda i: len(rows[i]))  # rows of similar length pad little
        for begin in range(0, len(members), self.batch_size):
            batch = members[begin : begin + self.batch_size]
            shared = None
            if cache is not None:
                shared = copy.deepcopy(cache)
                shared.batch_repeat_interleave(len(batch))
            logits = self._forward([rows[i][len(start) :] for i in batch], shared, keep)
            yield batch, torch.log_softmax(logits.float(), -1)

    def _forward(self, rows: list[list[int]], cache: DynamicCache | None, keep: int) -> Tensor:
        """Logits after the last ``keep`` tokens of left-padded rows that go on from a cache, which grows by them."""
        past, longest = (0 if cache is None else cache.get_seq_length()), max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), past + longest, dtype=torch.long)
        mask[:, :past] = 1
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, past + longest - len(row) :] = 1
        places = (mask[:, past:].cumsum(-1) - 1).clamp_min(0) + past
        found = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), position_ids=places.to(self.device),
            past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep,
        )  # fmt: skip
        logits: Tensor = found.logits
        return logits

    def _shared_head(self) -> DynamicCache | None:
        """Keys and values of what all prompts begin with, once it is known that this model gives the same with them: none for
        models that keep something else (sliding windows, recurrent states), or whose positions are those of the slots."""
        if self._reuses is None:
            self._reuses = False
            ids = torch.tensor([self._head], device=self.device)
            cache = getattr(self.model(input_ids=ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
            if (
                self._head
                and isinstance(cache, DynamicCache)
                and all(type(layer) is DynamicLayer for layer in cache.layers)
            ):
                self._reuses = self._agrees(cache)
                self._head_cache = cache if self._reuses else None
            if not self._agrees(None):
                self.batch_size = 1  # even padding changes its answers
        return self._head_cache

    def _agrees(self, cache: DynamicCache | None) -> bool:
        """Whether rows of different length, padded and behind a cache, get the label probabilities of plain forward passes."""
        rows = [self._ids(query, item, "") for query, item in _SAMPLES[:2]]
        wanted = torch.tensor([ids[0] for ids in self._answers], device=self.device)
        alone = [torch.softmax(self._forward([row], None, 1)[0, -1, wanted].float(), -1) for row in rows]
        start, shared = 0, None
        if cache is not None:
            start, shared = len(self._head), copy.deepcopy(cache)
            shared.batch_repeat_interleave(len(rows))
        together = torch.softmax(self._forward([row[start:] for row in rows], shared, 1)[:, -1, wanted].float(), -1)
        return float((together - torch.stack(alone)).abs().max()) < (
            1e-4 if self.model.dtype == torch.float32 else 0.03
        )

    def _check_mass(self, mass_N: FloatArray) -> None:
        if len(mass_N) and np.isnan(mass_N).any() and not self._warned:
            self._warned = True
            warnings.warn(
                f"judge {self.name!r} gives {np.isnan(mass_N).mean():.0%} of the pairs no number (NaN), and abstains there: load it with "
                f"dtype='float32' or 'bfloat16' (it is {self.model.dtype})", stacklevel=3,
            )  # fmt: skip
        elif len(mass_N) and mass_N.mean() < ENOUGH_MASS and not self._warned:
            self._warned = True
            warnings.warn(
                f"judge {self.name!r} gives its labels {mass_N.mean():.3f} of the probability in the mean: it would rather write "
                "something else. Train it on the labels, or use answers and a prompt that it follows",
                stacklevel=3,
            )


def load_causal(model: str | Path, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder, a hub id, an adapter's folder or a GGUF file.

    Raises FileNotFoundError when there is nothing of that name, ValueError when it is no such model, ImportError when a
    package that it needs is missing.
    """
    name, path = str(model), Path(model)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind: Any = dtype or (torch.float32 if target == "cpu" else "auto")
    where: dict[str, Any] = {}
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{name!r} is not a causal language model: the folder holds no config.json; give that of a model, or a GGUF file"
        )
    with loading(name, "causal language model"):
        if path.suffix == ".gguf" and path.is_file():
            name, where = str(path.parent), {"gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        if find_adapter_config_file(name) is None:
            where["output_loading_info"] = True  # fails for an adapter
        found: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind, **where)
    loaded, info = found if "output_loading_info" in where else (found, {"missing_keys": ()})
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"{name!r} is not a causal language model: it has no weights for {missing[0]}"
                         f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; an encoder or cross-encoder is none")  # fmt: skip
    return loaded.to(target), tokenizer


def _common_start(rows: Sequence[list[int]]) -> list[int]:
    """What all rows begin with."""
    first, last = min(rows), max(rows)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
