"""Relevance judges: they give (query, item) pairs a distribution over ordered labels.

Without a language model: `OracleJudge` (labels), `LexicalJudge` (BM25), `SoftLogicJudge` (rules over the catalog's own words, and yours: `Interventions`),
`BiEncoderJudge` (cosine of a frozen encoder), `MeanJudge` (several, no grades needed), `EnsembleJudge` (several, calibrated on human
grades), `CrossEncoderJudge`. With one: `CausalJudge` (transformers, LoRA, GGUF), `OpenAIJudge` (any OpenAI-compatible server),
`CascadeJudge` (a cheap judge first). Around any of them: `CachedJudge` keeps the verdicts in a file, `calibrate` fits the probabilities
to grades, `evaluate_judge` measures them. Names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taoemb.judge.bi_encoder import BiEncoderJudge
    from taoemb.judge.cache import CachedJudge
    from taoemb.judge.calibration import CalibratedJudge, calibrate
    from taoemb.judge.cascade import CascadeJudge
    from taoemb.judge.causal import CausalJudge
    from taoemb.judge.cross_encoder import CrossEncoderJudge
    from taoemb.judge.ensemble import EnsembleJudge, MeanJudge
    from taoemb.judge.evaluation import evaluate_judge
    from taoemb.judge.features import PairFeatures
    from taoemb.judge.interventions import Interventions
    from taoemb.judge.lexical import LexicalJudge
    from taoemb.judge.lexicon import Lexicon
    from taoemb.judge.openai_server import OpenAIJudge
    from taoemb.judge.oracle import OracleJudge
    from taoemb.judge.prompts import JudgePrompt
    from taoemb.judge.schemes import LabelScheme
    from taoemb.judge.soft_logic import SoftLogicJudge

__all__ = [
    "BiEncoderJudge",
    "CachedJudge",
    "CalibratedJudge",
    "CascadeJudge",
    "CausalJudge",
    "CrossEncoderJudge",
    "EnsembleJudge",
    "Interventions",
    "JudgePrompt",
    "LabelScheme",
    "LexicalJudge",
    "Lexicon",
    "MeanJudge",
    "OpenAIJudge",
    "OracleJudge",
    "PairFeatures",
    "SoftLogicJudge",
    "calibrate",
    "evaluate_judge",
]

_OWNERS = {
    "BiEncoderJudge": "bi_encoder",
    "CachedJudge": "cache",
    "CalibratedJudge": "calibration",
    "CascadeJudge": "cascade",
    "CausalJudge": "causal",
    "CrossEncoderJudge": "cross_encoder",
    "EnsembleJudge": "ensemble",
    "Interventions": "interventions",
    "JudgePrompt": "prompts",
    "LabelScheme": "schemes",
    "LexicalJudge": "lexical",
    "Lexicon": "lexicon",
    "MeanJudge": "ensemble",
    "OpenAIJudge": "openai_server",
    "OracleJudge": "oracle",
    "PairFeatures": "features",
    "SoftLogicJudge": "soft_logic",
    "calibrate": "calibration",
    "evaluate_judge": "evaluation",
}

if not TYPE_CHECKING:  # hidden from type checkers, so that a misspelled name is an error there

    def __getattr__(name: str) -> object:
        if name not in _OWNERS:
            raise AttributeError(f"module 'taoemb.judge' has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = getattr(import_module(f"taoemb.judge.{_OWNERS[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
