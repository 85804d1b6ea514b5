"""MMLU, OCRBench and MMAU: reading their official formats, prompts, and rules, on small made-up files."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures_text_evals import (
    MMAU,
    MMLU_TEST,
    OCRBENCH,
    mmlu_hub_rows,
    ocrbench_hub_rows,
    write_mmau,
    write_mmlu,
    write_ocrbench,
)

from modalloy.errors import MediaError, ModalloyError
from modalloy.evals import BENCHMARKS, benchmark, mmau, mmlu, ocrbench
from modalloy.evals.benchmark import Answer, Sample, Source
from modalloy.evals.scoring import parse_letter


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, list[dict[str, Any]]], None]:
    """Writes tables of the hub: as Parquet where pyarrow is installed, else in a form that the reader is made to read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        import pickle

        monkeypatch.setattr(benchmark, "parquet_rows", pickle.loads)

        def write(path: Path, rows: list[dict[str, Any]]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(rows))

    else:

        def write(path: Path, rows: list[dict[str, Any]]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    return write


def read(name: str, folder: Path, **options: Any) -> list[Sample]:
    return BENCHMARKS[name].samples(Source(folder, **options))


def edited(path: Path, change: Callable[[list[Any]], Any]) -> None:
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows))


# --- MMLU


def test_mmlu_asks_after_the_first_five_development_questions(tmp_path: Path) -> None:
    samples = read("mmlu", write_mmlu(tmp_path))
    assert [len(rows) for rows in MMLU_TEST.values()] == [4, 3, 2] and len(samples) == 9
    first = next(s for s in samples if s.id == "elementary_mathematics/0")
    assert first.text == (
        "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
        "(elementary_mathematics) What is 1 plus 1?\nA. 2\nB. 3\nC. 1\nD. none of these\nAnswer: A\n\n"
        "What is 2 plus 2?\nA. 4\nB. 5\nC. 2\nD. none of these\nAnswer: A\n\n"
        "What is 3 plus 3?\nA. 6\nB. 7\nC. 3\nD. none of these\nAnswer: A\n\n"
        "What is 4 plus 4?\nA. 8\nB. 9\nC. 4\nD. none of these\nAnswer: A\n\n"
        "What is 5 plus 5?\nA. 10\nB. 11\nC. 5\nD. none of these\nAnswer: A\n\n"
        "What is 7 times 6?\nA. 36\nB. 42\nC. 48\nD. 54\nAnswer:"
    )
    assert first.plain and first.options == (" A", " B", " C", " D") and first.golds == ("B",) and not first.media
    assert first.group == {"category": "STEM", "subject": "elementary_mathematics"}
    quoted = next(s for s in samples if s.id == "elementary_mathematics/3")
    assert '\n\nTom says, "3, 2, 1".\nWhich number comes next?\nA. 4' in quoted.text


def test_mmlu_categories_are_the_official_ones() -> None:
    assert Counter(mmlu.CATEGORY.values()) == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert mmlu.CATEGORY["anatomy"] == "other"  # lm-eval says STEM


def test_mmlu_of_the_hub_is_the_same(tmp_path: Path, parquet: Callable[..., None]) -> None:
    for split in ("test", "dev"):
        parquet(tmp_path / f"hub/all/{split}-00000-of-00001.parquet", mmlu_hub_rows(split))
    for name in ("mmlu", "mmlu_generative"):
        hub = read(name, tmp_path / "hub")
        assert {s.id: s for s in hub} == {s.id: s for s in read(name, write_mmlu(tmp_path / "csv"))}
    source = Source(tmp_path / "hub")
    mmlu.samples(source)
    assert {name: facts["rows"] for name, facts in source.read.items()} == {
        "all/dev-00000-of-00001.parquet": 18,
        "all/test-00000-of-00001.parquet": 9,
    }


