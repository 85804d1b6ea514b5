"""Trains one built-in specialist, by the recipe of SSAM's specialists (ModelCompose, DAMC layout).

Every specialist starts from the update that `start.py` trained on writing (`--start`), for text and for its own tokens.
Stage 1 trains the projector alone: first towards the decoder's embeddings of the things' names, or of what is said, which
needs no decoder and so takes little time, then through the decoder. Stage 2 trains a low-rank update for the modality's
tokens, another for text tokens, and the prefix and suffix tokens, with everything else frozen. Encoder features are computed
once. Re-running resumes.

    python examples/specialists/train.py --modality image --data DIR --out modalloy/builtin/specialists/image
"""

import argparse
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import aligning
import numpy as np
import torch
from augment import VIEW
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer import Trainer, log, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from modalloy import builtin
from modalloy.evals import corpus, senses
from modalloy.evals.ask import answers
from modalloy.evals.benchmark import Source
from modalloy.evals.corpus import Clip
from modalloy.evals.features import FeatureCache
from modalloy.evals.motion import MOTIONS
from modalloy.evals.scores import baselines
from modalloy.evals.statistics import bootstrap_interval
from modalloy.model import load_model
from modalloy.model.config import ModalloyConfig
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.routing import TEXT, low_rank_zeros
from modalloy.names import disk_name
from modalloy.senses.encoders import load_encoder
from modalloy.senses.projectors import build_projector

