"""Texts of strangers in Markdown and in tables, as the text that they are."""

import re

MARKS = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)|(?<=^)#")  # that Markdown would read; "_" inside a word is text
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute


def markdown_text(text: str) -> str:
    """One line of text whose marks Markdown shows instead of reading them."""
    line = "".join(one if one.isprintable() else " " for one in text)
    return MARKS.sub(lambda mark: f"\\{mark[0]}", line)


def csv_cell(text: str) -> str:
    """Text for a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def markdown_code(text: str) -> str:
    """One line of text as a code span that it cannot leave."""
    line = "".join(one if one.isprintable() else " " for one in text)
    marks = fence(line, least=1)
    return f"{marks} {line} {marks}" if "`" in line else f"`{line}`"


def fence(text: str, least: int = 3) -> str:
    """Marks that begin and end code, which the text itself does not hold."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