def test_mmlu_generative_asks_the_question_alone(tmp_path: Path) -> None:
    sample = read("mmlu_generative", write_mmlu(tmp_path))[0]
    assert sample.text == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which bone is in the arm?\nA. femur\nB. skull\nC. humerus\nD. tibia\nAnswer:"
    )
    assert not sample.plain and not sample.options
    rules = BENCHMARKS["mmlu_generative"].rules
    said = {
        "C": (1, 1),
        "c.": (1, 1),
        "(C)\nbecause": (1, 1),
        "The answer is C.": (1, 0),
        "humerus": (1, 0),
        "": (0, 0),
    }
    for text, expected in said.items():
        assert tuple(rules[name](sample, Answer(text)).correct for name in ("robust", "exact")) == expected, text
    assert rules["robust"](sample, Answer("both A and C")).prediction is None


def test_mmlu_takes_the_likeliest_letter(tmp_path: Path) -> None:
    sample = read("mmlu", write_mmlu(tmp_path))[0]  # gold C
    assert mmlu.likelihood(sample, Answer(likelihoods=(-3.0, -2.0, -1.0, -4.0))).correct
    verdict = mmlu.likelihood(sample, Answer(likelihoods=(-9.0, -1.0, -1.0, -4.0)))
    assert verdict.prediction == "B" and not verdict.correct


def test_mmlu_refuses_files_of_another_form(tmp_path: Path, parquet: Callable[..., None]) -> None:
    write_mmlu(tmp_path)
    path = tmp_path / "test" / "anatomy_test.csv"
    good = path.read_text()
    for bad, message in {
        "Which?,a,b,c\n": r"anatomy_test.csv: row 0 has a field of another form \(2 options and the answer 'c'\)",
        "Which?,a,b,c,d,E\n": r"row 0 has a field of another form \(4 options and the answer 'E'\)",
        "\n": r"row 0 has a field of another form",
    }.items():
        path.write_text(bad)
        with pytest.raises(MediaError, match=message):
            read("mmlu", tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MediaError, match=r"anatomy_test.csv: cannot be read \(.*\); download it again"):
        read("mmlu", tmp_path)
    path.write_text(good)
    (tmp_path / "dev/anatomy_dev.csv").write_text("Q,a,b,c,d,A\n")
    with pytest.raises(MediaError, match="has 1 development questions on anatomy, not 5; give the dev files too"):
        read("mmlu", tmp_path)
    assert len(read("mmlu_generative", tmp_path)) == 9  # needs none
    (tmp_path / "dev/anatomy_dev.csv").unlink()
    with pytest.raises(MediaError, match=r"holds none of dev/anatomy_dev\.csv"):
        read("mmlu", tmp_path)
    path.rename(path.with_name("phrenology_test.csv"))
    with pytest.raises(MediaError, match="'phrenology' is no subject of MMLU"):
        read("mmlu_generative", tmp_path)
    parquet(tmp_path / "all/test-00000-of-00001.parquet", [mmlu_hub_rows("test")[0] | {"answer": -1}])
    with pytest.raises(ModalloyError, match="several variants of mmlu; choose one with --variant: csv, hub"):
        read("mmlu", tmp_path)
    with pytest.raises(
        MediaError, match=r"test-00000-of-00001.parquet: row 0 has a field of another form \(-1 is not in"
    ):
        read("mmlu_generative", tmp_path, variant="hub")
    with pytest.raises(MediaError, match=r"holds no file of mmlu \(csv or hub\)"):
        read("mmlu", tmp_path / "dev")


def test_a_table_without_its_reader_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "all").mkdir()
    (tmp_path / "all/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ModalloyError, match=r"^Parquet files are read by pyarrow, which is missing; run `pip install pyarrow`$"
    ):
        read("mmlu_generative", tmp_path)


