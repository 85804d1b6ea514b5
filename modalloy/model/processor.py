"""Messages with media → token ids, owners and preprocessed media. Text is tokenised chunk by chunk between media."""

import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from modalloy.errors import CheckpointError, MediaError
from modalloy.model.config import owner_names, tokens_per_medium
from modalloy.model.literal import Literals
from modalloy.model.preparing import Preparer
from modalloy.model.rendering import Message, chosen_template, rendered_by
from modalloy.names import modality_name
from modalloy.outputs.omni import processor_config, write_remote_code
from modalloy.senses.encoders import Encoder, build
from modalloy.senses.native import Prepared
from modalloy.storage.locate import locate

MARK = "\ue000{}\ue001"  # private-use characters stand for a medium while the chat template runs
MARKED = re.compile("\ue000(.*?)\ue001")
BRACKETS = re.compile("[\ue000\ue001\ue008]")  # taken out of a user's text: halves of a mark could meet in the prompt
PLACEHOLDER = re.compile(r"<(\w+)>")

Conversation = list[Message]


class ModalloyProcessor(ProcessorMixin):
    """Turns chat messages into the inputs of `ModalloyForConditionalGeneration`.

    Args:
        tokenizer: the decoder's.
        modalities: as in `ModalloyConfig`.
        labels: write a medium's modality before it ("image: "), as ModelCompose's prompts do, unless it stands inside text.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        modalities: dict[str, dict[str, Any]] | None = None,
        labels: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.modalities = modalities or {}
        self.labels = labels
        self.places: dict[str, Path] = {}  # of what prepares native media, where that is not beside the tokenizer
        self._literals: dict[str | None, Literals] = {}
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders without weights, for `preprocess`."""
        chosen = {modality: sizes["encoder"] for modality, sizes in self.modalities.items() if "native" not in sizes}
        return {
            modality: build(encoder["name"], encoder["settings"], meta=True) for modality, encoder in chosen.items()
        }

    @cached_property
    def preparers(self) -> dict[str, Preparer]:
        """What prepares the media of native modalities."""
        native = [modality for modality, sizes in self.modalities.items() if "native" in sizes]
        folder = locate(self.where, whole=True) if native and not self.places else Path()
        return {
            modality: Preparer(
                self.places.get(modality, folder / "senses" / sizes["native"].get("like", modality)),
                self.modality_of(modality),
                sizes["native"].get("frame"),
            )
            for modality, sizes in self.modalities.items()
            if "native" in sizes
        }

    @property
    def able(self) -> tuple[str, ...]:
        """The modalities that a medium can be of."""
        return tuple(name for name, sizes in self.modalities.items() if "of" not in sizes)

    def modality_of(self, sense: str) -> str:
        """The modality of a sense, of which there may be several."""
        return str(self.modalities[sense].get("of", sense))

    def senses_of(self, modality: str) -> list[str]:
        """The senses that a medium of a modality is shown to, side by side."""
        return [name for name in self.modalities if self.modality_of(name) == modality]

    def prepare(self, modality: str, media: Sequence[Any]) -> list[Prepared]:
        """A conversation's media of a native modality, all together."""
        return self.preparers[modality].prepare(media)

    @property
    def owners(self) -> tuple[str, ...]:
        """Names that an owner index stands for, as in `ModalloyConfig`."""
        return owner_names(self.modalities)

    def apply_chat_template(
        self,
        conversation: Conversation | list[Conversation],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> Any:
        """The prompt of one conversation or of several; with `tokenize`, all inputs of the model as a BatchFeature.

        A content part is {"type": "text", "text": …} or {"type": modality, "path" or modality: medium}, in any number and
        order; modalities have aliases (`vision`, `point_cloud`). A medium has a line of its own, or stands inside the text
        around it with `"inline": True`. Control tokens and placeholders (`<image>`) in a message's text are text. Several
        conversations are padded on the left.

        Raises:
            MediaError: a medium cannot be read, or is of a modality that the model lacks.
            CheckpointError: there is no chat template, or it refuses the conversation, is damaged, or goes past a limit.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors='{return_tensors}': only PyTorch tensors ('pt') are made")
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations: list[Any] = list(conversation) if batched else [conversation]
        media: list[tuple[str, Any]] = []
        texts = [
            self._rendered(messages, media, chat_template or self.chat_template, add_generation_prompt, kwargs)
            for messages in conversations
        ]
        if not tokenize:
            shown = [self.shown(text) for text in texts]
            return shown if batched else shown[0]
        inputs = self._inputs(texts, media)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        point_clouds: Any = None,
        media: dict[str, Any] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of rendered prompts in which placeholders stand for the media, in reading order over the batch.

        `media` takes further modalities by name. Each medium is a file or an object in memory.
        """
        if return_tensors != "pt" or kwargs:
            raise ValueError(f"only return_tensors='pt' is made, and there are no options {', '.join(kwargs) or '…'}")
        texts = [text] if isinstance(text, str) else list(text)
        given = {"image": images, "video": videos, "audio": audio, "point": point_clouds} | (media or {})
        queues = {name: _listed(found) for name, found in given.items() if found is not None}
        marked, used = zip(*(self._placed(one, queues) for one in texts), strict=True)
        for name, left in queues.items():
            if left:
                raise MediaError(
                    f"{len(left)} more {name} media are given than the text has <{name}>; add placeholders"
                )
        return self._inputs(list(marked), [medium for found in used for medium in found])

    def tokenize(self, text: str, lengths: Mapping[str, Sequence[int]] | None = None) -> tuple[list[int], list[int]]:
        """Token ids and owners of a rendered prompt whose media are marked; a medium's ids are padding.

        `lengths`: how many tokens each medium of a native modality becomes, in reading order.

        Each chunk of text between media is tokenised by itself, as ModelCompose does; a first token that the tokenizer
        puts before every text stands before the first chunk only.
        """
        ids: list[int] = []
        owners: list[int] = []
        left = {modality: iter(given) for modality, given in (lengths or {}).items()}
        for index, chunk in enumerate(MARKED.split(text)):
            if index % 2:  # a modality's name
                length = next(left[chunk]) if chunk in left else tokens_per_medium(self.modalities[chunk])
                ids += [self.padding_id] * length
                owners += [self.owners.index(chunk)] * length
                continue
            bos = self.tokenizer.bos_token or ""
            tokens: list[int] = []
            if index == 0 and bos and chunk.startswith(bos):
                # apart from what follows: sentencepiece tokenizers see the start of a text there
                tokens, chunk = [self.tokenizer.bos_token_id], chunk.removeprefix(bos)
            if chunk.startswith(" ") and self._swallows_a_space:
                chunk = " " + chunk
            if chunk:
                tokens += self.literals().encode(chunk)
            ids += tokens
            owners += [0] * len(tokens)
        return ids, owners

    def render(
        self, messages: Conversation, media: list[tuple[str, Any]] | None = None, *, add_generation_prompt: bool = True
    ) -> tuple[list[int], list[int]]:
        """Token ids and owners of one conversation; the media found are appended to `media` as (modality, medium)."""
        return self.tokenize(self.rendered(messages, media, add_generation_prompt=add_generation_prompt))

    def rendered(
        self, messages: Conversation, media: list[tuple[str, Any]] | None = None, *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt of one conversation with marks, for `tokenize`; the media found are appended to `media`."""
        found: list[tuple[str, Any]] = [] if media is None else media
        return self._rendered(messages, found, self.chat_template, add_generation_prompt, {})

    def shown(self, text: str) -> str:
        """A prompt with placeholders in the place of its marks, as it is read."""
        return self.literals().shown(MARKED.sub(lambda mark: f"<{mark[1]}>", text))

    def literals(self, template: str | None = None) -> Literals:
        """What keeps users' text text, with this chat template or the processor's own."""
        template = self.chat_template if template is None else template
        if template not in self._literals:
            self._literals[template] = Literals(self.tokenizer, template)
        return self._literals[template]

    def preprocess(self, modality: str, medium: Any) -> Any:
        """What the modality's encoder takes of one medium, a file or an object in memory; of a native one, the medium read."""
        if modality in self.preparers:
            return self.preparers[modality].read(medium)
        return self.encoders[modality].preprocess(medium)

    def answer(self, ids: Tensor) -> str:
        """The answer's text without special tokens and surrounding space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the tokenizer and what `from_pretrained` needs besides."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        for modality, one in self.preparers.items():
            target = Path(save_directory) / "senses" / self.modalities[modality]["native"].get("like", modality)
            if one.folder.resolve() != target.resolve():
                shutil.copytree(one.folder, target, dirs_exist_ok=True)
        write_remote_code(Path(save_directory))
        return saved

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds."""
        return processor_config(self.modalities, self.labels)

    @cached_property
    def _swallows_a_space(self) -> bool:
        """Whether the tokenizer takes a text's first space for the one that sentencepiece puts before every text.

        Sentencepiece itself, which ModelCompose tokenises chunks with, puts its own before that space.
        """
        with_space, without = (self.tokenizer.encode(text, add_special_tokens=False) for text in (" a", "a"))
        return bool(with_space == without)

    @property
    def padding_id(self) -> int:
        """Id at positions that hold no text."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "owners", "media"]

    def pad(self, rows: Sequence[tuple[list[int], list[int]]]) -> BatchFeature:
        """Token ids and owners of several prompts as one batch, padded on the left."""
        length = max(len(ids) for ids, _ in rows)
        inputs = {
            "input_ids": torch.tensor([[self.padding_id] * (length - len(ids)) + ids for ids, _ in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
            "owners": torch.tensor([[0] * (length - len(ids)) + owners for ids, owners in rows]),
        }
        return BatchFeature(inputs)

    def _inputs(self, texts: list[str], media: list[tuple[str, Any]]) -> BatchFeature:
        stacks: dict[str, list[Tensor]] = defaultdict(list)
        prepared: dict[str, list[Prepared]] = defaultdict(list)
        rows, left = [], list(media)
        for text in texts:
            count = len(MARKED.findall(text))
            lengths: dict[str, list[int]] = {}
            for modality, found in grouped(left[:count]).items():
                if modality in self.preparers:
                    own = self.prepare(modality, found)
                    prepared[modality] += own
                    lengths[modality] = [length for one in own for length in one.lengths]
                else:
                    stacks[modality] += [self.preprocess(modality, medium) for medium in found]
            rows.append(self.tokenize(text, lengths))
            left = left[count:]
        inputs = self.pad(rows)
        inputs["media"] = _Media({modality: torch.stack(stack) for modality, stack in stacks.items()} | prepared)
        return inputs

    def _rendered(
        self,
        messages: Conversation,
        media: list[tuple[str, Any]],
        template: str | None,
        add_generation_prompt: bool,
        options: dict[str, Any],
    ) -> str:
        """The prompt with marks where media go; the media are appended to `media` in that order."""
        template = chosen_template(template, self.where)
        literals, count = self.literals(template), len(media)
        plain = []
        for message in messages:
            answer = message.get("role") == "assistant"
            text = self._flatten(message.get("content") or "", media)
            others = {key: literals.mark(value, answer=answer) for key, value in message.items() if key != "content"}
            plain.append(others | {"content": literals.mark(text, answer=answer, media=True)})
        text = rendered_by(
            template, plain, self.tokenizer, self.where, add_generation_prompt=add_generation_prompt, **options
        )
        if (shown := len(MARKED.findall(text))) != (given := len(media) - count):
            raise CheckpointError(
                f"{self.where}: its chat template writes {shown} of {given} media; correct the template, or show no media"
            )
        return literals.settle(text)

    @property
    def where(self) -> str:
        """The folder of the tokenizer, for messages."""
        return str(getattr(self.tokenizer, "name_or_path", "") or "the model")

    def _flatten(self, content: str | list[dict[str, Any]], media: list[tuple[str, Any]]) -> str:
        """The text of one message, with marks for its media."""
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        text = ""
        for part in content:
            if part["type"] == "text":
                text += BRACKETS.sub("", part["text"])
                continue
            for sense in self.senses_of(self._known(part["type"])):
                media.append((sense, medium_of(part)))
                mark, plain = MARK.format(sense), part.get("inline") or sense in self.preparers
                text += mark if plain else f"{self.modality_of(sense)}: " * self.labels + mark + "\n"
        return text

    def _placed(self, text: str, queues: dict[str, list[Any]]) -> tuple[str, list[tuple[str, Any]]]:
        """Text with marks for its placeholders, and the media that they take from `queues`."""
        used: list[tuple[str, Any]] = []

        def mark(found: re.Match[str]) -> str:
            name = modality_name(found[1])
            if name not in self.able:
                return found[0]
            if not queues.get(name):
                raise MediaError(too_many(found[1], name))
            medium = queues[name].pop(0)
            senses = self.senses_of(name)
            used.extend((sense, medium) for sense in senses)
            return "".join(MARK.format(sense) for sense in senses)

        return PLACEHOLDER.sub(mark, BRACKETS.sub("", text)), used

    def _known(self, kind: str) -> str:
        modality = modality_name(kind)
        if modality not in self.able:
            raise MediaError(f"this model takes no {modality} input; it takes: {', '.join(self.able) or 'text only'}")
        return modality


def too_many(placeholder: str, modality: str) -> str:
    """What is said of a text with more placeholders than media."""
    return f"the text has more <{placeholder}> than {modality} media; give one medium for each placeholder"


class _Media(dict[str, Any]):
    """Media by modality, stacked or as lists, which move as one."""

    def to(self, *args: Any, **kwargs: Any) -> "_Media":
        return _Media(
            {
                modality: [one.to(*args, **kwargs) for one in given]
                if isinstance(given, list)
                else given.to(*args, **kwargs)
                for modality, given in self.items()
            }
        )


def grouped(media: Sequence[tuple[str, Any]]) -> dict[str, list[Any]]:
    """Media by modality, in reading order."""
    found: dict[str, list[Any]] = defaultdict(list)
    for modality, medium in media:
        found[modality].append(medium)
    return found


def medium_of(part: dict[str, Any]) -> Any:
    """The medium of a content part, under any of the names that are in use."""
    kind = part["type"]
    for key in ("path", kind, modality_name(kind), "array"):
        if part.get(key) is not None:
            return part[key]
    raise MediaError(f"a content part of type '{kind}' holds no medium; give {{'type': '{kind}', 'path': FILE}}")


def _listed(found: Any) -> list[Any]:
    """Media as a flat list, whether one, several, or several for each text were given."""
    if not isinstance(found, (list, tuple)):
        return [found]
    return [one for item in found for one in (item if isinstance(item, (list, tuple)) else [item])]
