"""What an audit is of: the merged folder, its base, and what was merged into it, all by the base's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.names import pattern_of
from modalloy.planning.checks import check_shapes, place
from modalloy.planning.kinds import check_numbers
from modalloy.specialists.full import decoder_name
from modalloy.specialists.layouts import open_specialist
from modalloy.specialists.specialist import Specialist, StoredLora
from modalloy.specialists.spelling import places_in
from modalloy.specialists.stacked import StackedLora
from modalloy.storage.config import read_config
from modalloy.storage.folder import is_there
from modalloy.storage.locate import open_base
from modalloy.storage.scaled import CODES
from modalloy.storage.tensors import Checkpoint, TensorRef, checked

Update = TensorRef | StoredLora  # a tuned copy, or factors
MOST_OTHER = 0.5  # of the base's tensors that a folder may lack, or have of another shape, and still be a merge of it


@dataclass(frozen=True)
class Slot:
    """One matrix, vector or scalar of the base, beside the merged one and each source's update of it.

    `name` is the base's, with [e] for the e-th expert of a tensor that holds several. Of a merged adapter `merged` is its
    factors; of a weight that such an adapter does not update it is None.
    """

    name: str
    base: TensorRef
    merged: TensorRef | StoredLora | None
    updates: Mapping[str, TensorRef | StoredLora]

    @property
    def pattern(self) -> str:
        """Its name with * for numbers: tensors of one kind share it."""
        return pattern_of(self.name)

    @property
    def n_bytes(self) -> int:
        """What is read of the base."""
        return self.base.n_bytes


@dataclass
class Opened:
    """Everything that an audit reads, from headers."""

    base: Checkpoint
    base_config: dict[str, Any]
    folder: Path  # of what is audited
    merged: Checkpoint
    config: dict[str, Any] | None  # None: it has none
    adapter: Specialist | None  # what is audited, where it is no whole model
    sources: tuple[Specialist, ...]
    found: dict[str, TensorRef] = field(default_factory=dict)  # of a whole model, by the base's names
    extra: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    without_scales: tuple[str, ...] = ()

    def read(self, ref: TensorRef) -> Tensor:
        """Any tensor but the merged ones; NaN and infinity are refused."""
        if self.base.owns(ref):
            return checked(self.base.read(ref), ref, "base")
        return next(one for one in self.sources if one.checkpoint.owns(ref)).read(ref)

    def slots(self) -> Iterator[Slot]:
        """Every tensor that can be compared, in the base's order; experts of one tensor each by itself."""
        updates = {source.label: _updates(source) for source in self.sources}
        own = None if self.adapter is None else _updates(self.adapter)
        for name, base in self.base.refs.items():
            merged: Update | None = self.found.get(name) if own is None else own.get(name)
            if own is None and (merged is None or name in self.reshaped or name in self.without_scales):
                continue
            of = {label: table[name] for label, table in updates.items() if name in table}
            if own is not None and merged is None and not of:
                continue
            stacked = any(isinstance(one, StackedLora) for one in (merged, *of.values()))
            if stacked or (len(base.shape) == 3 and "experts" in name):
                for index in range(base.shape[0]):
                    parts = {label: _one(update, index) for label, update in of.items()}
                    part = None if merged is None else _one(merged, index)
                    yield Slot(f"{name}[{index}]", base.one(index), part, parts)
            else:
                yield Slot(name, base, merged, of)


def _updates(source: Specialist) -> dict[str, Update]:
    return {**source.tuned, **source.text_lora}


def _one(update: Update, index: int) -> Update:
    assert isinstance(update, (StackedLora, TensorRef))
    return update.one(index)


