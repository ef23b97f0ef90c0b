"""Verdicts on disk: a pair is judged once, whatever asks, and a killed run loses no verdict it has paid for."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from taoemb.catalog import Item, Query
from taoemb.judge.schemes import LabelScheme, ScoreFn, scheme_of
from taoemb.types import JudgeOutput, RelevanceJudge

_CHUNK = 256  # pairs between two writes; our choice
_LOOKUP = 500  # below SQLite's limit of parameters
_SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, value BLOB NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID"


class CachedJudge:
    """A judge whose verdicts are kept in a SQLite file (WAL), which several processes may share.

    The key of a verdict is a hash of the judge's fingerprint, the query's text and intent and the item's whole content, so that a
    changed item or judge is judged anew. What is kept is the probabilities and the label mass, from which the score is computed
    (``score_fn`` of the judge, else their expected value); abstentions are not kept. Not for judges that look at a query's id. Missing pairs are judged and
    written in chunks: when the judge fails, those before are kept. A file that SQLite cannot read is set aside as
    ``NAME.corrupt-TIME``, and a new one begun; a single verdict that was damaged is judged anew.

    A calibration comes after the cache (`CalibratedJudge`): the cached probabilities are the judge's own.
    """

    def __init__(self, judge: RelevanceJudge, file: str | Path) -> None:
        self.judge, self.file = judge, Path(file)
        self.name, self.scheme = judge.name, scheme_of(judge)
        self.score_fn: ScoreFn = getattr(judge, "score_fn", "expected")
        self.hits, self.calls = 0, 0
        self._lock = threading.Lock()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._connection = self._open()

    @property
    def fingerprint(self) -> str:
        """The judge's."""
        return self.judge.fingerprint

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs; ``hits`` and ``calls`` count what the file knew and what the judge was asked."""
        judge = self.fingerprint
        keys = [_key(judge, query, item) for query, item in pairs]
        with self._lock:
            known = self._read(list(dict.fromkeys(keys)))
            missing = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}.items())
            self.hits += len(pairs) - len(missing)
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                found = self.judge.score([pair for _, pair in chunk])
                self.calls += len(chunk)
                mass = np.full(len(chunk), np.nan, np.float32) if found.label_mass is None else found.label_mass
                rows = np.column_stack([found.probs, mass]).astype("<f4")
                known |= dict(zip((key for key, _ in chunk), rows, strict=True))
                self._write([(k, row) for (k, _), row in zip(chunk, rows, strict=True) if not np.isnan(row[:-1]).any()])
        rows_NM = np.array([known[key] for key in keys], dtype=np.float32).reshape(len(keys), len(self.scheme) + 1)
        mass_N = rows_NM[:, -1]
        return self.scheme.output(rows_NM[:, :-1], self.score_fn, None if np.isnan(mass_N).all() else mass_N)

    def __len__(self) -> int:
        """Verdicts in the file, of all judges."""
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def close(self) -> None:
        """Close the file; the judge cannot be asked any more."""
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        with _one_at_a_time(self.file):
            try:
                return self._connect()
            except sqlite3.OperationalError as error:  # locked, full or not writable: the file itself may be sound
                raise OSError(f"{self.file}: {error}; free the file or give another one") from error
            except sqlite3.DatabaseError as error:
                aside = self.file.with_name(f"{self.file.name}.corrupt-{time.time_ns()}")
                os.replace(self.file, aside)
                for suffix in ("-wal", "-shm"):
                    self.file.with_name(self.file.name + suffix).unlink(missing_ok=True)
                tqdm.write(f"{self.file} is corrupt ({error}): set aside as {aside.name}, a new one begins")
                return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, timeout=60, check_same_thread=False, isolation_level=None)
        try:
            if (
                connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal"
            ):  # the switch does not wait for a writer
                connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        for start in range(0, len(keys), _LOOKUP):
            part = keys[start : start + _LOOKUP]
            marks = ",".join("?" * len(part))
            for key, value, total in self._connection.execute(
                f"SELECT key, value, sum FROM verdicts WHERE key IN ({marks})", part
            ):
                row = _verdict(key, value, total, self.scheme)
                if row is not None:
                    found[key] = row
        return found

    def _write(self, rows: list[tuple[bytes, np.ndarray]]) -> None:
        values = [(key, row.tobytes(), zlib.crc32(key + row.tobytes())) for key, row in rows]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", values)
            self._connection.execute("COMMIT")
        except BaseException:  # also Ctrl-C: other processes must not wait for this one
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Processes that open a cache do so one after the other: none may set aside what another has just begun."""
    try:
        import fcntl
    except ImportError:  # Windows: there is no such lock, and there the file in use cannot be moved either
        yield
        return
    with file.with_name(file.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(judge: str, query: Query, item: Item) -> bytes:
    content = json.dumps([judge, query.text, query.intent, asdict(item)], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _verdict(key: bytes, value: bytes, total: int, scheme: LabelScheme) -> np.ndarray | None:
    """Probabilities and label mass as they were written; None where they are damaged."""
    if zlib.crc32(key + value) != total or len(value) != 4 * (len(scheme) + 1):
        return None
    return np.frombuffer(value, "<f4")
