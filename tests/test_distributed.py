"""Several processes on one model: T13, the same weights as one process with the whole batch; shares; owner and the others."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from taoemb.distributed import World
from taoemb.encoder import Encoder

TRAIN = """
import json, sys
from pathlib import Path
import torch
from taoemb.catalog import Catalog
from taoemb.contrastive import ContrastiveConfig, train_contrastive
from taoemb.distributed import World
from taoemb.encoder import Encoder
from taoemb.judge import OracleJudge
from taoemb.rewards import QualityReward, RelevanceReward
from taoemb.trainer import RetrievalGRPOTrainer
from taoemb.trainer_config import RetrievalGRPOConfig
from transformers import TrainerCallback

data, model, out, batch, stage1, stage2, stop = sys.argv[1:]
world = World.join()
torch.set_num_threads(1)
catalog, encoder = Catalog.load(data), Encoder(model)
for module in encoder.model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0  # its masks depend on who draws them
first = ContrastiveConfig(batch_size=int(batch), global_negatives=8, **json.loads(stage1))
train_contrastive(encoder, catalog, first, run_dir=out, trackers=["jsonl"])
second = RetrievalGRPOConfig(batch_size=int(batch), num_candidates=6, global_negatives=8, **json.loads(stage2))
rewards = [RelevanceReward(OracleJudge(catalog.qrels, 0)), QualityReward(catalog.items.column("quality"))]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **shown):
        held.append(len(shown["optimizer"].optim.state) if world.size > 1 else 0)
        control.should_training_stop = world.owner and state.global_step == int(stop)


