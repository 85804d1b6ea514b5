"""The merged model: any Llama-shaped decoder of transformers, routed, with one projector and encoder per modality."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from modalloy.delta import LowRank, norm
from modalloy.errors import CheckpointError, shown
from modalloy.machine.memory import release_memory
from modalloy.model.config import ModalloyConfig, tokens_per_medium
from modalloy.model.decoder import build_decoder
from modalloy.model.opening import check_loaded, check_stored, one_loader, stored_in
from modalloy.model.quantised import check_writable, only_the_base, settle
from modalloy.model.routing import HALF, TEXT, RoutedLinear, Routes, route_linears
from modalloy.model.sequence import Features, blocks_of, by_row, deepstack, masks, seen_together, three_positions
from modalloy.outputs.omni import write_remote_code
from modalloy.senses.anatomy import takes_three_positions
from modalloy.senses.encoders import build
from modalloy.senses.native import Block, NativeSense, Prepared
from modalloy.senses.projectors import build_projector


class ModalloyForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about any mixture of modalities (SSAM section 3; ModelCompose's routing).

    Inputs carry `owners` (batch, tokens): 0 for text, i for the i-th modality of the config. A medium's positions
    (prefix, features, suffix) belong to its modality and use that modality's own low-rank update; every other token,
    and every generated one, uses the text path. One causal attention runs over all of them.

    On a CPU, weights and activations in 16 bits stay so, and products are made in float32.
    """

    config: ModalloyConfig
    config_class = ModalloyConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    input_modalities = ("text", "image", "audio", "video", "point")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ModalloyConfig) -> None:
        super().__init__(config)
        self.decoder: Any = build_decoder(config.text_config)
        self.has_three_positions = takes_three_positions(self.decoder.base_model)
        self.routes = Routes()
        self.linears = route_linears(self.decoder, self.routes)
        self.encoders = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        self.senses = nn.ModuleDict()
        self.prefix_tokens = nn.ParameterDict()
        self.suffix_tokens = nn.ParameterDict()
        width = config.text_config.hidden_size
        for modality, sizes in config.modalities.items():
            if "like" in sizes.get("native", {}):
                continue
            if "native" in sizes:
                self.senses[modality] = NativeSense(sizes["native"]["config"], sizes["native"]["rows"], width)
                continue
            encoder = sizes["encoder"]
            encoded = self.encoders[modality] = build(encoder["name"], encoder["settings"])
            projector = self.projectors[modality] = build_projector(sizes["projector"])
            made = projector.n_tokens(encoded.n_tokens)
            if made != sizes["n_tokens"]:
                raise CheckpointError(
                    f"config.json: {modality} has n_tokens {shown(sizes['n_tokens'])}, but its projector makes {made} of what its "
                    "encoder gives; merge again"
                )
            for side, tokens in (("prefix", self.prefix_tokens), ("suffix", self.suffix_tokens)):
                if sizes[f"n_{side}"]:
                    tokens[modality] = nn.Parameter(torch.zeros(1, sizes[f"n_{side}"], width))
        for owner, update in config.updates.items():
            for slot in self.linears if update["linears"] is None else update["linears"]:
                linear = self._linear(slot, config)
                up = torch.zeros(linear.out_features, update["rank"])
                down = torch.zeros(update["rank"], linear.in_features)
                linear.add(owner, LowRank(up, down), scale=update["scale"])
        for slot in config.text_linears:
            linear = self._linear(slot, config)
            if slot in config.replaced:
                continue
            linear.text_weight = nn.Parameter(torch.zeros(linear.out_features, linear.in_features))
        for linear in self.linears.values():
            linear.folded = config.folded
        check_stored(self)
        self._no_split_modules = [type(encoder).__name__ for encoder in self.encoders.values()]
        self.post_init()
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model of an `omni` folder (whose decoder and encoders may be elsewhere) or of `save_pretrained`'s.

        Takes transformers' options (`dtype`, `device_map`, `config`, …). A `quantization_config` must be a `TorchAoConfig`;
        it is of the decoder's blocks only, and their updates stay as they are (see `quantised`).

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape; never filled in.
        """
        from modalloy.model.load import composed_weights, local_folder

        wants_info = kwargs.pop("output_loading_info", False)
        named = pretrained_model_name_or_path or kwargs.pop("where", None)  # for messages
        config, where, folder = kwargs.get("config"), pretrained_model_name_or_path, None
        if where is not None and "state_dict" not in kwargs:
            folder = local_folder(where, kwargs)
            config = config or ModalloyConfig.from_pretrained(folder)
            if config.base_model is not None:
                for key in ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only"):
                    kwargs.pop(key, None)
                kwargs |= {"config": config, "state_dict": composed_weights(config, folder)}
                where = None
        if kwargs.get("quantization_config") is not None or hasattr(config, "quantization_config"):
            config = config or ModalloyConfig.from_pretrained(where)
            kwargs |= {"quantization_config": only_the_base(kwargs.get("quantization_config"), config, named)}
        kwargs["ignore_mismatched_sizes"] = True  # and so named, as all that the loader reports: it is refused below
        stored = kwargs.get("state_dict") or {}
        if config is not None and folder is not None and not {"subfolder", "variant", "gguf_file"} & kwargs.keys():
            stored = stored or composed_weights(config, folder)
        with one_loader(), stored_in(named, stored):
            model, info = super().from_pretrained(where, *args, output_loading_info=True, **kwargs)
        check_loaded(named, info)
        settle(model.linears)
        model.requires_grad_(False)
        release_memory()
        if model.config.base_model is not None:
            has_own = folder is not None and (folder / "generation_config.json").is_file()
            text_config = model.config.text_config
            own = (
                GenerationConfig.from_pretrained(folder) if has_own else GenerationConfig.from_model_config(text_config)
            )
            model.generation_config = own
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the whole model, decoder and encoders included, as one checkpoint of transformers."""
        check_writable(save_directory, self.linears)
        config = self.config
        self.config = config.self_contained()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config
        write_remote_code(Path(save_directory))

    def get_input_embeddings(self) -> Any:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.decoder.get_output_embeddings()

    @torch.no_grad()
    def encode(self, modality: str, media: Any) -> Any:
        """Features (media, n_features, dim) of a stack of preprocessed media, from the frozen encoder, in float32.

        Of a native modality, `media` are lists of conversations' `Prepared` media, and the features a block for each medium.
        """
        if self._is_native(modality):
            return self._blocks(modality, media)
        encoder: Any = self.encoders[modality]
        with _in_full_precision(encoder) as to:
            features: Tensor = encoder(media.to(**to))
        return features

    def _is_native(self, modality: str) -> bool:
        return "native" in self.config.modalities[modality]

    def _blocks(self, modality: str, media: Sequence[Prepared]) -> list[Block]:
        """A block for each medium; those of one conversation are encoded together."""
        sense: Any = self.senses[self.config.modalities[modality]["native"].get("like", modality)]
        found: list[Block] = []
        with _in_full_precision(sense) as to:
            for one in media:
                inputs = {
                    name: value.to(to.get("device"), to["dtype"] if value.is_floating_point() else None)
                    for name, value in one.inputs.items()
                }
                found += sense.blocks(inputs, one.places, self.get_input_embeddings())
        return found

    def embed(self, input_ids: Tensor, owners: Tensor, features: dict[str, Features]) -> Tensor:
        """Input embeddings (batch, tokens, width): text looked up, media projected into the positions they own.

        `features[modality]` is (media, n_features, dim), in reading order over the batch.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        for index, modality in enumerate(self.config.owners[1:], 1):
            own, given = owners == index, features.get(modality, ())
            if self._is_native(modality):
                parts = [one.embeddings.to(embeddings) for one in given if isinstance(one, Block)]
                if int(own.sum()) != sum(map(len, parts)):
                    raise ValueError(
                        f"{int(own.sum())} tokens belong to {modality}, but its media have {sum(map(len, parts))}"
                    )
                if parts:
                    embeddings = embeddings.masked_scatter(own.unsqueeze(-1), torch.cat(parts))
                continue
            media, length = len(given), tokens_per_medium(self.config.modalities[modality])
            if int(own.sum()) != media * length:
                raise ValueError(
                    f"{int(own.sum())} tokens belong to {modality}, but {media} media of {length} tokens are given"
                )
            if media:
                assert isinstance(given, Tensor)
                tokens = self.project(modality, given).flatten(0, 1)
                embeddings = embeddings.masked_scatter(
                    own.unsqueeze(-1), tokens.to(embeddings.device, embeddings.dtype)
                )
        return embeddings

    def project(self, modality: str, features: Tensor) -> Tensor:
        """Tokens (media, tokens, width) of media: the prefix, the projected features, the suffix."""
        projector: Any = self.projectors[modality]
        with _in_full_precision(projector) as to:
            parts = [projector(features.to(**to))]
        count = len(features)
        if modality in self.prefix_tokens:
            parts.insert(0, self.prefix_tokens[modality].to(parts[0]).expand(count, -1, -1))
        if modality in self.suffix_tokens:
            parts.append(self.suffix_tokens[modality].to(parts[0]).expand(count, -1, -1))
        return torch.cat(parts, 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        owners: Tensor | None = None,
        media: dict[str, Any] | None = None,
        features: dict[str, Features] | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the decoder. Without `owners` every token is text.

        `media` holds preprocessed media by modality, stacked in reading order over the batch; `features` may hold what
        the encoders made of them instead. Of native modalities both are lists (see `encode`).
        """
        kwargs.pop("position_delta", None)
        if inputs_embeds is None:
            assert input_ids is not None
            if features is None:
                features = {modality: self.encode(modality, stack) for modality, stack in (media or {}).items()}
            if owners is None and features:
                raise ValueError(
                    "media are given without `owners`, which say where their tokens are; use the processor"
                )
            text = self.get_input_embeddings()
            inputs_embeds = text(input_ids) if owners is None else self.embed(input_ids, owners, features)
            if owners is not None and (blocks := blocks_of(features, self.config.owners)):
                kwargs |= deepstack(owners, blocks, inputs_embeds)
                if self.has_three_positions and getattr(kwargs.get("position_ids"), "ndim", 2) < 3:
                    kwargs["position_ids"] = three_positions(owners, attention_mask, blocks)[0]
                if (groups := seen_together(owners, blocks)) is not None:
                    text_config = self.config.text_config
                    attention_mask = masks(text_config, inputs_embeds, attention_mask, groups, kwargs)
        with self.routes.use(self.path(owners), self.config.owners):
            output: CausalLMOutputWithPast = self.decoder(
                attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        return output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        routed = {name: kwargs.pop(name, None) for name in ("owners", "media", "features")}
        delta = kwargs.pop("position_delta", None)
        if delta is not None:  # else transformers counts tokens
            kwargs.pop("position_ids", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        # generated tokens are text; the cache keeps what the media contributed
        if is_first_iteration:
            return inputs | routed
        if delta is not None and kwargs.get("use_cache", True):
            new = inputs["input_ids"].shape[1]
            steps = torch.arange(input_ids.shape[1] - new, input_ids.shape[1], device=input_ids.device)
            inputs["position_ids"] = (steps + delta[:, None]).expand(3, -1, -1)
        if not kwargs.get("use_cache", True) and routed["owners"] is not None:
            grown = input_ids.shape[1] - routed["owners"].shape[1]
            inputs |= routed | {"owners": nn.functional.pad(routed["owners"], (0, grown))}
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers: media are encoded once, and their features repeated in the rows' new order."""
        owners, media = kwargs.get("owners"), kwargs.pop("media", None)
        features = kwargs.pop("features", None)
        if media is not None and features is None:
            features = {modality: self.encode(modality, stack) for modality, stack in media.items()}
        if owners is not None and features and self.has_three_positions:
            blocks = blocks_of(features, self.config.owners)
            after = three_positions(owners, kwargs.get("attention_mask"), blocks)[1]
            kwargs["position_delta"] = after - owners.shape[1]
        if features and expand_size > 1:
            assert owners is not None
            features = {
                modality: self._expanded(modality, stack, owners, expand_size) for modality, stack in features.items()
            }
        ids, expanded = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return ids, expanded | {"features": features}

    def _expanded(self, modality: str, features: Features, owners: Tensor, times: int) -> Features:
        if not isinstance(features, Tensor):
            lines = by_row(owners, self.config.owners.index(modality), features)
            return [block for line in lines for _ in range(times) for block in line]
        length = tokens_per_medium(self.config.modalities[modality])
        counts = (owners == self.config.owners.index(modality)).sum(1) // length  # media in each row
        rows = features.split(counts.tolist())
        return torch.cat([row for row in rows for _ in range(times)])

    def score_options(self, inputs: dict[str, Any], options: list[list[Tensor]]) -> list[Tensor]:
        """Log-likelihoods in nats (options,) of each prompt's options, token ids (tokens,) each. A prompt is run once.

        Prompts are padded on the left. Rows of any number of options may stand together.
        """
        logits, ids, real = self._forced(inputs, options)
        picked = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return list((picked * real).sum(1).split([len(own) for own in options]))

    def next_tokens(self, inputs: dict[str, Any], continuations: list[Tensor]) -> list[Tensor]:
        """Logits (tokens, vocabulary) at every place of each prompt's continuation, given what comes before it."""
        logits, _, real = self._forced(inputs, [[one] for one in continuations])
        return [row[own] for row, own in zip(logits, real, strict=True)]

    @torch.no_grad()
    def _forced(self, inputs: dict[str, Any], options: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (all options, tokens, vocabulary) at every place of the options, the ids there, and which are no padding."""
        mask: Tensor = inputs["attention_mask"]
        lengths = mask.sum(1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.has_three_positions and inputs.get("owners") is not None:
            blocks = blocks_of(inputs.get("features") or {}, self.config.owners)
            positions, lengths = three_positions(inputs["owners"], mask, blocks)
        prompts = self(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, device = prompts.past_key_values, mask.device
        rows = torch.arange(len(options), device=device)
        rows = rows.repeat_interleave(torch.tensor([len(own) for own in options], device=device))
        flat = [option for own in options for option in own]
        sizes = torch.tensor([[len(option)] for option in flat], device=device)
        ids = nn.utils.rnn.pad_sequence(flat, batch_first=True).to(device)
        logits = prompts.logits[:, -1:][rows]
        if ids.shape[1] > 1:  # what follows an option's last token does not matter
            cache.batch_select_indices(rows)
            steps = torch.arange(ids.shape[1] - 1, device=device)
            seen = torch.cat([mask[rows], mask.new_ones(len(flat), len(steps))], 1)
            after = lengths[rows, None] + steps
            after = after.expand(3, -1, -1) if self.has_three_positions else after
            rest = self(
                input_ids=ids[:, :-1], attention_mask=seen, position_ids=after, past_key_values=cache, use_cache=True
            ).logits
            logits = torch.cat([logits, rest], 1)
        real = torch.arange(ids.shape[1], device=device) < sizes
        return logits.float() if logits.dtype in HALF else logits, ids, real

    @torch.no_grad()
    def fold(self) -> dict[str, float]:
        """Fold the text update into the base weights, so that text tokens cost what the plain decoder's do.

        The base weight becomes round(W_0 + Δ_text). A modality's own tokens still use W_0 + Δ_m = W_0 + Δ_text + Δ_m − Δ_text,
        but for that rounding. Returns what it costs, for text and each modality that has an update of its own: the largest
        ‖error of the effective weight‖ / ‖its update‖ (Frobenius) over the linears.
        """
        if self.config.text_update is None or self.config.folded:
            raise ValueError("the text path has no low-rank update left to fold; load the model without fold")
        errors: dict[str, float] = {}
        for linear in self.linears.values():
            if TEXT not in linear.scales:
                continue
            lost = linear.fold()
            for owner in linear.scales:
                size = norm(linear.update(owner))
                errors[owner] = max(errors.get(owner, 0.0), lost / size if size else 0.0)
        self.config.folded = True
        return errors

    def path(self, owners: Tensor | None) -> Tensor | None:
        """Owners by the weights they use: a modality without an update of its own uses the text path."""
        if owners is None:
            return None
        shared = [i for i, name in enumerate(self.config.owners) if i and not self.config.modalities[name]["update"]]
        for index in shared:
            owners = owners.masked_fill(owners == index, 0)
        return owners

    def _linear(self, slot: str, config: ModalloyConfig) -> RoutedLinear:
        if slot not in self.linears:
            raise CheckpointError(
                f"{slot} is to be updated, but is no linear of a {config.text_config.model_type} decoder's blocks; "
                "use the base that the specialists were trained from"
            )
        return self.linears[slot]


@contextmanager
def _in_full_precision(module: nn.Module) -> Iterator[dict[str, Any]]:
    """16-bit weights as float32 while the block runs (which is exact, both ways); gives the device and type of inputs."""
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if weight is None:
        yield {"dtype": torch.float32}
    elif weight.dtype not in HALF:
        yield {"device": weight.device, "dtype": weight.dtype}
    else:
        stored = weight.dtype
        module.float()
        try:
            yield {"device": weight.device, "dtype": torch.float32}
        finally:
            module.to(stored)
            release_memory()
