"""The cross-encoder judge against plain forward passes, and its distillation from other judges."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

import taoemb.judge.cross_encoder as module
from taoemb.catalog import Item, ItemTemplate, Query
from taoemb.checkpoint import CheckpointError
from taoemb.judge import CrossEncoderJudge, OracleJudge
from taoemb.judge.cross_encoder import DistillConfig, train_cross_encoder
from taoemb.judge.schemes import BINARY, ESCI, GRADED_3, GRADES_4
from taoemb.types import RelevanceJudge

SHORT = ItemTemplate(fields=("category", "title"), max_chars=24)
HARD = [
    ("", ""), ("", "red mug"), ("mug", ""), ("ünïcødé 靴 👟", "naïve café 茶 🍵"), ("mug", "very long " * 500),
    ("long query " * 300, "mug"), ("long query " * 300, ""), ("red mug " * 6, "blue mug " * 9), ("\x00 \n\t", "?!"),
]  # fmt: skip


def pair(query, title):
    return Query("q", query), Item("i", title)


def cross_encoder(folder, labels, scale=1.0):
    """From an encoder's folder, with a new head; ``scale`` shrinks its matrices (0.1 is how a BERT usually starts)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(labels)
        model = CrossEncoder(str(folder), num_labels=labels, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.eval()


@pytest.fixture(scope="module")
def models(tiny_bert):
    return {labels: cross_encoder(tiny_bert, labels) for labels in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def shop_pairs(small_shop):
    """Every item of the shop with a query, and their probabilities by a rule that their category gives away."""
    rng = np.random.default_rng(0)
    pairs = [(small_shop.queries[int(rng.integers(170))], item) for item in small_shop.items]
    good = ("Fash", "Beau", "Pets", "Tool", "Groc")
    rows = [[0.05, 0.05, 0.2, 0.7] if item.category.startswith(good) else [0.6, 0.3, 0.1, 0.0] for _, item in pairs]
    return pairs, np.array(rows)


def by_hand(model, query, text, limit):
    """Logits of one pair: [CLS] query [SEP] item [SEP], the item cut, and the query where it fills all alone."""
    tokenizer = model.tokenizer
    read = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (query, text)]
    first = read[0][: limit - 3]
    ids = [2, *first, 3, *read[1][: limit - 3 - len(first)], 3]
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([ids])).logits[0].double()


def kl(teacher, student):
    """Mean of sum p log(p / q)."""
    logs = [
        [p * math.log(p / q) if p else 0.0 for p, q in zip(row, guess)]
        for row, guess in zip(teacher.tolist(), student.tolist())
    ]
    return float(np.mean(np.sum(logs, axis=1)))


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


# ------------------------------------------------------------------------------------------------ verdicts


def test_probabilities_are_those_of_a_plain_forward_pass(models, small_shop):
    judge = CrossEncoderJudge(models[4])
    pairs = list(zip(small_shop.queries, small_shop.items))[:40]
    texts = [(query.text, ItemTemplate().render(item)) for query, item in pairs]
    expected = torch.stack([by_hand(models[4], *text, 64) for text in texts]).softmax(1).numpy()
    verdict = judge.score(pairs)
    np.testing.assert_allclose(verdict.probs, expected, atol=1e-5)
    np.testing.assert_allclose(verdict.score, expected @ [0, 1 / 3, 2 / 3, 1], atol=1e-5)
    assert verdict.probs.dtype == verdict.score.dtype == np.float32
    assert np.ptp(expected[:, 3]) > 0.1  # the pairs do differ
    brief = [pair("red mug", "blue mug"), pair("mug", "lamp")]
    library = models[4].predict([(query.text, item.title) for query, item in brief], apply_softmax=True)
    np.testing.assert_allclose(judge.score(brief).probs, library, atol=1e-5)


@pytest.mark.parametrize("limit", [8, 32, 64])
def test_long_empty_and_foreign_texts(models, limit):
    judge = CrossEncoderJudge(models[4], max_length=limit, template=ItemTemplate(max_chars=10_000))
    pairs = [pair(*texts) for texts in HARD]
    texts = [(query.text, judge.template.render(item)) for query, item in pairs]
    expected = torch.stack([by_hand(models[4], *text, limit) for text in texts]).softmax(1).numpy()
    np.testing.assert_allclose(judge.score(pairs).probs, expected, atol=1e-5)


