"""A merged model whose decoder is llama.cpp's: encoders and projectors run here, all tokens there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.llamacpp.decoder import Decoder
from modalloy.model.answering import Answer, Sampling
from modalloy.model.chat import ChatModel, Prompt, Reply
from modalloy.model.config import LLAMA_CPP, ModalloyConfig, check_content
from modalloy.model.load import Stored, load_model
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.opening import check_code, open_tokenizer, opening, set_ends
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.rendering import Message
from modalloy.model.sequences import Sequences
from modalloy.storage.folder import is_there, read_json
from modalloy.storage.locate import locate
from modalloy.storage.tensors import Checkpoint

SENSES = "senses"  # stem of the file of everything but the decoder
TABLE = "decoder.model.embed_tokens.weight"
CONTEXT = 8192  # tokens of the cache, where the model could take more


@dataclass
class LlamaChat(ChatModel):
    """`model` has encoders and projectors, and a decoder without blocks; `decoder` decodes."""

    decoder: Decoder = field(kw_only=True)
    holder: ClassVar[str] = "cache"

    @cached_property
    def sequences(self) -> Sequences:
        """What answers."""
        return Sequences(self, self.decoder)

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.decoder.context

    @property
    def vocabulary(self) -> int:
        """How many tokens the decoder knows."""
        return self.decoder.vocabulary

    def reply(
        self, messages: list[Message], *, max_new_tokens: int = 64, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """The answer to a conversation, decoded greedily, with its prompt. `on_text` gets its text as it is generated.

        Raises:
            LengthError: the conversation leaves no room for `max_new_tokens` in the cache.
        """
        prompt = self.prompt(messages)
        answer = self._answered(prompt, max_new_tokens, on_text)
        return Reply(answer.answer, prompt.text, self.counts(prompt), answer.new_tokens)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[tuple[str, int]]:
        """Greedy answers to prompts, and how many tokens each took."""
        found = [self._answered(prompt, max_new_tokens, None) for prompt in prompts]
        return [(answer.answer, answer.new_tokens) for answer in found]

    def _answered(self, prompt: Prompt, max_new_tokens: int, on_text: Callable[[str], None] | None) -> Answer:
        def tell(text: str, _: object) -> None:
            if on_text is not None:
                on_text(text)

        answer = Answer(self, prompt, Sampling(max_new_tokens), tell)
        try:
            self.sequences.add(answer)
            while answer.finished is None:
                self.sequences.step()
        except BaseException:
            self.sequences.clear()
            raise
        return answer

    def _score(self, prompts: Sequence[Prompt], options: list[list[list[int]]]) -> list[list[float]]:
        found = []
        for prompt, own in zip(prompts, options, strict=True):
            self.check([prompt], max(map(len, own)))
            logits = self.sequences.forced(prompt, own)
            nats = [torch.from_numpy(rows).log_softmax(-1) for rows in logits]
            found.append(
                [float(rows.gather(1, torch.tensor(ids)[:, None]).sum()) for rows, ids in zip(nats, own, strict=True)]
            )
        return found

    def _next_tokens(self, prompts: Sequence[Prompt], answers: list[list[int]]) -> list[Tensor]:
        for prompt, own in zip(prompts, answers, strict=True):
            self.check([prompt], len(own))
        pairs = zip(prompts, answers, strict=True)
        return [torch.from_numpy(self.sequences.forced(prompt, [ids])[0]) for prompt, ids in pairs]


def load_exported(
    path: str | Path, *, context: int | None = None, sequences: int = 1, exact: bool = False
) -> LlamaChat:
    """The model in a folder that `modalloy export --to llama.cpp` wrote; it runs on the CPU.

    Args:
        path: the folder, or its hub id.
        context: tokens that the cache holds for all answers that are under way together (default: the model's, at most 8192).
        sequences: how many answers may be under way.
        exact: keys and values in float32, and no flash attention.

    Raises:
        MissingPackageError: llama.cpp is not installed.
        CheckpointError: the folder is no such export, or damaged; or llama.cpp is of another version.
        OutOfMemoryError: there is too little memory.
    """
    folder = locate(str(path), whole=True)
    if not is_there(folder / "config.json"):
        raise CheckpointError(
            f"{folder}: has no config.json; give a folder that `modalloy export --to llama.cpp` wrote"
        )
    check_code(folder)
    content = read_json(folder / "config.json")
    if content.get("model_type") != LLAMA_CPP:
        raise CheckpointError(
            f"{folder}: is no export for llama.cpp; make one with `modalloy export {folder} --to llama.cpp -o OUT` and open that"
        )
    check_content(content, folder / "config.json")
    check_content(read_json(folder / "processor_config.json"), folder / "processor_config.json")
    base, adapters, most = _files(folder, content)
    model = _senses(folder, content)
    set_ends(model, folder, content)
    processor = ModalloyProcessor(
        open_tokenizer(folder), model.config.modalities, bool(read_json(folder / "processor_config.json").get("labels"))
    )
    decoder = Decoder(base, adapters, context=context or min(most, CONTEXT), sequences=sequences, exact=exact)
    if decoder.width != model.config.text_config.hidden_size:
        raise CheckpointError(f"{base}: is {decoder.width} wide, and the model of {folder} is not; export again")
    return LlamaChat(model, processor, decoder=decoder)


def load_by(
    engine: str, path: str | Path, *, context: int | None = None, sequences: int = 1, **options: Any
) -> ChatModel:
    """`load_exported` or `load_model`, by the name of an engine."""
    if engine == "torch":
        return load_model(path, **options)
    return load_exported(path, context=context, sequences=sequences)


def _files(folder: Path, content: dict[str, Any]) -> tuple[Path, dict[str, Path | None], int]:
    """The base, each owner's adapter, and the model's context, as the config says."""
    damaged = CheckpointError(f"{folder / 'config.json'}: its entry {LLAMA_CPP} is damaged; export again")
    entry = content.get(LLAMA_CPP)
    if not isinstance(entry, dict) or not isinstance(entry.get("adapters"), dict):
        raise damaged
    names, adapters = ["text", *content["modalities"]], entry["adapters"]
    files = [entry.get("base"), *(name for name in adapters.values() if name is not None)]
    if set(names) != set(adapters) or not all(isinstance(one, str) and Path(one).name == one for one in files):
        raise damaged
    if type(entry.get("context")) is not int or entry["context"] < 1:
        raise damaged
    if lacking := next((one for one in files if not is_there(folder / one)), None):
        raise CheckpointError(f"{folder / lacking}: no such file; export again, or copy the folder again")
    found = {owner: None if name is None else folder / name for owner, name in adapters.items()}
    return folder / entry["base"], found, entry["context"]


def _senses(folder: Path, content: dict[str, Any]) -> ModalloyForConditionalGeneration:
    """Encoders and projectors, with a decoder of no blocks, and of no vocabulary unless a native sense looks tokens up."""
    checkpoint = Checkpoint(folder, (SENSES,))
    weights = {
        name: Stored(partial(checkpoint.read, ref), ref.dtype, ref.shape) for name, ref in checkpoint.refs.items()
    }
    with opening(folder, "config.json", "used"):
        text = dict(content["text_config"]) | {
            "num_hidden_layers": 0,
            "layer_types": None,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        text |= {"tie_word_embeddings": True, "vocab_size": weights[TABLE].shape[0] if TABLE in weights else 1}
        config = ModalloyConfig(text, content["modalities"])
        with torch.device("meta"):
            shapes = {
                name: tuple(tensor.shape)
                for name, tensor in ModalloyForConditionalGeneration(_without_updates(config)).state_dict().items()
            }
    for name, shape in shapes.items():
        if name.startswith("decoder.") and name not in weights and name != "decoder.lm_head.weight":
            weights[name] = Stored(partial(torch.zeros, shape), torch.float32, shape)
    with opening(folder, "model"):
        found: ModalloyForConditionalGeneration = ModalloyForConditionalGeneration.from_pretrained(
            None, config=_without_updates(config), state_dict=weights, where=folder, dtype=torch.float32
        )
    found.config = config
    return found


def _without_updates(config: ModalloyConfig) -> ModalloyConfig:
    """The config of a model whose tokens all use the base: updates are llama.cpp's."""
    modalities = {name: sizes | {"update": None} for name, sizes in config.modalities.items()}
    return ModalloyConfig(config.text_config, modalities)
