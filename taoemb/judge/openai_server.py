"""A language model behind an OpenAI-compatible server (vLLM, llama.cpp, SGLang, the OpenAI API) as a relevance judge.

One short request a pair: the verdict is the distribution of the first token that the model would write, read off the server's
``top_logprobs``; nothing that it writes is parsed.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Query
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.schemes import ScoreFn
from taoemb.judge.verdicts import fingerprint
from taoemb.types import JudgeOutput

try:
    import httpx
except ImportError as error:
    raise ImportError('OpenAIJudge needs httpx; install with: pip install "taoemb[judge]"') from error

MAX_UNKNOWN = 0.1
"""Largest share of the labels' probability that may be unknown, and so the most that a score can be off by it; our choice."""
LONGEST_WAIT = 300.0
"""Seconds; a server that asks for a longer pause is not waited for; our choice."""
_BACKOFF = 1.0  # seconds before the first retry, doubled for each further one, six times at most; our choice
_SLACK = 0.01  # by which probabilities may exceed 1: half-precision servers round that much; our choice
_SHOWN = 300  # characters of a server's message in an error; our choice
_READING = 1  # part of the fingerprint: count up when `_verdict` reads an answer differently
_PASSING = {408, 429}  # and all of 500 and above
_OURS = {"model", "messages", "logprobs", "top_logprobs", "stream", "n"}
_CHECK = "check extra_body and top_logprobs; where the text is too long for the model, lower the prompt's max_chars"
_KEY = "give a key that may use this model as api_key or in OPENAI_API_KEY"
_ADVICE = {400: _CHECK, 413: _CHECK, 422: _CHECK, 401: _KEY, 403: _KEY,
           404: "check model, and that url is the base of the API, which mostly ends with /v1"}  # fmt: skip
_jitter = random.Random()  # our own: the caller's random numbers stay as they are


class JudgeServerError(OSError):
    """A judge's server cannot be reached, refuses, or answers what is no verdict. Its text never holds the key."""


