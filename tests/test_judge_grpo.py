"""The reinforcement stage of a judge: formulas of TaoSR-AGRL, TaoSR-SHE and DyKnow-RAG by hand, and the trainer on a tiny model."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from taoemb.catalog import Catalog, Item, Query
from taoemb.config import load_config
from taoemb.judge.agrl import HINT_LEVELS, Lattice, ReplayConfig, ShapingConfig, hint, shaped_rewards
from taoemb.judge.build import JudgeBuilder, JudgeConfig
from taoemb.judge.causal import CausalJudge
from taoemb.judge.chains import ParsedChain
from taoemb.judge.contexts import Chunk, ContextJudge, Contexts, shop_chunks
from taoemb.judge.dyknow import DyKnowConfig, posterior_scaling, transfer, transfer_objective, uncertain
from taoemb.judge.examples import Example, parse_label, shop_examples
from taoemb.judge.prompts import JudgePrompt, ModelPrompt
from taoemb.judge.sampling import PosteriorSampler, Sampled, curriculum, difficult, patterns
from taoemb.judge.schemes import GRADES_4, STEP
from taoemb.judge.srpo import SRPOConfig, segment, step_advantages, token_steps, verified
from taoemb.judge.step_model import StepJudge, step_examples
from taoemb.judge.teacher import TeacherConfig
from taoemb.judge.train import JudgeTrainer
from taoemb.judge.train_config import GRPOConfig, JudgeTrainConfig, recipe_file
from taoemb.shop import generate_shop
from taoemb.shop_rules import Truth

RULES = [[0, 0, 0], [0, 1, 2], [1, 2, 3]]
CHAIN = "Product: mug is wanted, this is cup\nConditions: red: yes\nCategory: related\nAttributes: match"
NAN = float("nan")


# -- TaoSR-AGRL -------------------------------------------------------------------------------------------------------------


def test_truth_table_of_the_gate():
    """Every combination of label, category and attribute right or wrong, and whether the label follows, against the formula."""
    weights = {"format": 0.1, "label": 1.0, "category": 0.3, "attribute": 0.2}
    for gate, left in (("hard", 0.0), ("soft", 0.5), ("none", 1.0)):
        config = ShapingConfig(**weights, gate=gate)
        for category, attribute, label in itertools.product(range(3), range(3), range(4)):
            chain = ParsedChain(category, attribute, label, True)
            earned = 1.0 * (label == 2) + 0.3 * (category == 1) + 0.2 * (attribute == 2)
            wanted = 0.1 + (1.0 if RULES[category][attribute] == label else left) * earned
            assert shaped_rewards([chain], [2], [(1, 2)], RULES, config) == pytest.approx([wanted])
        unread = ParsedChain(1, 2, None, False)
        assert shaped_rewards([unread], [2], [(1, 2)], RULES, config) == [0]
        assert shaped_rewards([ParsedChain(1, 2, 2, True)], [2], [(None, None)], RULES, config) == pytest.approx([1.1])


def test_a_lattice_of_ones_own(tmp_path):
    """As text, with what it must say; by default the shop's."""
    assert Lattice.load().table.tolist() == RULES
    file = tmp_path / "rules.yaml"
    said = "grades:\n  exact: {match: 3, partial: 3, violated: 0}\n  related: {match: 1, partial: 1, violated: 0}\n"
    file.write_text(said + "  mismatch: {match: 0, partial: 0, violated: 0}\n")
    assert Lattice.load(file).table.tolist() == [[0, 0, 0], [0, 1, 1], [0, 3, 3]]
    file.write_text(said)
    with pytest.raises(ValueError, match="grades: exact, related given; give each of mismatch, related, exact"):
        Lattice.load(file)
    file.write_text(said + "  mismatch: {match: 0, partial: 0}\n")
    with pytest.raises(
        ValueError, match=r"grades.mismatch: match, partial given; give each of violated, partial, match"
    ):
        Lattice.load(file)
    file.write_text(said + "  mismatch: {match: 0, partial: 0, violated: 4}\n")
    with pytest.raises(ValueError, match="grades.mismatch.violated=4: give 0 to 3"):
        Lattice.load(file)
    file.write_text(said + "  mismatch: {match: 0, partial: 0, violated: none}\n")
    with pytest.raises(ValueError, match="violated"):
        Lattice.load(file)


def test_a_lattice_that_cannot_be_meant(tmp_path):
    """Said before the run folder is claimed."""
    file, data = tmp_path / "rules.yaml", tmp_path / "shop"
    data.mkdir()
    (data / "truth.parquet").touch()
    few = {"exact": {"match": 3, "partial": 1, "violated": 0}, **{
        name: dict.fromkeys(("match", "partial", "violated"), 0) for name in ("related", "mismatch")}}  # fmt: skip
    other = few | {"related": {"match": 2, "partial": 1, "violated": 0}}

    def begin(**more):
        JudgeTrainer(JudgeTrainConfig(model="m", data=str(data), lattice=str(file), **more), tmp_path / "run")

    with pytest.raises(FileNotFoundError, match=r"lattice='.*rules.yaml' is no file"):
        begin()
    for grades, message in (
        (few, "no verdicts lead to the label 'Related'"),
        (other, "a generated shop follow its own rules"),
        ({}, "lattice=.*nothing given"),
    ):
        file.write_text(json.dumps({"grades": grades}))
        with pytest.raises(ValueError, match=message):
            begin()
    assert not (tmp_path / "run").exists()
    file.write_text(json.dumps({"grades": other}))
    begin(teacher=TeacherConfig(url="http://127.0.0.1:1", model="m"))
    assert (tmp_path / "run" / "config.yaml").exists()


def test_the_default_reward_is_taosr1s():
    chains = [ParsedChain(2, 0, 3, True), ParsedChain(2, 2, 2, True), ParsedChain(2, 2, 3, False)]
    assert shaped_rewards(chains, [3, 3, 3], [(2, 2)] * 3, RULES, ShapingConfig()).tolist() == [1, 0, 0]


