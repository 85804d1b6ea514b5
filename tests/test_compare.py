"""Paired comparison: exact values, laws, and a slow second opinion on the bootstrap."""

import json
import math
import random
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from fake_run import benchmark, question, write_run

from modalloy import cli
from modalloy.errors import ModalloyError
from modalloy.evals import BENCHMARKS
from modalloy.evals.compare import compare
from modalloy.evals.log import load_run
from modalloy.evals.markdown import comparison
from modalloy.evals.scores import result
from modalloy.evals.statistics import bootstrap_interval, holm, mcnemar


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "fake", benchmark())
    monkeypatch.setattr("os.fsync", lambda file: None)


def answers(right: str) -> list[str]:
    return ["yes" if one == "1" else "no" for one in right]


def test_mcnemar_is_exact() -> None:
    assert mcnemar(0, 0) == mcnemar(1, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == 2 / 32 and mcnemar(0, 6) == 2 / 64
    assert mcnemar(1, 7) == mcnemar(7, 1) == 2 * (1 + 8) / 256
    assert mcnemar(2, 10) == 2 * (1 + 12 + 66) / 4096
    tail = sum(Fraction(math.comb(400, index), 2**400) for index in range(181))
    assert mcnemar(180, 220) == pytest.approx(float(2 * tail), rel=1e-14)
    assert 0.0017 < mcnemar(1950, 2150) < 0.0020  # past what floats can hold as 2**n; normal: z = 3.11


def test_several_tests_raise_p() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.02]) == [0.02]


def slow_bootstrap(values: list[float], clusters: list[tuple[str, ...]], resamples: int) -> tuple[float, float]:
    """Two levels, one value and one draw at a time."""
    rng = random.Random(1)
    tree: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, (value, cluster) in enumerate(zip(values, clusters, strict=True)):
        coarse, *fine = cluster or (str(index),)
        tree[coarse][fine[0] if fine else ""].append(value)
    means = []
    for _ in range(resamples):
        drawn = [tree[name] for name in rng.choices(list(tree), k=len(tree))]
        taken = [v for files in drawn for name in rng.choices(list(files), k=len(files)) for v in files[name]]
        means.append(sum(taken) / len(taken))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples)]


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_bootstrap_agrees_with_a_slow_one(levels: int) -> None:
    rng = random.Random(0)
    clusters = [(f"concept{i % 17 % 11}", f"file{i % 29}")[:levels] for i in range(60)]
    values = [float(rng.choice((-1, 0, 0, 1, 1)) if i % 17 % 11 < 7 else 1) for i in range(60)]
    fast = bootstrap_interval(values, clusters, resamples=6000)
    assert fast == pytest.approx(slow_bootstrap(values, clusters, 800), abs=0.035)
    assert fast == bootstrap_interval(values, clusters, resamples=6000)
    assert bootstrap_interval([0.5] * 60, clusters, resamples=50) == (0.5, 0.5)


def test_copies_of_clusters_tell_nothing_new() -> None:
    values, clusters = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [(name,) for name in "abcdef"]
    assert bootstrap_interval(values * 50, clusters * 50) == bootstrap_interval(values, clusters)
    low, high = bootstrap_interval(values * 50, [()] * 300)
    assert 0.6 < low < high < 0.73


def test_a_run_against_itself_and_swapped(tmp_path: Path) -> None:
    samples = [question(i, cluster=(f"c{i % 7}", f"f{i % 13}")) for i in range(60)]
    rng = random.Random(3)
    a = write_run(tmp_path / "a", samples, [rng.choice(("yes", "no")) for _ in samples])
    b = write_run(tmp_path / "b", samples, [rng.choice(("yes", "yes", "no")) for _ in samples])
    same = compare(a, a).rules["text"]
    assert (same.difference, same.p, same.ci95, same.only_a) == (0, 1, (0, 0), 0) and not same.real
    assert same.verdict == "cannot be told apart: each question is answered rightly by both or by neither"
    there, back = compare(a, b), compare(b, a)
    for rule in ("text", "likelihood"):
        one, other = there.rules[rule], back.rules[rule]
        assert one.difference == -other.difference and one.p == other.p and one.n_clusters == 7
        assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]), abs=1e-12)
        assert (one.only_a, one.only_b) == (other.only_b, other.only_a)
        halves = there.groups[rule]["type"]
        assert sum(half.n for half in halves.values()) == 60
        assert sum(half.only_b for half in halves.values()) == one.only_b
    assert there.rules["text"].difference == pytest.approx(result(b)["acc"] - result(a)["acc"])


