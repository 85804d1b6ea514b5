"""Does one model that sees and one that hears become one on a laptop? Qwen3-VL-2B and Qwen3-ASR-1.7B, true shapes.

    python benchmarks/native_qwen3.py [--root build/bench] [--layers N] [--method ssam]

A bfloat16 Qwen3-1.7B with random weights, and two native specialists whose decoders are it plus updates whose
singular values fall as 1 / j: a Qwen3-VL-2B with its
tower and deepstack, a Qwen3-ASR with its encoder, as transformers saves them. `modalloy merge` (omni) makes one folder of
them; another process loads it and answers a prompt with a picture of 1,024 patches and a sound of 8 s. The tensors of both
media are random, as processors would give them: Qwen3-VL's own needs torchvision. The rotary base is one for all three here;
the published models' differ (5e6 against 1e6), and are refused. Weights stay in 16 bits; a CPU computes in float32. Prints a
table, then one JSON document as its last line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import folder_bytes, machine, merge, run, table

ROPE = {"rope_type": "default", "rope_theta": 1e6}
TEXT: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}
SEEN, HEARD = 151655, 151676  # the signs of a picture's and a sound's tokens
LIMIT_BYTES = 20e9
TOKENS = json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})


def models(layers: int) -> dict[str, Callable[[], Any]]:
    """What makes the base and the specialists, on the device and in the type that are set."""
    import transformers

    def see() -> Any:
        vision = {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        }
        text = TEXT | {"num_hidden_layers": layers}
        text["rope_parameters"] = ROPE | {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
        config = transformers.Qwen3VLConfig(
            text_config=text, vision_config=vision, image_token_id=SEEN, tie_word_embeddings=True
        )
        return transformers.Qwen3VLForConditionalGeneration(config)

    def hear() -> Any:
        text = TEXT | {"num_hidden_layers": layers, "rope_parameters": ROPE}
        sound = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}
        config = transformers.Qwen3ASRConfig(
            text_config=transformers.Qwen3Config(**text),
            audio_config=sound | {"output_dim": 2048},
            audio_token_id=HEARD,
            tie_word_embeddings=True,
        )
        return transformers.Qwen3ASRForConditionalGeneration(config)

    def base() -> Any:
        config = transformers.Qwen3Config(**TEXT | {"num_hidden_layers": layers, "rope_parameters": ROPE})
        return transformers.Qwen3ForCausalLM(config)

    return {"base": base, "see": see, "hear": hear}


def update(rows: int, columns: int, rank: int = 256) -> torch.Tensor:
    """What training changes of a weight: singular values that fall as 1 / j, the first 0.5."""
    values = 0.5 / torch.arange(1, rank + 1, dtype=torch.float32)
    up, down = torch.randn(rows, rank, dtype=torch.float32), torch.randn(rank, columns, dtype=torch.float32)
    return (up * values / rows**0.5) @ (down / columns**0.5)


@torch.no_grad()
def write(root: Path, layers: int) -> None:
    """The three folders, where they are not there yet."""
    torch.set_default_dtype(torch.bfloat16)
    start: dict[str, Any] = {}
    for seed, (name, make) in enumerate(models(layers).items()):
        folder = root / name
        if (folder / "done").exists() and not (name == "base" and not start):
            continue
        torch.manual_seed(seed)
        model = make().eval()
        if name == "base":
            torch.manual_seed(seed)
            start = dict(model.model.named_parameters())
        for own, parameter in model.get_decoder().named_parameters() if name != "base" else ():
            parameter.copy_(start[own])
            if parameter.ndim == 2 and "embed" not in own:
                parameter.add_(update(*parameter.shape))
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(TOKENS)
        (folder / "preprocessor_config.json").write_text("{}")
        (folder / "done").touch()
    torch.set_default_dtype(torch.float32)


def ask(folder: Path) -> dict[str, Any]:
    """Load the merged model and answer about a picture and a sound."""
    from modalloy.model.omni import ModalloyForConditionalGeneration
    from modalloy.senses.native import Prepared

    begun = time.perf_counter()
    model = ModalloyForConditionalGeneration.from_pretrained(folder, dtype="auto")
    loaded = time.perf_counter() - begun
    draw = torch.Generator().manual_seed(0)
    grid, frames = torch.tensor([[1, 32, 32]]), 800
    tokens = {"image": 32 * 32 // 4, "audio": frames // 100 * 13}
    seen = {
        "input_ids": torch.tensor([[151652, *[SEEN] * tokens["image"], 151653]]),
        "mm_token_type_ids": torch.tensor([[0, *[1] * tokens["image"], 0]]),
        "pixel_values": torch.randn(1024, 3 * 2 * 16 * 16, generator=draw),
        "image_grid_thw": grid,
    }
    heard = {
        "input_ids": torch.tensor([[HEARD] * tokens["audio"]]),
        "input_features": torch.randn(1, 128, frames, generator=draw),
        "input_features_mask": torch.ones(1, frames, dtype=torch.long),
    }
    media = {
        "image": [Prepared(seen, ((0, seen["input_ids"].shape[1]),))],
        "audio": [Prepared(heard, ((0, heard["input_ids"].shape[1]),))],
    }
    row = [0] * 8
    for name, prepared in media.items():
        row += [model.config.owners.index(name)] * prepared[0].lengths[0]
    owners = torch.tensor([[*row, *[0] * 16]])
    ids = torch.randint(100, 1000, owners.shape, generator=draw)
    begun = time.perf_counter()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "owners": owners}
    answer = model.generate(**inputs, media=media, max_new_tokens=4, do_sample=False)
    seconds = time.perf_counter() - begun
    return {
        "load_seconds": round(loaded, 1),
        "answer_seconds": round(seconds, 1),
        "tokens": {name: int((owners == model.config.owners.index(name)).sum()) for name in ("text", *media)},
        "new_tokens": answer.shape[1] - ids.shape[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/bench"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--method", default="ssam")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask is not None:
        print(json.dumps(ask(args.ask)))
        return
    if args.write is not None:
        write(args.write, args.layers)
        return
    root = (args.root / f"native{args.layers}").resolve()
    this = [sys.executable, __file__, "--layers", str(args.layers)]
    run([*this, "--write", root])
    recipe = {
        "base_model": str(root / "base"),
        "merge_method": args.method,
        "models": [{"model": str(root / "see"), "modality": "image"}, {"model": str(root / "hear")}],
        "output": {"form": "omni", "chat_template": "base"},
    }
    merging, report = merge(recipe, root / "out")
    asking, printed = run([*this, "--ask", root / "out"])
    answer = json.loads(printed.splitlines()[-1])
    rows = [
        [name, f"{usage.seconds:.0f}", f"{usage.peak_bytes / 1e9:.1f}", f"{usage.written_bytes / 1e9:.1f}"]
        for name, usage in (("merge", merging), ("load and answer", asking))
    ]
    print(table(["", "seconds", "peak GB", "written GB"], rows))
    given = sum(folder_bytes(root / name) for name in ("base", "see", "hear"))
    result = {
        "benchmark": "native_qwen3",
        "layers": args.layers,
        "method": args.method,
        "given_bytes": given,
        "result_bytes": folder_bytes(root / "out"),
        "merge": vars(merging),
        "merge_seconds": report["merge_seconds"],
        "verified": report["verify"],
        "load_and_answer": vars(asking),
        **answer,
        "fits": max(merging.peak_bytes, asking.peak_bytes) <= LIMIT_BYTES,
    }
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
