"""What a multimodal class of transformers is made of: which part is the decoder, and what the rest hands to it.

No class is known by name. A model of the class is built on the meta device (no memory), and asked; the call of its decoder
is read in the source of its own forward.
"""

import ast
import copy
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from modalloy.errors import CheckpointError, cut, shown

# classes that no table of multimodal language models lists
FURTHER = {
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "musicflamingo": "MusicFlamingoForConditionalGeneration",
}
# decoders of text that are merged most often, which transformers, a second to import, need not be asked about
OF_TEXT = {
    *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi", "phi3"),
    *("gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "smollm3", "granite", "gpt_oss", "deepseek_v3"),
    *("falcon", "gpt2"),
}
USUAL = {  # what any language model takes
    *("input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache", "cache_position"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}
DEEPSTACK = {"deepstack_visual_embeds", "visual_pos_masks"}
# a call in a class's forward; masks of a tower are bidirectional
OWN_MASK = re.compile(r"create_(?!bidirectional)\w*masks?\w*\(")
BY_BLOCK = "get_block_sequence_ids_for_mask("  # where tokens of one picture see each other, and nothing else changes
THREE_POSITIONS = re.compile(r"\.expand\([34],")
OWN_DECODERS = ("phi4_multimodal",)  # classes that are their own decoder, whose blocks get tokens only
DECODER_PARTS = ("embed_tokens.", "layers.", "norm.")  # of a class that is its own decoder

# of modules, or names, in a config's keys
COUNTS = ("layers", "depth", "blocks", "experts", "num_hidden", "stages", "num_labels")
MAX_MODULES = 4096
FAULTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError, ArithmeticError)


def native_class_name(config: Mapping[str, Any]) -> str | None:
    """The multimodal class of transformers that a config.json names, None if it names another or none."""
    if str(config.get("model_type")) in OF_TEXT:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    listed: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    known = [listed] if isinstance(listed, str) else list(listed or ())
    known += [FURTHER[name] for name in FURTHER if name == config.get("model_type")]
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return next((one for one in named if one in known), None)


@dataclass(frozen=True)
class Anatomy:
    """A multimodal class of transformers with one config."""

    model: Any  # on the meta device
    where: str  # for messages

    @property
    def name(self) -> str:
        """The class's name."""
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        """transformers' object of the config."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The decoder's part of it."""
        return self.config.get_text_config(decoder=True)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes besides text."""
        given = type(self.model).input_modalities
        return tuple(one for one in ((given,) if isinstance(given, str) else given) if one != "text")

    @cached_property
    def decoder(self) -> str:
        """The path of the module that is the decoder."""
        found = self.model.get_decoder()
        return next(path for path, module in self.model.named_modules() if module is found)

    @property
    def is_decoder(self) -> bool:
        """Whether the inner model is the decoder itself, as Phi-4-multimodal's."""
        return "." not in self.decoder and self.decoder == self.model.base_model_prefix

    @property
    def inner(self) -> str:
        """The path of the module whose forward calls the decoder with embeddings."""
        return self.decoder if self.is_decoder else self.decoder.rpartition(".")[0]

    @cached_property
    def head(self) -> str | None:
        """The path of the output head."""
        found = self.model.get_output_embeddings()
        return next((path for path, module in self.model.named_modules() if module is found), None)

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the table of input embeddings, whatever parts of the config say."""
        return self.head is not None and f"{self.head}.weight" in self.model.all_tied_weights_keys

    def plain_name(self, own: str) -> str | None:
        """The name, in a plain language model, of a tensor by the class's own name; None for what is no part of one."""
        if self.head is not None and own.startswith(f"{self.head}."):
            return "lm_head." + own.removeprefix(f"{self.head}.")
        if not own.startswith(f"{self.decoder}."):
            return None
        rest = own.removeprefix(f"{self.decoder}.")
        if self.is_decoder and not rest.startswith(DECODER_PARTS):
            return None
        return f"model.{rest}"

    @cached_property
    def hands_over(self) -> set[str]:
        """What the decoder is given beside the usual, by the names of its arguments."""
        if self.is_decoder:
            return set()
        leaf = self.decoder.rpartition(".")[2]
        calls = [
            node
            for node in ast.walk(ast.parse(self._source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == leaf
        ]
        return {one.arg for call in calls for one in call.keywords if one.arg} - USUAL

    @property
    def has_deepstack(self) -> bool:
        """Whether features are added to the first layers at media positions (arXiv 2406.04334)."""
        return bool(self.hands_over & DEEPSTACK)

    @property
    def has_three_positions(self) -> bool:
        """Whether positions are of time, height and width (M-RoPE, arXiv 2409.12191)."""
        return takes_three_positions(self.model.get_decoder())

    @cached_property
    def has_own_masks(self) -> bool:
        """Whether it makes the decoder's attention masks itself."""
        return not self.is_decoder and OWN_MASK.search(self._source) is not None

    @cached_property
    def _source(self) -> str:
        """The forward that calls the decoder."""
        return textwrap.dedent(inspect.getsource(inspect.unwrap(type(self.model.get_submodule(self.inner)).forward)))

    def check_supported(self, label: str) -> None:
        """Refuse a class whose decoder needs more than tokens, positions, deepstack features and masks of one picture.

        Raises:
            CheckpointError: it hands over something else, which is named.
        """
        remedy = "use it as base_model, or another specialist of this modality"
        kind = self.text_config.model_type
        if self.model.get_decoder() is self.model or not hasattr(self.text_config, "num_hidden_layers"):
            raise CheckpointError(f"{label} specialist: {self.name} has no decoder of its own to merge; {remedy}")
        if self.config.is_encoder_decoder or getattr(self.text_config, "is_encoder_decoder", False):
            raise CheckpointError(
                f"{label} specialist: {self.name} is an encoder-decoder, whose {kind} reads media by cross-attention; {remedy}"
            )
        if further := sorted(self.hands_over - DEEPSTACK):
            raise CheckpointError(
                f"{label} specialist: {self.name} hands its decoder {', '.join(further)} beside the tokens, which no other "
                f"{kind} decoder has a place for; {remedy}"
            )
        if self.is_decoder and self.config.model_type not in OWN_DECODERS:
            raise CheckpointError(
                f"{label} specialist: {self.name} is its own decoder, and its blocks may read media themselves; {remedy}"
            )
        if self.has_own_masks and BY_BLOCK not in self._source:
            raise CheckpointError(
                f"{label} specialist: {self.name} makes attention masks of its own, which are not known here; {remedy}"
            )


def takes_three_positions(decoder: Any) -> bool:
    """Whether a text model takes positions (3, batch, tokens): its forward widens those of one kind."""
    return THREE_POSITIONS.search(inspect.getsource(inspect.unwrap(type(decoder).forward))) is not None


@lru_cache(maxsize=16)
def _anatomy(config: str, where: str) -> Anatomy:
    import torch
    import transformers
    from transformers.models.auto import CONFIG_MAPPING

    content = json.loads(config)
    check_counts(content, where)
    name = native_class_name(content)
    assert name is not None
    try:
        made = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        with torch.device("meta"):
            return Anatomy(getattr(transformers, name)(made), where)
    except ImportError as error:
        raise CheckpointError(
            f"{where}: a {name} needs a library that is missing ({_cause(error)}); install it"
        ) from error
    except faults() as error:
        raise CheckpointError(
            f"{where}: its config.json makes no {name} ({_cause(error)}); download it again"
        ) from error


def faults() -> tuple[type[Exception], ...]:
    """What a class of transformers raises at a config that is not its own."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError, *FAULTS)


def _cause(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return cut(" ".join(f"{type(error).__name__}: {error}".split()))


def check_counts(content: Any, where: str) -> None:
    """Refuse a config that asks for more modules than any model has: they would all be made."""
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part.values()
            for key, value in part.items():
                if type(value) is int and value > MAX_MODULES and any(word in key for word in COUNTS):
                    raise CheckpointError(
                        f"{where}: {cut(key)} is {shown(value)} in config.json, more than any model has; download it again"
                    )


def anatomy(config: Mapping[str, Any], where: Any) -> Anatomy:
    """The anatomy of the model with this config.json, which must name a multimodal class of transformers.

    Raises:
        CheckpointError: the config makes no model of its class.
    """
    return _anatomy(json.dumps(config, sort_keys=True), str(where))


def own_names(found: Anatomy | Any, names: Iterable[str]) -> dict[str, str]:
    """The class's own name of each tensor of a checkpoint, whatever its spelling: the hub's, an older one, its own.

    `found` is an Anatomy, or a model on the meta device. transformers' own table of renamings is used.

    Raises:
        CheckpointError: a tensor is stored in another form than the class's, or two are one.
    """
    own_name = renamer(found)
    where = found.where if isinstance(found, Anatomy) else "the base"
    result: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        new = own_name(name)
        if new in taken:
            raise CheckpointError(f"{where}: {name} and {taken[new]} are two names of one tensor; remove one of them")
        taken[new] = name
        result[name] = new
    return result


def conversion(model: Any) -> Callable[[str], tuple[str, str | None, Any]]:
    """transformers' own table, for a model on the meta device: the class's name of a tensor, and where one is made of several or
    cut into several, which source of which `WeightConverter` the tensor is."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table: list[Any] = list(get_model_conversion_mapping(model))
    renamings = [one for one in table if isinstance(one, WeightRenaming)]
    converters = [one for one in table if isinstance(one, WeightConverter)]
    own = model.state_dict()

    def converted(name: str) -> tuple[str, str | None, Any]:
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)[:2]
        if pattern is None:
            return str(new), None, None
        return str(new), pattern, next(one for one in converters if pattern in one.source_patterns)

    return converted


def renamer(found: Anatomy | Any) -> Callable[[str], str]:
    """What gives the class's own name of a tensor; see `own_names`."""
    model, where = (found.model, found.where) if isinstance(found, Anatomy) else (found, "the base")
    own, converted = model.state_dict(), conversion(model)

    def own_name(name: str) -> str:
        new, pattern, _ = converted(name)
        if pattern is not None and name not in own:
            raise CheckpointError(
                f"{where}: {name} is stored in another form than {type(model).__name__}'s, which transformers converts when it "
                "loads it; load the model with transformers and save it with save_original_format=False"
            )
        return new

    return own_name


def headless(content: Mapping[str, Any], found: Anatomy) -> dict[str, Any]:
    """A config.json like `content` whose decoder has no blocks: what a sense alone is built from."""
    config = copy.deepcopy(found.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None) is not None:
            setattr(text, name, [])
    made: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    made["architectures"] = list(content["architectures"])
    for name in ("auto_map", "_name_or_path", "quantization_config"):
        made.pop(name, None)
    return made
