"""Group-relative policy optimisation of a relevance judge: TRL's trainer with what TaoSR1's successors add, each a switch that is off by default.

Shaped rewards and guided replay (`taoemb.judge.agrl`), stepwise advantages (`taoemb.judge.srpo`), answers with and without context
(`taoemb.judge.dyknow`), clamped advantages, the expected reward of the label in closed form. Imported where TRL is installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer

from taoemb.advantages import normalize
from taoemb.catalog import Item, Query
from taoemb.files import read_json, write_json
from taoemb.judge import dyknow
from taoemb.judge.agrl import HINT_LEVELS, Lattice, hint, shaped_rewards
from taoemb.judge.examples import Example, Style, parse, parse_label
from taoemb.judge.prompts import ModelPrompt
from taoemb.judge.sampling import PosteriorSampler
from taoemb.judge.srpo import StepModel, segment, step_advantages, token_steps, verified
from taoemb.judge.train_config import GRPOConfig

_HISTORY = "posterior.json"


class RelevanceGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPO over labelled pairs. The reward of a completion is `taoemb.judge.agrl.shaped_rewards`.

    Args:
        model: the causal language model.
        reads: how it reads pairs.
        examples: the prompts, in the order of training where ``arguments`` do not shuffle.
        config: the stage's settings.
        arguments: TRL's settings, ``num_generations`` and ``per_device_train_batch_size`` among them: whole groups.
        style: of the completions.
        step_model: judges the steps that the examples' reasons do not verify, for ``config.srpo``.
        by_rule: whether the examples' reasons are written by rule, so that every line can be compared; else the verdicts alone are.
        posterior: draws the prompts of each step, in the place of TRL's order; one process, one update per generation.
        lattice: how a grade follows from verdicts, by default the generated shop's.
        peft_config: adapters.

    Raises ValueError for settings that do not go together.
    """

    def __init__(
        self, model: Any, reads: ModelPrompt, examples: Sequence[Example], config: GRPOConfig, arguments: TRLConfig, *,
        style: Style = "post", step_model: StepModel | None = None, by_rule: bool = True,
        posterior: PosteriorSampler | None = None, lattice: Lattice | None = None, peft_config: Any = None,
    ) -> None:  # fmt: skip
        from datasets import Dataset

        config.check_style(style)
        if config.dyknow.context and not any(e.context for e in examples):
            raise ValueError("grpo.dyknow.context: no example has a chunk of context")
        self.reads, self.examples, self.settings, self.style = reads, list(examples), config, style
        self.step_model, self.by_rule, self.posterior = step_model, by_rule, posterior
        self.scheme = reads.prompt.scheme
        self.labels = [int(label) for label in self.scheme.labels([e.grade for e in self.examples])]
        self.table = self.scheme.labels((lattice or Lattice.load()).table)
        self.answers = _answer_tokens(reads) if config.label_objective == "expected" else []
        self._chosen: list[int] = []
        self._replayed = np.zeros(0, dtype=bool)
        rows = [{"prompt": self._prompt(n, not config.dyknow.context), "example": n} for n in range(len(self.examples))]
        super().__init__(
            model, self.shaped_reward, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=reads.tokenizer,
            peft_config=peft_config,
        )  # fmt: skip
        if config.dyknow.context:
            self.beta = arguments.beta / 2  # the loss below is doubled
        repeats = self.args.steps_per_generation * self.num_iterations
        if posterior is not None and (repeats > 1 or self.accelerator.num_processes > 1):
            raise ValueError(f"grpo.order=posterior: {self.accelerator.num_processes} processes, {repeats} updates per generation; it knows what was "
                             "right with one of each")  # fmt: skip

    # -- rollouts ---------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, with our advantages. Groups stand together until it returns; everything new is kept per row, because rows are shuffled
        afterwards."""
        self._chosen = [int(row["example"]) for row in inputs]
        size = self.num_generations
        groups = len(inputs) // size
        if groups * size != len(inputs) or any(
            len(set(self._chosen[g * size : (g + 1) * size])) > 1 for g in range(groups)
        ):
            raise ValueError(f"{len(inputs)} rows in groups of {size}: a process must have whole groups; let per_device_train_batch_size be "
                             "a multiple of num_generations")  # fmt: skip
        with_context = np.zeros(len(inputs), dtype=bool)
        if self.settings.dyknow.context:
            with_context = np.arange(len(inputs)) % size >= size // 2
            inputs = [{**row, "prompt": self._prompt(int(row["example"]), True)} if asked else row
                      for row, asked in zip(inputs, with_context, strict=True)]  # fmt: skip
        self._replayed = np.zeros(len(inputs), dtype=bool)
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        outcome = made["advantages"]
        right, own = np.array(self._right()), ~self._replayed  # what a hint brought about is not its own
        self._metrics["train" if self.model.training else "eval"]["label/right"].append(float(right[own].mean()))
        if self.posterior is not None:
            self.posterior.update([
                (self._chosen[first], int((right & own)[first : first + size].sum()), int(own[first : first + size].sum()))
                for first in range(0, len(right), size)
            ])  # fmt: skip
        if self.settings.dyknow.context:
            outcome = self._add_transfer(made, outcome, ~with_context)
        if self.settings.advantage_clip:
            outcome = outcome.clamp(-self.settings.advantage_clip, self.settings.advantage_clip)
        found = self._by_token(made, outcome) if self._token_level else outcome
        if self._replayed.any():
            # The whole group: its own rows have an advantage only because the replayed one raised the mean.
            left = 1 - self.state.global_step / max(1, self.state.max_steps)
            helped = torch.tensor(self._replayed).view(-1, size).any(1).repeat_interleave(size)
            weight = torch.where(helped, self.settings.replay.weight * left, 1.0).to(found)
            found = found * (weight if found.dim() == 1 else weight[:, None])
        made["advantages"] = found
        if self.answers:
            made["answer"] = torch.tensor([self.answers[self.labels[n]] for n in self._chosen], device=outcome.device)
        return made

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's, after which hinted completions may stand in the place of wrong ones; prompts stay without hints, so that log-probabilities,
        old, new and reference, are all taken there."""
        made = super()._generate(prompts)
        replay = self.settings.replay
        if not (replay.share and self.model.training):
            return made
        completion_ids, completions = list(made[1]), list(made[3])
        stuck: dict[int, list[int]] = {}  # first row of a group -> rows to replace
        for first in range(0, len(prompts), self.num_generations):
            rows = range(first, first + self.num_generations)
            label = self.labels[self._chosen[first]]
            said = {row: parse_label(_text(completions[row]), self.style, self.scheme) for row in rows}
            wrong = [row for row in rows if said[row] != label]
            if len(rows) - len(wrong) <= replay.accuracy * len(rows) + 1e-9:
                # Unreadable ones go first, then labels far from the truth.
                wrong.sort(key=lambda row: (said[row] is not None, -abs((said[row] or 0) - label)))
                stuck[first] = wrong[: max(1, int(replay.share * len(rows)))]
        self._metrics["train"]["replay/groups"].append(float(len(stuck)))
        left = dict(stuck)
        for level in range(1, HINT_LEVELS + 1):  # as little help as brings a right completion about
            for first, (ids, text) in self._hinted(left, level):
                row = left[first].pop(0)
                completion_ids[row], self._replayed[row] = ids, True
                completions[row] = (
                    text if isinstance(completions[row], str) else [{"role": "assistant", "content": text}]
                )
            left = {
                first: rows
                for first, rows in left.items()
                if not self._replayed[first : first + self.num_generations].any()
            }
        self._metrics["train"]["replay/rescued"].append(float(len(stuck) - len(left)))
        return (made[0], completion_ids, made[2], completions, *made[4:])

    def _hinted(self, stuck: dict[int, list[int]], level: int) -> list[tuple[int, tuple[list[int], str]]]:
        """(first row of a group, completion) of right completions with a reward written with a hint, at most as many as are to be replaced."""

        def said(first: int, level: int) -> str:
            return hint(self.examples[self._chosen[first]], level, self.style, self.scheme) if level else ""

        groups = [first for first, rows in stuck.items() if said(first, level) != said(first, level - 1) for _ in rows]
        if not groups:
            return []
        examples = [self.examples[self._chosen[first]] for first in groups]
        prompts = [
            self.reads.render(e.query, e.item, said(first, level)) for first, e in zip(groups, examples, strict=True)
        ]
        written, _ = self._generate_single_turn(self._tokenize_prompts(prompts)[0], None, {}, 1)
        texts = self.processing_class.batch_decode(written, skip_special_tokens=True)
        numbers = [self._chosen[first] for first in groups]
        return [
            (first, (list(ids), text))
            for first, number, ids, text, reward in zip(
                groups, numbers, written, texts, self.shaped_reward(texts, numbers), strict=True
            )
            if reward > 0 and parse_label(text, self.style, self.scheme) == self.labels[number]
        ]

    # -- which prompts ----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return super()._get_train_sampler(dataset) if self.posterior is None else _Drawn(self)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if (
            self.posterior is not None and self.args.should_save
        ):  # first: what comes last says that a checkpoint is whole
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_json(folder / _HISTORY, {"history": self.posterior.history})
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.posterior is not None and checkpoint is not None:
            self.posterior.history = read_json(Path(checkpoint) / _HISTORY)["history"]

    # -- rewards ----------------------------------------------------------------------------------------------------------

    def shaped_reward(self, completions: list[Any], example: list[int], **_: Any) -> list[float]:
        """Of each completion; TRL's contract of a reward function."""
        texts = [_text(c) for c in completions]
        if self.style == "label":
            return [
                float(parse_label(t, "label", self.scheme) == self.labels[n])
                for t, n in zip(texts, example, strict=True)
            ]
        chains = [parse(text, self.style, self.scheme) for text in texts]
        truth = [(self.examples[n].category, self.examples[n].attribute) for n in example]
        labels = [self.labels[n] for n in example]
        return list(map(float, shaped_rewards(chains, labels, truth, self.table, self.settings.shaping)))

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's; kept, with the texts, for what it does not hand on."""
        found: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        begin = self.accelerator.process_index * len(prompts)
        self._rewards = found[begin : begin + len(prompts), 0]
        self._texts = [_text(c) for c in completions]
        return found

    def _right(self) -> list[bool]:
        """Whether each completion states the right label."""
        return [parse_label(text, self.style, self.scheme) == self.labels[n]
                for text, n in zip(self._texts, self._chosen, strict=True)]  # fmt: skip

    # -- advantages -------------------------------------------------------------------------------------------------------

    @property
    def _token_level(self) -> bool:
        srpo = self.settings.srpo
        return srpo.weight > 0 or srpo.mask != "none" or bool(self.answers)

    def _by_token(self, made: dict[str, Any], outcome: Tensor) -> Tensor:
        """Advantages ``[B, T]``."""
        ids, mask = made["completion_ids"], made["completion_mask"]
        tokens: Tensor = outcome[:, None].expand(ids.shape).clone()
        if self.settings.srpo.weight > 0 or self.settings.srpo.mask != "none":
            steps = torch.full(ids.shape, -1, dtype=torch.long)
            for row, (one, length) in enumerate(zip(ids.tolist(), mask.sum(1).tolist(), strict=True)):
                steps[row, :length] = torch.from_numpy(token_steps(one[:length], self._decode, self.style))
            values = torch.from_numpy(self._step_values()).to(tokens)
            tokens = step_advantages(outcome, steps.to(ids.device), values, self.num_generations, self.settings.srpo,
                                     self.settings.advantage_clip or float("inf"))  # fmt: skip
        if self.answers:
            tokens[:, 0] = 0.0  # the label is trained in closed form
        return tokens

    def _step_values(self) -> np.ndarray:
        """``[B, steps]``, NaN where nothing is known."""
        values = np.stack([
            verified(text, self.examples[n].completion(self.style, self.scheme), self.style, verdicts_only=not self.by_rule)
            for text, n in zip(self._texts, self._chosen, strict=True)
        ])  # fmt: skip
        return values if self.step_model is None else self._judged(values)

    def _judged(self, values: np.ndarray) -> np.ndarray:
        """The step model's word on steps that are written and that nothing verified."""
        asked, pairs, before, lines = [], [], [], []
        for row, (text, n) in enumerate(zip(self._texts, self._chosen, strict=True)):
            read: list[str] = []
            for step, begin, end in segment(text, self.style):
                if step == 0:
                    continue
                if np.isnan(values[row, step]):
                    asked.append((row, step))
                    pairs.append((self.examples[n].query, self.examples[n].item))
                    before.append("\n".join(read))
                    lines.append(text[begin:end])
                read.append(text[begin:end])
        if asked and self.step_model is not None:
            said = self.step_model(pairs, before, lines)
            for (row, step), value in zip(asked, said, strict=True):
                values[row, step] = np.nan if value is None or not 0 <= value <= 1 else value
        return values

    def _add_transfer(self, made: dict[str, Any], outcome: Tensor, without: np.ndarray) -> Tensor:
        """Advantages of the two groups apart; what answers without the context teach the prompt with it goes along per row."""
        size, half = self.num_generations, self.num_generations // 2
        rewards = self._rewards.view(-1, size).to(outcome)
        chosen = self._chosen[::size]
        right = torch.tensor(self._right()).view(-1, size).to(outcome.device)
        groups = rewards.view(-1, half)
        apart = normalize(groups, torch.ones_like(groups)).flatten()
        if not self.settings.dyknow.transfer:
            return apart
        given = self.settings
        moved = dyknow.transfer(rewards[:, :half], rewards[:, half:], right[:, :half], right[:, half:],
                                scale=given.dyknow.scale, clip=given.advantage_clip or math.inf)  # fmt: skip
        made["transfer"] = torch.cat([moved, torch.zeros_like(moved)], dim=1).flatten()
        made["without_context"] = torch.tensor(without, device=outcome.device)
        prompt_ids = self._tokenize_prompts([self._prompt(n, True) for n in chosen])[0]
        longest = max(map(len, prompt_ids))
        ids = torch.full((len(chosen), longest), self.reads.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompt_ids):
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        made["context_prompt_ids"] = ids.repeat_interleave(size, 0).to(outcome.device)
        made["context_prompt_mask"] = mask.repeat_interleave(size, 0).to(outcome.device)
        return apart

    def _prompt(self, number: int, context: bool) -> Any:
        example = self.examples[number]
        return self.reads.render(example.query, example.item, example.context if context else "")

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.reads.tokenizer.decode(ids, skip_special_tokens=True))

    # -- loss -------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's, and the terms that need a forward pass of their own."""
        loss: Tensor = super()._compute_loss(model, inputs)
        scale = self.current_gradient_accumulation_steps
        if self.answers:
            prompt_ids, prompt_mask = inputs["prompt_ids"], inputs["prompt_mask"]
            places = (prompt_mask.cumsum(-1) - 1).clamp_min(0)
            logits = model(
                input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=places, logits_to_keep=1
            ).logits[:, -1]
            chance = torch.softmax(logits.float() / self.temperature, -1).gather(1, inputs["answer"][:, None])[:, 0]
            self._metrics["train"]["label/expected"].append(chance.mean().item())
            loss = loss - self.settings.shaping.label * chance.mean() / scale
        if "transfer" in inputs:
            rows = inputs["without_context"]
            objective = loss.new_zeros(())
            if rows.any():
                completion_ids, mask = inputs["completion_ids"][rows], inputs["completion_mask"][rows]
                ids = torch.cat([inputs["context_prompt_ids"][rows], completion_ids], dim=1)
                seen = torch.cat([inputs["context_prompt_mask"][rows], mask], dim=1)
                logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, seen, completion_ids.size(1))
                # Half of all rows have no context: a sum over these and half a batch is a mean, also where shuffling cut them unevenly.
                objective = dyknow.transfer_objective(logps, mask, inputs["transfer"][rows]).sum() / (len(rows) / 2)
            self._metrics["train"]["dyknow/transfer"].append(objective.item())
            loss = loss - objective / (2 * scale)
        # TRL's mean over both groups is half of their two terms.
        return 2 * loss if self.settings.dyknow.context else loss


class _Drawn(Sampler[int]):
    """The prompts of every step of the training, each as often as a group has completions."""

    def __init__(self, trainer: RelevanceGRPOTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        posterior = self.trainer.posterior
        assert posterior is not None
        for step in range(self.trainer.args.max_steps):
            for number in posterior.draw(step):
                yield from [number] * self.trainer.num_generations

    def __len__(self) -> int:
        assert self.trainer.posterior is not None
        return int(self.trainer.args.max_steps * self.trainer.posterior.count * self.trainer.num_generations)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _answer_tokens(reads: ModelPrompt) -> list[int]:
    """The token of each label in its place. Raises ValueError where one takes several."""
    pair = Query("1", "mug"), Item("1", "Mug")
    prompt = reads.encode(*pair)
    found = [reads.encode(*pair, "", answer)[len(prompt) :] for answer in reads.prompt.scheme.answers]
    if any(len(ids) != 1 for ids in found) or len({ids[0] for ids in found}) < len(found):
        raise ValueError(f"label_objective=expected needs labels of one token each, and the answers {reads.prompt.scheme.answers} are "
                         f"{found} for this model; use label_objective=grpo")  # fmt: skip
    return [ids[0] for ids in found]
