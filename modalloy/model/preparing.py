"""Media as a native specialist's own processor prepares them: the text its chat template puts around each, and its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature, unwrap
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modalloy.errors import CheckpointError, LongMediaError, ModalloyError
from modalloy.model.opening import check_code, opening, reason
from modalloy.model.rendering import chosen_template, rendered_by
from modalloy.senses.anatomy import native_class_name
from modalloy.senses.media import load_audio, load_image, video_frames
from modalloy.senses.native import Prepared

ARGUMENTS = {"image": "images", "audio": "audio", "video": "videos"}  # of a processor's call
PARTS = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}
ASKED = "qZ{}Zq"  # words that stand for text while a template is looked into
N_FRAMES = 16  # of a video, where the specialist's processor does not say


@dataclass
class Preparer:
    """One modality of one specialist. `folder` holds its processor and its config."""

    folder: Path
    modality: str
    frame: str | None = None  # text around a medium, with {} for its sign; default: what the chat template writes
    opened: Any = None  # the processor, if it is open already
    frames_known: dict[int, list[str]] = field(default_factory=dict)

    @cached_property
    def own(self) -> Any:
        """The specialist's processor.

        Raises:
            CheckpointError: it is missing or damaged, or needs a library that is not installed, or code of its own.
        """
        if self.opened is not None:
            return self.opened
        found = own_processor(self.folder)
        if getattr(found, PARTS[self.modality], None) is None:
            raise CheckpointError(
                f"{self.folder}: its processor has no {PARTS[self.modality]}; add preprocessor_config.json of the published "
                "model"
            )
        return found

    @property
    def sampling_rate(self) -> int:
        """Samples a second that its sounds must have."""
        return int(getattr(self.own.feature_extractor, "sampling_rate", 16_000))

    @property
    def options(self) -> dict[str, Any]:
        """What a processor's call is told of media that are read already."""
        if self.modality == "video":
            return {"videos_kwargs": {"do_sample_frames": False}}
        takes_rate = self.modality == "audio" and "sampling_rate" in signature(self.own.feature_extractor).parameters
        return {"audio_kwargs": {"sampling_rate": self.sampling_rate}} if takes_rate else {}

    def read(self, medium: Any) -> Any:
        """A medium in memory, from a file or an object: an RGB picture, samples (n,), frames (n, height, width, 3).

        Raises:
            MediaError: it cannot be read.
        """
        is_file = isinstance(medium, (str, Path))
        if self.modality == "image":
            return load_image(medium) if is_file else medium.convert("RGB")
        if self.modality == "audio":
            return load_audio(medium, self.sampling_rate) if is_file else np.asarray(medium, np.float32)
        return video_frames(medium, int(getattr(self.own.video_processor, "num_frames", None) or N_FRAMES))

    def prepare(self, media: Sequence[Any]) -> list[Prepared]:
        """All media of a conversation, prepared together, or one by one where the processor takes one at a time.

        Raises:
            MediaError: a medium cannot be read.
            LongMediaError: it is longer than the specialist takes.
            CheckpointError: the processor fails.
        """
        read = [self.read(medium) for medium in media]
        frames = self.frames(len(read))
        if len(read) > 1:
            try:
                return [self._together(read, frames)]
            except CheckpointError:  # such as Audio Flamingo's, which pairs a text and a sound
                pass
        return [self._together([one], [frame]) for one, frame in zip(read, frames, strict=True)]

    def frames(self, count: int) -> list[str]:
        """The text around each of `count` media, its sign in it."""
        if self.frame is not None:
            return [self.frame.replace("{}", self.sign)] * count
        if count not in self.frames_known:
            self.frames_known[count] = self._frames(count)
        return self.frames_known[count]

    @property
    def sign(self) -> str:
        """What stands for a medium in a text."""
        found = getattr(self.own, f"{self.modality}_token", None)
        if not isinstance(found, str):
            raise CheckpointError(
                f"{self.folder}: its processor names no {self.modality} token; give the specialist `frame:` with the sign in it"
            )
        return found

    def _frames(self, count: int) -> list[str]:
        template = getattr(self.own, "chat_template", None) or getattr(self.own.tokenizer, "chat_template", None)
        if not template:
            return [self.sign] * count
        shown = {"type": self.modality}
        texts = [{"type": "text", "text": ASKED.format(index)} for index in range(count + 1)]
        mixed = [part for index in range(count) for part in (texts[index], shown)] + [texts[count]]
        try:
            whole = self._rendered(template, mixed)
            pieces = [
                whole.partition(ASKED.format(index))[2].partition(ASKED.format(index + 1))[0] for index in range(count)
            ]
            if all(pieces) and all(self.sign in piece for piece in pieces):
                return pieces
            before = self._difference(template, [shown], texts[:1])
            return [before] * count
        except ModalloyError as error:
            raise CheckpointError(
                f"{self.folder}: its chat template says nothing of {self.modality} ({error}); give the specialist `frame:`"
            ) from error

    def _difference(self, template: Any, shown: list[dict[str, Any]], text: list[dict[str, Any]]) -> str:
        """What media add to a prompt, where the template puts them before all text."""
        with_them, without = self._rendered(template, [*shown, *text]), self._rendered(template, text)
        start = 0
        while start < len(without) and with_them[start] == without[start]:
            start += 1
        added = with_them[start : len(with_them) - (len(without) - start)]
        if self.sign not in added:
            raise CheckpointError(f"it writes {added!r} for a medium, without the sign {self.sign}")
        return added

    def _rendered(self, template: Any, parts: list[dict[str, Any]]) -> str:
        where = str(self.folder)
        return rendered_by(
            chosen_template(template, where), [{"role": "user", "content": parts}], self.own.tokenizer, where
        )

    def _together(self, media: list[Any], frames: list[str]) -> Prepared:
        tokenizer = self.own.tokenizer
        between = tokenizer.eos_token or tokenizer.bos_token or tokenizer.pad_token or tokenizer.unk_token
        if len(media) > 1 and between is None:
            raise CheckpointError(f"{self.folder}: its tokenizer has no special token to tell media apart by")
        given: dict[str, Any] = {ARGUMENTS[self.modality]: media if self.modality == "audio" else [media]}
        with opening(self.folder, "processor", "used for this medium", silent=True):
            made = self.own(
                text=[str(between or "").join(frames)],
                **given | self.options,
                add_special_tokens=False,
                return_tensors="pt",
            )
        inputs = {name: value for name, value in dict(made).items() if isinstance(value, Tensor)}
        ids = inputs["input_ids"][0].tolist()
        if self.modality == "audio":
            self.check_length(media, inputs)
        if len(media) == 1:
            return Prepared(self._accepted(inputs), ((0, len(ids)),))
        ends = [*(at for at, one in enumerate(ids) if one == tokenizer.convert_tokens_to_ids(between)), len(ids)]
        if len(ends) != len(media):
            raise CheckpointError(f"{self.folder}: its frames hold the token {between!r} themselves; give `frame:`")
        places = tuple(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))
        return Prepared(self._accepted(inputs), places)

    def _accepted(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that the class's forward takes."""
        return {name: value for name, value in inputs.items() if name in self._arguments}

    @cached_property
    def _arguments(self) -> set[str]:
        import transformers

        from modalloy.storage.folder import read_json

        name = native_class_name(read_json(self.folder / "config.json"))
        return set(signature(unwrap(getattr(transformers, str(name)).forward)).parameters)

    def check_length(self, media: Sequence[Any], inputs: Mapping[str, Any]) -> None:
        """Refuse a sound of which the processor's features cover only a part: some cut what is too long, and say nothing."""
        hop = getattr(self.own.feature_extractor, "hop_length", None)
        features = next((value for name, value in inputs.items() if name.startswith("input_features")), None)
        if not isinstance(hop, int) or features is None or features.ndim < 2:
            return
        bins = getattr(self.own.feature_extractor, "feature_size", 0)
        frames = features.numel() // max(1, bins if features.ndim > 2 else 1)
        samples = sum(len(one) for one in media)
        if samples > (frames + len(media)) * hop:
            rate = self.sampling_rate
            raise LongMediaError(
                f"a sound of {samples / rate:.1f} s is longer than the {frames * hop / rate:.0f} s that the {self.modality} "
                "specialist takes; give a shorter one"
            )


def own_processor(folder: Path) -> Any:
    """The processor that came with a model of transformers, which must have a tokenizer.

    Raises:
        CheckpointError: it is missing or damaged, or needs a library that is not installed, or code of its own.
    """
    from transformers import AutoProcessor

    check_code(folder)
    try:
        with opening(folder, "processor", silent=True):
            found = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except CheckpointError as error:
        raise missing_library(folder, error) or error from error
    if getattr(found, "tokenizer", None) is None:
        raise CheckpointError(f"{folder}: its processor has no tokenizer; add tokenizer.json of the published model")
    return found


def missing_library(folder: Path, error: CheckpointError) -> CheckpointError | None:
    """What is said where a processor cannot be opened for want of a library; None if the reason is another."""
    said = f"{reason(error.__cause__) if error.__cause__ else error}".lower()
    for library in ("torchvision", "mistral_common", "torchaudio", "timm"):
        if library in said:
            name = library.replace("_", "-")
            return CheckpointError(
                f"{folder}: its processor needs {name}, which is not installed; run `pip install {name}`"
            )
    return None
