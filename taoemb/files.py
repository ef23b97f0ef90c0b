"""Files and folders that appear complete or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Make a file or a folder entry survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    beside.replace(path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, beside and renamed; NaN is refused (it is not JSON)."""
    write_text(path, _json_text(value))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_manifest(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with its own checksum in it."""
    write_json(path, {**value, "checksum": _text_checksum(_json_text(value))})


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what `write_manifest` wrote; raises ValueError that names the file when a byte of it is another."""
    value = read_json(path)
    if not isinstance(value, dict) or "checksum" not in value or path.read_bytes() != _json_text(value).encode():
        raise ValueError(f"{path} is corrupt")
    rest = {key: entry for key, entry in value.items() if key != "checksum"}
    if _text_checksum(_json_text(rest)) != value["checksum"]:
        raise ValueError(f"{path} is corrupt (its checksum is another)")
    return rest


def _text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def replace_folder(folder: Path, marker: str, kind: str = "") -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends well it takes the place of ``folder``.

    ``marker`` is a file by which an older folder of the same kind is known; with ``kind`` it is JSON that says so in
    its ``kind``. Raises FileExistsError where ``folder`` holds anything else: it would be lost. A kill leaves the old folder, or for the moment between two renames its
    hidden ``.NAME.old``, which `recover_folder` and the next `replace_folder` put back.
    """
    beside = _beside(folder, "tmp")
    recover_folder(folder)
    if folder.exists() and not (folder.is_dir() and (_is_kind(folder / marker, kind) or not any(folder.iterdir()))):
        what = f"{marker} of a {kind}" if kind else marker
        raise FileExistsError(f"{folder} is there and has no {what}; give another folder, this one would be replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    yield beside
    for path in sorted(beside.rglob("*")):
        fsync(path)
    take_place(beside, folder)


def take_place(beside: Path, folder: Path) -> None:
    """Put the folder ``beside``, whose files are written through, in the place of ``folder``; see `replace_folder`."""
    old = _beside(folder, "old")
    fsync(beside)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_kind(marker: Path, kind: str) -> bool:
    if not kind or not marker.exists():
        return marker.exists()
    found = read_json(marker)
    return isinstance(found, dict) and found.get("kind") == kind


def recover_folder(folder: Path) -> None:
    """Finish or undo a replacement that was interrupted between its two renames."""
    old = _beside(folder, "old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")  # hidden: model.old may be somebody's backup of model


def read_json(path: Path) -> Any:
    """Read a JSON file; raises ValueError that names it when it is corrupt."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what UnicodeDecodeError is
        raise ValueError(f"{path} is corrupt: {error}") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
