"""PointBERT of PointLLM, as ModelCompose uses it: a coloured point cloud as one class token and 512 groups of 32 points.

Sources: Yu et al., "Point-BERT", arXiv 2111.14819; Xu et al., "PointLLM", arXiv 2308.16911, and its code,
pointllm/model/pointbert of github.com/InternRobotics/PointLLM. Published weights:
`point_bert_v1.2.pt` of huggingface.co/RunsenXu/PointLLM_7B_v1.1_init.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalloy.errors import CheckpointError, MediaError, RecipeError, shown
from modalloy.senses.encoders import Encoder
from modalloy.senses.media import check_points, load_points
from modalloy.storage.pickled import unpickle

FILE = "point_bert_v1.2.pt"
MAX_POINTS = 1 << 20  # of a cloud; of all its groups together, too
# its training (ULIP-2) saved the encoder among the parts that it was aligned with, which are not used here
TRAINED_AS = "module.point_encoder."
TRAINED_BESIDE = ("module.open_clip_model.", "module.pc_projection", "module.logit_scale")


class PointBert(Encoder):
    """`preprocess(file or array)` → (points, point_dims); `forward((clouds, points, point_dims))` → (clouds, 1 + groups, dim).

    `random_start`: choose the groups' centres from a random point on, as published, instead of from the cloud's first,
    which gives the same answer each time. `pc_norm`: move and scale every cloud into the unit ball, as PointLLM does
    for itself; ModelCompose defines that and never calls it.
    """

    modality = "point"

    def __init__(
        self,
        *,
        dim: int = 384,
        layers: int = 12,
        heads: int = 6,
        groups: int = 512,
        group_size: int = 32,
        group_dim: int = 256,
        points: int = 8192,
        point_dims: int = 6,
        random_start: bool = False,
        pc_norm: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise RecipeError(f"PointBert: {dim} features cannot be split among {heads} heads; give another `heads`")
        if points > MAX_POINTS or groups * group_size > MAX_POINTS:
            raise RecipeError(
                f"PointBert: {shown(points)} points, {shown(groups)} groups of {shown(group_size)}; give fewer than {MAX_POINTS}"
            )
        if group_size > points:
            raise RecipeError(f"PointBert: groups of {group_size} need more than {points} points; give more `points`")
        if point_dims not in (3, 6):
            raise RecipeError(
                f"PointBert: points of {point_dims} numbers; `point_dims` is 3 (x, y, z) or 6 (and colours)"
            )
        self.dim, self.n_tokens = dim, 1 + groups
        self.groups, self.group_size = groups, group_size
        self.points, self.point_dims = points, point_dims
        self.random_start, self.pc_norm = random_start, pc_norm
        self.encoder = GroupEncoder(point_dims, group_dim)
        self.reduce_dim = nn.Linear(group_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def settings(cls, location: Path | None) -> dict[str, Any]:
        """The sizes that the published tensors show; `heads`, `groups` and `group_size` are recorded nowhere."""
        return _sizes(location, _published(location))

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """The encoder's tensors in `location`: the published file, or a folder that holds it."""
        weights = _published(location)
        with torch.device("meta"):
            known = cls(**_sizes(location, weights), heads=1).state_dict()
        if unknown := sorted(weights.keys() - known.keys()):
            raise CheckpointError(f"{location}: holds {unknown[0]}, which PointBERT does not have; give {FILE}")
        return weights

    def preprocess(self, cloud: Any) -> Tensor:
        """A file name or an array (points, 3) or (points, 6) as a tensor of always `points` rows and `point_dims` columns.

        A cloud without colours is black, which is what PointLLM's authors do. Of a larger cloud, a random subset is
        taken, drawn with a fixed seed and kept in its order: it follows the cloud's density, and takes no time, where
        the farthest points of a million take minutes. A smaller cloud is repeated from its beginning.
        """
        cloud = load_points(cloud) if isinstance(cloud, (str, Path)) else check_points(np.asarray(cloud))
        count = len(cloud)
        if count > self.points:
            rows = np.sort(np.random.default_rng(0).choice(count, self.points, replace=False, shuffle=False))
        else:
            rows = np.arange(self.points) % count
        xyz, colours = cloud[rows, :3], cloud[rows, 3:]
        if self.pc_norm:
            xyz = xyz - xyz.mean(axis=0)
            radius = np.linalg.norm(xyz, axis=1).max()
            if radius == 0:
                raise MediaError("the point cloud is a single place, which pc_norm cannot scale; give another cloud")
            xyz = xyz / radius
        columns = np.zeros((self.points, 6), np.float32)
        columns[:, :3] = xyz
        columns[:, 3 : 3 + colours.shape[1]] = colours
        return torch.from_numpy(columns[:, : self.point_dims].copy())

    def forward(self, clouds: Tensor) -> Tensor:
        groups, centres = self._group(clouds.float())
        dtype = self.norm.weight.dtype
        tokens = self.reduce_dim(self.encoder(groups.to(dtype)))
        hidden = torch.cat([self.cls_token.expand(len(clouds), -1, -1), tokens], 1)
        places = torch.cat([self.cls_pos.expand(len(clouds), -1, -1), self.pos_embed(centres.to(dtype))], 1)
        for block in self.blocks:
            hidden = block(hidden + places)
        return self.norm(hidden)

    @torch.no_grad()
    def _group(self, clouds: Tensor) -> tuple[Tensor, Tensor]:
        """(clouds, groups, group_size, point_dims), with x, y, z relative to their centre; and the centres (…, groups, 3)."""
        xyz = clouds[..., :3]
        count, n_points, _ = xyz.shape
        begin = torch.zeros(count, dtype=torch.long, device=xyz.device)
        if self.random_start:
            begin = torch.randint_like(begin, n_points)
        row = torch.arange(count, device=xyz.device)
        centres = xyz[row[:, None], farthest_points(xyz, self.groups, begin)]
        near = nearest_points(xyz, centres, self.group_size)
        groups = clouds[row[:, None, None], near]
        groups[..., :3] -= centres[:, :, None]
        return groups, centres


