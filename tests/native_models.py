"""Tiny random models of transformers' own multimodal classes, and one medium for each: what their processors would give."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

WIDTH, VOCABULARY, LAYERS = 64, 320, 2
SIGN, VIDEO_SIGN, OPEN, CLOSE = 300, 301, 303, 304  # a medium's token, a video's, and the wrapper's
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
UNTIED = {"tie_word_embeddings": False}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SOUND = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_mel_bins": 16,
}
THREE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


@dataclass
class Medium:
    """One medium as a processor gives it: its tokens, its tensors, and tensors that go with the tokens."""

    modality: str
    ids: list[int]
    tensors: dict[str, Tensor]
    beside: dict[str, list[int]] = field(default_factory=dict)  # one number for each token; 0 at text

    def inputs(self, before: list[int], after: list[int], times: int = 1) -> dict[str, Tensor]:
        """A prompt with the medium between two texts, `times` in a row, tensors stacked."""
        ids = [*before, *self.ids * times, *after]
        found = {name: torch.cat([value] * times) for name, value in self.tensors.items()}
        found |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for name, values in self.beside.items():
            found[name] = torch.tensor([[0] * len(before) + values * times + [0] * len(after)])
        return found


Made = tuple[Any, Medium]
MAKERS: dict[str, Callable[[], Made]] = {}


def maker(function: Callable[[], Made]) -> Callable[[], Made]:
    MAKERS[function.__name__] = function
    return function


def built(config: Any, cls: str, seed: int = 1) -> Any:
    """A model with random weights, of a config."""
    torch.manual_seed(seed)
    return getattr(transformers, cls)(config).eval().requires_grad_(False)


def text(kind: str, **more: Any) -> Any:
    """The config of a tiny language model."""
    tied = {} if more.pop("tied", False) else UNTIED
    return getattr(transformers, f"{kind}Config")(**TEXT | tied | more)


def clip(size: int = 28) -> Any:
    return transformers.CLIPVisionConfig(**TOWER, image_size=size, patch_size=14)


def siglip(size: int = 28) -> Any:
    return transformers.SiglipVisionConfig(**TOWER, image_size=size, patch_size=14)


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@maker
def llava() -> Made:
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text("Llama"), image_token_index=SIGN, vision_feature_layer=-2, **UNTIED
    )
    return built(config, "LlavaForConditionalGeneration"), Medium(
        "image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 28, 28)}
    )


@maker
def llava_with_further_tokens() -> Made:
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=text("Llama", vocab_size=VOCABULARY + 8),
        image_token_index=VOCABULARY + 2,
        vision_feature_layer=-2,
        **UNTIED,
    )
    ids = [VOCABULARY + 1, *[VOCABULARY + 2] * 4, VOCABULARY + 3]
    return built(config, "LlavaForConditionalGeneration"), Medium("image", ids, {"pixel_values": pixels(1, 3, 28, 28)})


def llava_on_qwen2() -> Made:
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text("Qwen2"), image_token_index=SIGN, vision_feature_layer=-2, **UNTIED
    )
    return built(config, "LlavaForConditionalGeneration"), Medium(
        "image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 28, 28)}
    )


@maker
def vipllava() -> Made:
    config = transformers.VipLlavaConfig(
        vision_config=clip(),
        text_config=text("Llama"),
        image_token_index=SIGN,
        vision_feature_layers=(-1, -2),
        **UNTIED,
    )
    return built(config, "VipLlavaForConditionalGeneration"), Medium(
        "image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 28, 28)}
    )


@maker
def llava_next() -> Made:
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=text("Mistral", sliding_window=None),
        image_token_index=SIGN,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        **UNTIED,
    )
    tensors = {"pixel_values": pixels(1, 5, 3, 28, 28), "image_sizes": torch.tensor([[40, 70]])}
    return built(config, "LlavaNextForConditionalGeneration"), Medium("image", [SIGN] * 14, tensors)


@maker
def llava_onevision() -> Made:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text("Qwen2"),
        image_token_id=SIGN,
        video_token_id=VIDEO_SIGN,
        image_token_index=SIGN,
        video_token_index=VIDEO_SIGN,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        **UNTIED,
    )
    tensors = {"pixel_values": pixels(1, 5, 3, 28, 28), "image_sizes": torch.tensor([[40, 70]])}
    return built(config, "LlavaOnevisionForConditionalGeneration"), Medium("image", [SIGN] * 14, tensors)


def _idefics(cls: str) -> Made:
    config = getattr(transformers, f"{cls}Config")(
        vision_config={**TOWER, "image_size": 56, "patch_size": 14},
        text_config=text("Llama"),
        image_token_id=SIGN,
        scale_factor=2,
        **UNTIED,
    )
    ids = [OPEN, *[SIGN] * 4, CLOSE, OPEN, *[SIGN] * 4, CLOSE]
    return built(config, f"{cls}ForConditionalGeneration"), Medium(
        "image", ids, {"pixel_values": pixels(1, 2, 3, 56, 56)}
    )


@maker
def idefics3() -> Made:
    return _idefics("Idefics3")


@maker
def smolvlm() -> Made:
    return _idefics("SmolVLM")


@maker
def internvl() -> Made:
    config = transformers.InternVLConfig(
        text_config=text("Qwen2"),
        vision_config=transformers.InternVLVisionConfig(**TOWER, image_size=[28, 28], patch_size=[14, 14]),
        image_token_id=SIGN,
        image_seq_length=1,
        **UNTIED,
    )
    ids = [OPEN, SIGN, SIGN, CLOSE]
    return built(config, "InternVLForConditionalGeneration"), Medium(
        "image", ids, {"pixel_values": pixels(2, 3, 28, 28)}
    )


def internvl_on_qwen3() -> Made:
    config = transformers.InternVLConfig(
        text_config=text("Qwen3", head_dim=16),
        vision_config=transformers.InternVLVisionConfig(**TOWER, image_size=[28, 28], patch_size=[14, 14]),
        image_token_id=SIGN,
        **UNTIED,
    )
    return built(config, "InternVLForConditionalGeneration"), Medium("image", [SIGN], {})


@maker
def mistral3() -> Made:
    vision = transformers.PixtralVisionConfig(**TOWER, image_size=56, patch_size=14)
    config = transformers.Mistral3Config(
        vision_config=vision,
        text_config=text("Mistral", head_dim=16),
        image_token_index=SIGN,
        spatial_merge_size=2,
        **UNTIED,
    )
    tensors = {"pixel_values": pixels(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    return built(config, "Mistral3ForConditionalGeneration"), Medium("image", [SIGN] * 4, tensors)


@maker
def got_ocr2() -> Made:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
        "window_size": 4,
    }
    config = transformers.GotOcr2Config(
        vision_config=vision, text_config=text("Qwen2"), image_token_index=SIGN, **UNTIED
    )
    return built(config, "GotOcr2ForConditionalGeneration"), Medium(
        "image", [SIGN] * 16, {"pixel_values": pixels(1, 3, 64, 64)}
    )


@maker
def cohere2_vision() -> Made:
    config = transformers.Cohere2VisionConfig(
        vision_config=siglip(56),
        text_config=text("Cohere2", tied=True, sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
        downsample_factor=2,
        image_token_id=SIGN,
        alignment_intermediate_size=64,
    )
    return built(config, "Cohere2VisionForConditionalGeneration"), Medium(
        "image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 56, 56)}
    )


@maker
def deepseek_vl() -> Made:
    config = transformers.DeepseekVLConfig(
        vision_config=siglip(), text_config=text("Llama"), image_token_id=SIGN, **UNTIED
    )
    return built(config, "DeepseekVLForConditionalGeneration"), Medium(
        "image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 28, 28)}
    )


@maker
def lighton_ocr() -> Made:
    vision = transformers.PixtralVisionConfig(**TOWER, image_size=56, patch_size=14)
    config = transformers.LightOnOcrConfig(
        vision_config=vision,
        text_config=text("Qwen3", head_dim=16),
        image_token_id=SIGN,
        spatial_merge_size=2,
        **UNTIED,
    )
    tensors = {"pixel_values": pixels(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    return built(config, "LightOnOcrForConditionalGeneration"), Medium("image", [SIGN] * 4, tensors)


@maker
def gemma3() -> Made:
    config = transformers.Gemma3Config(
        text_config=text(
            "Gemma3Text",
            tied=True,
            head_dim=16,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=siglip(56),
        image_token_id=SIGN,
        image_token_index=SIGN,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
        mm_tokens_per_image=4,
    )
    return built(config, "Gemma3ForConditionalGeneration"), Medium(
        "image",
        [OPEN, *[SIGN] * 4, CLOSE],
        {"pixel_values": pixels(1, 3, 56, 56)},
        {"token_type_ids": [0, 1, 1, 1, 1, 0]},
    )


def _qwen(cls: str, vision: dict[str, Any], **more: Any) -> Made:
    config = getattr(transformers, f"{cls}Config")(
        text_config=TEXT | {"rope_parameters": THREE | more.pop("rope", {})} | more,
        vision_config=vision,
        image_token_id=SIGN,
        video_token_id=VIDEO_SIGN,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
        **UNTIED,
    )
    patch = vision["patch_size"]
    tensors = {"pixel_values": pixels(24, 3 * 2 * patch**2), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    beside = {"mm_token_type_ids": [0, *[1] * 6, 0]}
    return built(config, f"{cls}ForConditionalGeneration"), Medium("image", [OPEN, *[SIGN] * 6, CLOSE], tensors, beside)


@maker
def qwen2_vl() -> Made:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    return _qwen("Qwen2VL", vision)


@maker
def qwen2_5_vl() -> Made:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": WIDTH,
        "num_heads": 4,
        "patch_size": 14,
        "fullatt_block_indexes": [1],
    }
    return _qwen("Qwen2_5_VL", vision)


@maker
def qwen3_vl() -> Made:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": WIDTH,
        "num_heads": 4,
        "patch_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen("Qwen3VL", vision, rope={"mrope_interleaved": True}, head_dim=16)


@maker
def video_llava() -> Made:
    config = transformers.VideoLlavaConfig(
        vision_config=clip(),
        text_config=text("Llama"),
        image_token_index=SIGN,
        video_token_index=VIDEO_SIGN,
        vision_feature_layer=-2,
        **UNTIED,
    )
    tensors = {"pixel_values_videos": pixels(1, 8, 3, 28, 28)}
    return built(config, "VideoLlavaForConditionalGeneration"), Medium("video", [VIDEO_SIGN] * 40, tensors)


@maker
def qwen2_audio() -> Made:
    sound = transformers.Qwen2AudioEncoderConfig(
        num_mel_bins=16,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        d_model=32,
        max_source_positions=1500,
    )
    config = transformers.Qwen2AudioConfig(
        audio_config=sound, text_config=text("Qwen2"), audio_token_id=SIGN, audio_token_index=SIGN, **UNTIED
    )
    mask = torch.zeros(1, 3000, dtype=torch.long)
    mask[:, :60] = 1
    tensors = {"input_features": pixels(1, 16, 3000), "feature_attention_mask": mask}
    return built(config, "Qwen2AudioForConditionalGeneration"), Medium("audio", [OPEN, *[SIGN] * 15, CLOSE], tensors)


@maker
def audioflamingo3(rope: bool = False) -> Made:
    """With `rope`, on the base that Qwen2-VL's tiny model has."""
    more: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = transformers.AudioFlamingo3Config(
        audio_config={**SOUND, "max_source_positions": 1500},
        text_config=text("Qwen2", **(more if rope else {})),
        audio_token_id=SIGN,
        **UNTIED,
    )
    mask = torch.zeros(1, 3000, dtype=torch.long)
    mask[:, :40] = 1
    tensors = {"input_features": pixels(1, 16, 3000), "input_features_mask": mask}
    return built(config, "AudioFlamingo3ForConditionalGeneration"), Medium("audio", [SIGN] * 10, tensors)