class _PassingError(Exception):
    """A failure that may pass, and the seconds that the server asks to wait."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


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

    ``revision`` names what the model name does not tell (weights, quantisation, server); change it when they change. ``api_key`` is
    OPENAI_API_KEY of the environment unless given. At most ``concurrency`` requests are under way in all threads together. Each
    waits ``timeout`` seconds for data and is repeated up to ``retries`` times with pauses that double up to a minute, or those of the server's
    Retry-After (the default outlasts about 45 seconds; give more where the server takes longer to restart).

    Raises ValueError on options that make no sense; for `score` see there.
    """

    def __init__(
        self, url: str, model: str, *, prompt: JudgePrompt | None = None, score_fn: ScoreFn = "expected",
        api_key: str | None = None, concurrency: int = 16, timeout: float = 60.0, retries: int = 6, top_logprobs: int = 20,
        extra_body: Mapping[str, Any] | None = None, revision: str = "", name: str = "openai_server",
    ) -> None:  # fmt: skip
        self.prompt = prompt or JudgePrompt()
        self.scheme = self.prompt.scheme
        self.url, self._key = _checked_url(url), _checked_key(api_key)
        self.name, self.model, self.revision, self.score_fn = name, model, revision, score_fn
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.top_logprobs = top_logprobs
        self.extra_body: dict[str, Any] = json.loads(json.dumps(dict(extra_body or {})))  # a copy, and JSON for sure
        self._answers = _checked_answers(self.scheme.answers)
        if not model:
            raise ValueError("model='': give the name under which the server knows the model (GET /models lists them)")
        if score_fn not in get_args(ScoreFn):
            raise ValueError(f"score_fn={score_fn!r}: give one of {', '.join(get_args(ScoreFn))}")
        if concurrency < 1 or retries < 0 or not 0 < timeout < math.inf:
            raise ValueError(f"concurrency={concurrency}, retries={retries}, timeout={timeout}: give 1 or more requests, "
                             "0 or more retries and a number of seconds above 0")  # fmt: skip
        if top_logprobs < len(self.scheme):
            raise ValueError(f"top_logprobs={top_logprobs}: give {len(self.scheme)} or more, one for each label")
        if clash := _OURS & set(self.extra_body):
            raise ValueError(f"extra_body sets {', '.join(sorted(clash))}, which the judge sets; leave that out")
        self._slots = threading.BoundedSemaphore(concurrency)
        self._tls = httpx.create_ssl_context()  # slow to make, so once
        self._length_field = "max_tokens"
        self._model_checked = self._abstention_told = False

    def __repr__(self) -> str:
        return f"OpenAIJudge({self.url!r}, {self.model!r})"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the model's name, the revision, the prompt, the scheme and how probabilities are read; not with the server."""
        item = Item("i", "t", description="d", category="c", brand="b", attributes={"a": "v"}, price=1.0)
        wording = self.prompt.messages(Query("q", "q"), item)  # a changed template asks another question
        extra = json.dumps(self.extra_body, sort_keys=True)
        asked = (self.model, self.revision, self.prompt, wording, self.top_logprobs, extra)
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
        verdicts = self._ask_all([json.loads(messages) for messages in rows])
        for same, verdict in zip(rows.values(), verdicts, strict=True):
            probs[same], mass[same] = verdict.probs, verdict.mass
        self._tell_abstentions(verdicts)
        return self.scheme.output(probs, self.score_fn, mass)

    def _ask_all(self, chats: list[list[dict[str, str]]]) -> list[_Verdict]:
        """Verdicts in the order of ``chats``. In threads: a caller may be inside an event loop."""
        if not chats:
            return []
        stop = threading.Event()
        limits = httpx.Limits(max_connections=self.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A client a call: no connection is left open that the server would close in the meantime.
        with (
            httpx.Client(headers=headers, timeout=self.timeout, limits=limits, verify=self._tls) as client,
            ThreadPoolExecutor(min(self.concurrency, len(chats)), thread_name_prefix=self.name) as pool,
        ):
            self._check_model(client)
            futures = [pool.submit(self._ask, client, chat, stop) for chat in chats]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:  # one failed, or Ctrl-C: the others need not go on
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]

    def _ask(self, client: httpx.Client, chat: list[dict[str, str]], stop: threading.Event) -> _Verdict:
        wait, last = 0.0, "stopped"
        with self._slots:
            for attempt in range(self.retries + 1):
                if stop.wait(wait):
                    break
                try:
                    body = self._post(client, chat)
                except _PassingError as error:
                    wait, last = (
                        max(error.wait, _BACKOFF * 2 ** min(attempt, 6) * _jitter.uniform(0.5, 1.0)),
                        str(error),
                    )
                    if error.wait > LONGEST_WAIT:
                        raise self._error(f"{last}, and asks to wait {error.wait:.0f} seconds; go on then") from None
                    continue
                try:
                    return _verdict(body, self._answers, "logprob_token_ids" not in self.extra_body)
                except ValueError as error:
                    said = f"{error}: {self._clean(_said(body))}"
                    raise self._error(f"{said}; check that the server gives logprobs for this model") from None
        raise self._error(f"{last} ({self.retries + 1} tries); check that the server is up and not overloaded "
                          "(give a lower concurrency or more timeout), or raise retries")  # fmt: skip

    def _post(self, client: httpx.Client, chat: list[dict[str, str]]) -> Any:
        """The JSON of the server's answer."""
        length_field = self._length_field
        body = {"model": self.model, "messages": chat, length_field: 1, "temperature": 0.0,
                "logprobs": True, "top_logprobs": self.top_logprobs, **self.extra_body}  # fmt: skip
        try:
            sent = {name: value for name, value in body.items() if value is not None}
            response = client.post(f"{self.url}/chat/completions", json=sent)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _PassingError(f"{type(error).__name__} {self._clean(str(error))}".strip()) from None
        status = response.status_code
        if status == 200:
            try:
                return response.json()
            except ValueError:  # a server or proxy that is going down cuts its answer off
                raise _PassingError(f"status 200, but no JSON: {self._clean(response.text)}") from None
        said = self._clean(_message(response))
        if status in _PASSING or status >= 500:
            raise _PassingError(f"status {status} {said}", _retry_after(response.headers.get("Retry-After")))
        if status == 400 and length_field == "max_tokens" and "max_completion_tokens" in said:
            self._length_field = "max_completion_tokens"  # newer OpenAI models; older servers know only the other
            return self._post(client, chat)
        raise self._error(f"status {status} {said}; {_ADVICE.get(status, 'check url')}")

    def _check_model(self, client: httpx.Client) -> None:
        """Some servers (llama.cpp) answer under any model name; the fingerprint would then name a model that was not asked."""
        if self._model_checked:
            return
        try:
            listed = [str(model["id"]) for model in client.get(f"{self.url}/models").json()["data"]]
        except (httpx.TransportError, httpx.DecodingError, ValueError, LookupError, TypeError):
            return  # a server need not have it, and one that is down is told of by the requests that matter
        self._model_checked = True
        if listed and self.model not in listed:  # no error: gateways also take names that they do not list
            shown = self._clean(", ".join(listed))
            warnings.warn(f"{self.url} lists the models {shown}, but not model={self.model!r}; check which one answers", stacklevel=4)  # fmt: skip

    def _tell_abstentions(self, verdicts: list[_Verdict]) -> None:
        silent = [verdict.written for verdict in verdicts if np.isnan(verdict.probs).any()]
        if self._abstention_told or not silent or 2 * len(silent) < len(verdicts):
            return
        self._abstention_told = True
        began = ", ".join(repr(token) for token, _ in Counter(silent).most_common(3))
        warnings.warn(f"{self.model} gave no verdict on {len(silent)} of {len(verdicts)} pairs: it began with {self._clean(began)}, but the answers "
                      f"are {', '.join(self._answers)}; each must be one token, written at once (see OpenAIJudge)", stacklevel=3)  # fmt: skip

    def _error(self, what: str) -> JudgeServerError:
        return JudgeServerError(f"POST {self.url}/chat/completions, model {self.model!r}: {what}")

    def _clean(self, text: str) -> str:
        """What a server said, on one line, without the key (some echo it), and cut only then."""
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


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


