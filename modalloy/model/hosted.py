"""Multimodal models that transformers itself has (LLaVA, Qwen2-VL, Qwen2-Audio …), asked about media as merged models are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from modalloy.errors import CheckpointError, MediaError
from modalloy.model.chat import ChatModel, Prompt
from modalloy.model.literal import MARKS, Literals
from modalloy.model.opening import check_loaded, one_loader, opening, set_ends
from modalloy.model.preparing import ARGUMENTS, PARTS, Preparer, own_processor
from modalloy.model.processor import ModalloyProcessor, medium_of
from modalloy.model.rendering import Message, chosen_template, rendered_by
from modalloy.names import modality_name
from modalloy.senses.anatomy import native_class_name
from modalloy.storage.folder import refuse_pickles

IMAGE = "image"


@dataclass
class HostedModel(ChatModel):
    """A model and a processor of transformers. Its encoder runs with its decoder: `features` of a medium are its pixels,
    its frames or its samples."""

    model: Any
    processor: ModalloyProcessor  # of text
    own: Any  # the processor that came with the model

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities it takes besides text."""
        return tuple(self.readers)

    @cached_property
    def readers(self) -> dict[str, Preparer]:
        """What reads a medium, of the modalities that its class takes and its processor has a part for."""
        place = Path(self.processor.where)
        return {one: Preparer(place, one, opened=self.own) for one in modalities_of(type(self.model), self.own)}

    def prompt(
        self, messages: list[Message], features: Callable[[str, Any], Tensor] | None = None, blocks: Any = None
    ) -> Prompt:
        """A conversation ready to be answered.

        Raises:
            MediaError: a medium is no image, or cannot be read.
            CheckpointError: the chat template or the processor fails at the conversation.
        """
        media: dict[str, list[Tensor]] = {}
        turns = []
        for message in messages:
            given = message["content"]
            parts: list[dict[str, Any]] = []
            for part in [{"type": "text", "text": given}] if isinstance(given, str) else given:
                if part["type"] != "text":
                    kind = modality_name(part["type"])
                    media.setdefault(kind, []).append((features or self.features)(kind, medium_of(part)))
                    parts.append({"type": kind})
                elif parts and parts[-1]["type"] == "text":  # or a control token could come in halves
                    parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
                else:
                    parts.append(part)
            turns.append({"role": message["role"], "content": parts})
        marked = self._rendered(turns, add_generation_prompt=True)
        ids = self._processed([marked], [media])["input_ids"][0].tolist()
        places = {self._sign(kind): index for index, kind in enumerate(self.processor.owners) if index}
        owners = [places.get(token, 0) for token in ids]
        return Prompt(self.literals.shown(marked), ids, owners, dict(media), marked)

    def _sign(self, modality: str) -> int | None:
        """The token that stands for a part of a medium."""
        names = (f"{modality}_token_id", f"{modality}_token_index")
        found = next((getattr(self.model.config, name, None) for name in names), None)
        return found if isinstance(found, int) else None

    @cached_property
    def literals(self) -> Literals:
        """What keeps users' text text; the processor's own tokenizer heeds it from now on."""
        found = Literals(self.own.tokenizer, self._template, self.own)
        heed(self.own.tokenizer, found)
        return found

    @property
    def _template(self) -> str:
        return chosen_template(self.own.chat_template, self.processor.where)

    def _rendered(self, turns: list[Message], *, add_generation_prompt: bool) -> str:
        """The prompt of a conversation whose contents are lists of parts, with marks."""
        marked = [self.literals.mark(turn, answer=turn["role"] == "assistant") for turn in turns]
        return self.literals.settle(
            rendered_by(
                self._template,
                marked,
                self.own.tokenizer,
                self.processor.where,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _between(self, messages: list[Message]) -> str:
        turns = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages]
        return self._rendered(turns, add_generation_prompt=False)

    def features(self, modality: str, medium: Any) -> Tensor:
        """The pixels uint8 (height, width, 3) of an image, a file or an object of Pillow; samples float32 (n,) of a sound;
        frames uint8 (n, height, width, 3) of a video."""
        if modality not in self.readers:
            raise MediaError(
                f"this model takes no {modality} input; it takes: {', '.join(self.readers) or 'text only'}"
            )
        read = self.readers[modality].read(medium)
        if modality != IMAGE:
            return torch.from_numpy(read)
        pixels: Tensor = torch.frombuffer(bytearray(read.tobytes()), dtype=torch.uint8)
        return pixels.reshape(read.height, read.width, 3)

    def _score(self, prompts: Sequence[Prompt], options: list[list[list[int]]]) -> list[list[float]]:
        found = []
        for prompt, own in zip(prompts, options, strict=True):
            logits = (self._forced(prompt, option).log_softmax(-1) for option in own)
            picked = (one.gather(-1, torch.tensor(ids)[:, None]) for one, ids in zip(logits, own, strict=True))
            found.append([float(nats.sum()) for nats in picked])
        return found

    def _next_tokens(self, prompts: Sequence[Prompt], answers: list[list[int]]) -> list[Tensor]:
        return [self._forced(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    @torch.no_grad()
    def _forced(self, prompt: Prompt, answer: list[int]) -> Tensor:
        """Logits (tokens, vocabulary) at every place of an answer, in float32, by one pass over prompt and answer."""
        n = len(answer)
        self._check_length(len(prompt.ids), n)
        inputs = self.inputs([prompt])
        shape = inputs["input_ids"].shape
        longer = {name: pad(given, (0, n)) for name, given in inputs.items() if given.shape == shape}  # kind 0 is text
        longer["input_ids"][0, -n:], longer["attention_mask"][0, -n:] = torch.tensor(answer), 1
        logits: Tensor = self.model(**inputs | longer, logits_to_keep=n + 1).logits
        return logits[0, :-1].float().cpu()

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        if any(prompt.features for prompt in prompts):
            found = self._processed([prompt.marked for prompt in prompts], [prompt.features for prompt in prompts])
        else:
            found = self.processor.pad([(prompt.ids, prompt.owners) for prompt in prompts])
            del found["owners"]
        return dict(found.to(self.model.device, self.model.dtype))

    def _processed(self, texts: list[str], media: Sequence[Mapping[str, list[Tensor]]]) -> Any:
        """Inputs of rendered prompts and their media, padded on the left.

        Raises:
            MediaError: a sound is longer than the model takes.
        """
        from PIL import Image

        begin = self.own.tokenizer.bos_token
        given: dict[str, Any] = {}
        for kind in dict.fromkeys(kind for own in media for kind in own):
            lists: list[list[Any]] = [[one.numpy() for one in own.get(kind, ())] for own in media]
            if kind == IMAGE:
                lists = [[Image.fromarray(one) for one in own] for own in lists]
            given[ARGUMENTS[kind]] = lists if kind != "audio" else [one for own in lists for one in own]
            given |= self.readers[kind].options
        with opening(self.processor.where, "processor", "used"):
            found = self.own(
                text=texts,
                **given,
                add_special_tokens=not (begin and texts[0].startswith(begin)),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        if "audio" in given:
            self.readers["audio"].check_length(given["audio"], found)
        return found


def heed(tokenizer: Any, literals: Literals) -> None:
    """Make a tokenizer, which a processor of transformers calls, encode marked text as `literals` does."""

    class Heeding(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list) or not any(isinstance(one, str) and MARKS.search(one) for one in texts):
                return super().__call__(text, *args, **options)
            special = options.get("add_special_tokens", True)
            rows = [literals.encode(one, add_special_tokens=special) for one in texts]
            asked = {name: options[name] for name in ("padding", "padding_side", "return_tensors") if name in options}
            ids = {"input_ids": rows[0] if isinstance(text, str) else rows}
            return self.pad(ids, **{"padding": False} | asked)

    tokenizer.__class__ = Heeding


def is_hosted(config: dict[str, Any]) -> bool:
    """Whether a config.json names a class of transformers that answers about media and text."""
    return native_class_name(config) is not None


def modalities_of(kind: Any, processor: Any) -> tuple[str, ...]:
    """What a class takes besides text, where its processor has a part for it."""
    given = kind.input_modalities
    named = (given,) if isinstance(given, str) else given
    return tuple(one for one in named if one in PARTS and getattr(processor, PARTS[one], None) is not None)


def able(processor: Any, config: dict[str, Any]) -> tuple[str, ...]:
    """The same, of the model with this config.json."""
    import transformers

    return modalities_of(getattr(transformers, str(native_class_name(config))), processor)


def load_hosted(folder: Path, content: dict[str, Any], **options: Any) -> HostedModel:
    """The model in a folder with config.json `content`, loaded with transformers' options.

    Raises:
        CheckpointError: a tensor is missing or unknown, or the processor cannot be opened.
    """
    import transformers

    kind = getattr(transformers, str(native_class_name(content)))
    processor = open_processor(folder)
    refuse_pickles(folder)
    with opening(folder, "model"), one_loader():
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    check_loaded(folder, info)
    model.requires_grad_(False)
    set_ends(model, folder, content)
    found = HostedModel(model, ModalloyProcessor(processor.tokenizer), processor)
    if not found.readers:
        parts = ", ".join(sorted(set(PARTS.values())))
        raise CheckpointError(
            f"{folder}: its processor has no part for what a {kind.__name__} takes ({parts}); add preprocessor_config.json of the "
            "published model"
        )
    found.processor.modalities = {one: {} for one in found.readers}
    return found


def open_processor(folder: Path) -> Any:
    """The processor of a hosted model.

    Raises:
        CheckpointError: it needs a library that is not installed, or has no tokenizer or chat template.
    """
    with one_loader():
        processor = own_processor(folder)
    if getattr(processor, "chat_template", None) is None:
        raise CheckpointError(
            f"{folder}: its processor has no chat_template; add chat_template.jinja of the published model"
        )
    return processor


def places(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, nn.Parameter]:
    """The parameter that each tensor of a checkpoint becomes as it is, by its name there; those that are converted are left out.

    transformers reads several spellings of a model, and rewrites them. So marks are loaded once as a checkpoint: tensors of
    its names and shapes that take no room, each found again in the model by its address.
    """
    marks = {
        name: torch.tensor(float(index)).expand(torch.Size(shape)) for index, (name, shape) in enumerate(shapes.items())
    }
    with one_loader():
        marked = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(marks), dtype=torch.float32, trust_remote_code=False
        )
    names = {mark.data_ptr(): name for name, mark in marks.items()}
    found: dict[str, nn.Parameter] = {}
    taken: set[int] = set()
    for path, mark in marked.named_parameters(remove_duplicate=False):
        name = names.get(mark.data_ptr())
        if name is None or name in found:  # tied to one that the checkpoint has
            continue
        parameter = model.get_parameter(path)
        if id(parameter) in taken:  # tied because they are equal now, but stored apart
            module, _, leaf = path.rpartition(".")
            parameter = nn.Parameter(parameter.clone(), requires_grad=False)
            setattr(model.get_submodule(module), leaf, parameter)
        taken.add(id(parameter))
        found[name] = parameter
    return found