def open_all(merged: Path, base: Path, given: Sequence[tuple[Path, bool | None]]) -> Opened:
    """Open everything; `given` are the folders of the sources, and whether each must be a whole model (None: either).

    Raises:
        CheckpointError: a folder is missing, damaged or quantised, a source fits not the base, or the merged folder is of
            another architecture than the base.
    """
    opened_base = open_base(base)
    base_config = read_config(base)
    check_numbers("base", base, base_config, opened_base.refs)
    places = [folder for folder, _ in given]
    resolved = [folder.resolve() for folder in places]
    if twice := [folder for index, folder in enumerate(resolved) if folder in resolved[:index]]:
        raise CheckpointError(f"{twice[0]}: is given twice; keep one")
    sources = tuple(open_specialist(one, label=label) for one, label in zip(places, _labels(places), strict=True))
    for source, (folder, is_whole) in zip(sources, given, strict=True):
        if is_whole is not None and source.is_whole != is_whole:
            kind, option = ("a whole model", "--model") if source.is_whole else ("an adapter", "--adapter")
            raise CheckpointError(f"{folder}: is {kind}; give it with {option}")
        place(source, opened_base, base_config)
        check_shapes(source, opened_base)
    if not merged.is_dir():
        raise CheckpointError(f"{merged}: no such folder; give the folder of the merged model")
    if is_there(merged / "adapter_config.json"):
        adapter = open_specialist(merged, label="merged")
        place(adapter, opened_base, base_config)
        check_shapes(adapter, opened_base)
        return Opened(opened_base, base_config, merged, adapter.checkpoint, None, adapter, sources)
    whole = open_base(merged)
    config = read_config(merged) if is_there(merged / "config.json") else None
    if config is not None and config.get("model_type") == "modalloy":
        raise CheckpointError(
            f"{merged}: is an omni model, which holds more than its base; run `modalloy verify {merged}`"
        )
    lone = tuple(name for name, ref in whole.refs.items() if ref.dtype in CODES)
    plain = {name: ref for name, ref in whole.refs.items() if name not in lone}
    check_numbers("merged", merged, {} if lone else config or {}, plain)
    opened = Opened(opened_base, base_config, merged, whole, config, None, sources)
    _place(opened, lone)
    return opened


def _place(opened: Opened, lone: Sequence[str]) -> None:
    """Give every merged tensor the base's name; what the base does not have is extra."""
    base, refs = opened.base, opened.merged.refs
    spelled = places_in(base, opened.base_config, list(refs), opened.folder)
    extra = []
    for name, ref in refs.items():
        place = name if name in base.refs else spelled.get(name) or decoder_name(name)
        if place not in base.refs:
            extra.append(name)
        elif place in opened.found:
            raise CheckpointError(
                f"{ref.file}: {name} and {opened.found[place].name} are two names of one tensor; keep one of them"
            )
        else:
            opened.found[place] = ref
    opened.extra = tuple(extra)
    opened.missing = tuple(name for name in base.refs if name not in opened.found)
    opened.reshaped = tuple(name for name, ref in opened.found.items() if ref.shape != base.refs[name].shape)
    opened.without_scales = tuple(name for name, ref in opened.found.items() if ref.name in lone)
    misfit = len(opened.missing) + len(opened.reshaped)
    if misfit > MOST_OTHER * len(base.refs):
        raise CheckpointError(
            f"{opened.folder}: of the {len(base.refs)} tensors of the base {base.folder.name} it lacks {len(opened.missing)} and "
            f"has {len(opened.reshaped)} of another shape ({_example(opened)}); give the base that it was merged from"
        )


def _example(opened: Opened) -> str:
    if opened.reshaped:
        name = opened.reshaped[0]
        return f"{name} is {opened.found[name].shape}, the base's {opened.base.refs[name].shape}"
    return f"{opened.missing[0]} is missing"


def _labels(places: Sequence[Path]) -> list[str]:
    """The folders' names, numbered where one is not unique."""
    counted = Counter(["base", "merged", *(place.name for place in places)])
    return [p.name if counted[p.name] == 1 else f"{p.name}#{index + 1}" for index, p in enumerate(places)]
