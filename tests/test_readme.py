"""The README's Python, copied as it is, on a folder as it describes it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
def test_the_examples_run_as_they_are(small_shop_folder, static_model, tmp_path, monkeypatch):
    shutil.copytree(small_shop_folder, tmp_path / "my-shop")
    shutil.copytree(static_model, tmp_path / "runs" / "my-shop" / "model")
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["ids"].shape == names["scores"].shape == (1, 10)
    assert (tmp_path / "runs" / "mine" / "model" / "modules.json").exists()
    log = (tmp_path / "runs" / "mine" / "logs" / "retrieval_grpo.jsonl").read_text()
    assert '"reward/in_budget/mean"' in log
    moved = names["Encoder"]("runs/my-shop/model").encode_query(["red"]) - names["encoder"].encode_query(["red"])
    assert np.abs(moved).max() > 1e-3
