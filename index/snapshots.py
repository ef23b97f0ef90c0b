"""Generations of an index on disk: readers always find a complete one, also after a kill at any moment.

Layout: ``gen-000007/`` as an index's ``save`` wrote it, and ``CURRENT``, which names the generation in use and is renamed into
place last. Nothing is ever changed in a generation, so that a reader that holds one is not disturbed by the next.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path

import numpy.typing as npt

from taoemb.files import write_text
from taoemb.index.refresh import AnyIndex, load_index
from taoemb.index.results import SearchResult, as_queries
from taoemb.index.tuning import Truth
from taoemb.store import EmbeddingStore


class SnapshotError(ValueError):
    """No generation can be opened, or a new one is not good enough."""


class Snapshots:
    """The generations of one index in a folder. One process at a time publishes, any number read.

    Args:
        folder: where they are; made when the first is published.
        keep: generations that are kept, the current one included; 2 or more, so that there is one to fall back to.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep}: keep at least 2 generations, one to fall back to")
        self.folder, self.keep = Path(folder), keep

    def publish(
        self,
        index: AnyIndex,
        *,
        probe: npt.ArrayLike | None = None,
        store: EmbeddingStore | None = None,
        min_recall: float = 0.9,
        k: int = 10,
        source: str = "",
    ) -> int:
        """Save an index as the next generation and make it the current one; returns its number.

        With ``probe`` queries ``[B, D]`` and the ``store`` that the index was built over it must first reach a recall@k of
        ``min_recall`` (`Truth`). Raises SnapshotError where it does not; what is current stays so.
        """
        if "\n" in source:
            raise ValueError(f"source={source!r}: give one line")
        if (probe is None) != (store is None):
            raise ValueError("give both probe and store, or neither")
        if probe is not None and store is not None:
            truth = Truth(store, as_queries(probe, store.dimension), k)
            recall = truth.recall(index.search_positions(truth.queries, k)[0], k)
            if recall < min_recall:
                raise SnapshotError(
                    f"recall@{k} of the new index is {recall:.3f}, under {min_recall}; it is not published"
                )
        for leftover in self.folder.glob(".gen-*"):  # of a publication that was killed
            shutil.rmtree(leftover)
        number = max(self.generations(), default=0) + 1
        index.save(self._path(number))
        write_text(self.folder / "CURRENT", self._current_text(number, source))
        for old in self.generations()[: -self.keep]:
            hidden = self._path(old).with_name(f".{self._path(old).name}.old")
            self._path(old).rename(hidden)  # at once: half a generation must not look like one
            shutil.rmtree(hidden)
        return number

    def generations(self) -> list[int]:
        """Numbers of the complete generations, rising."""
        names = [path.name.removeprefix("gen-") for path in self.folder.glob("gen-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def current(self) -> int | None:
        """Number of the current generation; None before the first is published.

        Raises SnapshotError where ``CURRENT`` names none that is there.
        """
        if not (self.folder / "CURRENT").exists():
            return None
        return int(self._named()[0].removeprefix("gen-"))

    @property
    def source(self) -> str:
        """What the current generation was said to be made of when it was published; "" where nothing was said."""
        return self._named()[1] if (self.folder / "CURRENT").exists() else ""

    def _named(self) -> tuple[str, str]:
        """Folder and source of the current generation, as ``CURRENT`` says."""
        file = self.folder / "CURRENT"
        text = file.read_bytes().decode("utf-8", "replace")
        name, _, rest = text.partition("\n")
        source = rest.partition("\n")[0]
        number = name.removeprefix("gen-")
        if (
            not number.isdigit()
            or text != self._current_text(int(number), source)
            or int(number) not in self.generations()
        ):
            raise SnapshotError(f"{file} is corrupt: it names {name!r}; there are {self.generations()}")
        return name, source

    def _current_text(self, number: int, source: str) -> str:
        name = self._path(number).name
        return f"{name}\n" + (f"{source}\n{hashlib.sha256((name + source).encode()).hexdigest()}\n" if source else "")

    def open(self, device: str = "cpu") -> tuple[int, AnyIndex]:
        """The current generation, checksums verified; where it is damaged an older one, with a warning that names the file.

        Raises SnapshotError where none can be opened.
        """
        try:
            current = self.current
        except SnapshotError as error:
            warnings.warn(f"{error}; the newest generation is opened", stacklevel=2)
            current = max(self.generations(), default=None)
        if current is None:
            raise SnapshotError(f"{self.folder} holds no published index")
        problems = []
        for number in [n for n in reversed(self.generations()) if n <= current]:
            try:
                index = load_index(self._path(number), device)
            except ValueError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"{'; '.join(problems)}; generation {number} is opened", stacklevel=2)
            return number, index
        raise SnapshotError("; ".join(problems))

    def verify(self) -> list[str]:
        """What is wrong with ``CURRENT`` and every generation, each naming its file; empty when all is well."""
        problems = []
        try:
            _ = self.current
        except SnapshotError as error:
            problems.append(str(error))
        for number in self.generations():
            try:
                load_index(self._path(number))
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _path(self, number: int) -> Path:
        return self.folder / f"gen-{number:06d}"


class LiveIndex:
    """The current generation for searching from many threads; `reload` swaps in a newer one without stopping them.

    A search holds the generation that it began with, so that its results never mix two.
    """

    def __init__(self, snapshots: Snapshots, device: str = "cpu") -> None:
        self._snapshots, self._device = snapshots, device
        self._held = snapshots.open(device)
        self._tried: int | None = None

    @property
    def generation(self) -> int:
        """Number of the generation in use."""
        return self._held[0]

    @property
    def index(self) -> AnyIndex:
        """The index of the generation in use; it stays as it is, also when a newer one takes its place here."""
        return self._held[1]

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made the generation in use."""
        return self.index.fingerprint

    @property
    def dimension(self) -> int:
        """Number of dimensions ``D``."""
        return self.index.dimension

    def __len__(self) -> int:
        return len(self.index)

    def reload(self) -> bool:
        """Open the current generation where it is another than the one in use; returns whether one took its place. One that
        turned out to be damaged is not tried again."""
        current = self._snapshots.current
        if current in (self.generation, self._tried):
            return False
        self._tried, opened = current, self._snapshots.open(self._device)
        if opened[0] == self.generation:  # the newest is damaged
            return False
        self._held = opened
        return True

    def search(self, vectors: npt.ArrayLike, k: int) -> SearchResult:
        """As the index's own ``search``."""
        return self.index.search(vectors, k)
