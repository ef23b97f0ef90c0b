import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from taoemb.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from taoemb.encoder import Encoder

IDENTITY = {"config": {"steps": 10, "rates": (0.1, 0.2), "nested": {"a": 1}}, "start_model": "abc"}
TEXTS = ["red face cream", "vegan cream", "dry skin"]


class Training:
    """A few steps with dropout, so that weights, Adam's moments and the random state all matter."""

    def __init__(self, folder):
        self.encoder = Encoder(folder)
        self.encoder.model.train()
        self.optimizer = torch.optim.AdamW(self.encoder.model.parameters(), lr=0.01)

    def steps(self, n):
        for _ in range(n):
            self.optimizer.zero_grad()
            target = torch.randn(self.encoder.dimension)
            (self.encoder.forward(TEXTS, "query") @ target).sum().backward()
            self.optimizer.step()

    def save(self, folder, step, identity=IDENTITY, **more):
        save_checkpoint(folder, step=step, encoder=self.encoder, optimizer=self.optimizer, identity=identity,
                        extra=more.pop("extra", {}), **more)  # fmt: skip

    def load(self, folder, identity=IDENTITY):
        return load_checkpoint(folder, encoder=self.encoder, optimizer=self.optimizer, identity=identity)


@pytest.fixture(params=["static_model", "tiny_bert"])
def model(request):
    return request.getfixturevalue(request.param)


def test_a_resumed_run_is_the_uninterrupted_one(model, tmp_path):
    torch.manual_seed(0)
    run = Training(model)
    run.steps(3)
    run.save(tmp_path / "c", 3, extra={"encodings": 12, "means": [0.5, None]})
    saved = run.encoder.fingerprint
    run.steps(4)
    torch.manual_seed(99)
    resumed = Training(model)
    checkpoint = resumed.load(tmp_path / "c")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.extra, checkpoint.arrays) == (3, {"encodings": 12, "means": [0.5, None]}, {})
    assert resumed.encoder.fingerprint == saved
    resumed.steps(4)
    assert resumed.encoder.fingerprint == run.encoder.fingerprint  # to the last bit
    after = torch.rand(3)
    other = Training(model)
    other.load(tmp_path / "c")
    other.optimizer.state.clear()  # what a lost optimiser would do
    other.steps(4)
    assert other.encoder.fingerprint != run.encoder.fingerprint
    assert torch.equal(torch.rand(3), after)


def test_optimizer_settings_come_back(static_model, tmp_path):
    run = Training(static_model)
    run.steps(1)
    run.optimizer.param_groups[0]["lr"] = 0.123
    run.save(tmp_path / "c", 1)
    other = Training(static_model)
    other.load(tmp_path / "c")
    assert other.optimizer.param_groups[0]["lr"] == 0.123


def test_no_checkpoint_yet(static_model, tmp_path):
    run = Training(static_model)
    before = run.encoder.fingerprint
    assert run.load(tmp_path / "c") is None
    assert run.encoder.fingerprint == before


def test_arrays_come_back(static_model, tmp_path):
    run = Training(static_model)
    arrays = {"vectors": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), "none": np.zeros((0, 2), int)}
    run.save(tmp_path / "c", 2, arrays=arrays)
    checkpoint = Training(static_model).load(tmp_path / "c")
    assert checkpoint is not None
    assert checkpoint.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.arrays[name], array)
        assert checkpoint.arrays[name].dtype == array.dtype
    run.save(tmp_path / "c", 3)  # without arrays there are none, not the older ones
    later = Training(static_model).load(tmp_path / "c")
    assert later is not None
    assert (later.step, later.arrays) == (3, {})


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"start_model": "xyz"}, "start_model"),
        ({"config": {**IDENTITY["config"], "steps": 11}}, r"config\.steps"),
        ({"config": {**IDENTITY["config"], "nested": {"a": 2}}, "items": 5}, r"config\.nested\.a, items"),
        ({"config": {**IDENTITY["config"], "rates": (0.1, 0.3)}}, r"config\.rates"),
    ],
)
def test_another_run_is_refused_naming_what_differs(change, keys, static_model, tmp_path):
    run = Training(static_model)
    run.save(tmp_path / "c", 1)
    run.steps(1)
    before = run.encoder.fingerprint
    with pytest.raises(CheckpointError, match=rf"belongs to another run \({keys} differ\)"):
        run.load(tmp_path / "c", {**IDENTITY, **change})
    assert run.encoder.fingerprint == before


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
def test_damaged_files_are_named(name, static_model, tmp_path):
    run = Training(static_model)
    run.steps(1)
    run.save(tmp_path / "c", 1)
    run.steps(1)
    before = run.encoder.fingerprint
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is missing or corrupt"):
        run.load(tmp_path / "c")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing or corrupt"):
        run.load(tmp_path / "c")
    assert run.encoder.fingerprint == before  # nothing is half restored


def test_a_damaged_state_or_array_is_named(static_model, tmp_path):
    run = Training(static_model)
    run.save(tmp_path / "c", 1, arrays={"vectors": np.eye(3)})
    file = tmp_path / "c" / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"vectors\.npy is missing or corrupt"):
        run.load(tmp_path / "c")
    (tmp_path / "c" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is corrupt"):
        run.load(tmp_path / "c")


def test_another_format_is_refused(static_model, tmp_path):
    run = Training(static_model)
    run.save(tmp_path / "c", 1)
    state = tmp_path / "c" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format differ"):
        run.load(tmp_path / "c")


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_while_saving_leaves_the_old_checkpoint(rename, static_model, tmp_path, monkeypatch):
    run = Training(static_model)
    run.save(tmp_path / "c", 1)
    first = run.encoder.fingerprint
    run.steps(1)
    calls = 0
    real = type(tmp_path).rename

    def stop(self, target):
        nonlocal calls
        calls += 1
        if calls == rename:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            run.save(tmp_path / "c", 2)
    checkpoint = run.load(tmp_path / "c")
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert run.encoder.fingerprint == first
    run.save(tmp_path / "c", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_tied_weights(static_model, tmp_path):
    def tied():
        model = SentenceTransformer(str(static_model), device="cpu")
        first, second = Dense(16, 16), Dense(16, 16)
        second.linear.weight = first.linear.weight
        model.append(first)
        model.append(second)
        return model

    run = Training(tied())
    run.steps(2)
    run.save(tmp_path / "c", 2)
    other = Training(tied())
    other.load(tmp_path / "c")
    assert other.encoder.model[1].linear.weight is other.encoder.model[2].linear.weight
    np.testing.assert_array_equal(other.encoder.encode_query(TEXTS), run.encoder.encode_query(TEXTS))


def test_no_pickled_objects(static_model, tmp_path):
    run = Training(static_model)
    run.steps(1)
    run.save(tmp_path / "c", 1)
    saved = torch.load(tmp_path / "c" / "optimizer.pt", weights_only=True)  # refuses anything but tensors and numbers
    assert saved.keys() == {"optimizer", "rng"}
