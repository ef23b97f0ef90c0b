"""A cross-encoder as a judge: query and item are read together, by a model small enough for a reward on a CPU.

Models that were trained elsewhere give a score or one logit a label. `train_cross_encoder` distils the probabilities of any
other judge, such as a language model, into one (soft targets; Hinton et al., arXiv 1503.02531): the strong judge is asked once
for some pairs, and the small one judges millions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import CrossEncoder
from torch import Tensor

from taoemb.catalog import Item, ItemTemplate, Query
from taoemb.checkpoint import load_checkpoint, save_checkpoint
from taoemb.config import from_dict
from taoemb.contrastive import check_optimiser, check_positive, set_learning_rate
from taoemb.encoder import CPU_BATCH_TOKENS, TEMPLATE_FILE, check_device, module_settings, token_batches
from taoemb.files import read_json, replace_folder, write_json
from taoemb.judge.schemes import GRADES_4, LabelScheme, ScoreFn
from taoemb.judge.verdicts import SOFTNESS, ordered_probs
from taoemb.pretrained import loading, weights_digest
from taoemb.tracking import Backend, Tracker
from taoemb.types import MAX_GRADE, FloatArray, JudgeOutput

Pairs = Sequence[tuple[Query, Item]]
Texts = Sequence[tuple[str, str]]
KIND = "cross_encoder_judge"
MAX_LENGTH = 256
"""Tokens of a pair; our choice: a query and the 400 characters that `ItemTemplate` gives of an item fit well."""
_TOKENISED_PAIRS = 1024  # of similar length, tokenised together


class CrossEncoderJudge:
    """The label probabilities of a cross-encoder.

    A model with one output for each of the ``C`` labels of the scheme, the worst first: softmax over its logits. A model with one
    output: the sigmoid ``s`` of it is the relevance; with two labels it is the probability of the better one, with more it is
    turned into probabilities by `ordered_probs` with even cuts ``1/C, 2/C, ...``. Where the pair is longer than the model may
    read, the item is cut, and the query only where it does not even fit alone. Equal pairs of a call are computed once.

    Args:
        model: folder or hub id of a sentence-transformers ``CrossEncoder``, or a loaded one, whose weights become float32.
        scheme: the labels; by default those saved with the model, else `GRADES_4`.
        template: how an item becomes text; by default the one saved with the model, else ``ItemTemplate()``.
        score_fn: how the score is read off the probabilities (`LabelScheme.score`); by default as saved, else ``expected``.
        max_length: tokens of a pair, at most; by default as saved, else 256; never more than the model can read.
        batch_size: pairs per forward pass, at most; a CPU gets fewer long ones.
        device: torch device; by default what sentence-transformers picks.
        name: for logs and reports.

    Raises ValueError when the model has another number of outputs, no trained head, or is a language model with a chat template or
    a prompt, and FileNotFoundError when there is no such model.
    """

    def __init__(
        self,
        model: str | Path | CrossEncoder,
        *,
        scheme: LabelScheme | None = None,
        template: ItemTemplate | None = None,
        score_fn: ScoreFn | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        device: str | None = None,
        name: str = "cross_encoder",
    ) -> None:
        saved: dict[str, Any] = {}
        if device is not None:
            check_device(device)
        if isinstance(model, (str, Path)):
            saved = _read_settings(Path(model))
            loaded = _load(str(model), device)
            _check_head(loaded)
        else:
            loaded = model if device is None else model.to(device)
        self.scheme: LabelScheme = scheme or saved.get("scheme") or GRADES_4
        self.template: ItemTemplate = template or saved.get("item_template") or ItemTemplate()
        self.score_fn: ScoreFn = score_fn or saved.get("score_fn") or "expected"
        length = max_length if max_length is not None else saved.get("max_length", MAX_LENGTH)
        self.max_length = min(length, loaded.max_seq_length or length)
        self.name, self.batch_size = name, batch_size
        self.model = loaded.float().eval()
        self._special = loaded.tokenizer.num_special_tokens_to_add(pair=True)
        self._check()

    def _check(self) -> None:
        if self.score_fn not in get_args(ScoreFn):
            raise ValueError(f"score_fn={self.score_fn!r}: give one of {', '.join(get_args(ScoreFn))}")
        if self.batch_size < 1 or self.max_length < self._special + 2:
            raise ValueError(f"batch_size={self.batch_size}, max_length={self.max_length}: give at least 1 and at least "
                             f"{self._special + 2}, a token each besides the model's own")  # fmt: skip
        if "message" in self.model.modalities or self.model.default_prompt_name:
            raise ValueError("the model wraps its texts into a chat or a prompt; give a cross-encoder that reads pairs of texts, "
                             "and use a language model as a judge of its own")  # fmt: skip
        if self.model.num_labels not in (1, len(self.scheme)):
            raise ValueError(f"the model has {self.model.num_labels} outputs and the scheme {self.scheme.name!r} {len(self.scheme)} labels; "
                             "give the scheme it was trained on, or train one with train_cross_encoder")  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the weights and modules, scheme, template, ``max_length`` and ``score_fn``; computed once."""
        digest = weights_digest(self.model)
        parts = {"modules": list(module_settings(self.model)), **self._settings()}
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def score(self, pairs: Pairs) -> JudgeOutput:
        """Judge ``N`` pairs."""
        texts = self.texts(pairs)
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        self.model.eval()
        with torch.inference_mode():
            logits = self.logits(list(places)).double().cpu()
        rows = self._probs(logits)[[places[text] for text in texts]]
        return self.scheme.output(rows.reshape(-1, len(self.scheme)), self.score_fn)

    def texts(self, pairs: Pairs) -> list[tuple[str, str]]:
        """What the model reads of each pair."""
        rendered: dict[int, str] = {}  # by identity: a query set meets the same items over and over
        for _, item in pairs:
            if id(item) not in rendered:
                rendered[id(item)] = self.template.render(item)
        return [(query.text, rendered[id(item)]) for query, item in pairs]

    def logits(self, texts: Texts) -> Tensor:
        """The model's outputs for pairs of texts: float32 ``[N, C]`` or ``[N, 1]`` on its device, with gradient."""
        if not texts:
            return torch.zeros(0, self.model.num_labels, device=self.device)
        found, rows = [], []
        for part, features in self._batches(texts):
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in features.items()}
            found.append(self.model(moved)["scores"].reshape(len(part), -1))
            rows.append(part)
        return torch.cat(found)[torch.from_numpy(np.argsort(np.concatenate(rows))).to(self.device)]

    def _batches(self, texts: Texts) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Any]]]:
        """Rows and their features, in batches of pairs with nearly the same number of tokens."""
        tokens = CPU_BATCH_TOKENS * torch.get_num_threads() if self.device.type == "cpu" else None
        queries = list(dict.fromkeys(query for query, _ in texts))
        ids = self.model.tokenizer(queries, add_special_tokens=False, verbose=False)["input_ids"]
        room = {query: self.max_length - self._special - len(i) for query, i in zip(queries, ids, strict=True)}
        by_length = sorted(range(len(texts)), key=lambda row: -len(texts[row][0]) - len(texts[row][1]))
        groups = (
            ("only_second", [row for row in by_length if room[texts[row][0]] > 0]),
            ("only_first", [row for row in by_length if room[texts[row][0]] <= 0]),  # nothing of the item fits
        )
        for cut, group in groups:
            for start in range(0, len(group), _TOKENISED_PAIRS):
                rows = np.asarray(group[start : start + _TOKENISED_PAIRS], dtype=np.int64)
                pairs = [texts[row] if cut == "only_second" else (texts[row][0], "") for row in rows]
                options = {"text": {"truncation": cut, "max_length": self.max_length}}
                features = self.model.preprocess(pairs, processing_kwargs=options)
                for part, batch in token_batches(features, self.batch_size, tokens):
                    yield rows[part], batch

    def _probs(self, logits: Tensor) -> npt.NDArray[np.float64]:
        labels = len(self.scheme)
        if logits.shape[1] == labels:
            return np.asarray(logits.softmax(1).numpy())
        score = logits[:, 0].sigmoid().numpy()
        if labels == 2:
            return np.stack([1 - score, score], axis=1)
        return ordered_probs(score, [cut / labels for cut in range(1, labels)], SOFTNESS).astype(np.float64)

    def save(self, folder: str | Path) -> None:
        """Write the model and what belongs to it (scheme, template, ``max_length``, ``score_fn``), for the constructor to find;
        the folder appears complete or not at all.

        Raises FileExistsError where ``folder`` holds anything but a saved judge.
        """
        with replace_folder(Path(folder), TEMPLATE_FILE, KIND) as beside:
            self.model.save(str(beside), create_model_card=False)
            write_json(beside / TEMPLATE_FILE, {"kind": KIND, **self._settings()})

    def _settings(self) -> dict[str, Any]:
        return {
            "scheme": dataclasses.asdict(self.scheme),
            "item_template": dataclasses.asdict(self.template),
            "max_length": self.max_length,
            "score_fn": self.score_fn,
        }


