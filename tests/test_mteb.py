"""The wrapper for MTEB: what it does by itself, and inside the real thing where mteb is installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from taoemb.catalog import Item, ItemTemplate
from taoemb.encoder import Encoder
from taoemb.evaluation import evaluate
from taoemb.index.exact import ExactIndex
from taoemb.mteb import MTEBModel
from taoemb.public_data import read_beir
from taoemb.store import encode_corpus

INSTALLED = importlib.util.find_spec("mteb") is not None
BATCHES = [
    {"text": ["Red mug Holds tea", "loose text"], "title": ["Red mug", " "], "body": ["Holds tea", "loose text"]},
    {"text": ["blue cup"], "title": [""], "body": ["blue cup"]},
]
TASK = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 2, "show_progress_bar": False}


@pytest.fixture(scope="module")
def encoder(static_model):
    return Encoder(static_model)


def test_documents_become_items(encoder):
    """As an imported catalog has them, through the item template."""
    expected = encoder.encode_document([
        Item("", "Red mug", description="Holds tea"), Item("", "loose text"), Item("", "blue cup"),
    ])  # fmt: skip
    model = MTEBModel(encoder)
    np.testing.assert_array_equal(model.encode(iter(BATCHES), prompt_type="document", **TASK), expected)
    no_titles = [{"text": ["Red mug"]}]
    np.testing.assert_array_equal(
        model.encode(no_titles, prompt_type="document", **TASK), encoder.encode_document(["Red mug"])
    )
    short = MTEBModel(Encoder(encoder.model, template=ItemTemplate(max_chars=7)))
    np.testing.assert_array_equal(
        short.encode(BATCHES[:1], prompt_type="document", **TASK)[0], encoder.encode_document(["Red mug"])[0]
    )


def test_queries_and_other_texts(tiny_bert):
    from sentence_transformers import SentenceTransformer

    encoder = Encoder(SentenceTransformer(str(tiny_bert), prompts={"query": "red ", "document": "blue "}, device="cpu"))
    model, batches = MTEBModel(encoder), [{"text": ["mug"]}, {"text": ["cup", "bowl"]}]
    found = model.encode(batches, prompt_type="query", **TASK)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, encoder.encode_query(["mug", "cup", "bowl"]))
    items = model.encode(batches, prompt_type=None, **TASK)
    np.testing.assert_array_equal(items, encoder.encode_document(["mug", "cup", "bowl"]))
    assert np.abs(found - items).max() > 1e-3
    assert model.encode([], prompt_type="query", **TASK).shape == (0, 32)


def test_similarity(encoder):
    model = MTEBModel(encoder)
    vectors = model.encode([{"text": ["red mug", "blue cup", "bowl"]}], **TASK)
    torch.testing.assert_close(model.similarity(vectors, torch.from_numpy(vectors[:2])), torch.from_numpy(vectors @ vectors[:2].T))  # fmt: skip
    torch.testing.assert_close(model.similarity_pairwise(vectors, vectors), torch.ones(3))
    assert model.similarity(vectors[0], vectors).shape == (1, 3)


def test_refuses(encoder):
    model = MTEBModel(encoder)
    with pytest.raises(ValueError, match="holds image and no text"):
        model.encode([{"image": [1]}], **TASK)
    with pytest.raises(ValueError, match="float32"):
        model.encode(BATCHES, precision="int8", **TASK)


def test_names(encoder, static_model, tmp_path):
    encoder.save(tmp_path / "runs" / "x" / "model")
    assert MTEBModel(tmp_path / "runs" / "x" / "model").name == "taoemb/x"
    assert MTEBModel(static_model).name == "taoemb/static"
    assert MTEBModel(encoder).name == "taoemb/encoder"
    assert MTEBModel(encoder, "me/mine").name == "me/mine"


@pytest.mark.skipif(INSTALLED, reason="mteb is installed")
def test_says_what_to_install(encoder):
    with pytest.raises(ImportError, match=r"taoemb\[mteb\]"):
        _ = MTEBModel(encoder).mteb_model_meta


@pytest.mark.skipif(not INSTALLED, reason="mteb is not installed (extra mteb)")
@pytest.mark.filterwarnings("ignore:.*swigvarlink")
def test_mteb_agrees_with_taoemb(small_shop, encoder, tmp_path, monkeypatch):
    """The same corpus as an MTEB task and as a BEIR folder: the same nDCG, recall and MRR."""
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    queries = [query for query in small_shop.queries if query.split == "test"]
    corpus = [{"_id": item.id, "title": item.title, "text": item.description} for item in small_shop.items]
    good = {q.id: {i: 1 for i, grade in small_shop.qrels[q.id].items() if grade >= 2} for q in queries}
    good = {query: graded for query, graded in good.items() if graded}

    class Shop(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="GeneratedShop", description="A generated shop", reference=None, type="Retrieval", category="t2t",
            dataset={"path": "none/none", "revision": "1"}, modalities=["text"], eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="ndcg_at_10", date=("2024-01-01", "2024-01-02"), domains=["Written"],
            task_subtypes=[], license="apache-2.0", annotations_creators="derived", dialect=[],
            sample_creation="created", bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *_, **__):
            data = {
                "corpus": Dataset.from_list([{"id": d["_id"], "title": d["title"], "text": d["text"]} for d in corpus]),
                "queries": Dataset.from_list([{"id": q.id, "text": q.text} for q in queries]),
                "relevant_docs": good,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    model = MTEBModel(encoder)
    result = mteb.evaluate(model, Shop(), cache=None, show_progress_bar=False, co2_tracker=False)
    assert (result.model_name, result.model_revision) == ("taoemb/encoder", encoder.fingerprint)
    scores = result.task_results[0].scores["test"][0]

    lines = [*map(json.dumps, corpus)], [json.dumps({"_id": q.id, "text": q.text}) for q in queries]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines[0]))
    (tmp_path / "queries.jsonl").write_text("\n".join(lines[1]))
    (tmp_path / "qrels").mkdir()
    rows = [f"{query}\t{item}\t1" for query, graded in good.items() for item in graded]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    catalog = read_beir(tmp_path)
    index = ExactIndex.build(encode_corpus(encoder, catalog.items))
    ids, found = index.search(encoder.encode_query(catalog.queries.texts), 100)
    run = {q: dict(zip(i, s)) for q, i, s in zip(catalog.queries.ids, ids.tolist(), found.tolist())}
    ours = evaluate(run, catalog.qrels, metrics=["ndcg@10", "recall@100", "mrr@10"], queries=list(good)).mean()
    assert 0.02 < ours["ndcg@10"] < 0.98
    assert scores["ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-4)
    assert scores["recall_at_100"] == pytest.approx(ours["recall@100"], abs=1e-4)
    assert scores["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-4)
