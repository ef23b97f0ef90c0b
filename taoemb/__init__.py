"""Train a search encoder against a judge instead of against hard negatives.

The public names below are the whole public interface. They are resolved on first use (PEP 562), so that
``import taoemb`` loads neither torch nor faiss.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from taoemb import judge, rewards
    from taoemb.catalog import Catalog, ItemTemplate
    from taoemb.contrastive import ContrastiveConfig, train_contrastive
    from taoemb.encoder import Encoder
    from taoemb.evaluation import evaluate
    from taoemb.index.exact import ExactIndex
    from taoemb.index.faiss_index import VectorIndex
    from taoemb.store import EmbeddingStore, encode_corpus
    from taoemb.trainer import RetrievalGRPOTrainer
    from taoemb.trainer_config import RetrievalGRPOConfig

__all__ = [
    "Catalog",
    "ContrastiveConfig",
    "EmbeddingStore",
    "Encoder",
    "ExactIndex",
    "ItemTemplate",
    "RetrievalGRPOConfig",
    "RetrievalGRPOTrainer",
    "VectorIndex",
    "__version__",
    "encode_corpus",
    "evaluate",
    "judge",
    "rewards",
    "train_contrastive",
]

_SUBMODULES = ("judge", "rewards")
_OWNERS = {  # public name -> the module that defines it
    "Catalog": "taoemb.catalog",
    "ContrastiveConfig": "taoemb.contrastive",
    "EmbeddingStore": "taoemb.store",
    "Encoder": "taoemb.encoder",
    "ExactIndex": "taoemb.index.exact",
    "ItemTemplate": "taoemb.catalog",
    "RetrievalGRPOConfig": "taoemb.trainer_config",
    "RetrievalGRPOTrainer": "taoemb.trainer",
    "VectorIndex": "taoemb.index.faiss_index",
    "encode_corpus": "taoemb.store",
    "evaluate": "taoemb.evaluation",
    "train_contrastive": "taoemb.contrastive",
}

if not TYPE_CHECKING:  # hidden from type checkers, so that a misspelled name is an error there

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return import_module(f"taoemb.{name}")
        if name not in _OWNERS:
            raise AttributeError(f"module 'taoemb' has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = getattr(import_module(_OWNERS[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
