"""Messages with media → token ids, owners and preprocessed media. Text is tokenised chunk by chunk between media."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modalloy.errors import MediaError
from modalloy.model.config import ModalloyConfig
from modalloy.names import modality_name

MARK = "\ue000{}\ue001"  # private-use characters stand for a medium while the chat template runs
MARKED = re.compile("\ue000(.*?)\ue001")

Message = dict[str, Any]  # {"role": "user", "content": "text" or a list of parts}; a part is {"type": …, …}


@dataclass
class ModalloyProcessor:
    """Turns chat messages into the inputs of `ModalloyForConditionalGeneration`."""

    tokenizer: Any
    config: ModalloyConfig
    preprocess: dict[str, Callable[[Any], Tensor]]  # by modality, from the encoders

    def apply_chat_template(self, messages: list[Message], *, add_generation_prompt: bool = True) -> dict[str, Any]:
        """Model inputs of one conversation: `input_ids`, `attention_mask`, `owners` (1, tokens), and `media`.

        A content part is {"type": "text", "text": …} or {"type": modality, "path" or modality: medium}.
        """
        media: list[tuple[str, Any]] = []
        ids, owners = self.render(messages, media, add_generation_prompt=add_generation_prompt)
        stacks: dict[str, list[Tensor]] = defaultdict(list)
        for modality, medium in media:
            stacks[modality].append(self.preprocess[modality](medium))
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "owners": torch.tensor([owners]),
            "media": {modality: torch.stack(stack) for modality, stack in stacks.items()},
        }

    def render(
        self, messages: list[Message], media: list[tuple[str, Any]] | None = None, *, add_generation_prompt: bool = True
    ) -> tuple[list[int], list[int]]:
        """Token ids and owners of one conversation; the media found are appended to `media` as (modality, medium)."""
        found = [] if media is None else media
        plain = [{**message, "content": self._flatten(message["content"], found)} for message in messages]
        text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        return self.tokenize(text)

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids and owners of a rendered prompt whose media are marked; a medium's ids are padding."""
        ids: list[int] = []
        owners: list[int] = []
        for index, chunk in enumerate(MARKED.split(text)):
            if index % 2:  # a modality's name
                length = self.config.tokens_per_medium(chunk)
                ids += [self.tokenizer.pad_token_id or 0] * length
                owners += [self.config.owners.index(chunk)] * length
            elif chunk:
                tokens = self.tokenizer.encode(chunk, add_special_tokens=False)
                ids += tokens
                owners += [0] * len(tokens)
        return ids, owners

    def decode(self, ids: Tensor) -> str:
        """The answer's text without special tokens and surrounding space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _flatten(self, content: str | list[dict[str, Any]], media: list[tuple[str, Any]]) -> str:
        if isinstance(content, str):
            return content
        text = ""
        for part in content:
            if part["type"] == "text":
                text += MARKED.sub("", part["text"])
                continue
            modality = modality_name(part["type"])
            if modality not in self.config.modalities:
                able = ", ".join(self.config.modalities) or "text only"
                raise MediaError(f"this model takes no {modality} input; it takes: {able}")
            media.append((modality, part.get("path", part.get(part["type"]))))
            text += MARK.format(modality) + "\n"
        return text
