"""Rules that several benchmarks share: the VQA normaliser, a parser for option letters, and what is built on them."""

import re
from collections import Counter
from collections.abc import Sequence

from modalloy.evals.benchmark import LETTERS, Answer, Sample, Verdict, letter

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# The scorer puts one missing apostrophe back into these words, and into no others.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: found.start()] + word[found.end() :]: word for word in CONTRACTED.split() for found in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the wrong way round in the scorer


def vqa_normalize(text: str) -> str:
    """`text` as the VQA challenge's scorer on EvalAI compares it: "The piano." → "piano", "more than ten" → "more than 10".

    In order: lower case without "," and "?", and "'s" apart; each further punctuation mark dropped if it is next to a space
    anywhere in the text, else made a space; periods (the first 32) that no digit follows dropped; number words to ten as
    digits; articles dropped; one missing apostrophe put back. Faithful to its oddities: "A" becomes "".

    Source: MMF's `EvalAIAnswerProcessor`, which ModelCompose's MUSIC-AVQA score uses.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    marked = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if beside_space else " ")
    marked = re.sub(r"\.(?!\d)", "", marked, count=32)
    words = [DIGITS.get(word, word) for word in marked.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def contained(text: str, phrases: Sequence[str]) -> list[int]:
    """Indices of the phrases that `text` has on word boundaries, once longer ones have taken their words.

    Text and phrases are words separated by single spaces. Empty phrases are never found; of equal phrases, the first is.
    """
    found = []
    rest = f" {text} "
    for index in sorted(range(len(phrases)), key=lambda index: -len(phrases[index])):
        phrase = f" {phrases[index]} "
        if phrases[index] and phrase in rest:
            found.append(index)
            while phrase in rest:  # again, for neighbours share the space between them
                rest = rest.replace(phrase, " | ")
    return sorted(found)


def parse_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` names, by letter or by its text; None where it names none, or several.

    Tried in this order, within the last <answer>…</answer> if there is one: nothing but a letter; an option's text, also
    after "answer is", exactly, then up to case, punctuation and articles; a letter first, with punctuation or the option's
    own text after it ("A dog" has an article); "answer is", "option", "choice" and a letter; the only option whose text is
    contained. A letter beyond the options, or after H, is none. Without `choices`, letters are A to D. Options of equal text
    are the first of them.
    """
    text = text.replace("</s>", "").strip()
    if (tagged := _last_tagged(text)) is not None:
        text = tagged.strip()
    known = LETTERS[: len(choices) or 4]

    if found := re.fullmatch(r"\W*([A-Ha-h])\W*", text):
        return _among(found[1], known)
    # before letters are looked for inside it: "B:maj7" and "A woman" may be options themselves
    introduction = re.search(r"\b(?:answer|option|choice)(?:\s+is)?\b\W*", text, re.IGNORECASE)
    for said in (text, text[introduction.end() :] if introduction else text):
        for form in (str.strip, _plain):
            options = [form(choice) for choice in choices]
            if len(form(said)) > 1 and form(said) in options:
                return letter(options.index(form(said)))
    if found := re.match(r"\W*([A-Ha-h])([).:,*\]]|\s)(.*)", text, re.DOTALL):
        index, rest = LETTERS.index(found[1].upper()), found[3]
        own = index < len(choices) and _plain(choices[index]) == _plain(rest) != ""
        if own or not (found[2] in " \t" or _lists(rest)):
            return _among(found[1], known)
    for introduced in ("answer", "option|choice"):
        pattern = rf"\b(?:{introduced})\W*(?:(is)\b\W*)?([A-H])\b(?!')(.*)"
        named = {
            hit[2].upper()
            for hit in re.finditer(pattern, text, re.IGNORECASE)
            if not _is_article(hit[2], hit[3], after_is=bool(hit[1])) and not _lists(hit[3])
        }
        if len(named) == 1:
            return _among(named.pop(), known)
    hits = contained(_plain(text), [_plain(choice) for choice in choices])
    return letter(hits[0]) if len(hits) == 1 else None


def _last_tagged(text: str) -> str | None:
    """What stands in the last <answer>…</answer>, found in one pass."""
    begin, found = None, None
    for tag in re.finditer(r"<(/?)answer>", text, re.IGNORECASE):
        if not tag[1]:
            begin = tag.end() if begin is None else begin
        elif begin is not None:
            begin, found = None, text[begin : tag.start()]
    return found


def first_letter(sample: Sample, answer: Answer) -> Verdict:
    """ModelCompose's rule for options: the first character is the gold letter, whatever follows. Case counts."""
    first = answer.text[:1]
    return Verdict(first if first and first in LETTERS else None, first in sample.golds)


def robust_letter(sample: Sample, answer: Answer) -> Verdict:
    """Whether the letter that `parse_letter` reads is the gold letter."""
    found = parse_letter(answer.text, sample.choices)
    return Verdict(found, found in sample.golds)


def normalized_match(sample: Sample, answer: Answer) -> Verdict:
    """ModelCompose's rule for open answers: equal to a gold once both went through `vqa_normalize`."""
    found = vqa_normalize(answer.text)
    return Verdict(found or None, bool(found) and found in map(vqa_normalize, sample.golds))


def contains(sample: Sample, answer: Answer) -> Verdict:
    """Whether a gold stands on word boundaries in the answer, both normalised: lenient, for "no" is in "no, yes"."""
    text = vqa_normalize(answer.text)
    golds = [vqa_normalize(gold) for gold in sample.golds]
    hits = contained(text, golds)
    return Verdict(golds[hits[0]] if hits else text or None, bool(hits))


def _among(found: str, known: str) -> str | None:
    return found.upper() if found.upper() in known else None


def _plain(text: str) -> str:
    """Words in lower case, without punctuation and articles."""
    words = re.sub(r"[\W_]+", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ARTICLES)


def _lists(rest: str) -> bool:
    """Whether what follows a letter goes on to another letter: "A, B", "A or B"."""
    return re.match(r"\W*(?:(?:and|or)\W+)?[A-H]\W*(?:$|\b(?:and|or)\b)", rest) is not None


def _is_article(found: str, rest: str, *, after_is: bool) -> bool:
    """Whether the letter is the article of the word after it; a capital within a sentence is none."""
    return (found == "a" or (found == "A" and not after_is)) and re.match(r"\s+[a-z]", rest) is not None


def is_repetitive(text: str, words: int = 4, times: int = 3) -> bool:
    """Whether four words in a row come three times."""
    parts = re.findall(r"\w+", text.lower())
    runs = Counter(tuple(parts[i : i + words]) for i in range(len(parts) - words + 1))
    return max(runs.values(), default=0) >= times