def test_rows_end_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("one\u2028two,b\nthree,d\r\n", newline="")
    (tmp_path / "a.jsonl").write_text('{"q": "one\u2028two\x85"}\n\n{"q": "b"}\n', encoding="utf-8")
    assert Source(tmp_path).rows(tmp_path / "a.csv") == [["one\u2028two", "b"], ["three", "d"]]
    assert Source(tmp_path).rows(tmp_path / "a.jsonl") == [{"q": "one\u2028two\x85"}, {"q": "b"}]
    (tmp_path / "a.csv").write_text('"' + "x" * 200_000)
    with pytest.raises(MediaError, match="field larger than field limit"):
        Source(tmp_path).rows(tmp_path / "a.csv")


# --- OCRBench


def test_ocrbench_reads_the_repository_and_the_hub(tmp_path: Path, parquet: Callable[..., None]) -> None:
    own = read("ocrbench", write_ocrbench(tmp_path / "repo"))
    parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", ocrbench_hub_rows())
    hub = read("ocrbench", tmp_path / "hub")
    assert len(own) == len(hub) == len(OCRBENCH)
    for ours, theirs in zip(own, hub, strict=True):
        assert (ours.text, ours.golds, ours.group, ours.id) == (theirs.text, theirs.golds, theirs.group, theirs.id)
        assert [Path(path).is_file() for _, path in (*ours.media, *theirs.media)] == [True, True]
        assert ours.media[0][0] == theirs.media[0][0] == "image"
    assert Path(own[0].media[0][1]).read_bytes() == Path(hub[0].media[0][1]).read_bytes()
    assert len({sample.media for sample in own}) == 10 and len({sample.media for sample in hub}) == 9
    assert read("ocrbench", tmp_path / "hub") == hub  # unpacked once
    assert own[1].golds == ("Lou's", "LOUS") and own[7].text == "Who signed it?"
    assert Counter(sample.group["area"] for sample in own) == {
        "Text Recognition": 6,
        "Scene Text-centric VQA": 1,
        "Doc-oriented VQA": 1,
        "Key Information Extraction": 1,
        "Handwritten Mathematical Expression Recognition": 1,
    }
    assert not read("ocrbench", tmp_path / "repo", modalities=("text",))[0].media


def test_ocrbench_finds_pictures_where_the_user_says(tmp_path: Path) -> None:
    write_ocrbench(tmp_path / "OCRBench" / "OCRBench")
    elsewhere = tmp_path / "elsewhere"
    for roots in ({"": elsewhere}, {"image": elsewhere}):
        samples = read("ocrbench", tmp_path / "OCRBench", roots=roots)
        assert samples[0].media == (("image", str(elsewhere / "IIIT5K" / "img_0.png")),)
    assert read("ocrbench", tmp_path / "OCRBench", roots={"iam": elsewhere})[3].media[0][1] == str(
        elsewhere / "img_3.png"
    )


def test_ocrbench_with_the_prompt_of_llava(tmp_path: Path) -> None:
    for bare, llava in zip(read("ocrbench", write_ocrbench(tmp_path)), read("ocrbench_llava", tmp_path), strict=True):
        assert llava.text == f"{bare.text}\nAnswer the question using a single word or phrase."
        assert llava.golds == bare.golds


@pytest.mark.parametrize(
    ("index", "text", "correct"),
    [
        (0, "EXIT", True),
        (0, "the sign says exit.", True),
        (0, "EX IT", False),
        (0, "", False),
        (1, "LOUS", True),
        (1, "lou's diner", True),
        (1, "Lou s", False),
        (2, "Merry\nXmas", True),  # a line end is a space
        (2, "Merry  Xmas", False),
        (6, "no parking", True),  # the golds' own line ends do not count
        (6, "parking", True),
        (9, "x^2+Y", True),
        (9, "$x ^ 2\n+ Y$", True),
        (9, "x^{2}+Y", True),
        (9, "x^2+y", False),  # of formulas, case counts
    ],
)
def test_ocrbench_is_scored_as_its_script_does(tmp_path: Path, index: int, text: str, correct: bool) -> None:
    samples = read("ocrbench", write_ocrbench(tmp_path))
    for _ in range(2):  # nothing is kept between scorings
        verdict = ocrbench.official(samples[index], Answer(text))
        assert verdict.correct is correct and verdict.prediction == (text or None)


