"""Training of a judge on a tiny model: what TRL is given, what it learns, and runs that are killed."""

import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from taoemb.catalog import Item, Query
from taoemb.judge import CausalJudge, JudgePrompt
from taoemb.judge import train as train_module
from taoemb.judge.examples import Example
from taoemb.judge.train import JudgeTrainer, check_trl
from taoemb.judge.train_config import GRPOConfig, JudgeTrainConfig, PreferenceConfig, SFTConfig

trl = pytest.importorskip("trl")
from taoemb.judge.relevance_grpo import RelevanceGRPOTrainer  # noqa: E402

COLOURS = ("red", "blue", "green", "black")
PAIRS = [
    Example(Query(f"{colour} {n}", f"{colour} mug"), Item(f"{n}", f"mug {n}"), grade)
    for n in range(6)
    for grade, colour in enumerate(COLOURS)
]
"""The grade is the query's colour: a tiny model learns it in a few steps."""


def settings(model, **changed):
    given = {
        "model": str(model), "stages": ("sft",), "style": "label", "rules": "Judge.", "max_chars": 60, "max_new_tokens": 2, "save_steps": 2,
        "sft": SFTConfig(steps=6, batch_size=5, learning_rate=3e-3),
        "dpo": PreferenceConfig(prompts=24, samples=4, steps=12, batch_size=4, learning_rate=3e-4, temperature=1.5),
        "grpo": GRPOConfig(prompts=24, num_generations=4, steps=3, batch_size=2, learning_rate=1e-4, temperature=1.5, balance=False),
    }  # fmt: skip
    return JudgeTrainConfig(**given | changed)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def accuracy(judge, examples=PAIRS):
    found = judge.score([(e.query, e.item) for e in examples])
    return (found.grade == judge.scheme.labels([e.grade for e in examples])).mean(), found.label_mass.mean()


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Seen:
    """Keeps the trainer and the arguments of each stage, and lets it train."""

    def __init__(self, monkeypatch):
        self.trainers, fit = {}, JudgeTrainer._fit

        def keeping(judge_trainer, stage, trainer, reads):
            self.trainers[stage] = trainer
            fit(judge_trainer, stage, trainer, reads)

        monkeypatch.setattr(JudgeTrainer, "_fit", keeping)


