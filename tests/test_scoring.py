"""The VQA normaliser, the letter parser, and the rules that several benchmarks share."""

import pytest

from modalloy.evals.benchmark import Answer, Sample, Scoring, Verdict
from modalloy.evals.scoring import contained, contains, first_letter, normalized_match, parse_letter, robust_letter
from modalloy.evals.scoring import vqa_normalize as norm

CHOICES = ("fish", "cat", "dog barking", "bird")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("The piano", "piano"),
        ("acoustic_guitar", "acoustic guitar"),
        ("more than ten", "more than 10"),
        ("None", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("10.5", "10.5"),
        ("It's indoor", "it 's indoor"),
        ("dont", "don't"),
        ("A", ""),
        ("No, the", "no"),
        ("two instruments", "2 instruments"),
        ("yes, it is", "yes it is"),
        ("left side", "left side"),
        # oddities of the published scorer that the vectors above do not reach
        ("top-left", "top left"),
        ("top-left -", "topleft"),  # one mark beside a space drops them all
        ("yes\n\tno", "yes no"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("'ows'at", "'ow's'at"),
        (".5 is no. 5", ".5 is no 5"),
        ("." * 40 + "yes", "." * 8 + "yes"),
        ("", ""),
    ],
)
def test_normaliser(text: str, expected: str) -> None:
    assert norm(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. cat", "B"),
        ("B) cat", "B"),
        ("The answer is B.", "B"),
        ("Answer: (c)", "C"),
        ("A dog is barking", None),
        ("cat", "B"),
        ("", None),
        ("E", None),
        ("both A and B", None),
        # letters
        (" **B** ", "B"),
        ("b", "B"),
        ("B</s>", "B"),
        ("B, because it meows", "B"),
        ("B\n\nIt meows, unlike a fish.", "B"),
        ("B cat", "B"),
        ("E. cat", None),
        ("The answer is E", None),
        # several letters
        ("A, B", None),
        ("A and B", None),
        ("A/B", None),
        ("The answer is A or B", None),
        ("A. B flat is played", "A"),
        # within a sentence
        ("It meows.\nThe correct answer is **B**", "B"),
        ("Option A is wrong. The answer is B", "B"),
        ("I choose option D", "D"),
        ("The answer is A because it swims", "A"),
        ("The answer is not B", None),
        ("<think>A or C?</think><answer> B </answer>", "B"),
        ("<answer>C</answer> no, <answer>D</answer>", "D"),
        # the article
        ("A bird", "D"),
        ("A fish", "A"),
        ("The answer is a bird", "D"),
        ("Answer: A dog barking", "C"),
        ("a", "A"),
        # texts of options
        ("The Cat!", "B"),
        ("It is a cat.", "B"),
        ("a cat and a bird", None),
        ("a catfish", None),
    ],
)
def test_letters(text: str, expected: str | None) -> None:
    assert parse_letter(text, CHOICES) == expected


def test_letters_of_other_options() -> None:
    assert parse_letter("E", ("1", "2", "3", "4", "5")) == "E"
    assert parse_letter("C", ("yes", "no")) is None
    assert parse_letter("D", ()) == "D" and parse_letter("E", ()) is None, "options that are not known are A to D"
    assert parse_letter("B minor", ("A major", "B flat", "B minor")) == "C", (
        "a letter that is the option's own first word"
    )
    assert parse_letter("a dog barking", ("dog", "dog barking")) == "B", "a longer option takes the words of a shorter"
    assert parse_letter("It is a dog barking loudly", ("dog", "dog barking")) == "B"
    assert parse_letter("bell", ("horn", "bell", "bell")) == "B", "options of equal text"
    assert parse_letter("nothing", ("dog", "", "!")) is None, "an option without words is found nowhere"
    assert parse_letter("B", ("dog", "", "cat")) == "B", "yet keeps its letter"


def test_phrases_are_found_on_word_boundaries() -> None:
    phrases = ["no", "one", "more than 10", "10", "", "no"]
    assert contained("piano saxophone not", phrases) == []
    assert contained("more than 10 no no", phrases) == [0, 2]
    assert contained("10 more than 10", phrases) == [2, 3]


@pytest.mark.parametrize(
    ("rule", "gold", "text", "verdict"),
    [
        (first_letter, "B", "B", Verdict("B", True)),
        (first_letter, "B", "B. cat", Verdict("B", True)),
        (first_letter, "B", "Because", Verdict("B", True)),
        (first_letter, "B", "b", Verdict(None, False)),
        (first_letter, "B", " B", Verdict(None, False)),  # answers are stripped before they are scored
        (first_letter, "B", "(B)", Verdict(None, False)),
        (first_letter, "B", "The answer is B", Verdict(None, False)),
        (first_letter, "B", "A", Verdict("A", False)),
        (first_letter, "B", "", Verdict(None, False)),
        (robust_letter, "B", "The answer is B", Verdict("B", True)),
        (robust_letter, "B", "(B)", Verdict("B", True)),
        (robust_letter, "B", "bird", Verdict("D", False)),
        (robust_letter, "B", "both A and B", Verdict(None, False)),
        (normalized_match, "acoustic_guitar", "Acoustic guitar.", Verdict("acoustic guitar", True)),
        (normalized_match, "two", "2", Verdict("2", True)),
        (normalized_match, "two", "two instruments", Verdict("2 instruments", False)),
        (normalized_match, "yes", "A", Verdict(None, False)),
        (contains, "no", "piano", Verdict("piano", False)),
        (contains, "one", "saxophone", Verdict("saxophone", False)),
        (contains, "no", "No, it is not.", Verdict("no", True)),
        (contains, "more than ten", "more than 10 drums", Verdict("more than 10", True)),
        (contains, "yes", "", Verdict(None, False)),
    ],
)
def test_rules(rule: Scoring, gold: str, text: str, verdict: Verdict) -> None:
    sample = Sample(id="1", text="?", golds=(gold,), choices=CHOICES if gold == "B" else ())
    assert rule(sample, Answer(text)) == verdict
