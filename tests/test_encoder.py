import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding

from taoemb.catalog import Item, ItemTemplate
from taoemb.encoder import Encoder

TEXTS = [
    "red face cream",
    "",
    "cream",
    "a much longer text about a vegan face cream for dry skin, 50 ml",
    "red face cream",
]
PROMPTS = {"query": "vegan: ", "document": "dry skin: "}


@pytest.fixture(params=["static_model", "tiny_bert"])
def folder(request):
    return request.getfixturevalue(request.param)


def unit(vectors):
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def with_prompts(folder, prompts, tmp_path, **settings):
    """A copy of a model with these prompts in its config."""
    model = SentenceTransformer(str(folder), device="cpu", prompts=prompts, **settings)
    model.save(str(tmp_path / "prompted"), create_model_card=False)
    return tmp_path / "prompted"


# Against sentence-transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [{}, PROMPTS, {"query": "search: "}, {"passage": "p: "}])
def test_gives_the_vectors_of_sentence_transformers(folder, prompts, tmp_path):
    folder = with_prompts(folder, prompts, tmp_path)
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), Encoder(folder, device="cpu")
    queries, documents = ours.encode_query(TEXTS), ours.encode_document(TEXTS)
    np.testing.assert_allclose(queries, unit(theirs.encode_query(TEXTS)), atol=1e-6)
    wanted = theirs.encode_document(TEXTS, prompt=prompts.get("passage") or prompts.get("document") or "")
    np.testing.assert_allclose(documents, unit(wanted), atol=1e-6)
    assert queries.dtype == documents.dtype == np.float32
    assert queries.shape == (len(TEXTS), ours.dimension)
    if prompts:
        assert not np.allclose(queries, documents, atol=1e-3)
    else:
        np.testing.assert_array_equal(queries, documents)


def test_default_prompt_is_for_neither_side(folder, tmp_path):
    prompted = with_prompts(folder, {"cluster": "cluster: "}, tmp_path, default_prompt_name="cluster")
    theirs, ours = SentenceTransformer(str(prompted), device="cpu"), Encoder(prompted, device="cpu")
    np.testing.assert_allclose(ours.encode_query(TEXTS), unit(theirs.encode_query(TEXTS)), atol=1e-6)
    np.testing.assert_allclose(ours.forward(TEXTS, "query").detach().numpy(), ours.encode_query(TEXTS), atol=1e-6)


def test_prompt_left_out_of_the_pooling(tiny_bert, tmp_path):
    model = SentenceTransformer(str(tiny_bert), device="cpu", prompts=PROMPTS)
    model[1] = Pooling(32, "mean", include_prompt=False)
    wanted = unit(model.encode_query(TEXTS[2:]))
    ours = Encoder(model)
    np.testing.assert_allclose(ours.encode_query(TEXTS[2:]), wanted, atol=1e-6)
    np.testing.assert_allclose(ours.forward(TEXTS[2:], "query").detach().numpy(), wanted, atol=1e-6)
    included = Encoder(SentenceTransformer(str(tiny_bert), device="cpu", prompts=PROMPTS))
    assert not np.allclose(included.encode_query(TEXTS[2:]), wanted, atol=1e-3)


# Encoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [{}, PROMPTS])
def test_forward_gives_what_encode_gives(folder, prompts, tmp_path):
    encoder = Encoder(with_prompts(folder, prompts, tmp_path), device="cpu", batch_size=2)
    for kind, encode in (("query", encoder.encode_query), ("document", encoder.encode_document)):
        vectors = encoder.forward(TEXTS, kind)
        assert vectors.requires_grad
        np.testing.assert_allclose(vectors.detach().numpy(), encode(TEXTS), atol=1e-6)


def test_unit_rows_and_empty_text(static_model, tiny_bert):
    for folder in (static_model, tiny_bert):
        norms = np.linalg.norm(Encoder(folder).encode_query(["red cream", "cream"]), axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-6)
    static = Encoder(static_model)
    np.testing.assert_array_equal(static.encode_query(["", "cream", " "])[[0, 2]], np.zeros((2, 16)))
    np.testing.assert_array_equal(static.encode_query([""]), np.zeros((1, 16)))
    assert np.linalg.norm(Encoder(tiny_bert).encode_query([""])) == pytest.approx(1)  # [CLS] [SEP]


