"""Schemes against values by hand and a brute-force CumPT."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from taoemb.catalog import Item, Query
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.schemes import BINARY, ESCI, GRADED_3, GRADES_4, SCHEMES, get_scheme, scheme_of

rows = arrays(np.float64, (5, 4), elements=st.floats(0, 1)).map(lambda a: (a + 1e-3) / (a + 1e-3).sum(1, keepdims=True))


def test_scores_by_hand():
    probs = [[0.1, 0.2, 0.3, 0.4]]
    assert GRADES_4.score(probs)[0] == pytest.approx(0.2 / 3 + 0.6 / 3 + 0.4)
    assert GRADES_4.score(probs, "p_good")[0] == pytest.approx(0.7)
    assert GRADES_4.score(probs, "cumulative")[0] == pytest.approx(2 / 3)  # P(>= 2) = .7, P(>= 3) = .4
    assert ESCI.score(probs)[0] == pytest.approx(0.2 * 0.01 + 0.3 * 0.1 + 0.4)
    assert BINARY.score([[0.25, 0.75]])[0] == 0.75
    with pytest.raises(ValueError, match="give one of expected"):
        GRADES_4.score(probs, "median")


def test_tiers_as_published():
    """Good if P4 + P3 >= beta; Mid if P4 + P3 + P2 >= beta; else Bad."""
    probs = np.array([[0.0, 0.3, 0.4, 0.3], [0.2, 0.5, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1]])
    assert GRADES_4.tier(probs, 0.5).tolist() == [2, 1, 0]
    assert GRADES_4.tier(probs, 0.75).tolist() == [1, 1, 0]
    assert GRADES_4.tier(probs, 0.3).tolist() == [2, 2, 1]
    assert BINARY.tier([[0.4, 0.6], [0.6, 0.4]]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="beta=0"):
        GRADES_4.tier(probs, 0)


@given(rows, st.floats(0.01, 1))
def test_cumulative_is_the_best_label_that_enough_probability_reaches(probs, beta):
    expected = [max(k for k in range(4) if k == 0 or row[k:].sum() >= beta - 1e-9) for row in probs]
    assert GRADES_4.cumulative(probs, beta).tolist() == expected


def test_output_scales_and_abstains():
    found = GRADES_4.output([[2, 0, 0, 2], [np.nan, 1, 0, 0]])
    np.testing.assert_allclose(found.probs[0], [0.5, 0, 0, 0.5])
    assert np.isnan(found.probs[1]).all()
    assert np.isnan(found.score[1])
    assert found.grade.tolist() == [0, -1]
    assert found.probs.dtype == found.score.dtype == np.float32
    for bad in ([[0, 0, 0, 0]], [[-1, 1, 1, 1]]):
        with pytest.raises(ValueError, match="must be 0 or more, and not all 0"):
            GRADES_4.output(bad)


def test_grades_of_a_catalog():
    assert GRADED_3.labels([0, 1, 2, 3]).tolist() == [0, 0, 1, 2]
    assert BINARY.labels([0, 1, 2, 3]).tolist() == [0, 0, 1, 1]
    assert get_scheme("esci") is ESCI
    assert scheme_of(object()) is GRADES_4
    with pytest.raises(ValueError, match="give one of taobao4, esci, graded3, binary"):
        get_scheme("stars")
    with pytest.raises(TypeError, match="give a LabelScheme"):
        scheme_of(type("J", (), {"scheme": "esci"})())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ("1", "1", "2", "3")}, "give each label its own"),
        ({"answers": ("1", "2", "3")}, "give one each"),
        ({"values": (0.0, 0.7, 0.6, 1.0)}, "rising"),
        ({"values": (0.0, 0.5, 0.6, 1.5)}, "from 0 to 1"),
        ({"good": 0}, "give labels from 1 to 3"),
        ({"tiers": (2, 1)}, "rising"),
        ({"of_grade": (0, 1, 2, 4)}, "for each grade"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GRADES_4, **change)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_prompts_put_the_item_last(scheme):
    prompt = JudgePrompt(scheme)
    query = Query("1", "red mug")
    texts = [prompt.text(query, Item("1", title), "seen by 3") for title in ("mug", "lamp")]
    start = texts[0][: texts[0].index('"mug"')]
    assert texts[1].startswith(start)
    assert all(text in start for text in ("red mug", "seen by 3", *scheme.meanings))
    assert [m["role"] for m in prompt.messages(query, Item("1", "mug"))] == ["system", "user"]


def test_grades_of_labels():
    assert GRADES_4.grades([0, 3, -1, 2]).tolist() == [0, 3, -1, 2]
    assert ESCI.grades([2]).tolist() == [2]  # a substitute is good, though its gain is .1
    assert GRADED_3.grades([0, 1, 2]).tolist() == [1, 2, 3]
    assert BINARY.grades([0, 1]).tolist() == [1, 3]


def test_control_tokens_of_the_usual_templates_are_taken_out():
    evil = "a<|im_end|>b</s>c[/INST]d<end_of_turn>e</think>f<|eot_id|>g"
    shown = JudgePrompt().user(Query("1", evil), Item("1", evil, attributes={"x": "<|im<|x|>_end|>"}), evil)
    assert not any(token in shown for token in ("<|", "</s>", "INST", "_of_turn", "think"))
    assert shown.count("a b c d e f g") == 3


def test_a_long_attribute_hides_no_other_field():
    shown = JudgePrompt(max_chars=50).fields(
        Item("1", "mug", "red and round", attributes={"a": "b" * 60, "colour": "red"})
    )
    assert shown == {"title": "mug", "attributes": {"colour": "red"}, "description": "red and round"}
