"""The cascade against verdicts merged by hand."""

import numpy as np
import pytest

from taoemb.catalog import Item, Query
from taoemb.judge import CascadeJudge
from taoemb.judge.schemes import ESCI, GRADED_3, GRADES_4
from taoemb.types import JudgeOutput, RelevanceJudge

PAIRS = [(Query(f"q{i}", "mug"), Item(f"i{i}", "mug")) for i in range(6)]
CHEAP = [
    [0.70, 0.10, 0.10, 0.10],  # just sure enough
    [0.69, 0.11, 0.10, 0.10],
    [0.00, 0.00, 0.00, 1.00],
    [np.nan] * 4,
    [0.25, 0.25, 0.25, 0.25],
    [0.05, 0.90, 0.05, 0.00],
]
STRONG = [[0.0, 0.1, 0.2, 0.7]] * 4 + [[np.nan] * 4] * 2


class Fixed:
    """Verdicts by the number in a query's id; remembers what it was asked."""

    def __init__(self, rows, scheme=GRADES_4, mass=None, fingerprint="fixed"):
        self.rows, self.scheme, self.mass = np.array(rows, dtype=np.float32), scheme, mass
        self.name, self.fingerprint, self.seen = "fixed", fingerprint, []

    def score(self, pairs):
        self.seen.append([query.id for query, _ in pairs])
        places = [int(query.id[1:]) for query, _ in pairs]
        mass = None if self.mass is None else np.array(self.mass, dtype=np.float32)[places]
        return self.scheme.output(self.rows[places], label_mass=mass)


def test_the_strong_judge_gets_what_the_cheap_one_is_not_sure_of():
    cheap, strong = Fixed(CHEAP), Fixed(STRONG)
    judge = CascadeJudge(cheap, strong, sure=0.7)
    assert isinstance(judge, RelevanceJudge)
    verdict = judge.score(PAIRS)
    assert strong.seen == [["q1", "q3", "q4"]]
    expected = np.array([CHEAP[0], STRONG[1], CHEAP[2], STRONG[3], STRONG[4], CHEAP[5]])
    np.testing.assert_allclose(verdict.probs, expected, atol=1e-6)
    np.testing.assert_allclose(verdict.score, expected @ [0, 1 / 3, 2 / 3, 1], atol=1e-6)
    assert verdict.grade.tolist() == [0, 3, 3, 3, -1, 1]  # the strong one abstains on the fifth
    assert verdict.label_mass is None
    assert (judge.asked, judge.passed_on) == (6, 3)
    judge.score(PAIRS[:2])
    assert (judge.asked, judge.passed_on) == (8, 4)


def test_the_cheap_judges_output_is_not_written_to():
    cheap = Fixed(CHEAP)
    first = cheap.score(PAIRS)
    kept = first.probs.copy()
    cheap.score = lambda pairs: first
    CascadeJudge(cheap, Fixed(STRONG)).score(PAIRS)
    np.testing.assert_array_equal(first.probs, kept)


def test_label_mass_is_the_strong_judges():
    judge = CascadeJudge(Fixed(CHEAP, mass=[0.1] * 6), Fixed(STRONG, mass=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))
    np.testing.assert_allclose(judge.score(PAIRS).label_mass, [np.nan, 0.6, np.nan, 0.8, 0.9, np.nan], rtol=1e-6)


def test_no_pairs_and_no_doubts_ask_nobody():
    strong = Fixed(STRONG, mass=[0.5] * 6)
    judge = CascadeJudge(Fixed(CHEAP), strong)
    assert judge.score([]).probs.shape == (0, 4)
    sure = judge.score([PAIRS[2], PAIRS[5]])
    assert isinstance(sure, JudgeOutput)
    assert sure.label_mass is None
    assert strong.seen == []
    only_abstentions = CascadeJudge(Fixed(CHEAP), Fixed(STRONG), sure=0)
    only_abstentions.score(PAIRS)
    assert only_abstentions.passed_on == 1


def test_judges_with_other_labels_are_refused():
    with pytest.raises(ValueError, match="'graded3' and 'fixed' 'taobao4'"):
        CascadeJudge(Fixed(CHEAP, GRADED_3), Fixed(STRONG))
    with pytest.raises(ValueError, match="the same labels"):
        CascadeJudge(Fixed(CHEAP), Fixed(STRONG, ESCI))
    spelt = CascadeJudge(Fixed(CHEAP), Fixed(STRONG, GRADES_4.answering("A", "B", "C", "D")))
    assert spelt.scheme == GRADES_4  # only what is written differs
    assert CascadeJudge(Fixed(CHEAP, ESCI), Fixed(STRONG, ESCI)).scheme == ESCI


@pytest.mark.parametrize("sure", [-0.1, 1.1, float("nan")])
def test_sure_is_a_probability(sure):
    with pytest.raises(ValueError, match="sure="):
        CascadeJudge(Fixed(CHEAP), Fixed(STRONG), sure=sure)


def test_fingerprint_changes_with_either_judge_and_sure():
    prints = {
        CascadeJudge(Fixed(CHEAP, fingerprint=a), Fixed(STRONG, fingerprint=b), sure=sure).fingerprint
        for a in "xy"
        for b in "xy"
        for sure in (0.6, 0.7)
    }
    assert len(prints) == 8