def test_the_gate_holds_chains_against_the_lattice_that_is_given(made):
    swapped = Lattice({"exact": {"match": 2, "partial": 3, "violated": 1}, **{
        name: dict.fromkeys(("match", "partial", "violated"), 0) for name in ("related", "mismatch")}})  # fmt: skip
    config = plain(shaping=ShapingConfig(gate="hard"))
    for lattice, wanted in ((None, [1.0, 0.0]), (swapped, [0.0, 1.0])):
        trainer = made(config, lattice=lattice)
        texts = ["4\nCategory: exact\nAttributes: match", "4\nCategory: exact\nAttributes: partial"]
        assert trainer.shaped_reward(texts, [3, 3]) == wanted


def test_hints_say_more_with_every_level():
    example = Example(Query("q", "red mug"), Item("i", "Cup"), 2, 1, 2, CHAIN)
    assert hint(example, 1) == "Category: related\nAttributes: match"
    assert hint(example, 2) == "Category: related\nAttributes: match\nGrade: 3"
    assert hint(example, HINT_LEVELS) == f"3\n{CHAIN}"
    plain = Example(Query("q", "red mug"), Item("i", "Cup"), 2)
    assert [hint(plain, level) for level in (1, 2, 3)] == ["Grade: 3"] * 3
    with pytest.raises(ValueError, match="level=4: give 1 to 3"):
        hint(example, 4)


# -- TaoSR-SHE --------------------------------------------------------------------------------------------------------------


def test_steps_of_a_chain():
    text = f"3\n{CHAIN}"
    assert [(step, text[a:b]) for step, a, b in segment(text)] == [(0, "3"), *zip((1, 2, 3, 4), CHAIN.split("\n"))]
    text = f"{CHAIN}\nGrade: 3\nGrade: 4\nso it is"
    assert [(step, text[a:b]) for step, a, b in segment(text, "pre")] == [
        *zip((1, 2, 3, 4), CHAIN.split("\n")),
        (0, "Grade: 3"),
    ]
    assert segment("3\nGrade: 4") == [(0, 0, 1)]  # the label is the first line
    assert segment("") == []


def test_tokens_belong_to_the_step_that_they_write():
    pieces = ["3", "\n", "Cate", "gory: ", "exact\nAttr", "ibutes: ", "match", "", "\n!", ""]
    steps = token_steps(range(len(pieces)), lambda ids: "".join(pieces[i] for i in ids))
    assert steps.tolist() == [0, -1, 3, 3, 4, 4, 4, 4, -1, -1]
    raw = [
        b"3\nProduct: ",
        *(bytes([byte]) for byte in "杯".encode()),
        b"\nCategory: exact",
    ]  # a character in three tokens
    steps = token_steps(range(len(raw)), lambda ids: b"".join(raw[i] for i in ids).decode(errors="replace"))
    assert steps.tolist() == [1, 1, 1, 1, 3]


def test_the_offline_verifier_compares_lines():
    reference = f"3\n{CHAIN}"
    said = "4\nProduct:  Mug is want ed, this is cup\nCategory: exact\nNote: x\nAttributes: match"
    np.testing.assert_array_equal(verified(said, reference), [0, 1, NAN, 0, 1])
    np.testing.assert_array_equal(verified(said, reference, verdicts_only=True), [0, NAN, NAN, 0, 1])
    np.testing.assert_array_equal(verified("", reference), [NAN] * 5)


STEPS_BT = torch.tensor([[0, 1, 1, -1, 3, 4], [0, 1, 3, 3, 4, -1]])
VALUES = torch.tensor([[1.0, 1.0, NAN, 0.0, 1.0], [0.0, 1.0, NAN, 1.0, 0.0]])
OUTCOME = torch.tensor([0.7, -0.7])


def test_without_weight_it_is_plain_grpo():
    for values in (VALUES, torch.full_like(VALUES, NAN)):
        found = step_advantages(OUTCOME, STEPS_BT, values, 2, SRPOConfig())
        assert torch.equal(found, OUTCOME[:, None].expand(2, 6))
    unknown = step_advantages(OUTCOME, STEPS_BT, torch.full_like(VALUES, NAN), 2, SRPOConfig(weight=1.0))
    assert torch.equal(unknown, OUTCOME[:, None].expand(2, 6))  # steps that nobody knows leave the outcome


def test_step_advantages_by_hand():
    """Two completions: equal product steps (z = 0), one right and one wrong verdict each (z = +-1/sqrt 2 of a deviation with n - 1)."""
    z = 0.5 / (math.sqrt(0.5) + 1e-4)
    found = step_advantages(OUTCOME, STEPS_BT, VALUES, 2, SRPOConfig(weight=0.5))
    wanted = [
        [0.7, 0.35, 0.35, 0.7, 0.35 - z / 2, 0.35 + z / 2],
        [-0.7, -0.35, -0.35 + z / 2, -0.35 + z / 2, -0.35 - z / 2, -0.7],
    ]
    torch.testing.assert_close(found, torch.tensor(wanted))
    clamped = step_advantages(OUTCOME, STEPS_BT, VALUES, 2, SRPOConfig(weight=1.0), clip=0.1)
    torch.testing.assert_close(clamped[0], torch.tensor([0.7, 0.0, 0.0, 0.7, -0.1, 0.1]))


def test_equal_steps_are_worth_nothing():
    """Rounding must not make a deviation of nothing."""
    values = torch.full((8, 5), 0.37)
    values[3, 3] = NAN
    found = step_advantages(torch.zeros(8), torch.full((8, 1), 3), values, 8, SRPOConfig(weight=1.0))
    assert not found.any()


def test_masks():
    critical = step_advantages(OUTCOME, STEPS_BT, VALUES, 2, SRPOConfig(mask="critical"))
    torch.testing.assert_close(critical, torch.tensor([[0.7, 0, 0, 0.7, 0.7, 0.7], [-0.7, 0, -0.7, -0.7, -0.7, -0.7]]))
    first = step_advantages(OUTCOME, STEPS_BT, VALUES, 2, SRPOConfig(mask="first_error"))
    # The first errs in step 3, so 4 is left out; the second in 4, its last.
    torch.testing.assert_close(first, torch.tensor([[0.7, 0.7, 0.7, 0.7, 0.7, 0.0], [-0.7] * 6]))
    with pytest.raises(ValueError, match="2 completions in groups of 3"):
        step_advantages(OUTCOME, STEPS_BT, VALUES, 3, SRPOConfig())