@pytest.fixture(scope="module")
def run(tiny_chat_llm, tmp_path_factory):
    """A finished run of three stages, and the trainers of each."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        config = settings(
            tiny_chat_llm,
            stages=("sft", "dpo", "grpo"),
            sft=SFTConfig(steps=40, batch_size=6, learning_rate=1e-2),
            save_steps=20,
        )
        told = []
        trainer = JudgeTrainer(config, tmp_path_factory.mktemp("judge") / "run", examples=PAIRS, say=told.append)
        trainer.run()
    trainer.seen, trainer.told = seen.trainers, told
    return trainer


# -- what is trained on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_sft_trains_what_the_judge_reads_and_the_loss_is_its_cross_entropy(tiny_chat_llm, tmp_path, monkeypatch, chat):
    start = shutil.copytree(tiny_chat_llm, tmp_path / "start")
    if not chat:
        (start / "chat_template.jinja").unlink()
    judge = CausalJudge(start, prompt=JudgePrompt(rules="Judge.", max_chars=60))
    assert judge.reads.chat == chat
    seen = Seen(monkeypatch)
    few = PAIRS[:4]
    JudgeTrainer(settings(start, sft=SFTConfig(1, 4, 1e-3)), tmp_path / "run", examples=few).run()
    rows = sorted(seen.trainers["sft"].train_dataset, key=lambda row: row["labels"][-3:])
    loss, count = 0.0, 0
    expected = []
    for example in few:
        prompt = judge.reads.encode(example.query, example.item)
        answer = judge.reads.encode(example.query, example.item, "", str(example.grade + 1))
        assert answer[: len(prompt)] == prompt
        end = [judge.tokenizer.eos_token_id, *(judge.tokenizer.encode("\n") if chat else [])]
        target = answer[len(prompt) :] + end
        expected.append((prompt + target, [-100] * len(prompt) + target))
        with torch.no_grad():
            logits = judge.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        count += len(target)
    assert [(row["input_ids"], row["labels"]) for row in rows] == sorted(expected, key=lambda row: row[1][-3:])
    assert rows_of(tmp_path / "run" / "sft")[0]["loss"] == pytest.approx(loss / count, rel=1e-5)


def test_reasons_are_part_of_the_completion(tiny_chat_llm, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    pairs = [dataclasses.replace(example, reasons="Category: exact") for example in PAIRS[:4]]
    for style, text in (("post", "4\nCategory: exact"), ("pre", "Category: exact\nGrade: 4")):
        config = settings(tiny_chat_llm, style=style, sft=SFTConfig(1, 2, 1e-3))
        JudgeTrainer(config, tmp_path / style, examples=pairs[3:]).run()
        row = seen.trainers["sft"].train_dataset[0]
        written = [token for token in row["labels"] if token != -100]
        assert AutoTokenizer.from_pretrained(tiny_chat_llm).decode(written) == f"{text}<|im_end|>\n"


def test_a_generated_shop_writes_the_pairs(tiny_chat_llm, tmp_path, monkeypatch):
    from taoemb.shop import generate_shop

    generate_shop(600, seed=1, train_queries=120, validation_queries=20, test_queries=30).save(tmp_path / "shop")
    seen = Seen(monkeypatch)
    config = settings(tiny_chat_llm, data=str(tmp_path / "shop"), examples=16, sft=SFTConfig(1, 2, 1e-3), style="post")
    trainer = JudgeTrainer(config, tmp_path / "run")
    trainer.run()
    assert len(seen.trainers["sft"].train_dataset) == 16
    assert all(example.reasons and example.query.split == "train" for example in trainer.examples)
    assert [len([e for e in trainer.examples if e.grade == grade]) for grade in range(4)] == [4] * 4
    assert trainer._fresh(16, 101) != trainer.examples


def test_a_model_that_may_think_first_is_told_not_to(tiny_chat_llm, tmp_path):
    """A chat template like that of Qwen3: without thinking an empty thought is part of the prompt."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    start = shutil.copytree(tiny_chat_llm, tmp_path / "start")
    (start / "chat_template.jinja").write_text(template)
    trained = JudgeTrainer(settings(start), tmp_path / "run", examples=PAIRS)
    trained.run()
    judge = trained.judge()
    assert judge.tokenizer.decode(judge._ids(PAIRS[0].query, PAIRS[0].item, "")).endswith("</think>\n\n")
    (start / "chat_template.jinja").write_text(template.replace("enable_thinking", "brief"))
    with pytest.raises(ValueError, match="writes an answer elsewhere than behind its generation prompt"):
        JudgeTrainer(settings(start), tmp_path / "other", examples=PAIRS).run()


# -- what is learnt ------------------------------------------------------------------------------------------------------


def test_sft_learns_and_the_judge_finds_its_prompt(run):
    judge = CausalJudge(run.run_dir / "sft" / "model")
    assert judge.prompt == JudgePrompt(rules="Judge.", max_chars=60)
    found, mass = accuracy(judge)
    assert found > 0.6  # a constant judge has .25
    assert mass > 0.9
    losses = [row["loss"] for row in rows_of(run.run_dir / "sft") if "loss" in row]
    assert losses[-1] < losses[0] / 3


def test_dpo_parts_the_pairs(run):
    rows = rows_of(run.run_dir / "dpo")
    losses, margins = ([row[name] for row in rows if name in row] for name in ("loss", "rewards/margins"))
    assert losses[-1] < math.log(2)
    assert margins[-1] > max(0, margins[0])
    dataset = run.seen["dpo"].train_dataset
    samples = [json.loads(line) for line in (run.run_dir / "dpo" / "samples.jsonl").read_text().splitlines()]
    some_wrong = [i for i, e in enumerate(run._fresh(24, 101)) if {*samples[i]} != {str(e.grade + 1)}]
    assert len(dataset) == len(some_wrong) > 3
    chosen = sorted(run.seen["dpo"].processing_class.decode(row["chosen_ids"]) for row in dataset)
    assert chosen == sorted(f"{run._fresh(24, 101)[i].grade + 1}<|im_end|>\n" for i in some_wrong)


