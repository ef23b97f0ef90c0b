"""Training of a language-model judge, stage by stage, on TRL's trainers: supervised fine-tuning, preferences, group-relative policy
optimisation (TaoSR1, arXiv 2508.12365).

A run folder holds a folder for each stage with the model that it ended with; the same call after a kill skips finished stages and
goes on from the last checkpoint of the other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from taoemb.catalog import Catalog, Item, Query
from taoemb.config import diff, load_config, save_config
from taoemb.files import read_json, replace_folder, write_json, write_text
from taoemb.judge.agrl import Lattice
from taoemb.judge.causal import CausalJudge, load_causal
from taoemb.judge.chains import pass_at_k
from taoemb.judge.contexts import Contexts
from taoemb.judge.dyknow import uncertain
from taoemb.judge.examples import Example, Style, catalog_examples, shop_examples
from taoemb.judge.prompts import JudgePrompt, ModelPrompt
from taoemb.judge.sampling import (
    PosteriorSampler,
    Sampled,
    curriculum,
    difficult,
    patterns,
    preference_pairs,
    sample_completions,
)
from taoemb.judge.schemes import STEP, get_scheme
from taoemb.judge.srpo import StepModel
from taoemb.judge.step_model import StepJudge, step_examples
from taoemb.judge.teacher import Teacher
from taoemb.judge.train_config import GRPOConfig, JudgeTrainConfig, PreferenceConfig, SFTConfig, Stage
from taoemb.judge.verdicts import fingerprint
from taoemb.shop import Shop

TRL = ("1.16", "1.17")
"""The versions of TRL whose interfaces this module knows, from and below."""

CONTEXTS_FILE = "contexts.parquet"
"""Chunks of context that a run has read, in its folder."""


class JudgeTrainer:
    """One run folder. ``run()`` trains the stages that are missing and returns the folder of the last one's model, which
    `CausalJudge` loads.

    Args:
        config: everything else.
        run_dir: the run folder.
        examples: your own labelled pairs, in the place of the generated shop's. Those without reasons teach the label alone.
        teacher: a completion for an example on which the judge was always wrong, None where it has none; by default the example's
            own reasons.
        step_model: judges steps of reasons, for ``grpo.srpo``; by default they are compared with the example's own reasons alone.

    Raises ValueError when the folder was begun with other settings or examples, FloatingPointError when a loss is no number (the run
    folder keeps what is before it), ImportError when TRL is missing or of another version.
    """

    def __init__(
        self, config: JudgeTrainConfig, run_dir: str | Path, *, examples: Sequence[Example] | None = None,
        teacher: Callable[[Example], str | None] | None = None,
        step_model: StepModel | None = None, say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        check_trl()
        if not config.model or not (config.data or examples):
            raise ValueError("give the start model with model= and a catalog with data=, or your own examples")
        self.config, self.run_dir, self.say = config, Path(run_dir), say
        self.scheme = get_scheme(config.scheme)
        self.lattice = self._own_lattice(examples is None) if config.lattice else Lattice.load()
        self._given, self._teacher, self._step_model = examples, teacher, step_model
        self._claim()

    def _own_lattice(self, of_data: bool) -> Lattice:
        """The rules that ``config.lattice`` names, where they can be meant."""
        file = self.config.lattice
        if not Path(file).is_file():
            raise FileNotFoundError(f"lattice={file!r} is no file; give a YAML file with the key grades")
        try:
            found = Lattice.load(file)
        except ValueError as error:
            raise ValueError(f"lattice={file!r}: {error}") from None
        missing = {*range(len(self.scheme))} - {*self.scheme.labels(found.table).flatten().tolist()}
        if missing:
            raise ValueError(
                f"lattice={file!r}: no verdicts lead to the label {self.scheme.names[min(missing)]!r}; every label needs some"
            )
        shop = of_data and (Path(self.config.data) / "truth.parquet").exists() and not self.config.teacher.url
        if shop and (found.table != Lattice.load().table).any():
            raise ValueError(
                f"lattice={file!r}: the grades and reasons of a generated shop follow its own rules; leave it out, or give a catalog of your own"
            )
        return found

    def _claim(self) -> None:
        file = self.run_dir / "config.yaml"
        digest = "" if self._given is None else fingerprint(*self._given)
        if file.exists():
            known = load_config(JudgeTrainConfig, file)
            changed = self._not_to_change(known)
            if changed:
                raise ValueError(f"{self.run_dir} was started with other settings ({', '.join(changed)} differ); repeat them to go on, or "
                                 "give another folder")  # fmt: skip
            if known != self.config:
                save_config(self.config, file)
            if read_json(self.run_dir / "examples.json")["digest"] != digest:
                raise ValueError(
                    f"{self.run_dir} was started with other examples; repeat them to go on, or give another folder"
                )
            return
        begun = {"examples.json", "examples.json.tmp", "config.yaml.tmp"}  # a kill may leave these
        if self.run_dir.exists() and not {path.name for path in self.run_dir.iterdir()} <= begun:
            raise ValueError(f"{self.run_dir} is not empty and no run folder (no config.yaml); give another folder")
        write_json(self.run_dir / "examples.json", {"digest": digest})
        save_config(self.config, file)

    def _not_to_change(self, known: JudgeTrainConfig) -> list[str]:
        """Settings that differ from those of the stages that were begun; those of later stages may be given anew."""
        begun = [stage for stage in known.stages if (self.run_dir / stage).exists()]
        if not begun:
            return []
        fixed = {"kto": "dpo"}  # shares its settings
        free = {"sft", "dpo", "grpo"} - {fixed.get(stage, stage) for stage in begun if (self.run_dir / stage / "model").exists()
                                         or any((self.run_dir / stage).glob("checkpoints/*"))}  # fmt: skip
        if self.config.stages[: len(begun)] == tuple(begun):
            free.add("stages")
        if free == {"sft", "dpo", "grpo"}:  # nothing is trained yet
            free.add("teacher")
        moved = {"teacher.url", "teacher.concurrency"}
        return [name for name in diff(known, self.config) if name not in moved and name.partition(".")[0] not in free]

    def run(self) -> Path:
        """Train what is missing."""
        self._check_grpo()
        start: str | Path = self.config.model
        for stage in self.config.stages:
            folder = self.run_dir / stage
            if (folder / "model").exists():
                self.say(f"{stage}: {folder / 'model'} is there")
            else:
                folder.mkdir(exist_ok=True)
                run = {"sft": self._sft, "dpo": self._preferences, "kto": self._preferences, "grpo": self._grpo}[stage]
                with _no_bars():
                    run(stage, start)
                gc.collect()  # trainers hold themselves in circles; the next stage loads the model anew
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # also those that a kill behind the model left
            start = folder / "model"
        return Path(start)

    def _check_grpo(self) -> None:
        """What the last stage would find out after hours."""
        if "grpo" not in self.config.stages:
            return
        if self._style != self.config.style:
            try:
                self.config.grpo.check_style(self._style)
            except ValueError as error:
                raise ValueError(
                    f"no example has reasons, and {error}: give teacher.url=, or other settings of grpo"
                ) from None
        steps = self.config.grpo.srpo.model
        if steps and getattr(JudgePrompt.load(steps), "scheme", None) != STEP:
            raise ValueError(
                f"grpo.srpo.model={steps!r} is no folder of a step model; train one with --recipe step_model"
            )

    @cached_property
    def examples(self) -> list[Example]:
        """Of ``sft``."""
        if self._pool is not None:
            return self._half(self._pool)
        drawn = shop_examples(self._shop, self.config.examples, self.config.seed, balance=self.config.balance)
        return self._half(self._with_contexts(drawn))

    def _half(self, examples: list[Example]) -> list[Example]:
        """Before groups with and without context, every second example is read without, so that the judge knows both prompts."""
        if not self.config.grpo.dyknow.context:
            return examples
        return [replace(e, context="") if n % 2 else e for n, e in enumerate(examples)]

    @cached_property
    def _pool(self) -> list[Example] | None:
        """Pairs that all stages draw from; None where the generated shop writes new ones for each."""
        config = self.config
        if self._given is not None:
            pool = list(self._given)
        elif (Path(config.data) / "truth.parquet").exists():
            if not config.teacher.url:
                return None
            drawn = shop_examples(self._shop, config.examples, config.seed, balance=config.balance)
            pool = [replace(example, reasons="") for example in drawn]
        else:
            pool = catalog_examples(Catalog.load(config.data), config.examples, config.seed, balance=config.balance)
        if config.teacher.url and config.style != "label":
            prompt = JudgePrompt(self.scheme, config.rules, config.max_chars)
            pool = Teacher(config.teacher, prompt, self.lattice).write(pool, self.run_dir / "teacher.jsonl")
            if not any(e.reasons for e in pool):
                raise ValueError(f"the teacher {config.teacher.model!r} wrote no reasons that can be read and lead to the grade for any of {len(pool)} "
                                 "pairs; ask another teacher in another folder, or set style=label")  # fmt: skip
        if self._given is None:
            self.say(f"{len(pool):,} examples, {sum(bool(e.reasons) for e in pool):,} of them with reasons")
        return self._with_contexts(pool)

    @property
    def _taught(self) -> list[Example]:
        """Examples of ``sft``. A label alone among reasons would teach it to leave the reasons out."""
        reasoned = [e for e in self.examples if e.reasons]
        return reasoned if reasoned and self._style != "label" else self.examples

    @cached_property
    def _style(self) -> Style:
        """``label`` where reasons are to be learnt and there are none."""
        style, pool = self.config.style, self._pool
        learnt = style != "label" and "sft" in self.config.stages and not self._teacher
        if not learnt or pool is None or any(e.reasons for e in pool):
            return style
        self.say(f"no example has reasons: style=label in the place of {style}")
        return "label"

    @cached_property
    def _shop(self) -> Shop:
        return Shop.load(self.config.data)

    def _fresh(self, count: int, seed: int) -> list[Example]:
        """Examples for sampling, other ones than those of ``sft`` where the shop writes them."""
        if self._pool is not None:
            order = np.random.default_rng([self.config.seed, seed]).permutation(len(self._pool))[:count]
            return [self._pool[i] for i in order]
        drawn = shop_examples(self._shop, count, self.config.seed + seed, balance=self.config.balance)
        return self._with_contexts(drawn)

    def _with_contexts(self, examples: list[Example]) -> list[Example]:
        """Those that have no chunk of context get the one that is found for them; for a step model it is a chain."""
        if self.scheme is STEP:
            return step_examples(examples, self.config.seed)
        if not self.config.contexts:
            return examples
        find = self._contexts
        return [e if e.context else replace(e, context=find(e.query, e.item)) for e in examples]

    @cached_property
    def _contexts(self) -> Contexts:
        """Also written to the run folder, for ``judge.contexts``."""
        found, file = Contexts.load(self.config.contexts, self.config.data), self.run_dir / CONTEXTS_FILE
        if not file.exists():
            found.save(file)
        return found

    def labels(self, examples: Sequence[Example]) -> list[int]:
        """Of the scheme."""
        return [int(label) for label in self.scheme.labels([e.grade for e in examples])]

    # -- stages -----------------------------------------------------------------------------------------------------------

    def _sft(self, stage: str, start: str | Path) -> None:
        import trl

        model, reads = self._load(start)
        rows = [
            {"prompt": reads.render(e.query, e.item, e.context), "completion": reads.answer(self._completion(e))}
            for e in self._taught
        ]
        settings = self.config.sft
        self.say(f"{stage}: {len(rows)} examples, {settings.steps} steps of {settings.batch_size}")
        arguments = trl.SFTConfig(**self._arguments(stage, settings), max_length=None, completion_only_loss=True)
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=_dataset(rows), processing_class=reads.tokenizer, peft_config=self._lora()
        )
        self._fit(stage, trainer, reads)

    def _preferences(self, stage: str, start: str | Path) -> None:
        import trl

        model, reads = self._load(start)
        settings = self.config.dpo
        examples = self._half(self._fresh(settings.prompts, 101))
        labels = self.labels(examples)
        sampled = self._sample(stage, model, reads, examples, settings.samples, settings.temperature)
        self._note(stage, sampled, labels)
        if stage == "kto":
            rows = [
                {
                    "prompt": reads.render(e.query, e.item, e.context),
                    "completion": reads.answer(text),
                    "label": said == label,
                }
                for e, texts, stated, label in zip(
                    examples, sampled.texts, sampled.labels.tolist(), labels, strict=True
                )
                for text, said in zip(texts, stated, strict=True)
            ]
            few = min(sum(row["label"] for row in rows), sum(not row["label"] for row in rows))
        else:
            teacher = self._teacher or (lambda e: self._completion(e) if e.reasons or self._style == "label" else None)
            pairs = preference_pairs(examples, sampled, labels, teacher, overrated=settings.overrated)
            rows = [
                {
                    "prompt": reads.render(examples[i].query, examples[i].item, examples[i].context),
                    "chosen": reads.answer(a),
                    "rejected": reads.answer(b),
                }
                for i, a, b in pairs
            ]
            few = len(rows)
        if not few:
            raise ValueError(f"{stage}: of {len(examples)} prompts none has a right and a wrong completion; raise dpo.prompts or "
                             "dpo.temperature, or leave the stage out")  # fmt: skip
        self.say(
            f"{stage}: {len(rows)} rows from {len(examples)} prompts, {settings.steps} steps of {settings.batch_size}"
        )
        base = {**self._arguments(stage, settings), "beta": settings.beta, "max_length": None}
        made: Any = trl.KTOTrainer if stage == "kto" else trl.DPOTrainer
        arguments = trl.KTOConfig(**base) if stage == "kto" else trl.DPOConfig(**base)
        trainer = made(
            model,
            args=arguments,
            train_dataset=_dataset(rows),
            processing_class=reads.tokenizer,
            peft_config=self._lora(),
        )
        self._fit(stage, trainer, reads)

    def _grpo(self, stage: str, start: str | Path) -> None:
        import trl

        from taoemb.judge.relevance_grpo import RelevanceGRPOTrainer

        model, reads = self._load(start)
        settings = self.config.grpo
        examples = self._pooled(stage, model, reads, self._fresh(settings.prompts, 202))
        labels = self.labels(examples)
        asked = [replace(e, context="") for e in examples] if settings.dyknow.context else examples
        sampled = self._sample(
            stage, model, reads, asked, settings.num_generations, settings.temperature, settings.top_k
        )
        self._note(stage, sampled, labels)
        correct = sampled.correct(labels)
        differing = patterns(sampled, self._style, self.scheme) >= settings.patterns if settings.patterns > 1 else None
        kept = difficult(
            correct,
            labels,
            settings.difficulty,
            settings.balance,
            self.config.seed,
            hardest=settings.hardest,
            keep=differing,
        )
        if len(kept) < settings.batch_size:  # TRL drops the last part of a batch, and would train nothing
            mixed = (correct.any(1) & ~correct.all(1)).sum()
            also = (
                ""
                if differing is None
                else f", {differing.sum()} have grpo.patterns={settings.patterns} of completions"
            )
            raise ValueError(
                f"grpo: of {len(examples)} prompts {mixed} have right and wrong completions{also}; {len(kept)} are left, fewer than "
                f"grpo.batch_size={settings.batch_size}; raise grpo.prompts or lower grpo.batch_size, raise grpo.temperature, set grpo.balance=false, "
                f"loosen grpo.hardest, grpo.difficulty or grpo.patterns, or leave the stage out with stages=[...]: the same folder goes on"
            )
        self.say(
            f"{stage}: {len(kept)} of {len(examples)} prompts, {settings.steps} steps of {settings.batch_size} groups"
        )
        posterior = None
        if settings.order == "curriculum":
            kept = curriculum(kept, correct, labels, settings.steps * settings.batch_size, self.config.seed)
        elif settings.order == "posterior":
            seen = correct[kept].sum(1), np.full(len(kept), correct.shape[1])
            posterior = PosteriorSampler(seen, settings.batch_size, self.config.seed)
        base = self._arguments(stage, settings) | {
            "per_device_train_batch_size": settings.batch_size * settings.num_generations
        }
        arguments = trl.GRPOConfig(
            **base, num_generations=settings.num_generations, max_completion_length=self.config.max_new_tokens,
            temperature=settings.temperature, beta=settings.beta, top_k=settings.top_k, shuffle_dataset=settings.order == "random",
            # DyKnow's terms are means over completions, which TRL calls grpo.
            loss_type="grpo" if settings.dyknow.context else "dapo",
        )  # fmt: skip
        step_model = self._step_model
        if step_model is None and settings.srpo.model:
            step_model = StepJudge(CausalJudge(settings.srpo.model))
        trainer = RelevanceGRPOTrainer(
            model, reads, [examples[n] for n in kept], settings, arguments, style=self._style, step_model=step_model,
            by_rule=self._pool is None, posterior=posterior, lattice=self.lattice, peft_config=self._lora(),
        )  # fmt: skip
        self._fit(stage, trainer, reads)

    def _pooled(self, stage: str, model: Any, reads: ModelPrompt, examples: list[Example]) -> list[Example]:
        """Those that the judge is not sure of; which, is kept: a killed run may go on elsewhere, where the last bits differ."""
        settings, file = self.config.grpo, self.run_dir / stage / "pool.json"
        if settings.pool == 1:
            return examples
        if not file.exists():
            judge = CausalJudge(model, tokenizer=reads.tokenizer, prompt=reads.prompt)
            contexts = ["" if settings.dyknow.context else e.context for e in examples]
            write_json(
                file,
                sorted(uncertain(judge.score([(e.query, e.item) for e in examples], contexts).probs, settings.pool)),
            )
        found = [examples[n] for n in read_json(file)]
        if not found:
            raise ValueError(
                f"grpo.pool={settings.pool}: of all {len(examples)} prompts the judge is surer than that; raise it"
            )
        return found

    # -- what the stages share --------------------------------------------------------------------------------------------

    def _load(self, start: str | Path) -> tuple[Any, ModelPrompt]:
        model, tokenizer = load_causal(start, dtype="float32")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(f"{start} is an adapter; merge it into its model and give that folder")
        template = tokenizer.chat_template
        if isinstance(template, str) and "enable_thinking" in template and not template.startswith(_NO_THINKING):
            tokenizer.chat_template = _NO_THINKING + template
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        reads = ModelPrompt(JudgePrompt(self.scheme, self.config.rules, self.config.max_chars), tokenizer)
        _check_template(reads)
        return model, reads

    def _completion(self, example: Example) -> str:
        return example.completion(self._style, self.scheme)

    def _sample(
        self, stage: str, model: Any, reads: ModelPrompt, examples: Sequence[Example], n: int, temperature: float,
        top_k: int = 0,
    ) -> Sampled:  # fmt: skip
        return sample_completions(
            model, reads, examples, n, self.run_dir / stage / "samples.jsonl", style=self._style, temperature=temperature,
            max_new_tokens=self.config.max_new_tokens, top_k=top_k, seed=self.config.seed, progress=f"{stage}: sampling",
        )  # fmt: skip

    def _note(self, stage: str, sampled: Sampled, labels: Sequence[int]) -> None:
        """pass@k of the stage's start, in its folder."""
        correct = sampled.correct(labels)
        found = {f"pass@{k}": pass_at_k(correct, k) for k in range(1, correct.shape[1] + 1)}
        write_json(
            self.run_dir / stage / "samples_summary.json",
            {**found, "format_failure": float((sampled.labels < 0).mean())},
        )
        self.say(f"{stage}: before it " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    def _arguments(self, stage: str, settings: SFTConfig | PreferenceConfig | GRPOConfig) -> dict[str, Any]:
        cuda = torch.cuda.is_available()
        return {
            "output_dir": str(self.run_dir / stage / "checkpoints"), "max_steps": settings.steps,
            "per_device_train_batch_size": settings.batch_size, "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "linear", "warmup_steps": max(1, settings.steps // 20), "seed": self.config.seed,
            "bf16": cuda and torch.cuda.is_bf16_supported() if self.config.bf16 is None else self.config.bf16, "use_cpu": not cuda,
            "gradient_checkpointing": self.config.gradient_checkpointing, "save_steps": self.config.save_steps,
            "save_total_limit": 2, "logging_steps": 10, "logging_nan_inf_filter": False, "report_to": "none", "disable_tqdm": True,
            "dataloader_pin_memory": cuda,
        }  # fmt: skip

    def _lora(self) -> Any:
        if not self.config.lora_rank:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=2 * self.config.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def _fit(self, stage: str, trainer: Any, reads: ModelPrompt) -> None:
        """Train from the last whole checkpoint on, and write the model; the folder appears complete or not at all."""
        folder = self.run_dir / stage
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(stage, folder / "log.jsonl"))
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder / "checkpoints"))
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.config.lora_rank:
            model = model.merge_and_unload()
        with replace_folder(folder / "model", "config.json") as beside:
            model.save_pretrained(beside)
            reads.tokenizer.save_pretrained(beside)
            reads.prompt.save(beside)

    def judge(self, stage: Stage | None = None) -> CausalJudge:
        """The judge that a stage ended with, by default the last one."""
        return CausalJudge(self.run_dir / (stage or self.config.stages[-1]) / "model")