# -- DyKnow-RAG -------------------------------------------------------------------------------------------------------------


def test_alpha_and_beta_as_published():
    gaps = torch.tensor([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    alpha, beta = posterior_scaling(gaps)
    torch.testing.assert_close(beta, torch.tensor([0.072, 0.477, 1.076, 2.0, 2.924, 3.523, 3.928]), atol=5e-4, rtol=0)
    torch.testing.assert_close(alpha * beta, torch.full((7,), 0.1))


def test_union_normalised_advantage_is_that_of_one_group():
    draws = torch.Generator().manual_seed(0)
    without, with_context = (torch.rand(3, 4, generator=draws) for _ in range(2))
    flags = torch.rand(3, 8, generator=draws) < 0.5
    found = transfer(without, with_context, flags[:, :4], flags[:, 4:])
    for g in range(3):
        both = np.concatenate([without[g].numpy(), with_context[g].numpy()])
        union = (without[g].numpy() - both.mean()) / (both.std(ddof=1) + 1e-4)
        beta = 4 / (1 + math.exp(-4 * float(flags[g, 4:].float().mean() - flags[g, :4].float().mean())))
        np.testing.assert_allclose(found[g], np.where(union > 0, 0.1 / beta * union, beta * union), rtol=1e-5)
    both = torch.cat([without, with_context], 1)
    union = ((both - both.mean(1, keepdim=True)) / (both.std(1, keepdim=True) + 1e-4))[:, :4]
    fixed = transfer(without, with_context, flags[:, :4], flags[:, 4:], scale=0.5, clip=0.6)
    torch.testing.assert_close(fixed, 0.5 * union.clamp(-0.6, 0.6))
    # The clamp is of the advantage, and beta scales what is left.
    steep = transfer(without, with_context, torch.zeros(3, 4), torch.ones(3, 4), clip=0.6)
    assert steep.min() == pytest.approx(-0.6 * 4 / (1 + math.exp(-4)))


def test_the_third_term_is_a_mean_probability():
    chances = torch.tensor([[0.5, 0.25, 0.9], [0.2, 0.4, 0.6]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = transfer_objective(chances.log(), mask, torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(found, torch.tensor([0.75, -0.4]))


def test_the_pool_is_what_is_unsure():
    assert uncertain([[0.9, 0.1], [NAN, NAN], [0.5, 0.5], [0.3, 0.7], [0.65, 0.35]]) == [2, 4]
    assert uncertain([[0.5, 0.5], [0.6, 0.4]], count=1) == [0]


# -- which prompts ----------------------------------------------------------------------------------------------------------


def test_difficulty_band():
    correct = np.arange(11)[:, None] > np.arange(10)
    assert difficult(correct, [0] * 11, 0.9, balance=False, hardest=0.1) == list(range(2, 9))
    assert difficult(correct, [0] * 11, balance=False) == list(range(1, 10))


def test_patterns_count_what_completions_differ_in():
    texts = [
        ["3\nCategory: exact\nAttributes: match", "3\nCategory: exact\nAttributes: match", "1"],
        ["3\nCategory: exact\nAttributes: match", "3\nCategory: related\nAttributes: match", "x"],
    ]
    assert patterns(Sampled(texts, np.zeros((2, 3)), np.ones((2, 3))), "post", GRADES_4).tolist() == [1, 2]


def test_the_curriculum_begins_with_what_is_mostly_right():
    correct = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        dtype=bool,
    )
    labels = [0, 0, 0, 0, 1, 1]
    order = curriculum(range(6), correct, labels, 6)
    assert set(order[:3]) == {1, 3, 5}
    assert 5 in order[:2]  # labels take turns
    assert set(order[3:5]) == {2, 4}
    assert order[5] == 0
    twice = curriculum(range(6), correct, labels, 12)
    assert [sorted(part) for part in (twice[:6], twice[6:10], twice[10:])] == [[1, 1, 3, 3, 5, 5], [2, 2, 4, 4], [0, 0]]
    half = curriculum(range(6), correct, labels, 3)  # every bucket has its share
    assert len(half) == 3
    assert half[0] in (1, 3, 5)
    assert half[-1] in (0, 2, 4)


def test_balance_comes_behind_every_filter():
    correct = np.array([[1, 0]] * 6, dtype=bool)
    keep = np.array([True, True, False, True, True, True])
    assert difficult(correct, [0, 0, 1, 1, 0, 0], keep=keep)[-1] in (3, 4, 5)
    found = difficult(correct, [0, 0, 1, 1, 0, 0], keep=keep)
    assert len(found) == 2
    assert 3 in found
    assert difficult(correct, [0] * 6, balance=False, keep=keep) == [0, 1, 3, 4, 5]


def test_the_posterior_prefers_prompts_half_right_and_is_a_function_of_its_history():
    seen = np.array([0, 4, 8]), np.array([8, 8, 8])
    sampler = PosteriorSampler(seen, 1)
    drawn = []
    for step in range(40):
        drawn += sampler.draw(step)
        if step:  # a loader reads one batch ahead
            sampler.update([(drawn[step - 1], 4, 4)])
    assert drawn[:4] == [1] * 4
    assert drawn[-20:].count(1) < 10  # what is always right meanwhile gives way
    again = PosteriorSampler(seen, 1)
    again.history = sampler.history
    assert [again.draw(step) for step in range(40)] == [[n] for n in drawn]
    with pytest.raises(RuntimeError, match="step 9 is drawn when 0 steps are known"):
        PosteriorSampler(seen, 1).draw(9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shaping": ShapingConfig(category=0.3)}, "style=label has no steps"),
        ({"srpo": SRPOConfig(mask="critical")}, "style=label has no steps"),
        ({"dyknow": DyKnowConfig(True), "num_generations": 3}, "give an even number"),
        ({"dyknow": DyKnowConfig(True), "replay": ReplayConfig(0.25)}, "goes with plain groups"),
        ({"hardest": 0.9, "difficulty": 0.5}, r"grpo.hardest=0.9: give a share from 0, below grpo.difficulty=0.5"),
        ({"dyknow": DyKnowConfig(True)}, "say where chunks of context come from with contexts="),
        ({"pool": 0.0}, "grpo.pool=0.0: give a probability"),
        ({"order": "best"}, "grpo.order='best': give one of random, curriculum, posterior"),
        ({"label_objective": "sum"}, "give one of grpo, expected"),
        ({"advantage_clip": -1.0}, "grpo.advantage_clip=-1.0"),
        ({"patterns": 9}, "grpo.patterns=9"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        JudgeTrainConfig(style="label", grpo=GRPOConfig(**changed))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ShapingConfig(gate="firm"), "gate='firm': give one of hard, soft, none"),
        (lambda: ShapingConfig(category=-1), "category=-1: give 0"),
        (lambda: ShapingConfig(label=0), "label=0"),
        (lambda: ReplayConfig(share=1.0), "share=1.0: give 0"),
        (lambda: ReplayConfig(accuracy=2.0), "accuracy=2.0: give 0 to 1"),
        (lambda: SRPOConfig(weight=2), "weight=2: give 0"),
        (lambda: SRPOConfig(mask="all"), "mask='all': give one of none, critical, first_error"),
        (lambda: DyKnowConfig(scale=-1.0), "scale=-1.0"),
    ],
)
def test_constants_that_make_no_sense_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
    with pytest.raises(ValueError, match="grpo.label_objective=expected needs the label first"):
        JudgeTrainConfig(style="pre", grpo=GRPOConfig(label_objective="expected"))


# -- context ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop():
    return generate_shop(300, seed=1, train_queries=60, validation_queries=0, test_queries=20)


def test_the_shop_writes_chunks_of_every_kind(shop):
    chunks = shop_chunks(shop, reviews=200)
    assert chunks == shop_chunks(shop, reviews=200)
    kinds = {kind: [c for c in chunks if c.kind == kind] for kind in ("encyclopedia", "review", "noise")}
    assert all(kinds.values())
    truth = Truth.from_table(shop.truth)
    title = {item.title: row for row, item in enumerate(shop.catalog.items)}
    checked = 0
    for chunk in kinds["review"]:
        name, _, said = (
            chunk.text.removeprefix("Review of ").removesuffix(", as I know from daily use.").rpartition(": ")
        )
        if list(title).count(name) == 1:
            mine = truth.attributes(title[name])
            true = {f"{truth.ontology.attributes[a].labels[0]} {form}" for a, v in mine.items()
                    for value in truth.ontology.attributes[a].values if value.id == v for form in value.forms}  # fmt: skip
            assert (said in true) != chunk.misleading
            checked += 1
    assert checked > 50
    assert 0.15 < np.mean([c.misleading for c in kinds["review"]]) < 0.45


def test_a_pair_gets_the_nearest_chunk(tmp_path):
    contexts = Contexts([Chunk("a", "a duvet keeps warm"), Chunk("b", "kettles boil water")])
    assert contexts(Query("q", "kettle"), Item("i", "steel 1 L")) == "kettles boil water"
    assert contexts(Query("q", "lamp"), Item("i", "of brass")) == ""
    (tmp_path / "chunks.csv").write_text("id,text\na,a duvet keeps warm\nb,kettles boil water\n")
    again = Contexts.load(tmp_path / "chunks.csv")
    assert again.fingerprint == contexts.fingerprint
    assert again(Query("q", "warm"), Item("i", "duvet")) == "a duvet keeps warm"
    with pytest.raises(ValueError, match="give at least one"):
        Contexts([])
    with pytest.raises(ValueError, match="'a'.*twice"):
        Contexts([Chunk("a", "x"), Chunk("a", "y")])


def test_a_judge_reads_the_chunk_that_is_found(tiny_chat_llm, tmp_path):
    judge, contexts = CausalJudge(tiny_chat_llm), Contexts([Chunk("a", "mugs hold coffee")])
    pairs = [(Query("q", "mug"), Item("i", "Mug")), (Query("q", "lamp"), Item("j", "Lamp"))]
    with pytest.warns(UserWarning, match="label"):
        found, wanted = ContextJudge(judge, contexts).score(pairs), judge.score(pairs, ["mugs hold coffee", ""])
    np.testing.assert_array_equal(found.probs, wanted.probs)
    assert not np.allclose(found.probs[0], judge.score(pairs).probs[0])
    contexts.save(tmp_path / "contexts.parquet")
    catalog = Catalog.from_tables(pa.table({"id": ["i", "j"], "title": ["Mug", "Lamp"]}))
    config = JudgeConfig("hf_causal", str(tiny_chat_llm), contexts=str(tmp_path / "contexts.parquet"))
    with pytest.warns(UserWarning, match="label"):
        named = JudgeBuilder(config, catalog, tmp_path, print).judge.score(pairs)
    np.testing.assert_allclose(named.probs, wanted.probs, atol=1e-6)
    with pytest.raises(ValueError, match="contexts='x' is read by kind=hf_causal alone"):
        JudgeConfig("lexical", contexts="x")
    assert ContextJudge(judge, contexts).fingerprint != ContextJudge(judge, Contexts([Chunk("a", "x")])).fingerprint


# -- the step model ---------------------------------------------------------------------------------------------------------


def test_steps_to_learn_from_are_right_or_of_another_example(shop):
    pool = shop_examples(shop, 80, balance=False)
    found = step_examples(pool)
    chains = {(e.query.id, e.item.id): e.reasons.splitlines() for e in pool}
    spoilt = 0
    for example in found:
        chain, said = chains[example.query.id, example.item.id], example.context.splitlines()
        assert [line.partition(":")[0] for line in said] == [line.partition(":")[0] for line in chain[: len(said)]]
        assert (said[-1] == chain[len(said) - 1]) == (example.grade == 3)
        spoilt += said[:-1] != chain[: len(said) - 1]
    assert 0.4 < np.mean([e.grade == 0 for e in found]) < 0.6
    assert spoilt
    with pytest.raises(ValueError, match="no example has reasons"):
        step_examples([Example(Query("q", "mug"), Item("i", "Mug"), 3)])


def test_a_step_judge_reads_the_chain_up_to_the_step(tiny_chat_llm):
    judge = CausalJudge(tiny_chat_llm, prompt=JudgePrompt(STEP, "Is it?"))
    pair = (Query("q", "mug"), Item("i", "Mug"))
    with pytest.warns(UserWarning, match="label"):
        said = StepJudge(judge)([pair, pair], ["Product: mug", ""], ["Category: exact", "Product: mug"])
    wanted = judge.score([pair, pair], ["Product: mug\nCategory: exact", "Product: mug"]).probs[:, 1]
    assert said == pytest.approx(wanted)
    with pytest.raises(ValueError, match="has the scheme 'taobao4'"):
        StepJudge(CausalJudge(tiny_chat_llm))


# -- the trainer ------------------------------------------------------------------------------------------------------------

trl = pytest.importorskip("trl")
from taoemb.judge.relevance_grpo import RelevanceGRPOTrainer  # noqa: E402

COLOURS = ("red", "blue", "green", "black")
EXAMPLES = [
    Example(Query(f"{n}", f"{colour} mug"), Item(f"{n}", f"mug {n}"), grade, 2, (0, 0, 1, 2)[grade],
            f"Category: exact\nAttributes: {('violated', 'violated', 'partial', 'match')[grade]}")
    for n in range(2) for grade, colour in enumerate(COLOURS)
]  # fmt: skip

TOLD = [dataclasses.replace(example, context="it is so") for example in EXAMPLES]


@pytest.fixture
def made(tiny_chat_llm, tmp_path):
    """``made(config, ...)``: a trainer on a fresh tiny model; ``steps`` texts are what it writes, row by row, in the place of samples."""

    def make(config, *, style="post", examples=EXAMPLES, written=None, batch=2, steps=1, num_iterations=1, **more):
        from taoemb.judge.causal import load_causal

        model, tokenizer = load_causal(tiny_chat_llm, dtype="float32")
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        arguments = trl.GRPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=batch * config.num_generations,
            num_generations=config.num_generations, max_completion_length=40, temperature=1.0, beta=config.beta, top_k=0, report_to="none",
            use_cpu=True, disable_tqdm=True, shuffle_dataset=False, learning_rate=1e-3, save_strategy="no", seed=0, bf16=False,
            dataloader_pin_memory=False, logging_steps=1, num_iterations=num_iterations,
        )  # fmt: skip
        trainer = RelevanceGRPOTrainer(
            model, ModelPrompt(JudgePrompt(rules="Judge."), tokenizer), examples, config, arguments, style=style, **more
        )
        if written is not None:
            trainer._generate_single_turn = Written(trainer, written)
        return trainer

    return make


class Written:
    """Stands where TRL samples: the texts given, for each call; keeps the prompts that it was called with."""

    def __init__(self, trainer, calls):
        self.tokenizer, self.calls, self.prompts = trainer.processing_class, list(calls), []

    def __call__(self, prompt_ids, *_):
        self.prompts.append([self.tokenizer.decode(ids) for ids in prompt_ids])
        texts = self.calls.pop(0)
        assert len(texts) == len(prompt_ids)
        return [
            self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            for text in texts
        ], None


def rollout(trainer, numbers):
    trainer.model.train()
    rows = [trainer.train_dataset[n] for n in numbers for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def plain(**changed):
    return GRPOConfig(**{"num_generations": 4, "beta": 0.0, **changed})


def chain(n):
    return EXAMPLES[n].completion("post")


RIGHT, WRONG = chain(3), f"1\n{EXAMPLES[3].reasons}"


def test_replay_touches_groups_of_low_accuracy_alone_and_keeps_their_prompts(made):
    """Group 3 is all wrong: of its two worst rows, the unreadable one and the one furthest off, one gets the one right hinted completion
    of the second level; group 1 has enough right ones."""
    own = [[RIGHT, RIGHT, WRONG, WRONG, "2", "3", "no", "1"]]
    hinted = [["2", "4"], [EXAMPLES[7].completion("post"), "2"]]  # a right label without reasons earns nothing
    numbers = [3, 7]
    trainer = made(plain(replay=ReplayConfig(share=0.5, weight=0.5)), written=own + hinted)
    output = rollout(trainer, numbers)
    seen = trainer._generate_single_turn.prompts
    assert [len(call) for call in seen] == [8, 2, 2]
    assert all("Category: exact" in text and "Grade" not in text for text in seen[1])
    assert all("Grade: 4" in text for text in seen[2])
    assert trainer._replayed.tolist() == [False] * 6 + [True, False]
    tokenizer = trainer.processing_class
    texts = tokenizer.batch_decode(output["completion_ids"], skip_special_tokens=True)
    assert texts[6] == chain(7)
    assert texts[:6] + texts[7:] == own[0][:6] + own[0][7:]
    prompts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(output["prompt_ids"], output["prompt_mask"])]
    assert prompts == seen[0]
    assert "Context" not in "".join(prompts)
    s = math.sqrt(
        3 / 12
    )  # rewards 0 0 1 0, and half the weight for the group that has an advantage only because of the hint
    wanted = 0.5 * torch.tensor([-0.25, -0.25, 0.75, -0.25]) / (s + 1e-4)
    torch.testing.assert_close(output["advantages"][4:], wanted)
    logged = trainer._metrics["train"]
    assert (logged["replay/groups"], logged["replay/rescued"]) == ([1.0], [1.0])
    assert logged["label/right"] == [pytest.approx(2 / 7)]  # of its own completions


def test_replay_without_a_right_hinted_completion_changes_nothing(made):
    trainer = made(plain(replay=ReplayConfig(share=0.25)), written=[["1"] * 8, *[["1", "1"]] * 3])
    output = rollout(trainer, [3, 7])
    assert not trainer._replayed.any()
    assert not output["advantages"].any()
    assert trainer._metrics["train"]["replay/rescued"] == [0.0]


def test_replay_goes_with_steps_and_with_the_posterior(made):
    posterior = PosteriorSampler((np.zeros(8), np.full(8, 4)), 1)
    config = plain(replay=ReplayConfig(share=0.25, weight=0.5), srpo=SRPOConfig(weight=1.0))
    trainer = made(config, batch=1, written=[["1", "1", "1", "1"], [RIGHT]], posterior=posterior)
    output = rollout(trainer, [3])
    assert trainer._replayed.sum() == 1
    assert posterior.history == [[(3, 0, 3)]]  # what a hint brought about is not its own
    full = made(
        plain(replay=ReplayConfig(share=0.25), srpo=SRPOConfig(weight=1.0)),
        batch=1,
        written=[["1", "1", "1", "1"], [RIGHT]],
    )
    torch.testing.assert_close(output["advantages"], 0.5 * rollout(full, [3])["advantages"])


def test_the_posterior_is_for_one_process_and_one_update(made):
    with pytest.raises(ValueError, match="grpo.order=posterior: 1 processes, 2 updates per generation"):
        made(plain(), posterior=PosteriorSampler((np.zeros(8), np.full(8, 4)), 1), num_iterations=2)


def test_srpo_gives_tokens_their_steps_advantage(made):
    half = RIGHT.replace("match", "partial")
    trainer = made(plain(srpo=SRPOConfig(weight=0.5)), batch=1, written=[[RIGHT, half, WRONG, "1"]])
    output = rollout(trainer, [3])
    advantages_BT = output["advantages"]
    outcome = torch.tensor([0.5, 0.5, -0.5, -0.5]) / (math.sqrt(1 / 3) + 1e-4)
    values = torch.tensor([[1, NAN, NAN, 1, 1], [1, NAN, NAN, 1, 0], [0, NAN, NAN, 1, 1], [0] + [NAN] * 4])
    tokenizer = trainer.processing_class
    steps = torch.full(advantages_BT.shape, -1)
    for row, (ids, mask) in enumerate(
        zip(output["completion_ids"].tolist(), output["completion_mask"].sum(1).tolist())
    ):
        for t in range(mask):
            before, after = (tokenizer.decode(ids[: t + k], skip_special_tokens=True) for k in (0, 1))
            lines = after.split("\n")
            if len(after) > len(before) and lines[-1]:
                steps[row, t] = 0 if len(lines) == 1 else {"C": 3, "A": 4}[lines[-1][0]]
    torch.testing.assert_close(advantages_BT, step_advantages(outcome, steps, values, 4, SRPOConfig(weight=0.5)))
    # Attributes: 1, 0, 1 and unknown: the one that is wrong there is told so, although its label is right.
    assert advantages_BT[1][steps[1] == 4].max() < 0 < advantages_BT[0][steps[0] == 4].min()


def test_a_step_model_judges_what_nothing_verifies(made):
    asked = []

    def step_model(pairs, before, lines):
        asked.extend(zip([q.text for q, _ in pairs], before, lines))
        return [1.0, None, NAN, 7.0]

    with_product = f"4\nProduct: mug\n{EXAMPLES[3].reasons}"
    trainer = made(plain(srpo=SRPOConfig(weight=0.5)), batch=1, written=[[with_product] * 4], step_model=step_model)
    output = rollout(trainer, [3])
    assert asked == [("black mug", "", "Product: mug")] * 4
    assert output["advantages"].isfinite().all()
    assert trainer._step_values()[:, 1].tolist() == pytest.approx([1, NAN, NAN, NAN], nan_ok=True)


def test_srpo_without_weight_trains_as_plain_grpo(made):
    """One step of the optimiser: the same weights, bit for bit."""
    ends = []
    for config in (plain(), plain(srpo=SRPOConfig(weight=0.0, mask="first_error"))):
        trainer = made(config, batch=1, written=[[RIGHT, RIGHT, "1", "no"]], examples=EXAMPLES[3:4])
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def gradient(trainer, output):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, output).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def logps_of(trainer, prompt_ids, prompt_mask, completion_ids, mask):
    """Log-probabilities of completions by a plain forward pass."""
    ids, seen = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask], 1)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(input_ids=ids, attention_mask=seen, position_ids=places).logits[
        :, prompt_ids.shape[1] - 1 : -1
    ]
    return torch.log_softmax(logits, -1).gather(2, completion_ids[..., None])[..., 0]