def test_the_first_dpo_loss_is_log_2(tiny_chat_llm, tmp_path):
    dpo = PreferenceConfig(prompts=4, samples=2, steps=1, batch_size=4, learning_rate=1e-4)
    JudgeTrainer(settings(tiny_chat_llm, stages=("dpo",), dpo=dpo), tmp_path / "run", examples=PAIRS).run()
    assert rows_of(tmp_path / "run" / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_kto_runs_on_right_and_wrong_completions(run, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    dpo = dataclasses.replace(run.config.dpo, steps=2)
    config = dataclasses.replace(run.config, model=str(run.run_dir / "sft" / "model"), stages=("kto",), dpo=dpo)
    trainer = JudgeTrainer(config, tmp_path / "run", examples=PAIRS)
    trainer.run()
    assert 0 < sum(seen.trainers["kto"].train_dataset["label"]) < 24 * 4
    assert not same(weights(tmp_path / "run" / "kto" / "model"), weights(run.run_dir / "sft" / "model"))
    assert accuracy(trainer.judge())[1] > 0.8


def test_grpo_uses_prompts_that_are_neither_too_easy_nor_too_hard(run):
    examples = run._fresh(24, 202)
    samples = [json.loads(line) for line in (run.run_dir / "grpo" / "samples.jsonl").read_text().splitlines()]
    counts = [sum(text == str(e.grade + 1) for text in texts) for e, texts in zip(examples, samples)]
    kept = [(e.query.text, e.item.title, e.grade) for e, count in zip(examples, counts) if 0 < count < 4]
    dataset = run.seen["grpo"].train_dataset
    assert len(dataset) == len(kept) < 24
    for row, (query, title, grade) in zip(dataset, kept):
        assert query in row["prompt"][-1]["content"]
        assert f'"{title}"' in row["prompt"][-1]["content"]
        assert run.seen["grpo"].labels[row["example"]] == grade


def test_grpo_rewards_the_right_label(run, tmp_path, monkeypatch):
    """TRL hands the column ``example`` and the completions to the reward."""
    calls, trainer, reward = [], run.seen["grpo"], RelevanceGRPOTrainer.shaped_reward
    chats = [[{"role": "assistant", "content": text}] for text in ("4", "1", "4 4", "")]
    best, second = trainer.labels.index(3), trainer.labels.index(1)
    assert trainer.shaped_reward(chats, [best, best, best, second], prompts=None) == [1, 0, 0, 0]
    assert trainer.shaped_reward([" 2", "2"], [second, best]) == [1, 0]

    def watching(self, completions, example, **more):
        prompts = [p[-1]["content"] for p in more["prompts"]]
        calls.append(([c[0]["content"] for c in completions], [self.labels[n] for n in example], prompts))
        return reward(self, completions, example)

    monkeypatch.setattr(RelevanceGRPOTrainer, "shaped_reward", watching)
    config = dataclasses.replace(
        run.config,
        model=str(run.run_dir / "dpo" / "model"),
        stages=("grpo",),
        grpo=dataclasses.replace(run.config.grpo, steps=2),
    )
    JudgeTrainer(config, tmp_path / "run", examples=PAIRS).run()
    assert [len(texts) for texts, _, _ in calls] == [8, 8]
    truth = {e.query.text: e.grade for e in PAIRS}
    for texts, answers, prompts in calls:
        assert answers == [truth[prompt.split('"')[1]] for prompt in prompts]
        assert answers == [answer for answer in answers[::4] for _ in range(4)]
        assert set(texts) & set("1234")
    logged = [row["rewards/shaped_reward/mean"] for row in rows_of(run.run_dir / "grpo") if "loss" in row]
    assert 0 < logged[0] < 1


def test_grpo_with_fewer_prompts_than_a_batch_says_so(run, tmp_path):
    grpo = dataclasses.replace(run.config.grpo, batch_size=25)
    model = str(run.run_dir / "dpo" / "model")
    with pytest.raises(ValueError, match=r"fewer than grpo.batch_size=25; raise grpo.prompts or lower"):
        JudgeTrainer(
            dataclasses.replace(run.config, model=model, stages=("grpo",), grpo=grpo), tmp_path / "run", examples=PAIRS
        ).run()


def test_lora_saves_a_merged_model(run, tmp_path):
    pytest.importorskip("peft")
    start = run.run_dir / "sft" / "model"
    dpo = dataclasses.replace(run.config.dpo, steps=2, learning_rate=1e-2)
    config = dataclasses.replace(
        run.config,
        model=str(start),
        stages=("sft", "dpo"),
        lora_rank=4,
        sft=SFTConfig(3, 4, 1e-2),
        dpo=dpo,
        save_steps=1,
    )
    trainer = JudgeTrainer(config, tmp_path / "run", examples=PAIRS)
    trainer.run()
    before = weights(start)
    for stage in ("sft", "dpo"):
        folder = tmp_path / "run" / stage / "model"
        assert not list(folder.glob("*adapter*"))
        after = weights(folder)
        assert after.keys() == before.keys()
        assert not same(before, after)
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        before = after
    assert accuracy(trainer.judge())[1] > 0.8


def test_an_adapter_is_no_start(tiny_chat_llm, tmp_path):
    peft = pytest.importorskip("peft")
    judge = CausalJudge(tiny_chat_llm)
    peft.get_peft_model(judge.model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    judge.tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter; merge it"):
        JudgeTrainer(settings(tmp_path / "adapter"), tmp_path / "run", examples=PAIRS).run()


def test_a_teacher_writes_the_completions_that_are_preferred(tiny_chat_llm, tmp_path, monkeypatch):
    """A model that is always wrong learns from the teacher alone, and only where the teacher has something."""
    seen, asked = Seen(monkeypatch), []

    def teacher(example):
        asked.append(example)
        return f"{example.grade + 1}\nas taught" if example.grade < 2 else None

    dpo = PreferenceConfig(prompts=24, samples=2, steps=1, batch_size=2)
    config = settings(tiny_chat_llm, stages=("dpo",), style="post", dpo=dpo)
    trainer = JudgeTrainer(config, tmp_path / "run", examples=PAIRS, teacher=teacher)
    trainer.run()
    assert len(asked) > 12
    dataset, tokenizer = seen.trainers["dpo"].train_dataset, AutoTokenizer.from_pretrained(tiny_chat_llm)
    taught = [row for row in dataset if "as taught" in tokenizer.decode(row["chosen_ids"])]
    assert len(taught) == sum(example.grade < 2 for example in asked) > 0
    monkeypatch.setattr(train_module, "preference_pairs", lambda *_, **more: [])
    nothing = JudgeTrainer(config, tmp_path / "other", examples=PAIRS)
    with pytest.raises(ValueError, match="dpo: of 24 prompts none has a right and a wrong completion"):
        nothing.run()


# -- kills ---------------------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
import test_judge_train as t

step_end = t.train_module._Watch.on_step_end

def killing(self, args, state, control, **more):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    step_end(self, args, state, control, **more)

t.train_module._Watch.on_step_end = killing
t.JudgeTrainer(t.settings(sys.argv[1]), sys.argv[2], examples=t.PAIRS).run()
"""


@pytest.fixture(scope="module")
def undisturbed(tiny_chat_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    JudgeTrainer(settings(tiny_chat_llm), folder, examples=PAIRS).run()
    return folder


@pytest.fixture(scope="module")
def killed(tiny_chat_llm, tmp_path_factory):
    """The run folder of a process that was killed at step 5 of 6, a step after the checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    words = [sys.executable, "-c", KILLED, str(tiny_chat_llm), str(folder), os.path.dirname(__file__)]
    child = subprocess.run(words, capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert child.stdout == b""  # nothing for a pipe, and no bars
    assert b"%|" not in child.stderr
    return folder


def checkpoints(folder):
    return sorted(path.name for path in (folder / "sft" / "checkpoints").glob("checkpoint-*"))


def assert_finished_as(folder, undisturbed):
    assert same(weights(folder / "sft" / "model"), weights(undisturbed / "sft" / "model"))
    since_start = {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_loss",
        "total_flos",
        "num_tokens",
    }
    logs = [
        [{name: value for name, value in row.items() if name not in since_start} for row in rows_of(one / "sft")]
        for one in (folder, undisturbed)
    ]
    assert logs[0] == logs[1]
    assert sorted(path.name for path in (folder / "sft").iterdir()) == ["log.jsonl", "model"]


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(killed, undisturbed, tiny_chat_llm, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "sft" / "model").exists()
    JudgeTrainer(settings(tiny_chat_llm), folder, examples=PAIRS).run()
    assert_finished_as(folder, undisturbed)


@pytest.mark.parametrize("broken", ["missing", "cut"])
def test_an_incomplete_checkpoint_is_removed_and_the_one_before_used(
    killed, undisturbed, tiny_chat_llm, tmp_path, broken, monkeypatch
):
    folder = shutil.copytree(killed, tmp_path / "run")
    state = folder / "sft" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    if broken == "missing":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:100])
    used, last = [], train_module._last_checkpoint
    monkeypatch.setattr(train_module, "_last_checkpoint", lambda path: used.append(last(path)) or used[0])
    JudgeTrainer(settings(tiny_chat_llm), folder, examples=PAIRS).run()
    assert [Path(path).name for path in used] == ["checkpoint-2"]
    assert_finished_as(folder, undisturbed)


def test_a_kill_before_the_model_is_written_ends_the_same(undisturbed, tiny_chat_llm, tmp_path, monkeypatch):
    def ctrl_c(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "replace_folder", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            JudgeTrainer(settings(tiny_chat_llm), tmp_path / "run", examples=PAIRS).run()
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    JudgeTrainer(settings(tiny_chat_llm), tmp_path / "run", examples=PAIRS).run()
    assert_finished_as(tmp_path / "run", undisturbed)


def test_a_kill_behind_the_model_leaves_nothing_over(killed, undisturbed, tiny_chat_llm, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    shutil.copytree(undisturbed / "sft" / "model", folder / "sft" / "model")
    told = []
    JudgeTrainer(settings(tiny_chat_llm), folder, examples=PAIRS, say=told.append).run()
    assert told == [f"sft: {folder / 'sft' / 'model'} is there"]
    assert not (folder / "sft" / "checkpoints").exists()


def test_a_kill_in_dpo_and_grpo_ends_the_same(run, tmp_path, monkeypatch):
    """Cut off between two steps by an exception, which unlike SIGKILL leaves the process for the next call."""

    class Stopped(Exception):
        pass

    changed = {"steps": 5, "learning_rate": 1e-3}
    dpo, grpo = (dataclasses.replace(part, **changed) for part in (run.config.dpo, run.config.grpo))
    config = dataclasses.replace(
        run.config,
        model=str(run.run_dir / "sft" / "model"),
        stages=("dpo", "grpo"),
        dpo=dpo,
        grpo=grpo,
        save_steps=2,
    )
    JudgeTrainer(config, tmp_path / "whole", examples=PAIRS).run()
    step_end, stopped = train_module._Watch.on_step_end, []

    def stopping(self, args, state, control, **more):
        step_end(self, args, state, control, **more)
        if state.global_step == 3 and self.stage not in stopped:
            stopped.append(self.stage)
            raise Stopped

    monkeypatch.setattr(train_module._Watch, "on_step_end", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            JudgeTrainer(config, tmp_path / "cut", examples=PAIRS).run()
    JudgeTrainer(config, tmp_path / "cut", examples=PAIRS).run()
    assert stopped == ["dpo", "grpo"]
    for stage in ("dpo", "grpo"):
        one, two = (weights(tmp_path / name / stage / "model") for name in ("whole", "cut"))
        assert same(one, two), stage


def test_finished_stages_are_skipped(run, monkeypatch):
    monkeypatch.setattr(JudgeTrainer, "_load", lambda *_: pytest.fail("loaded"))
    told = []
    again = JudgeTrainer(run.config, run.run_dir, examples=PAIRS, say=told.append)
    assert again.run() == run.run_dir / "grpo" / "model"
    assert told == [f"{stage}: {run.run_dir / stage / 'model'} is there" for stage in ("sft", "dpo", "grpo")]
    assert sorted(path.name for path in run.run_dir.rglob("*") if ".tmp" in path.name or ".old" in path.name) == []


def test_what_is_told(run):
    assert run.told[0] == "sft: 24 examples, 40 steps of 6"
    assert any(text.startswith("dpo: before it pass@1 0.") for text in run.told)
    summary = json.loads((run.run_dir / "dpo" / "samples_summary.json").read_text())
    assert 0 < summary["pass@1"] < summary["pass@4"] <= 1
    assert 0 <= summary["format_failure"] < 0.5


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_refused(run, tmp_path):
    changed = dataclasses.replace(run.config, seed=1, sft=dataclasses.replace(run.config.sft, steps=41))
    with pytest.raises(ValueError, match=r"was started with other settings \(seed, sft.steps differ\)"):
        JudgeTrainer(changed, run.run_dir, examples=PAIRS)
    with pytest.raises(ValueError, match="was started with other examples"):
        JudgeTrainer(run.config, run.run_dir, examples=PAIRS[1:])
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and no run folder"):
        JudgeTrainer(run.config, tmp_path, examples=PAIRS)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml.tmp").write_text("mod")  # killed while it was written
    JudgeTrainer(run.config, begun, examples=PAIRS)
    for config, given in [(settings(""), PAIRS), (settings("model"), None), (settings("model"), [])]:
        with pytest.raises(ValueError, match="give the start model"):
            JudgeTrainer(config, tmp_path / "other", examples=given)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("version", [None, "1.15.2", "1.17.0", "2.0", "0.29.1"])
def test_another_trl_is_refused(monkeypatch, version, tmp_path):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(ImportError, match=r'trl>=1.16,<1.17; install with: pip install "taoemb\[judge\]"') as caught:
        JudgeTrainer(settings("model"), tmp_path / "run", examples=PAIRS)
    assert version is None or f"(found {version})" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["1.16.0", "1.16.9", "1.16.0.dev0"])
def test_this_trl_is_known(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    check_trl()


def test_trl_has_what_is_used():
    """A version of TRL that renames one of these fails here, by name."""
    shared = {
        "output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "bf16",
        "use_cpu", "gradient_checkpointing", "save_steps", "save_total_limit", "logging_steps", "logging_nan_inf_filter", "report_to",
        "disable_tqdm", "dataloader_pin_memory",
    }  # fmt: skip
    own = {
        trl.SFTConfig: {"max_length", "completion_only_loss"},
        trl.DPOConfig: {"max_length", "beta"},
        trl.KTOConfig: {"max_length", "beta"},
        trl.GRPOConfig: {"num_generations", "max_completion_length", "temperature", "beta", "top_k"},
    }
    for cls, names in own.items():
        assert shared | names <= {field.name for field in dataclasses.fields(cls)}, cls.__name__


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_stops_the_run(tiny_chat_llm, tmp_path, monkeypatch, name):
    step = trl.SFTTrainer.training_step

    def broken(self, *given, **more):
        loss = step(self, *given, **more)
        if self.state.global_step != 3:
            return loss
        if name == "loss":
            return loss * float("nan")
        self.model.lm_head.weight.grad += float("inf")
        return loss

    monkeypatch.setattr(trl.SFTTrainer, "training_step", broken)
    for _ in range(2):  # the checkpoint before it is good, and the run fails again
        with pytest.raises(FloatingPointError, match=rf"sft: {name} is (nan|inf) at step 4; begin a new run folder"):
            JudgeTrainer(settings(tiny_chat_llm), tmp_path / "run", examples=PAIRS).run()
        assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
        assert not (tmp_path / "run" / "sft" / "model").exists()
    assert "loss" in rows_of(tmp_path / "run" / "sft")[-1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"examples": 0}, "examples=0: give a number greater than 0"),
        ({"save_steps": -1}, "save_steps=-1"),
        ({"stages": ()}, r"stages=\[\]: give some of sft, dpo, kto, grpo, each once"),
        ({"stages": ("sft", "sft")}, "each once"),
        ({"stages": ("rlhf",)}, r"stages=\['rlhf'\]: give some of"),
        ({"style": "after"}, "style='after': give one of post, pre, label"),
        ({"scheme": "five"}, "five"),
        ({"lora_rank": -1}, "lora_rank=-1: give a rank such as 16"),
        ({"sft": SFTConfig(steps=0)}, "sft.steps=0: give a number greater than 0"),
        ({"sft": SFTConfig(learning_rate=float("inf"))}, "sft.learning_rate=inf"),
        ({"dpo": PreferenceConfig(samples=1)}, "dpo.samples=1, .*give 2 or more"),
        ({"dpo": PreferenceConfig(beta=0)}, "dpo.beta=0"),
        ({"dpo": PreferenceConfig(temperature=0)}, "dpo.temperature=0"),
        ({"dpo": PreferenceConfig(prompts=0)}, "dpo.prompts=0"),
        ({"grpo": GRPOConfig(num_generations=1)}, "grpo.num_generations=1"),
        ({"grpo": GRPOConfig(batch_size=-4)}, "grpo.batch_size=-4"),
        ({"grpo": GRPOConfig(difficulty=0)}, "grpo.difficulty=0: give a share above 0"),
        ({"grpo": GRPOConfig(difficulty=1.5)}, "grpo.difficulty=1.5"),
        ({"grpo": GRPOConfig(beta=-1)}, "grpo.beta=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        settings("model", **changed)
