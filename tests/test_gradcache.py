import numpy as np
import pytest
import torch

from taoemb.catalog import ItemTemplate
from taoemb.encoder import Encoder
from taoemb.gradcache import GradCache

PLAIN = 10**6  # a chunk that holds everything: one graph, one pass


@pytest.fixture(params=["static_model", "tiny_bert"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def texts(small_shop):
    return small_shop.queries.texts[:7], ItemTemplate().texts(small_shop.items[:19])


def loss_of(query_BD, item_ND):
    """An InfoNCE over everything: no text's gradient can be had without the others."""
    scores = query_BD @ item_ND.T / 0.1
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(query_BD)))


def gradients(encoder):
    return {name: p.grad.clone() for name, p in encoder.model.named_parameters() if p.grad is not None}


def chunked(encoder, texts, chunk, steps=1):
    cache = GradCache(encoder, chunk)
    encoder.model.zero_grad()
    for _ in range(steps):
        loss = loss_of(cache.encode(texts[0], "query"), cache.encode(texts[1], "document"))
        loss.backward()
        cache.backward()
    return float(loss.detach()), gradients(encoder)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def plain(encoder, texts):
    encoder.model.zero_grad()
    loss = loss_of(encoder.forward(texts[0], "query"), encoder.forward(texts[1], "document"))
    loss.backward()
    return float(loss.detach()), gradients(encoder)


@pytest.mark.parametrize("chunk", [1, 2, 8, 19, PLAIN])
def test_gradients_are_those_of_one_batch(chunk, folder, texts):
    encoder = Encoder(folder)
    encoder.model.eval()
    wanted_loss, wanted = plain(encoder, texts)
    loss, found = chunked(encoder, texts, chunk)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same(found, wanted)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3
    assert_same(chunked(encoder, texts, chunk, steps=2)[1], {name: 2 * g for name, g in wanted.items()})


def test_two_passes_in_a_chunk_and_one_graph_give_the_same_training(folder, texts):
    weights = []
    for chunk in (3, PLAIN):
        encoder = Encoder(folder)
        optimizer = torch.optim.Adam(encoder.model.parameters(), lr=0.01)
        for _ in range(3):
            chunked(encoder, texts, chunk)
            optimizer.step()
        weights.append(encoder.encode_query(texts[0]))
    assert np.abs(weights[0] - Encoder(folder).encode_query(texts[0])).max() > 1e-3
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-4)


def one_graph_per_chunk(encoder, texts, chunk):
    """The same random numbers in the same order, but every graph is kept and there is no second pass."""
    encoder.model.zero_grad()

    def embed(part, kind):
        return torch.cat([encoder.forward(part[i : i + chunk], kind) for i in range(0, len(part), chunk)])

    loss = loss_of(embed(texts[0], "query"), embed(texts[1], "document"))
    loss.backward()
    return float(loss.detach()), gradients(encoder)


@pytest.mark.parametrize("chunk", [2, 5, 7, 8])  # at 7 and 8 the queries keep their graph, the items do not
def test_dropout_is_the_same_in_both_passes(chunk, tiny_bert, texts):
    encoder = Encoder(tiny_bert)
    encoder.model.train()
    torch.manual_seed(3)
    wanted_loss, wanted = one_graph_per_chunk(encoder, texts, chunk)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    loss, found = chunked(encoder, texts, chunk)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same(found, wanted)
    assert torch.equal(torch.get_rng_state(), after)  # the replay leaves no trace in what comes next
    torch.manual_seed(4)
    assert chunked(encoder, texts, chunk)[0] != pytest.approx(wanted_loss, rel=1e-3)  # dropout is on


def test_the_random_state_does_not_depend_on_a_replay(tiny_bert, texts):
    encoder = Encoder(tiny_bert)
    encoder.model.train()
    cache = GradCache(encoder, 2)
    torch.manual_seed(0)
    loss_of(cache.encode(texts[0], "query"), cache.encode(texts[1], "document")).backward()
    torch.manual_seed(11)  # somebody draws between the passes
    wanted = torch.rand(3)
    torch.manual_seed(11)
    cache.backward()
    assert torch.equal(torch.rand(3), wanted)


def test_what_the_loss_does_not_use_is_not_embedded_again(folder, texts, monkeypatch):
    encoder = Encoder(folder)
    cache = GradCache(encoder, 4)
    query_BD = cache.encode(texts[0], "query")
    cache.encode(texts[1], "document")  # 5 chunks, unused
    small = cache.encode(texts[1][:2], "document")  # one chunk, unused
    query_BD.sum().backward()
    calls = []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda part, kind: calls.append((len(part), kind)) or forward(part, kind))
    cache.backward()
    assert calls == [(4, "query"), (3, "query")]
    assert small.grad is None
    encoder.model.zero_grad()
    cache.backward()  # everything is forgotten
    assert not any(p.grad is not None and p.grad.any() for p in encoder.model.parameters())


def test_no_texts(folder, texts):
    encoder = Encoder(folder)
    _, wanted = plain(encoder, texts)
    encoder.model.zero_grad()
    cache = GradCache(encoder, 4)
    nothing = cache.encode([], "document")
    loss = loss_of(cache.encode(texts[0], "query"), torch.cat([cache.encode(texts[1], "document"), nothing]))
    loss.backward()
    cache.backward()
    assert_same(gradients(encoder), wanted)


def test_leaves_are_unit_vectors_that_collect_gradients(folder, texts):
    encoder = Encoder(folder)
    for chunk in (3, PLAIN):
        leaf = GradCache(encoder, chunk).encode(texts[1], "document")
        assert leaf.is_leaf
        assert leaf.requires_grad
        np.testing.assert_allclose(leaf.detach().numpy(), encoder.encode_document(texts[1]), atol=1e-6)


def test_chunk_size_must_not_be_negative(static_model):
    with pytest.raises(ValueError, match="chunk_size=-1"):
        GradCache(Encoder(static_model), -1)
