"""The merged model: any Llama-shaped decoder of transformers, routed, with one projector and encoder per modality."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from modalloy.model.config import ModalloyConfig
from modalloy.model.routing import TEXT, Routes, route_linears


class ModalloyForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about any mixture of modalities (SSAM section 3; ModelCompose's routing).

    Inputs carry `owners` (batch, tokens): 0 for text, i for the i-th modality of the config. A medium's positions
    (prefix, features, suffix) belong to its modality and use that modality's own low-rank update; every other token,
    and every generated one, uses the text path. One causal attention runs over all of them.
    """

    config_class = ModalloyConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: ModalloyConfig, decoder: Any = None) -> None:
        super().__init__(config)
        self.decoder: Any = decoder if decoder is not None else AutoModelForCausalLM.from_config(config.text_config)
        self.routes = Routes()
        self.linears = route_linears(self.decoder, self.routes)
        self.encoders = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        self.prefix_tokens = nn.ParameterDict()
        self.suffix_tokens = nn.ParameterDict()
        width = config.text_config.hidden_size
        for modality, sizes in config.modalities.items():
            self.projectors[modality] = nn.Sequential(
                nn.Linear(sizes["dim"], width), nn.GELU(), nn.Linear(width, width)
            )
            self.prefix_tokens[modality] = nn.Parameter(torch.zeros(1, sizes["n_prefix"], width))
            self.suffix_tokens[modality] = nn.Parameter(torch.zeros(1, sizes["n_suffix"], width))
        dtype = self.decoder.get_input_embeddings().weight.dtype
        for part in (self.projectors, self.prefix_tokens, self.suffix_tokens):
            part.to(dtype)  # encoders stay in float32
        self.requires_grad_(False)

    def get_input_embeddings(self) -> Any:
        return self.decoder.get_input_embeddings()

    def encode(self, modality: str, media: Tensor) -> Tensor:
        """Features (media, n_tokens, dim) of a stack of preprocessed media, from the frozen encoder."""
        with torch.no_grad():
            features: Tensor = self.encoders[modality](media)
        return features

    def embed(self, input_ids: Tensor, owners: Tensor, features: dict[str, Tensor]) -> Tensor:
        """Input embeddings (batch, tokens, width): text looked up, media projected into the positions they own.

        `features[modality]` is (media, n_tokens, dim), in reading order over the batch.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        for index, modality in enumerate(self.config.owners):
            if modality == TEXT or modality not in features:
                continue
            projected = self.projectors[modality](features[modality].to(embeddings.dtype))
            media = len(projected)
            prefix = self.prefix_tokens[modality].expand(media, -1, -1)
            suffix = self.suffix_tokens[modality].expand(media, -1, -1)
            tokens = torch.cat([prefix, projected, suffix], 1).flatten(0, 1)
            embeddings = embeddings.masked_scatter((owners == index).unsqueeze(-1), tokens)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        owners: Tensor | None = None,
        media: dict[str, Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the decoder. Without `owners` every token is text; `media` holds preprocessed media by modality."""
        if inputs_embeds is None and owners is not None and media:
            assert input_ids is not None
            features = {modality: self.encode(modality, stack) for modality, stack in media.items()}
            inputs_embeds, input_ids = self.embed(input_ids, owners, features), None
        with self.routes.use(self._path(owners), self.config.owners):
            output: CausalLMOutputWithPast = self.decoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        return output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        owners, media = kwargs.pop("owners", None), kwargs.pop("media", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration:  # generated tokens are text; the cache keeps what the media contributed
            inputs |= {"owners": owners, "media": media}
        return inputs

    @torch.no_grad()
    def score_options(self, inputs: dict[str, Any], options: list[Tensor]) -> Tensor:
        """Log-likelihood (options,) in nats of each option's token ids (tokens,) after one prompt, which is run once."""
        prompt = self(**inputs, use_cache=True, logits_to_keep=1)
        cache: DynamicCache = prompt.past_key_values
        length, device = max(len(option) for option in options), prompt.logits.device
        cache.batch_repeat_interleave(len(options))
        ids = torch.stack([nn.functional.pad(option, (0, length - len(option))) for option in options]).to(device)
        first = prompt.logits[:, -1:].expand(len(options), 1, -1)
        rest = self(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, :-1]
        picked = torch.cat([first, rest], 1).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        lengths = torch.tensor([[len(option)] for option in options], device=device)
        real = torch.arange(length, device=device) < lengths
        return (picked * real).sum(1)

    def _path(self, owners: Tensor | None) -> Tensor | None:
        """Owners by the weights they use: a modality without an update of its own uses the text path."""
        if owners is None:
            return None
        shared = [i for i, name in enumerate(self.config.owners) if i and not self.config.modalities[name]["rank"]]
        for index in shared:
            owners = owners.masked_fill(owners == index, 0)
        return owners
