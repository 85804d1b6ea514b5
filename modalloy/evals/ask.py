"""Asks a model every question of a benchmark and logs the answers; a run that was killed goes on where it was."""

import hashlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from modalloy.errors import LengthError, LongMediaError, MediaError, ModalloyError, OutputError, plain
from modalloy.evals.benchmark import Answer, Benchmark, Sample, Source, questions
from modalloy.evals.features import FeatureCache
from modalloy.evals.files import OUTSIDE, leads_out
from modalloy.evals.log import Entry, Log, Run, described
from modalloy.model import ChatModel
from modalloy.model.chat import Prompt, Tokens, placed_message
from modalloy.storage.folder import file_sha256, read_json
from modalloy.storage.locate import locate

Progress = Callable[[int, int], None]
Batch = list[tuple[int, Sample, Prompt]]
NO_TOKENS: Mapping[str, Tokens] = MappingProxyType({})
LIKE = 16  # tokens by which prompts of one batch may differ in length


def evaluate(
    load: Callable[[], ChatModel],
    model: dict[str, Any],
    benchmark: Benchmark,
    source: Source,
    folder: Path,
    *,
    limit: int | None = None,
    resume: bool = False,
    batch_size: int = 1,
    cache: FeatureCache | None = None,
    on_sample: Progress | None = None,
) -> Run:
    """Answers of a model to (the first `limit`) samples of a benchmark, logged in `folder`, with those logged before.

    Args:
        load: gives the model; called when there is something left to ask.
        model: what identifies it (see `identify`).
        batch_size: questions that are asked together. Batches of more than one are padded, which may change an answer by
            rounding.
        cache: encoder features shared with other runs.
        on_sample: called with (samples done, samples in all).

    Raises:
        ModalloyError: the data, the folder or the model is not fit for it. A medium that cannot be read is an outcome.
    """
    samples = questions(benchmark, source)
    wanted = samples[:limit]
    generation = {"decoding": "greedy", "max_new_tokens": benchmark.max_new_tokens, "batch_size": batch_size}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    meta = described(benchmark, source, len(samples), model, generation, **versions)
    with Log(folder, meta, resume=resume) as log:
        _same_samples(folder, log.entries, samples)
        done = {entry.index for entry in log.entries}
        todo = [(index, sample) for index, sample in enumerate(wanted) if index not in done]
        if todo:
            chat = load()
            _check_senses(chat, wanted)
            count = len(wanted) - len(todo)
            cache = cache or FeatureCache()
            for entries in answers(chat, todo, benchmark.max_new_tokens, batch_size, cache, folders=source.folders):
                log.add(benchmark, *entries)
                count += len(entries)
                if on_sample is not None:
                    on_sample(count, len(wanted))
    return Run(folder, meta, sorted(log.entries, key=lambda entry: entry.index))


def identify(model: str | Path, **options: Any) -> dict[str, Any]:
    """What a log calls a model: where it is, a hash of all that it is made of, its recipe, and how it was loaded."""
    folder = locate(str(model), whole=True)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        fingerprint, recipe = file_sha256(manifest), read_json(manifest)
        described = {key: recipe.get(key) for key in ("method", "parameters", "form")}
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}" for path in files]
        fingerprint, described = hashlib.sha256("\n".join(lines).encode()).hexdigest(), {}
    return {"path": str(model), "fingerprint": fingerprint, "recipe": described or None, "options": options}


