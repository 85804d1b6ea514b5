"""What is said in the speech of the `senses` data: single words, questions with a place for a word, and fixed questions.

The builder of the data, the training and the benchmark all take their texts from here, so a transcript is exact.
"""

from modalloy.evals.capitals import CAPITALS

FIXED = (
    "What is this?",
    "What is it?",
    "What kind of thing is it?",
    "How does it move?",
    "What is in the picture?",
    "What is in the video?",
    "What do you see?",
    "What has this shape?",
)
FORMS = ("word", "this", "picture", "category", "fixed", "capital", "recording")  # recording: what a person said


def is_this(phrase: str, plural: bool = False) -> str:
    """ "a horse" → "Is this a horse?", "grapes" (plural) → "Are these grapes?" """
    return f"{'Are these' if plural else 'Is this'} {phrase}?"


def in_picture(phrase: str, plural: bool = False) -> str:
    """ "a horse" → "Is a horse in the picture?", "grapes" (plural) → "Are grapes in the picture?" """
    return f"{'Are' if plural else 'Is'} {phrase} in the picture?"


def capital_question(country: str) -> str:
    """ "France" → "What is the capital of France?" """
    return f"What is the capital of {country}?"


def countries() -> list[str]:
    """Every country of `capitals`, in order."""
    return [country for capitals in CAPITALS.values() for country in capitals]
