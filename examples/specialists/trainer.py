"""Two stages of AdamW through the frozen decoder, on a fixed stream of lessons; a stopped run goes on at its last saved step."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from aligning import Blind
from lessons import Lesson, lessons
from torch import Tensor, nn

from modalloy.evals.corpus import Clip
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.routing import TEXT
from modalloy.names import disk_name

BLUR = 0.6  # of a feature of speech, at most
POOL = 8  # batches that are drawn together and sorted by length, so that little is spent on padding


class Trainer:
    """Trains one modality's projector (stage 1), then its update, the text update and the tokens around a medium (stage 2).

    Args:
        features: (views, n_features, dim) of every training clip, by file.
        args: modality, steps, batch, views, seed, save_every, work, and lr, the learning rates of the modality's own
            parameters and of the text update.
    """

    def __init__(
        self,
        model: ModalloyForConditionalGeneration,
        processor: ModalloyProcessor,
        features: dict[str, Tensor],
        clips: list[Clip],
        args: argparse.Namespace,
    ) -> None:
        self.model, self.processor, self.features, self.clips, self.args = model, processor, features, clips, args
        self.blind: Blind | None = None

    def train(self, stage: int) -> None:
        """Run (or finish) one stage."""
        args, steps = self.args, self.args.steps[stage - 1]
        if not steps:
            return
        groups = self.parameters(stage)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        done = self.resume(stage, optimizer, schedule)
        stream = self.batches(stage, done)
        start = time.perf_counter()
        for step in range(done, steps):
            torch.manual_seed(args.seed + step)  # of the blur: a resumed run draws what an undisturbed one does
            loss = self.loss(next(stream))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            entry = {"stage": stage, "step": step + 1, "loss": round(loss.item(), 4), "grad": round(float(norm), 3)}
            log(args, entry | {"seconds": round(time.perf_counter() - start, 1)}, quiet=(step + 1) % 10)
            if (step + 1) % args.save_every == 0 or step + 1 == steps:
                self.save_state(stage, step + 1, optimizer, schedule)

    def parameters(self, stage: int) -> list[dict[str, Any]]:
        """Parameter groups of a stage, with everything else frozen."""
        model, modality, (own_rate, text_rate) = self.model, self.args.modality, self.args.lr
        model.requires_grad_(False)
        if stage == 1:
            groups: list[dict[str, Any]] = [{"params": list(model.projectors[modality].parameters()), "lr": 2e-4}]
        else:
            linears = model.linears.values()
            own = [getattr(linear, f"{side}_{modality}") for linear in linears for side in ("up", "down")]
            text = [getattr(linear, f"{side}_{TEXT}") for linear in linears for side in ("up", "down")]
            extra = [model.prefix_tokens[modality], model.suffix_tokens[modality]]
            groups = [{"params": [*own, *extra], "lr": own_rate}, {"params": text, "lr": text_rate}]
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return groups

    def batches(self, stage: int, done: int) -> Iterator[list[Lesson]]:
        """Batches of lessons of like lengths; the first `done` are passed over."""
        args = self.args
        stream = lessons(self.clips, args.modality, args.views, args.seed + 1000 * stage)
        rng = np.random.default_rng([args.seed, stage])
        count = 0
        while True:
            pool = sorted((next(stream) for _ in range(POOL * args.batch)), key=lambda lesson: lesson.length)
            for index in rng.permutation(POOL):
                count += 1
                if count > done:
                    yield pool[index * args.batch : (index + 1) * args.batch]

    def loss(self, batch: list[Lesson]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, in nats."""
        said = [(lesson.messages(), lesson.answer) for lesson in batch]
        features = torch.stack([self.features[str(lesson.clip.path)][lesson.view] for lesson in batch]).float()
        if self.args.modality == "audio":  # voices that are new are read less surely
            features = features + BLUR * torch.rand(len(batch), 1, 1) * torch.randn(features.shape)
        return self.cross_entropy(said, lambda ids, owner: self.embed(ids, owner, features, batch))

    def cross_entropy(self, said: Sequence[tuple[Any, str]], embed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean over the tokens of the answers in (messages, answer); `embed` gives the embeddings of ids and owners."""
        tokenizer, rows = self.processor.tokenizer, []
        for messages, answer in said:
            prompt, owners = self.processor.render(messages)
            tokens = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
            rows.append((prompt + tokens, owners + [0] * len(tokens), [-100] * len(prompt) + tokens))
        ids, owner, labels = (pad([row[i] for row in rows], value) for i, value in ((0, 0), (1, 0), (2, -100)))
        mask = pad([[1] * len(row[0]) for row in rows], 0)
        embeds = embed(ids, owner)
        with self.model.routes.use(self.model.path(owner), self.model.config.owners):
            hidden = self.model.decoder.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        targets = labels[:, 1:]
        logits = self.model.decoder.lm_head(hidden[:, :-1][targets != -100])  # the answers' positions only
        return nn.functional.cross_entropy(logits, targets[targets != -100])

    def embed(self, ids: Tensor, owner: Tensor, features: Tensor, batch: list[Lesson]) -> Tensor:
        """What the decoder is given, (batch, tokens, width); media are projected by `blind`, where there is one."""
        modality, projectors = batch[0].modality, self.model.projectors
        own = projectors[modality]
        if self.blind is not None:
            self.blind.families = [lesson.clip.family for lesson in batch]
            projectors[modality] = self.blind
        try:
            return self.model.embed(ids, owner, {modality: features})
        finally:
            projectors[modality] = own

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
        tensors[f"model.modal_projectors.{disk}.{published(name, modality)}"] = tensor
    tensors[f"prefix_tokens.{disk}"] = model.prefix_tokens[modality].data
    tensors[f"suffix_tokens.{disk}"] = model.suffix_tokens[modality].data
    return tensors


def published(name: str, modality: str) -> str:
    """The published name of a projector's tensor: the speech specialist's is a Q-Former, the others' are LLaVA's."""
    from modalloy.senses.projectors.qformer import published_name

    return published_name(name) if modality == "audio" else name


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different lengths as one (rows, longest) tensor, filled up on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def log(args: argparse.Namespace, entry: dict[str, Any], quiet: int = 0) -> None:
    """One line of the run's log; printed too, unless `quiet`."""
    with (args.work / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    if not quiet:
        print(json.dumps(entry), flush=True)
