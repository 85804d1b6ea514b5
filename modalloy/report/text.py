"""Text that people read on a terminal: what could act there, or hide or turn what stands beside it, is spelled out."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# control and format characters, halves of surrogate pairs, separators of lines; not the two that join letters and emoji
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"
OTHERS = re.compile(r"[^ -~]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every acting character but those in `keep` as an escape: ESC as \u001b, which JSON reads too."""

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep or character in JOINERS or unicodedata.category(character) not in ACTING:
            return character
        number = ord(character)
        return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

    return OTHERS.sub(shown, text)


def printable_lines(lines: Iterable[str]) -> str:
    """The lines as one text; a newline inside one of them, which a stranger's name may hold, is spelled out."""
    return "\n".join(map(printable, lines))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each as lines whose columns begin below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def one_line(text: str, limit: int = 1500) -> str:
    """The text on one printable line of at most `limit` characters, of which the middle is left out first."""
    line = printable(" ".join(text.split()))
    if len(line) <= limit:
        return line
    return f"{line[: limit * 2 // 3]} … {line[len(line) + 3 - limit // 3 :]}"


def is_unicode(text: str) -> bool:
    """Whether every character is one: not so for bytes of an argument that are no UTF-8, and halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