def test_gradient_reaches_the_weights(folder):
    encoder = Encoder(folder)
    target = torch.nn.functional.normalize(torch.ones(encoder.dimension), dim=0)
    (encoder.forward(TEXTS, "query") @ target).sum().backward()
    gradients = [p.grad for p in encoder.model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)  # also through the zero row of the empty text
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_static_gradient_is_the_hand_computed_one(static_model):
    encoder = Encoder(static_model)
    weight = encoder.model[0].embedding.weight
    (row,) = encoder.model[0].tokenizer.encode("cream").ids
    x = weight[row].detach().clone()
    target = torch.arange(16, dtype=torch.float32)
    (encoder.forward(["cream"], "query") @ target).sum().backward()
    length, y = x.norm(), x / x.norm()
    wanted = (target - (target @ y) * y) / length  # derivative of x / |x|
    torch.testing.assert_close(weight.grad[row], wanted, rtol=1e-5, atol=1e-5)
    others = torch.ones(len(weight), dtype=torch.bool)
    others[row] = False
    assert not weight.grad[others].any()


def test_no_texts(folder):
    encoder = Encoder(folder)
    assert encoder.encode_query([]).shape == (0, encoder.dimension)
    assert encoder.encode_document([]).shape == (0, encoder.dimension)
    assert encoder.forward([], "query").shape == (0, encoder.dimension)


def test_one_text_is_refused(static_model):
    encoder = Encoder(static_model)
    for call in (encoder.encode_query, encoder.encode_document, lambda text: encoder.forward(text, "query")):
        with pytest.raises(TypeError, match="got one text: 'red cream'; put it in a list"):
            call("red cream")


def test_items_go_through_the_template(folder):
    items = [Item("1", "Mug", brand="Acme"), Item("2", "Cup", description="blue")]
    encoder = Encoder(folder, template=ItemTemplate(fields=("brand", "title")))
    np.testing.assert_array_equal(encoder.encode_document(items), encoder.encode_document(["Acme | Mug", "Cup"]))
    assert encoder.item_texts([items[0], "as it is"]) == ["Acme | Mug", "as it is"]


def test_encoding_leaves_training_mode_and_uses_no_dropout(tiny_bert):
    encoder = Encoder(tiny_bert)
    calm = encoder.encode_query(TEXTS)
    assert not encoder.model.training
    encoder.model.train()
    encoder.model[1].eval()  # a module that somebody keeps out of training
    assert not np.allclose(encoder.forward(TEXTS, "query").detach().numpy(), calm, atol=1e-3)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), calm)
    assert encoder.model.training
    assert encoder.model[0].training
    assert not encoder.model[1].training


def test_batches_do_not_change_vectors(folder, small_shop):
    texts = ItemTemplate().texts(small_shop.items[:40])
    small, large = Encoder(folder, batch_size=3), Encoder(folder, batch_size=1000)
    np.testing.assert_allclose(small.encode_document(texts), large.encode_document(texts), atol=1e-6)


def test_token_cache_changes_nothing(static_model, monkeypatch, small_shop):
    texts = ItemTemplate().texts(small_shop.items[:50])
    fresh = Encoder(static_model).encode_document(texts)
    encoder = Encoder(static_model)
    shuffled = np.random.default_rng(0).permutation(50)
    encoder.encode_query([texts[i] for i in shuffled])
    encoder.encode_document(texts[:7])
    np.testing.assert_array_equal(encoder.encode_document(texts), fresh)
    monkeypatch.setattr("taoemb.encoder._TOKEN_CACHE_TEXTS", 20)
    small = Encoder(static_model, batch_size=15)
    for _ in range(2):
        np.testing.assert_allclose(small.encode_document(texts), fresh, atol=1e-7)
        assert list(small._tokens["document"]) == texts[:20]  # of a larger catalog a part is found again each time
    np.testing.assert_allclose(small.encode_document(texts[:5] * 8), np.concatenate([fresh[:5]] * 8), atol=1e-7)
    assert len(small._tokens["document"]) <= 20


def test_token_cache_keeps_prompts_apart(static_model, tmp_path):
    encoder = Encoder(with_prompts(static_model, PROMPTS, tmp_path))
    first, other = encoder.encode_query(TEXTS), encoder.encode_document(TEXTS)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), first)
    assert not np.allclose(first, other, atol=1e-3)


def test_another_thing_than_a_folder_or_a_model():
    with pytest.raises(FileNotFoundError, match="neither a folder nor a model"):
        Encoder("no-such-folder/model")


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a sentence-transformers model"):
        Encoder(tmp_path)


def test_a_model_with_damaged_weights(static_model, tmp_path):
    Encoder(static_model).save(tmp_path / "m")
    (weights,) = (tmp_path / "m").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a sentence-transformers model"):
        Encoder(tmp_path / "m")


