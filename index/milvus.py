"""The same interface on Milvus: embedded Milvus Lite by a file path, a cluster by a URI."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from taoemb.index.results import SearchResult, as_queries, check_k, check_unique, check_vectors, known_ids
from taoemb.store import EmbeddingStore, ids_hash
from taoemb.types import FloatArray

MAX_K = 16_384
"""Milvus's limit of a search's Top-K, and of the rows that one query gives."""
MAX_ID_BYTES = 65_535
"""Milvus's limit of a varchar."""
_RESULT_ROWS = 65_536
"""Hits that one search call asks for at most, so that a reply stays a few megabytes; our choice."""
_BATCH_BYTES = 16 << 20
"""Bytes of ids and vectors in one request at most; Milvus takes 64 MB, the rest is its overhead. Our choice."""
_ATTEMPTS = 6
_FIRST_DELAY = 0.1
"""Seconds before the second attempt, doubled before each further one; our choice."""
_SEARCH_PARAMETERS = ("ef", "nprobe", "reorder_k", "search_list")
_KIND = "milvus index"
_COUNT: Any = {"filter": "", "output_fields": ["count(*)"]}
_PROPERTIES = ("kind", "name", "fingerprint", "dimension", "count", "ids_hash", "search")

_lite_lock = threading.Lock()
_lite_users: Counter[str] = Counter()
"""Open indexes of this process by Milvus Lite path: the last one that closes stops the server and frees the file."""

_T = TypeVar("_T")


def import_pymilvus() -> Any:
    """The pymilvus module; raises ImportError that names the extra to install."""
    try:
        import pymilvus
    except ImportError as error:
        raise ImportError(
            'MilvusIndex needs pymilvus: pip install "taoemb[milvus]"; ExactIndex works without it'
        ) from error
    return pymilvus


