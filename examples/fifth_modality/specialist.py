"""Makes the tutorial's toy specialist, and recordings to try it on: no data, no training, a few seconds.

A real specialist is trained; `examples/specialists/train.py` trains the built-in ones. This one is solved for: a linear
projector that turns each second of a made-up recording into the decoder's embedding of the word for it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from motion_spectrum import CHANNELS, RATE, MotionSpectrum
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from modalloy import builtin

MOTIONS = {"sleeping": (0.3, 0.01), "walking": (1.8, 0.3), "running": (3.0, 1.2), "dancing": (1.0, 0.8)}  # Hz, g
SECONDS = 4
TAKES = 200  # recordings of each motion
SLOT = "model.layers.0.self_attn.q_proj"  # a specialist updates the text path somewhere: here, and by nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/fifth"))
    out = parser.parse_args().out
    folder = out / "specialist"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    weight, bias = solve_projector([(word, record(word, rng)) for word in MOTIONS for _ in range(TAKES)])
    tensors = {
        "model.modal_projectors.motion.weight": weight,
        "model.modal_projectors.motion.bias": bias,
        f"{SLOT}.lora_A.default.weight": torch.zeros(1, len(bias)),
        f"{SLOT}.lora_B.default.weight": torch.zeros(len(bias), 1),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "_name_or_path": builtin.BASE,
        "model_type": "multimodal",
        "lora_strategy": "same",
        "lora_r": 1,
        "lora_alpha": 1,
        "mm_motion_encoder": "motion-spectrum",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for word in MOTIONS:
        np.save(out / f"{word}.npy", record(word, rng))


def record(word: str, rng: np.random.Generator) -> np.ndarray:
    """A recording (samples, 6), float32: gravity, a swing with overtones in random directions, and noise."""
    hertz, strength = (value * rng.uniform(0.85, 1.15) for value in MOTIONS[word])
    time = np.arange(SECONDS * RATE)[:, None] / RATE
    samples = rng.normal(0, 0.01, (len(time), CHANNELS))
    samples[:, :3] += (gravity := rng.normal(size=3)) / np.linalg.norm(gravity)
    for overtone in (1, 2, 3):
        phase, reach = rng.uniform(0, 2 * np.pi, CHANNELS), rng.normal(size=CHANNELS) * strength / overtone
        samples += reach * np.sin(2 * np.pi * overtone * hertz * time + phase)
    return samples.astype(np.float32)


def solve_projector(recordings: list[tuple[str, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (width, dim) and bias (width,) that bring features nearest to the embeddings of their words."""
    encoder, base = MotionSpectrum(), builtin.base()
    features = encoder(torch.stack([encoder.preprocess(samples) for _, samples in recordings]))  # (n, tokens, dim)
    tokenizer = AutoTokenizer.from_pretrained(base)
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word, _ in recordings]
    wanted = embeddings[ids].repeat_interleave(encoder.n_tokens, 0)  # (n · tokens, width)
    x = features.flatten(0, 1)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), wanted).solution
    return solved[:-1].T.contiguous(), solved[-1].contiguous()


if __name__ == "__main__":
    main()