def by_hand(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_gradient_of_stepwise_and_clamped_advantages(made):
    config = plain(srpo=SRPOConfig(weight=0.5), advantage_clip=0.6)
    trainer = made(config, batch=1, written=[[RIGHT, RIGHT.replace("match", "partial"), WRONG, "no"]])
    output = rollout(trainer, [3])
    found = gradient(trainer, output)
    mask = output["completion_mask"]
    logps = logps_of(trainer, output["prompt_ids"], output["prompt_mask"], output["completion_ids"], mask)
    each = -(logps - logps.detach()).exp() * output["advantages"]
    dapo = (each * mask).sum() / mask.sum()
    torch.testing.assert_close(found, by_hand(trainer, dapo), atol=1e-6, rtol=1e-3)
    assert output["advantages"].abs().max() <= 0.6 + 1e-6


def test_dyknow_answers_half_of_each_group_with_context(made):
    """The groups are normalised apart, and the answers without the context carry what they teach the prompt with it."""
    texts = [RIGHT, "1", "1", "1", RIGHT, RIGHT, RIGHT, "1"]
    trainer = made(
        plain(num_generations=8, dyknow=DyKnowConfig(True)),
        batch=1,
        written=[texts],
        examples=TOLD,
    )
    output = rollout(trainer, [3])
    prompts = trainer._generate_single_turn.prompts[0]
    assert ["it is so" in prompt for prompt in prompts] == [False] * 4 + [True] * 4
    s = 0.5 + 1e-4
    torch.testing.assert_close(
        output["advantages"], torch.tensor([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]) / s
    )
    beta = 4 / (1 + math.exp(-4 * 0.5))
    union = torch.tensor([0.5, -0.5, -0.5, -0.5]) / (math.sqrt(2 / 7) + 1e-4)
    wanted = torch.where(union > 0, 0.1 / beta * union, beta * union)
    torch.testing.assert_close(output["transfer"], torch.cat([wanted, torch.zeros(4)]))
    found = gradient(trainer, output)
    mask, ids = output["completion_mask"], output["completion_ids"]
    logps = logps_of(trainer, output["prompt_ids"], output["prompt_mask"], ids, mask)
    each = -(logps - logps.detach()).exp() * output["advantages"][:, None]
    policy = 2 * (each * mask).sum() / mask.sum()
    other = logps_of(trainer, output["context_prompt_ids"][:4], output["context_prompt_mask"][:4], ids[:4], mask[:4])
    moved = transfer_objective(other, mask[:4], wanted).mean()
    torch.testing.assert_close(found, by_hand(trainer, policy - moved), atol=1e-6, rtol=1e-3)
    assert trainer._metrics["train"]["dyknow/transfer"] == [pytest.approx(moved.item(), rel=1e-4)]


def test_dyknow_without_the_third_term_is_two_groups(made):
    trainer = made(plain(num_generations=4, beta=0.1, dyknow=DyKnowConfig(True, transfer=False)), batch=1, written=[[RIGHT, "1", "1", "1"]], examples=TOLD)  # fmt: skip
    output = rollout(trainer, [3])
    assert "transfer" not in output
    assert trainer.beta == 0.05
    s = math.sqrt(0.5) + 1e-4
    torch.testing.assert_close(output["advantages"], torch.tensor([0.5, -0.5, 0, 0]) / s)
    with pytest.raises(ValueError, match="no example has a chunk of context"):
        made(plain(dyknow=DyKnowConfig(True)))


def test_the_expected_reward_of_the_label_in_closed_form(made):
    trainer = made(plain(label_objective="expected"), batch=1, written=[[RIGHT, RIGHT, "1", "no"]])
    output = rollout(trainer, [3])
    assert not output["advantages"][:, 0].any()
    assert output["advantages"][:, 1].all()
    found = gradient(trainer, output)
    mask = output["completion_mask"]
    logps = logps_of(trainer, output["prompt_ids"], output["prompt_mask"], output["completion_ids"], mask)
    each = -(logps - logps.detach()).exp() * output["advantages"]
    answer = trainer.processing_class("4", add_special_tokens=False)["input_ids"]
    places = (output["prompt_mask"].cumsum(1) - 1).clamp(min=0)
    logits = trainer.model(
        input_ids=output["prompt_ids"], attention_mask=output["prompt_mask"], position_ids=places
    ).logits[:, -1]
    chance = torch.softmax(logits, -1)[:, answer[0]]
    torch.testing.assert_close(
        found, by_hand(trainer, (each * mask).sum() / mask.sum() - chance.mean()), atol=1e-6, rtol=1e-3
    )


def test_the_closed_form_learns_the_labels(made):
    trainer = made(plain(label_objective="expected", num_generations=2), style="label", batch=8, steps=15)
    before = right_label(trainer)
    trainer.args.learning_rate = 1e-2
    trainer.train()
    assert right_label(trainer) > before + 0.2


@torch.no_grad()
def right_label(trainer):
    """Mean probability of the right label."""
    found = []
    for example, label in zip(trainer.examples, trainer.labels):
        ids = torch.tensor([trainer.reads.encode(example.query, example.item)])
        found.append(torch.softmax(trainer.model(ids).logits[0, -1], -1)[trainer.answers[label]].item())
    return np.mean(found)


def test_rows_of_a_group_must_be_in_one_process(made):
    trainer = made(plain())
    rows = [trainer.train_dataset[n] for n in (0, 0, 0, 1)]
    with pytest.raises(ValueError, match="4 rows in groups of 4: a process must have whole groups"):
        trainer._generate_and_score_completions(rows)


TINY = ["rules=Judge.", "max_chars=60", "max_new_tokens=40", "save_steps=1", "dpo.prompts=8", "dpo.steps=2", "dpo.batch_size=2", "dpo.temperature=1.5",
        "grpo.prompts=8", "grpo.steps=3", "grpo.batch_size=2", "grpo.learning_rate=1e-3", "grpo.temperature=1", "grpo.balance=false"]  # fmt: skip


@pytest.fixture(scope="module")
def taught(tiny_chat_llm, tmp_path_factory):
    """A tiny model that writes the chains of EXAMPLES, for each pair the right one about half of the time."""
    wrong = [
        dataclasses.replace(e, grade=o.grade, attribute=o.attribute, reasons=o.reasons)
        for e, o in zip(EXAMPLES, EXAMPLES[1:] + EXAMPLES[:1])
    ]
    words = [
        f"model={tiny_chat_llm}",
        "stages=[sft]",
        "sft.steps=80",
        "sft.batch_size=8",
        "sft.learning_rate=1e-2",
        *TINY,
    ]
    run_dir = tmp_path_factory.mktemp("taught") / "run"
    return JudgeTrainer(load_config(JudgeTrainConfig, None, words), run_dir, examples=EXAMPLES + wrong).run()


def end_of(folder):
    return load_file(folder / "grpo" / "model" / "model.safetensors")


@pytest.mark.parametrize("recipe", ["taosr1", "agrl", "she", "dyknow"])
def test_recipes_run(taught, tmp_path, recipe, monkeypatch):
    (tmp_path / "chunks.csv").write_text("id,text\na,a black mug is excellent\nb,a red mug is not\n")
    words = [f"model={taught}", "stages=[dpo,grpo]", *TINY, "grpo.num_generations=8"]
    if recipe == "dyknow":
        words += [f"contexts={tmp_path / 'chunks.csv'}", "grpo.pool=1"]
    config = load_config(JudgeTrainConfig, recipe_file(recipe), words)
    built, fit = {}, JudgeTrainer._fit

    def keeping(self, stage, trainer, reads):
        built[stage] = trainer
        fit(self, stage, trainer, reads)

    monkeypatch.setattr(JudgeTrainer, "_fit", keeping)
    JudgeTrainer(config, tmp_path / "run", examples=EXAMPLES).run()
    trainer = built["grpo"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "grpo" / "log.jsonl").read_text().splitlines()]
    logged = set().union(*rows)
    assert ("replay/groups" in logged) == (recipe == "agrl")
    assert ("dyknow/transfer" in logged) == (recipe == "dyknow")
    assert trainer._token_level == (recipe == "she")
    assert (len(trainer.train_dataset) == 6) == (recipe == "she")  # a curriculum is as long as the training
    plain = ("dapo", 0.02, 0)
    assert (trainer.loss_type, trainer.beta, trainer.args.top_k) == (
        ("grpo", 0.01, 100) if recipe == "dyknow" else plain
    )
    before = load_file(tmp_path / "run" / "dpo" / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in end_of(tmp_path / "run").items())