class MilvusIndex:
    """One snapshot of an index in Milvus (inner product on unit vectors) whose items are named by string ids.

    Make one with `build` or `open`. A build is a new collection ``NAME_GENERATION``; the alias ``NAME`` moves to it
    when it is complete, so that nobody who asks for the name finds half an index. An object stays with the snapshot it
    began with, whose fingerprint its user has checked, until `reload`; the snapshot before the current one is kept for
    that. One process at a time builds or changes an index; any number read on a cluster. Milvus Lite lets one process
    at a time open a file.
    """

    def __init__(self, client: Any, uri: str, name: str, release: Callable[[], None]) -> None:
        self._client, self._release = client, release
        self.uri, self.name = uri, name
        self.collection = self.fingerprint = ""
        self.dimension = 0
        self._search: dict[str, int] = {}

    @classmethod
    def build(
        cls,
        store: EmbeddingStore,
        uri: str | Path,
        name: str = "items",
        *,
        index_type: str = "FLAT",
        params: Mapping[str, int] | None = None,
        batch_rows: int = 1000,
        token: str = "",
    ) -> MilvusIndex:
        """Fill a new collection with the store's shards, verify it, then move the alias ``name`` to it.

        Args:
            store: the vectors.
            uri: path of a Milvus Lite file (``.db``), or ``http://HOST:19530`` of a cluster.
            name: alias by which readers find the index.
            index_type: Milvus's, such as ``FLAT``, ``IVF_FLAT``, ``HNSW``.
            params: Milvus's settings, for the build (``nlist``, ``M``, ``efConstruction``) and for the search (``nprobe``,
                ``ef``); what is not given is Milvus's default.
            batch_rows: rows of a request at most.
            token: of a cluster that asks for one, ``user:password`` or an API key.

        A build that fails or is killed leaves the alias where it was; what is left of it goes at the next build.
        Raises ValueError for unfit ids, vectors, names or parameters, RuntimeError where the rows that Milvus counts are
        not those sent.
        """
        _check_name(name)
        if batch_rows < 1:
            raise ValueError(f"batch_rows={batch_rows}: give at least 1")
        if not store.dimension:
            raise ValueError("the store has no vectors; Milvus needs their dimension")
        _check_ids(store.ids)
        check_unique(store.ids)  # an upsert would silently keep one of them
        index = cls._connect(uri, name, token)
        try:
            previous, collection = index._current(), index._next_collection()
            try:
                index._fill(collection, store, index_type, dict(params or {}), batch_rows)
                if previous is None:
                    index._call("create_alias", collection, name)
                else:
                    index._call("alter_alias", collection, name)
            except BaseException:
                with contextlib.suppress(Exception):  # the error above is the one to tell; a later build tidies up
                    if index._current() != collection:
                        index._client.drop_collection(collection)
                raise
            index.reload()
            index._tidy({collection, previous})
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def open(cls, uri: str | Path, name: str = "items", *, token: str = "") -> MilvusIndex:
        """Open the current snapshot of an index.

        Raises ValueError that says what is missing: the file, the index of that name, or its metadata.
        """
        _check_name(name)
        if _is_path(uri) and not Path(uri).exists():
            raise ValueError(f"there is no Milvus Lite file {uri}; MilvusIndex.build makes it")
        index = cls._connect(uri, name, token)
        try:
            index.reload()
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def _connect(cls, uri: str | Path, name: str, token: str) -> MilvusIndex:
        pymilvus = import_pymilvus()
        if not _is_path(uri):
            shown = re.sub(r"//[^/@]*@", "//", str(uri))  # no password in messages
            return cls(pymilvus.MilvusClient(str(uri), token=token), shown, name, lambda: None)
        path = Path(uri).resolve()  # one spelling, so that users of one file are counted together
        if path.suffix != ".db":
            raise ValueError(f"uri={str(uri)!r}: a Milvus Lite file ends in .db, a cluster's URI begins with http://")
        manager = _lite_manager()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lite_lock:
            if manager.start_and_get_uri(str(path)) is None:  # the reason is in its log only
                raise ConnectionError(f"Milvus Lite cannot open {path}: another process has it open, or it is damaged")
            _lite_users[str(path)] += 1
        try:
            client = pymilvus.MilvusClient(str(path))
        except BaseException:
            _leave_lite(str(path))
            raise
        return cls(client, str(path), name, lambda: _leave_lite(str(path)))

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        """A client's method; what Milvus calls transient is tried again, transport errors by pymilvus itself."""
        if self._client is None:
            raise ValueError("the index is closed; open it again")
        return _retry(lambda: getattr(self._client, method)(*args, retry_times=_ATTEMPTS, **options))

    def _current(self) -> str | None:
        """The collection that the alias leads to."""
        if not self._call("has_collection", self.name):
            return None
        try:
            return str(self._call("describe_alias", self.name)["collection_name"])
        except import_pymilvus().MilvusException as error:
            raise ValueError(f"{self.name!r} is a collection in {self.uri}, not an alias; give another name") from error

    def _next_collection(self) -> str:
        names = self._call("list_collections")
        taken = [int(n.removeprefix(f"{self.name}_")) for n in names if re.fullmatch(rf"{self.name}_[0-9]+", n)]
        # the clock, because a kill in Milvus Lite's create_collection leaves a folder that is not listed but in the way
        return f"{self.name}_{max(int(time.time()), max(taken, default=0) + 1)}"

    def _tidy(self, keep: set[str | None]) -> None:
        """Drop older and half-built snapshots; collections that are merely named like them are not ours."""
        try:
            for collection in self._call("list_collections"):
                if re.fullmatch(rf"{self.name}_[0-9]+", collection) and collection not in keep:
                    metadata = _metadata(self._call("describe_collection", collection))
                    if (metadata["kind"], metadata["name"]) == (_KIND, self.name):
                        self._call("drop_collection", collection)
        except import_pymilvus().MilvusException as error:  # the new snapshot is in use: no reason to fail
            warnings.warn(f"older snapshots of {self.name!r} are left in {self.uri}: {error.message}", stacklevel=3)

    def _fill(
        self, collection: str, store: EmbeddingStore, index_type: str, params: dict[str, int], batch_rows: int
    ) -> None:
        pymilvus = import_pymilvus()
        search = {key: params.pop(key) for key in _SEARCH_PARAMETERS if key in params}
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", pymilvus.DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=store.dimension)
        metadata = {
            "kind": _KIND,
            "name": self.name,
            "fingerprint": store.fingerprint,
            "dimension": store.dimension,
            "count": len(store),
            "ids_hash": ids_hash(store.ids),
            "search": ",".join(f"{key}={value}" for key, value in search.items()),
        }
        self._call(
            "create_collection",
            collection,
            schema=schema,
            consistency_level="Strong",  # a reader sees every change that was acknowledged
            properties={f"taoemb.{key}": str(value) for key, value in metadata.items()},  # Lite keeps no description
        )
        start = 0
        for shard in store.blocks():
            ids = store.ids[start : start + len(shard)]
            for rows in _batches(ids, store.dimension, batch_rows):
                self._upsert(collection, ids[rows], check_vectors(shard[rows], ids[rows]))
            start += len(shard)
        self._call("flush", collection)
        index = self._client.prepare_index_params()
        # Milvus Lite 3.2 takes the settings from the older protocol's nested "params" alone and else ignores them
        index.add_index("vector", index_type=index_type, metric_type="IP",
                        params={"params": params} if _is_path(self.uri) else params)  # fmt: skip
        try:  # after the rows, so that the index covers all of them before anyone searches
            self._call("create_index", collection, index)
            self._call("load_collection", collection)
        except pymilvus.MilvusException as error:
            raise ValueError(
                f"Milvus cannot build index_type={index_type!r} with params={params}: {error.message}"
            ) from error
        found = int(self._call("query", collection, **_COUNT)[0]["count(*)"])
        if found != len(store):
            raise RuntimeError(f"Milvus counts {found} rows in {collection} after {len(store)} were sent; build again")

    def _upsert(self, collection: str, ids: Sequence[str], vectors: FloatArray) -> None:
        rows = [{"id": item_id, "vector": vector} for item_id, vector in zip(ids, vectors, strict=True)]
        self._call("upsert", collection, rows)

    def reload(self) -> bool:
        """Go over to the snapshot that the name leads to now; returns whether it is another than before.

        ``fingerprint`` and ``dimension`` are the new one's then. Raises ValueError that says what is missing.
        """
        collection = self._current()
        if collection is None:
            raise ValueError(f"{self.uri} holds no index named {self.name!r}; MilvusIndex.build makes it")
        if collection == self.collection:
            return False
        metadata = _metadata(self._call("describe_collection", collection))
        missing = [key for key, value in metadata.items() if value is None]
        if missing:
            raise ValueError(
                f"collection {collection!r} behind {self.name!r} lacks the properties "
                f"{', '.join(f'taoemb.{key}' for key in missing)}; MilvusIndex.build writes them"
            )
        self._call("load_collection", collection)  # Lite releases all when it stops
        self.collection = collection
        self.fingerprint, self.dimension = str(metadata["fingerprint"]), int(str(metadata["dimension"]))
        pairs = [pair.split("=") for pair in str(metadata["search"]).split(",") if pair]
        self._search = {key: int(value) for key, value in pairs}
        return True

    def __len__(self) -> int:
        return int(self._read("query", self.collection, **_COUNT)[0]["count(*)"])

    @property
    def ids(self) -> list[str]:
        """Ids of the items in the index, in Milvus's order of strings; reads them all.

        Raises RuntimeError where the index changed meanwhile.
        """
        # pymilvus's own iterator does not escape the id that it goes on from
        collection = self.collection
        found: list[str] = []
        while True:
            after = f"id > {_literal(found[-1])}" if found else 'id != ""'
            page = self._read("query", collection, filter=after, output_fields=["id"], limit=MAX_K,
                              iterator="True", reduce_stop_for_best="True")  # fmt: skip
            if not page:
                break
            found += sorted(row["id"] for row in page)
        if len(found) != self._read("query", collection, **_COUNT)[0]["count(*)"]:
            raise RuntimeError(f"{collection} changed while its ids were read; read them again")
        return found

    def search(self, vectors: npt.ArrayLike, k: int) -> SearchResult:
        """The Top-``k`` of ``B`` query vectors ``[B, D]``: ids ``[B, k]`` and scores ``[B, k]``, best first.

        Where fewer than ``k`` items are found, a row is padded with id "" and score -inf. Raises ValueError for unfit
        queries, a ``k`` over Milvus's 16,384, or a snapshot that newer builds have dropped.
        """
        collection, settings = self.collection, self._search  # a reload meanwhile must not mix two snapshots
        queries = as_queries(vectors, self.dimension)
        if check_k(k) > MAX_K:
            raise ValueError(f"k={k}: Milvus finds at most {MAX_K:,} items a query")
        ids = np.full((len(queries), k), "", dtype=object)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        if "ef" in settings:
            settings = {**settings, "ef": max(settings["ef"], k)}  # Milvus refuses less
        step = max(1, min(1024, _RESULT_ROWS // k))
        for start in range(0, len(queries), step):
            block = list(queries[start : start + step])
            found = self._read("search", collection, data=block, anns_field="vector", limit=k,
                               search_params={"metric_type": "IP", "params": settings})  # fmt: skip
            for row, hits in enumerate(found, start=start):
                ids[row, : len(hits)] = [hit["id"] for hit in hits]
                scores[row, : len(hits)] = [hit["distance"] for hit in hits]
        return ids, scores

    def update(self, ids: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Give these items the vectors ``[n, D]``; ids that are new are added. Searches see it at once.

        Not one step: a search meanwhile may see some of the items changed. Raises ValueError where ids or vectors are
        unfit, or this snapshot is no longer the current one.
        """
        array = check_vectors(vectors, ids, self.dimension)
        _check_ids(ids)
        self._check_current()
        for rows in _batches(ids, self.dimension, 1000):
            self._upsert(self.collection, ids[rows], array[rows])

    def remove(self, ids: Sequence[str]) -> None:
        """Take items out. Raises KeyError naming an id that is not there, ValueError as `update`."""
        self._check_current()
        wanted = list(dict.fromkeys(ids))
        known: set[str] = set()
        filters = []
        for rows in _batches(wanted, 0, 1000):
            filters.append(f"id in [{','.join(map(_literal, wanted[rows]))}]")  # pymilvus's ids= does not escape
            known |= {
                row["id"] for row in self._read("query", self.collection, filter=filters[-1], output_fields=["id"])
            }
        known_ids(wanted, known)
        for one in filters:
            self._call("delete", self.collection, filter=one)

    def close(self) -> None:
        """Disconnect; the last index of this process on a Milvus Lite file frees it for other processes."""
        if self._client is not None:
            self._client.close()
            self._client = None
            self._release()

    def _read(self, method: str, collection: str, **options: Any) -> Any:
        """`_call` on a snapshot; raises ValueError where newer builds have dropped it."""
        try:
            return self._call(method, collection, **options)
        except import_pymilvus().MilvusException as error:
            if self._call("has_collection", collection):
                raise
            raise ValueError(f"snapshot {collection!r} of {self.name!r} is gone; call reload()") from error

    def _check_current(self) -> None:
        if self._current() != self.collection:  # the change would be lost
            raise ValueError(f"snapshot {self.collection!r} of {self.name!r} is no longer current; call reload()")


def _lite_manager() -> Any:
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise ImportError('a .db file needs Milvus Lite: pip install "taoemb[milvus]"') from error
    return server_manager_instance


def _leave_lite(path: str) -> None:
    with _lite_lock:
        _lite_users[path] -= 1
        if not _lite_users[path]:
            del _lite_users[path]
            _lite_manager().release_server(path)  # pymilvus would keep the file locked until the process ends


def _is_path(uri: str | Path) -> bool:
    return isinstance(uri, Path) or not ("://" in uri or uri.startswith("unix:"))


def _metadata(description: Mapping[str, Any]) -> dict[str, str | None]:
    properties = description.get("properties") or {}
    return {key: properties.get(f"taoemb.{key}") for key in _PROPERTIES}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,239}", name):
        raise ValueError(f"name={name!r}: give letters, digits and _, no digit first, at most 240")


def _check_ids(ids: Sequence[str]) -> None:
    for item_id in ids:
        try:
            size = len(item_id.encode())
        except UnicodeEncodeError:
            raise ValueError(f"id {item_id[:40]!r} is no valid Unicode text") from None
        if not 0 < size <= MAX_ID_BYTES:
            raise ValueError(f"id {item_id[:40]!r} has {size} bytes in UTF-8; Milvus takes 1 to {MAX_ID_BYTES:,}")


def _literal(text: str) -> str:
    """A string in Milvus's filter language, which has these escapes in common with Milvus Lite's."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"'


def _batches(ids: Sequence[str], dimension: int, rows: int) -> Iterator[slice]:
    """Slices of at most ``rows`` rows whose ids and vectors of ``dimension`` stay under a request's size."""
    start = size = 0
    for i, item_id in enumerate(ids):
        row = 4 * dimension + 4 * len(item_id)  # a character is at most 4 bytes
        if i > start and (i - start >= rows or size + row > _BATCH_BYTES):
            yield slice(start, i)
            start, size = i, 0
        size += row
    if len(ids):
        yield slice(start, len(ids))


def _retry(call: Callable[[], _T]) -> _T:
    """What the call gives; an error that Milvus marks as transient is met with a doubling delay, a few times."""
    error_type = import_pymilvus().MilvusException
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except error_type as error:
            if not error.retriable:
                raise
            time.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
    return call()
