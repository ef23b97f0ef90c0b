import json
import shutil

import pytest

from taoemb.files import checksum, read_json, recover_folder, replace_folder, write_json, write_text


def fill(folder, content):
    with replace_folder(folder, "marker") as beside:
        (beside / "marker").write_text(content)
        (beside / "deep").mkdir()
        (beside / "deep" / "file").write_text(content)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_made_and_replaced(tmp_path):
    folder = tmp_path / "new" / "X"
    fill(folder, "one")
    (folder / "only in the old one").touch()
    fill(folder, "two")
    assert content(folder) == {"marker": "two", "deep/file": "two"}
    assert [path.name for path in folder.parent.iterdir()] == ["X"]  # nothing is left beside


class KillError(BaseException):
    pass


def test_a_block_that_fails_changes_nothing(tmp_path):
    fill(tmp_path / "X", "one")

    def killed():
        with replace_folder(tmp_path / "X", "marker") as beside:
            (beside / "marker").write_text("half")
            raise KillError

    with pytest.raises(KillError):
        killed()
    assert content(tmp_path / "X") == {"marker": "one", "deep/file": "one"}
    fill(tmp_path / "X", "two")  # the leftover does not mix in
    assert content(tmp_path / "X") == {"marker": "two", "deep/file": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["X"]


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_at_either_rename_keeps_a_complete_folder(rename, tmp_path, monkeypatch):
    folder = tmp_path / "X"
    fill(folder, "one")
    calls = 0
    real = type(folder).rename

    def stop(self, target):
        nonlocal calls
        calls += 1
        if calls == rename:
            raise KillError
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(folder), "rename", stop)
        with pytest.raises(KillError):
            fill(folder, "two")
    recover_folder(folder)
    assert content(folder) == {"marker": "one", "deep/file": "one"}
    fill(folder, "three")
    assert content(folder) == {"marker": "three", "deep/file": "three"}
    assert [path.name for path in tmp_path.iterdir()] == ["X"]


@pytest.mark.parametrize("recover", [True, False])
def test_a_kill_after_the_renames_keeps_the_new_folder(recover, tmp_path, monkeypatch):
    fill(tmp_path / "X", "one")
    with monkeypatch.context() as patched:
        real = shutil.rmtree
        patched.setattr("shutil.rmtree", lambda path, **k: None if str(path).endswith("old") else real(path, **k))
        fill(tmp_path / "X", "two")
    assert len(list(tmp_path.iterdir())) == 2
    if recover:
        recover_folder(tmp_path / "X")
        assert content(tmp_path / "X") == {"marker": "two", "deep/file": "two"}
    else:  # what the next replacement does first
        fill(tmp_path / "X", "three")
        assert content(tmp_path / "X") == {"marker": "three", "deep/file": "three"}
    assert [path.name for path in tmp_path.iterdir()] == ["X"]


def test_nothing_of_somebody_else_is_replaced(tmp_path):
    (tmp_path / "X").mkdir()
    (tmp_path / "X" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"has no marker; give another folder"):
        fill(tmp_path / "X", "one")
    assert content(tmp_path / "X") == {"thesis.tex": "years of work"}
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileExistsError):
        fill(tmp_path / "file", "one")
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "one")
    assert content(tmp_path / "empty")["marker"] == "one"


def test_a_backup_beside_survives(tmp_path):
    fill(tmp_path / "X", "one")
    for name in ("X.old", "X.tmp", "X.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    fill(tmp_path / "X", "two")
    recover_folder(tmp_path / "X")
    assert all((tmp_path / name / "file").read_text() == "mine" for name in ("X.old", "X.tmp", "X.bak"))


def test_text_and_json_files(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "ä\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "ä\n".encode()
    write_json(tmp_path / "c.json", {"z": [1.5, None], "a": "ü"})
    assert read_json(tmp_path / "c.json") == {"z": [1.5, None], "a": "ü"}
    assert list(json.loads((tmp_path / "c.json").read_text())) == ["a", "z"]
    before = (tmp_path / "c.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "c.json", {"loss": float("nan")})
    assert (tmp_path / "c.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("broken", [b'{"a": 1', b"", b"\xff\xfe{}"])
def test_corrupt_json_is_named(broken, tmp_path):
    (tmp_path / "state.json").write_bytes(broken)
    with pytest.raises(ValueError, match=r"state\.json is corrupt"):
        read_json(tmp_path / "state.json")


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")  # the example of FIPS 180-2
    assert checksum(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    folder = tmp_path / "emb"
    with replace_folder(folder, "manifest.json", "store") as beside:
        write_json(beside / "manifest.json", {"kind": "store"})
    with (
        pytest.raises(FileExistsError, match=r"has no manifest\.json of a index"),
        replace_folder(folder, "manifest.json", "index"),
    ):
        pass
    assert read_json(folder / "manifest.json") == {"kind": "store"}