def test_the_pool_is_kept(taught, tmp_path):
    words = [f"model={taught}", "stages=[grpo]", *TINY, "grpo.pool=.99"]
    trainer = JudgeTrainer(load_config(JudgeTrainConfig, None, words), tmp_path / "run", examples=EXAMPLES)
    model, reads = trainer._load(taught)
    (tmp_path / "run" / "grpo").mkdir()
    found = trainer._pooled("grpo", model, reads, EXAMPLES)
    top = CausalJudge(taught).score([(e.query, e.item) for e in EXAMPLES]).probs.max(1)
    assert found == [e for e, p in zip(EXAMPLES, top) if p < 0.99]
    (tmp_path / "run" / "grpo" / "pool.json").write_text("[0, 5]")
    assert trainer._pooled("grpo", model, reads, EXAMPLES) == [EXAMPLES[0], EXAMPLES[5]]
    (tmp_path / "run" / "grpo" / "pool.json").write_text("[]")
    with pytest.raises(ValueError, match=r"grpo.pool=0.99: of all 8 prompts the judge is surer than that"):
        trainer._pooled("grpo", model, reads, EXAMPLES)


def test_what_the_last_stage_would_find_out_is_said_at_once(taught, tmp_path):
    bare = [dataclasses.replace(e, reasons="") for e in EXAMPLES]
    config = load_config(JudgeTrainConfig, recipe_file("agrl"), [f"model={taught}", *TINY])
    with pytest.raises(ValueError, match="no example has reasons, and style=label has no steps.*give teacher.url="):
        JudgeTrainer(config, tmp_path / "one", examples=bare).run()
    config = load_config(JudgeTrainConfig, recipe_file("she"), [f"model={taught}", *TINY, f"grpo.srpo.model={taught}"])
    with pytest.raises(ValueError, match="is no folder of a step model"):
        JudgeTrainer(config, tmp_path / "two", examples=EXAMPLES).run()
    assert not (tmp_path / "one" / "sft").exists()
    assert not (tmp_path / "two" / "sft").exists()


