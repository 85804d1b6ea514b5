"""What becomes of every tensor of a specialist."""

from collections.abc import Iterator, Mapping

from modalloy.forms import Form
from modalloy.planning.job import Fate, TensorFate
from modalloy.specialists.specialist import Specialist
from modalloy.storage.views import MappedRef, sources_of

Told = tuple[Fate, str]


def fates_of(
    specialist: Specialist, of_slot: Mapping[str, Told], kept: Mapping[str, str], absent: str | None, form: Form
) -> Iterator[TensorFate]:
    """One fate for each tensor of the specialist's files.

    `of_slot` is what is done to a tensor of the base, `kept` why the base's stays, `absent` why the specialist does not count.
    A tensor of all experts may be an update or a copy of several of the base's, which is merged if any of these is.
    """
    updates: dict[str, Told] = {}
    for slot, factors in specialist.text_lora.items():
        told: Told = ("left out", absent or kept.get(slot, ""))
        if slot in of_slot and not absent:
            told = ("merged", f"{of_slot[slot][1]} into {slot}")
        for ref in (factors.a, factors.b):
            _enter(updates, ref.name, told)
    copies: dict[str, Told] = {}
    for name, ref in specialist.tuned.items():
        unused: Told = ("left out", absent or kept.get(name, "the base's is kept"))
        for source in sources_of(ref):
            _enter(copies, source, unused if absent else of_slot.get(name, unused))
    dropped: list[tuple[str, Told]] = [(name, ("left out", reason)) for name, reason in specialist.dropped.items()]
    every = (*updates.items(), *_others(specialist, form), *copies.items(), *dropped)
    return (TensorFate(specialist.label, name, *told) for name, told in every)


def _enter(found: dict[str, Told], name: str, told: Told) -> None:
    """Note what becomes of a tensor, of which another part may have been told before."""
    if name not in found or told[0] == "merged":
        found[name] = told


def _others(specialist: Specialist, form: Form) -> Iterator[tuple[str, Told]]:
    """What is no update and no copy of the base's: carried, or the base's own."""
    updates = {ref for factors in specialist.text_lora.values() for ref in (factors.a, factors.b)}
    carried: Told = ("carried", "bit for bit")
    if not form.carries_senses:
        carried = ("left out", f"form: {form.name} holds the text path only")
    for ref in specialist.carried().values():
        if not isinstance(ref, MappedRef) and ref not in updates:
            yield ref.name, carried
    for ref in specialist.frozen.values():
        yield ref.name, ("left out", "the base's, which its adapter updates")
    if specialist.native is not None and specialist.native.like is not None:
        for ref in specialist.native.sense.values():
            yield ref.name, ("left out", f"carried once, as sense '{specialist.native.like}'")