def test_verdicts_in_words(tmp_path: Path) -> None:
    samples = [question(i, group={}) for i in range(500)]
    a = write_run(tmp_path / "a", samples, answers("1" * 20 + "0" * 41 + "1" * 439))
    b = write_run(tmp_path / "b", samples, answers("0" * 20 + "1" * 41 + "1" * 439))
    found = compare(a, b).rules["text"]
    assert found.real and found.p == pytest.approx(float(2 * sum(math.comb(61, i) for i in range(21)) / 2**61))
    low, high = found.ci95
    assert (low, high) == pytest.approx((0.012, 0.072), abs=0.005)  # 0.042 ± 1.96 · √(61/500 − 0.042²) / √500
    spread = f"95 % {100 * low:.1f} to {100 * high:.1f}"
    sentence = f"better by 4.2 points ({spread}; McNemar p = 0.010; 41 questions against 20)"
    assert found.verdict == f"B is {sentence}"
    assert compare(b, a).rules["text"].verdict == f"A is {sentence}"
    few = compare(
        write_run(tmp_path / "c", samples[:6], answers("000011")),
        write_run(tmp_path / "d", samples[:6], answers("111100")),
    ).rules["text"]
    assert few.verdict.startswith("cannot be told apart: B − A is +33.3 points (95 % −") and few.p == 2 * 22 / 64


def test_one_cluster_proves_nothing(tmp_path: Path) -> None:
    samples = [question(i, cluster=("dog", f"f{i}")) for i in range(40)]
    a, b = (write_run(tmp_path / name, samples, answers(name * 40)) for name in "01")
    found = compare(a, b).rules["text"]
    assert found.p < 1e-9 and found.ci95 == (-1, 1) and not found.real
    assert result(a)["ci95_clustered"] is None


def test_only_common_questions_count(tmp_path: Path) -> None:
    samples = [question(i) for i in range(10)]
    a = write_run(tmp_path / "a", samples, ["yes"] * 9 + [None])
    b = write_run(tmp_path / "b", samples[:8], ["yes"] * 7 + [None])
    found = compare(a, b)
    assert (found.n, found.left_out, found.unanswered) == (8, (2, 0), (0, 1))
    assert (found.rules["text"].only_a, found.rules["text"].only_b) == (1, 0)
    text = comparison(found)
    assert "- left out: 2 questions that only A was asked" in text and "B could not be asked 1 of them" in text
    other = write_run(tmp_path / "c", samples, ["yes"] * 10, data={"files": {"x": 1}})
    with pytest.raises(ModalloyError, match=r"different data, by the hashes of their files; compare runs of the same$"):
        compare(a, other)
    with pytest.raises(ModalloyError, match="no question in common"):
        compare(a, write_run(tmp_path / "d", [question(i + 50) for i in range(3)], ["yes"] * 3))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [question(i, cluster=(f"c{i % 5}",)) for i in range(20)]
    for name, right in (("a", "01" * 10), ("b", "1" * 20)):
        write_run(tmp_path / name, samples, answers(right))
    printed = []
    for more in ((), ("--json",)):
        monkeypatch.setattr(sys, "argv", ["modalloy", "eval-compare", str(tmp_path / "a"), str(tmp_path / "b"), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (0, None)
        printed.append(capsys.readouterr().out)
    assert "B is better by 50.0 points" in printed[0] and "| type: even | 10 " in printed[0]
    found = json.loads(printed[1])["protocol"]["text"]
    assert found["real"] and found["p"] == 2 / 1024 and found["groups"]["type"]["odd"]["only_b"] == 0
    assert found == compare(load_run(tmp_path / "a"), load_run(tmp_path / "b")).to_dict()["protocol"]["text"]
