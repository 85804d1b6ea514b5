"""CLIP's picture encoder, openai/clip-vit-large-patch14-336: 576 features of 1024 dimensions, one a patch.

Used as LLaVA and ModelCompose use it: the picture is padded to a square with the mean colour, and the features are the
second-last hidden states without the class token (Radford et al., arXiv 2103.00020; Liu et al., arXiv 2304.08485).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from modalloy.errors import CheckpointError, MediaError, shown
from modalloy.senses.encoders import Encoder
from modalloy.senses.media import load_image
from modalloy.storage.folder import read_json
from modalloy.storage.tensors import Checkpoint

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that OpenAI trained on
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SIDE = 20_000  # of the square a picture is padded to, which then takes 1.6 GB
# what a published config that leaves a number out means by it: a ViT-B/32, the default of the class that reads it
UNRECORDED: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# the text half of a whole CLIP, and a table of positions that old files hold
UNUSED = re.compile(
    r"text_model\..+|(visual|text)_projection\.weight|logit_scale|vision_model\.embeddings\.position_ids"
)


class Clip(Encoder):
    """`preprocess(file or PIL image)` → (3, 336, 336); `forward((images, 3, 336, 336))` → (images, 576, 1024)."""

    modality = "image"

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 336,
        patch_size: int = 14,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        image_mean: tuple[float, float, float] = MEAN,
        image_std: tuple[float, float, float] = STD,
    ) -> None:
        super().__init__()
        self.dim = hidden_size
        self.n_tokens = (image_size // patch_size) ** 2
        self.image_size, self.image_mean, self.image_std = image_size, image_mean, image_std
        config = CLIPVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            image_size=image_size,
            patch_size=patch_size,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            attn_implementation="sdpa",
        )
        self.vision_model = VisionTower(config)

    @classmethod
    def settings(cls, location: Path | None) -> dict[str, Any]:
        """The sizes in `config.json`, the mean and spread of the colours in `preprocessor_config.json` if there is one."""
        path = published(location) / "config.json"
        config = read_json(path)
        if config.get("model_type") not in ("clip", "clip_vision_model"):
            raise CheckpointError(
                f"{path}: model_type is {shown(config.get('model_type'))}, not CLIP's; "
                "give a folder like openai/clip-vit-large-patch14-336"
            )
        settings = vision_settings(path, config, UNRECORDED)
        path = path.with_name("preprocessor_config.json")
        return settings | (_colours(path, settings["image_size"]) if path.is_file() else {})

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """The tensors of `vision_model`, which have their published names here; the text half is left out."""
        return vision_weights(published(location))

    def preprocess(self, image: Any) -> Tensor:
        """A file name or PIL image, padded to a square with the mean colour, resized and normalised: (3, size, size)."""
        from PIL import Image

        image = load_image(image) if isinstance(image, (str, Path)) else image.convert("RGB")
        if (side := max(image.size)) > MAX_SIDE:
            raise MediaError(f"a picture {side} pixels long cannot be padded to a square (limit {MAX_SIDE}); crop it")
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        resized = square.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        # multiplied in float64 and rounded once, as CLIPImageProcessor does
        pixels = torch.from_numpy((np.asarray(resized) * (1 / 255)).astype(np.float32))
        return ((pixels - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)).permute(2, 0, 1).contiguous()

    def forward(self, images: Tensor) -> Tensor:
        return self.vision_model(images)[:, 1:]


class VisionTower(nn.Module):
    """CLIP's vision transformer under its published names: (pictures, 3, size, size) → (pictures, 1 + patches, dim).

    What comes out are the second-last hidden states: the last layer and the norm after it have weights, but never run.
    """

    def __init__(
        self, config: CLIPVisionConfig, layer: Callable[[CLIPVisionConfig], nn.Module] = CLIPEncoderLayer
    ) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        del self.embeddings.position_ids  # a buffer that no file holds, of the numbers 0, 1, 2, …
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pictures: Tensor) -> Tensor:
        embeddings = self.embeddings
        patches = embeddings.patch_embedding(pictures.to(embeddings.patch_embedding.weight.dtype))
        classes = embeddings.class_embedding.expand(len(pictures), 1, -1)
        tokens = torch.cat([classes, patches.flatten(2).transpose(1, 2)], 1) + embeddings.position_embedding.weight
        hidden = self.pre_layrnorm(tokens)
        *layers, _ = self.encoder["layers"].children()
        for layer in layers:
            hidden = layer(hidden, None)
        return hidden


def published(location: Path | None) -> Path:
    """The folder of the published files, which no package holds."""
    if location is None:
        raise CheckpointError(
            "no location of the published files; name a folder or hub id after the encoder, NAME:LOCATION"
        )
    return location


def vision_settings(path: Path, config: dict[str, Any], unrecorded: dict[str, Any]) -> dict[str, Any]:
    """What a CLIP's config (of the whole model, or of its vision tower) says of the settings in `unrecorded`."""
    parts = (config.get("vision_config_dict"), config.get("vision_config"), config)  # the first there is counts
    vision = next(part for part in parts if isinstance(part, dict))
    settings = {key: vision.get(key, value) for key, value in unrecorded.items()}
    for key, value in settings.items():
        if type(value) is not type(unrecorded[key]):
            raise CheckpointError(f"{path}: {key} is {shown(value)}; download the file again")
    return settings


def vision_weights(location: Path) -> dict[str, Tensor]:
    """Every tensor of a CLIP's vision tower, as it is stored."""
    checkpoint = Checkpoint(location, ("model", "pytorch_model"))
    used = [ref for name, ref in checkpoint.refs.items() if not UNUSED.fullmatch(name)]
    for ref in used:
        if not ref.name.startswith("vision_model."):
            raise CheckpointError(f"{ref.file}: {ref.name} is no tensor of CLIP; give the published folder")
    return {ref.name: checkpoint.read(ref) for ref in used}


def _colours(path: Path, size: int) -> dict[str, Any]:
    """Mean and spread of the colours that a file records, which must ask for the preparation that `preprocess` does."""
    recorded = read_json(path)
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    for key, value in {**steps, "resample": 3, "rescale_factor": 1 / 255, "size": size, "crop_size": size}.items():
        found = recorded.get(key, value)
        if any(part != value for part in (found.values() if isinstance(found, dict) else [found])):
            raise CheckpointError(f"{path}: {key} is {found}, and only {value} is supported; give the published file")
    return {key: recorded[key] for key in ("image_mean", "image_std") if key in recorded}