class GroupEncoder(nn.Module):
    """A small PointNet: (clouds, groups, points, point_dims) → (clouds, groups, dim), whatever the order of the points."""

    def __init__(self, point_dims: int, dim: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv1d(point_dims, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1)
        )
        self.second_conv = nn.Sequential(nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, dim, 1))

    def forward(self, groups: Tensor) -> Tensor:
        each = self.first_conv(groups.flatten(0, 1).transpose(1, 2))  # (clouds · groups, 256, points)
        whole = each.amax(2, keepdim=True).expand_as(each)
        return self.second_conv(torch.cat([whole, each], 1)).amax(2).unflatten(0, groups.shape[:2])


class Block(nn.Module):
    """A pre-norm transformer block: (clouds, tokens, dim) → the same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class Attention(nn.Module):
    """Self-attention over all tokens; one matrix, without a bias, makes queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)


def farthest_points(xyz: Tensor, count: int, begin: Tensor) -> Tensor:
    """(clouds, count) indices of points, each the farthest from those before it; `begin` (clouds,) holds the first.

    `xyz` is (clouds, points, 3). Of equally far points the first counts. O(count · points) for each cloud.
    """
    axes = xyz.transpose(1, 2).contiguous()  # (clouds, 3, points)
    row = torch.arange(len(xyz), device=xyz.device)
    distance = torch.full_like(axes[:, 0], torch.inf)
    chosen = [begin]
    while len(chosen) < count:
        distance = torch.minimum(distance, (axes - axes[row, :, chosen[-1], None]).square().sum(1))
        chosen.append(distance.argmax(1))
    return torch.stack(chosen, 1)


def nearest_points(xyz: Tensor, centres: Tensor, count: int) -> Tensor:
    """(clouds, centres, count) indices of the points nearest to each centre, in no order; both are (clouds, …, 3)."""
    # |c − p|² = |c|² − 2 c·p + |p|², in the order of the published code, so that rounding breaks its ties alike
    distance = -2 * centres @ xyz.transpose(1, 2)
    distance += centres.square().sum(-1)[:, :, None]
    distance += xyz.square().sum(-1)[:, None]
    return distance.topk(count, largest=False, sorted=False).indices


def _published(location: Path | None) -> dict[str, Tensor]:
    """All tensors of the published file, under our names.

    PointLLM loads {"state_dict": {"module.point_encoder.cls_token": …}}, ModelCompose {"cls_token": …}: both are read.
    """
    if location is None:
        raise CheckpointError(
            f"the encoder PointBERT has no built-in weights; give the path of {FILE} as its `encoder:`"
        )
    path = location / FILE if location.is_dir() else location
    stored = unpickle(path, opaque=[("argparse", "Namespace")])  # the training's options, beside the state
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = {
            name.removeprefix(TRAINED_AS): tensor
            for name, tensor in stored["state_dict"].items()
            if not name.startswith(TRAINED_BESIDE)
        }
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise CheckpointError(f"{path}: does not hold the tensors of a PointBERT; give {FILE}")
    return {name.replace("blocks.blocks.", "blocks.", 1): tensor for name, tensor in stored.items()}


def _sizes(location: Path | None, published: dict[str, Tensor]) -> dict[str, Any]:
    try:
        return {
            "dim": published["cls_token"].shape[-1],
            "layers": sum(name.endswith(".attn.qkv.weight") for name in published),
            "group_dim": published["reduce_dim.weight"].shape[1],
            "point_dims": published["encoder.first_conv.0.weight"].shape[1],
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{location}: no PointBERT ({error} is missing or damaged); give {FILE}") from error
