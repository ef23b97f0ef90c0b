"""Speed as a ratio to the limit of the machine, or to the peer, measured in turns in one run (A B A B ..., medians).

    OMP_NUM_THREADS=1 python benchmarks/speed.py --data runs/shop-20000-0 --out runs/speed

- one exact query against the bandwidth at which the same memory can be read, a batch of them against the matrix product alone;
- `VectorIndex.search` against the raw faiss call;
- `Encoder.encode_document` against sentence-transformers' own `encode`, static model and MiniLM, with the cosine of the results;
- a refresh (the catalog encoded and an exact index built, as between steps of training) against sentence-transformers' `encode` and faiss' ``add``;
- steps of stage 1 against `SentenceTransformerTrainer` with `MultipleNegativesRankingLoss` on the same pairs, both without global negatives;
- where hnswlib is installed, the HNSW index of `VectorIndex` against it: as many links; as wide a beam, with the recall of both, and the beam that finds as much.

Batch sizes, learning rate and the graph's parameters are ours on both sides; all use ``OMP_NUM_THREADS`` threads. Writes ``OUT/speed.json``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from taoemb.catalog import Catalog, Items
from taoemb.contrastive import ContrastiveConfig, Positives, train_contrastive
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.pretrained import distill_static, model_path
from taoemb.store import EmbeddingStore, encode_corpus
from taoemb.types import FloatArray

LINKS, BUILD_BEAM, BEAM = 32, 40, 64
"""Of HNSW: neighbours of a node, and the width of the search that builds (FAISS' default) and of the one that serves."""


def main() -> None:
    """Run all comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="catalog folder with clicks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    turns, catalog, static = arguments.turns, Catalog.load(arguments.data), arguments.out / "static"
    if not (static / "modules.json").exists():
        distill_static(model_path("minilm")).save(str(static))
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((arguments.vectors, arguments.dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = EmbeddingStore([str(i) for i in range(len(vectors))], [vectors], "")
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(), "turns": turns, "vectors": arguments.vectors, "dimension": arguments.dimension,
        "search": scans(store, turns),
        "encode static": encodes(str(static), catalog.items, 20_000, max(3, turns // 3)),
        "encode MiniLM": encodes(model_path("minilm"), catalog.items, 400, 3),
        "refresh": refreshes(str(static), catalog.items, max(3, turns // 3)),
        "stage 1": steps(str(static), catalog, arguments.out / "work", max(3, turns // 3)),
    }  # fmt: skip
    if find_spec("hnswlib"):
        encoder = Encoder(str(static))
        queries = encoder.encode_query(catalog.queries.texts[:1000])
        found["HNSW"] = graphs(encode_corpus(encoder, catalog.items), queries, max(3, turns // 3))
    write_json(arguments.out / "speed.json", found)
    for name, value in found.items():
        print(name, value)


def in_turns(parts: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each part; the parts take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(turns + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def scans(store: EmbeddingStore, turns: int) -> dict[str, float]:
    """Exact search against what the memory and the matrix product allow, and the index against raw faiss."""
    exact, flat, vectors = ExactIndex.build(store), VectorIndex.build(store, "Flat"), store.vectors
    lists = 1 << round(np.log2(4 * np.sqrt(len(store))))
    inverted = VectorIndex.build(store, f"IVF{lists},Flat")
    tensor = torch.from_numpy(vectors)
    one, many = vectors[:1] * 1.0, vectors[:256] * 1.0
    query, queries = torch.from_numpy(one), torch.from_numpy(many)
    spent = in_turns({
        "read": lambda: tensor.sum(),
        "one": lambda: exact.search_positions(one, 10),
        "product one": lambda: query @ tensor.T,
        "many": lambda: exact.search_positions(many, 10),
        "product many": lambda: queries @ tensor.T,
        "flat": lambda: flat.search(many, 10),
        "faiss flat": lambda: flat.faiss_index.search(many, 10),
        "inverted": lambda: inverted.search(many, 10),
        "faiss inverted": lambda: inverted.faiss_index.search(many, 10),
    }, turns)  # fmt: skip
    size = vectors.nbytes
    return {
        "read GB/s": size / spent["read"] / 1e9,
        "one exact query, GB/s": size / spent["one"] / 1e9,
        "one exact query, share of reading the memory": spent["read"] / spent["one"],
        "256 exact queries, share of the matrix product": spent["product many"] / spent["many"],
        "matrix product GFLOP/s": 2 * 256 * vectors.size / spent["product many"] / 1e9,
        "VectorIndex Flat, times faiss": spent["faiss flat"] / spent["flat"],
        "VectorIndex IVF, times faiss": spent["faiss inverted"] / spent["inverted"],
    }


def encodes(model: str, items: Items, count: int, turns: int) -> dict[str, float]:
    """Items a second of our encoder and of sentence-transformers on the same texts, and the cosine of their vectors."""
    encoder, peer = Encoder(model), SentenceTransformer(model, device="cpu")
    texts = encoder.template.texts(items[:count])

    def ours() -> np.ndarray:
        encoder.forget_tokens()  # each turn tokenises, as the peer does
        return encoder.encode_document(texts)

    def theirs() -> np.ndarray:
        return peer.encode(texts, batch_size=encoder.batch_size, normalize_embeddings=True, show_progress_bar=False)

    cosine = float((ours() * theirs()).sum(1).mean())
    spent = in_turns({"ours": ours, "theirs": theirs, "kept tokens": lambda: encoder.encode_document(texts)}, turns)
    return {"items/s": len(texts) / spent["ours"], "times sentence-transformers": spent["theirs"] / spent["ours"],
            "times with kept tokens": spent["theirs"] / spent["kept tokens"], "cosine": cosine}  # fmt: skip


def refreshes(model: str, items: Items, turns: int) -> dict[str, float]:
    """Seconds from changed weights to an index of the whole catalog that answers; ours has tokenised the catalog once, as in training."""
    encoder, peer = Encoder(model), SentenceTransformer(model, device="cpu")
    texts = encoder.template.texts(items)

    def ours() -> object:
        return ExactIndex.build(encode_corpus(encoder, items))

    def theirs() -> object:
        index = faiss.IndexFlatIP(encoder.dimension)
        index.add(peer.encode(texts, batch_size=encoder.batch_size, normalize_embeddings=True, show_progress_bar=False))
        return index

    spent = in_turns({"ours": ours, "theirs": theirs}, turns)
    return {"seconds": spent["ours"], "times sentence-transformers and faiss": spent["theirs"] / spent["ours"]}


def steps(model: str, catalog: Catalog, folder: Path, turns: int, count: int = 200) -> dict[str, float]:
    """Steps a second over a training of so many, loading the model and tokenising included."""
    config = ContrastiveConfig(steps=count, global_negatives=0, save_steps=10 * count)
    texts = Encoder(model).item_texts(catalog.items)
    positives = Positives(catalog, texts)
    pairs = Dataset.from_dict({
        "anchor": [catalog.queries.texts[q] for q in positives.queries.tolist() for _ in positives.of(q)],
        "positive": [texts[i] for q in positives.queries.tolist() for i in positives.of(q)],
    })  # fmt: skip

    def ours() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        train_contrastive(Encoder(model), catalog, config, run_dir=folder, trackers=("jsonl",))

    def theirs() -> None:
        settings = SentenceTransformerTrainingArguments(
            output_dir=str(folder / "peer"), max_steps=count, per_device_train_batch_size=config.batch_size, learning_rate=config.learning_rate,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10 * count, use_cpu=True,
        )  # fmt: skip
        peer = SentenceTransformer(model, device="cpu")
        SentenceTransformerTrainer(
            model=peer, args=settings, train_dataset=pairs, loss=MultipleNegativesRankingLoss(peer)
        ).train()

    spent = in_turns({"ours": ours, "theirs": theirs}, turns)
    shutil.rmtree(folder, ignore_errors=True)
    return {"steps/s": count / spent["ours"], "times sentence-transformers' trainer": spent["theirs"] / spent["ours"]}


def graphs(store: EmbeddingStore, queries: FloatArray, turns: int) -> dict[str, float]:
    """`VectorIndex` with HNSW and hnswlib on the same vectors and queries, Top-10."""
    import hnswlib

    exact = ExactIndex.build(store).search_positions(queries, 10)[0]
    ours = VectorIndex.build(store, f"HNSW{LINKS}")
    ours.set_parameters(efSearch=BEAM)

    def theirs() -> Any:
        index = hnswlib.Index("ip", store.vectors.shape[1])
        index.init_index(len(store), M=LINKS, ef_construction=BUILD_BEAM)
        index.add_items(store.vectors, num_threads=torch.get_num_threads())
        return index

    build_seconds = in_turns({"ours": lambda: VectorIndex.build(store, f"HNSW{LINKS}"), "theirs": theirs}, 3)
    peer = theirs()
    peer.set_num_threads(torch.get_num_threads())

    def recall(rows: np.ndarray) -> float:
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]))

    def asked(beam: int) -> np.ndarray:
        peer.set_ef(beam)
        return np.asarray(peer.knn_query(queries, 10)[0])

    found, same = recall(ours.search_positions(queries, 10)[0]), recall(asked(BEAM))
    wider = next((beam for beam in range(BEAM, 16 * BEAM, 8) if recall(asked(beam)) >= found), 16 * BEAM)
    spent = in_turns(
        {"ours": lambda: ours.search(queries, 10), "theirs": lambda: asked(BEAM), "wider": lambda: asked(wider)}, turns
    )
    return {"queries/s": len(queries) / spent["ours"], "times hnswlib": spent["theirs"] / spent["ours"], "recall": found, "recall of hnswlib": same,
            "times hnswlib at as much recall": spent["wider"] / spent["ours"], "beam of hnswlib for as much recall": wider,
            "build, times hnswlib": build_seconds["theirs"] / build_seconds["ours"]}  # fmt: skip


if __name__ == "__main__":
    main()