@maker
def voxtral() -> Made:
    sound = transformers.VoxtralEncoderConfig(**SOUND | {"intermediate_size": 128}, max_source_positions=32)
    config = transformers.VoxtralConfig(audio_config=sound, text_config=text("Llama"), audio_token_id=SIGN)
    return built(config, "VoxtralForConditionalGeneration"), Medium(
        "audio", [OPEN, *[SIGN] * 8], {"input_features": pixels(1, 16, 64)}
    )


@maker
def granite_speech() -> Made:
    config = transformers.GraniteSpeechConfig(
        text_config=text(
            "Granite",
            tied=True,
            vocab_size=VOCABULARY + 1,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.0156,
            logits_scaling=8.0,
        ),
        encoder_config=transformers.GraniteSpeechEncoderConfig(
            input_dim=32,
            num_layers=2,
            hidden_dim=32,
            feedforward_mult=2,
            num_heads=4,
            dim_head=8,
            output_dim=20,
            context_size=20,
            max_pos_emb=32,
            conv_kernel_size=5,
        ),
        projector_config=transformers.Blip2QFormerConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32
        ),
        audio_token_id=VOCABULARY,
        downsample_rate=5,
        window_size=15,
        has_lora_adapter=False,
    )
    return built(config, "GraniteSpeechForConditionalGeneration"), Medium(
        "audio", [VOCABULARY] * 9, {"input_features": pixels(1, 40, 32)}
    )


