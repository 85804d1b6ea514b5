"""Configuration of the merged model: a decoder, and per modality its encoder, projector sizes and extra tokens."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from modalloy.model.routing import TEXT


class ModalloyConfig(PreTrainedConfig):
    """`text_config` is the decoder's own config. `modalities` maps a name to a dictionary with

    - `encoder`: where its encoder is (a name in `modalloy.encoders.ENCODERS`)
    - `dim`, `n_tokens`: width and number of the encoder's features per medium
    - `n_prefix`, `n_suffix`: trained tokens around them, owned by the modality
    - `rank`: rank of its own low-rank update, 0 if its tokens use the text path (ModelCompose's `lora_strategy: same`)

    `text_rank` is the rank of the text path's update, 0 for none.
    """

    model_type = "modalloy"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        modalities: dict[str, dict[str, Any]] | None = None,
        text_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config if text_config is not None else CONFIG_MAPPING["llama"]()
        self.modalities = modalities or {}
        self.text_rank = text_rank
        # transformers hands its choice of attention down to sub-configs, also when it has none yet: keep the decoder's
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        super().__init__(**kwargs)

    @property
    def owners(self) -> tuple[str, ...]:
        """Names that an owner index stands for: 0 is text, then the modalities in order."""
        return (TEXT, *self.modalities)

    def tokens_per_medium(self, modality: str) -> int:
        """Length that one medium takes in the decoder's sequence: prefix, features and suffix."""
        sizes = self.modalities[modality]
        return int(sizes["n_prefix"] + sizes["n_tokens"] + sizes["n_suffix"])
