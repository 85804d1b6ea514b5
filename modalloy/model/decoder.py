"""The decoder of a merged model: transformers' own language model, or the text part of a multimodal class with a head."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING


class TextDecoder(PreTrainedModel):
    """The text part of a multimodal class, whose positions are of three kinds, under the names of a plain language model."""

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model: Any = AutoModel.from_config(config, trust_remote_code=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, logits_to_keep: int = 0, **given: Any) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary), of the last `logits_to_keep` tokens if that is not 0."""
        output = self.model(**given)
        hidden: Tensor = output.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def build_decoder(config: Any) -> Any:
    """The decoder with this config, of any class that transformers has a language model or a text model for."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return TextDecoder(config)
