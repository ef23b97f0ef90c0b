"""Samples of a model in training, through kills and by hand; preferences and difficult prompts on small tables."""

import json

import numpy as np
import pytest
import torch

from taoemb.catalog import Item, Query
from taoemb.judge import CausalJudge, JudgePrompt
from taoemb.judge.examples import Example
from taoemb.judge.prompts import ModelPrompt
from taoemb.judge.sampling import Sampled, difficult, preference_pairs, sample_completions

PROMPT = JudgePrompt(rules="Judge.", max_chars=60)


@pytest.fixture(scope="module")
def judge(tiny_chat_llm):
    return CausalJudge(tiny_chat_llm, prompt=PROMPT)


@pytest.fixture(scope="module")
def examples(small_shop):
    """40: two batches and a half; prompts of different lengths."""
    return [Example(small_shop.queries[i], small_shop.items[7 * i], i % 4) for i in range(40)]


def draw(judge, examples, file, **changed):
    settings = {"n": 3, "style": "label", "max_new_tokens": 4, "seed": 5, **changed}
    return sample_completions(judge.model, judge.reads, examples, settings.pop("n"), file, **settings)


@pytest.fixture(scope="module")
def whole(judge, examples, tmp_path_factory):
    """An uninterrupted call, and its file."""
    file = tmp_path_factory.mktemp("whole") / "samples.jsonl"
    return draw(judge, examples, file), file


def equal(found, expected):
    assert found.texts == expected.texts
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_n_completions_of_each_prompt_and_their_labels(judge, examples, tmp_path, monkeypatch, whole):
    sampled, file = whole
    assert [len(texts) for texts in sampled.texts] == [3] * 40
    assert sampled.labels.shape == (40, 3)
    assert len({text for texts in sampled.texts for text in texts}) > 50  # drawn, not repeated
    assert [json.loads(line) for line in file.read_text().splitlines()] == sampled.texts
    ids = [judge.tokenizer.encode(text, add_special_tokens=False)[0] for text in "14"]

    def generate(input_ids, **_):
        answers = torch.tensor([[*ids, judge.tokenizer.eos_token_id]]).T.repeat(len(input_ids), 1)
        return torch.cat([input_ids.repeat_interleave(3, 0), answers], 1)

    monkeypatch.setattr(judge.model, "generate", generate)
    found = draw(judge, examples[:2], tmp_path / "samples.jsonl")
    assert found.texts == [["1", "4", ""]] * 2
    assert found.labels.tolist() == [[0, 3, -1]] * 2
    assert found.correct([3, 1]).tolist() == [[False, True, False], [False, False, False]]


def test_a_finished_call_is_read_and_not_drawn_again(judge, examples, monkeypatch, whole):
    monkeypatch.setattr(judge.model, "generate", lambda **_: pytest.fail("drawn again"))
    equal(draw(judge, examples, whole[1]), whole[0])


@pytest.mark.parametrize("lines", [0, 1, 15, 16, 17, 32, 39])
@pytest.mark.parametrize("cut", [0, 7])
def test_after_a_kill_the_same_is_drawn(judge, examples, tmp_path, whole, lines, cut):
    expected, file = whole
    kept = file.read_bytes().splitlines(keepends=True)
    again = tmp_path / "samples.jsonl"
    again.write_bytes(b"".join(kept[:lines]) + kept[lines][:cut])
    (tmp_path / "samples.json").write_bytes(file.with_suffix(".json").read_bytes())
    equal(draw(judge, examples, again), expected)
    assert again.read_bytes() == file.read_bytes()


