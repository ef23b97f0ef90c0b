import dataclasses
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from taoemb import backbone
from taoemb.backbone import BackboneConfig, prepare
from taoemb.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint, save_weights
from taoemb.encoder import Encoder
from taoemb.gradcache import GradCache

TEXTS = ["red face cream", "cream", "a much longer text about a vegan face cream for dry skin , 50 ml", "dry skin"]
LORA = BackboneConfig(lora_rank=4, lora_alpha=8)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def train(encoder, steps=3, learning_rate=0.01):
    """Steps on a random target, on both sides; the same targets for the same random state."""
    optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=learning_rate, weight_decay=0.0)
    train_with(encoder, optimizer, steps)


def train_with(encoder, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(
            (encoder.forward(TEXTS, kind) @ torch.randn(encoder.dimension)).sum() for kind in ("query", "document")
        )
        loss.backward()
        optimizer.step()


def prepared(folder, **settings):
    encoder = Encoder(folder)
    prepare(encoder, BackboneConfig(**settings))
    return encoder


def assert_same_as_sentence_transformers(folder, encoder, atol=1e-5):
    plain = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(plain.encode_query(TEXTS), encoder.encode_query(TEXTS), atol=atol)
    np.testing.assert_allclose(plain.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=atol)
    return plain


@pytest.fixture(params=["static_model", "tiny_bert", "tiny_llm"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny_bert", "tiny_llm"])
def transformer(request):
    return request.getfixturevalue(request.param)


# Decoder LLMs --------------------------------------------------------------------------------------------------------


def last_tokens(folder, texts):
    """The oracle: plain transformers, one text at a time, hidden state of the last token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1].numpy() for text in texts]
    return unit(np.stack(states))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_bare_decoder_gives_its_last_tokens(tiny_llm, side, batch_size):
    encoder = Encoder(tiny_llm, batch_size=batch_size)
    encoder.model.tokenizer.padding_side = side
    wanted = last_tokens(tiny_llm, TEXTS)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), wanted, atol=1e-5)
    np.testing.assert_allclose(encoder.forward(TEXTS, "document").detach().numpy(), wanted, atol=1e-5)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    assert encoder.dimension == 32


def test_decoder_without_language_head_is_known_by_its_attention(tiny_llm, tmp_path):
    AutoModel.from_pretrained(tiny_llm).save_pretrained(tmp_path)  # architectures: LlamaModel
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    assert SentenceTransformer(str(tmp_path), device="cpu")[1].pooling_mode == "mean"  # what is mended here
    np.testing.assert_allclose(Encoder(tmp_path).encode_query(TEXTS), last_tokens(tiny_llm, TEXTS), atol=1e-5)


def test_bare_encoder_keeps_mean_pooling(tiny_bert, tmp_path):
    bert = SentenceTransformer(str(tiny_bert), device="cpu")
    bert[0].auto_model.save_pretrained(tmp_path)
    bert[0].tokenizer.save_pretrained(tmp_path)
    np.testing.assert_allclose(Encoder(tmp_path).encode_query(TEXTS), unit(bert.encode(TEXTS)), atol=1e-6)


def test_sentence_transformers_folder_keeps_its_own_pooling(tiny_llm, tmp_path):
    parts = [Transformer(str(tiny_llm), model_kwargs={"dtype": torch.float32}), Pooling(32, "mean")]
    parts[0].tokenizer.pad_token = "</s>"
    theirs = SentenceTransformer(modules=parts, device="cpu")
    theirs.save(str(tmp_path / "m"), create_model_card=False)
    ours = Encoder(tmp_path / "m")
    np.testing.assert_allclose(ours.encode_query(TEXTS), unit(theirs.encode(TEXTS)), atol=1e-5)
    assert not np.allclose(ours.encode_query(TEXTS), last_tokens(tiny_llm, TEXTS), atol=1e-2)


def test_saved_decoder_is_the_same_in_sentence_transformers(tiny_llm, tmp_path):
    encoder = Encoder(tiny_llm)
    encoder.save(tmp_path / "m")
    plain = assert_same_as_sentence_transformers(tmp_path / "m", encoder)
    assert plain.tokenizer.pad_token == "</s>"
    assert Encoder(tmp_path / "m").fingerprint == encoder.fingerprint


def test_texts_without_tokens_give_zero_rows(tiny_llm):
    encoder = Encoder(tiny_llm)
    for texts in ([""], ["", ""], ["", "cream"]):
        vectors = encoder.encode_query(texts)
        np.testing.assert_array_equal(vectors[0], np.zeros(32))
        out = encoder.forward(texts, "query")
        np.testing.assert_allclose(out.detach().numpy(), vectors, atol=1e-6)
        out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.model.parameters() if p.grad is not None)
    np.testing.assert_allclose(encoder.encode_query(["", "cream"])[1:], last_tokens(tiny_llm, ["cream"]), atol=1e-5)


def test_tokenizer_without_pad_and_eos(tiny_llm, tmp_path):
    shutil.copytree(tiny_llm, tmp_path / "m")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_llm / "tokenizer.json"), unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="neither a pad nor an eos token.*set pad_token in its tokenizer_config.json"):
        Encoder(tmp_path / "m")


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tower": "three"}, "tower='three': give shared, query_only, two_tower"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_rank": 4, "merge_lora": False, "tower": "two_tower"}, "merge_lora=false, tower='two_tower'"),
        ({"tower_sharing": 1.0}, "tower_sharing=1.0: give a share from 0 to below 1; .*tower='shared'"),
        ({"lora_targets": ()}, "lora_targets=\\[\\]"),
        ({"lora_targets": ("all-linear", "q_proj")}, "'all-linear' alone"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**settings)


@pytest.mark.parametrize("setting", ["lora_rank", "bf16", "gradient_checkpointing", "torch_compile"])
def test_static_models_are_refused_what_is_for_transformers(static_model, setting):
    encoder = Encoder(static_model)
    before = encoder.fingerprint
    with pytest.raises(ValueError, match=f"{setting}: for transformers, and this model starts with StaticEmbedding"):
        prepare(encoder, BackboneConfig(tower="two_tower", **{setting: 4 if setting == "lora_rank" else True}))
    assert encoder.fingerprint == before  # refused before anything was changed


def test_what_cannot_be_prepared(tiny_bert, monkeypatch):
    encoder = Encoder(tiny_bert)
    before = encoder.fingerprint
    with pytest.raises(ValueError, match=r"lora_targets=.*no_such_layer"):
        prepare(Encoder(tiny_bert), dataclasses.replace(LORA, lora_targets=("no_such_layer",)))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r'pip install "taoemb\[lora\]"'):
            prepare(encoder, dataclasses.replace(LORA, tower="two_tower"))
    assert encoder.fingerprint == before
    towers = prepared(tiny_bert, tower="two_tower")
    with pytest.raises(ValueError, match="merge_lora=false, tower='two_tower'.*Router"):
        prepare(towers, dataclasses.replace(LORA, merge_lora=False))
    encoder.backend = "onnx"
    with pytest.raises(ValueError, match="backend 'onnx' only encodes"):
        prepare(encoder, BackboneConfig())


# Towers --------------------------------------------------------------------------------------------------------------


def test_static_embeddings_get_two_towers_and_transformers_one(folder):
    static = Encoder(folder).static
    encoder = prepared(folder)
    assert isinstance(encoder.model[0], Router) == static
    assert encoder.tower_sharing == (0.3 if static else 0)
    encoder = prepared(folder, tower="two_tower")
    for one_tower in (False, True):
        prepare(encoder, BackboneConfig(), one_tower=one_tower)  # what it is already
    assert encoder.copy().tower_sharing == 0.3
    assert not encoder.items_fixed


def test_one_tower_is_for_where_none_is_named(folder):
    encoder = Encoder(folder)
    prepare(encoder, BackboneConfig(), one_tower=True)
    assert not isinstance(encoder.model[0], Router)
    prepare(encoder, BackboneConfig(tower="two_tower"), one_tower=True)
    assert isinstance(encoder.model[0], Router)


def test_towers_share_their_gradients(folder):
    encoder = prepared(folder, tower="two_tower", tower_sharing=0.25)
    towers = [encoder.model[0].sub_modules[kind] for kind in ("query", "document")]
    cache = GradCache(encoder, chunk_size=0)
    own = []
    for kind in ("query", "document"):
        encoder.tower_sharing = 0.0
        cache.encode(TEXTS, kind)[:, 0].sum().backward()
        cache.backward()
        own.append([None if p.grad is None else p.grad.clone() for p in towers[len(own)].parameters()])
        encoder.model.zero_grad()
    encoder.tower_sharing = 0.25
    (cache.encode(TEXTS, "query")[:, 0].sum() + cache.encode(TEXTS, "document")[:, 0].sum()).backward()
    cache.backward()
    for tower, (one, other) in zip(towers, (own, own[::-1]), strict=True):
        for parameter, mine, theirs in zip(tower.parameters(), one, other, strict=True):
            if mine is not None:
                torch.testing.assert_close(parameter.grad, mine + 0.25 * theirs)
    assert any(mine is not None and bool(mine.any()) for mine in own[0])


def test_towers_of_two_kinds_share_nothing(static_model, tiny_bert):
    bert, static, other = (list(Encoder(folder).model)[:-1] for folder in (tiny_bert, static_model, static_model))
    tokens = json.loads(other[0].tokenizer.to_str())
    words = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = dict(zip(words, [1, 0, *list(words.values())[2:]], strict=True))
    other[0].tokenizer = Tokenizer.from_str(json.dumps(tokens))
    for items in (bert, other):  # another architecture; the same words in other rows
        encoder = Encoder(SentenceTransformer(modules=[Router.for_query_document(static, items)], device="cpu"))
        prepare(encoder, BackboneConfig())
        assert encoder.tower_sharing == 0


def test_adapters_of_two_towers_begin_alike(tiny_bert):
    encoder = prepared(tiny_bert, lora_rank=4, tower="two_tower")
    assert encoder.tower_sharing == 0.3
    towers = (encoder.model[0].sub_modules[kind].named_parameters() for kind in ("query", "document"))
    for (name, query), (_, item) in zip(*towers, strict=True):
        torch.testing.assert_close(query, item, msg=name)


def test_shared_is_what_an_encoder_is_anyway(folder):
    encoder, plain = prepared(folder, tower="shared"), Encoder(folder)
    assert encoder.fingerprint == plain.fingerprint
    assert len(encoder.trainable_parameters()) == len(plain.trainable_parameters()) == len([*plain.model.parameters()])
    assert not encoder.items_fixed


@pytest.mark.parametrize("tower", ["query_only", "two_tower"])
def test_towers_begin_as_the_model_and_part_in_training(folder, tower, tmp_path):
    start = Encoder(folder)
    query, document = start.encode_query(TEXTS), start.encode_document(TEXTS)
    encoder = prepared(folder, tower=tower)
    assert isinstance(encoder.model[0], Router)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), query)
    np.testing.assert_array_equal(encoder.encode_document(TEXTS), document)
    assert encoder.dimension == start.dimension
    assert encoder.batch_size == start.batch_size
    assert encoder.items_fixed == (tower == "query_only")
    both, one = list(encoder.model.parameters()), list(start.model.parameters())
    assert len(both) == 2 * len(one)
    assert len(encoder.trainable_parameters()) == (len(one) if tower == "query_only" else len(both))

    encoder.model.train()
    vectors = encoder.forward(TEXTS, "document")
    assert vectors.requires_grad == (tower == "two_tower")
    if tower == "query_only":
        np.testing.assert_allclose(vectors.numpy(), document, atol=1e-6)  # no dropout on what does not train
        assert encoder.model[0].sub_modules["document"].training
        optimizer = torch.optim.SGD(encoder.trainable_parameters(), lr=0.1)
        (encoder.forward(TEXTS, "query") @ torch.ones(encoder.dimension)).sum().backward()
        optimizer.step()
        np.testing.assert_array_equal(encoder.encode_document(TEXTS), document)
    else:
        train(encoder)
        assert not np.allclose(encoder.encode_document(TEXTS), document, atol=1e-3)
        assert not np.allclose(encoder.encode_document(TEXTS), encoder.encode_query(TEXTS), atol=1e-3)
    assert not np.allclose(encoder.encode_query(TEXTS), query, atol=1e-3)

    encoder.save(tmp_path / "m")
    assert_same_as_sentence_transformers(tmp_path / "m", encoder)
    again = Encoder(tmp_path / "m")
    assert again.fingerprint == encoder.fingerprint == encoder.copy().fingerprint
    np.testing.assert_allclose(again.forward(TEXTS, "query").detach().numpy(), again.encode_query(TEXTS), atol=1e-6)
    prepare(again, BackboneConfig(tower=tower))
    prepare(again, BackboneConfig(tower=tower))
    assert again.fingerprint == encoder.fingerprint
    assert again.items_fixed == encoder.items_fixed
    assert len(again.trainable_parameters()) == len(encoder.trainable_parameters())
    with pytest.raises(ValueError, match="tower='shared': the model has two towers"):
        prepare(again, BackboneConfig(tower="shared"))


def test_prompts_reach_the_towers(folder, tmp_path):
    encoder = Encoder(folder)
    model = encoder.model
    model.prompts = {"query": "vegan ", "document": "dry "}
    wanted = Encoder(model)
    queries, documents = wanted.encode_query(TEXTS), wanted.encode_document(TEXTS)
    wanted.save(tmp_path / "prompted")
    encoder = prepared(tmp_path / "prompted", tower="two_tower")
    np.testing.assert_allclose(encoder.encode_query(TEXTS), queries, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_document(TEXTS), documents, atol=1e-6)
    assert not np.allclose(queries, documents, atol=1e-3)
    encoder.save(tmp_path / "m")
    assert_same_as_sentence_transformers(tmp_path / "m", encoder)
    assert Encoder(tmp_path / "m").prompts == encoder.prompts


def test_towers_of_two_kinds(static_model, tiny_bert, tmp_path):
    """A Router made elsewhere: static queries, items by a transformer; each side as its own model gives it."""
    from sentence_transformers.sentence_transformer.modules import Dense

    bert, static = (
        SentenceTransformer(str(tiny_bert), device="cpu"),
        SentenceTransformer(str(static_model), device="cpu"),
    )
    static.append(Dense(16, 32))
    wanted = unit(static.encode(TEXTS)), unit(bert.encode(TEXTS))
    model = SentenceTransformer(modules=[Router.for_query_document(list(static), list(bert))], device="cpu")
    encoder = Encoder(model)
    assert isinstance(encoder.model[0].sub_modules["query"][0], StaticEmbedding)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), wanted[0], atol=1e-6)
    np.testing.assert_allclose(encoder.encode_document(TEXTS), wanted[1], atol=1e-6)
    assert encoder.batch_size == 64
    swapped = SentenceTransformer(modules=[Router.for_query_document(list(bert), list(static))], device="cpu")
    assert Encoder(swapped).fingerprint != encoder.fingerprint


def test_routers_that_are_no_towers(tiny_bert):
    modules = list(SentenceTransformer(str(tiny_bert), device="cpu"))
    with pytest.raises(ValueError, match=r"routes \['image', 'text'\].*for_query_document"):
        Encoder(SentenceTransformer(modules=[Router({"text": modules, "image": modules})], device="cpu"))
    tied = SentenceTransformer(modules=[Router.for_query_document(modules, modules)], device="cpu")
    with pytest.raises(ValueError, match="no weights that its items do not use too"):
        prepare(Encoder(tied), BackboneConfig(tower="query_only"))


def test_towers_are_for_the_torch_backend(tiny_bert, tmp_path):
    prepared(tiny_bert, tower="two_tower").save(tmp_path / "m")
    with pytest.raises(ValueError, match="backend 'onnx' cannot run a model with two towers; use backend='torch'"):
        Encoder(tmp_path / "m", backend="onnx")


# LoRA ----------------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_alone_and_starts_at_the_model(transformer):
    start = Encoder(transformer)
    encoder = Encoder(transformer)
    state = torch.get_rng_state()
    prepare(encoder, LORA)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), start.encode_query(TEXTS))
    names = {name for name, p in encoder.model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert len(names) == len(encoder.trainable_parameters())
    assert prepared(transformer, lora_rank=4, lora_alpha=8).fingerprint == encoder.fingerprint  # seeded
    frozen = {name: p.detach().clone() for name, p in encoder.model.named_parameters() if name not in names}
    before = encoder.fingerprint
    train(encoder)
    assert all(torch.equal(p, frozen[name]) for name, p in encoder.model.named_parameters() if name in frozen)
    assert encoder.fingerprint != before
    assert not np.allclose(encoder.encode_query(TEXTS), start.encode_query(TEXTS), atol=1e-3)


def test_lora_is_the_formula(tiny_llm):
    """W x + (alpha / r) B A x in the query projection of the first layer, by hand."""
    encoder = prepared(tiny_llm, lora_rank=4, lora_alpha=8, lora_targets=("q_proj",))
    train(encoder)
    layer = encoder.model[0].auto_model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32)
    wanted = x @ layer.base_layer.weight.T + 8 / 4 * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), wanted)
    names = [name for name, p in encoder.model.named_parameters() if p.requires_grad]
    assert len(names) == 4  # A and B in two layers
    assert all("q_proj" in name for name in names)


@pytest.mark.parametrize("tower", ["shared", "query_only", "two_tower"])
def test_saving_merges_and_leaves_the_training_encoder_alone(transformer, tower, tmp_path):
    encoder = prepared(transformer, tower=tower, lora_rank=4, lora_alpha=8)
    encoder.model.train()
    train(encoder)
    before, queries = encoder.fingerprint, encoder.encode_query(TEXTS)
    twin = encoder.copy()
    encoder.save(tmp_path / "m")
    assert encoder.fingerprint == before
    assert encoder.model.training
    np.testing.assert_array_equal(encoder.encode_query(TEXTS), queries)
    assert not list((tmp_path / "m").rglob("adapter*"))
    plain = assert_same_as_sentence_transformers(tmp_path / "m", encoder)
    assert not any("lora" in name for name in plain.state_dict())
    twin.model.train()
    for one in (encoder, twin):  # it goes on as one that was never saved
        torch.manual_seed(1)
        train(one)
    assert encoder.fingerprint == twin.fingerprint != before


def test_merged_weights_are_those_of_peft(tiny_llm, tmp_path):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    encoder = prepared(tiny_llm, lora_rank=4, lora_alpha=8)
    train(encoder)
    encoder.save(tmp_path / "merged")
    learnt = get_peft_model_state_dict(encoder.model[0].auto_model)
    theirs = get_peft_model(
        AutoModel.from_pretrained(tiny_llm).float(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    set_peft_model_state_dict(theirs, {f"base_model.model.{name}": tensor for name, tensor in learnt.items()})
    wanted = theirs.merge_and_unload().state_dict()
    ours = AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    assert wanted.keys() == ours.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(ours[name], weight, msg=name)


def test_adapter_folder(transformer, tmp_path):
    encoder = prepared(transformer, lora_rank=4, lora_alpha=8, merge_lora=False)
    train(encoder)
    before = encoder.fingerprint
    encoder.save(tmp_path / "m")
    assert encoder.fingerprint == before
    assert len(list((tmp_path / "m").rglob("adapter_model.safetensors"))) == 1
    assert_same_as_sentence_transformers(tmp_path / "m", encoder)
    base = Encoder(tmp_path / "m" / "base")
    np.testing.assert_allclose(base.encode_query(TEXTS), Encoder(transformer).encode_query(TEXTS), atol=1e-6)
    again = Encoder(tmp_path / "m")
    assert again.fingerprint == before
    again.save(tmp_path / "again")  # stays an adapter
    assert_same_as_sentence_transformers(tmp_path / "again", encoder)
    prepare(again, BackboneConfig(lora_rank=4, lora_alpha=8, merge_lora=False))
    assert again.fingerprint == before
    assert len(again.trainable_parameters()) == len(encoder.trainable_parameters())
    with pytest.raises(ValueError, match="lora_rank=2: the model carries adapters with 4; give the same"):
        prepare(Encoder(tmp_path / "m"), BackboneConfig(lora_rank=2, lora_alpha=8))
    with pytest.raises(ValueError, match=r"lora_targets=\['value'\]: the model carries adapters of"):
        prepare(Encoder(tmp_path / "m"), BackboneConfig(lora_rank=4, lora_alpha=8, lora_targets=("value",)))
    full = Encoder(tmp_path / "m")
    prepare(full, BackboneConfig())  # merged, then trained whole
    np.testing.assert_allclose(full.encode_query(TEXTS), encoder.encode_query(TEXTS), atol=1e-5)
    assert not any("lora" in name for name in full.model.state_dict())
    assert all(p.requires_grad for p in full.trainable_parameters())


def test_adapter_that_transformers_does_not_load(tiny_bert, tmp_path):
    """As peft and sentence-transformers write it: transformers 5.3 would leave it at random and say nothing."""
    encoder = prepared(tiny_bert, lora_rank=4, merge_lora=False)
    train(encoder)
    encoder.save(tmp_path / "m")
    weights = tmp_path / "m" / "adapter_model.safetensors"
    save_file({f"wrong.{name}": tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="did not load the weights of its adapter; merge it with peft"):
        Encoder(tmp_path / "m")


def test_moved_adapter_folder_says_what_to_do(tiny_bert, tmp_path):
    encoder = prepared(tiny_bert, lora_rank=4, merge_lora=False)
    encoder.save(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "moved")
    base = str(tmp_path / "moved" / "base")
    with pytest.raises(ValueError, match=f"which is gone; write '{base}' as base_model_name_or_path"):
        Encoder(tmp_path / "moved")
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    np.testing.assert_allclose(Encoder(tmp_path / "moved").encode_query(TEXTS), encoder.encode_query(TEXTS), atol=1e-6)


def test_fingerprint_sees_the_scale_of_adapters(tiny_bert):
    one, other = prepared(tiny_bert, lora_rank=4, lora_alpha=8), prepared(tiny_bert, lora_rank=4, lora_alpha=16)
    states = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert one.fingerprint != other.fingerprint


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"lora_rank": 4}, {"lora_rank": 4, "lora_dropout": 0.2, "tower": "query_only"}, {"tower": "two_tower"}]
)
def test_a_resumed_run_is_the_uninterrupted_one(transformer, settings, tmp_path):
    def begin():
        encoder = prepared(transformer, **settings)
        encoder.model.train()
        optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=0.01)
        return {"encoder": encoder, "optimizer": optimizer, "identity": {"start_model": encoder.fingerprint}}

    torch.manual_seed(0)
    run = begin()
    train_with(run["encoder"], run["optimizer"], 2)
    save_checkpoint(tmp_path / "c", step=2, extra={}, **run)
    train_with(run["encoder"], run["optimizer"], 2)

    torch.manual_seed(99)
    resumed = begin()
    assert load_checkpoint(tmp_path / "c", **resumed).step == 2
    train_with(resumed["encoder"], resumed["optimizer"], 2)
    wanted = run["encoder"].model.state_dict()
    for name, tensor in resumed["encoder"].model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_checkpoint_of_lora_holds_only_what_trains(tiny_llm, tmp_path):
    encoder = prepared(tiny_llm, lora_rank=4)
    save_weights(encoder, tmp_path / "w.safetensors")
    saved = load_file(tmp_path / "w.safetensors")
    names = {name for name, p in encoder.model.named_parameters() if p.requires_grad}
    assert saved.keys() == names | {
        name for name, _ in encoder.model.named_buffers() if name in encoder.model.state_dict()
    }
    wanted = encoder.fingerprint
    train(encoder)
    assert encoder.fingerprint != wanted
    load_weights(encoder, tmp_path / "w.safetensors")
    assert encoder.fingerprint == wanted
    with pytest.raises(CheckpointError, match="holds other weights than this model trains"):
        load_weights(prepared(tiny_llm, lora_rank=8), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="repeat the settings"):
        load_weights(Encoder(tiny_llm), tmp_path / "w.safetensors")


# Precision, memory, compilation --------------------------------------------------------------------------------------


def gradients(encoder, kind="query"):
    encoder.model.zero_grad()
    target = torch.arange(encoder.dimension, dtype=torch.float32)
    (encoder.forward(TEXTS, kind) @ target).sum().backward()
    return {name: p.grad for name, p in encoder.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"tower": "two_tower"}, {"gradient_checkpointing": True}])
def test_bf16(transformer, settings):
    encoder, exact = prepared(transformer, bf16=True, **settings), Encoder(transformer)
    computed = []
    linear = next(m for m in encoder.model.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    vectors = encoder.forward(TEXTS, "query")
    assert computed[0] == torch.bfloat16
    assert vectors.dtype == torch.float32
    out, wanted = vectors.detach().numpy(), exact.encode_query(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-6)
    assert ((out * wanted).sum(axis=1) > 0.999).all()
    assert not np.array_equal(out, wanted)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), out, atol=0.02)  # other batches, other roundings
    found = gradients(encoder)
    assert found
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in found.values())
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    plain = prepared(transformer, **{**settings, "bf16": False})
    assert encoder.fingerprint != plain.fingerprint
    true = gradients(plain)
    name = max(true, key=lambda name: float(true[name].norm()))
    assert torch.nn.functional.cosine_similarity(found[name].flatten(), true[name].flatten(), dim=0) > 0.99


def test_bf16_vectors_become_float32_unit_rows(tiny_bert):
    """Also where the last module before the normalisation computes in bfloat16."""
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.append(Dense(32, 8))
    encoder = Encoder(model)
    wanted = encoder.encode_query(TEXTS)
    prepare(encoder, BackboneConfig(bf16=True))
    vectors = encoder.encode_query(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert ((vectors * wanted).sum(axis=1) > 0.999).all()


def saved_values(encoder, kind="query"):
    """How many values the graph of a forward pass keeps."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        encoder.forward(TEXTS, kind)
    return sum(sizes)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"tower": "query_only"}])