def test_context_is_read_in_half_of_the_warm_start(taught, tmp_path):
    (tmp_path / "chunks.csv").write_text("id,text\na,a black mug is excellent\nb,red or blue or green mugs are not\n")
    words = [f"model={taught}", f"contexts={tmp_path / 'chunks.csv'}", *TINY]
    for context, share in (("false", 1.0), ("true", 0.5)):
        config = load_config(JudgeTrainConfig, None, [*words, f"grpo.dyknow.context={context}"])
        trainer = JudgeTrainer(config, tmp_path / context, examples=EXAMPLES)
        assert np.mean([bool(e.context) for e in trainer.examples]) == share
        assert all(e.context for e in trainer._fresh(8, 202))
        assert Contexts.load(tmp_path / context / "contexts.parquet").chunks["a"].text == "a black mug is excellent"


def test_the_step_models_recipe_runs_and_serves_srpo(taught, tiny_chat_llm, tmp_path):
    small = ["sft.steps=60", "sft.batch_size=8", "sft.learning_rate=1e-2", *TINY[1:]]
    config = load_config(JudgeTrainConfig, recipe_file("step_model"), [f"model={tiny_chat_llm}", *small])
    folder = JudgeTrainer(config, tmp_path / "steps", examples=EXAMPLES).run()
    assert JudgePrompt.load(folder).scheme == STEP
    words = [
        f"model={taught}",
        "stages=[grpo]",
        *TINY,
        "grpo.num_generations=4",
        "grpo.patterns=1",
        f"grpo.srpo.model={folder}",
    ]
    config = load_config(JudgeTrainConfig, recipe_file("she"), words)
    told = [dataclasses.replace(e, reasons="") for e in EXAMPLES]  # nothing verifies a step but the model
    JudgeTrainer(config, tmp_path / "run", examples=told).run()
    assert all(value.isfinite().all() for value in end_of(tmp_path / "run").values())


