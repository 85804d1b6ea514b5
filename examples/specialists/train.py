"""Trains one built-in specialist, by the recipe of SSAM's specialists (ModelCompose, DAMC layout).

Stage 1 trains the projector alone: first towards the decoder's embeddings of the concepts' names, which needs no decoder
and so takes seconds, then through the decoder. Stage 2 trains a low-rank update for the modality's tokens, another for
text tokens, and the prefix and suffix tokens, with everything else frozen. Encoder features are computed once. Re-running
resumes.

    python examples/specialists/train.py --modality image --data DIR --out modalloy/builtin/specialists/image
"""

import argparse
import json
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from augment import VIEWS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modalloy import builtin
from modalloy.evals import clips as clips_of
from modalloy.evals import senses
from modalloy.evals.ask import answers
from modalloy.evals.clips import Clip
from modalloy.evals.features import FeatureCache
from modalloy.evals.scores import baselines
from modalloy.evals.senses import Question
from modalloy.evals.statistics import bootstrap_interval
from modalloy.model import load_model
from modalloy.model.config import ModalloyConfig
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.routing import TEXT, low_rank_zeros
from modalloy.names import disk_name
from modalloy.senses.encoders import load_encoder

RANK = 8
ALPHA = 16
PREFIX = SUFFIX = 1
ENCODER = {
    "image": "builtin:efficientnet-lite0",
    "audio": "builtin:whisper-tiny.en",
    "video": "builtin:efficientnet-lite0-video",
    "point": "builtin:depth-views",
}
CARD = Path(__file__).with_name("card.md")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    clips = [clip for clip in clips_of.load(args.data) if clip.modality == args.modality]
    model, processor = build([args.modality])
    features = cached_features(model, processor, clips, args)
    trainer = Trainer(model, processor, features, clips, args)
    if not (args.work / "state.pt").is_file():
        trainer.align()
    for stage in (1, 2):
        trainer.train(stage)
    save_specialist(model, args.modality, args.out)
    write_card(clips, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", required=True, choices=sorted(ENCODER))
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, required=True, help="the specialist's folder")
    parser.add_argument(
        "--work", type=Path, help="features, log and resume state (default: build/specialists/MODALITY)"
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(40, 280), help="steps of stage 1 and 2 through the decoder"
    )
    parser.add_argument("--align", type=int, default=300, help="steps of stage 1a")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--views", type=int, default=8, help="augmented views per training clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    args = parser.parse_args()
    args.work = args.work or Path("build/specialists") / args.modality
    return args