def _message(response: httpx.Response) -> str:
    try:
        return _said(response.json())
    except ValueError:
        return response.text


def _said(body: Any) -> str:
    """The message in a server's answer, the answer itself where there is none."""
    for field in ("error", "message"):
        body = body.get(field, body) if isinstance(body, dict) else body
    return str(body)


def _retry_after(header: str | None) -> float:
    """Seconds that a server asks to wait, given as a number or a date; 0 where it says neither."""
    if not header:
        return 0.0
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", header.strip()):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _checked_url(url: str) -> str:
    if set("@?#") & set(url):  # not shown: it may hold a secret
        raise ValueError("url holds one of @, ? and #; give scheme://host:port/path, and the key as api_key")
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"url={url!r}: give the base of an API, such as http://localhost:8000/v1")
    return url.rstrip("/")


def _checked_key(key: str | None) -> str:
    key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()  # files end with a line end
    if not re.fullmatch(r"[!-~]*", key) or set("\"'\\") & set(
        key
    ):  # those would also be hard to find in a server's message
        raise ValueError(
            "api_key (or OPENAI_API_KEY) holds white space, quotes or signs that are not ASCII; give it as issued"
        )
    return key


def _checked_answers(answers: Sequence[str]) -> tuple[str, ...]:
    plain = tuple(answer.strip() for answer in answers)
    for answer in plain:
        longer = [other for other in plain if other != answer and other.startswith(answer)]
        if longer:
            raise ValueError(f"the answer {answer!r} begins the answer {longer[0]!r}, so that the first token cannot tell them apart; "
                             "give other answers with scheme.answering(...)")  # fmt: skip
    return plain
