"""Answers of candidates to the probes: from the log, else from the one model in memory."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modalloy.errors import MediaError, ModalloyError, OutputError, shown
from modalloy.evals.ask import NO_TOKENS, answers
from modalloy.evals.benchmark import Sample
from modalloy.evals.features import FeatureCache
from modalloy.model.chat import Tokens
from modalloy.planning.plan import Plan
from modalloy.search.candidates import RoutedBench
from modalloy.search.space import Axis, Changes, start
from modalloy.search.target import LoadedTarget, PlacedTarget, target_bench
from modalloy.search.trials import Trials

if TYPE_CHECKING:
    from modalloy.search.settings import Settings

TARGET = "target"  # in the log: the model of α = 0
Line = dict[str, Any]


class Asking:
    """Answers of candidates to the probes: from the log, else from the one model in memory."""

    def __init__(
        self, planned: Plan, axes: list[Axis], probes: list[Sample], log: Trials, settings: "Settings"
    ) -> None:
        self.planned, self.probes, self.log, self.settings = planned, probes, log, settings
        self.cache = settings.cache or FeatureCache()
        self.home = start(planned, axes)
        self.expected = 0
        self.used: dict[str, Line] = {}  # lines of the log that this search wanted
        self.serving = ""

    @cached_property
    def bench(self) -> RoutedBench | PlacedTarget | LoadedTarget:
        """Loaded when there is something to ask, and every medium encoded once."""
        begin = time.perf_counter()
        given, across = self.settings, self.planned.recipe.is_across
        options: dict[str, Any] = {"device": given.device, "dtype": given.dtype}
        options["allow_base_mismatch"] = given.allow_base_mismatch
        found = target_bench(self.planned, given.load, **options) if across else RoutedBench(self.planned, **options)
        loaded = time.perf_counter()
        for modality, path in dict.fromkeys(medium for probe in self.probes for medium in probe.media):
            self.cache.features(found.chat, modality, path)
        seconds = {"load_s": loaded - begin, "features_s": time.perf_counter() - loaded}
        if across:
            size = self.planned.write_bytes
        else:
            size = sum(one.numel() * one.element_size() for one in found.chat.model.parameters())
        self.log.add("loaded", seconds | {"checkpoint_bytes": size})
        return found

    def sketch(self, changes: Changes) -> list[float]:
        """Numbers that stand for a candidate's merge."""
        key = f"served {self._key(changes)}"
        if key not in self.log.lines:
            self._put(changes)
        self.used[key] = self.log.lines[key]
        found: list[float] = self.used[key]["sketch"]
        return found

    def ask(self, changes: Changes, asked: Sequence[Sample], tokens: Mapping[str, Tokens] = NO_TOKENS) -> list[Line]:
        """Lines of a candidate's answers: generated, or likelihoods of a sample's options where it has some, or of `tokens` at
        every place of its option (see `answers`)."""
        # the target itself is a parent too, and asked once
        is_target = self.planned.recipe.is_across and not any(self.sketch(changes))
        name = TARGET if is_target else self._key(changes)
        return self._lines(name, lambda: self._put(changes), asked, tokens)

    @cached_property
    def own(self) -> list[Sample]:
        """The probes of one sense, which its specialist answers."""
        senses = [specialist.modality for specialist in self.planned.specialists]
        return [probe for probe in self.probes if any(shows_only(probe, one) for one in senses)]

    @cached_property
    def parents(self) -> dict[str, Line]:
        """The answer of the specialist of its sense to every probe of one sense, by the probe's id; or of the target to all."""
        return self.ask_parents(self.probes)

    def ask_parents(self, asked: Sequence[Sample], tokens: Mapping[str, Tokens] = NO_TOKENS) -> dict[str, Line]:
        """Lines of the specialist of its sense for every sample of one sense, by the sample's id; or of the target for all."""
        found: dict[str, Line] = {}
        if self.planned.recipe.is_across:
            lines = self._lines(TARGET, lambda: self._put_parent(0), asked, tokens)
            return {probe.id: line for probe, line in zip(asked, lines, strict=True)}
        for index, specialist in enumerate(self.planned.specialists):
            own = [probe for probe in asked if shows_only(probe, specialist.modality)]
            if own:
                name = f"parent {specialist.modality}"
                lines = self._lines(name, lambda at=index: self._put_parent(at), own, tokens)  # type: ignore[misc]
                found |= {probe.id: line for probe, line in zip(own, lines, strict=True)}
        return found

    def _lines(
        self,
        name: str,
        serve: Callable[[], None],
        asked: Sequence[Sample],
        tokens: Mapping[str, Tokens] = NO_TOKENS,
    ) -> list[Line]:
        keys = [f"{name} · {p.id} · {json.dumps(p.options)}{_mark(tokens.get(p.id))}" for p in asked]
        todo = [(index, probe) for index, probe in enumerate(asked) if keys[index] not in self.log.lines]
        if todo:
            serve()
            size, limit = self.settings.batch_size, self.settings.max_new_tokens
            for entries in answers(self.bench.chat, todo, limit, size, self.cache, tokens=tokens):
                for entry in entries:
                    if entry.status != "ok":
                        kind = MediaError if entry.status == "media_error" else ModalloyError
                        raise kind(
                            f"{entry.error}; use a smaller --batch-size" if entry.status == "oom" else entry.error
                        )
                    line: Line = {"model": name, "probe": entry.sample.id, "text": entry.answer.text}
                    line |= {"likelihoods": list(entry.answer.likelihoods), "n_out": entry.new_tokens}
                    line |= {"predicted": list(entry.answer.predicted)} if entry.sample.id in tokens else {}
                    self.log.add(keys[entry.index], line | {"seconds": round(entry.seconds, 4)})
                self._progress()
        lines = [self.log.lines[key] for key in keys]
        for probe, line in zip(asked, lines, strict=True):
            if not _fits(line, probe, tokens.get(probe.id)):
                raise OutputError(
                    f"{self.log.path}: holds another number of likelihoods for the probe {shown(probe.text)} than it has options; "
                    "choose another folder"
                )
        self.used |= dict(zip(keys, lines, strict=True))
        self._progress()
        return lines

    def _put(self, changes: Changes) -> None:
        key = f"served {self._key(changes)}"
        if self.serving == key:
            return
        bench, begin = self.bench, time.perf_counter()
        sketch = bench.put(changes)
        self.serving = key
        if key not in self.log.lines:
            self.log.add(key, {"sketch": sketch, "seconds": round(time.perf_counter() - begin, 4)})

    def _put_parent(self, index: int) -> None:
        self.bench.put_parent(index)
        self.serving = f"parent {index}"

    def _key(self, changes: Changes) -> str:
        """A candidate's name in the log: what of it is not as in the recipe."""
        return json.dumps({n: v for n, v in changes.items() if v != self.home[n]}, sort_keys=True)

    def _progress(self) -> None:
        done = sum("probe" in line for line in self.log.lines.values())
        self.settings.on_answer(done, max(done, self.expected))

    def cost(self) -> dict[str, Any]:
        """Merges, answers and seconds of this search, and an estimate of the published way: every candidate written as a
        full checkpoint, loaded, and asked with its encoders run again (from the times measured here; writing not counted)."""
        loaded = self.log.lines["loaded"]
        served = [line for key, line in self.used.items() if key.startswith("served ")]
        asked = [line for line in self.used.values() if "probe" in line]
        models = {line["model"] for line in asked if not line["model"].startswith("parent ")}
        of_candidates = sum(line["seconds"] for line in asked if not line["model"].startswith("parent "))
        each = loaded["load_s"] + loaded["features_s"] + of_candidates / max(1, len(models))
        serving_s, answers_s = (sum(line["seconds"] for line in lines) for lines in (served, asked))
        return {
            "merges": len(served),
            "candidates_asked": len(models),
            "generated": sum(line["n_out"] > 0 for line in asked),
            "scored": sum(line["n_out"] == 0 for line in asked),
            "seconds": {
                "load": round(loaded["load_s"], 2),
                "features": round(loaded["features_s"], 2),
                "merges": round(serving_s, 2),
                "answers": round(answers_s, 2),
                "all": round(loaded["load_s"] + loaded["features_s"] + serving_s + answers_s, 2),
            },
            "written_checkpoints": 0,
            "published_way": {
                "written_bytes": len(served) * loaded["checkpoint_bytes"],
                "answers": len(served) * len(self.probes),
                "seconds_estimate": round(len(served) * each + serving_s, 2),
            },
        }


def shows_only(probe: Sample, modality: str | None) -> bool:
    """Whether media of this modality, and no others, are shown."""
    return {m for m, _ in probe.media} == {modality}


def _mark(tokens: Tokens | None) -> str:
    """What a key of the log says of tokens: of a specialist how many are asked for, of a candidate how many of its."""
    return "" if tokens is None else f" · top{tokens if isinstance(tokens, int) else len(tokens[0])}"


def _fits(line: Line, probe: Sample, tokens: Tokens | None) -> bool:
    """Whether a line of the log holds as many likelihoods as were asked for."""
    n, predicted = len(line["likelihoods"]), len(line.get("predicted", ()))
    if tokens is None:
        return n == len(probe.options)
    if isinstance(tokens, int):
        return predicted > 0 and (tokens == 1 or (n > predicted and predicted % (n - predicted) == 0))
    return n == sum(len(row) + 1 for row in tokens)