def _load(name: str, device: str | None, labels: int | None = None) -> CrossEncoder:
    """With ``labels``, a head of another size gives way to a new one."""
    with loading(name, "cross-encoder of sentence-transformers"):
        options = {"ignore_mismatched_sizes": True} if labels else None
        model: CrossEncoder = CrossEncoder(name, device=device, num_labels=labels, model_kwargs=options)
    return model


def _check_head(model: CrossEncoder) -> None:
    """Raises ValueError where transformers has put a random head on an encoder, which it only logs."""
    names = getattr(model.config, "architectures", None) or []
    headless = len(list(model)) == 1 and names and not any("ForSequenceClassification" in name for name in names)
    if headless and model[0].transformer_task == "sequence-classification":
        raise ValueError(f"the model is a plain encoder ({names[0]}) without a head that gives labels; train one with "
                         "train_cross_encoder")  # fmt: skip


def _read_settings(folder: Path) -> dict[str, Any]:
    """What `CrossEncoderJudge.save` wrote beside a model, or the template that an `Encoder` did; empty where there is nothing."""
    file = folder / TEMPLATE_FILE
    saved = dict(read_json(file)) if file.exists() else {}
    for key, kind in (("scheme", LabelScheme), ("item_template", ItemTemplate)):
        if key in saved:
            saved[key] = from_dict(kind, saved[key])
    return saved