held = []
trainer = RetrievalGRPOTrainer(encoder, catalog, rewards, [1.0, 0.3], second, run_dir=out, trackers=["jsonl"], callbacks=[Stop()])
spent = trainer.train()
encoder.save(Path(out) / f"model-{world.rank}")
(Path(out) / f"spent-{world.rank}").write_text(str(spent))
print("moments of", held[-1], "of", len(encoder.trainable_parameters()))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(processes, script, arguments, tmp_path):
    """Run a script as ``torchrun`` would, with the variables it sets."""
    file = tmp_path / "script.py"
    file.write_text(script)
    port = str(free_port())
    running = []
    for rank in range(processes):
        environment = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
        running.append(subprocess.Popen([sys.executable, file, *map(str, arguments)], env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)
    return outputs


STAGE1 = {"steps": 4, "learning_rate": 1e-3, "save_steps": 2, "chunk_size": 5}
STAGE2 = {"steps": 6, "learning_rate": 1e-3, "save_steps": 3, "refresh_steps": 2, "chunk_size": 7}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("tiny_bert", {}),
        ("static_model", {"candidates": "mixed", "prefetch": True, "refill": True, "overfetch": 2}),
        ("static_model", {"policy": "pl_rank", "matryoshka_dims": [8], "eval_steps": 3}),
    ],
    ids=str,
)
def test_T13_two_processes_are_one_with_the_whole_batch(
    model, settings, small_shop, small_shop_folder, tmp_path, request
):
    """1 process x batch 8 = 2 processes x batch 4, after both stages; tiny rounding apart (other paddings, other sums)."""
    folder = request.getfixturevalue(model)
    stages = [json.dumps(STAGE1), json.dumps(STAGE2 | settings)]
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, TRAIN, [small_shop_folder, folder, one, 8, *stages, 0], tmp_path)
    launch(2, TRAIN, [small_shop_folder, folder, two, 4, *stages, 0], tmp_path)
    texts = small_shop.queries.texts
    start, whole, *halves = (
        Encoder(path).encode_query(texts) for path in (folder, one / "model-0", two / "model-0", two / "model-1")
    )
    np.testing.assert_array_equal(*halves)
    moved = np.abs(whole - start).max()
    assert moved > 1e-3
    assert (
        np.abs(halves[0] - whole).max() < 2e-3 * moved
    )  # weights without a gradient follow its rounding in Adam; these do not show
    logs = [
        [json.loads(line) for line in (run / "logs" / "retrieval_grpo.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["reward/relevance/mean"] == pytest.approx(b["reward/relevance/mean"], abs=1e-6)
        assert a["item_encodings"] == b["item_encodings"]
    assert (one / "spent-0").read_text() == (two / "spent-0").read_text() == (two / "spent-1").read_text()


def test_several_processes_share_the_moments_and_go_on_after_a_stop(small_shop_folder, tiny_bert, tmp_path):
    """Each holds the optimiser's state of its part of the weights, and the owner writes that of all."""
    stages = [json.dumps(STAGE1), json.dumps(STAGE2)]
    through, halves = tmp_path / "through", tmp_path / "halves"
    outputs = launch(2, TRAIN, [small_shop_folder, tiny_bert, through, 4, *stages, 0], tmp_path)
    held, of = zip(
        *(map(int, re.search(r"moments of (\d+) of (\d+)", output).groups()) for output in outputs), strict=True
    )
    assert sum(held) == of[0] == of[1]
    assert min(held) > 0
    launch(2, TRAIN, [small_shop_folder, tiny_bert, halves, 4, *stages, 4], tmp_path)
    assert json.loads((halves / "checkpoints" / "retrieval_grpo" / "state.json").read_text())["step"] == 4
    launch(2, TRAIN, [small_shop_folder, tiny_bert, halves, 4, *stages, 0], tmp_path)
    for name in ("model-0", "model-1"):
        expected, found = (load_file(run / name / "model.safetensors") for run in (through, halves))
        for weight in expected:
            assert torch.equal(expected[weight], found[weight]), weight


JOB = """
import sys
from taoemb.config import load_config
from taoemb.job import TrainConfig, TrainJob

data, model, out = sys.argv[1:]
config = load_config(TrainConfig, None, [
    f"data={data}", f"model={model}", "trackers=[jsonl]", "stage1.steps=6", "stage1.batch_size=8", "stage1.global_negatives=8",
    "stage1.save_steps=4", "stage2.steps=7", "stage2.batch_size=4", "stage2.num_candidates=6", "stage2.global_negatives=8",
    "stage2.refresh_steps=3", "stage2.save_steps=2",
])
comparison = TrainJob(config, out).run()
print("compared" if comparison else "nothing")
"""


def test_the_job_ends_with_several_processes(small_shop_folder, tiny_bert, tmp_path):
    """All rows, dropout in stage 1, an index that is refreshed; a second call finds everything; one process speaks."""
    arguments = [small_shop_folder, tiny_bert, tmp_path / "run"]
    first = launch(2, JOB, arguments, tmp_path)
    assert [("compared" in output, "nothing" in output) for output in first] == [(True, False), (False, True)]
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    assert set(json.loads(metrics)["systems"]) == {"bm25", "untrained", "stage1", "stage1_continued", "retrieval_grpo"}
    launch(2, JOB, arguments, tmp_path)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == metrics


SHARES = """
import sys
import torch
from taoemb.distributed import World

world = World.join()
for count in (0, 1, 3, 7):
    mine = torch.arange(count, dtype=torch.float32)[world.share(count)][:, None]
    assert world.gather(mine, count)[:, 0].tolist() == list(range(count)), count
weight = torch.nn.Parameter(torch.zeros(2))
if world.rank:
    weight.grad = torch.tensor([1.0, 2.0])
world.sum_gradients([weight])
assert weight.grad.tolist() == [world.size - 1, 2.0 * (world.size - 1)]
assert world.from_owner(f"by {world.rank}") == "by 0"
tensor = world.tensor_from_owner(torch.arange(6).view(2, 3) if world.owner else None, torch.device("cpu"))
assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
with world.owner_first():
    with open(sys.argv[1], "a") as file:
        file.write(str(world.rank))
"""


def test_shares_gradients_and_the_owner(tmp_path):
    launch(3, SHARES, [tmp_path / "order"], tmp_path)
    order = (tmp_path / "order").read_text()
    assert order[0] == "0"
    assert sorted(order) == ["0", "1", "2"]


def test_one_process_alone():
    world, rows = World(), torch.ones(3, 2)
    assert world.gather(rows, 3) is rows
    assert world.from_owner("a") == "a"
    with world.owner_first():
        world.wait()
    covered = np.concatenate([np.arange(10)[World.share(_of(rank, 4), 10)] for rank in range(4)])
    assert covered.tolist() == list(range(10))


def _of(rank, size):
    world = World()
    world.rank, world.size = rank, size
    return world