def test_ocrbench_refuses_rows_of_another_form(tmp_path: Path) -> None:
    path = write_ocrbench(tmp_path) / "OCRBench.json"
    good = path.read_text()
    for change, message in {
        lambda rows: rows[2].pop("answers"): r"OCRBench.json: row 2 lacks 'answers'; give the benchmark's own file",
        lambda rows: rows[2].update(answers=[]): r"row 2 has a field of another form \(the answers \[\]\)",
        lambda rows: rows[2].update(answers=[" "]): r"row 2 has a field of another form \(the answers \[' '\]\)",
        lambda rows: rows[2].update(answers=7): "row 2 has a field of another form",
        lambda rows: rows[2].update(type="Poetry"): r"row 2 has a field of another form \(the type 'Poetry'\)",
    }.items():
        edited(path, lambda rows, change=change: change(rows) and None)
        with pytest.raises(MediaError, match=message):
            read("ocrbench", tmp_path)
        path.write_text(good)
    path.write_text(good[:-10])
    with pytest.raises(MediaError, match=r"OCRBench\.json: cannot be read"):
        read("ocrbench", tmp_path)


def test_pictures_that_cannot_be_unpacked_are_one_line(tmp_path: Path, parquet: Callable[..., None]) -> None:
    parquet(tmp_path / "data/test-00000-of-00001.parquet", ocrbench_hub_rows())
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(
        MediaError, match=r"images: the table's pictures cannot be unpacked there \(.*\); copy the data to"
    ):
        read("ocrbench", tmp_path)


# --- MMAU


@pytest.fixture
def sounds(tmp_path: Path) -> list[Sample]:
    return read("mmau_mini", write_mmau(tmp_path))


def test_mmau_letters_its_options(tmp_path: Path, sounds: list[Sample]) -> None:
    assert sounds[1].text == (
        "Is it indoors?\nA. yes\nB. no\nAnswer with the option's letter from the given choices directly."
    )
    assert sounds[6].text.splitlines()[-2] == "H. h" and len(sounds) == len(MMAU)
    assert sounds[7].text.startswith("How many words are stressed?\nA. four\n")
    assert sounds[0].media == (("audio", str(tmp_path / f"test-mini-audios/{sounds[0].id}.wav")),)
    assert Path(sounds[0].media[0][1]).is_file()
    assert sounds[0].group == {"task": "sound", "difficulty": "easy", "sub-category": "Instrumentation"}
    elsewhere = read("mmau_mini", tmp_path, roots={"test-mini-audios": tmp_path / "wav"})
    assert elsewhere[0].media == (("audio", str(tmp_path / "wav" / f"{sounds[0].id}.wav")),)


def test_mmau_takes_every_way_to_name_the_right_option(sounds: list[Sample]) -> None:
    """On the 1,000 real questions: letters 1000 (published: 2), texts 997 (1000; three options are letters themselves)."""
    for sample in sounds:
        gold = sample.golds[0]
        name = benchmark.letter(sample.choices.index(gold))
        said = [name, f"({name})", f"{name}.", f"{name}. {gold}", f"({name}) {gold}", f"The answer is {name}."]
        said += [gold, f"The answer is {gold}.", f"<answer>{gold}</answer>"]
        for text in said:
            verdict = mmau.official(sample, Answer(text))
            assert verdict.correct and verdict.prediction == gold, (text, sample)
        assert mmau.published(sample, Answer(gold)).correct
        for text in ("", "Z", "I cannot tell."):
            verdict = mmau.official(sample, Answer(text))
            assert not verdict.correct and verdict.prediction is None, (text, sample)


def test_mmau_letters_are_lost_on_the_published_rule(sounds: list[Sample]) -> None:
    right = [mmau.published(s, Answer(benchmark.letter(s.choices.index(s.golds[0])))).correct for s in sounds]
    assert not any(right)
    first = [mmau.official(s, Answer("A")).correct for s in sounds]
    assert first == [s.choices[0] in s.golds for s in sounds]