def test_after_an_error_in_the_third_batch_the_same_is_drawn(judge, examples, tmp_path, monkeypatch, whole):
    generate, calls = judge.model.generate, []

    def failing(**given):
        calls.append(len(given["input_ids"]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return generate(**given)

    monkeypatch.setattr(judge.model, "generate", failing)
    with pytest.raises(torch.OutOfMemoryError):
        draw(judge, examples, tmp_path / "samples.jsonl")
    equal(draw(judge, examples, tmp_path / "samples.jsonl"), whole[0])
    assert calls == [16, 16, 8, 8]


def test_samples_of_anything_else_are_refused(judge, tiny_chat_llm, examples, tmp_path):
    file = tmp_path / "samples.jsonl"
    few = examples[:4]
    first = draw(judge, few, file)
    other = CausalJudge(tiny_chat_llm, prompt=PROMPT)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    reads = CausalJudge(judge.model, tokenizer=judge.tokenizer, prompt=JudgePrompt(rules="Judge well.", max_chars=60))
    changed = [Example(e.query, e.item, 3 - e.grade) for e in few]
    for one, given, settings in [(judge, changed, {}), (judge, few[::-1], {}), (judge, few, {"n": 2}), (judge, few, {"seed": 6}),
                                 (judge, few, {"temperature": 0.5}), (other, few, {}), (reads, few, {})]:  # fmt: skip
        with pytest.raises(
            ValueError, match=r"samples\.jsonl holds samples of other examples.*delete it with samples\.json"
        ):
            draw(one, given, file, **settings)
    equal(draw(judge, few, file), first)
    file.unlink()  # without its head
    equal(draw(judge, few, file), first)


def greedy(judge, example, steps):
    """The most probable token, again and again."""
    ids = judge.reads.encode(example.query, example.item)
    begin = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(judge.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == judge.tokenizer.eos_token_id:
            break
    return judge.tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()


def test_temperature_0_is_greedy_and_padding_does_not_matter(judge, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(judge.model.generation_config, "repetition_penalty", 5.0)  # as chat models come, and stronger
    few = examples[:10]
    assert len({len(judge.reads.encode(e.query, e.item)) for e in few}) > 3
    found = draw(judge, few, tmp_path / "samples.jsonl", temperature=0, max_new_tokens=6)
    assert found.texts == [[greedy(judge, example, 6)] for example in few]
    alone = [draw(judge, [e], tmp_path / f"{i}.jsonl", temperature=0, max_new_tokens=6) for i, e in enumerate(few)]
    assert [one.texts[0] for one in alone] == found.texts


def test_samples_follow_the_models_probabilities(judge, examples, tmp_path):
    with torch.no_grad():
        logits = judge.model(torch.tensor([judge.reads.encode(examples[0].query, examples[0].item)])).logits[0, -1]
    found = draw(judge, examples[:1], tmp_path / "samples.jsonl", n=300, max_new_tokens=1, temperature=0.7)
    top = torch.softmax(logits / 0.7, -1).topk(5)
    for share, token in zip(top.values.tolist(), top.indices.tolist()):
        text = judge.tokenizer.decode([token], skip_special_tokens=True).strip()
        assert found.texts[0].count(text) / 300 > share - 4 * np.sqrt(share / 300)


def test_a_model_without_a_chat_template(judge, examples, tmp_path, tiny_chat_llm):
    plain = CausalJudge(tiny_chat_llm)
    plain.tokenizer.chat_template = None
    plain.reads = ModelPrompt(PROMPT, plain.tokenizer)
    found = draw(plain, examples[:5], tmp_path / "samples.jsonl", temperature=0)
    assert found.texts == [[greedy(plain, example, 4)] for example in examples[:5]]


def test_every_batch_draws_its_own(judge, examples, tmp_path):
    found = draw(judge, examples[:1] * 32, tmp_path / "samples.jsonl", n=1)
    assert found.texts[:16] != found.texts[16:]


def test_the_global_random_numbers_are_left_alone(judge, examples, tmp_path):
    before = torch.get_rng_state()
    first = draw(judge, examples[:3], tmp_path / "1.jsonl")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    equal(draw(judge, examples[:3], tmp_path / "2.jsonl"), first)


# -- preferences ---------------------------------------------------------------------------------------------------------


def sampled(*rows):
    """Labels 0..3 as texts 1..4, -1 as no label."""
    texts = [["?" if label < 0 else str(label + 1) for label in row] for row in rows]
    return Sampled(texts, np.array(rows), np.array(rows) >= 0)


def some(n):
    return [Example(Query(str(i), "mug"), Item(str(i), "Mug"), 0) for i in range(n)]


def test_preferences_by_hand():
    found = sampled([2, 0, 3, 2], [0, 0, 1, 3], [2, 2, 2, 2], [-1, 0, -1, 0], [-1, -1, 2, 2], [1, 0, -1, 1])
    truth = [2, 2, 2, 2, 2, 2]
    teacher = {"1": "3 by the teacher", "2": "never asked for", "3": "3 too"}
    pairs = preference_pairs(some(6), found, truth, lambda e: teacher.get(e.query.id))
    assert [rejected for _, _, rejected in pairs] == ["1", "1", "1", "?"]  # the first that states a label
    pairs = preference_pairs(some(6), found, truth, lambda e: teacher.get(e.query.id), overrated=True)
    assert pairs == [
        (0, "3", "4"),  # its own right one against the over-rating
        (1, "3 by the teacher", "4"),  # never right
        # 2 is always right
        (3, "3 too", "1"),  # a wrong label rather than an unreadable one
        (4, "3", "?"),
        # 5 is never right, and the teacher has nothing
    ]


def test_of_right_completions_the_first_with_readable_reasons_is_chosen():
    texts, labels = [["4", "4\nlong reasons", "4\nmore", "1"]], np.array([[3, 3, 3, 0]])
    for whole, chosen in (([0, 1, 1, 1], "4\nlong reasons"), ([0, 0, 0, 1], "4")):
        found = Sampled(texts, labels, np.array([whole], dtype=bool))
        assert preference_pairs(some(1), found, [3], lambda _: pytest.fail("not needed")) == [(0, chosen, "1")]


# -- difficulty ----------------------------------------------------------------------------------------------------------


def correct(counts, n=10):
    return np.array([[j < count for j in range(n)] for count in counts])


def test_difficulty_by_hand():
    table = correct([0, 1, 5, 6, 7, 9, 10])
    labels = [0] * 7
    assert difficult(table, labels) == [1, 2, 3, 4, 5]
    assert difficult(table, labels, limit=0.6) == [1, 2]
    assert difficult(table, labels, limit=0.1) == []
    assert difficult(table[[0, 6]], labels[:2]) == []
    assert difficult(correct([6, 7], 25), [0, 0], limit=0.28) == [0]  # .28 * 25 is above 7 in floating point


@pytest.mark.parametrize("seed", range(5))
def test_balanced_prompts_have_as_many_of_every_label(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, 200, p=[0.6, 0.25, 0.1, 0.05])
    table = correct(rng.integers(0, 11, 200))
    kept = difficult(table, labels, 1.0, True, seed)
    counts = np.bincount(labels[kept])
    usable = (table.sum(1) > 0) & (table.sum(1) < 10)
    assert counts.std() == 0
    assert counts[0] == min(np.bincount(labels[usable]))
    assert kept == sorted(set(kept))
    assert usable[kept].all()
    assert difficult(table, labels, 1.0, True, seed) == kept
    assert difficult(table, labels, 1.0, True, seed + 1) != kept
    assert difficult(table, labels, 1.0, False) == np.flatnonzero(usable).tolist()


def test_a_label_without_difficult_prompts_is_left_out():
    assert difficult(correct([5, 5, 10, 0]), [0, 1, 2, 3]) == [0, 1]
