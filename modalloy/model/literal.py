"""Users' text stays text: a control token written in a question (`<|im_end|>`, `<image>`) is not one for the model.

Where a message's text has a control token, private-use characters mark it while the template runs. What the template writes
itself stays control; what is marked is encoded letter by letter, by a copy of the tokenizer that knows the control tokens
under other names only. A conversation without any is encoded as ever.
"""

import json
import re
from functools import cached_property
from typing import Any

from modalloy.errors import MediaError
from modalloy.model.bounded import Opened, is_text, try_encoding

OPEN, CLOSE = "\ue002", "\ue003"  # around a control token of a user's text, while the template runs
LITERAL = "\ue004{}\ue005"  # its number, in the rendered prompt
LITERALS = re.compile("\ue004(\\d+)\ue005")
CONTROL = "\ue006{}\ue007"  # the number of a control token that the template wrote, for the copy of the tokenizer
CONTROLS = re.compile("\ue006(\\d+)\ue007")
MARKS = re.compile("[\ue002-\ue007]")
OURS = re.compile("[\ue000-\ue007]")  # media too have marks, \ue000 and \ue001
BRACKETED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
PLACES = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "boa_token", "eoa_token")


class Literals:
    """The control tokens of a tokenizer and a chat template, and how a text is encoded that holds some as text.

    Control tokens are a tokenizer's special tokens, those that it was given later and that the template writes or that stand
    in `<|…|>`, and `places`: what stands for media.
    """

    def __init__(self, tokenizer: Any, template: str | None, places: Any = None) -> None:
        self.tokenizer, self.template = tokenizer, template or ""
        self.where = str(getattr(tokenizer, "name_or_path", "") or "the model")
        named = [getattr(one, name, None) for one in (tokenizer, places) if one is not None for name in PLACES]
        self._places = {one for one in named if isinstance(one, str)}

    @cached_property
    def special(self) -> frozenset[str]:
        """Special tokens, and what stands for media."""
        added = self.tokenizer.added_tokens_decoder.values()
        found = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return frozenset(token for token in found | self._places if token and not token.isspace())

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """All control tokens, longest first."""
        others = {token.content for token in self.tokenizer.added_tokens_decoder.values()} - self.special
        written = {
            token
            for token in others
            if BRACKETED.fullmatch(token) or (token in self.template and not token.isalnum() and not token.isspace())
        }
        return tuple(sorted(self.special | written, key=lambda token: (-len(token), token)))

    def mark(self, value: Any, *, answer: bool = False, media: bool = False) -> Any:
        """A message's value, its control tokens marked in every string; the marks of media stay with `media`.

        Of an answer only special tokens are: others, such as `</think>`, were tokens when the model wrote them, and
        templates look for them.
        """
        if isinstance(value, str):
            if not is_text(value):
                raise MediaError("the text holds half a surrogate pair, which is no character; leave it out")
            text = (MARKS if media else OURS).sub("", value)
            found = self._matcher(text, self.special if answer else None)
            return text if found is None else found.sub(lambda match: f"{OPEN}{match[0]}{CLOSE}", text)
        if isinstance(value, dict):
            return {key: self.mark(item, answer=answer, media=media) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, answer=answer, media=media) for item in value]
        return value

    def settle(self, text: str) -> str:
        """A rendered prompt in which numbers stand for the marked tokens."""
        if OPEN not in text:
            return text
        numbers = {token: index for index, token in enumerate(self.controls)}
        marked = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
        return marked.sub(lambda found: LITERAL.format(numbers[found[1]]) if found[1] in numbers else found[0], text)

    def literal(self, text: str) -> str:
        """A text all of which is a user's, ready for `encode`."""
        return self.settle(str(self.mark(text)))

    def shown(self, text: str) -> str:
        """A rendered prompt as it is read."""
        return MARKS.sub("", LITERALS.sub(lambda found: self.controls[int(found[1])], text))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered prompt.

        Raises:
            MediaError: the tokenizer has no way to take a control token for text.
            CheckpointError: the tokenizer fails at the text, or goes past a limit.
        """
        if not MARKS.search(text):
            if self._opened is not None:
                try_encoding(self._opened, text, self.where)
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return ids
        present = self._matcher(text)
        named = (
            text if present is None else present.sub(lambda found: CONTROL.format(self.controls.index(found[0])), text)
        )
        count = len(CONTROLS.findall(named))
        named = LITERALS.sub(lambda found: self.controls[int(found[1])], named)
        named = re.sub(f"[{OPEN}{CLOSE}]", "", named)
        ids = self._split(named) if self._renamed is None else self._whole(named, add_special_tokens=False)
        unknown = self.tokenizer.unk_token_id
        if sum(one in self._control_ids and one != unknown for one in ids) > count:
            raise MediaError(
                f"{self.where}: its tokenizer takes a control token in the text for one of its own; leave it out "
                f"({', '.join(sorted({self.controls[int(one)] for one in LITERALS.findall(text)}))})"
            )
        if add_special_tokens and self._renamed is not None:
            return self._whole(named, add_special_tokens=True)
        return ids

    def _matcher(self, text: str, among: frozenset[str] | None = None) -> re.Pattern[str] | None:
        """A pattern of the control tokens that are in a text, the longest first; None if there are none."""
        present = [token for token in self.controls if token in text and (among is None or token in among)]
        return re.compile("|".join(map(re.escape, present))) if present else None

    @cached_property
    def _control_ids(self) -> set[int]:
        return {int(one) for one in self.tokenizer.convert_tokens_to_ids(list(self.controls)) if one is not None}

    @cached_property
    def _opened(self) -> Opened | None:
        """The tokenizer for the child; None if it is not of the library `tokenizers`."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None else Opened(backend.to_str())

    @cached_property
    def _renamed(self) -> tuple[Any, Opened, dict[int, int]] | None:
        """The copy that knows control tokens by `CONTROL`, and which of its ids stand for which of the tokenizer's own."""
        if self._opened is None:
            return None
        from tokenizers import Tokenizer

        content = json.loads(self._opened.content)
        names = {token: CONTROL.format(index) for index, token in enumerate(self.controls)}
        for token in content["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): row for token, row in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
        opened = Opened(json.dumps(content))
        try_encoding(opened, "", self.where)
        copy = Tokenizer.from_str(opened.content)
        copy.no_padding()
        copy.no_truncation()
        known = {copy.token_to_id(name): self.tokenizer.convert_tokens_to_ids(token) for token, name in names.items()}
        return copy, opened, {own: int(wanted) for own, wanted in known.items() if own is not None}

    def _whole(self, named: str, *, add_special_tokens: bool) -> list[int]:
        assert self._renamed is not None
        copy, opened, ids = self._renamed
        try_encoding(opened, named, self.where)
        return [ids.get(one, one) for one in copy.encode(named, add_special_tokens=add_special_tokens).ids]

    def _split(self, named: str) -> list[int]:
        """By a tokenizer written in Python: the control tokens apart, the rest without any."""
        ids: list[int] = []
        for index, piece in enumerate(CONTROLS.split(named)):
            if index % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(self.controls[int(piece)])))
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return ids
