import importlib.util
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling

from taoemb import backends
from taoemb.catalog import ItemTemplate
from taoemb.encoder import Encoder, token_batches
from taoemb.store import StoreError, encode_corpus

TEXTS = ["red face cream", "", "cream", "a vegan face cream for dry skin, 50 ml, in a red box " * 4, "red face cream"]
BACKENDS = ["onnx", "onnx-int8", "openvino", "openvino-bf16", "openvino-int8"]
# Least mean and least single cosine with torch, for random weights.
BOUNDS = {"onnx-int8": (0.998, 0.99), "openvino-bf16": (0.9995, 0.999), "openvino-int8": (0.998, 0.99)}


def need(backend):
    for package in ("onnx", "onnxscript", "onnxruntime", *(["openvino"] if "openvino" in backend else [])):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Cache folder for all tests that do not look into it: an export of the tiny model takes 2 to 4 s."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(params=BACKENDS)
def backend(request):
    need(request.param)
    return request.param


@pytest.fixture
def onnx():
    need("onnx")


@pytest.fixture
def texts(small_shop):
    return ItemTemplate().texts(small_shop.items[:200])


def cosines(a, b):
    return (a * b).sum(axis=1)


# Vectors -------------------------------------------------------------------------------------------------------------


def test_vectors_are_torchs(tiny_bert, backend, exports, texts):
    wanted = Encoder(tiny_bert, device="cpu").encode_document([*TEXTS, *texts])
    found = Encoder(tiny_bert, backend=backend, cache=exports).encode_document([*TEXTS, *texts])
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosine = cosines(found, wanted)
    if backend in backends.EXACT:
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert cosine.min() > 0.9999
    else:
        mean, least = BOUNDS[backend]
        assert cosine.mean() >= mean
        assert cosine.min() >= least
        assert np.abs(found - wanted).max() > 1e-5  # else the precision was not lowered at all


def test_neither_order_nor_batch_changes_vectors(tiny_bert, backend, exports, texts):
    encoder = Encoder(tiny_bert, backend=backend, cache=exports)
    together = encoder.encode_document(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    encoder.batch_size = 7
    shuffled = encoder.encode_document([texts[i] for i in order])
    alone = np.concatenate([encoder.encode_document([text]) for text in texts[:20]])
    # A rounding that flips in int8 moves a vector by one step of its grid.
    least = 0.999999 if backend in backends.EXACT else 0.998
    assert cosines(shuffled, together[order]).min() > least
    assert cosines(alone, together[:20]).min() > least


def test_no_text_and_one(tiny_bert, backend, exports):
    encoder = Encoder(tiny_bert, backend=backend, cache=exports)
    assert encoder.encode_query([]).shape == (0, 32)
    assert np.linalg.norm(encoder.encode_query([""])) == pytest.approx(1, abs=1e-5)


def test_long_texts_are_cut_alike(tiny_bert, backend, exports):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.max_seq_length = 16
    encoder = Encoder(model, backend=backend, cache=exports)
    long = "red cream for dry skin " * 20
    one, other = encoder.encode_query([long, long + "and more"])
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert cosines(encoder.encode_query([long]), Encoder(model).encode_query([long]))[0] > 0.99


def test_prompts_go_in(tiny_bert, onnx, exports):
    model = SentenceTransformer(str(tiny_bert), device="cpu", prompts={"query": "vegan: "})
    encoder = Encoder(model, backend="onnx", cache=exports)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), Encoder(model).encode_query(TEXTS), atol=1e-4)
    assert not np.allclose(encoder.encode_query(TEXTS), encoder.encode_document(TEXTS), atol=1e-2)


def test_other_modules(tiny_bert, onnx):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model[1] = Pooling(32, ("cls", "max", "weightedmean", "lasttoken"))
    model.append(Dense(4 * 32, 8))
    encoder = Encoder(model, backend="onnx")
    np.testing.assert_allclose(encoder.encode_query(TEXTS), Encoder(model).encode_query(TEXTS), atol=1e-4)


