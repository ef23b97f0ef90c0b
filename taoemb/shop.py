"""The generated shop: an embedded data set of any size with exact relevance rules.

`generate_shop` is a pure function of its arguments: the same ones give the same bytes on disk. Items come from the
ontology in ``shop/*.yaml``; what they really are (the *truth*) is kept apart from what sellers write about them, which
abbreviates, omits and sometimes contradicts it. Queries carry their intent, and `verdicts` grades any pair by rule, so
the qrels are complete: an unlisted pair has grade 0. Every share and constant is our choice.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from taoemb.catalog import Catalog, Items, QuerySet
from taoemb.shop_queries import GradedQuery, simulate_clicks, write_queries
from taoemb.shop_rules import Ontology, Truth, Verdicts, load_ontology, verdicts
from taoemb.shop_text import ItemWriter
from taoemb.tables import write_table

__all__ = ["Ontology", "Shop", "Truth", "Verdicts", "generate_shop", "load_ontology", "verdicts"]

_CHUNK = 20_000
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shop:
    """A catalog and the truth behind it: columns id, type, brand, price, attributes (JSON), in catalog order."""

    catalog: Catalog
    truth: pa.Table

    def save(self, folder: str | Path) -> None:
        """Write the catalog and ``truth.parquet``."""
        self.catalog.save(folder)
        write_table(self.truth, Path(folder) / "truth.parquet")

    @classmethod
    def load(cls, folder: str | Path) -> Shop:
        """Read a saved shop; raises FileNotFoundError when the folder is a catalog without ``truth.parquet``."""
        file = Path(folder) / "truth.parquet"
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; write the shop with Shop.save")
        return cls(Catalog.load(folder), pq.read_table(file))


def generate_shop(
    items: int = 20_000,
    seed: int = 0,
    *,
    train_queries: int = 4000,
    validation_queries: int = 200,
    test_queries: int = 500,
) -> Shop:
    """Generate a shop: items with quality signals, queries with intents, complete qrels and clicks.

    Raises ValueError when a number is out of range, or when the items do not give that many distinct queries.
    """
    counts = {"test": test_queries, "validation": validation_queries, "train": train_queries}
    if items < 1 or seed < 0 or min(counts.values()) < 0:
        raise ValueError(
            f"items={items}, seed={seed}, queries={counts}: use at least 1 item, no negative seed or query count"
        )
    ontology = load_ontology()
    truth = _sample_truth(ontology, items, np.random.default_rng([seed, 0]))
    signals = _quality_signals(truth, np.random.default_rng([seed, 1]))
    ids = [f"i{i:07d}" for i in range(items)]
    table = _item_table(truth, ids, signals, seed)
    graded = write_queries(truth, seed, counts)
    names = np.array(ids, dtype=object)
    catalog = Catalog(
        Items(table),
        QuerySet(one.query for one in graded),
        {one.query.id: _grades(one, names) for one in graded},
        simulate_clicks(graded, signals["sales"], names, seed),
        {"name": "shop", "seed": seed, "items": items, "unjudged": 0},
    )
    return Shop(catalog, truth.to_table(ids))


def _grades(one: GradedQuery, names: npt.NDArray[np.object_]) -> dict[str, int]:
    return dict(zip(names[one.rows].tolist(), one.grades.tolist(), strict=True))


def _sample_truth(ontology: Ontology, n: int, rng: np.random.Generator) -> Truth:
    kinds = list(ontology.types.values())
    weight = np.exp(rng.normal(scale=0.35, size=len(kinds)))
    types = rng.choice(len(kinds), size=n, p=weight / weight.sum()).astype(np.int16)
    brands = np.zeros(n, np.int16)
    price = np.zeros(n)
    values = np.full((n, ontology.slots), -1, np.int8)
    brand_code = {name: i for i, name in enumerate(ontology.brand_ids)}
    order = np.argsort(types, kind="stable")
    edges = np.searchsorted(types[order], np.arange(len(kinds) + 1))
    for code, kind in enumerate(kinds):
        rows = order[edges[code] : edges[code + 1]]
        for slot, offered in enumerate(kind.attributes.values()):
            values[rows, slot] = rng.choice(offered, size=len(rows), p=_zipf(len(offered), 0.5))
        tiers = ontology.brands[kind.department]
        sold = sorted(tiers, key=lambda name: zlib.crc32(f"{kind.id}|{name}".encode()))
        chosen = rng.choice(len(sold), size=len(rows), p=_zipf(len(sold), 0.8))
        brands[rows] = [brand_code[sold[i]] for i in chosen]
        factor = np.array([ontology.rules["tiers"][tiers[sold[i]]] for i in chosen])
        low, high = kind.price
        price[rows] = low * (high / low) ** rng.beta(2, 2.5, size=len(rows)) * factor
    price = np.maximum(np.ceil(price) - rng.choice([0.01, 0.05, 0.5], size=n), 0.5).round(2)
    return Truth(ontology, types, brands, price, values)


def _zipf(n: int, exponent: float) -> FloatArray:
    weight = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(weight / weight.sum(), dtype=np.float64)


def _quality_signals(truth: Truth, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Rating, reviews, sales, return rate, and quality in [0, 1].

    One hidden merit drives them all, with noise. A share of it is the brand's reputation, so that quality can in part be
    read off the text and an encoder can learn it instead of learning items by heart. ``quality`` is the weighted mean (.5,
    .3, .2 in ``rules.yaml``) of the percentiles of rating, sales and reversed return rate among items of the same type, so
    that no type is better than another and quality says nothing about relevance.
    """
    n, share = len(truth), truth.ontology.rules["reputation"]
    reputation = rng.normal(size=len(truth.ontology.brand_ids))
    merit = np.sqrt(share) * reputation[truth.brands] + np.sqrt(1 - share) * rng.normal(size=n)
    rating = np.clip(5 - rng.gamma(2.0, 0.28, size=n) * np.exp(-0.35 * merit), 1, 5).round(1)
    sales = np.floor(np.exp(3.2 + 0.5 * merit + rng.normal(scale=1.3, size=n)))
    reviews = rng.binomial(sales.astype(np.int64), rng.beta(2, 12, size=n)).astype(np.float64)
    return_rate = (1 / (1 + np.exp(2.7 + 0.6 * merit + rng.normal(scale=0.6, size=n)))).round(4)
    weights = truth.ontology.rules["quality"]
    quality = np.zeros(n)
    for name, signal in (("rating", rating), ("sales", sales), ("return_rate", -return_rate)):
        quality += weights[name] * _percentile_in_type(signal, truth)
    return {
        "rating": rating,
        "reviews": reviews,
        "sales": sales,
        "return_rate": return_rate,
        "quality": (quality / sum(weights.values())).round(4),
    }