# ------------------------------------------------------------------------------------------------ distillation


@dataclass(frozen=True)
class DistillConfig:
    """Training of a cross-encoder; the defaults are our choice, for transformers of some ten million weights."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Pairs per step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    balanced: bool = False
    """Draw as many pairs of each label, by what the teacher holds most probable. It helps where one label is rare, but a student of
    hard grades then expects the rare ones too often."""
    save_steps: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Of every random choice, the new head included."""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "learning_rate", "save_steps")
        check_optimiser(self.warmup_ratio, self.max_grad_norm)


def train_cross_encoder(
    model: str | Path | CrossEncoder,
    pairs: Pairs,
    teacher: npt.ArrayLike,
    config: DistillConfig | None = None,
    *,
    run_dir: str | Path,
    name: str = "cross_encoder",
    scheme: LabelScheme = GRADES_4,
    template: ItemTemplate | None = None,
    max_length: int = MAX_LENGTH,
    device: str | None = None,
    trackers: Sequence[Backend] = ("console", "jsonl"),
) -> CrossEncoderJudge:
    """Distil a teacher's verdicts on ``N`` pairs into a cross-encoder: ``mean KL(teacher || student)`` over label probabilities.

    ``teacher`` are probabilities ``[N, C]`` (`JudgeOutput.probs`), or grades 0..3 of a catalog ``[N]``, each a sure verdict. Pairs on
    which the teacher abstains (a row with NaN, grade -1) are dropped with a warning that says how many. ``model`` is any encoder
    that sentence-transformers loads as a ``CrossEncoder``; a head of another size gives way to a new one of ``C`` outputs. A loaded
    ``CrossEncoder`` is trained in place. Checkpoints go to ``run_dir/checkpoints/name``: a call after a kill goes on from the last
    one and ends with the same weights. The judge that is returned is saved in ``run_dir/judges/name`` with scheme and template.

    Raises ValueError when pairs and verdicts do not fit or none is left, CheckpointError when ``run_dir`` holds another run, and
    FloatingPointError when the loss or its gradient stops being a number; that step is not taken.
    """
    config = config or DistillConfig()
    if device is not None:
        check_device(device)
    probs_NC = _targets(len(pairs), teacher, scheme)
    known = np.flatnonzero(~np.isnan(probs_NC[:, 0]))
    if len(known) < len(pairs):
        warnings.warn(
            f"the teacher abstains on {len(pairs) - len(known)} of {len(pairs)} pairs; they are dropped", stacklevel=2
        )
    if not len(known):
        raise ValueError("there is no pair with a verdict of the teacher to learn from")
    if isinstance(model, (str, Path)):
        template = template or _read_settings(Path(model)).get("item_template")
        torch.manual_seed(config.seed)  # of the new head
        model = _load(str(model), device, len(scheme))
    if model.num_labels != len(scheme):
        raise ValueError(
            f"the model has {model.num_labels} outputs; give one with {len(scheme)}, or the folder of any encoder"
        )
    settings: dict[str, Any] = {"scheme": scheme, "template": template, "max_length": max_length, "device": device}
    student = CrossEncoderJudge(model, **settings)
    texts, probs_NC = student.texts([pairs[row] for row in known.tolist()]), probs_NC[known]
    _train(student, texts, probs_NC, config, Path(run_dir), name, trackers)
    student.save(Path(run_dir) / "judges" / name)
    return CrossEncoderJudge(model, **settings)  # with the fingerprint of the weights as they are now


