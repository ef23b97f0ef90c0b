"""Channels: other recall sources whose Top-N per query the encoder is compared with, such as an inverted index.

The exclusivity reward and the overlap metrics ask a channel what it would show anyway. ``BM25Channel`` is the lexical
one, on the bm25s library; ``IndexChannel`` searches another index with another, frozen encoder; ``RunChannel``
(``taoemb.index.runs``) reads what any other system found from a file; anything with ``name`` and ``top`` is a ``Channel``.
Shapes: ``B`` queries, ``K`` candidates, ``N`` items.
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from taoemb.files import recover_folder, replace_folder
from taoemb.index.results import check_fingerprint

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float32]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Stem: TypeAlias = Callable[[list[str]], list[str]]

_WORD = re.compile(r"\w+")  # single characters stay: "usb c", "5 m" (bm25s itself would drop them)
_SETTINGS = "channel.json"
_FORMAT = 1
_CACHED_POSITIONS = 16_000_000  # 64 MB of remembered Top-n lists


@runtime_checkable
class Channel(Protocol):
    """A recall source that can say what it shows for a query."""

    @property
    def name(self) -> str:
        """Short name for logs and metric columns."""

    def top(self, queries: Sequence[str], n: int) -> list[list[str]]:
        """Item ids of the Top-n of each query text, best first; at most ``n`` of them, possibly none."""


class SearchIndex(Protocol):
    """What an `IndexChannel` needs of an index; every index of ``taoemb.index`` has it."""

    def search(self, vectors: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.object_], FloatArray]:
        """ids ``[B, k]`` and scores ``[B, k]`` of ``B`` query vectors ``[B, D]``, best first; padded with ("", -inf)."""


class RankedChannel(ABC):
    """What every channel here shares: ranks and membership, over Top-n lists that are remembered by query text.

    What a channel has found for a query stays while it is remembered, also where the source behind it changes; only a longer
    Top-n is asked for again. About 16 million items are remembered, the oldest queries make room: to freeze more, `write_run`.
    """

    def __init__(self, name: str, ids: Sequence[str] = ()) -> None:
        self._name = name
        self._ids = list(ids)
        self._positions = {item: position for position, item in enumerate(self._ids)}
        self._ranked: dict[str, tuple[int, Int32Array]] = {}  # query text -> n, positions in _ids of its Top-n
        self._ranked_size = 0

    @abstractmethod
    def _find(self, queries: list[str], n: int) -> list[Int32Array]:
        """Positions in ``_ids`` of the Top-n of each query, best first; asked once for each text and n."""

    @property
    def name(self) -> str:
        """Name of the channel."""
        return self._name

    def top(self, queries: Sequence[str], n: int) -> list[list[str]]:
        """Item ids of the Top-n of each query text, best first; at most ``n`` of them, possibly none.

        A query text seen before costs nothing. Raises ``ValueError`` when n < 1.
        """
        check_queries(queries)
        _check_size("n", n)
        return [list(map(self._ids.__getitem__, ranked.tolist())) for ranked in self._top_n(queries, n)]

    def ranks(self, queries: Sequence[str], ids_BK: npt.NDArray[np.object_], n: int) -> Int32Array:
        """Rank (from 1) of each item in the Top-n of its query, ``[B, K]`` int32; 0 where it is not in it.

        An id that the channel does not know, padding included, is in no Top-n. A query text seen before costs nothing.
        Raises ``ValueError`` when n < 1 or ``ids_BK`` has not one row per query.

        >>> channel = BM25Channel.build(["a", "b"], ["Red running shoes", "Red shirt"])
        >>> channel.ranks(["red shirt"], np.array([["a", "b", ""]], dtype=object), n=10).tolist()
        [[2, 1, 0]]
        """
        check_queries(queries)
        _check_size("n", n)
        _check_rows(queries, ids_BK)
        row_of = {query: row for row, query in enumerate(dict.fromkeys(queries))}
        tops = self._top_n(list(row_of), n)
        stride = len(self._ids) + 1  # leaves a key free between two queries, which an unknown id gets
        keys = np.concatenate(
            [row * stride + top.astype(np.int64) for row, top in enumerate(tops)] or [np.zeros(0, np.int64)]
        )
        if not len(keys):
            return np.zeros(ids_BK.shape, dtype=np.int32)
        places = np.concatenate([np.arange(1, len(top) + 1, dtype=np.int32) for top in tops])
        order = np.argsort(keys)
        keys, places = keys[order], places[order]
        positions = np.array([self._positions.get(item, -1) for item in ids_BK.ravel().tolist()], dtype=np.int64)
        rows = np.array([row_of[query] for query in queries], dtype=np.int64)
        wanted_BK = rows[:, None] * stride + positions.reshape(ids_BK.shape)
        found = np.minimum(np.searchsorted(keys, wanted_BK), len(keys) - 1)
        return np.where(keys[found] == wanted_BK, places[found], 0).astype(np.int32)

    def membership(self, queries: Sequence[str], ids_BK: npt.NDArray[np.object_], n: int) -> BoolArray:
        """Whether each item is in the Top-n of its query, ``[B, K]`` bool; see ``ranks``."""
        return self.ranks(queries, ids_BK, n) > 0

    def _number(self, ids: Sequence[str]) -> Int32Array:
        """Positions of item ids in ``_ids``, where new ones are added at the end."""
        for item in ids:
            if item not in self._positions:
                self._positions[item] = len(self._ids)
                self._ids.append(item)
        return np.array([self._positions[item] for item in ids], dtype=np.int32)

    def _top_n(self, queries: Sequence[str], n: int) -> list[Int32Array]:
        """Positions of each query's Top-n, best first, remembered by query text."""
        found: dict[str, Int32Array] = {}
        absent: dict[str, None] = {}
        for query in queries:
            known_n, ranked = self._ranked.get(query, (0, None))
            if ranked is None or known_n < n:
                absent[query] = None
            else:
                found[query] = ranked[:n]
        if absent:
            for query, ranked in zip(absent, self._find(list(absent), n), strict=True):
                found[query] = ranked
                self._remember(query, n, ranked)
        return [found[query] for query in queries]

    def _remember(self, query: str, n: int, ranked: Int32Array) -> None:
        _, shorter = self._ranked.pop(query, (0, None))
        self._ranked_size += 1 + len(ranked) - (0 if shorter is None else 1 + len(shorter))
        self._ranked[query] = (n, ranked)
        while self._ranked_size > _CACHED_POSITIONS and len(self._ranked) > 1:
            _, oldest = self._ranked.pop(next(iter(self._ranked)))
            self._ranked_size -= 1 + len(oldest)


