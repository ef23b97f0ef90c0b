"""Chunks of context that a judge may read beside a pair: a table of your own, or what the generated shop writes; and which one a pair gets.

The task is DyKnow-RAG's (arXiv 2510.11122): a single chunk, which may help, mislead or say nothing of use. What the shop writes is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from taoemb.catalog import Item, Query
from taoemb.index.channels import BM25Channel
from taoemb.judge.causal import CausalJudge
from taoemb.judge.verdicts import fingerprint
from taoemb.shop import Shop
from taoemb.shop_rules import Ontology, Truth
from taoemb.tables import TableSpec, normalize_table, read_table, write_table
from taoemb.types import JudgeOutput

ChunkKind = Literal["encyclopedia", "review", "noise", ""]
MISLEADING = 0.3
"""Share of the shop's reviews that say something wrong."""
_TABLE = TableSpec("chunks", {"id": pa.string(), "text": pa.string()}, {})


@dataclass(frozen=True, slots=True)
class Chunk:
    """A text, and where it is known what kind it is of and whether it says something wrong."""

    id: str
    text: str
    kind: ChunkKind = ""
    misleading: bool = False


class Contexts:
    """Finds the chunk of a pair: the best by BM25 for query and title together; none where no word is shared.

    Raises ValueError without chunks, and for ids that come twice.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        if not chunks:
            raise ValueError("there are no chunks of context; give at least one")
        self.chunks = {chunk.id: chunk for chunk in chunks}
        self._channel = BM25Channel.build([chunk.id for chunk in chunks], [chunk.text for chunk in chunks])

    @classmethod
    def load(cls, source: str | Path, data: str | Path = "") -> Contexts:
        """Chunks of a parquet, jsonl or csv file with the columns ``id`` and ``text``; ``shop``: those that the generated shop in ``data``
        writes.

        Raises FileNotFoundError or SchemaError when there is no such table.
        """
        if str(source) == "shop":
            return cls(shop_chunks(Shop.load(data)))
        table = normalize_table(read_table(Path(source), _TABLE), _TABLE, str(source))
        return cls([Chunk(row["id"], row["text"]) for row in table.to_pylist()])

    def save(self, file: str | Path) -> None:
        """As a parquet file that `load` reads."""
        columns = {name: [getattr(chunk, name) for chunk in self.chunks.values()] for name in ("id", "text")}
        write_table(pa.table(columns), Path(file))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the chunks."""
        return fingerprint(*((chunk.id, chunk.text) for chunk in self.chunks.values()))

    def chunk(self, query: Query, item: Item) -> Chunk | None:
        """The chunk of a pair."""
        found = self._channel.top([f"{query.text} {item.title}"], 1)[0]
        return self.chunks[found[0]] if found else None

    def __call__(self, query: Query, item: Item) -> str:
        """Its text, empty where there is none."""
        chunk = self.chunk(query, item)
        return chunk.text if chunk else ""


class ContextJudge:
    """A language model that judges each pair with the chunk that ``contexts`` finds for it."""

    def __init__(self, judge: CausalJudge, contexts: Contexts) -> None:
        self.judge, self.contexts, self.scheme = judge, contexts, judge.scheme
        self.name, self.score_fn = f"{judge.name} with context", judge.score_fn

    @property
    def fingerprint(self) -> str:
        """Hash of the judge and the chunks."""
        return fingerprint(self.judge.fingerprint, self.contexts.fingerprint)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs."""
        return self.judge.score(pairs, [self.contexts(query, item) for query, item in pairs])


def shop_chunks(shop: Shop, seed: int = 0, *, reviews: int = 2000, noise: int = 200) -> list[Chunk]:
    """What the generated shop writes: an encyclopedia of its product types, of what its attributes are good for and of its facts; reviews of
    items, of which `MISLEADING` name another value of an attribute; and sentences that say nothing."""
    truth, rng = Truth.from_table(shop.truth), np.random.default_rng([seed, 12])
    ontology = truth.ontology
    chunks = [Chunk(f"e{n:05d}", text, "encyclopedia") for n, text in enumerate(_encyclopedia(ontology))]
    rows = rng.permutation(len(truth))[:reviews]
    for n, row in enumerate(rows.tolist()):
        wrong = bool(rng.random() < MISLEADING)
        text = _review(ontology, truth, row, shop.catalog.items[row].title, wrong, rng)
        if text:
            chunks.append(Chunk(f"r{n:05d}", text, "review", wrong))
    said = [*ontology.text["openings"], *ontology.text["fillers"]]
    for n in range(noise):
        a, b = rng.choice(len(said), 2, replace=False)
        chunks.append(Chunk(f"n{n:05d}", f"{said[a]} {said[b]}", "noise"))
    return chunks


def _encyclopedia(ontology: Ontology) -> Iterator[str]:
    for kind in ontology.types.values():
        also = f", also called {' or '.join(kind.names[1:])}," if len(kind.names) > 1 else ""
        others = " or ".join(ontology.types[other].names[0] for other in kind.related)
        yield f"{kind.names[0]}{also} is a product of its own." + (
            f" Related, but another product: {others}." if others else ""
        )
    for attribute in ontology.attributes.values():
        for value in attribute.values:
            for need in value.needs:
                yield f"What {need}: {attribute.labels[0]} {' or '.join(value.forms)}."
    for fact in ontology.facts.values():
        for type_id, (attribute_id, codes) in fact.holds.items():
            attribute = ontology.attributes[attribute_id]
            forms = " or ".join(attribute.values[code].forms[0] for code in codes)
            yield f"A {ontology.types[type_id].names[0]} that {fact.says[0]}: {attribute.labels[0]} {forms}."


def _review(ontology: Ontology, truth: Truth, row: int, title: str, wrong: bool, rng: np.random.Generator) -> str:
    """Of one attribute of an item; empty where it has none to be right or wrong about."""
    mine = {name: value for name, value in truth.attributes(row).items() if len(ontology.attributes[name].values) > 1}
    if not mine:
        return ""
    name = sorted(mine)[int(rng.integers(len(mine)))]
    values = [v for v in ontology.attributes[name].values if (v.id != mine[name]) == wrong]
    value = values[int(rng.integers(len(values)))]
    return f"Review of {title}: {ontology.attributes[name].labels[0]} {value.forms[int(rng.integers(len(value.forms)))]}, as I know from daily use."
