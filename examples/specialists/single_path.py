"""Trains the references of the `senses` benchmark: models in which all tokens, text and media, use one low-rank update.

`--modality image` (audio, video, point) gives a specialist in ModelCompose's `lora_strategy: same` layout, of the kind that
NaiveMC merges. `--modality all` gives the joint model, which sees all four modalities in training and so bounds what a merge
can reach: one update, trained on batches of the four modalities in turn. It is written as four specialists that hold the same
update, so that `merge_method: average` makes the joint model of them.

Stage 1 is shared with the specialists in --specialists: their projectors stay frozen, and their prefix and suffix tokens are
where these start; the update starts where theirs did (--start). What is trained is the update and these tokens, on the
lessons, batches and schedule of stage 2 of `train.py`, whose encoder features and blind projectors are used where `--work`
has them. Re-running resumes.

    python examples/specialists/single_path.py --modality all --data DIR --out build/references/joint
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from lessons import Lesson
from safetensors.torch import load_file
from torch import Tensor
from train import ENCODER, VIEWS, blind_projectors, build, cached_features, save_specialist, start_from, training_clips
from trainer import Trainer, trained

from modalloy import builtin
from modalloy.evals import corpus
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.routing import TEXT
from modalloy.names import disk_name


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    joint = args.modality == "all"
    modalities = list(ENCODER) if joint else [args.modality]
    clips, parts = corpus.load(args.data), []
    model, processor = build(modalities, clips, single_path=True)
    for modality in modalities:
        if args.start:
            start_from(args.start, model, modality)
        stage_1_of(args.specialists / modality, model, modality)
    for modality in modalities:
        own = argparse.Namespace(**vars(args) | {"modality": modality, "views": VIEWS[modality]})
        own.work = args.work / modality
        own.work.mkdir(parents=True, exist_ok=True)
        shown = training_clips(clips, modality)
        part = Trainer(model, processor, cached_features(model, processor, shown, own), shown, own)
        part.blind = blind_projectors(part)
        parts.append(part)
    args.work = args.work / f"single-path-{args.modality}"
    args.work.mkdir(parents=True, exist_ok=True)
    SinglePath(parts, args).train(2)
    for modality in modalities:
        save_specialist(model, modality, args.out / modality if joint else args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", required=True, choices=[*ENCODER, "all"])
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument(
        "--out", type=Path, required=True, help="the specialist's folder; of `all`, the folder of the four"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/specialists"),
        help="folder with a folder of features per modality, and of log and resume state (default: %(default)s)",
    )
    parser.add_argument(
        "--specialists",
        type=Path,
        default=builtin.HERE / "specialists",
        help="folder of the specialists of stage 1 (default: built-in)",
    )
    parser.add_argument("--start", type=Path, help="what start.py wrote (default: start from nothing)")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--align", type=int, default=600, help="steps of stage 1a of the blind projectors")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    args = parser.parse_args()
    args.steps = (0, args.steps)  # those of stage 1 and 2
    return args


def stage_1_of(folder: Path, model: ModalloyForConditionalGeneration, modality: str) -> None:
    """Take the projector and the prefix and suffix tokens of the specialist in `folder`."""
    stored, disk = load_file(folder / "adapter_model.safetensors"), disk_name(modality)
    for name, tensor in trained(model, modality).items():
        if f".{disk}" in name:
            tensor.copy_(stored[name])


class SinglePath(Trainer):
    """Stage 2 on a single path, on batches of each of `parts` in turn, which are trainers of one modality and share a model."""

    def __init__(self, parts: Sequence[Trainer], args: argparse.Namespace) -> None:
        self.parts, self.model, self.args = {part.args.modality: part for part in parts}, parts[0].model, args

    def parameters(self, stage: int) -> list[dict[str, Any]]:
        """The one update and every modality's prefix and suffix tokens."""
        model = self.model.requires_grad_(False)
        update = [getattr(linear, f"{side}_{TEXT}") for linear in model.linears.values() for side in ("up", "down")]
        params = [*update, *model.prefix_tokens.values(), *model.suffix_tokens.values()]
        for parameter in params:
            parameter.requires_grad_(True)
        return [{"params": params, "lr": 1e-3}]

    def batches(self, stage: int, done: int) -> Iterator[list[Lesson]]:
        """Batches of one modality each, the modalities in turn; the first `done` are passed over."""
        streams = cycle([part.batches(stage, 0) for part in self.parts.values()])
        return islice((next(stream) for stream in streams), done, None)

    def loss(self, batch: list[Lesson]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, in nats."""
        return self.parts[batch[0].modality].loss(batch)

    def tensors(self) -> dict[str, Tensor]:
        """The update, and every modality's projector and tokens, under their ModelCompose names."""
        return {name: tensor for part in self.parts.values() for name, tensor in part.tensors().items()}


if __name__ == "__main__":
    main()
