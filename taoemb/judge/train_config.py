"""Settings of a language-model judge's training. Marks: [paper] TaoSR1 (arXiv 2508.12365) publishes it, [ours] we chose it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from taoemb.contrastive import check_positive
from taoemb.judge.agrl import ReplayConfig, ShapingConfig
from taoemb.judge.dyknow import DyKnowConfig
from taoemb.judge.examples import Style
from taoemb.judge.prompts import RULES
from taoemb.judge.schemes import STEP, get_scheme
from taoemb.judge.srpo import SRPOConfig
from taoemb.judge.teacher import TeacherConfig

RECIPES = Path(__file__).parent / "recipes"
Stage = Literal["sft", "dpo", "kto", "grpo"]
Order = Literal["random", "curriculum", "posterior"]
LabelObjective = Literal["grpo", "expected"]


@dataclass(frozen=True)
class SFTConfig:
    """Stage ``sft``: completions with correct reasons."""

    steps: int = 500
    """Optimiser steps [ours]."""
    batch_size: int = 16
    """Examples a step [ours]."""
    learning_rate: float = 2e-5
    """Peak learning rate [ours]; give 10 times as much with LoRA."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Stages ``dpo`` and ``kto``: its own right against its own wrong completions, the teacher's where all are wrong [paper]."""

    prompts: int = 1000
    """Examples that are sampled for pairs [ours]."""
    samples: int = 5
    """Completions of each: pass@5 [paper]."""
    temperature: float = 1.0
    """Of the sampling [ours]."""
    steps: int = 200
    """Optimiser steps [ours]."""
    batch_size: int = 8
    """Pairs a step [ours]."""
    learning_rate: float = 5e-6
    """Peak learning rate [ours]."""
    beta: float = 0.1
    """Of DPO and KTO [ours]."""
    overrated: bool = False
    """Whether DPO rejects ratings above the truth before others (LREF). With as many prompts of each grade that pushed a small judge to low
    labels (benchmarks/LOG.md)."""


@dataclass(frozen=True)
class GRPOConfig:
    """Stage ``grpo``: the reward of a completion is 1 for the right label in a readable completion, else 0 [paper]."""

    prompts: int = 1000
    """Examples whose difficulty is measured [ours]."""
    num_generations: int = 8
    """Completions in a group, and of the difficulty [ours]."""
    difficulty: float = 1.0
    """Prompts with more than 0 and less than this share of right completions are kept; 1 drops the all-right and all-wrong alone [paper:
    the best]."""
    balance: bool = True
    """As many prompts of every label: a coefficient of variation of 0 [paper: the best]."""
    temperature: float = 1.0
    """Of the sampling [ours; DyKnow-RAG: .99]."""
    top_k: int = 0
    """Completions are drawn from so many most probable tokens; 0: from all [DyKnow-RAG: 100]."""
    steps: int = 200
    """Optimiser steps [ours]."""
    batch_size: int = 4
    """Prompts a step [ours]."""
    learning_rate: float = 1e-6
    """Peak learning rate [ours]."""
    beta: float = 0.02
    """Weight of the KL to the stage's start [ours; DyKnow-RAG: .02]."""
    advantage_clip: float = 0.0
    """Advantages are clamped to plus and minus this; 0: not [DyKnow-RAG: 2]."""
    hardest: float = 0.0
    """Prompts with at most this share of right completions are left out too [DyKnow-RAG: from .01 on]."""
    pool: float = 1.0
    """Prompts whose most probable label has this probability or more are left out before they are sampled [DyKnow-RAG: .7]; 1: none is."""
    patterns: int = 1
    """Prompts are kept whose completions differ in their verdicts and label at least so often [ours, after TaoSR-SHE's diversity]."""
    order: Order = "random"
    """Of the prompts: ``curriculum`` begins with those mostly right (from .75 on, from .25 on, the rest) [ours, after TaoSR-SHE]; ``posterior``
    draws, for each prompt, its share of right completions from what was seen so far, and takes those nearest to one half [ours, after VADE]."""
    label_objective: LabelObjective = "grpo"
    """How the label is trained: by the advantages of sampled completions, or by its expected reward in closed form, where it is written
    first [ours]."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """The reward of a completion (TaoSR-AGRL)."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Guided replay (TaoSR-AGRL)."""
    srpo: SRPOConfig = field(default_factory=SRPOConfig)
    """Stepwise advantages (TaoSR-SHE)."""
    dyknow: DyKnowConfig = field(default_factory=DyKnowConfig)
    """Answers with and without context (DyKnow-RAG)."""

    def check_style(self, style: Style) -> None:
        """Raise ValueError where a switch does not go with the style of the completions, or with another switch."""
        shaped = self.shaping.category or self.shaping.attribute or self.shaping.gate != "none"
        stepwise = self.srpo.weight > 0 or self.srpo.mask != "none"
        if style == "label" and (shaped or stepwise or self.patterns > 1):
            raise ValueError(
                "style=label has no steps: grpo.shaping, grpo.srpo and grpo.patterns need style=post or style=pre"
            )
        if style == "pre" and self.label_objective == "expected":
            raise ValueError("grpo.label_objective=expected needs the label first: set style=post or style=label")
        if style == "pre" and self.pool < 1:
            raise ValueError("grpo.pool needs the label first: set style=post or style=label")
        if self.dyknow.context and self.num_generations % 2:
            raise ValueError(
                f"grpo.num_generations={self.num_generations}: half of a group has context, give an even number"
            )
        if self.dyknow.context and (self.replay.share or stepwise):
            raise ValueError(
                "grpo.dyknow.context goes with plain groups: set grpo.replay.share=0, grpo.srpo.weight=0 and grpo.srpo.mask=none"
            )