def answers(
    chat: ChatModel,
    todo: list[tuple[int, Sample]],
    max_new_tokens: int,
    batch_size: int,
    cache: FeatureCache,
    *,
    tokens: Mapping[str, Tokens] = NO_TOKENS,
    folders: tuple[str, ...] | None = None,
) -> Iterator[list[Entry]]:
    """Entries of the samples, batch by batch. The prompts of a batch have the same modalities and are of like length.

    Of samples whose id is in `tokens`, these tokens are asked for at every place of their one option (see
    `ChatModel.expect`), not its likelihood. Media that lead out of `folders` (None: anywhere) are not read.
    """
    waiting: dict[str, Batch] = {}
    for index, sample in todo:
        start = time.perf_counter()
        try:
            prompt = _prompt(chat, sample, cache, folders)
        except _UnreadableError as error:
            yield [_entry(index, sample, status="media_error", error=str(error), start=start)]
            continue
        asked = sample.plain, bool(sample.options), sample.id in tokens
        key = str((*asked, sorted({m for m, _ in sample.media}), len(prompt.ids) // LIKE))
        batch = waiting.setdefault(key, [])
        batch.append((index, sample, prompt))
        if len(batch) == batch_size:
            yield _answer(chat, waiting.pop(key), max_new_tokens, tokens)
    for batch in waiting.values():
        yield _answer(chat, batch, max_new_tokens, tokens)


def _answer(chat: ChatModel, batch: Batch, max_new_tokens: int, tokens: Mapping[str, Tokens]) -> list[Entry]:
    """Entries of one batch; a batch that does not fit the memory or the context is asked one by one."""
    start = time.perf_counter()
    prompts = [prompt for _, _, prompt in batch]
    try:
        if batch[0][1].id in tokens:
            given = [(answer, 0) for answer in _expected(chat, batch, tokens)]
        elif batch[0][1].options:
            given = [(Answer(likelihoods=tuple(found)), 0) for found in _likelihoods(chat, batch)]
        else:
            given = [(Answer(text=text), n) for text, n in chat.generate(prompts, max_new_tokens=max_new_tokens)]
    except (torch.OutOfMemoryError, LengthError) as error:
        if len(batch) > 1:
            return list(itertools.chain.from_iterable(_answer(chat, [one], max_new_tokens, tokens) for one in batch))
        index, sample, prompt = batch[0]
        reason, status = str(error).split("\n")[0], "too_long" if isinstance(error, LengthError) else "oom"
        return [_entry(index, sample, status=status, error=reason, start=start, prompt=prompt)]
    return [
        _entry(index, sample, answer=answer, new_tokens=n, start=start, share=len(batch), prompt=prompt)
        for (index, sample, prompt), (answer, n) in zip(batch, given, strict=True)
    ]


def _likelihoods(chat: ChatModel, batch: Batch) -> list[list[float]]:
    options = [sample.options for _, sample, _ in batch]
    if batch[0][1].plain:
        found = chat.continuations([sample.text for _, sample, _ in batch], options)
    else:
        found = chat.score([prompt for _, _, prompt in batch], options)
    for (_, sample, _), nats in zip(batch, found, strict=True):
        _check_nats(sample, nats)
    return found


def _expected(chat: ChatModel, batch: Batch, tokens: Mapping[str, Tokens]) -> list[Answer]:
    samples = [sample for _, sample, _ in batch]
    prompts, options = [prompt for _, _, prompt in batch], [sample.options[0] for sample in samples]
    answers = []
    found = chat.expect(prompts, options, [tokens[sample.id] for sample in samples])
    for sample, (ids, nats) in zip(samples, found, strict=True):
        answer = Answer(likelihoods=tuple(nats.flatten().tolist()), predicted=tuple(ids.flatten().tolist()))
        _check_nats(sample, answer.likelihoods)
        answers.append(answer)
    return answers


def _check_nats(sample: Sample, nats: Sequence[float]) -> None:
    if any(map(math.isnan, nats)):
        raise ModalloyError(
            f"{sample.id}: the model gives NaN for the likelihood of an answer; its weights are damaged (see modalloy "
            "verify), or too large for float16 (choose --dtype float32)"
        )


def _prompt(chat: ChatModel, sample: Sample, cache: FeatureCache, folders: tuple[str, ...] | None) -> Prompt:
    """The prompt of a sample, with its media as features."""
    if sample.plain:
        return chat.plain_prompt(sample.text)

    def features(modality: str, path: Any) -> Any:
        if folders is not None and leads_out(path, folders):
            raise _UnreadableError(f"{plain(path)}: {OUTSIDE}")
        try:
            return cache.features(chat, modality, path)
        except MediaError as error:
            raise _UnreadableError(str(error)) from error

    message = placed_message(sample.text, sample.media, chat.modalities)
    try:
        return chat.prompt(message, features)
    except LongMediaError as error:
        raise _UnreadableError(str(error)) from error


class _UnreadableError(Exception):
    """A medium of a sample cannot be read (a prompt that cannot be made is a MediaError, and ends the run)."""


def _entry(
    index: int,
    sample: Sample,
    *,
    start: float,
    answer: Answer | None = None,
    status: str = "ok",
    error: str | None = None,
    new_tokens: int = 0,
    share: int = 1,
    prompt: Prompt | None = None,
) -> Entry:
    return Entry(
        index=index,
        sample=sample,
        answer=answer or Answer(),
        status=status,
        error=error,
        seconds=(time.perf_counter() - start) / share,
        prompt_tokens=0 if prompt is None else len(prompt.ids),
        new_tokens=new_tokens,
        prompt_sha256="" if prompt is None else hashlib.sha256(prompt.text.encode()).hexdigest(),
    )


def _same_samples(folder: Path, entries: list[Entry], samples: list[Sample]) -> None:
    """Refuse to go on with a log whose questions are no longer asked so."""
    for entry in entries:
        now = samples[entry.index].to_dict() if entry.index < len(samples) else None
        if now != entry.sample.to_dict():
            raise OutputError(
                f"{folder}: its question {entry.index} ({entry.sample.id}) is now another one, so its answers cannot be "
                "gone on with; choose another folder"
            )


def _check_senses(chat: ChatModel, samples: list[Sample]) -> None:
    """Refuse samples that show what the model has no sense for."""
    shown = {modality for sample in samples for modality, _ in sample.media}
    if lacking := sorted(shown - set(chat.modalities)):
        able = sorted(shown & set(chat.modalities))
        remedy = f"show less with --modalities {'+'.join(able)}" if able else "choose another task"
        raise ModalloyError(
            f"the questions show {', '.join(lacking)}, and the model takes {', '.join(chat.modalities) or 'text only'}; {remedy}"
        )