RANK = 8
ALPHA = 16
PREFIX = SUFFIX = 1
ENCODER = {
    "image": "builtin:efficientnet-lite0-layers",
    "audio": "builtin:whisper-tiny.en-speech",
    "video": "builtin:efficientnet-lite0-motion",
    "point": "builtin:depth-views",
}
KIND = {
    "image": "picture",
    "audio": "speech",
    "video": "picture",
    "point": "shape",
}  # videos are pictures that are moved
VIEWS = {"image": 2, "audio": 1, "video": 2, "point": 8}  # of a training file
CHOSEN = {"image": None, "audio": None, "video": 1500, "point": None}  # training files; None: all
QUERIES = 16  # tokens of the longest question, with some to spare
READER = {"n_layers": 2, "hidden": 256, "heads": 4, "ffn": 512}
ENCODED_TOGETHER = 32
CARD = Path(__file__).with_name("card.md")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    clips = corpus.load(args.data)
    own = training_clips(clips, args.modality)
    model, processor = build([args.modality], clips)
    features = cached_features(model, processor, own, args)
    trainer = Trainer(model, processor, features, own, args)
    if args.start:
        start_from(args.start, model, args.modality)
    projector, aligned = model.projectors[args.modality], args.work / "aligned.safetensors"
    if aligned.is_file():
        projector.load_state_dict(load_file(aligned))
    else:
        align(trainer)
        save_file(projector.state_dict(), aligned)
    trainer.train(1)
    trainer.blind = blind_projectors(trainer)
    trainer.train(2)
    save_specialist(model, args.modality, args.out)
    write_card(own, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", required=True, choices=sorted(ENCODER))
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, required=True, help="the specialist's folder")
    parser.add_argument("--start", type=Path, help="what start.py wrote (default: start from nothing)")
    parser.add_argument(
        "--work", type=Path, help="features, log and resume state (default: build/specialists/MODALITY)"
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(0, 600), help="steps of stage 1 and 2 through the decoder"
    )
    parser.add_argument("--align", type=int, default=600, help="steps of stage 1a")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--views", type=int, help="views per training file: changed copies of it (see augment.py)")
    parser.add_argument(
        "--lr",
        type=float,
        nargs=2,
        default=(5e-4, 2e-4),
        help="learning rates of the modality's update and of the text's",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    args = parser.parse_args()
    args.work = args.work or Path("build/specialists") / args.modality
    args.views = args.views or VIEWS[args.modality]
    return args


def training_clips(clips: Sequence[Clip], modality: str) -> list[Clip]:
    """The files that a sense is trained on: all, or as many as `CHOSEN` says, drawn with one seed and in one order."""
    own = [clip for clip in clips if clip.split == "train" and clip.kind == KIND[modality]]
    count = CHOSEN[modality]
    if count is None or count >= len(own):
        return own
    return [own[index] for index in sorted(random.Random(0).sample(range(len(own)), count))]


def build(
    modalities: Sequence[str], clips: Sequence[Clip], *, single_path: bool = False, rank: int = RANK
) -> tuple[ModalloyForConditionalGeneration, ModalloyProcessor]:
    """The untrained model: the base decoder with zero updates, and randomly initialised projectors.

    Every modality's tokens have an update of their own; on a single path, all tokens use the text update. What is shown
    is told apart as the concepts of their training clips, of which `clips` are all.
    """
    pretrained = AutoModelForCausalLM.from_pretrained(builtin.base(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(builtin.base())
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    encoders = {modality: load_encoder(ENCODER[modality]) for modality in modalities}
    width = pretrained.config.hidden_size
    update = {"rank": rank, "scale": 1.0, "linears": None}
    sizes: dict[str, dict[str, Any]] = {}
    for modality, encoder in encoders.items():
        projector: dict[str, Any]
        if modality == "audio":
            reader = {"n_queries": QUERIES, "n_positions": encoder.n_tokens, "dim": encoder.dim, "width": width}
            entries = len(spoken_tokens(training_clips(clips, modality), tokenizer))
            projector = {"type": "reader", "entries": entries, **READER, **reader}
        else:  # the names of what is shown, and how it moves
            tables = [len({clip.concept for clip in training_clips(clips, modality)})]
            tables += [len(MOTIONS)] if modality == "video" else []
            projector = {"type": "embedding_table", "dim": encoder.dim, "width": width, "entries": tables}
        sizes[modality] = {
            "encoder": {"name": ENCODER[modality], "settings": {}},
            "projector": projector,
            "n_tokens": build_projector(projector, meta=True).n_tokens(encoder.n_tokens),
            "n_prefix": PREFIX,
            "n_suffix": SUFFIX,
            "update": None if single_path else update,
        }
    model = ModalloyForConditionalGeneration(ModalloyConfig(pretrained.config, sizes, update))
    for name, parameter in pretrained.named_parameters():
        model.decoder.get_parameter(name).data.copy_(parameter)
    model.encoders.update(encoders)
    if "audio" in modalities:
        torch.nn.init.normal_(
            model.projectors["audio"].get_parameter("queries"), std=0.5
        )  # queries that are alike would read alike
    generator = torch.Generator().manual_seed(zlib.crc32("+".join(modalities).encode()))
    for linear in model.linears.values():
        for owner in model.config.updates:
            linear.add(owner, low_rank_zeros(linear, rank, generator))
    return model, ModalloyProcessor(tokenizer, sizes)


def start_from(path: Path, model: ModalloyForConditionalGeneration, modality: str) -> None:
    """Begin with the update of `start.py` on both paths, and with the tokens around media that were trained with it."""
    stored = load_file(path)
    disk = disk_name(modality)
    shown = disk if f"prefix_tokens.{disk}" in stored else disk_name("image")  # shapes are shown, as pictures are
    for name, tensor in trained(model, modality).items():
        if ".lora_" in name:
            tensor.copy_(stored[name.replace(f".{disk}.", ".default.")])
        elif name.startswith(("prefix_tokens", "suffix_tokens")):
            tensor.copy_(stored[name.replace(disk, shown)])


def cached_features(
    model: ModalloyForConditionalGeneration, processor: ModalloyProcessor, clips: list[Clip], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Encoder features (views, n_features, dim) in float16, by file."""
    path = args.work / f"features-{args.views}.safetensors"
    features = load_file(path) if path.is_file() else {}
    start = time.perf_counter()
    missing = [clip for clip in clips if str(clip.path) not in features]
    together = max(1, ENCODED_TOGETHER // args.views)
    for first in range(0, len(missing), together):
        group = missing[first : first + together]
        stack = torch.stack([medium for clip in group for medium in views(processor, clip, args)])
        encoded = model.encode(args.modality, stack).half().unflatten(0, (len(group), args.views))
        features |= {
            str(clip.path): one.clone(memory_format=torch.contiguous_format)
            for clip, one in zip(group, encoded, strict=True)
        }
        done = {"features": first + len(group), "of": len(missing), "seconds": round(time.perf_counter() - start, 1)}
        log(args, done, quiet=(first // together) % 20)
    if missing:
        save_file(features, path)
    return features


def views(processor: ModalloyProcessor, clip: Clip, args: argparse.Namespace) -> list[Tensor]:
    """All views of a clip, preprocessed."""
    rng = np.random.default_rng([args.seed, zlib.crc32(str(clip.path).encode())])
    return [
        processor.preprocess(args.modality, VIEW[args.modality](clip.path, view, rng, senses.motion_of(clip, view)))
        for view in range(args.views)
    ]


def align(trainer: Trainer) -> None:
    """Stage 1a of the trainer's modality."""
    args, clips, tokenizer = trainer.args, trainer.clips, trainer.processor.tokenizer
    table = trainer.model.get_input_embeddings().weight.detach()
    projector: Any = trainer.model.projectors[args.modality]

    def report(entry: dict[str, Any]) -> None:
        log(args, entry, quiet=entry["step"] % 50)

    if args.modality == "audio":
        x = torch.cat([trainer.features[str(clip.path)] for clip in clips])
        rows = torch.tensor(aligning.written([clip.text for clip in clips], tokenizer, QUERIES))
        known, transcripts = rows.unique(return_inverse=True)
        transcripts = transcripts.repeat_interleave(args.views, 0)
        aligning.read_aloud(projector, x, transcripts, table[known], args.align, args.seed, report)
        tokens, whole = aligning.read_share(
            projector, x[:: 7 * args.views], transcripts[:: 7 * args.views], table[known]
        )
        log(args, {"stage": "1a", "tokens read": round(tokens, 4), "whole": round(whole, 4), "known": len(known)})
        return
    name(trainer, projector, clips, report)


def spoken_tokens(clips: Sequence[Clip], tokenizer: Any) -> Tensor:
    """The ids of all tokens of what is said, in order."""
    return torch.tensor(aligning.written([clip.text for clip in clips], tokenizer, QUERIES)).unique()


def name(trainer: Trainer, projector: Any, clips: Sequence[Clip], report: aligning.Report) -> None:
    """Teach a projector what the clips show, among all names, and how videos move."""
    args, tokenizer = trainer.args, trainer.processor.tokenizer
    table = trainer.model.get_input_embeddings().weight.detach()

    def words(names: Iterable[str]) -> Tensor:
        return torch.stack([aligning.embedded(name, table, tokenizer) for name in names])

    x = torch.cat([trainer.features[str(clip.path)] for clip in clips]).float()
    place = {concept: index for index, concept in enumerate(dict.fromkeys(clip.concept for clip in trainer.clips))}
    concepts = torch.tensor([place[clip.concept] for clip in clips]).repeat_interleave(args.views)
    asked = [(concepts, words(place))]
    if args.modality == "video":
        motions = list(MOTIONS)
        shown = [motions.index(senses.motion_of(clip, view)) for clip in clips for view in range(args.views)]
        asked.append((torch.tensor(shown), words(motions)))
    aligning.name_things(projector, x, asked, args.align, args.seed, report)


def blind_projectors(trainer: Trainer) -> aligning.Blind | None:
    """A projector for each group of artists, taught with the others' media, and kept in the work folder.

    None where there is but one group, for speech, of which no voice made a good share, and for shapes: most things are the
    shape of one group alone, and a projector that was taught without it knows no such thing.
    """
    args, groups, taught = trainer.args, aligning.artist_groups(trainer.clips), {}
    if args.modality in ("audio", "point") or len(set(groups.values())) < 2:
        return None
    for group in sorted(set(groups.values())):
        path = args.work / f"without-{group}.safetensors"
        projector = build_projector(trainer.model.config.modalities[args.modality]["projector"])
        if path.is_file():
            projector.load_state_dict(load_file(path))
        else:
            others = [clip for clip in trainer.clips if groups[clip.family] != group]
            torch.manual_seed(args.seed)
            name(trainer, projector, others, lambda _: None)
            save_file(projector.state_dict(), path)
            log(args, {"stage": "1a", "without": group, "clips": len(others)})
        taught[group] = projector.requires_grad_(False)
    return aligning.Blind(groups, taught)


def save_specialist(model: ModalloyForConditionalGeneration, modality: str, out: Path) -> None:
    """The specialist in ModelCompose's layout (DAMC, or `same`): adapter_model.safetensors (bfloat16) and config.json."""
    disk, rank = disk_name(modality), model.config.updates[TEXT]["rank"]
    tensors = {}
    for name, tensor in trained(model, modality).items():
        tensors[name] = (tensor * rank / ALPHA if ".lora_B." in name else tensor).to(torch.bfloat16).contiguous()
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
        "lora_r": rank,
        "lora_alpha": ALPHA,
        "local_prefix_tokens": PREFIX,
        "local_suffix_tokens": SUFFIX,
        f"mm_{disk}_encoder": ENCODER[modality],
        f"mm_{disk}_hidden_size": model.projectors[modality].dim,
        f"mm_{disk}_projector_type": model.config.modalities[modality]["projector"]["type"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE.read_text())


def write_card(clips: list[Clip], args: argparse.Namespace) -> None:
    """Score the saved specialist on validation questions of its sense, and write its README.md: data, licences, steps, accuracy."""
    asked = [
        sample
        for sample in senses.samples(Source(args.data, variant="validation", modalities=(args.modality,)))
        if sample.media
    ]
    entries = [
        e for batch in answers(load_model(args.out), list(enumerate(asked)), 0, 8, FeatureCache()) for e in batch
    ]
    right = {entry.sample.id: senses.by_likelihood(entry.sample, entry.answer).correct for entry in entries}
    rows = []
    for kind in dict.fromkeys(sample.kind for sample in asked):
        group = [sample for sample in asked if sample.kind == kind]
        values = [float(right[sample.id]) for sample in group]
        accuracy = sum(values) / len(group)
        low, high = bootstrap_interval(values, [sample.cluster for sample in group])
        media = len({sample.media for sample in group})
        blind = baselines(group)
        shown = f"{accuracy:.2f} | {low:.2f}–{high:.2f} | {blind['chance']:.2f} | {blind['majority']:.2f} | {media}"
        rows.append(f"| {kind.split()[-1]} | {shown} |")
        log(args, {"kind": kind, "accuracy": round(accuracy, 4), "n": len(group)})
    counts = Counter((clip.package, clip.licence) for clip in clips)
    table = "\n".join(f"| {package} | {licence} | {counts[package, licence]} |" for package, licence in sorted(counts))
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
        files=len(clips),
        concepts=len({clip.concept for clip in clips if clip.concept}),
        accuracy="\n".join(rows),
        sources=table,
    )
    (args.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