def test_several_threads_share_an_encoder(tiny_bert, backend, exports, texts):
    from concurrent.futures import ThreadPoolExecutor

    encoder = Encoder(tiny_bert, backend=backend, cache=exports)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder.encode_query, [texts[i : i + 10] for i in range(0, 200, 10)]))
    assert cosines(np.concatenate(found), encoder.encode_query(texts)).min() > 0.998


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_batches_cover_every_text_without_needless_padding(side):
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 30, 100))
    columns = torch.arange(40)  # wider than any text
    mask = (columns < lengths[:, None]).long() if side == "right" else (columns >= 40 - lengths[:, None]).long()
    ids = mask * torch.arange(1, 101)[:, None]
    seen = []
    for rows, batch in token_batches({"input_ids": ids, "attention_mask": mask, "modality": "text"}, 16, 100):
        shape = batch["input_ids"].shape
        assert shape == batch["attention_mask"].shape == (len(rows), int(lengths[rows].max()))
        assert len(rows) <= 16
        assert shape[0] * shape[1] <= 100
        assert torch.equal(batch["input_ids"].sum(1), torch.from_numpy(rows + 1) * lengths[rows])
        assert batch["modality"] == "text"
        seen.extend(rows)
    assert sorted(seen) == list(range(100))


def test_a_text_longer_than_a_batch_and_one_without_tokens():
    mask = torch.tensor([[1] * 9, [0] * 9, [0] * 9])
    found = list(token_batches({"attention_mask": mask}, 2, 4))
    assert [rows.tolist() for rows, _ in found] == [[0], [1, 2]]
    assert [batch["attention_mask"].shape for _, batch in found] == [(1, 9), (2, 1)]


def test_torch_gives_what_sentence_transformers_gives(tiny_bert, texts, monkeypatch):
    monkeypatch.setattr("taoemb.encoder._TOKENISED_TEXTS", 64)  # several rounds
    encoder, theirs = Encoder(tiny_bert, device="cpu"), SentenceTransformer(str(tiny_bert), device="cpu")
    wanted = theirs.encode([*texts, *TEXTS], normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode_document([*texts, *TEXTS]), wanted, atol=1e-6)


# Fingerprints and refusals -------------------------------------------------------------------------------------------


def test_fingerprint_tells_precisions_apart(tiny_bert, exports):
    need("openvino")
    encoders = {name: Encoder(tiny_bert, backend=name, cache=exports) for name in ["torch", *BACKENDS]}
    prints = {name: encoder.fingerprint for name, encoder in encoders.items()}
    assert prints["torch"] == prints["onnx"] == prints["openvino"]
    assert len(set(prints.values())) == 4, prints
    copies = {name: encoder.copy() for name, encoder in encoders.items()}
    assert {name: encoder.fingerprint for name, encoder in copies.items()} == prints
    for name, encoder in encoders.items():
        np.testing.assert_array_equal(copies[name].encode_query(TEXTS), encoder.encode_query(TEXTS))


def test_a_store_is_not_continued_in_another_precision(tiny_bert, onnx, exports, small_shop, tmp_path):
    items = small_shop.items[:20]
    store = encode_corpus(Encoder(tiny_bert, device="cpu"), small_shop.items, tmp_path / "items.emb")
    assert encode_corpus(Encoder(tiny_bert, backend="onnx", cache=exports), small_shop.items, tmp_path / "items.emb")
    with pytest.raises(StoreError, match="fingerprint"):
        encode_corpus(Encoder(tiny_bert, backend="onnx-int8", cache=exports), small_shop.items, tmp_path / "items.emb")
    assert len(store) > len(items)


def test_later_weights_change_neither_vectors_nor_fingerprint(tiny_bert, onnx, exports):
    encoder = Encoder(tiny_bert, backend="onnx", cache=exports)
    vectors, fingerprint = encoder.encode_query(TEXTS), encoder.fingerprint
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), vectors)
    assert encoder.fingerprint == fingerprint


def test_forward_is_refused(tiny_bert, onnx, exports):
    encoder = Encoder(tiny_bert, backend="onnx", cache=exports)
    for texts in (TEXTS, []):
        with pytest.raises(ValueError, match="'onnx' only encodes; forward and training need backend='torch'"):
            encoder.forward(texts, "query")


def test_models_that_are_refused(tiny_bert, static_model):
    with pytest.raises(ValueError, match="static embeddings are fastest with backend='torch'"):
        Encoder(static_model, backend="openvino-int8")
    with pytest.raises(ValueError, match="'tensorrt' is none of torch, onnx, onnx-int8, openvino"):
        Encoder(tiny_bert, backend="tensorrt")
    model = SentenceTransformer(str(tiny_bert), device="cpu", prompts={"query": "vegan: "})
    model[1] = Pooling(32, "mean", include_prompt=False)
    with pytest.raises(ValueError, match="cannot leave the prompt out of the pooling"):
        Encoder(model, backend="onnx")
    with pytest.raises(ValueError, match="runs on the CPU and the model is on meta; give device='cpu'"):
        backends.load_backend(SentenceTransformer(str(tiny_bert), device="cpu").to("meta"), "onnx", None, "")