def build(
    modalities: Sequence[str], *, single_path: bool = False
) -> tuple[ModalloyForConditionalGeneration, ModalloyProcessor]:
    """The untrained model: the base decoder with zero updates, and randomly initialised projectors.

    Every modality's tokens have an update of their own; on a single path, all tokens use the text update.
    """
    pretrained = AutoModelForCausalLM.from_pretrained(builtin.base(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(builtin.base())
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    encoders = {modality: load_encoder(ENCODER[modality]) for modality in modalities}
    width = pretrained.config.hidden_size
    update = {"rank": RANK, "scale": 1.0, "linears": None}
    sizes: dict[str, dict[str, Any]] = {
        modality: {
            "encoder": {"name": ENCODER[modality], "settings": {}},
            "projector": {"type": "mlp", "widths": [encoder.dim, width, width]},
            "n_tokens": encoder.n_tokens,
            "n_prefix": PREFIX,
            "n_suffix": SUFFIX,
            "update": None if single_path else update,
        }
        for modality, encoder in encoders.items()
    }
    model = ModalloyForConditionalGeneration(ModalloyConfig(pretrained.config, sizes, update))
    for name, parameter in pretrained.named_parameters():
        model.decoder.get_parameter(name).data.copy_(parameter)
    model.encoders.update(encoders)
    generator = torch.Generator().manual_seed(zlib.crc32("+".join(modalities).encode()))
    for linear in model.linears.values():
        for owner in model.config.updates:
            linear.add(owner, low_rank_zeros(linear, RANK, generator))
    return model, ModalloyProcessor(tokenizer, sizes)


def cached_features(
    model: ModalloyForConditionalGeneration, processor: ModalloyProcessor, clips: list[Clip], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Encoder features (views, n_tokens, dim) by file; only training clips have more than one view."""
    path = args.work / f"features-{args.views}.safetensors"
    features = load_file(path) if path.is_file() else {}
    start = time.perf_counter()
    missing = [
        clip
        for clip in clips
        if key(clip) not in features or (clip.tier == "train" and len(features[key(clip)]) != args.views)
    ]
    for index, clip in enumerate(missing):
        rng = np.random.default_rng([args.seed, zlib.crc32(str(clip.path.name + clip.concept).encode())])
        views = range(args.views if clip.tier == "train" else 1)
        media = [VIEWS[args.modality](clip.path, view, rng) for view in views]
        stack = torch.stack([processor.preprocess(args.modality, medium) for medium in media])
        features[key(clip)] = model.encode(args.modality, stack).contiguous()
        log(
            args,
            {"features": index + 1, "of": len(missing), "seconds": round(time.perf_counter() - start, 1)},
            quiet=index % 25,
        )
    if missing:
        save_file(features, path)
    return features


class Trainer:
    """Two stages of AdamW on a fixed stream of questions; resumes at the last saved step."""

    def __init__(
        self,
        model: ModalloyForConditionalGeneration,
        processor: ModalloyProcessor,
        features: dict[str, Tensor],
        clips: list[Clip],
        args: argparse.Namespace,
    ) -> None:
        self.model, self.processor, self.features, self.clips, self.args = model, processor, features, clips, args

    def align(self) -> None:
        """Stage 1a: turn the projected tokens of a clip towards the embedding of its concept's name.

        The loss is a softmax over all concepts of the cosine between their names' embeddings and the clip's mean token
        (and, at a quarter of the weight, each token). Lengths are free while it runs; in the end the last layer is
        scaled so that tokens have the size of word embeddings.
        """
        args, tokenizer = self.args, self.processor.tokenizer
        clips = [clip for clip in self.clips if clip.tier == "train"]
        concepts = sorted({clip.concept for clip in clips})
        table = self.model.get_input_embeddings().weight.detach()
        names = [tokenizer.encode(f" {concept}", add_special_tokens=False) for concept in concepts]
        words = torch.stack([table[name].mean(0) for name in names])  # (concepts, width)
        directions = nn.functional.normalize(words, dim=-1)
        x = torch.cat([self.features[key(clip)][: args.views] for clip in clips])  # (clips · views, tokens, dim)
        y = torch.tensor([concepts.index(clip.concept) for clip in clips]).repeat_interleave(args.views)
        share = torch.bincount(y).float()
        generator = torch.Generator().manual_seed(args.seed)
        projector: Any = self.model.projectors[args.modality]
        mean = x.flatten(0, 1).mean(0)
        with torch.no_grad():  # start with standardised features: fold their mean and spread into the first layer
            projector[0].weight.div_(x.flatten(0, 1).std(0) + 1e-3)
            projector[0].bias.sub_(projector[0].weight @ mean)
        projector.requires_grad_(True)
        optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.align)
        drop = nn.Dropout(0.5)
        for step in range(args.align):
            rows = torch.multinomial(1 / share[y], min(96, len(y)), generator=generator)
            tokens = projector(drop(x[rows] - mean) + mean)
            whole = nn.functional.normalize(tokens.mean(1), dim=-1) @ directions.T / 0.07
            parts = nn.functional.normalize(tokens, dim=-1) @ directions.T / 0.07
            each = y[rows, None].expand(parts.shape[:2])
            loss = nn.functional.cross_entropy(whole, y[rows])
            loss = loss + 0.25 * nn.functional.cross_entropy(parts.flatten(0, 1), each.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            log(args, {"stage": "1a", "step": step + 1, "loss": round(loss.item(), 4)}, quiet=(step + 1) % 50)
        with torch.no_grad():
            scale = (words.pow(2).mean() / projector(x).pow(2).mean()).sqrt()
            projector[2].weight.mul_(scale)
            projector[2].bias.mul_(scale)

    def train(self, stage: int) -> None:
        """Run (or finish) one stage."""
        args, steps = self.args, self.args.steps[stage - 1]
        groups = self.parameters(stage)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        done = self.resume(stage, optimizer, schedule)
        stream = self.batches(stage, done)
        start = time.perf_counter()
        for step in range(done, steps):
            loss = self.loss(next(stream))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            entry: dict[str, Any] = {
                "stage": stage,
                "step": step + 1,
                "loss": round(loss.item(), 4),
                "grad": round(float(norm), 3),
            }
            log(args, entry | {"seconds": round(time.perf_counter() - start, 1)}, quiet=(step + 1) % 10)
            if (step + 1) % args.save_every == 0 or step + 1 == steps:
                self.save_state(stage, step + 1, optimizer, schedule)

    def parameters(self, stage: int) -> list[dict[str, Any]]:
        """Parameter groups of a stage, with everything else frozen."""
        model, modality = self.model, self.args.modality
        model.requires_grad_(False)
        if stage == 1:
            groups: list[dict[str, Any]] = [{"params": list(model.projectors[modality].parameters()), "lr": 2e-4}]
        else:
            linears = model.linears.values()
            own = [getattr(linear, f"{side}_{modality}") for linear in linears for side in ("up", "down")]
            text = [getattr(linear, f"{side}_{TEXT}") for linear in linears for side in ("up", "down")]
            extra = [model.prefix_tokens[modality], model.suffix_tokens[modality]]
            groups = [{"params": [*own, *extra], "lr": 1e-3}, {"params": text, "lr": 5e-4}]
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return groups

    def batches(self, stage: int, done: int) -> Iterator[list[tuple[Question, list[int]]]]:
        """Batches of questions, each with the view of every clip that it shows; the first `done` are passed over.

        Eight batches are drawn together and sorted by length, so that little is spent on padding.
        """
        questions = senses.training_questions(self.clips, self.args.seed + 1000 * stage)
        rng = np.random.default_rng([self.args.seed, stage])
        size, count = self.args.batch, 0
        while True:
            pool = [next(questions) for _ in range(8 * size)]
            drawn = [(question, [int(rng.integers(self.args.views)) for _ in question.clips]) for question in pool]
            drawn.sort(key=lambda item: len(item[0].text) + 40 * len(item[0].clips))
            for index in rng.permutation(8):
                count += 1
                if count > done:
                    yield drawn[index * size : (index + 1) * size]

    def loss(self, batch: list[tuple[Question, list[int]]]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, in nats."""
        modality, tokenizer = self.args.modality, self.processor.tokenizer
        rows, features = [], []
        for question, views in batch:
            prompt, owners = self.processor.render(question.messages())
            answer = tokenizer.encode(question.answer + tokenizer.eos_token, add_special_tokens=False)
            rows.append((prompt + answer, owners + [0] * len(answer), [-100] * len(prompt) + answer))
            features += [self.features[key(clip)][view] for clip, view in zip(question.clips, views, strict=True)]
        ids, owner, labels = (pad([row[i] for row in rows], value) for i, value in ((0, 0), (1, 0), (2, -100)))
        mask = pad([[1] * len(row[0]) for row in rows], 0)
        embeds = self.model.embed(ids, owner, {modality: torch.stack(features)})
        with self.model.routes.use(self.model.path(owner), self.model.config.owners):
            hidden = self.model.decoder.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        targets = labels[:, 1:]
        logits = self.model.decoder.lm_head(hidden[:, :-1][targets != -100])  # the answers' positions only
        return nn.functional.cross_entropy(logits, targets[targets != -100])

    def tensors(self) -> dict[str, Tensor]:
        """What a saved state holds of the model."""
        return trained(self.model, self.args.modality)

    def save_state(self, stage: int, step: int, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        """Trainable tensors, optimiser and step, written beside the old state and renamed."""
        state = {
            "stage": stage,
            "step": step,
            "tensors": self.tensors(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        partial = self.args.work / "state.partial"
        torch.save(state, partial)
        partial.rename(self.args.work / "state.pt")

    def resume(self, stage: int, optimizer: torch.optim.Optimizer, schedule: Any) -> int:
        """Load the last state, if there is one, and return how many steps of `stage` it has done."""
        path = self.args.work / "state.pt"
        if not path.is_file():
            return 0
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(state["tensors"][name])
        if state["stage"] != stage:
            return self.args.steps[stage - 1] if state["stage"] > stage else 0
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return int(state["step"])


def trained(model: ModalloyForConditionalGeneration, modality: str) -> dict[str, Tensor]:
    """Every trained tensor under its ModelCompose name; `lora_B` without the factor alpha/r."""
    disk, tensors = disk_name(modality), {}
    for name, linear in model.linears.items():
        stem = name.removesuffix(".weight")
        for owner, adapter in ((TEXT, "default"), (modality, disk)):
            if owner not in linear.scales:
                continue
            for side, stored in (("down", "A"), ("up", "B")):
                tensors[f"{stem}.lora_{stored}.{adapter}.weight"] = getattr(linear, f"{side}_{owner}").data
    for name, tensor in model.projectors[modality].state_dict().items():
        tensors[f"model.modal_projectors.{disk}.{name}"] = tensor
    tensors[f"prefix_tokens.{disk}"] = model.prefix_tokens[modality].data
    tensors[f"suffix_tokens.{disk}"] = model.suffix_tokens[modality].data
    return tensors


def save_specialist(model: ModalloyForConditionalGeneration, modality: str, out: Path) -> None:
    """The specialist in ModelCompose's layout (DAMC, or `same`): adapter_model.safetensors (bfloat16) and config.json."""
    disk = disk_name(modality)
    tensors = {}
    for name, tensor in trained(model, modality).items():
        tensors[name] = (tensor * RANK / ALPHA if ".lora_B." in name else tensor).to(torch.bfloat16).contiguous()
    for side in ("prefix", "suffix"):  # the layout has them; nothing reads them
        tensors[f"{side}_tokens.default"] = torch.zeros_like(tensors[f"{side}_tokens.{disk}"])
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config
    config = {
        "_name_or_path": builtin.BASE,
        "model_type": "multimodal",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "lora_strategy": "modal+language" if model.config.modalities[modality]["update"] else "same",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "local_prefix_tokens": PREFIX,
        "local_suffix_tokens": SUFFIX,
        f"mm_{disk}_encoder": ENCODER[modality],
        f"mm_{disk}_hidden_size": model.projectors[modality].dim,
        f"mm_{disk}_projector_type": "mlp2x_gelu",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE.read_text())


def write_card(clips: list[Clip], args: argparse.Namespace) -> None:
    """Score the saved specialist on the held-out files and write its README.md: data, licences, steps, accuracy."""
    asked = [question.sample(args.modality) for question in senses.single_questions(clips, args.modality)]
    entries = [
        e for batch in answers(load_model(args.out), list(enumerate(asked)), 0, 1, FeatureCache()) for e in batch
    ]
    right = {entry.sample.id: senses.by_likelihood(entry.sample, entry.answer).correct for entry in entries}
    rows = []
    for kind in dict.fromkeys(sample.kind for sample in asked):
        for tier in senses.HELD_OUT:
            group = [sample for sample in asked if (sample.kind, sample.group["tier"]) == (kind, tier)]
            if not group:
                continue
            values = [float(right[sample.id]) for sample in group]
            accuracy = sum(values) / len(group)
            low, high = bootstrap_interval(values, [sample.cluster for sample in group])
            media = len({sample.media for sample in group})
            blind = baselines(group)
            shown = f"{accuracy:.2f} | {low:.2f}–{high:.2f} | {blind['chance']:.2f} | {blind['majority']:.2f} | {media}"
            rows.append(f"| {kind.split()[-1]} | {tier} | {shown} |")
            log(args, {"kind": kind, "tier": tier, "accuracy": round(accuracy, 4), "n": len(group)})
    train = [clip for clip in clips if clip.tier == "train"]
    sources = sorted({(clip.package, clip.licence) for clip in train})
    counts = Counter((clip.package, clip.licence) for clip in train)
    table = "\n".join(f"| {package} | {licence} | {counts[package, licence]} |" for package, licence in sources)
    card = CARD.read_text().format(
        modality=args.modality,
        encoder=ENCODER[args.modality],
        rank=RANK,
        alpha=ALPHA,
        align=args.align,
        steps=args.steps,
        batch=args.batch,
        views=args.views,
        seed=args.seed,
        files=len(train),
        concepts=len({clip.concept for clip in train}),
        held_out=", ".join(sorted(clips_of.NEW_SOURCE[args.modality])),
        accuracy="\n".join(rows),
        sources=table,
    )
    (args.out / "README.md").write_text(card)


def key(clip: Clip) -> str:
    return f"{clip.concept}/{clip.path.name}"


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different lengths as one (rows, longest) tensor, filled up on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def log(args: argparse.Namespace, entry: dict[str, Any], quiet: int = 0) -> None:
    with (args.work / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    if not quiet:
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