def test_truncated_models_are_refused(tiny_bert):
    with pytest.raises(ValueError, match="truncate_dim=8"):
        Encoder(SentenceTransformer(str(tiny_bert), device="cpu", truncate_dim=8))


def test_half_precision_models_become_float32(static_model):
    half = SentenceTransformer(str(static_model), device="cpu").half()
    encoder = Encoder(half)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    np.testing.assert_allclose(encoder.encode_query(TEXTS), Encoder(static_model).encode_query(TEXTS), atol=2e-3)


# Saving, fingerprint, copies -----------------------------------------------------------------------------------------


def test_saved_model_loads_in_sentence_transformers_and_here(folder, tmp_path):
    encoder = Encoder(with_prompts(folder, PROMPTS, tmp_path), template=ItemTemplate(fields=("title",), max_chars=30))
    encoder.save(tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert isinstance(plain[-1], Normalize)
    np.testing.assert_allclose(plain.encode_query(TEXTS), encoder.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(plain.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=1e-6)
    again = Encoder(tmp_path / "saved")
    assert again.template == encoder.template
    assert again.prompts == encoder.prompts
    assert len(again.model) == len(encoder.model)  # no second Normalize
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.encode_query(TEXTS), encoder.encode_query(TEXTS))
    again.save(tmp_path / "saved")  # in its own place
    assert Encoder(tmp_path / "saved").fingerprint == encoder.fingerprint


def test_saving_replaces_only_models(static_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"modules\.json"):
        Encoder(static_model).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_given_template_wins_over_the_saved_one(static_model, tmp_path):
    Encoder(static_model, template=ItemTemplate(max_chars=10)).save(tmp_path / "m")
    assert Encoder(tmp_path / "m", template=ItemTemplate(max_chars=20)).template.max_chars == 20
    saved = json.loads((tmp_path / "m" / "taoemb.json").read_text())
    assert saved["item_template"]["max_chars"] == 10


def test_fingerprint_changes_with_what_decides_an_embedding(folder, tmp_path):
    base = Encoder(folder)
    assert Encoder(folder).fingerprint == base.fingerprint
    assert base.copy().fingerprint == base.fingerprint
    different = {
        "template": Encoder(folder, template=ItemTemplate(max_chars=399)),
        "prompts": Encoder(with_prompts(folder, PROMPTS, tmp_path)),
        "query prompt": Encoder(with_prompts(folder, {"query": "query: "}, tmp_path / "q")),
        "weights": base.copy(),
    }
    with torch.no_grad():
        next(different["weights"].model.parameters()).view(-1)[3] += 1e-6
    prints = {name: encoder.fingerprint for name, encoder in different.items()}
    assert len({base.fingerprint, *prints.values()}) == 5, prints
    base.encode_query(TEXTS)
    base.model.train()
    assert base.fingerprint == Encoder(folder).fingerprint  # neither use nor mode changes it


def test_fingerprint_sees_modules(tiny_bert):
    def with_pooling(mode):
        model = SentenceTransformer(str(tiny_bert), device="cpu")
        model[1] = Pooling(32, mode)
        return Encoder(model).fingerprint

    assert with_pooling("mean") == Encoder(tiny_bert).fingerprint
    assert with_pooling("cls") != Encoder(tiny_bert).fingerprint
    shorter = SentenceTransformer(str(tiny_bert), device="cpu")
    shorter.max_seq_length = 16
    assert Encoder(shorter).fingerprint != Encoder(tiny_bert).fingerprint


def test_fingerprint_of_a_scalar_weight(static_model):
    model = SentenceTransformer(str(static_model), device="cpu")
    model[0].register_buffer("scale", torch.tensor(1.0))
    one = Encoder(model).fingerprint
    model[0].scale.fill_(2)
    assert Encoder(model).fingerprint != one


def test_copy_is_independent(folder):
    encoder = Encoder(folder, template=ItemTemplate(max_chars=50), batch_size=7)
    before = encoder.encode_query(TEXTS)
    other = encoder.copy()
    assert (other.template, other.batch_size) == (encoder.template, 7)
    np.testing.assert_array_equal(other.encode_query(TEXTS), before)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), before)
    assert not np.allclose(other.encode_query(TEXTS), before, atol=1e-3)


def test_module_chain_behind_static_embeddings(static_model):
    model = SentenceTransformer(str(static_model), device="cpu")
    assert isinstance(model[0], StaticEmbedding)
    model.append(Dense(16, 4))
    wanted = unit(model.encode_query(TEXTS))
    encoder = Encoder(model)
    assert encoder.dimension == 4
    np.testing.assert_allclose(encoder.encode_query(TEXTS), wanted, atol=1e-6)
