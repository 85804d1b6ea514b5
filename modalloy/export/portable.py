"""A merged model as one checkpoint with code of its own: config, processor and model, for transformers alone.

In the prompt, a token of its modality's own stands at each position of a medium. So which weights a token uses is told by
its id, and any program that hands on ids and media can ask this model.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from modalloy.delta import LowRank
from modalloy.errors import MediaError
from modalloy.export.given import as_file, listed
from modalloy.export.parts import encoder, projector
from modalloy.model.routing import HALF, TEXT, RoutedLinear, Routes, route_linears

# the names under which programs hand on prepared media
INPUTS = {"image": "pixel_values", "audio": "input_features", "video": "pixel_values_videos", "point": "point_values"}


class RoutedConfig(PreTrainedConfig):
    """`text_config` is the decoder's own config.

    `modalities` has for each modality its encoder (name, settings), projector, `n_tokens`, `n_prefix`, `n_suffix`, `update`
    (rank, scale and linears; null: its tokens use the text path) and `token_id`, which stands at its positions.
    """

    model_type = "modalloy_routed"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: Any = None,
        modalities: dict[str, dict[str, Any]] | None = None,
        text_update: dict[str, Any] | None = None,
        text_linears: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config if text_config is not None else CONFIG_MAPPING["llama"]()
        self.modalities = modalities or {}
        self.text_update, self.text_linears = text_update, text_linears or []
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.text_config, token, None))
        super().__init__(**kwargs)

    @property
    def owners(self) -> tuple[str, ...]:
        """Names that an owner index stands for: 0 is text, then the modalities in alphabetical order."""
        return (TEXT, *sorted(self.modalities))

    @property
    def updates(self) -> dict[str, dict[str, Any]]:
        """The update of every owner that has one of its own."""
        found = {TEXT: self.text_update} | {name: sizes["update"] for name, sizes in self.modalities.items()}
        return {owner: update for owner, update in found.items() if update}


class RoutedProcessor(ProcessorMixin):
    """Turns chat messages, or rendered prompts with placeholders and media, into the model's inputs.

    A placeholder stands once for a medium in a prompt; it is repeated for each position that the medium takes. Each chunk of
    text between media is tokenised by itself, as in training.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        modalities: dict[str, dict[str, Any]] | None = None,
        labels: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.modalities, self.labels = modalities or {}, labels
        self.encoders: dict[str, Any] = {}
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds."""
        return {"processor_class": type(self).__name__, "labels": self.labels, "modalities": self.modalities} | (
            {"auto_map": self.auto_map} if getattr(self, "auto_map", None) else {}
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", *(INPUTS[name] for name in self.modalities)]

    @property
    def placeholders(self) -> dict[str, str]:
        """The modality of each placeholder."""
        return {sizes["token"]: name for name, sizes in self.modalities.items()}

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        tools: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of one conversation or of several; with `tokenize`, the model's inputs.

        A content part is {"type": "text", "text": …} or {"type": modality, "path", "url" or modality: medium}: a file, a
        `data:` URL, or an object in memory; nothing is fetched. Other options are the template's own variables.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        media: list[tuple[str, Any]] = []
        texts = []
        for messages in conversation if batched else [conversation]:
            plain = [message | {"content": self._flat(message.get("content") or "", media)} for message in messages]
            texts.append(
                self.tokenizer.apply_chat_template(
                    plain,
                    chat_template=chat_template or self.chat_template,
                    tokenize=False,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
            )
        if not tokenize:
            return texts if batched else texts[0]
        inputs = self._inputs(texts, media)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        audio: Any = None,
        videos: Any = None,
        point_clouds: Any = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of rendered prompts whose placeholders stand for the media, of each modality in reading order."""
        texts = [text] if isinstance(text, str) else list(text)
        given = {"image": images, "audio": audio, "video": videos, "point": point_clouds}
        queues = {name: iter(listed(found)) for name, found in given.items() if found is not None}
        media = []
        for token in re.findall("|".join(map(re.escape, self.placeholders)) or r"(?!)", "".join(texts)):
            name = self.placeholders[token]
            medium = next(queues.get(name, iter(())), None)
            if medium is None:
                raise MediaError(f"the text has more {token} than {name} media; give one medium for each placeholder")
            media.append((name, medium))
        if left := next((name for name, queue in queues.items() if next(queue, None) is not None), None):
            raise MediaError(
                f"more {left} media are given than the text has placeholders; add {self.modalities[left]['token']}"
            )
        return self._inputs(texts, media)

    def _flat(self, content: Any, media: list[tuple[str, Any]]) -> str:
        """The text of one message, with placeholders for its media."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            if part["type"] == "text":
                if token := next((one for one in self.placeholders if one in part["text"]), None):
                    raise MediaError(f"the text holds {token}, which stands for a medium; leave it out")
                text += part["text"]
                continue
            name = {"vision": "image", "point_cloud": "point"}.get(part["type"], part["type"])
            if name not in self.modalities:
                raise MediaError(
                    f"this model takes no {name} input; it takes: {', '.join(self.modalities) or 'text only'}"
                )
            keys = ("path", "url", "base64", part["type"], name)
            medium = next((part[key] for key in keys if part.get(key) is not None), None)
            if medium is None:
                raise MediaError(
                    f"a content part of type '{name}' holds no medium; give {{'type': '{name}', 'path': FILE}}"
                )
            media.append((name, medium))
            token = self.modalities[name]["token"]
            text += token if part.get("inline") else f"{name}: " * self.labels + token + "\n"
        return text

    def _inputs(self, texts: Sequence[str], media: Sequence[tuple[str, Any]]) -> BatchFeature:
        stacks: dict[str, list[Tensor]] = defaultdict(list)
        for name, medium in media:
            if name not in self.encoders:
                sizes = self.modalities[name]["encoder"]
                with torch.device("meta"):
                    self.encoders[name] = encoder(sizes["name"])(**sizes["settings"])
            with as_file(medium) as found:
                stacks[name].append(self.encoders[name].preprocess(found))
        rows = [self.ids(text) for text in texts]
        length, padding = max(map(len, rows)), int(self.tokenizer.pad_token_id or 0)
        inputs = {
            "input_ids": torch.tensor([[padding] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        return BatchFeature(inputs | {INPUTS[name]: torch.stack(stack) for name, stack in stacks.items()})

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, its placeholders repeated."""
        ids: list[int] = []
        pattern = "|".join(map(re.escape, self.placeholders)) or r"(?!)"
        for index, chunk in enumerate(re.split(f"({pattern})", text)):
            if index % 2:
                sizes = self.modalities[self.placeholders[chunk]]
                ids += [sizes["token_id"]] * (sizes["n_prefix"] + sizes["n_tokens"] + sizes["n_suffix"])
                continue
            bos = self.tokenizer.bos_token or ""
            if index == 0 and bos and chunk.startswith(bos):
                ids, chunk = [self.tokenizer.bos_token_id], chunk.removeprefix(bos)
            if chunk.startswith(" ") and self._encoded(" a") == self._encoded("a"):
                chunk = " " + chunk  # the tokenizer takes the first for the one that it puts before every text
            ids += self._encoded(chunk) if chunk else []
        return ids

    def _encoded(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found


class RoutedForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Every token uses the decoder's weights and its owner's update: a medium's that of its modality, all others that of text.

    Where a medium stands, `input_ids` have its modality's `token_id`; prefix, projected features and suffix take its place.
    """

    config: RoutedConfig
    config_class = RoutedConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    input_modalities = ("text",)  # those that need a library of transformers' own to be read
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.decoder: Any = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.routes = Routes()
        self.linears = route_linears(self.decoder, self.routes)
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        self.prefix_tokens, self.suffix_tokens = nn.ParameterDict(), nn.ParameterDict()
        width = config.text_config.hidden_size
        for name, sizes in config.modalities.items():
            self.encoders[name] = encoder(sizes["encoder"]["name"])(**sizes["encoder"]["settings"])
            settings = {key: value for key, value in sizes["projector"].items() if key != "type"}
            self.projectors[name] = projector(sizes["projector"]["type"])(**settings)
            for side, tokens in (("prefix", self.prefix_tokens), ("suffix", self.suffix_tokens)):
                if sizes[f"n_{side}"]:
                    tokens[name] = nn.Parameter(torch.zeros(1, sizes[f"n_{side}"], width))
        for owner, update in config.updates.items():
            for slot in self.linears if update["linears"] is None else update["linears"]:
                linear: RoutedLinear = self.linears[slot]
                up, down = (
                    torch.zeros(linear.out_features, update["rank"]),
                    torch.zeros(update["rank"], linear.in_features),
                )
                linear.add(owner, LowRank(up, down), scale=update["scale"])
        for slot in config.text_linears:
            linear = self.linears[slot]
            linear.text_weight = nn.Parameter(torch.zeros(linear.out_features, linear.in_features))
        self._no_split_modules = [type(one).__name__ for one in self.encoders.values()]
        self.post_init()
        self.requires_grad_(False)

    def get_input_embeddings(self) -> Any:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.decoder.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        point_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the decoder. Media are prepared and stacked by modality, in reading order over the batch."""
        given = {"image": pixel_values, "audio": input_features, "video": pixel_values_videos, "point": point_values}
        media = {name: values for name, values in given.items() if values is not None}
        owners = None
        if inputs_embeds is None:
            assert input_ids is not None
            owners = self.owners(input_ids, media)
            table = self.get_input_embeddings()
            inputs_embeds = table(input_ids if owners is None else input_ids.masked_fill(owners > 0, 0))
            for name, values in media.items():
                own = input_ids == self.config.modalities[name]["token_id"]
                inputs_embeds = self._placed(inputs_embeds, own, name, values)
        with self.routes.use(self._paths(owners), self.config.owners):
            output: CausalLMOutputWithPast = self.decoder(
                attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        return output

    def owners(self, input_ids: Tensor, media: dict[str, Tensor]) -> Tensor | None:
        """The owner of every token (batch, tokens) of a prompt with media; None where all are text."""
        if not media:
            return None
        owners = torch.zeros_like(input_ids)
        for name in media:
            owners[input_ids == self.config.modalities[name]["token_id"]] = self.config.owners.index(name)
        return owners

    def _placed(self, embeddings: Tensor, own: Tensor, name: str, values: Tensor) -> Tensor:
        with _in_full_precision(self.encoders[name]) as to:
            features = self.encoders[name](values.to(**to))
        with _in_full_precision(self.projectors[name]) as to:
            parts = [self.projectors[name](features.to(**to))]
        if name in self.prefix_tokens:
            parts.insert(0, self.prefix_tokens[name].to(parts[0]).expand(len(values), -1, -1))
        if name in self.suffix_tokens:
            parts.append(self.suffix_tokens[name].to(parts[0]).expand(len(values), -1, -1))
        tokens = torch.cat(parts, 1)
        if int(own.sum()) != tokens.shape[0] * tokens.shape[1]:
            raise ValueError(
                f"{int(own.sum())} tokens belong to {name}, but {len(values)} media of {tokens.shape[1]} are given; use the "
                "processor"
            )
        return embeddings.masked_scatter(own.unsqueeze(-1), tokens.flatten(0, 1).to(embeddings))

    def _paths(self, owners: Tensor | None) -> Tensor | None:
        """Owners by the weights they use: a modality without an update of its own uses the text path."""
        if owners is None:
            return None
        shared = [index for index, name in enumerate(self.config.owners) if index and name not in self.config.updates]
        for index in shared:
            owners = owners.masked_fill(owners.eq(index), 0)
        return owners

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers: the media of a row stay together."""
        media = {name: kwargs.pop(key, None) for name, key in INPUTS.items()}
        prompts = kwargs.get("input_ids")
        ids, expanded = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        for name, values in media.items():
            if values is not None and prompts is not None:
                sizes = self.config.modalities[name]
                length = sizes["n_prefix"] + sizes["n_tokens"] + sizes["n_suffix"]
                rows = values.split(((prompts == sizes["token_id"]).sum(1) // length).tolist())
                expanded[INPUTS[name]] = torch.cat([row for row in rows for _ in range(expand_size)])
        return ids, expanded

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        media = {name: kwargs.pop(name, None) for name in INPUTS.values()}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        # generated tokens are text; the cache keeps what the media contributed
        return inputs | media if is_first_iteration or not kwargs.get("use_cache", True) else inputs


@contextmanager
def _in_full_precision(module: nn.Module) -> Iterator[dict[str, Any]]:
    """16-bit weights on a CPU as float32 while the block runs; gives the device and type of inputs."""
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if weight is None or weight.dtype not in HALF or weight.device.type != "cpu":
        yield {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
        return
    module.float()
    try:
        yield {"dtype": torch.float32}
    finally:
        module.to(weight.dtype)


if not __name__.startswith(
    "modalloy."
):  # beside a checkpoint: `transformers serve` and pipelines look the class up there
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[RoutedConfig.model_type] = RoutedForConditionalGeneration.__name__
