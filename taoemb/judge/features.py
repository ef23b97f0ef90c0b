"""Features of (query, item) pairs for a judge that is calibrated on grades.

Every feature depends on the pair alone (and the catalog), never on the other pairs of a call, so that a verdict can be
cached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Items, Query
from taoemb.judge.bi_encoder import BiEncoderJudge
from taoemb.judge.lexicon import ItemFacts
from taoemb.judge.soft_logic import SoftLogicJudge
from taoemb.judge.verdicts import fingerprint
from taoemb.judge.words import STOP_WORDS, codes, words

LEXICAL = (
    "bm25", "title_overlap", "text_overlap", "phrase", "title_start", "brand", "code", "head", "query_words",
    "title_words", "soft_logic",
)  # fmt: skip
K1, B = 1.2, 0.75
"""BM25 constants, the usual ones."""


class PairFeatures:
    """Lexical features, soft logic and frozen cosines.

    - ``bm25``: BM25 of the whole item divided by its limit ``sum_t idf(t) (k1 + 1)``, so in [0, 1);
    - ``title_overlap``, ``text_overlap``: share of the query's idf that the title or the whole item holds;
    - ``phrase``: whether the title holds the query as it stands; ``title_start``: how early the first query word comes,
      from 1 at the start to 0 at the end or nowhere;
    - ``brand``: whether the query names the item's brand; ``code``: 1 a model code of the query is the item's, -1 it is
      not, 0 the query has none; ``head``: whether the last query word is the last word of what the item is called;
    - ``query_words``, ``title_words``: log(1 + number of words); ``soft_logic``: the score before grades;
    - one cosine per encoder, under the encoder's ``name``.
    """

    def __init__(
        self, items: Items, encoders: Sequence[BiEncoderJudge] = (), soft_logic: SoftLogicJudge | None = None
    ) -> None:
        self.soft_logic = soft_logic if soft_logic is not None else SoftLogicJudge(items)
        self.encoders = tuple(encoders)
        self.names = (*LEXICAL, *(encoder.name for encoder in self.encoders))
        """Names of the columns."""
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"feature names repeat: {self.names}; give each encoder its own name=")
        self._words: dict[str, tuple[list[str], frozenset[str]]] = {}

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same pair could get other features."""
        return fingerprint(self.names, K1, B, self.soft_logic.fingerprint, [e.fingerprint for e in self.encoders])

    def matrix(self, pairs: Sequence[tuple[Query, Item]]) -> npt.NDArray[np.float64]:
        """Features ``[N, F]`` in the order of ``names``; a query without a word gives a row of NaN."""
        soft = self.soft_logic.relevance(pairs)
        facts = [self.soft_logic.facts(item) for _, item in pairs]
        lexical = [[*self._lexical(query, facts[n]), soft[n]] for n, (query, _) in enumerate(pairs)]
        columns = [np.array(lexical, dtype=np.float64).reshape(len(pairs), len(LEXICAL))]
        columns += [encoder.cosines(pairs).astype(np.float64)[:, None] for encoder in self.encoders]
        return np.hstack(columns)

    def bm25(self, pairs: Sequence[tuple[Query, Item]]) -> npt.NDArray[np.float64]:
        """The column ``bm25`` alone, ``[N]``."""
        return np.array(
            [self._lexical(query, self.soft_logic.facts(item))[0] for query, item in pairs], dtype=np.float64
        )

    def _lexical(self, query: Query, facts: ItemFacts) -> tuple[float, ...]:
        text, query_codes = self._query(query.text)
        if not text:
            return (math.nan,) * (len(LEXICAL) - 1)
        lexicon, counts, title = self.soft_logic.lexicon, facts.counts, facts.title_words
        norm = K1 * (1.0 - B + B * facts.length / lexicon.mean_length)
        total = score = in_title = in_text = 0.0
        for word in text:
            idf = lexicon.idf(word)
            total += idf
            count = counts.get(word)
            if count:
                score += idf * count / (count + norm)
                in_text += idf
                if word in title:
                    in_title += idf
        joined = " ".join(text)
        firsts = [place for place in (facts.title.find(f" {word} ") for word in text) if place >= 0]
        code = 0.0 if not query_codes else 1.0 if query_codes & facts.codes else -1.0
        return (
            score / total, in_title / total, in_text / total,
            float(f" {joined} " in facts.title),
            1.0 - min(firsts) / len(facts.title) if firsts else 0.0,
            float(bool(facts.brand) and f" {facts.brand} " in f" {joined} "),
            code,
            float(any(named.rpartition(" ")[2] == text[-1] for named in facts.types)),
            math.log1p(len(text)), math.log1p(facts.title.count(" ") - 1),
        )  # fmt: skip

    def _query(self, text: str) -> tuple[list[str], frozenset[str]]:
        if text not in self._words:
            if len(self._words) > 65_536:
                self._words.clear()
            found = words(text)
            self._words[text] = ([w for w in found if w not in STOP_WORDS] or found, codes(text))
        return self._words[text]
