"""Does the paper's whole model fit a laptop? Vicuna-7B with four senses, built on disk and asked one question about all four.

    python benchmarks/omni7b.py [--root build/bench] [--layers N] [--max-new-tokens N]

True shapes, random weights: a bfloat16 base of 13.5 GB, four rank-128 DAMC specialists in ModelCompose's layout, and the four
encoders in their published files (CLIP-ViT-L/14-336, BEATs, LanguageBind video, PointBERT). `modalloy merge` (SSAM, k = 128)
writes one self-contained omni folder, `modalloy chat` loads it and answers a prompt of 3,217 media tokens. Weights stay in
16 bits; a CPU computes in float32. Each command is a process of its own; its time, peak memory and bytes are the kernel's.
About 45 GB of disk. The answer is noise, for the weights are. Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Usage, folder_bytes, machine, merge, run, table
from PIL import Image
from vicuna7b import Size, adapters, base, made, ssam_recipe

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests")
)  # whose small published checkpoints are made full-size here
from published_beats import CFG, write_beats
from published_clip import write_clip
from published_languagebind import write_languagebind
from published_pointbert import FULL as POINTBERT
from published_pointbert import write_pointbert

LIMIT_BYTES = 22e9


def encoders(root: Path) -> dict[str, Path]:
    """The four encoders' published files, full size, random weights."""
    beats: dict[str, Any] = CFG
    point: dict[str, Any] = POINTBERT
    vit: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    }  # fmt: skip
    folder = root / "encoders"
    return {
        "image": made(folder / "image", lambda to: write_clip(to / "clip", **vit, image_size=336)) / "clip",
        "audio": made(folder / "audio", lambda to: write_beats(to, **beats)),
        "video": made(
            folder / "video", lambda to: write_languagebind(to / "languagebind", **vit, image_size=224, num_frames=8)
        )
        / "languagebind",
        "point": made(folder / "point", lambda to: write_pointbert(to, **point)),
    }


def media(folder: Path) -> dict[str, Path]:
    """One file of each kind."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "image": folder / "a.png", "audio": folder / "a.wav", "video": folder / "a.gif", "point": folder / "a.npy",
    }  # fmt: skip
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(paths["image"])
    with wave.open(str(paths["audio"]), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((rng.standard_normal(8 * 16_000) * 3000).astype(np.int16).tobytes())
    frames = [Image.fromarray(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)) for _ in range(12)]
    frames[0].save(paths["video"], save_all=True, append_images=frames[1:])
    np.save(paths["point"], rng.random((8192, 6), dtype=np.float32))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/bench"))
    parser.add_argument("--layers", type=int, default=32, help="fewer make a smaller model, for a try")
    parser.add_argument("--max-new-tokens", type=int, default=4)
    args = parser.parse_args()
    size = Size(layers=args.layers)
    recipe = ssam_recipe(
        base(args.root, size, torch.bfloat16),
        adapters(args.root, size, "modelcompose"),
        128,
        {"form": "omni", "dtype": "bfloat16"},
    )
    places = encoders(args.root)
    for entry in recipe["models"]:
        entry["encoder"] = str(places[entry["modality"]].resolve())
    out = args.root / "omni7b"
    merging, report = merge(recipe, out)
    files_of = [option for kind, path in media(args.root / "media").items() for option in (f"--{kind}", str(path))]
    command = [sys.executable, "-m", "modalloy.cli", "chat", out, *files_of, "-p", "What do these have in common?"]
    asking, printed = run(
        [*command, "--dtype", "auto", "--device", "cpu", "--max-new-tokens", str(args.max_new_tokens), "--json"]
    )
    answer = json.loads(printed)
    rows = [row("merge", merging), row("load and answer", asking)]
    print(table(["", "seconds", "peak GB", "read GB", "written GB"], rows))
    print(f"{folder_bytes(out) / 1e9:.1f} GB on disk; tokens {answer['tokens']}; answered in {answer['seconds']:.0f} s")
    result = {
        "layers": args.layers,
        "merge": vars(merging),
        "answer": vars(asking),
        "merge_seconds": report["merge_seconds"],
        "answer_seconds": answer["seconds"],
        "tokens": answer["tokens"],
        "new_tokens": answer["new_tokens"],
        "fits": asking.peak_bytes <= LIMIT_BYTES,
    }
    print(json.dumps(result | machine()))


def row(name: str, usage: Usage) -> list[str]:
    """One line of the table."""
    gigabytes = (usage.peak_bytes, usage.read_bytes, usage.written_bytes)
    return [name, f"{usage.seconds:.0f}", *(f"{count / 1e9:.1f}" for count in gigabytes)]


if __name__ == "__main__":
    main()