@pytest.mark.parametrize(("backend", "package"), [("onnx-int8", "onnxruntime"), ("openvino", "onnxscript"), ("openvino", "openvino")])  # fmt: skip
def test_a_missing_package_is_named(tiny_bert, monkeypatch, backend, package):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, logging)  # anything that is there
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(backends, "_export", lambda *_: pytest.fail("exports before it looks"))
    extra = backend.partition("-")[0]
    with pytest.raises(ImportError, match=rf'{package}; install with: pip install "taoemb\[{extra}\]"'):
        Encoder(tiny_bert, backend=backend)


def test_openvino_reports_nothing():
    need("openvino")
    openvino = backends._import_openvino()
    assert openvino.tools.ovc.telemetry_utils.tm.__name__.endswith("telemetry_stub")
    assert "openvino_telemetry" not in sys.modules


def test_logging_stays_as_it_was(tiny_bert, onnx, monkeypatch):
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", raising=False)
    monkeypatch.setattr(logging.root, "handlers", [])
    before = logging.root.level
    Encoder(tiny_bert, backend="onnx-int8")
    assert not logging.root.handlers
    assert logging.root.level == before


def test_an_export_with_other_vectors_is_refused(tiny_bert, onnx, monkeypatch):
    monkeypatch.setattr(backends, "_load_onnx", lambda *_: lambda features: np.ones((len(features["input_ids"]), 32)))
    with pytest.raises(RuntimeError, match="does not give this model's vectors"):
        Encoder(tiny_bert, backend="onnx")


# Cache ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def count_exports(tiny_bert, onnx, exports, monkeypatch):
    """Counts exports, which are copies of one for ``onnx``: faster."""
    Encoder(tiny_bert, backend="onnx", cache=exports / "one")
    (model,) = exported(exports / "one")
    calls = []

    def export(*given):
        calls.append(given)
        shutil.copytree(model, given[2], dirs_exist_ok=True, ignore=shutil.ignore_patterns("export.json"))

    monkeypatch.setattr(backends, "_export", export)
    return calls


def exported(cache):
    return sorted(folder for folder in cache.iterdir() if folder.is_dir())


def test_exports_are_made_once(tiny_bert, tmp_path, count_exports):
    first = Encoder(tiny_bert, backend="onnx", cache=tmp_path)
    again = Encoder(shutil.copytree(tiny_bert, tmp_path / "model"), backend="onnx", cache=tmp_path)
    assert len(count_exports) == 1
    np.testing.assert_array_equal(again.encode_query(TEXTS), first.encode_query(TEXTS))
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model[1] = Pooling(32, "cls")  # the same weights
    with pytest.raises(RuntimeError, match="does not give this model's vectors"):  # the copied export is no other
        Encoder(model, backend="onnx", cache=tmp_path)
    assert len(count_exports) == 2


def test_a_damaged_export_is_made_again(tiny_bert, tmp_path, count_exports):
    wanted = Encoder(tiny_bert, backend="onnx", cache=tmp_path).encode_query(TEXTS)
    (folder,) = exported(tmp_path)
    for file in sorted(folder.iterdir()):
        file.write_bytes(file.read_bytes()[:-5])
        found = Encoder(tiny_bert, backend="onnx", cache=tmp_path).encode_query(TEXTS)
        np.testing.assert_array_equal(found, wanted)
    assert len(count_exports) == 1 + len(list(folder.iterdir()))


def test_a_killed_export_is_not_used(tiny_bert, tmp_path, monkeypatch, count_exports, exports):
    def killed(model, example, folder, int8):
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backends, "_export", killed)
        with pytest.raises(KeyboardInterrupt):
            Encoder(tiny_bert, backend="onnx", cache=tmp_path)
    assert [folder.name[0] for folder in exported(tmp_path)] == ["."]
    found = Encoder(tiny_bert, backend="onnx", cache=tmp_path).encode_query(TEXTS)
    np.testing.assert_array_equal(found, Encoder(tiny_bert, backend="onnx", cache=exports).encode_query(TEXTS))
    assert [folder.name[0] != "." for folder in exported(tmp_path)] == [True]


def test_without_a_cache_nothing_is_left(tiny_bert, onnx, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    encoder = Encoder(tiny_bert, backend="onnx")
    assert not list(tmp_path.iterdir())
    np.testing.assert_allclose(encoder.encode_query(TEXTS), Encoder(tiny_bert).encode_query(TEXTS), atol=1e-4)
