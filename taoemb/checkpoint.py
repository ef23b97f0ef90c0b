"""Everything that a resumed training run needs, written atomically.

A checkpoint folder holds ``weights.safetensors`` (what training changes), ``optimizer.pt`` (tensors only), ``state.json``
and the trainer's arrays, among them the vectors of the index in use: encoded anew they would be fresher than the
uninterrupted run's. Frozen weights are those of the start model, which the run's identity names by its fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taoemb.files import checksum, read_json, recover_folder, replace_folder, write_json

FORMAT = 1


class Trained(Protocol):
    """An encoder, or anything else with a model in it that is trained."""

    @property
    def model(self) -> nn.Module:
        """Its weights."""


class CheckpointError(ValueError):
    """A checkpoint is corrupt, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found: ``step`` is the next step to take, ``extra`` and ``arrays`` are the trainer's own."""

    step: int
    extra: dict[str, Any]
    arrays: dict[str, np.ndarray]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    encoder: Trained,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Replace the checkpoint in ``folder``; a kill at any moment leaves the old one or the new one.

    ``identity`` is JSON that a resuming run must repeat exactly (configuration, start model, catalog); ``extra`` is any
    further JSON state. The start model must be named by its ``fingerprint``, as frozen weights are not saved.
    """
    with replace_folder(folder, "state.json") as beside:
        save_weights(encoder, beside / "weights.safetensors")
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        torch.save({"optimizer": optimizer.state_dict(), "rng": rng}, beside / "optimizer.pt")
        for name, array in (arrays or {}).items():
            np.save(beside / f"{name}.npy", array, allow_pickle=False)
        files = {path.name: checksum(path) for path in sorted(beside.iterdir())}
        state = {"format": FORMAT, "step": step, "identity": identity, "extra": extra, "files": files}
        write_json(beside / "state.json", state)


def load_checkpoint(
    folder: Path, *, encoder: Trained, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> Checkpoint | None:
    """Restore weights, optimiser and random state in place; None when there is no checkpoint yet.

    Raises CheckpointError when a file is corrupt (it is named) or the checkpoint was written under another
    configuration, start model or catalog (the keys that differ are named).
    """
    recover_folder(folder)
    if not (folder / "state.json").exists():
        return None
    state = read_json(folder / "state.json")
    wanted = json.loads(json.dumps(identity))
    differing = sorted(_differences(state["identity"], wanted))
    if differing or state["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} belongs to another run ({', '.join(differing) or 'format'} differ); "
            "repeat the settings it was started with, or give another run folder"
        )
    for name, expected in state["files"].items():
        if not (folder / name).exists() or checksum(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is missing or corrupt; delete {folder} to start this stage again")
    load_weights(encoder, folder / "weights.safetensors")
    saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"]["cpu"])
    if "cuda" in saved["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng"]["cuda"])
    names = [name.removesuffix(".npy") for name in state["files"] if name.endswith(".npy")]
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names}
    return Checkpoint(state["step"], state["extra"], arrays)


def save_weights(encoder: Trained, file: Path) -> None:
    """Write the weights that training changes; `load_weights` puts them back into an encoder prepared alike."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in _trained(encoder).items()}, beside)
    beside.replace(file)


def load_weights(encoder: Trained, file: Path) -> None:
    """Restore in place what `save_weights` wrote.

    Raises CheckpointError when the encoder trains other weights than the one that was saved.
    """
    saved, wanted = load_file(file), _trained(encoder)
    differing = sorted({name for name in saved.keys() | wanted.keys()
                        if name not in saved or name not in wanted or saved[name].shape != wanted[name].shape})  # fmt: skip
    if differing:
        raise CheckpointError(f"{file} holds other weights than this model trains ({differing[0]} and "
                              f"{len(differing) - 1} more differ); repeat the settings it was written with")  # fmt: skip
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])


def _trained(encoder: Trained) -> dict[str, Tensor]:
    """What training may change: parameters that are not frozen, a tied one once, and buffers that belong to the model."""
    model = encoder.model
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return buffers | {name: p for name, p in model.named_parameters() if p.requires_grad}


def _differences(a: Any, b: Any, key: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for name in a.keys() | b.keys():
            found |= _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
        return found
    return set() if a == b else {key}