def test_a_verdict_does_not_depend_on_the_batch(models, small_shop, monkeypatch):
    pairs = [*zip(small_shop.queries, small_shop.items), *(pair(*texts) for texts in HARD)]
    together = CrossEncoderJudge(models[4]).score(pairs).probs
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = CrossEncoderJudge(models[4], batch_size=7).score([pairs[i] for i in order]).probs
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)
    monkeypatch.setattr(module, "_TOKENISED_PAIRS", 5)
    np.testing.assert_allclose(CrossEncoderJudge(models[4]).score(pairs).probs, together, atol=1e-5)
    alone = np.concatenate([CrossEncoderJudge(models[4]).score([p]).probs for p in pairs[-30:]])
    np.testing.assert_allclose(alone, together[-30:], atol=1e-5)


def test_equal_pairs_are_computed_once(models, monkeypatch):
    judge, seen = CrossEncoderJudge(models[4]), []
    logits = judge.logits
    monkeypatch.setattr(judge, "logits", lambda texts: seen.append(texts) or logits(texts))
    verdict = judge.score([pair("a", "mug"), (Query("other", "a"), Item("2", "mug")), pair("b", "mug")])
    assert seen == [[("a", "mug"), ("b", "mug")]]
    np.testing.assert_array_equal(verdict.probs[0], verdict.probs[1])
    assert not np.allclose(verdict.probs[0], verdict.probs[2], atol=1e-3)


def test_it_is_a_judge_that_leaves_no_dropout_and_takes_no_pairs(models):
    judge = CrossEncoderJudge(models[4], name="small")
    assert isinstance(judge, RelevanceJudge)
    assert judge.name == "small"
    assert judge.score([]).probs.shape == (0, 4)
    judge.model.train()
    first, again = (judge.score([pair("red", "mug")]).probs for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_score_becomes_probabilities(models):
    pairs = [pair("red mug", "blue mug"), pair("lamp", "desk lamp"), pair("", "")]
    values = [float(by_hand(models[1], q.text, i.title, 64).sigmoid()) for q, i in pairs]
    reached = [[1 / (1 + math.exp(-(s - cut) / 0.08)) for cut in (0.25, 0.5, 0.75)] for s in values]
    expected = -np.diff([[1, *row, 0] for row in reached], axis=1)
    np.testing.assert_allclose(CrossEncoderJudge(models[1]).score(pairs).probs, expected, atol=1e-5)
    binary = CrossEncoderJudge(models[1], scheme=BINARY).score(pairs)
    np.testing.assert_allclose(binary.probs[:, 1], values, atol=1e-5)
    np.testing.assert_allclose(binary.score, values, atol=1e-5)
    thirds = CrossEncoderJudge(models[1], scheme=GRADED_3).score(pairs).probs
    np.testing.assert_allclose(thirds[:, 2], [1 / (1 + math.exp(-(s - 2 / 3) / 0.08)) for s in values], atol=1e-5)


def test_schemes_and_score_functions(models):
    pairs = [pair("red mug", "blue mug"), pair("lamp", "desk lamp")]
    for scheme in (GRADES_4, ESCI, GRADED_3, BINARY):
        for how in ("expected", "p_good", "cumulative"):
            verdict = CrossEncoderJudge(models[len(scheme)], scheme=scheme, score_fn=how).score(pairs)
            np.testing.assert_allclose(verdict.score, scheme.score(verdict.probs, how), atol=1e-6)
            assert verdict.probs.shape == (2, len(scheme))


def test_fingerprint_and_round_trip(models, tmp_path):
    judge = CrossEncoderJudge(models[4], scheme=ESCI, template=SHORT, max_length=20, score_fn="p_good")
    judge.save(tmp_path / "judge")
    judge.save(tmp_path / "judge")  # its own folder is replaced
    found = CrossEncoderJudge(tmp_path / "judge", device="cpu")
    assert (found.scheme, found.template, found.max_length, found.score_fn) == (ESCI, SHORT, 20, "p_good")
    assert found.fingerprint == judge.fingerprint
    pairs = [pair(*texts) for texts in HARD]
    np.testing.assert_array_equal(found.score(pairs).probs, judge.score(pairs).probs)
    other = cross_encoder(tmp_path / "judge", 4)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    options = [{"scheme": GRADES_4}, {"template": ItemTemplate()}, {"max_length": 21}, {"score_fn": "expected"}]
    prints = {CrossEncoderJudge(tmp_path / "judge", device="cpu", **option).fingerprint for option in options}
    kept = {"scheme": ESCI, "template": SHORT, "max_length": 20, "score_fn": "p_good"}
    prints |= {judge.fingerprint, CrossEncoderJudge(other, **kept).fingerprint}
    assert len(prints) == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="mine"):
        judge.save(tmp_path / "mine")