def _train(
    student: CrossEncoderJudge, texts: Texts, probs_NC: FloatArray, config: DistillConfig, run_dir: Path, name: str,
    trackers: Sequence[Backend],
) -> None:  # fmt: skip
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
    folder, record = run_dir / "checkpoints" / name, dataclasses.asdict(config)
    data = hashlib.sha256(json.dumps(list(texts)).encode() + probs_NC.tobytes()).hexdigest()
    identity = {"config": record, "start_model": student.fingerprint, "pairs": data}
    found = load_checkpoint(folder, encoder=student, optimizer=optimizer, identity=identity)
    start, chances = found.step if found else 0, _chances(probs_NC) if config.balanced else None
    student.model.train()
    with Tracker(
        trackers, run_dir, name, record, start_step=start, total_steps=config.steps, console_every=100
    ) as tracker:
        for step in range(start, config.steps):
            rng = np.random.default_rng([config.seed, step])
            torch.manual_seed(int(rng.integers(2**31)))  # dropout: of the step alone, for a resume
            count = min(config.batch_size, len(texts))
            rows = rng.choice(len(texts), count, replace=chances is not None, p=chances)
            rate = set_learning_rate(optimizer, config.learning_rate, config.warmup_ratio, step, config.steps)
            target_BC = torch.from_numpy(probs_NC[rows]).to(student.device)
            log_BC = student.logits([texts[row] for row in rows.tolist()]).log_softmax(1)
            loss = torch.nn.functional.kl_div(log_BC, target_BC, reduction="batchmean")
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            value = float(loss.detach())
            if not np.isfinite([value, float(norm)]).all():
                raise FloatingPointError(f"{name}: at step {step} the loss is {value} and the norm of its gradient "
                                         f"{float(norm)}; lower learning_rate")  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
            tracker.log(step, {"kl": value, "learning_rate": rate, "grad_norm": float(norm)})
            if (step + 1) % config.save_steps == 0 or step + 1 == config.steps:
                save_checkpoint(
                    folder, step=step + 1, encoder=student, optimizer=optimizer, identity=identity, extra={}
                )
    student.model.eval()


def _targets(count: int, teacher: npt.ArrayLike, scheme: LabelScheme) -> FloatArray:
    """Label probabilities ``[N, C]``, a row of NaN where the teacher abstains."""
    given = np.asarray(teacher, dtype=np.float64)
    if given.shape not in ((count,), (count, len(scheme))):
        raise ValueError(f"the teacher's verdicts have the shape {given.shape}; give [{count}, {len(scheme)}] probabilities or "
                         f"[{count}] grades")  # fmt: skip
    if given.ndim == 1:
        foreign = given[~np.isin(given, range(-1, MAX_GRADE + 1))]
        if len(foreign):
            raise ValueError(f"grade {foreign[0]:g}: use 0 to {MAX_GRADE}, or -1 where the teacher abstains")
        given = np.where(given[:, None] < 0, np.nan, np.eye(len(scheme))[scheme.labels(np.maximum(given, 0))])
    given = np.where(np.isnan(given).any(1, keepdims=True), np.nan, given)
    odd = np.flatnonzero((given < 0).any(1) | (np.abs(given.sum(1) - 1) > 1e-3))
    if len(odd):
        raise ValueError(
            f"row {odd[0]} of the teacher's verdicts is {given[odd[0]].tolist()}; give probabilities that sum to 1"
        )
    targets: FloatArray = (given / given.sum(1, keepdims=True)).astype(np.float32)
    return targets


def _chances(probs_NC: FloatArray) -> npt.NDArray[np.float64]:
    """The probability that each pair is drawn, the same in sum for each label that occurs."""
    labels, where, counts = np.unique(probs_NC.argmax(1), return_inverse=True, return_counts=True)
    return np.asarray(1.0 / (len(labels) * counts[where]))
