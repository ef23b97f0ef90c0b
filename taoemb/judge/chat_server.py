"""A chat model behind an OpenAI-compatible server (vLLM, llama.cpp, SGLang, the OpenAI API): many requests at a time, repeated where a
failure may pass."""

from __future__ import annotations

import math
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

try:
    import httpx
except ImportError as error:
    raise ImportError('a model behind a server needs httpx; install with: pip install "taoemb[judge]"') from error

LONGEST_WAIT = 300.0
"""Seconds; a server that asks for a longer pause is not waited for; our choice."""
_BACKOFF = 1.0  # seconds before the first retry, doubled for each further one, six times at most; our choice
_SHOWN = 300  # characters of a server's message in an error; our choice
_PASSING = {408, 429}  # and all of 500 and above
_CHECK = (
    "check the settings that the message names; where the text is too long for the model, lower the prompt's max_chars"
)
_KEY = "give a key that may use this model as api_key or in OPENAI_API_KEY"
_ADVICE = {400: _CHECK, 413: _CHECK, 422: _CHECK, 401: _KEY, 403: _KEY,
           404: "check model, and that url is the base of the API, which mostly ends with /v1"}  # fmt: skip
_jitter = random.Random()  # our own: the caller's random numbers stay as they are
Chat = list[dict[str, str]]
T = TypeVar("T")


class JudgeServerError(OSError):
    """A server cannot be reached, refuses, or answers what cannot be read. Its text never holds the key."""


class _PassingError(Exception):
    """A failure that may pass, and the seconds that the server asks to wait."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class ChatServer:
    """``POST {url}/chat/completions`` of one model; ``url`` is the base of the API, such as ``http://localhost:8000/v1``.

    ``api_key`` is OPENAI_API_KEY of the environment unless given. At most ``concurrency`` requests are under way in all threads together.
    Each waits ``timeout`` seconds for data and is repeated up to ``retries`` times with pauses that double up to a minute, or those of the
    server's Retry-After (6 retries outlast about 45 seconds; give more where the server takes longer to restart).

    Raises ValueError on options that make no sense.
    """

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, concurrency: int = 16, timeout: float = 60.0, retries: int = 6
    ) -> None:  # fmt: skip
        self.url, self._key = _checked_url(url), _checked_key(api_key)
        self.model, self.concurrency, self.timeout, self.retries = model, concurrency, timeout, retries
        if not model:
            raise ValueError("model='': give the name under which the server knows the model (GET /models lists them)")
        if concurrency < 1 or retries < 0 or not 0 < timeout < math.inf:
            raise ValueError(f"concurrency={concurrency}, retries={retries}, timeout={timeout}: give 1 or more requests, "
                             "0 or more retries and a number of seconds above 0")  # fmt: skip
        self._slots = threading.BoundedSemaphore(concurrency)
        self._tls = httpx.create_ssl_context()  # slow to make, so once
        self._length_field = "max_tokens"
        self._model_checked = False

    def answers(
        self, chats: Sequence[Chat], body: Mapping[str, Any], read: Callable[[Any], T], failed: str
    ) -> Generator[tuple[int, T]]:
        """``(row, read(JSON of the answer))`` for each chat, as they come. ``body`` is what a request holds besides model and messages; its
        ``max_tokens`` takes the newer name where the server wants that, and a field that is None is left out.

        Raises `JudgeServerError` when a request is refused, fails for good, or ``read`` raises ValueError (``failed`` says what
        to check then).
        """
        if not chats:
            return
        stop = threading.Event()
        limits = httpx.Limits(max_connections=self.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # In threads: a caller may be inside an event loop. A client a call: no connection is left open that the server would close.
        with (
            httpx.Client(headers=headers, timeout=self.timeout, limits=limits, verify=self._tls) as client,
            ThreadPoolExecutor(min(self.concurrency, len(chats)), thread_name_prefix=self.model) as pool,
        ):
            self._check_model(client)
            rows = {
                pool.submit(self._ask, client, {"messages": chat, **body}, read, failed, stop): row
                for row, chat in enumerate(chats)
            }
            try:
                for future in as_completed(rows):
                    yield rows[future], future.result()
            finally:  # one failed, or Ctrl-C: the others need not go on
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(
        self, client: httpx.Client, body: dict[str, Any], read: Callable[[Any], T], failed: str, stop: threading.Event
    ) -> T:
        wait, last = 0.0, "stopped"
        with self._slots:
            for attempt in range(self.retries + 1):
                if stop.wait(wait):
                    break
                try:
                    answer = self._post(client, body)
                except _PassingError as error:
                    wait, last = (
                        max(error.wait, _BACKOFF * 2 ** min(attempt, 6) * _jitter.uniform(0.5, 1.0)),
                        str(error),
                    )
                    if error.wait > LONGEST_WAIT:
                        raise self._error(f"{last}, and asks to wait {error.wait:.0f} seconds; go on then") from None
                    continue
                try:
                    return read(answer)
                except ValueError as error:
                    raise self._error(f"{error}: {self.clean(_said(answer))}; {failed}") from None
        raise self._error(f"{last} ({self.retries + 1} tries); check that the server is up and not overloaded "
                          "(give a lower concurrency or more timeout), or raise retries")  # fmt: skip

    def _post(self, client: httpx.Client, body: dict[str, Any]) -> Any:
        """The JSON of the server's answer."""
        length_field = self._length_field
        sent = {"model": self.model} | {
            length_field if name == "max_tokens" else name: value for name, value in body.items() if value is not None
        }
        try:
            response = client.post(f"{self.url}/chat/completions", json=sent)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _PassingError(f"{type(error).__name__} {self.clean(str(error))}".strip()) from None
        status = response.status_code
        if status == 200:
            try:
                return response.json()
            except ValueError:  # a server or proxy that is going down cuts its answer off
                raise _PassingError(f"status 200, but no JSON: {self.clean(response.text)}") from None
        said = self.clean(_message(response))
        if status in _PASSING or status >= 500:
            raise _PassingError(f"status {status} {said}", _retry_after(response.headers.get("Retry-After")))
        if status == 400 and length_field == "max_tokens" and "max_completion_tokens" in said:
            self._length_field = "max_completion_tokens"  # newer OpenAI models; older servers know only the other
            return self._post(client, body)
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
            shown = self.clean(", ".join(listed))
            warnings.warn(f"{self.url} lists the models {shown}, but not model={self.model!r}; check which one answers", stacklevel=4)  # fmt: skip

    def _error(self, what: str) -> JudgeServerError:
        return JudgeServerError(f"POST {self.url}/chat/completions, model {self.model!r}: {what}")

    def clean(self, text: str) -> str:
        """What a server said, on one line, without the key (some echo it), and cut only then."""
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


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