@maker
def glmasr() -> Made:
    sound = {**SOUND, "num_key_value_heads": 4, "max_position_embeddings": 64}
    config = transformers.GlmAsrConfig(audio_config=sound, text_config=text("Llama"), audio_token_id=SIGN)
    mask = torch.ones(1, 80, dtype=torch.long)
    tensors = {"input_features": pixels(1, 16, 80), "input_features_mask": mask}
    return built(config, "GlmAsrForConditionalGeneration"), Medium("audio", [SIGN] * 10, tensors)


@maker
def qwen3_asr() -> Made:
    sound = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "n_window": 50,
        "n_window_infer": 100,
        "downsample_hidden_size": 8,
        "output_dim": WIDTH,
        "max_position_embeddings": 13,
    }
    config = transformers.Qwen3ASRConfig(
        audio_config=sound, text_config=text("Qwen3", head_dim=16), audio_token_id=SIGN, **UNTIED
    )
    mask = torch.ones(1, 200, dtype=torch.long)
    tensors = {"input_features": pixels(1, 16, 200), "input_features_mask": mask}
    return built(config, "Qwen3ASRForConditionalGeneration"), Medium("audio", [OPEN, *[SIGN] * 26, CLOSE], tensors)


@maker
def fun_asr_nano() -> Made:
    sound = {
        **TOWER,
        "num_mel_bins": 4,
        "num_stacked_frames": 4,
        "num_timestamp_prediction_layers": 1,
        "hidden_size": 32,
    }
    adaptor = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = transformers.FunAsrNanoConfig(
        audio_config=sound,
        adaptor_config=adaptor | {"projector_hidden_size": 48},
        text_config=text("Qwen3", head_dim=16),
        audio_token_id=SIGN,
        **UNTIED,
    )
    mask = torch.ones(1, 9, dtype=torch.long)
    tensors = {"input_features": pixels(1, 9, 16), "input_features_mask": mask}
    return built(config, "FunAsrNanoForConditionalGeneration"), Medium("audio", [SIGN] * 9, tensors)


