"""LanguageBind's video encoder, LanguageBind/LanguageBind_Video_merge: 8 frames, 257 features of 1024 dimensions each.

A CLIP ViT-L/14 whose every layer first attends over time, each patch to itself in the other frames (Zhu et al.,
arXiv 2310.01852). Used as Video-LLaVA and ModelCompose use it: the second-last hidden states, class tokens included.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from modalloy.errors import CheckpointError, MediaError
from modalloy.senses.encoders import Encoder
from modalloy.senses.encoders.clip import MEAN, STD, UNRECORDED, VisionTower, published, vision_settings, vision_weights
from modalloy.senses.media import video_frames
from modalloy.storage.folder import read_json

MAX_RATIO = 100  # of the sides of a frame: the longer one is resized as much as the shorter


class LanguageBindVideo(Encoder):
    """`preprocess(file or frames)` → (8, 3, 224, 224); `forward((videos, 8, 3, 224, 224))` → (videos, 2056, 1024).

    With `random_flip` half of the videos are mirrored, by torch's global generator: so did the published evaluation,
    which turns left into right.
    """

    modality = "video"

    def __init__(
        self,
        *,
        num_frames: int = 8,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 224,
        patch_size: int = 14,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
        random_flip: bool = False,
    ) -> None:
        super().__init__()
        self.dim = hidden_size
        self.n_tokens = num_frames * (1 + (image_size // patch_size) ** 2)
        self.num_frames, self.image_size, self.random_flip = num_frames, image_size, random_flip
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
        self.vision_model = VisionTower(config, partial(TemporalLayer, num_frames=num_frames))

    @classmethod
    def settings(cls, location: Path | None) -> dict[str, Any]:
        """The sizes in `config.json`."""
        path = published(location) / "config.json"
        unrecorded = UNRECORDED | {"num_frames": 1, "add_time_attn": False}
        settings = vision_settings(path, read_json(path), unrecorded)
        if not settings.pop("add_time_attn") or settings["num_frames"] == 1:
            raise CheckpointError(
                f"{path}: has no attention over several frames; give a folder like LanguageBind/LanguageBind_Video_merge"
            )
        return settings

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """The tensors of `vision_model`, which have their published names here; the text half is left out."""
        return vision_weights(published(location))

    def preprocess(self, video: Any) -> Tensor:
        """A file name or uint8 frames (any number, height, width, 3), sampled evenly, normalised, resized and cropped."""
        frames = video_frames(video, self.num_frames)
        if (longer := max(frames.shape[1:3])) > MAX_RATIO * (shorter := min(frames.shape[1:3])):
            raise MediaError(
                f"frames of {longer} by {shorter} pixels cannot be resized (limit {MAX_RATIO} to 1); crop them"
            )
        pixels = torch.stack([self._picture(frame) for frame in frames])
        return pixels.flip(-1) if self.random_flip and torch.rand(()) < 0.5 else pixels

    def _picture(self, frame: np.ndarray) -> Tensor:
        """One uint8 frame (height, width, 3) as (3, size, size): the middle of what is left when its short side fits."""
        height, width, size = *frame.shape[:2], self.image_size
        rows = size if height <= width else math.floor(height / width * size)
        columns = size if width < height else math.floor(width / height * size)
        pixels = torch.from_numpy(frame).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        resized = nn.functional.interpolate(pixels[None], (rows, columns), mode="bilinear", align_corners=False)[0]
        top, left = round((rows - size) / 2), round((columns - size) / 2)
        return resized[:, top : top + size, left : left + size]

    def forward(self, videos: Tensor) -> Tensor:
        features = self.vision_model(videos.flatten(0, 1))  # (videos · frames, 1 + patches, dim)
        return features.unflatten(0, (-1, self.num_frames)).flatten(1, 2)


class TemporalLayer(CLIPEncoderLayer):
    """A layer of CLIP that first lets every token attend to the tokens at its place in the video's other frames."""

    def __init__(self, config: CLIPVisionConfig, num_frames: int) -> None:
        super().__init__(config)
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, config.hidden_size))
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_attn = CLIPAttention(config)

    def forward(self, hidden: Tensor, attention_mask: None) -> Tensor:  # (videos · frames, tokens, dim)
        by_frame = hidden.unflatten(0, (-1, self.temporal_embedding.shape[1]))
        by_place = by_frame.transpose(1, 2).flatten(0, 1) + self.temporal_embedding  # (videos · tokens, frames, dim)
        by_place = by_place + self.temporal_attn(self.temporal_layer_norm1(by_place))[0]
        hidden = by_place.unflatten(0, (-1, hidden.shape[1])).transpose(1, 2).flatten(0, 1)
        return super().forward(hidden, attention_mask)