class _Watch(TrainerCallback):
    """Writes the log, shows a bar, and stops where a loss is no number, before a checkpoint or model could hold what it did."""

    def __init__(self, stage: str, file: Path) -> None:
        self.stage, self.file = stage, file
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, disable=None, leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last
        # Going on from a checkpoint of the last step inside an epoch, transformers trains one step more.
        control.should_save = control.should_save and not last

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs: dict[str, Any] = given["logs"]
        lines = (json.dumps(row, sort_keys=True) + "\n" for row in state.log_history)
        write_text(self.file, "".join(lines))  # all of them: after a kill they go back to the checkpoint's
        for name in ("loss", "grad_norm"):
            if not np.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(f"{self.stage}: {name} is {logs[name]} at step {state.global_step}; begin a new run folder with "
                                         "a lower learning_rate")  # fmt: skip
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


_NO_THINKING = "{% set enable_thinking = false %}"
"""Before the chat template of a model that may think first, such as Qwen3: a judge's label is what it writes first."""


def _check_template(reads: ModelPrompt) -> None:
    """Raise ValueError when the chat template would write an answer elsewhere than where the judge reads it."""
    prompt, answer = reads.render(Query("1", "mug"), Item("1", "Mug")), reads.answer("1")
    if isinstance(prompt, str) or isinstance(answer, str):
        return
    shown = reads.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    written = reads.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if not written.startswith(shown + "1"):
        raise ValueError(f"the model's chat template writes an answer elsewhere than behind its generation prompt: {written[-80:]!r} does "
                         f"not go on from {shown[-40:]!r}; give the tokenizer another chat_template")  # fmt: skip


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of datasets and of transformers' files."""
    import datasets

    before = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before[0]:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if before[1]:
            datasets.enable_progress_bars()


def check_trl() -> None:
    """Raise ImportError when TRL is missing or of a version whose interfaces this module does not know."""
    wanted = f'taoemb judge train needs trl>={TRL[0]},<{TRL[1]}; install with: pip install "taoemb[judge]"'
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(wanted) from None
    numbers = tuple(int(part) for part in version.split(".")[:2])
    low, high = (tuple(map(int, limit.split("."))) for limit in TRL)
    if not low <= numbers < high:
        raise ImportError(f"{wanted} (found {version})")


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; transformers writes ``trainer_state.json`` last, so one without it was cut by a kill."""
    found = (
        sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        if folder.exists()
        else []
    )
    for path in found:
        try:
            read_json(path / "trainer_state.json")
        except (OSError, ValueError):
            shutil.rmtree(path)
    whole = [path for path in found if path.exists()]
    return str(whole[-1]) if whole else None