@dataclass(frozen=True)
class JudgeTrainConfig:
    """Everything that ``taoemb judge train`` can be told."""

    model: str = ""
    """Start model: a folder or hub id of a causal language model, or a GGUF file."""
    data: str = ""
    """Folder of a generated shop, whose rules write the correct reasons, or of a catalog with graded training queries."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """A model that writes the reasons, in the place of the shop's rules or for pairs that have none."""
    stages: tuple[Stage, ...] = ("sft", "dpo", "grpo")
    """In this order."""
    style: Style = "post"
    """``post``: label, then reasons, so that a grade takes one forward pass [paper: how it is served]; ``pre``: reasons first;
    ``label``: no reasons."""
    scheme: str = "taobao4"
    """Labels."""
    rules: str = RULES
    """What the judge is told before the labels."""
    lattice: str = ""
    """Rules of your own, by which a grade follows from the verdicts of the reasons; by default the generated shop's. A YAML file with the key ``grades``
    alone: category verdict (exact, related, mismatch) -> attribute verdict (match, partial, violated) -> grade 0 to 3. A teacher's reasons and
    ``grpo.shaping.gate`` are held against them."""
    examples: int = 4000
    """Graded pairs of training queries for ``sft`` [ours]; of a catalog or a teacher for all stages."""
    balance: bool = True
    """As many of each grade."""
    contexts: str = ""
    """Chunks of context, of which each example gets the best by BM25: a table with the columns ``id`` and ``text``, or ``shop`` for what the
    generated shop writes. All stages read them, but for ``grpo.dyknow``, where half of each group does."""
    max_new_tokens: int = 128
    """Longest completion."""
    max_chars: int = 400
    """Longest text of an item that is shown."""
    lora_rank: int = 0
    """Rank of LoRA adapters, merged after each stage; 0 trains all weights."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time."""
    bf16: bool | None = None
    """Autocast of the forward passes to bfloat16; by default where a GPU has it. A CPU with AVX-512 BF16 or AMX gains from it too."""
    save_steps: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of every random choice."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Preferences, of ``dpo`` or ``kto``."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Group-relative policy optimisation."""

    def __post_init__(self) -> None:
        check_positive(self, "examples", "max_new_tokens", "max_chars", "save_steps")
        get_scheme(self.scheme)
        if not self.stages or len(set(self.stages)) < len(self.stages) or not {*self.stages} <= {*get_args(Stage)}:
            raise ValueError(f"stages={list(self.stages)}: give some of {', '.join(get_args(Stage))}, each once")
        if self.style not in get_args(Style):
            raise ValueError(f"style={self.style!r}: give one of {', '.join(get_args(Style))}")
        if self.scheme == STEP.name and (self.style != "label" or self.contexts or self.teacher.url):
            raise ValueError(
                "scheme=step: the context is a chain of reasons that the examples have, and its last line is right or wrong; set "
                "style=label, and neither contexts nor teacher.url"
            )
        for name in ("sft", "dpo", "grpo"):
            words = ("steps", "batch_size", "learning_rate", *(() if name == "sft" else ("prompts", "temperature")))
            with _of(name):
                check_positive(getattr(self, name), *words)
        with _of("dpo"):
            check_positive(self.dpo, "beta")
        if not 0 <= self.grpo.beta < np.inf:
            raise ValueError(f"grpo.beta={self.grpo.beta}: give 0, for none, or a number greater than 0")
        if not 0 < self.grpo.difficulty <= 1:
            raise ValueError(f"grpo.difficulty={self.grpo.difficulty}: give a share above 0, at most 1")
        if not 0 <= self.grpo.hardest < self.grpo.difficulty:
            raise ValueError(
                f"grpo.hardest={self.grpo.hardest}: give a share from 0, below grpo.difficulty={self.grpo.difficulty}"
            )
        if self.grpo.top_k < 0:
            raise ValueError(f"grpo.top_k={self.grpo.top_k}: give 0, for all tokens, or a number of tokens")
        if not 0 < self.grpo.pool <= 1:
            raise ValueError(f"grpo.pool={self.grpo.pool}: give a probability above 0, at most 1")
        if not 0 <= self.grpo.advantage_clip < np.inf:
            raise ValueError(
                f"grpo.advantage_clip={self.grpo.advantage_clip}: give 0, for none, or a number greater than 0"
            )
        if not 1 <= self.grpo.patterns <= self.grpo.num_generations:
            raise ValueError(
                f"grpo.patterns={self.grpo.patterns}: give 1, for all prompts, to grpo.num_generations={self.grpo.num_generations}"
            )
        for name, allowed in (("order", Order), ("label_objective", LabelObjective)):
            if getattr(self.grpo, name) not in get_args(allowed):
                raise ValueError(
                    f"grpo.{name}={getattr(self.grpo, name)!r}: give one of {', '.join(get_args(allowed))}"
                )
        self.grpo.check_style(self.style)
        if self.grpo.dyknow.context and not self.contexts:
            raise ValueError("grpo.dyknow.context: say where chunks of context come from with contexts=")
        if min(self.dpo.samples, self.grpo.num_generations) < 2:
            raise ValueError(f"dpo.samples={self.dpo.samples}, grpo.num_generations={self.grpo.num_generations}: completions are compared, "
                             "give 2 or more")  # fmt: skip
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank}: give a rank such as 16, or 0 to train all weights")


@contextlib.contextmanager
def _of(part: str) -> Iterator[None]:
    """Name the part of the settings in a complaint about one of them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None


def recipe_file(name: str) -> Path:
    """The file of a recipe by its name, or a YAML file of your own. Raises ValueError that lists the names."""
    own, file = Path(name), RECIPES / f"{name}.yaml"
    if own.suffix == ".yaml":
        return own
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {name!r}: give one of {known}, or a file that ends in .yaml")
    return file
