"""What did merging do to the model? A result, its base and every parent on short probes, and what is clearly worse."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modalloy import builtin
from modalloy.errors import CheckpointError, ModalloyError
from modalloy.evals import probes
from modalloy.evals.benchmark import wilson
from modalloy.evals.scoring import is_repetitive
from modalloy.evals.statistics import bootstrap_interval
from modalloy.model import load_model
from modalloy.model.chat import ChatModel, user_message
from modalloy.model.hosted import is_hosted
from modalloy.model.load import is_language_model, load_text_path
from modalloy.outputs.manifest import read_manifest
from modalloy.outputs.sources import SOURCES, read_sources
from modalloy.recipe import Recipe, load_recipe
from modalloy.storage.folder import read_json
from modalloy.storage.locate import locate

MERGED = "merged"
TOGETHER = 8  # prompts in a batch
LEAST = 0.1  # a share must be this much worse, and a perplexity this many times as large as exp of it
LEAST_NATS = math.log(1.2)
SHOWN, SHOWN_TOKENS = 2, 4  # samples of each sense that are shown without `thorough`; tokens of the parent's answer
QUESTION = "What is this?"
KEPT = 0.5  # share of a parent's tokens that the merged model must find the likeliest too
LOWER = ("perplexity", "Brier score", "empty answers", "repetitive answers")  # the better, the lower
SHARES = ("empty answers", "repetitive answers")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One measure of one model: its mean, 95 % interval, and of how many probes. A perplexity's values are nats a token."""

    value: float
    low: float
    high: float
    n: int
    values: tuple[float, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Sense:
    """The merged model beside a parent on the parent's own sense, given the parent's answers token by token (teacher forcing).

    `kl` is Σ p log(p/q) in nats a token, p the parent's distribution and q the merged model's; `same` the share of tokens at
    which both have the same likeliest one.
    """

    parent: str
    modality: str
    media: int
    tokens: int
    kl: Row
    same: Row


@dataclass(frozen=True)
class Checked:
    """What was found. `rows` are by model ("merged" first) and measure; `worse` says in words what is clearly worse."""

    rows: dict[str, dict[str, Row]]
    senses: tuple[Sense, ...]
    worse: tuple[str, ...]
    thorough: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is clearly worse."""
        return not self.worse

    @property
    def verdict(self) -> str:
        """One line."""
        return "; ".join(self.worse) if self.worse else "nothing is clearly worse than in base and parents"

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and the manifest."""

        def bare(row: Row) -> dict[str, Any]:
            return {name: value for name, value in asdict(row).items() if name != "values"}

        senses = [asdict(one) | {"kl": bare(one.kl), "same": bare(one.same)} for one in self.senses]
        rows = {name: {measure: bare(row) for measure, row in of.items()} for name, of in self.rows.items()}
        about = {"thorough": self.thorough, "seconds": round(self.seconds, 1), "ok": self.ok, "verdict": self.verdict}
        return about | {"worse": list(self.worse), "models": rows, "senses": senses}


@dataclass(frozen=True)
class _Told:
    """What a parent says of one medium: its answer, the tokens of it, and log-probabilities (tokens, vocabulary) there."""

    medium: Path
    answer: str
    ids: list[int]
    logs: Tensor


def check(
    out: str | Path,
    *,
    thorough: bool = False,
    device: str = "cpu",
    on_model: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Ask the result of a merge, its base (and target) and every parent; text of parents goes through their text path.

    Args:
        out: folder of an `omni` or `full` result, whose base and parents are where the merge found them.
        thorough: all probes, longer answers, every sample; else the first of each kind.
        device: "cpu", "cuda", or "auto".
        on_model: called with the number of models done and of all.

    Raises:
        ModalloyError: `out` is no such result, or its inputs are gone.
    """
    began, out = time.monotonic(), Path(out)
    manifest = read_manifest(out)
    if not (out / "config.json").is_file():
        raise ModalloyError(f"{out}: is no model by itself; output.form omni or full is checked")
    recipe = load_recipe(out / "recipe.yaml")
    if not (out / SOURCES).exists():
        raise CheckpointError(
            f"{out}: has no {SOURCES}, which says where base and parents are; check where it was merged"
        )
    places = read_sources(out, recipe)
    if (gone := places.gone()) is not None:
        raise CheckpointError(f"{gone}: is gone, with which {out} is to be compared; bring it back, or merge again")
    starts = {"target": places.starts.get("target"), "base": places.starts.get("base_model")}
    parents: list[tuple[str, Path | None, str | None]] = [
        (label, None, str(place)) for label, place in starts.items() if place is not None
    ]
    start = parents[-1][2]
    labels = [label for label in manifest["inputs"] if label not in starts]
    parents += [(label, place, start) for label, place in zip(labels, places.models, strict=True)]
    merged = load_model(out, device=device, dtype="auto")
    rows = {MERGED: _examined(merged, thorough)}
    counted: dict[str, int] = {}
    senses = []
    for done, (label, place, beginning) in enumerate(parents, 1):
        on_model(done, len(parents) + 1)
        modality = manifest["inputs"][label].get("modality")
        counted[modality] = counted.get(modality, 0) + 1
        own = modality if counted[modality] == 1 else f"{modality}_{counted[modality]}"
        has_sense = own in merged.modalities and bool(builtin.samples(modality))
        chat = _parent(manifest["inputs"][label], place, str(beginning), merged, device, has_sense)
        rows[label] = _examined(chat, thorough)
        if place is not None and has_sense and modality in chat.modalities:
            media = builtin.samples(modality)[: None if thorough else SHOWN]
            senses.append(_compared(label, own, merged, _told(chat, modality, media)))
        del chat
        gc.collect()
    on_model(len(parents) + 1, len(parents) + 1)
    return Checked(rows, tuple(senses), tuple(_worse(rows, senses)), thorough, time.monotonic() - began)


def check_askable(recipe: Recipe) -> None:
    """Refuse a recipe before it is merged, the result or a parent of which could not be asked: an adapter, or a target,
    donor or base of an architecture that modalloy does not run."""
    if not recipe.form.is_model:
        raise ModalloyError(f"--sanity: an {recipe.form.name} is no model by itself; write output.form: omni or full")
    models = [recipe.target, *(entry.model for entry in recipe.models), recipe.base_model] if recipe.target else []
    for location in filter(None, models):
        folder = locate(location, recipe.folder)
        config = (
            read_json(folder / "config.json") if (folder / "config.json").is_file() else None
        )  # an adapter has none
        if config is not None and not is_hosted(config) and not is_language_model(config):
            found = ", ".join(config.get("architectures") or ["model of no architecture"])
            raise ModalloyError(
                f"--sanity: {location} is a {found}, which modalloy can merge but not run; leave --sanity out"
            )


def _parent(
    told: dict[str, Any], place: Path | None, start: str, merged: ChatModel, device: str, has_sense: bool
) -> ChatModel:
    """A parent: with its sense, or its text path under the merged model's template."""
    if place is not None and told.get("layout") == "donor":  # has a tokenizer of its own
        return load_model(place, device=device, dtype="auto")
    if place is not None and has_sense and (place / "config.json").is_file():
        return load_model(place, base=start, device=device, dtype="auto")
    return load_text_path(None if place is None else str(place), start, merged.processor.tokenizer, device=device)


def _examined(chat: ChatModel, thorough: bool) -> dict[str, Row]:
    """Every measure of a model."""
    found: dict[str, list[float]] = {"perplexity": _nats(chat, probes.text(thorough))}
    brier: list[float] = []
    for some in _batches(probes.choices(thorough)):
        for choice, scores in zip(some, _scores(chat, some), strict=True):
            found.setdefault(choice.kind, []).append(float(scores[0] > max(scores[1:])))
            if choice.kind in probes.CALIBRATED:
                shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
                shares[0] -= 1
                brier.append(float(shares.square().sum()))
    found["Brier score"] = brier
    many = probes.WRITTEN_THOROUGH if thorough else probes.WRITTEN
    new_tokens = probes.NEW_TOKENS_THOROUGH if thorough else probes.NEW_TOKENS
    asked = [chat.prompt(user_message(prompt, ())) for prompt in probes.PROMPTS[:many]]
    answers = [answer for some in _batches(asked) for answer, _ in chat.generate(some, max_new_tokens=new_tokens)]
    found["empty answers"] = [float(not re.search(r"\w", answer)) for answer in answers]
    found["repetitive answers"] = [float(is_repetitive(answer)) for answer in answers]
    return {name: _row(name, values) for name, values in found.items()}


def _nats(chat: ChatModel, text: str) -> list[float]:
    """What every token of a text but the first costs."""
    ids = torch.tensor([chat.processor.tokenizer.encode(text)], device=chat.model.device)
    with torch.no_grad():
        logs = chat.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    values: list[float] = (-logs.gather(1, ids[0, 1:, None]).squeeze(1)).tolist()
    return values


def _scores(chat: ChatModel, some: Sequence[probes.Choice]) -> list[list[float]]:
    """Log-likelihoods of each choice's options, a token each of long ones, whose lengths differ."""
    if not some[0].chat:
        return chat.continuations([one.prompt for one in some], [one.options for one in some])
    prompts = [chat.prompt(user_message(one.prompt, ())) for one in some]
    lengths = [[len(chat.processor.tokenizer.encode(option)) for option in one.options] for one in some]
    found = chat.score(prompts, [one.options for one in some])
    return [[s / n for s, n in zip(own, sizes, strict=True)] for own, sizes in zip(found, lengths, strict=True)]


def _told(chat: ChatModel, modality: str, media: Sequence[Path]) -> list[_Told]:
    """What a parent answers about each medium, and how surely."""
    prompts = [chat.prompt(user_message(QUESTION, [(modality, medium)])) for medium in media]
    answers = [answer for some in _batches(prompts) for answer, _ in chat.generate(some, max_new_tokens=SHOWN_TOKENS)]
    told = zip(media, prompts, answers, strict=True)
    return [_Told(medium, answer, *chat.distributions(prompt, answer)) for medium, prompt, answer in told]


def _compared(parent: str, modality: str, merged: ChatModel, told: Sequence[_Told]) -> Sense:
    """The merged model, given a parent's answers."""
    kl: list[float] = []
    same: list[float] = []
    media: list[tuple[str, ...]] = []
    for one in told:
        prompt = merged.prompt(user_message(QUESTION, [(modality, one.medium)]))
        ids, logs = merged.distributions(prompt, one.answer)
        if ids != one.ids or logs.shape != one.logs.shape:
            raise CheckpointError(f"{parent}: its tokenizer is not the merged model's, so that they cannot be compared")
        p, q = one.logs.double(), logs.double()
        kl += (p.exp() * (p - q)).sum(1).tolist()
        same += (p.argmax(1) == q.argmax(1)).double().tolist()
        media += [(one.medium.name,)] * len(ids)
    low, high = bootstrap_interval(kl, media)
    of_kl = Row(sum(kl) / len(kl), low, high, len(kl))
    return Sense(parent, modality, len(told), len(kl), of_kl, _row("same", same))


def _row(name: str, values: Sequence[float]) -> Row:
    """The mean with its interval: Wilson's of shares, by bootstrap of others."""
    n, mean = len(values), sum(values) / len(values)
    if name not in ("perplexity", "Brier score"):
        return Row(mean, *wilson(round(sum(values)), n), n, tuple(values))
    if not all(map(math.isfinite, values)):
        return Row(math.inf, math.inf, math.inf, n, tuple(values))
    low, high = bootstrap_interval(values, [()] * n)
    if name == "perplexity":
        mean, low, high = map(math.exp, (mean, low, high))
    return Row(mean, low, high, n, tuple(values))


def _worse(rows: dict[str, dict[str, Row]], senses: Sequence[Sense]) -> Iterator[str]:
    """What is clearly worse: beyond chance (95 %, paired by probe) and by no little, than in the worst of base and parents."""
    merged = rows[MERGED]
    for name, own in merged.items():
        sign = -1.0 if name in LOWER else 1.0
        others = {label: of[name] for label, of in rows.items() if label != MERGED}
        label, worst = min(others.items(), key=lambda item: sign * item[1].value)
        if not math.isfinite(own.value) and math.isfinite(worst.value):
            yield f"{name} is not finite"
            continue
        if len(own.values) != len(worst.values) or not math.isfinite(
            worst.value
        ):  # of a text in tokens of another kind
            continue
        better = [sign * (a - b) for a, b in zip(own.values, worst.values, strict=True)]
        mean = sum(better) / len(better)
        least = LEAST_NATS if name == "perplexity" else LEAST
        if mean < -least and bootstrap_interval(better, [()] * len(better))[1] < 0:
            yield f"{name} {own.value:.2f} against {worst.value:.2f} of the worst of base and parents ({label})"
    for sense in senses:
        if sense.same.high < KEPT:
            yield (
                f"{sense.modality}: of {sense.parent}'s tokens {sense.same.value:.2f} are the likeliest here too "
                f"(KL {sense.kl.value:.2f} nats a token)"
            )


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Some at a time; choices of one form."""
    start = 0
    while start < len(items):
        end = start + 1
        form = getattr(items[start], "chat", None)
        while end < min(len(items), start + TOGETHER) and getattr(items[end], "chat", None) == form:
            end += 1
        yield items[start:end]
        start = end
