"""Callbacks of the Hugging Face Trainer's kind (`transformers.TrainerCallback`) around our own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from taoemb.trainer_config import RetrievalGRPOConfig


class Callbacks:
    """Calls ``on_train_begin``, ``on_step_begin``, ``on_step_end``, ``on_log``, ``on_evaluate``, ``on_save`` and ``on_train_end``.

    ``args`` holds the settings of stage 2 with ``output_dir``, ``max_steps``, ``per_device_train_batch_size`` and
    ``logging_steps`` besides, ``state`` the step, the length of the run and the logs so far, ``model`` the
    sentence-transformers model. Of what a callback may ask for, ``should_training_stop`` ends the run after this step and
    ``should_save`` writes a checkpoint. Callbacks that read more of `TrainingArguments`, as the integrations of tensorboard and
    others do, are not supported: trackers do that. Of several processes every one calls them, with ``is_world_process_zero`` in
    ``state``; figures of rewards and index are in the logs of the first alone.

    Raises TypeError for what is no `transformers.TrainerCallback`.
    """

    def __init__(
        self, callbacks: Sequence[TrainerCallback], config: RetrievalGRPOConfig, run_dir: Path, rank: int, **shown: Any
    ) -> None:
        for callback in callbacks:
            if not isinstance(callback, TrainerCallback):
                raise TypeError(f"callbacks holds {callback!r}; give instances of transformers.TrainerCallback")
        self._callbacks, self._shown = list(callbacks), shown
        self._args = SimpleNamespace(**asdict(config) | {
            "output_dir": str(run_dir), "max_steps": config.steps, "per_device_train_batch_size": config.batch_size,
            "logging_steps": 1,
        })  # fmt: skip
        first = rank == 0
        self.state = TrainerState(max_steps=config.steps, is_world_process_zero=first, is_local_process_zero=first)
        self.control = TrainerControl()

    @property
    def should_stop(self) -> bool:
        """Whether a callback has asked for the end of the run."""
        return bool(self.control.should_training_stop)

    @property
    def should_save(self) -> bool:
        """Whether a callback has asked for a checkpoint after this step."""
        return bool(self.control.should_save)

    def call(self, event: str, step: int, **more: Any) -> None:
        """Tell every callback of an event; ``step`` counts the finished steps."""
        self.state.global_step = step
        if event == "on_step_begin":
            self.control.should_save = False
        for callback in self._callbacks:
            answer = getattr(callback, event)(self._args, self.state, self.control, **self._shown, **more)
            self.control = answer or self.control

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """``on_log``, with the metrics of a step; they are kept in ``state.log_history`` where there is a callback."""
        if self._callbacks:
            self.state.log_history.append({**metrics, "step": step})
            self.call("on_log", step, logs=dict(metrics))