class _AnyChannel(RankedChannel):
    """Ranks for a channel that has none of its own."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel.name)
        self._channel = channel

    def _find(self, queries: list[str], n: int) -> list[Int32Array]:
        tops = self._channel.top(queries, n)
        if len(tops) != len(queries):
            raise ValueError(
                f"channel {self.name!r} gave {len(tops)} lists for {len(queries)} queries; give one for each"
            )
        for query, top in zip(queries, tops, strict=True):
            if len(top) > n or len(set(top)) < len(top) or "" in top:
                raise ValueError(f"channel {self.name!r} gave {list(top)[: n + 1]} as the Top-{n} of {query!r}; "
                                 f"give at most {n} item ids, each once and none empty")  # fmt: skip
        return [self._number(top) for top in tops]


def ranked_channels(channels: Channel | Sequence[Channel]) -> dict[str, RankedChannel]:
    """Channels by name, each with ranks and membership: one that has only ``top`` is wrapped.

    Raises ``TypeError`` for something that is no channel, ``ValueError`` for none at all or two of the same name.
    """
    found: dict[str, RankedChannel] = {}
    for channel in [channels] if isinstance(channels, Channel) else channels:
        if not isinstance(channel, Channel):
            raise TypeError(f"{channel!r} is no channel; a channel has a name and top(queries, n)")
        if channel.name in found:
            raise ValueError(f"two channels are called {channel.name!r}; give each its own name (a run file is called "
                             "as its file is, without the ending)")  # fmt: skip
        found[channel.name] = channel if isinstance(channel, RankedChannel) else _AnyChannel(channel)
    if not found:
        raise ValueError("no channel was given; give at least one")
    return found


class BM25Channel(RankedChannel):
    """Lexical search over item texts; make one with ``BM25Channel.build`` or ``BM25Channel.load``.

    The score of an item d is summed over the query's terms t, a repeated term counting again (bm25s' default variant
    "lucene"; Kamphuis et al., ECIR 2020)::

        ln(1 + (N - df_t + 0.5) / (df_t + 0.5)) * tf_td / (tf_td + k1 * (1 - b + b * length_d / mean length))

    Terms are the lower-cased words of a text without bm25s' English stop words, stemmed (Snowball English) where
    PyStemmer is installed. An item that shares no term with the query is no result, so a query of stop words, of
    unknown words or of nothing has none. Equal scores are ordered by position in the catalog: results are
    deterministic, and a Top-n is a prefix of every longer one.
    """

    def __init__(self, name: str, ids: Sequence[str], *, stem: Stem | None = None, retriever: Any = None) -> None:
        super().__init__(name, ids)
        self._stem = stem
        self._retriever = retriever  # a bm25s.BM25; None where no item has any term
        self._vocabulary: dict[str, int] = {} if retriever is None else retriever.vocab_dict

    @classmethod
    def build(
        cls, ids: Sequence[str], texts: Sequence[str], *, name: str = "bm25", k1: float = 1.5, b: float = 0.75
    ) -> BM25Channel:
        """Index the texts of ``N`` items.

        Args:
            ids: item ids, unique and not empty, in catalog order.
            texts: the text of each item, usually ``ItemTemplate.texts(items)``.
            name: name of the channel.
            k1: 0 or more, how slowly a repeated term saturates; 1.5 is bm25s' default.
            b: 0 to 1, how much a long text is held back; 0.75 is bm25s' default.

        Raises:
            ValueError: ids and texts differ in number, an id is empty or comes twice, k1 or b is out of range.

        >>> channel = BM25Channel.build(["a", "b"], ["Red running shoes", "Blue shirt"])
        >>> channel.top(["a red shoe", "green"], n=5)
        [['a'], []]
        """
        if len(ids) != len(texts):
            raise ValueError(f"got {len(ids)} ids and {len(texts)} texts; give one text per item")
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"k1 must be 0 or more and b from 0 to 1, got k1={k1} and b={b}")
        _check_ids(ids)
        stem = _stemmer()
        vocabulary: dict[str, int] = {}
        token_ids = [[vocabulary.setdefault(term, len(vocabulary)) for term in _terms(text, stem)] for text in texts]
        if not vocabulary:  # bm25s cannot index nothing
            return cls(name, ids, stem=stem)
        retriever = _bm25s().BM25(k1=k1, b=b)
        retriever.index((token_ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(name, ids, stem=stem, retriever=retriever)

    def __len__(self) -> int:
        """Number of items ``N``."""
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the scores that it holds, without ids and vocabulary."""
        arrays = () if self._retriever is None else self._retriever.scores.values()
        return sum(int(getattr(array, "nbytes", 0)) for array in arrays)

    def terms(self, text: str) -> list[str]:
        """The terms of a text, in order and with repetitions.

        >>> BM25Channel.build([], []).terms("The 5 m HDMI cables, no adapters")
        ['5', 'm', 'hdmi', 'cabl', 'adapt']
        """
        return _terms(text, self._stem)

    def search(self, queries: Sequence[str], k: int) -> tuple[npt.NDArray[np.object_], FloatArray]:
        """Top-K of ``B`` query texts: ids ``[B, K]`` and BM25 scores ``[B, K]`` float32, best first.

        A row with fewer than K results is padded with id "" and score -inf. Raises ``ValueError`` when k < 1.
        """
        check_queries(queries)
        _check_size("k", k)
        ids_BK = np.full((len(queries), k), "", dtype=object)
        scores_BK = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for row, query in enumerate(queries):
            scores = self._scores(query)
            positions = _top_positions(scores, k)
            ids_BK[row, : len(positions)] = [self._ids[position] for position in positions.tolist()]
            scores_BK[row, : len(positions)] = scores[positions]
        return ids_BK, scores_BK

    def scores(self, query: str, positions: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """BM25 score of the items at these catalog positions, 0 for one without a common term."""
        scores: FloatArray = self._scores(query)[positions]
        return scores

    def term_overlap(self, queries: Sequence[str], item_positions_BK: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Share of the query's distinct terms that the item's text contains, ``[B, K]`` float32 in [0, 1].

        The lexical exclusivity proxy of Retrieval-GRPO (arXiv 2511.13885: more term overlap with the inverted index,
        less reward). A term that no item contains counts as not contained; a query without terms overlaps with nothing.

        Args:
            queries: ``B`` query texts.
            item_positions_BK: positions of the items in the ``ids`` that the channel was built from; -1 (no item)
                overlaps with nothing.

        Raises:
            ValueError: not one row per query, or a position outside -1..N-1.

        >>> channel = BM25Channel.build(["a", "b"], ["Red running shoes", "Red shirt"])
        >>> channel.term_overlap(["the red shoe"], np.array([[0, 1]])).tolist()
        [[1.0, 0.5]]
        """
        check_queries(queries)
        _check_rows(queries, item_positions_BK)
        if item_positions_BK.size and not -1 <= item_positions_BK.min() <= item_positions_BK.max() < len(self):
            raise ValueError(
                f"item positions must be from -1 to {len(self) - 1}, got {item_positions_BK.min()} to "
                f"{item_positions_BK.max()}; the channel and the catalog must hold the same items"
            )
        overlap_BK = np.zeros(item_positions_BK.shape, dtype=np.float32)
        for row, query in enumerate(queries):
            terms = set(self.terms(query))
            for token in [self._vocabulary[term] for term in terms if term in self._vocabulary]:
                postings = self._postings(token)
                wanted = item_positions_BK[row].astype(postings.dtype)  # else searchsorted copies the postings
                places = np.minimum(np.searchsorted(postings, wanted), len(postings) - 1)
                overlap_BK[row] += postings[places] == wanted
            overlap_BK[row] /= max(1, len(terms))
        return overlap_BK

    def save(self, folder: str | Path) -> None:
        """Write the channel to a folder (bm25s' own npy and json files, and ``channel.json``), without pickle.

        It is written beside and renamed; an older channel in the folder is replaced. Raises ``FileExistsError`` when
        the folder holds anything else.
        """
        settings = {
            "format": _FORMAT,
            "name": self._name,
            "stemmer": "english" if self._stem else "",
            "indexed": self._retriever is not None,
            "ids": self._ids,
        }
        with replace_folder(Path(folder), _SETTINGS) as beside:
            if self._retriever is not None:
                self._retriever.save(str(beside))
            (beside / _SETTINGS).write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> BM25Channel:
        """Read a saved channel; it gives the same results as the one that was saved.

        Raises ``FileNotFoundError`` where there is none, ``ValueError`` for another version's file format, and
        ``ImportError`` when it was stemmed and PyStemmer is missing.
        """
        recover_folder(Path(folder))
        path = Path(folder) / _SETTINGS
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {folder} holds no saved BM25 channel")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["format"] != _FORMAT:
            raise ValueError(f"{path} has format {settings['format']}, this version reads {_FORMAT}; build it again")
        stem = _stemmer() if settings["stemmer"] else None
        if settings["stemmer"] and stem is None:
            raise ImportError(f"the channel in {folder} was built with stemming; install PyStemmer to read it")
        retriever = _bm25s().BM25.load(str(folder)) if settings["indexed"] else None
        return cls(settings["name"], settings["ids"], stem=stem, retriever=retriever)

    def _postings(self, token: int) -> Int32Array:
        """Positions of the items that contain a term, rising: one column of bm25s' sparse matrix."""
        matrix = self._retriever.scores
        postings: Int32Array = matrix["indices"][matrix["indptr"][token] : matrix["indptr"][token + 1]]
        return postings

    def _scores(self, query: str) -> FloatArray:
        """BM25 score of every item, ``[N]``."""
        # Sorted, because the last bit of a float32 sum depends on its order and the order of words must not matter.
        tokens = sorted(self._vocabulary[term] for term in self.terms(query) if term in self._vocabulary)
        if not tokens:
            return np.zeros(len(self), dtype=np.float32)
        scores: FloatArray = self._retriever.get_scores_from_ids(tokens)
        return scores

    def _find(self, queries: list[str], n: int) -> list[Int32Array]:
        return [_top_positions(self._scores(query), n) for query in queries]


class IndexChannel(RankedChannel):
    """Another vector index, searched with the frozen encoder that it was built with.

    Args:
        index: any index with ``search``: `ExactIndex`, `VectorIndex`, `MilvusIndex`, `LiveIndex` or your own.
        encode_query: ``B`` query texts to vectors ``[B, D]``, such as ``Encoder.encode_query``. It must stay as it is:
            not the encoder in training.
        name: name of the channel.
        fingerprint: the encoder's, such as ``Encoder.fingerprint``; with it an index that says it was built with another
            encoder is refused.

    Raises:
        ValueError: the fingerprints differ, here or, where the index has been exchanged since, when it is searched.
    """

    def __init__(
        self,
        index: SearchIndex,
        encode_query: Callable[[Sequence[str]], FloatArray],
        *,
        name: str = "index",
        fingerprint: str = "",
    ) -> None:
        super().__init__(name)
        self._index, self._encode_query, self._fingerprint = index, encode_query, fingerprint
        check_fingerprint(self._index, self._fingerprint)

    def _find(self, queries: list[str], n: int) -> list[Int32Array]:
        check_fingerprint(self._index, self._fingerprint)
        ids_BK, _ = self._index.search(self._encode_query(queries), n)
        return [self._number([item for item in row if item]) for row in ids_BK.tolist()]


def _top_positions(scores: FloatArray, k: int) -> Int32Array:
    """Positions of the k highest positive scores, highest first, equal scores by rising position."""
    candidates = np.flatnonzero(scores > 0)
    if len(candidates) > k:
        lowest = np.partition(scores[candidates], -k)[-k]
        candidates = candidates[scores[candidates] >= lowest]  # keeps all ties at the boundary
    order = np.argsort(-scores[candidates], kind="stable")[:k]
    return candidates[order].astype(np.int32)


def _terms(text: str, stem: Stem | None) -> list[str]:
    stop_words = _stop_words()
    words = [word for word in _WORD.findall(text.lower()) if word not in stop_words]
    return stem(words) if stem else words


@cache
def _stop_words() -> frozenset[str]:
    return frozenset(_bm25s().stopwords.STOPWORDS_EN)


def _bm25s() -> Any:
    import bm25s  # here, because it is slow to import

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets DEBUG and talks to every root handler
    return bm25s


def _stemmer() -> Stem | None:
    try:
        import Stemmer
    except ImportError:
        return None
    stem: Stem = Stemmer.Stemmer("english").stemWords
    return stem


def _check_ids(ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for item in ids:
        if item == "" or item in seen:
            what = f"id {item!r} comes twice" if item else "an id is empty"
            raise ValueError(f"{what}; item ids must be unique and not empty (an empty id is padding)")
        seen.add(item)


def check_queries(queries: Sequence[str]) -> None:
    """Raises TypeError for one text in the place of a list of texts."""
    if isinstance(queries, str):
        raise TypeError(f"queries must be a sequence of texts, got the text {queries!r}; write [{queries!r}]")


def _check_size(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def _check_rows(queries: Sequence[str], array_BK: npt.NDArray[Any]) -> None:
    if array_BK.ndim != 2 or len(array_BK) != len(queries):
        raise ValueError(f"expected [B, K] with a row for each of {len(queries)} queries, got {list(array_BK.shape)}")
