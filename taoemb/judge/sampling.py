"""What a judge in training writes: samples of its completions, and the preferences and prompts that follow from them (TaoSR1,
arXiv 2508.12365: pass@N sampling, self-correction, oracle guidance, difficulty)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from taoemb.files import read_json, write_json
from taoemb.judge.examples import Example, Style, parse, parse_label
from taoemb.judge.prompts import ModelPrompt
from taoemb.judge.schemes import LabelScheme
from taoemb.judge.verdicts import fingerprint
from taoemb.pretrained import weights_digest

_BATCH = 16  # prompts sampled together; our choice


@dataclass(frozen=True)
class Sampled:
    """``n`` completions of each of ``N`` examples, their labels, ``-1`` where they state none, and whether they hold all that the style
    asks for, ``[N, n]``."""

    texts: list[list[str]]
    labels: np.ndarray
    whole: np.ndarray

    def correct(self, labels: Sequence[int]) -> np.ndarray:
        """Which state the right label, bool ``[N, n]``; input of `taoemb.judge.chains.pass_at_k`."""
        return np.asarray(self.labels == np.asarray(labels)[:, None])


def sample_completions(
    model: Any, reads: ModelPrompt, examples: Sequence[Example], n: int, file: Path, *, style: Style, temperature: float = 1.0,
    max_new_tokens: int = 128, top_k: int = 0, seed: int = 0, progress: str = "",
) -> Sampled:  # fmt: skip
    """``n`` completions of each example, drawn at ``temperature`` (0: the most probable one, greedily) from the ``top_k`` most probable tokens (0: from all), kept in ``file``: a call after a
    kill goes on behind the last batch, and draws what the uninterrupted one would have drawn.

    Raises ValueError when ``file`` holds samples of other examples, of another model or by other settings.
    """
    model_digest = weights_digest(model).hexdigest()
    digest = fingerprint(
        *examples, model_digest, reads.prompt, n, style, temperature, max_new_tokens, *([top_k] if top_k else []), seed
    )
    texts = _read(file, digest, len(examples))
    tokenizer, scheme = reads.tokenizer, reads.prompt.scheme
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn: dict[str, Any] = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": 1.0,
        "num_return_sequences": n,
    }
    if temperature == 0:
        drawn = {"do_sample": False, "num_return_sequences": 1}
    drawn["repetition_penalty"] = 1.0  # chat models come with other defaults
    model.train(False)
    with tqdm(
        total=len(examples), initial=len(texts), desc=progress, disable=None if progress else True, leave=False
    ) as bar:
        while len(texts) < len(examples):
            batch = examples[len(texts) : len(texts) + _BATCH]
            rows = [reads.encode(e.query, e.item, e.context) for e in batch]
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, longest - len(row) :] = torch.tensor(row)
                mask[i, longest - len(row) :] = 1
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.inference_mode():
                torch.manual_seed(int(np.random.SeedSequence([seed, len(texts)]).generate_state(1)[0]))
                written = model.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
                    pad_token_id=pad, **drawn,
                )  # fmt: skip
            found = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            width = len(found) // len(batch)
            texts += [[text.strip() for text in found[i : i + width]] for i in range(0, len(found), width)]
            with file.open("ab") as stream:
                stream.write(
                    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts[-len(batch) :]).encode()
                )
            bar.update(len(batch))
    stated = [[parse_label(text, style, scheme) for text in row] for row in texts]
    labels = np.array([[-1 if label is None else label for label in row] for row in stated], dtype=np.int64)
    whole = [[style == "label" or parse(text, style, scheme).ok for text in row] for row in texts]
    return Sampled(texts, labels, np.array(whole))


def preference_pairs(
    examples: Sequence[Example], sampled: Sampled, labels: Sequence[int], teacher: Callable[[Example], str | None], *,
    overrated: bool = False,
) -> list[tuple[int, str, str]]:  # fmt: skip
    """(example, chosen, rejected): chosen is a right sample of its own where it has one (self-correction), else the teacher's completion
    (oracle guidance), rejected a wrong one of its own; an example without a wrong sample, or with no right one and no teacher,
    gives none. Of right samples the first whose reasons can be read is chosen, else the first; of wrong ones the first that states a label is
    rejected, else the first (our choice). ``overrated``: where some rate higher than the truth, the one that rates highest (LREF)."""
    pairs = []
    for i, (example, texts, label) in enumerate(zip(examples, sampled.texts, labels, strict=True)):
        stated, whole = sampled.labels[i].tolist(), sampled.whole[i].tolist()
        right = [(not read, n) for n, (said, read) in enumerate(zip(stated, whole, strict=True)) if said == label]
        wrong = [
            (-max(said - label, 0) if overrated else 0, said < 0, n) for n, said in enumerate(stated) if said != label
        ]
        chosen = texts[min(right)[1]] if right else teacher(example)
        if wrong and chosen is not None:
            pairs.append((i, chosen, texts[min(wrong)[2]]))
    return pairs


def difficult(
    correct: np.ndarray, labels: Sequence[int], limit: float = 1.0, balance: bool = True, seed: int = 0, *, hardest: float = 0.0,
    keep: np.ndarray | None = None,
) -> list[int]:  # fmt: skip
    """Positions of the examples with ``hardest * n < #correct < limit * n``: groups with equal rewards teach nothing (TaoSR1: the
    best limit drops the all-right and all-wrong alone), and of these those of ``keep``, bool ``[N]``, where it is given. With ``balance``
    every label that is left has as many as the rarest (TaoSR1: a coefficient of variation of 0), drawn at random. In rising order."""
    right, n = correct.sum(1), correct.shape[1]
    kept = np.flatnonzero((right > hardest * n + 1e-9) & (right < limit * n - 1e-9))  # .28 * 25 is above 7
    kept = kept if keep is None else kept[keep[kept]]
    if balance and len(kept):
        of_label = np.asarray(labels)[kept]
        count = min((of_label == label).sum() for label in np.unique(of_label))
        rng = np.random.default_rng([seed, 9])
        kept = np.concatenate(
            [rng.choice(kept[of_label == label], count, replace=False) for label in np.unique(of_label)]
        )
    return sorted(kept.tolist())


def patterns(sampled: Sampled, style: Style, scheme: LabelScheme) -> np.ndarray:
    """How often the readable completions of each example differ in category verdict, attribute verdict or label, ``[N]``."""
    found = []
    for texts in sampled.texts:
        chains = [parse(text, style, scheme) for text in texts]
        found.append(len({(chain.category, chain.attribute, chain.label) for chain in chains if chain.ok}))
    return np.array(found, dtype=np.int64)


def curriculum(kept: Sequence[int], correct: np.ndarray, labels: Sequence[int], total: int, seed: int = 0) -> list[int]:
    """``total`` of the positions ``kept``, in the order of training: those mostly right first, from a share of .75 on, then from .25 on, then the
    rest (ours, after TaoSR-SHE). A bucket has its share of ``total``, its prompts again and again or some of them; inside it labels take
    turns, in random order."""
    rng, share = np.random.default_rng([seed, 10]), correct.mean(1)
    order: list[int] = []
    done = 0
    for low, high in ((0.75, np.inf), (0.25, 0.75), (-np.inf, 0.25)):
        bucket = [n for n in kept if low <= share[n] < high]
        done += len(bucket)
        wanted = round(total * done / len(kept)) - len(order)
        turns: list[int] = []
        while bucket and len(turns) < wanted:
            queues: dict[int, list[int]] = {}
            for n in rng.permutation(bucket).tolist():
                queues.setdefault(labels[n], []).append(n)
            for place in range(max(map(len, queues.values()))):
                turns += [queue[place] for queue in queues.values() if place < len(queue)]
        order += turns[:wanted]
    return order


class PosteriorSampler:
    """Which of ``N`` prompts each step takes: their shares of right completions have a Beta posterior, one draw of each is taken, and the
    ``count`` prompts whose draws are nearest to one half (ours, after VADE). It begins with what was ``seen`` before training, right and all
    completions ``[N]``.

    Step ``k`` knows the groups up to step ``k - 2``, because a loader reads one batch ahead; so it is a function of the seed and the
    ``history``, which a checkpoint keeps.
    """

    def __init__(self, seen: tuple[np.ndarray, np.ndarray], count: int, seed: int = 0) -> None:
        self.seen, self.count, self.seed = seen, count, seed
        self.history: list[list[tuple[int, int, int]]] = []

    def update(self, groups: Sequence[tuple[int, int, int]]) -> None:
        """Note a step's groups: (prompt, right completions, all completions)."""
        self.history.append([(int(n), int(right), int(total)) for n, right, total in groups])

    def draw(self, step: int) -> list[int]:
        """The prompts of a step, different ones."""
        if len(self.history) < step - 1:
            raise RuntimeError(
                f"step {step} is drawn when {len(self.history)} steps are known: the loader reads further ahead than one batch"
            )
        right, total = (np.asarray(values, dtype=np.float64).copy() for values in self.seen)
        for groups in self.history[: max(0, step - 1)]:
            for n, hits, count in groups:
                right[n] += hits
                total[n] += count
        drawn = np.random.default_rng([self.seed, 11, step]).beta(1 + right, 1 + total - right)
        return [int(n) for n in np.argsort(np.abs(drawn - 0.5), kind="stable")[: self.count]]


def _read(file: Path, digest: str, total: int) -> list[list[str]]:
    """The samples so far, of whole batches alone: a kill may have cut the last one."""
    head = file.with_suffix(".json")
    if not (head.exists() and file.exists()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        write_json(head, {"digest": digest})
    if read_json(head).get("digest") != digest:
        raise ValueError(
            f"{file} holds samples of other examples, another model or settings; delete it with {head.name} to draw new ones"
        )
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    whole = len(lines) if len(lines) == total else len(lines) // _BATCH * _BATCH
    with file.open("r+b") as stream:
        stream.truncate(sum(map(len, lines[:whole])))
    return [json.loads(line) for line in lines[:whole]]
