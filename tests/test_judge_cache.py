"""Verdicts in a file: asked once, never wrong, not lost; by a killed process, two at a time, or with damage."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from taoemb.catalog import Item, Query
from taoemb.judge import CachedJudge
from taoemb.judge import cache as cache_module
from taoemb.judge.schemes import BINARY, GRADES_4

PAIRS = [(Query(f"q{i % 5}", f"query {i % 5}"), Item(f"i{i}", f"item {i}")) for i in range(40)]


class Counting:
    """A judge of fixed answers that counts what it is asked; it abstains on some and fails where it is told to."""

    name, fingerprint = "counting", "counting 1"

    def __init__(self, scheme=GRADES_4, fail_after=10**9, mass=True):
        self.scheme, self.asked, self.fail_after, self.mass = scheme, [], fail_after, mass

    def score(self, pairs):
        if len(self.asked) >= self.fail_after:
            raise OSError("the server is gone")
        self.asked += pairs
        probs = np.array([self.probs(*pair) for pair in pairs]).reshape(-1, len(self.scheme))
        return self.scheme.output(probs, label_mass=np.full(len(pairs), 0.75, np.float32) if self.mass else None)

    def probs(self, query, item):
        if item.title.endswith("7"):
            return np.full(len(self.scheme), np.nan)
        return np.random.default_rng(len(query.text) * 1000 + int(item.id[1:])).dirichlet(np.ones(len(self.scheme)))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "verdicts.sqlite"


def equal(a, b):
    np.testing.assert_array_equal(a.probs, b.probs)
    np.testing.assert_array_equal(a.score, b.score)


def test_a_pair_is_judged_once(file):
    judge = Counting()
    cached = CachedJudge(judge, file)
    expected = judge.score(PAIRS)
    judge.asked.clear()
    for _ in range(2):
        equal(cached.score([*PAIRS, *PAIRS[:3]]), judge_output(expected, [*range(40), 0, 1, 2]))
    known = [pair for pair in PAIRS if not pair[1].title.endswith("7")]
    assert len(judge.asked) == 40 + 4  # of those that abstain it is asked again
    assert len(cached) == len(known) == 36
    assert (cached.hits, cached.calls) == (3 + 39, 44)
    cached.close()
    again = Counting()
    equal(CachedJudge(again, file).score(known), Counting().score(known))
    assert not again.asked


def judge_output(found, rows):
    return replace(found, probs=found.probs[rows], score=found.score[rows], label_mass=found.label_mass[rows])


def test_what_decides_is_in_the_key(file):
    judge = Counting()
    cached = CachedJudge(judge, file)
    query, item = PAIRS[0]
    cached.score([(query, item)])
    others = [(replace(query, text="other"), item), (query, replace(item, title="item 00")), (query, replace(item, price=3.0)),
              (replace(query, intent={"type": "mug"}), item)]  # fmt: skip
    cached.score(others)
    assert len(judge.asked) == 5
    cached.score([(replace(query, id="another", slice="tail"), item)])  # the judge does not see these
    assert len(judge.asked) == 5
    judge.fingerprint = "counting 2"
    cached.score([(query, item)])
    assert len(judge.asked) == 6


def test_label_mass_and_scheme_come_back(file):
    cached = CachedJudge(Counting(), file)
    for _ in range(2):
        np.testing.assert_allclose(cached.score(PAIRS[:3]).label_mass, 0.75)
    binary = CachedJudge(Counting(BINARY, mass=False), file)
    assert binary.scheme is BINARY
    for _ in range(2):
        assert binary.score(PAIRS[:3]).label_mass is None
        assert binary.score([]).probs.shape == (0, 2)


def test_a_judge_that_fails_loses_nothing_it_has_answered(file, monkeypatch):
    monkeypatch.setattr(cache_module, "_CHUNK", 10)
    cached = CachedJudge(Counting(fail_after=20), file)
    with pytest.raises(OSError, match="the server is gone"):
        cached.score(PAIRS)
    again = Counting()
    equal(CachedJudge(again, file).score(PAIRS), Counting().score(PAIRS))
    assert len(again.asked) == 40 - 18  # 18 of the first 20 said something


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_judge_cache as t
t.cache_module._CHUNK = 5

class Slow(t.Counting):
    def score(self, pairs):
        if len(self.asked) >= 15:
            print("now", flush=True)
            time.sleep(60)
        return super().score(pairs)

t.CachedJudge(Slow(), sys.argv[1]).score(t.PAIRS)
"""


def test_a_killed_process_leaves_what_it_had(file):
    running = subprocess.Popen([sys.executable, "-c", KILLED, file, os.path.dirname(__file__)], stdout=subprocess.PIPE)
    assert running.stdout.readline() == b"now\n"
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    again = Counting()
    equal(CachedJudge(again, file).score(PAIRS), Counting().score(PAIRS))
    assert len(again.asked) == 40 - 14


def test_threads_and_connections_share_a_file(file):
    judges = [Counting() for _ in range(4)]
    caches = [CachedJudge(judge, file) for judge in judges]
    found = [None] * 8

    def ask(n):
        found[n] = caches[n % 4].score(PAIRS)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in found:
        equal(output, Counting().score(PAIRS))
    assert len(caches[0]) == 36


@pytest.mark.parametrize("damage", ["noise", "cut", "not a database"])
def test_a_corrupt_file_is_set_aside(file, damage, capfd):
    first = CachedJudge(Counting(), file)
    first.score(PAIRS)
    first.close()
    content = bytearray(file.read_bytes())
    if damage == "noise":
        content[30 : len(content) : 7] = bytes(len(content[30 : len(content) : 7]))
    elif damage == "cut":
        content = content[: len(content) // 2]
    else:
        content = b"these are no verdicts, but a text that is long enough" * 40
    file.write_bytes(content)
    judge = Counting()
    equal(CachedJudge(judge, file).score(PAIRS), Counting().score(PAIRS))
    assert len(judge.asked) == 40
    (aside,) = file.parent.glob("verdicts.sqlite.corrupt-*")
    assert aside.read_bytes() == bytes(content)
    assert "is corrupt" in capfd.readouterr().out


def test_a_damaged_verdict_is_judged_anew(file):
    first = CachedJudge(Counting(), file)
    first.score(PAIRS)
    first.close()
    with sqlite3.connect(file) as connection:
        key, value = connection.execute("SELECT key, value FROM verdicts LIMIT 1").fetchone()
        connection.execute("UPDATE verdicts SET value = ? WHERE key = ?", (value[:-5] + b"\0" + value[-4:], key))
    connection.close()
    judge = Counting()
    equal(CachedJudge(judge, file).score(PAIRS), Counting().score(PAIRS))
    assert len(judge.asked) == 1 + 4


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="give another one"):
        CachedJudge(Counting(), tmp_path / "x")


def test_an_interrupted_write_holds_up_nobody(file, monkeypatch):
    cached = CachedJudge(Counting(), file)
    real = cached._connection

    class Interrupted:
        in_transaction = property(lambda _: real.in_transaction)
        execute = real.execute

        def executemany(self, *_):
            raise KeyboardInterrupt

    cached._connection = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        cached.score(PAIRS)
    cached._connection = real
    equal(CachedJudge(Counting(), file).score(PAIRS), Counting().score(PAIRS))  # writes too
    equal(cached.score(PAIRS), Counting().score(PAIRS))
