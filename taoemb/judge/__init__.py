"""Relevance judges: they give (query, item) pairs a distribution over grades.

The cheap ones, which need no language model: `OracleJudge` (labels), `SoftLogicJudge` (rules over the catalog's own
words), `BiEncoderJudge` (cosine of a frozen encoder), and what joins them, `MeanJudge` (no grades needed) and
`EnsembleJudge` (calibrated on human grades). Names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taoemb.judge.bi_encoder import BiEncoderJudge
    from taoemb.judge.ensemble import EnsembleJudge, MeanJudge
    from taoemb.judge.features import PairFeatures
    from taoemb.judge.lexicon import Lexicon
    from taoemb.judge.oracle import OracleJudge
    from taoemb.judge.soft_logic import SoftLogicJudge

__all__ = ["BiEncoderJudge", "EnsembleJudge", "Lexicon", "MeanJudge", "OracleJudge", "PairFeatures", "SoftLogicJudge"]

_OWNERS = {
    "BiEncoderJudge": "bi_encoder",
    "EnsembleJudge": "ensemble",
    "Lexicon": "lexicon",
    "MeanJudge": "ensemble",
    "OracleJudge": "oracle",
    "PairFeatures": "features",
    "SoftLogicJudge": "soft_logic",
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