@pytest.mark.parametrize(
    ("gold", "said", "choices", "correct"),
    [
        ("dog bark", "a dog, with a bark", ["dog bark", "cat"], True),
        ("dog bark", "dog", ["dog bark", "cat"], False),  # not all of its words
        ("dog bark", "dog bark or cat", ["dog bark", "cat"], False),  # a word of a wrong option
        ("man", "old man", ["man", "old man"], False),
        ("man", "(A) man", ["man", "a woman"], False),  # "a" is a wrong option's word
        ("man", "man", ["man", "a woman"], True),
        ("fourteen", "fourteen", ["four", "fourteen", "fourteen"], True),
        ("old man", "man, old", ["old man", "man old", "child"], True),  # word bags collide
        ("yes", "", ["yes", "no"], False),
    ],
)
def test_mmau_matches_bags_of_words(gold: str, said: str, choices: list[str], correct: bool) -> None:
    assert mmau.string_match(gold, said, choices) is correct


def test_mmau_of_two_five_and_eight_options(sounds: list[Sample]) -> None:
    assert [len(sample.choices) for sample in sounds] == [4, 2, 4, 4, 4, 5, 8, 4, 4, 4]
    assert mmau.official(sounds[5], Answer("E")).correct and mmau.official(sounds[6], Answer("(G)")).correct
    assert mmau.official(sounds[1], Answer("C")).prediction is None  # beyond the options
    for name in "CD":  # both say "fourteen"
        assert mmau.official(sounds[7], Answer(name)).correct
    assert mmau.official(sounds[8], Answer("B")).correct and not mmau.official(sounds[8], Answer("C")).correct


def test_letters_inside_options_are_not_letters() -> None:
    keys, people = ["C major", "A minor", "B:maj7/1", "D"], ["a child", "A woman", "an adult man", "A teenager"]
    assert parse_letter("A minor", keys) == "B" and parse_letter("B:maj7/1", keys) == "C"
    assert parse_letter("The answer is C major.", keys) == "A" and parse_letter("D", keys) == "D"
    assert parse_letter("I think the answer is A woman.", people) == "B" and parse_letter("A teenager", people) == "D"
    assert parse_letter("The answer is A", people) == "A" and parse_letter("A. a child", people) == "A"


def test_mmau_refuses_rows_of_another_form(tmp_path: Path, sounds: list[Sample]) -> None:
    path = tmp_path / "mmau-test-mini.json"
    good = path.read_text()
    for change, message in {
        lambda rows: rows[3].pop(
            "audio_id"
        ): "mmau-test-mini.json: row 3 lacks 'audio_id'; give the benchmark's own file",
        lambda rows: rows[3].update(
            answer="B flat"
        ): r"row 3 has a field of another form \(the answer 'B flat' is none of",
        lambda rows: rows[3].update(choices=None): "row 3 has a field of another form",
        lambda rows: rows[3].update(
            choices=[str(n) for n in range(9)], answer="0"
        ): "row 3 has a field of another form",
    }.items():
        edited(path, lambda rows, change=change: change(rows) and None)
        with pytest.raises(MediaError, match=message):
            read("mmau_mini", tmp_path)
        path.write_text(good)
    with pytest.raises(MediaError, match=r"holds none of mmau-test-mini\.json; give the benchmark's files with --data"):
        read("mmau_mini", tmp_path / "test-mini-audios")


def test_more_options_than_letters_that_are_read_may_be_named_in_words() -> None:
    """A probe may have twelve choices: the ninth is told by its text, and "I" is a word."""
    twelve = [
        f"a {name}" for name in ["cat", "dog", "cow", "pig", "owl", "bee", "fox", "hen", "ant", "bat", "elk", "emu"]
    ]
    assert parse_letter("an ant", twelve) == "I" and parse_letter("a emu.", twelve) == "L"
    assert parse_letter("I", twelve) is None and parse_letter("I think it is a hen.", twelve) == "H"