@maker
def phi4_multimodal() -> Made:
    sound = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "audio_token_id": SIGN,
        "nemo_conv_channels": 32,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "input_size": 16,
        "bias_max_distance": 50,
    }
    config = transformers.Phi4MultimodalConfig(
        **TEXT | {"num_key_value_heads": 2},
        original_max_position_embeddings=512,
        sliding_window=None,
        vision_config={**TOWER, "image_size": 28, "patch_size": 14, "crop_size": 28, "image_token_id": SIGN + 1},
        audio_config=sound,
    )
    tensors = {"audio_input_features": pixels(1, 16, 16), "audio_embed_sizes": torch.tensor([2])}
    return built(config, "Phi4MultimodalForCausalLM"), Medium("audio", [OPEN, SIGN, SIGN], tensors)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% elif c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}{% endif %} {% endfor %}"
)


def renamed(tokenizer: Any, signs: dict[int, str]) -> Any:
    """A tokenizer of words with other names for some of its tokens, which are special."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = {index: word for word, index in content["model"]["vocab"].items()} | signs
    content["model"]["vocab"] = {word: index for index, word in words.items()}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **special)
    made.add_special_tokens({"additional_special_tokens": list(signs.values())})
    return made


def write_image_processor(folder: Path, tokenizer: Any) -> None:
    """LLaVA's processor for the tiny tower."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sized = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    options: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    own = renamed(tokenizer, {SIGN: "<image>"})
    transformers.LlavaProcessor(
        sized, own, num_additional_image_tokens=1, chat_template=TEMPLATE, **options
    ).save_pretrained(folder)


def write_audio_processor(folder: Path, tokenizer: Any) -> None:
    """Qwen2-Audio's processor, with its own chat template; sounds of up to 30 s."""
    own = renamed(tokenizer, {SIGN: "<|AUDIO|>", OPEN: "<|audio_bos|>", CLOSE: "<|audio_eos|>"})
    transformers.Qwen2AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), own).save_pretrained(folder)