def _percentile_in_type(signal: FloatArray, truth: Truth) -> FloatArray:
    """Share of the other items of the same type that are worse (ties count half); 0.5 for a type with one item."""
    result = np.full(len(signal), 0.5)
    for kind in truth.ontology.type_ids:
        rows = truth.rows_of([kind])
        if len(rows) > 1:
            mine = signal[rows]
            order = np.sort(mine)
            below, upto = np.searchsorted(order, mine, "left"), np.searchsorted(order, mine, "right")
            result[rows] = (below + upto - 1) / 2 / (len(rows) - 1)
    return result


def _item_table(truth: Truth, ids: list[str], signals: dict[str, FloatArray], seed: int) -> pa.Table:
    """The seller-facing table; written in chunks, because a million texts as Python objects do not fit."""
    writer = ItemWriter(truth.ontology)
    chunks = []
    for number, start in enumerate(range(0, len(truth), _CHUNK)):
        rows = range(start, min(start + _CHUNK, len(truth)))
        texts = list(writer.write(truth, rows, np.random.default_rng([seed, 5, number])))
        columns = {name: pa.array([getattr(text, name) for text in texts], pa.string())
                   for name in ("title", "description", "category", "brand", "attributes")}  # fmt: skip
        chunks.append(pa.table({"id": pa.array(ids[rows.start : rows.stop], pa.string()), **columns}))
    table = pa.concat_tables(chunks).append_column("price", pa.array(truth.price))
    for name, signal in signals.items():
        whole = name in ("reviews", "sales")
        table = table.append_column(name, pa.array(signal.astype(np.int64) if whole else signal))
    return table
