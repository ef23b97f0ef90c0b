"""Relevance judges: they give (query, item) pairs a distribution over grades.

A language model: `CausalJudge`. The cheap ones, which need none: `OracleJudge` (labels), `SoftLogicJudge` (rules over the catalog's own
words), `BiEncoderJudge` (cosine of a frozen encoder), and what joins them, `MeanJudge` (no grades needed) and
`EnsembleJudge` (calibrated on human grades). Around any of them: `CachedJudge` keeps its verdicts in a file, `calibrate` fits its
probabilities to grades. Names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taoemb.judge.bi_encoder import BiEncoderJudge
    from taoemb.judge.cache import CachedJudge
    from taoemb.judge.calibration import CalibratedJudge, calibrate
    from taoemb.judge.causal import CausalJudge
    from taoemb.judge.ensemble import EnsembleJudge, MeanJudge
    from taoemb.judge.features import PairFeatures
    from taoemb.judge.lexicon import Lexicon
    from taoemb.judge.oracle import OracleJudge
    from taoemb.judge.prompts import JudgePrompt
    from taoemb.judge.schemes import LabelScheme
    from taoemb.judge.soft_logic import SoftLogicJudge

__all__ = [
    "BiEncoderJudge", "CachedJudge", "CalibratedJudge", "CausalJudge", "EnsembleJudge", "JudgePrompt", "LabelScheme", "Lexicon",
    "MeanJudge", "OracleJudge", "PairFeatures", "SoftLogicJudge", "calibrate",
]  # fmt: skip

_OWNERS = {
    "BiEncoderJudge": "bi_encoder",
    "CachedJudge": "cache",
    "CalibratedJudge": "calibration",
    "CausalJudge": "causal",
    "EnsembleJudge": "ensemble",
    "JudgePrompt": "prompts",
    "LabelScheme": "schemes",
    "Lexicon": "lexicon",
    "MeanJudge": "ensemble",
    "OracleJudge": "oracle",
    "PairFeatures": "features",
    "SoftLogicJudge": "soft_logic",
    "calibrate": "calibration",
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