def test_gradient_checkpointing(transformer, settings, mode):
    thrifty, plain = prepared(transformer, gradient_checkpointing=True, **settings), prepared(transformer, **settings)
    for encoder in (thrifty, plain):
        getattr(encoder.model, mode)()
    calls = []
    first = next(backbone._layers(thrifty.model))
    attention = next(m for name, m in first.named_modules() if name.endswith(("attention", "self_attn")))
    attention.register_forward_hook(lambda *args: calls.append(1))
    torch.manual_seed(0)
    found = gradients(thrifty)
    assert len(calls) == 2  # forward, and once more for the backward pass
    torch.manual_seed(0)
    wanted = gradients(plain)
    assert found.keys() == wanted.keys()
    for name in wanted:  # the same dropout too, in training mode
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)
    assert saved_values(thrifty) < 0.6 * saved_values(plain)
    if mode == "eval":
        np.testing.assert_allclose(
            thrifty.forward(TEXTS, "query").detach().numpy(), thrifty.encode_query(TEXTS), atol=1e-6
        )


def test_gradient_checkpointing_is_of_each_copy_and_can_be_turned_off(tiny_bert, tmp_path):
    encoder = prepared(tiny_bert, gradient_checkpointing=True)
    prepare(encoder, BackboneConfig(gradient_checkpointing=True))
    layer = next(backbone._layers(encoder.model))
    assert layer.forward.func is checkpoint
    assert not hasattr(layer.forward.args[0], "func")  # once
    copied = next(backbone._layers(encoder.copy().model))
    assert copied.forward.args[0].__self__ is copied
    encoder.save(tmp_path / "m")
    assert Encoder(tmp_path / "m").fingerprint == encoder.fingerprint
    prepare(encoder, BackboneConfig())
    assert "forward" not in layer.__dict__


