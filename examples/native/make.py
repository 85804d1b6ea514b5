"""Two tiny native specialists of the built-in language model, to try a merge of transformers' own checkpoints without a download.

    python examples/native/make.py --out build/native

`see` is a LLaVA, `hear` a GLM-ASR, as transformers saves them, with processors and chat templates. Their towers are small and
random, and the language models are the built-in one plus a small random update: they answer, but know nothing. With real
checkpoints everything else is the same (docs/native.md).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modalloy import builtin

BASE = "builtin:smollm2-135m-instruct"
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}SIGN{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = {
    "base_model": BASE,
    "merge_method": "task_arithmetic",  # seconds on a laptop; ssam and every other method take the same recipe
    "parameters": {"scale": 0.5},
    "models": [{"model": "see"}, {"model": "hear"}],
    "output": {"form": "omni", "chat_template": "base"},
}


def tokens(sign: str) -> tuple[Any, int]:
    """The base's tokenizer with a sign for media, and the sign's number."""
    tokenizer = AutoTokenizer.from_pretrained(builtin.resolve(BASE))
    tokenizer.add_special_tokens({"additional_special_tokens": [sign]})
    return tokenizer, int(tokenizer.convert_tokens_to_ids(sign))


@torch.no_grad()
def save(model: Any, base: Any, folder: Path, seed: int) -> None:
    """The model with the base's weights and a small update in its decoder."""
    torch.manual_seed(seed)
    start = dict(base.model.named_parameters())
    for name, parameter in model.get_decoder().named_parameters():
        parameter[: len(start[name])].copy_(start[name])
        if parameter.ndim == 2 and "embed" not in name:
            up, down = torch.randn(len(parameter), 4), torch.randn(4, parameter.shape[1])
            parameter.add_(up @ down * (0.02 * float(parameter.std()) / 2))
    model.save_pretrained(folder)


def see(base: Any, folder: Path) -> None:
    tokenizer, sign = tokens("<image>")
    text = AutoConfig.from_pretrained(builtin.resolve(BASE))
    text.vocab_size = len(tokenizer)
    vision = transformers.CLIPVisionConfig(**TOWER, image_size=56, patch_size=14)
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=sign,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    save(transformers.LlavaForConditionalGeneration(config), base, folder, 1)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("SIGN", "<image>"),
    ).save_pretrained(folder)


def hear(base: Any, folder: Path) -> None:
    tokenizer, sign = tokens("<|pad|>")
    text = AutoConfig.from_pretrained(builtin.resolve(BASE))
    text.vocab_size = len(tokenizer)
    sound = {**TOWER, "num_key_value_heads": 4, "num_mel_bins": 32, "max_position_embeddings": 1500}
    config = transformers.GlmAsrConfig(
        text_config=text, audio_config=sound, audio_token_id=sign, tie_word_embeddings=True
    )
    save(transformers.GlmAsrForConditionalGeneration(config), base, folder, 2)
    features = transformers.WhisperFeatureExtractor(feature_size=32)
    template = TEMPLATE.replace("SIGN", "<|pad|>")
    transformers.GlmAsrProcessor(features, tokenizer, chat_template=template).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/native"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(builtin.resolve(BASE), dtype=torch.float32)
    see(base, out / "see")
    hear(base, out / "hear")
    (out / "recipe.yaml").write_text(json.dumps(RECIPE, indent=1))  # JSON is YAML
    print(f"{out}: see (LLaVA), hear (GLM-ASR), recipe.yaml")


if __name__ == "__main__":
    main()
