"""Trains what all built-in specialists start from: questions and answers in writing, before any sense is there.

Words stand where media will: the embeddings of a thing's name, blurred by those of things like it and by noise, in the places
of a picture's tokens, and those of a question's words in the places of speech. A base decoder of this size does not compare
what it is told with what it is asked; here it learns to, on one low-rank update for all tokens. Each specialist then trains a
copy of it, for text and for its own tokens, and so what they share is there before they part, as with fine-tunes of one
instruction-tuned model. No medium is read.

    python examples/specialists/start.py --data DIR --out build/specialists/start.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from aligning import embedded, written
from safetensors.torch import save_file
from single_path import SinglePath
from torch import Tensor, nn
from train import QUERIES, build
from trainer import Trainer

from modalloy.evals import corpus, senses
from modalloy.evals.corpus import Clip
from modalloy.evals.senses import Asker

SENSES = ("image", "video", "audio")
VIEWS = 9  # blurs of a name; and as many motions
LIKE = 0.5  # at most so much of a thing like it is in a name's embedding
NOISE = 0.7  # of an embedding's own size, at most


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    clips = [clip for clip in corpus.load(args.data) if clip.split == "train"]
    model, processor = build(SENSES, clips, single_path=True)
    table = model.get_input_embeddings().weight.detach()
    parts = []
    for modality in SENSES:
        model.projectors[modality] = nn.Identity()
        chosen = said(clips) if modality == "audio" else named(clips)
        words = Words(processor.tokenizer, table, chosen, args.seed)
        features = words.spoken() if modality == "audio" else words.shown(moving=modality == "video")
        own = argparse.Namespace(**vars(args) | {"modality": modality, "views": VIEWS})
        parts.append(Trainer(model, processor, features, chosen, own))
    trainer = SinglePath(parts, args)
    trainer.train(2)
    save_file({name: tensor.clone() for name, tensor in trainer.tensors().items()}, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`: its words alone are used")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--work", type=Path, default=Path("build/specialists/start"), help="log and resume state")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    args = parser.parse_args()
    args.steps = (0, args.steps)
    return args


def named(clips: Sequence[Clip]) -> list[Clip]:
    """One clip of each thing: what it is called is all that is used of it."""
    return list({clip.concept: clip for clip in clips if clip.kind == "picture"}.values())


def said(clips: Sequence[Clip]) -> list[Clip]:
    """One clip of each text that is said."""
    return list({clip.text: clip for clip in clips if clip.kind == "speech"}.values())


class Words:
    """Embeddings of words in the places of media, by the file of the clip whose place they take."""

    def __init__(self, tokenizer: Any, table: Tensor, clips: Sequence[Clip], seed: int) -> None:
        self.tokenizer, self.table, self.clips = tokenizer, table, clips
        self.generator = torch.Generator().manual_seed(seed)
        self.asker = Asker(clips, seed)

    def name(self, name: str) -> Tensor:
        """The embedding of a name, (width,)."""
        return embedded(name, self.table, self.tokenizer)

    def shown(self, *, moving: bool) -> dict[str, Tensor]:
        """(views, 4 tokens, width) of each thing: its name, in part another's, in half how it moves, and noise."""
        features = {}
        for clip in self.clips:
            views = []
            for view in range(VIEWS):
                other = self.asker.distractors(clip.concept, 1, near=0.7)[0]
                share = LIKE * torch.rand((), generator=self.generator)
                seen = (1 - share) * self.name(clip.concept) + share * self.name(other)
                if moving:
                    seen = (seen + self.name(senses.motion_of(clip, view))) / 2
                views.append(seen.expand(4, -1))
            features[str(clip.path)] = self.noisy(torch.stack(views))
        return features

    def spoken(self) -> dict[str, Tensor]:
        """(views, queries, width) of each text: its tokens' embeddings and noise."""
        rows = torch.tensor(written([clip.text for clip in self.clips], self.tokenizer, QUERIES))
        return {
            str(clip.path): self.noisy(self.table[row].expand(VIEWS, -1, -1))
            for clip, row in zip(self.clips, rows, strict=True)
        }

    def noisy(self, given: Tensor) -> Tensor:
        """With noise of up to `NOISE` of the embeddings' size, less in some views than in others, and of the size it had."""
        size = given.pow(2).mean((-2, -1), keepdim=True).sqrt()
        level = NOISE * torch.rand(len(given), 1, 1, generator=self.generator)
        noisy = given + level * size * torch.randn(given.shape, generator=self.generator)
        return (noisy * size / noisy.pow(2).mean((-2, -1), keepdim=True).sqrt()).half()


if __name__ == "__main__":
    main()
