"""What do merges of public native checkpoints take? Plans of true shapes, from headers alone: no weight is there.

    python benchmarks/native_plans.py [--root build/bench/plans] [--only NAME …]

Each group has one base. Its models are written as files of a true header and no data (sparse files), with configs made from
transformers' classes and the published sizes, as far as these are known here: nothing was downloaded. `modalloy plan` reads
them in a process of its own. Per group: the weights that are merged, bytes that a merge would read and write, and the plan's
own time and memory. Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from measuring import machine, run, table

TOKENS = json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
CLIP_L = hf.CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
VICUNA: dict[str, Any] = {"vocab_size": 32000, "rms_norm_eps": 1e-5}
QWEN7: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
QWEN3_SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SMOL: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
}
LLAMA31: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
MISTRAL7: dict[str, Any] = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
MISTRAL24: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
}
WHISPER_L: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "num_mel_bins": 128,
}
UNTIED = {"tie_word_embeddings": False}
MOE: dict[str, Any] = {  # of Qwen3-VL-30B-A3B
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
}
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
Makers = dict[str, tuple[str | None, Callable[[], Any]]]


def llama(**sizes: Any) -> Any:
    return hf.LlamaConfig(**{"intermediate_size": 11008} | sizes)


def siglip(size: int) -> Any:
    return hf.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=size,
        patch_size=14,
    )


def qwen2_vl() -> Any:
    text = QWEN7 | {"rope_parameters": QWEN7["rope_parameters"] | {"mrope_section": [16, 24, 24]}}
    config = hf.Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 3584}, tie_word_embeddings=False)
    return hf.Qwen2VLForConditionalGeneration(config)


def internvl(text: Any, tied: bool) -> Any:
    vision = hf.InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448]
    )
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    )


def qwen3_vl_moe() -> Any:
    vision = {"out_hidden_size": 2048}
    config = hf.Qwen3VLMoeConfig(text_config=MOE, vision_config=vision, tie_word_embeddings=False)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


GROUPS: dict[str, tuple[Callable[[], Any], Makers]] = {
    "Vicuna-7B v1.5": (
        lambda: hf.LlamaForCausalLM(llama(**VICUNA)),
        {
            "llava-1.5-7b": (
                "image",
                lambda: hf.LlavaForConditionalGeneration(
                    hf.LlavaConfig(vision_config=CLIP_L, text_config=llama(**VICUNA | {"vocab_size": 32064}), **UNTIED)
                ),
            ),
            "Video-LLaVA-7B": (
                "video",
                lambda: hf.VideoLlavaForConditionalGeneration(
                    hf.VideoLlavaConfig(text_config=llama(**VICUNA | {"vocab_size": 32064}), **UNTIED)
                ),
            ),
        },
    ),
    "Qwen2.5-7B": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**QWEN7)),
        {
            "InternVL3-8B": ("image", lambda: internvl(hf.Qwen2Config(**QWEN7 | {"vocab_size": 151674}), tied=False)),
            "audio-flamingo-3": (
                "audio",
                lambda: hf.AudioFlamingo3ForConditionalGeneration(
                    hf.AudioFlamingo3Config(
                        audio_config={**WHISPER_L, "max_source_positions": 1500},
                        text_config=hf.Qwen2Config(**QWEN7 | {"vocab_size": 151672}),
                        **UNTIED,
                    )
                ),
            ),
        },
    ),
    "Qwen3-0.6B": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**QWEN3_SMALL, tie_word_embeddings=True)),
        {
            "InternVL3_5-1B": ("image", lambda: internvl(hf.Qwen3Config(**QWEN3_SMALL), tied=True)),
            "Fun-ASR-Nano": (
                "audio",
                lambda: hf.FunAsrNanoForConditionalGeneration(
                    hf.FunAsrNanoConfig(text_config=hf.Qwen3Config(**QWEN3_SMALL), tie_word_embeddings=True)
                ),
            ),
        },
    ),
    "SmolLM2-135M": (
        lambda: hf.LlamaForCausalLM(llama(**SMOL)),
        {
            "SmolVLM-256M": (
                "image",
                lambda: hf.SmolVLMForConditionalGeneration(
                    hf.SmolVLMConfig(
                        text_config=llama(**SMOL | {"vocab_size": 49280}),
                        vision_config={
                            "hidden_size": 768,
                            "intermediate_size": 3072,
                            "num_hidden_layers": 12,
                            "num_attention_heads": 12,
                            "image_size": 512,
                            "patch_size": 16,
                        },
                        scale_factor=4,
                        tie_word_embeddings=True,
                    )
                ),
            )
        },
    ),
    "Qwen2-7B": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**QWEN7)),
        {
            "llava-onevision-7b": (
                "video",
                lambda: hf.LlavaOnevisionForConditionalGeneration(
                    hf.LlavaOnevisionConfig(
                        vision_config=siglip(384),
                        text_config=hf.Qwen2Config(**QWEN7 | {"vocab_size": 152000}),
                        **UNTIED,
                    )
                ),
            ),
            "Qwen2-VL-7B": ("image", qwen2_vl),
        },
    ),
    "Llama-3.1-8B": (
        lambda: hf.LlamaForCausalLM(llama(**LLAMA31)),
        {
            "Idefics3-8B": (
                "image",
                lambda: hf.Idefics3ForConditionalGeneration(
                    hf.Idefics3Config(
                        text_config=llama(**LLAMA31 | {"vocab_size": 128259}),
                        vision_config={"image_size": 364},
                        **UNTIED,
                    )
                ),
            )
        },
    ),
    "Mistral-7B v0.2": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**MISTRAL7)),
        {
            "llava-v1.6-mistral-7b": (
                "image",
                lambda: hf.LlavaNextForConditionalGeneration(
                    hf.LlavaNextConfig(
                        vision_config=CLIP_L,
                        text_config=hf.MistralConfig(**MISTRAL7 | {"vocab_size": 32064}),
                        image_grid_pinpoints=GRID,
                        **UNTIED,
                    )
                ),
            )
        },
    ),
    "Qwen3-VL-30B-A3B": (qwen3_vl_moe, {"one fine-tune": (None, qwen3_vl_moe), "another": (None, qwen3_vl_moe)}),
    "Mistral-Small-24B": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**MISTRAL24, sliding_window=None)),
        {
            "Mistral-Small-3.1-24B": (
                "image",
                lambda: hf.Mistral3ForConditionalGeneration(
                    hf.Mistral3Config(text_config=hf.MistralConfig(**MISTRAL24, sliding_window=None), **UNTIED)
                ),
            ),
            "Voxtral-Small-24B": (
                "audio",
                lambda: hf.VoxtralForConditionalGeneration(
                    hf.VoxtralConfig(text_config=llama(**MISTRAL24), audio_config=WHISPER_L)
                ),
            ),
        },
    ),
}


def write(folder: Path, make: Callable[[], Any]) -> int:
    """A folder whose weights are a true header and no data; the bytes that the file claims to have."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = make()
    tied, at = model.all_tied_weights_keys, 0
    header: Any = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            size = 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENS)
    (folder / "preprocessor_config.json").write_text("{}")
    return at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/bench/plans"))
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    args = parser.parse_args()
    rows, found = [], {}
    for name in args.only:
        base, models = GROUPS[name]
        root = (args.root / name.replace(" ", "-")).resolve()
        given = write(root / "base", base)
        entries = []
        for label, (modality, make) in models.items():
            given += write(root / label, make)
            entries.append({"model": str(root / label), "modality": modality})
        is_omni = entries[0]["modality"] is not None
        output = {"form": "omni", "chat_template": "base"} if is_omni else {"form": "full"}
        recipe = {"base_model": str(root / "base"), "models": entries, "output": output}
        (root / "recipe.yaml").write_text(json.dumps(recipe))
        usage, printed = run([sys.executable, "-m", "modalloy.cli", "plan", root / "recipe.yaml", "--json"])
        plan = json.loads(printed)
        seen = {
            "models": list(models),
            "given_bytes": given,
            "merged_weights": plan["merged_weights"],
            "counts": plan["counts"],
            "read_bytes": plan["read_bytes"],
            "write_bytes": plan["write_bytes"],
            "seconds": round(usage.seconds, 2),
            "peak_bytes": usage.peak_bytes,
        }
        found[name] = seen
        sizes = [f"{seen[key] / 1e9:.1f}" for key in ("given_bytes", "read_bytes", "write_bytes")]
        rows.append(
            [
                name,
                " + ".join(models),
                str(seen["merged_weights"]),
                *sizes,
                f"{usage.seconds:.1f}",
                f"{usage.peak_bytes / 1e9:.2f}",
            ]
        )
    print(table(["base", "specialists", "merged", "given GB", "read GB", "written GB", "plan s", "peak GB"], rows))
    print(json.dumps({"benchmark": "native_plans", "groups": found} | machine()))


if __name__ == "__main__":
    main()
