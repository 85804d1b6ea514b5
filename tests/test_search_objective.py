"""What a search compares, on tables of answers made by hand: AdaMMS' three criteria, ties, guards, stability."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from modalloy.evals.benchmark import Sample
from modalloy.search.objective import (
    Aggregate,
    Health,
    Table,
    choose,
    compared,
    degenerate,
    divergence,
    health,
    inconsistency,
    log_shares,
    scripts,
    spearman,
    stability,
    totals,
)

# five candidates × four probes; the answers change at different places
ANSWERS = [
    ["a", "x", "p", "1"],
    ["a", "y", "p", "2"],
    ["a", "y", "q", "3"],
    ["b", "y", "q", "3"],
    ["c", "z", "p", "3"],
]
CHANGED = np.array([[a != b for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(ANSWERS)], dtype=float)


def shares(*values: float) -> list[float]:
    return [value / 4 for value in values]


def test_the_three_published_criteria_on_one_table() -> None:
    total, union, one = (inconsistency(CHANGED, variant).mean(1) for variant in ("sum", "union", "one-sided"))
    assert total[1:-1].tolist() == shares(4, 3, 4)  # Algorithm 1 adds both neighbours
    assert union[1:-1].tolist() == shares(3, 3, 3)  # appendix B asks whether either differs
    assert one[1:].tolist() == shares(2, 2, 1, 3)  # the published script looks back only
    for ends in (total[[0, -1]], union[[0, -1]], one[[0]]):
        assert np.isnan(ends).all()
    assert ((union <= total) & (total <= 2 * union))[1:-1].all()


def test_criteria_choose_differently() -> None:
    points = [(index,) for index in range(5)]
    picks = [choose(points, inconsistency(CHANGED, v).mean(1).tolist())[0] for v in ("sum", "union", "one-sided")]
    assert picks == [2, 2, 3]
    assert choose(points, inconsistency(CHANGED, "union").mean(1).tolist()) == (2, [1, 2, 3])


def test_uneven_steps_count_by_their_length() -> None:
    # the same change over a step of three is a third as much as over a step of one
    loss = inconsistency(np.ones((3, 1)), "sum", steps=[1.0, 1.0, 4.0])
    assert loss[1:-1, 0].tolist() == [2 + 2, 2 + 0.5]
    assert inconsistency(CHANGED, "sum", steps=[3.0] * 4)[1:-1] == pytest.approx(inconsistency(CHANGED, "sum")[1:-1])
    assert np.isnan(inconsistency(CHANGED[:1], "sum")).all()


@pytest.mark.parametrize(
    ("losses", "default", "chosen"),
    [
        ([3, 1, 2, 1, 1], None, 3),  # of the widest plateau, the first of two middles
        ([3, 1, 2, 1, 1], 4, 4),  # the default, if it is among the ties
        ([3, 1, 1, 1, 2], 0, 2),  # the middle, if it is not
        ([1, 1, 2, 1, 1], 2, 1),  # of plateaus alike, the place nearest to the default
        ([math.nan, 2, 2, math.nan, 1], None, 4),
    ],
)
def test_ties(losses: list[float], default: int | None, chosen: int) -> None:
    points = [(index,) for index in range(5)]
    assert choose(points, losses, None if default is None else (default,))[0] == chosen


def test_plateaus_of_a_grid() -> None:
    points = [(row, column) for row in range(3) for column in range(3)]
    losses = [1, 9, 9, 9, 1, 1, 9, 1, 1]  # a corner by itself, and a square of four
    assert points[choose(points, losses)[0]] == (1, 1)
    with pytest.raises(ValueError, match="no candidate"):
        choose(points, [math.nan] * 9)


def test_differences_by_degree() -> None:
    changed = np.array([[0.1, 0.9], [0.4, 0.2]])
    assert inconsistency(changed, "sum")[1].tolist() == pytest.approx([0.5, 1.1])
    assert inconsistency(changed, "union")[1].tolist() == [0.4, 0.9]
    assert inconsistency(changed, "one-sided")[1:].tolist() == changed.tolist()


# three candidates × six probes, of which four are pictures
LOSS = np.array([[1.0, 1, 0, 0, 0.2, 0.2], [0, 1, 1, 1, 0.1, 0.1], [0, 0, 0, 1, 0.4, 0.6], [math.nan] * 6])
SENSES = ["image"] * 4 + ["audio"] * 2


def test_groups_count_alike_and_in_their_own_units() -> None:
    def found(aggregate: Aggregate, loss: Table = LOSS) -> list[float]:
        return totals(loss, SENSES, aggregate)[0].tolist()

    assert found("probes")[:3] == pytest.approx([2.4 / 6, 3.2 / 6, 2 / 6])
    image, audio = np.array([0.5, 0.75, 0.25]) / 0.5, np.array([0.2, 0.1, 0.5]) / (0.8 / 3)
    assert found("senses")[:3] == pytest.approx((image + audio) / 2)
    assert found("minimax")[:3] == pytest.approx(np.maximum(image, audio))
    assert all(math.isnan(found(aggregate)[3]) for aggregate in ("probes", "senses", "minimax"))
    scaled = LOSS * np.where(np.array(SENSES) == "audio", 100, 1)  # another unit of one group
    assert found("senses", scaled)[:3] == pytest.approx(found("senses")[:3])
    assert found("minimax", scaled)[:3] == pytest.approx(found("minimax")[:3])
    assert found("senses", LOSS * 0)[:3] == [0, 0, 0]


def test_stability_counts_choices_over_resampled_probes() -> None:
    points = [(0,), (1,)]

    def shares_of(loss: Table, aggregate: Aggregate = "probes", groups: Sequence[str] = ()) -> list[float]:
        return stability(loss, groups, aggregate, lambda losses: choose(points, losses)[0])

    assert shares_of(np.array([[0.0] * 8, [1.0] * 8])) == [1.0, 0.0]
    even = np.array([[0.0, 1.0] * 8, [1.0, 0.0] * 8])
    found = shares_of(even)
    assert sum(found) == 1 and 0.3 < found[1] < 0.5  # ties go to the first
    assert found == shares_of(even)
    # probes that are alike within their group: resampling within groups changes nothing
    parted = np.array([[0.0] * 4 + [1.0] * 4, [1.0] * 4 + [0.5] * 4])
    groups = ["image"] * 4 + ["audio"] * 4
    assert 0.5 < shares_of(parted, "probes", groups)[0] < 1
    assert max(shares_of(parted, "senses", groups)) == max(shares_of(parted, "minimax", groups)) == 1


def test_guards_are_relative_to_the_best_of_parents_and_candidates() -> None:
    fine, silent = Health(0.0, 0.1, 0.0, 0.3, 0.0), Health(0.9, 0.1, 0.0, 0.9, 0.0)
    assert degenerate([fine, silent]) == ["", "90% of its answers are empty; 90% of its answers are the same"]
    wordy = Health(0.0, 1.0, 0.0, 0.3, 0.0)
    assert degenerate([wordy, wordy]) == ["", ""]  # a model that always speaks up to the limit
    assert degenerate([wordy, wordy], [fine]) == ["100% of its answers are over-long"] * 2
    loop = "so it is and so it is and so it is and so it is"
    found = health(["", "Yes", "yes", loop], [False, False, False, True], {"LATIN"})
    assert found == Health(0.25, 0.25, 0.25, 0.5, 0.0)


def test_drift_to_another_script_is_a_guard() -> None:
    known = scripts(["What is this? 1, 2, 3!", "это собака", "犬"])
    assert known == {"LATIN", "CYRILLIC", "CJK"}
    drifted = health(["a dog", "собака", "這是 αβγδ"], [False] * 3, {"LATIN", "CJK"})
    assert drifted.foreign == 10 / 16
    assert health(["", "12 !"], [False] * 2, set()).foreign == 0
    assert degenerate([drifted, health(["a dog", "a cat"], [False] * 2, {"LATIN"})]) == [
        "62% of its letters are of a script that neither the questions nor the specialists use",
        "",
    ]


def test_answers_are_compared_as_asked() -> None:
    open_, closed = Sample("1", "?", ()), Sample("2", "?", (), choices=("a dog", "a cat"))
    assert compared("The dog.", open_, "normalised") == compared("a dog", open_, "normalised") == "dog"
    assert compared("It is a cat.", closed, "normalised") == compared("B", closed, "normalised") == "option B"
    assert compared("Dog", open_, "exact") == "dog" != compared("Dog.", open_, "exact")


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 41]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [3, 2, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_divergence_is_kl_of_what_sums_to_one() -> None:
    own, other = [-1.0, -2.0, -700.0], [-3.0, -2.5, -900.0]
    p, q = (np.exp(one) / np.exp(one).sum() for one in (own[:2], other[:2]))
    wanted = float((p * np.log(p / q)).sum())
    assert divergence(log_shares(own), log_shares(other)) == pytest.approx(wanted, rel=1e-12)
    assert np.exp(log_shares(own)).sum() == pytest.approx(1)
    assert divergence(log_shares(own), log_shares([one - 1000 for one in own])) == pytest.approx(0, abs=1e-12)
    two = divergence(log_shares([*own, *other], 2), log_shares([*other, *other], 2))
    assert two == pytest.approx(wanted / 2, rel=1e-12)  # the mean over places
    assert divergence(log_shares([0.0, -math.inf]), log_shares([0.0, -math.inf])) == 0
