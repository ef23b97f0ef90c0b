"""A language model behind an OpenAI-compatible server (vLLM, llama.cpp, SGLang, the OpenAI API) as a relevance judge.

One short request a pair: the verdict is the distribution of the first token that the model would write, read off the server's
``top_logprobs``; nothing that it writes is parsed.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Query
from taoemb.judge.chat_server import ChatServer
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.schemes import ScoreFn
from taoemb.judge.verdicts import fingerprint
from taoemb.types import JudgeOutput

MAX_UNKNOWN = 0.1
"""Largest share of the labels' probability that may be unknown, and so the most that a score can be off by it; our choice."""
_SLACK = 0.01  # by which probabilities may exceed 1: half-precision servers round that much; our choice
_READING = 1  # part of the fingerprint: count up when `_verdict` reads an answer differently
_OURS = {"model", "messages", "logprobs", "top_logprobs", "stream", "n"}


class _Verdict(NamedTuple):
    probs: npt.NDArray[np.float64]  # [C], sums to mass; NaN abstains
    mass: float
    written: str  # the token that the model wrote


class OpenAIJudge:
    """A model behind ``POST {url}/chat/completions``; ``url`` is the base of the API, such as ``http://localhost:8000/v1``.

    The probability of a label is that of the tokens which are its answer but for white space in front (``"4"`` and ``" 4"``), out
    of the ``top_logprobs`` most likely first tokens (most servers allow 20), scaled so that the labels sum to 1; ``label_mass`` is
    their sum before. A label that is not listed gets 0, the lower bound: it is at most as likely as the last token listed. Where
    such labels, and tokens that are a part of an answer, could hold more than `MAX_UNKNOWN` of the labels' probability, or no label
    is listed, the judge abstains.

    So an answer must be one token of the model, and no answer may begin another (use ``scheme.answering("A", "B", ...)``), and the
    model must answer at once: for one that thinks first, vLLM and SGLang take
    ``extra_body={"chat_template_kwargs": {"enable_thinking": False}}``. ``extra_body`` is merged into each request; None leaves a
    field out. vLLM's ``logprob_token_ids`` lists the label tokens whatever their rank; give the ids of all labels.

    ``revision`` names what the model name does not tell (weights, quantisation, server); change it when they change. ``api_key``,
    ``concurrency``, ``timeout`` and ``retries`` are those of `ChatServer`.

    Raises ValueError on options that make no sense; for `score` see there.
    """

    def __init__(
        self, url: str, model: str, *, prompt: JudgePrompt | None = None, score_fn: ScoreFn = "expected",
        api_key: str | None = None, concurrency: int = 16, timeout: float = 60.0, retries: int = 6, top_logprobs: int = 20,
        extra_body: Mapping[str, Any] | None = None, revision: str = "", name: str = "openai_server",
    ) -> None:  # fmt: skip
        self.prompt = prompt or JudgePrompt()
        self.scheme = self.prompt.scheme
        self.server = ChatServer(url, model, api_key=api_key, concurrency=concurrency, timeout=timeout, retries=retries)
        self.name, self.revision, self.score_fn, self.top_logprobs = name, revision, score_fn, top_logprobs
        self.extra_body: dict[str, Any] = json.loads(json.dumps(dict(extra_body or {})))  # a copy, and JSON for sure
        self._answers = _checked_answers(self.scheme.answers)
        if score_fn not in get_args(ScoreFn):
            raise ValueError(f"score_fn={score_fn!r}: give one of {', '.join(get_args(ScoreFn))}")
        if top_logprobs < len(self.scheme):
            raise ValueError(f"top_logprobs={top_logprobs}: give {len(self.scheme)} or more, one for each label")
        if clash := _OURS & set(self.extra_body):
            raise ValueError(f"extra_body sets {', '.join(sorted(clash))}, which the judge sets; leave that out")
        self._abstention_told = False

    def __repr__(self) -> str:
        return f"OpenAIJudge({self.server.url!r}, {self.server.model!r})"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the model's name, the revision, the prompt, the scheme and how probabilities are read; not with the server."""
        item = Item("i", "t", description="d", category="c", brand="b", attributes={"a": "v"}, price=1.0)
        wording = self.prompt.messages(Query("q", "q"), item)  # a changed template asks another question
        extra = json.dumps(self.extra_body, sort_keys=True)
        asked = (self.server.model, self.revision, self.prompt, wording, self.top_logprobs, extra)
        return fingerprint("openai_server", *asked, self.score_fn, MAX_UNKNOWN, _READING)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs; pairs that read the same are asked once.

        Raises `JudgeServerError` when a request is refused, fails for good, or gets an answer that is no verdict. The call's other
        verdicts are lost then: give large sets in chunks, and keep what is done (a cache around the judge does both).
        """
        order: dict[str, int] = {}
        for query, _ in pairs:
            order.setdefault(query.text, len(order))
        # Pairs of a query together: servers keep what they computed for a common beginning of the prompt (prefix caching).
        together = sorted(range(len(pairs)), key=lambda row: order[pairs[row][0].text])
        rows: dict[str, list[int]] = {}
        for row in together:
            rows.setdefault(json.dumps(self.prompt.messages(*pairs[row])), []).append(row)
        probs = np.full((len(pairs), len(self.scheme)), np.nan)
        mass = np.zeros(len(pairs), dtype=np.float32)
        body = {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": self.top_logprobs,
            **self.extra_body,
        }
        most_likely = "logprob_token_ids" not in self.extra_body
        found = dict(
            self.server.answers(
                [json.loads(messages) for messages in rows],
                body,
                lambda answer: _verdict(answer, self._answers, most_likely),
                "check that the server gives logprobs for this model",
            )
        )
        verdicts = [found[n] for n in range(len(rows))]
        for same, verdict in zip(rows.values(), verdicts, strict=True):
            probs[same], mass[same] = verdict.probs, verdict.mass
        self._tell_abstentions(verdicts)
        return self.scheme.output(probs, self.score_fn, mass)

    def _tell_abstentions(self, verdicts: list[_Verdict]) -> None:
        silent = [verdict.written for verdict in verdicts if np.isnan(verdict.probs).any()]
        if self._abstention_told or not silent or 2 * len(silent) < len(verdicts):
            return
        self._abstention_told = True
        began = ", ".join(repr(token) for token, _ in Counter(silent).most_common(3))
        warnings.warn(f"{self.server.model} gave no verdict on {len(silent)} of {len(verdicts)} pairs: it began with {self.server.clean(began)}, but the answers "
                      f"are {', '.join(self._answers)}; each must be one token, written at once (see OpenAIJudge)", stacklevel=3)  # fmt: skip


def _verdict(body: Any, answers: Sequence[str], most_likely: bool) -> _Verdict:
    """Read the labels' probabilities off a server's answer; raises ValueError where it is none.

    ``most_likely`` says that the tokens listed are the most likely ones, which bounds what is not listed.
    """
    listed, written = _listed_tokens(body)
    probs, found, partial = np.zeros(len(answers)), set(), 0.0
    for token, p in listed:
        word = token.lstrip()
        if word in answers:
            probs[answers.index(word)] += p
            found.add(word)
        elif word and any(answer.startswith(word) for answer in answers):
            partial += p  # how it goes on is unknown, even where it begins one answer only
    rest = max(0.0, 1.0 - sum(p for _, p in listed))
    # The token written is listed even where it is not among the most likely (a grammar forced it), so it bounds nothing.
    least = min((p for token, p in listed if token != written), default=1.0) if most_likely else 1.0
    unknown = partial + min((len(answers) - len(found)) * least, rest)
    mass = min(float(probs.sum()), 1.0)
    if mass == 0.0 or unknown > MAX_UNKNOWN * (mass + unknown):
        probs[:] = np.nan
    return _Verdict(probs, mass, written)


def _listed_tokens(body: Any) -> tuple[list[tuple[str, float]], str]:
    """The tokens that could have come first, with their probabilities, and the one that did."""
    try:
        (choice,) = body["choices"]
        first = choice["logprobs"]["content"][0]
        written = first["token"]
        found = [(row["token"], row["logprob"]) for row in first["top_logprobs"]]
    except (LookupError, TypeError, ValueError):
        raise ValueError("an answer without choices[0].logprobs.content[0].top_logprobs") from None
    for token, logprob in found:
        # "not <=" also catches NaN
        if not isinstance(token, str) or type(logprob) not in (int, float) or not logprob <= _SLACK:
            raise ValueError("an answer with a logprob that is no number of at most 0, or a token that is no text")
    listed = [(token, math.exp(max(logprob, -1e4))) for token, logprob in dict.fromkeys(found)]  # some list one twice
    total = sum(p for _, p in listed)
    if not listed or not isinstance(written, str) or total > 1.0 + _SLACK:
        raise ValueError(f"an answer with {len(listed)} tokens in top_logprobs, of probability {total:.3f} together")
    return listed, written


def _checked_answers(answers: Sequence[str]) -> tuple[str, ...]:
    plain = tuple(answer.strip() for answer in answers)
    for answer in plain:
        longer = [other for other in plain if other != answer and other.startswith(answer)]
        if longer:
            raise ValueError(f"the answer {answer!r} begins the answer {longer[0]!r}, so that the first token cannot tell them apart; "
                             "give other answers with scheme.answering(...)")  # fmt: skip
    return plain