def test_models_that_cannot_judge(models, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match="3 outputs and the scheme 'taobao4' 4 labels"):
        CrossEncoderJudge(models[3])
    with pytest.raises(ValueError, match=r"plain encoder \(BertModel\) without a head"):
        CrossEncoderJudge(tiny_bert, device="cpu")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CrossEncoderJudge(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a cross-encoder"):
        CrossEncoderJudge(tmp_path)
    prompted = cross_encoder(tiny_bert, 4)
    prompted.prompts, prompted.default_prompt_name = {"rank": "Judge: "}, "rank"
    with pytest.raises(ValueError, match="a chat or a prompt"):
        CrossEncoderJudge(prompted)
    with pytest.raises(ValueError, match="score_fn='mean'"):
        CrossEncoderJudge(models[4], score_fn="mean")
    for bad in ({"max_length": 4}, {"max_length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="give at least 1 and at least 5"):
            CrossEncoderJudge(models[4], **bad)
    with pytest.raises(ValueError, match="device='tpu9'"):
        CrossEncoderJudge(models[4], device="tpu9")


# ------------------------------------------------------------------------------------------------ distillation


@pytest.fixture
def distil(tiny_bert, shop_pairs, tmp_path):
    """Runs a short distillation in ``tmp_path/NAME`` from the folder of an encoder; returns judge and log."""
    pairs, probs = shop_pairs

    def run(name="run", model=tiny_bert, pairs=pairs[:60], teacher=probs[:60], scheme=GRADES_4, **settings):
        options = {"steps": 6, "batch_size": 8, "save_steps": 2, "learning_rate": 1e-3, **settings}
        judge = train_cross_encoder(
            model, pairs, teacher, DistillConfig(**options), run_dir=tmp_path / name, scheme=scheme, template=SHORT,
            max_length=24, device="cpu", trackers=["jsonl"],
        )  # fmt: skip
        lines = (tmp_path / name / "logs" / "cross_encoder.jsonl").read_text().splitlines()
        return judge, [json.loads(line) for line in lines]

    return run


def test_distillation_comes_near_to_the_teacher_on_pairs_it_has_not_seen(distil, tiny_bert, shop_pairs):
    pairs, probs = shop_pairs
    start = cross_encoder(tiny_bert, 4, scale=0.1)
    before = kl(probs[450:], CrossEncoderJudge(start, template=SHORT, max_length=24).score(pairs[450:]).probs)
    judge, log = distil(
        model=start, pairs=pairs[:450], teacher=probs[:450], steps=120, batch_size=32, learning_rate=3e-3, save_steps=60
    )
    after = kl(probs[450:], judge.score(pairs[450:]).probs)
    constant = kl(probs[450:], np.tile(probs[:450].mean(0), (150, 1)))  # the best that knows no pair
    assert after < 0.8 * constant < before
    assert np.mean([line["kl"] for line in log[-20:]]) < 0.7 * np.mean([line["kl"] for line in log[:20]])
    assert not judge.model.training


def test_the_loss_is_the_divergence_from_teacher_to_student(distil, tiny_bert, shop_pairs):
    pairs, probs = shop_pairs
    model = cross_encoder(tiny_bert, 4)
    for part in model.modules():  # a loss that can be computed again
        part.p = part.dropout_prob = 0.0
    expected = kl(probs[:8], CrossEncoderJudge(model, template=SHORT, max_length=24).score(pairs[:8]).probs)
    _, log = distil(model=model, pairs=pairs[:8], teacher=probs[:8], steps=1)
    assert log[0]["kl"] == pytest.approx(expected, rel=1e-5)


def test_a_killed_run_ends_with_the_same_weights(distil, monkeypatch):
    whole, log = distil("whole")

    def killed(optimizer, peak, warmup_ratio, step, steps):
        if step == 5:
            raise KeyboardInterrupt
        return rate(optimizer, peak, warmup_ratio, step, steps)

    rate = module.set_learning_rate
    monkeypatch.setattr(module, "set_learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        distil("cut")
    monkeypatch.undo()
    resumed, log_again = distil("cut")
    assert same(whole.model, resumed.model)
    assert log == log_again
    assert whole.fingerprint == resumed.fingerprint
    finished, _ = distil("cut")  # is not trained further
    assert same(whole.model, finished.model)
    with pytest.raises(CheckpointError, match=r"config\.seed"):
        distil("cut", seed=1)


def test_the_judge_is_saved_with_what_it_needs(distil, tmp_path):
    judge, _ = distil()
    found = CrossEncoderJudge(tmp_path / "run" / "judges" / "cross_encoder", device="cpu")
    assert (found.scheme, found.template, found.max_length) == (GRADES_4, SHORT, 24)
    assert found.fingerprint == judge.fingerprint
    start, _ = distil("longer", steps=7)
    assert start.fingerprint != judge.fingerprint


def test_grades_are_one_hot_rows(distil, small_shop):
    pairs = [(q, i) for q in small_shop.queries[:12] for i in small_shop.items[:5]]
    qrels = {q.id: {i.id: (n * 7) % 4 for n, i in enumerate(small_shop.items[:5])} for q in small_shop.queries[:12]}
    oracle = OracleJudge(qrels).score(pairs)
    soft, _ = distil("rows", pairs=pairs, teacher=oracle.probs)
    hard, _ = distil("grades", pairs=pairs, teacher=oracle.grade)
    assert same(soft.model, hard.model)
    three, _ = distil("three", pairs=pairs, teacher=oracle.grade, scheme=GRADED_3)  # its labels of the catalog's grades
    rows, _ = distil(
        "rows3", pairs=pairs, teacher=np.eye(3)[[GRADED_3.of_grade[g] for g in oracle.grade]], scheme=GRADED_3
    )
    assert same(three.model, rows.model)


def test_pairs_on_which_the_teacher_abstains_are_dropped(distil, shop_pairs):
    pairs, probs = shop_pairs
    holes = probs[:60].copy()
    holes[::3] = np.nan
    holes[1, 2] = np.nan
    kept = ~np.isnan(holes).any(1)
    with pytest.warns(UserWarning, match="abstains on 21 of 60 pairs"):
        judge, _ = distil("holes", teacher=holes)
    without, _ = distil("without", pairs=[p for p, k in zip(pairs, kept) if k], teacher=probs[:60][kept])
    assert same(judge.model, without.model)
    with pytest.warns(UserWarning, match="abstains on 1 of 4"):
        distil("grades", pairs=pairs[:4], teacher=[0, 3, -1, 2], steps=1)
    with pytest.warns(UserWarning, match="60 of 60"), pytest.raises(ValueError, match="no pair with a verdict"):
        distil("none", teacher=np.full((60, 4), np.nan))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (np.full((59, 4), 0.25), r"shape \(59, 4\); give \[60, 4\]"),
        (np.full((60, 3), 1 / 3), r"shape \(60, 3\)"),
        (np.full(60, 4), "grade 4: use 0 to 3"),
        (np.full(60, 0.5), "grade 0.5"),
        (np.full((60, 4), 0.3), "row 0 .*sum to 1"),
        (np.tile([1.5, -0.5, 0.0, 0.0], (60, 1)), "row 0 .*sum to 1"),
    ],
)
def test_verdicts_that_do_not_fit(distil, teacher, message):
    with pytest.raises(ValueError, match=message):
        distil(teacher=teacher)


def test_a_head_of_another_size_gives_way(distil, models, tmp_path):
    with pytest.raises(ValueError, match="the model has 3 outputs; give one with 4"):
        distil(model=models[3])
    CrossEncoderJudge(models[1], score_fn="p_good").save(tmp_path / "one")
    judge, _ = distil(model=tmp_path / "one", steps=1)
    assert judge.model.num_labels == 4


def test_a_loss_that_is_no_number_stops_the_run(distil, tiny_bert):
    model = cross_encoder(tiny_bert, 4)
    with torch.no_grad():
        model.model.classifier.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="at step 0 the loss is nan"):
        distil(model=model)


def test_balanced_drawing_gives_each_label_the_same_share():
    probs = np.eye(4, dtype=np.float32)[[0] * 90 + [2] * 8 + [3] * 2]
    chances = module._chances(probs)
    assert chances.sum() == pytest.approx(1)
    drawn = np.random.default_rng(0).choice(100, 30_000, p=chances)
    counts = Counter(probs.argmax(1)[drawn].tolist())
    assert {label: round(count / 30_000, 1) for label, count in counts.items()} == {0: 0.3, 2: 0.3, 3: 0.3}


def test_balanced_training_runs_and_differs(distil):
    even, _ = distil("even", balanced=True)
    plain, _ = distil("plain")
    assert not same(even.model, plain.model)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"warmup_ratio": 1.0}, {"max_grad_norm": 0}]
)
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DistillConfig(**bad)