def test_unknown_recipes_are_listed():
    with pytest.raises(ValueError, match="recipe 'rag': give one of agrl, dyknow, she, step_model, taosr1, or a file"):
        recipe_file("rag")
    assert recipe_file("mine.yaml").name == "mine.yaml"


@pytest.mark.parametrize("order", ["curriculum", "posterior"])
def test_a_stage_with_its_switches_ends_the_same_after_a_kill(taught, tmp_path, order, monkeypatch):
    """Two runs, of which one is stopped behind its second step: the same weights."""
    switches = ["grpo.num_generations=4", f"grpo.order={order}", "grpo.advantage_clip=2", "grpo.shaping.format=.5", "grpo.shaping.category=.2",
                "grpo.shaping.gate=soft", "grpo.replay.share=.5", "grpo.srpo.weight=.5", "grpo.srpo.mask=critical"]  # fmt: skip
    config = load_config(JudgeTrainConfig, None, [f"model={taught}", "stages=[grpo]", *TINY, *switches])
    JudgeTrainer(config, tmp_path / "one", examples=EXAMPLES).run()
    save = RelevanceGRPOTrainer._save_checkpoint

    def stopping(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RelevanceGRPOTrainer, "_save_checkpoint", stopping)
        with pytest.raises(KeyboardInterrupt):
            JudgeTrainer(config, tmp_path / "two", examples=EXAMPLES).run()
    JudgeTrainer(config, tmp_path / "two", examples=EXAMPLES).run()
    one, two = end_of(tmp_path / "one"), end_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_trl_has_what_is_overridden():
    """Private methods that the trainer stands on; another TRL has to be looked at."""
    for name in ("_generate_and_score_completions", "_generate", "_generate_single_turn", "_calculate_rewards", "_compute_loss",
                 "_tokenize_prompts", "_get_train_sampler", "_save_checkpoint", "_load_optimizer_and_scheduler",
                 "_get_per_token_logps_and_entropies"):  # fmt: skip
        assert callable(getattr(trl.GRPOTrainer, name))
    assert parse_label(RIGHT) == 3