@pytest.fixture
def traced_only(monkeypatch):
    """Layers compiled without generated code, which takes a C++ compiler a minute."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **more: compile_module(module, backend="aot_eager", **more)
    )
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # of torch against itself
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers(tiny_llm, checkpointing, tmp_path):
    settings = {"gradient_checkpointing": checkpointing, "lora_rank": 4}
    encoder, plain = prepared(tiny_llm, torch_compile=True, **settings), prepared(tiny_llm, **settings)
    assert list(encoder.model.state_dict()) == list(plain.model.state_dict())  # no _orig_mod
    found, wanted = gradients(encoder), gradients(plain)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was compiled
    if checkpointing:
        assert saved_values(encoder) < 0.6 * saved_values(prepared(tiny_llm, lora_rank=4))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), plain.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.copy().encode_query(TEXTS), plain.encode_query(TEXTS), atol=1e-5)
    encoder.save(tmp_path / "m")
    assert_same_as_sentence_transformers(tmp_path / "m", plain)


@pytest.mark.filterwarnings("ignore")  # of torch against itself
def test_compiled_code(tiny_llm):
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except RuntimeError as error:  # no C++ compiler, or no headers
        pytest.skip(f"torch.compile does not work here: {error}")
    encoder = prepared(tiny_llm, torch_compile=True)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), Encoder(tiny_llm).encode_query(TEXTS), atol=1e-5)
    torch.compiler.reset()


def test_prepared_encoders_are_pickled(tiny_bert):
    """They go to other processes in `encode_corpus(devices=)`."""
    encoder = prepared(tiny_bert, gradient_checkpointing=True, lora_rank=4, bf16=True)
    other = pickle.loads(pickle.dumps(encoder))  # noqa: S301
    np.testing.assert_array_equal(other.encode_query(TEXTS), encoder.encode_query(TEXTS))
    assert other.fingerprint == encoder.fingerprint
