"""Vector indexes and retrieval channels: they know ids and vectors, never models or trainers.

Imported as ``taoemb.index``. Names are resolved on first use (PEP 562), so that the exact index and the
lexical channel work where faiss is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taoemb.index.channels import BM25Channel, Channel, IndexChannel, RankedChannel, ranked_channels
    from taoemb.index.exact import ExactIndex
    from taoemb.index.faiss_index import VectorIndex
    from taoemb.index.milvus import MilvusIndex
    from taoemb.index.refresh import IndexRefresher, RefreshConfig
    from taoemb.index.runs import RunChannel, write_run
    from taoemb.index.snapshots import LiveIndex, Snapshots

__all__ = [
    "BM25Channel", "Channel", "ExactIndex", "IndexChannel", "IndexRefresher", "LiveIndex", "MilvusIndex",
    "RankedChannel", "RefreshConfig", "RunChannel", "Snapshots", "VectorIndex", "ranked_channels", "write_run",
]  # fmt: skip

_OWNERS = {  # public name -> the module that defines it
    "BM25Channel": "taoemb.index.channels",
    "Channel": "taoemb.index.channels",
    "ExactIndex": "taoemb.index.exact",
    "IndexChannel": "taoemb.index.channels",
    "IndexRefresher": "taoemb.index.refresh",
    "LiveIndex": "taoemb.index.snapshots",
    "MilvusIndex": "taoemb.index.milvus",
    "RankedChannel": "taoemb.index.channels",
    "RefreshConfig": "taoemb.index.refresh",
    "RunChannel": "taoemb.index.runs",
    "Snapshots": "taoemb.index.snapshots",
    "VectorIndex": "taoemb.index.faiss_index",
    "ranked_channels": "taoemb.index.channels",
    "write_run": "taoemb.index.runs",
}

if not TYPE_CHECKING:  # hidden from type checkers, so that a misspelled name is an error there

    def __getattr__(name: str) -> object:
        if name not in _OWNERS:
            raise AttributeError(f"module 'taoemb.index' has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = getattr(import_module(_OWNERS[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
