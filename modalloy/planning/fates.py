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
    label = specialist.label
    found: dict[str, Told] = {}

    def enter(name: str, told: Told) -> None:
        if name not in found or told[0] == "merged":
            found[name] = told

    for slot, factors in specialist.text_lora.items():
        told: Told = ("left out", absent or kept.get(slot, ""))
        if slot in of_slot and not absent:
            told = ("merged", f"{of_slot[slot][1]} into {slot}")
        for ref in (factors.a, factors.b):
            enter(ref.name, told)
    updates = {ref for factors in specialist.text_lora.values() for ref in (factors.a, factors.b)}
    carried: Told = ("carried", "bit for bit")
    if not form.carries_senses:
        carried = ("left out", f"form: {form.name} holds the text path only")
    for ref in specialist.carried().values():
        if not isinstance(ref, MappedRef) and ref not in updates:
            enter(ref.name, carried)
    for ref in specialist.frozen.values():
        enter(ref.name, ("left out", "the base's, which its adapter updates"))
    if specialist.native is not None and specialist.native.like is not None:
        for ref in specialist.native.sense.values():
            enter(ref.name, ("left out", f"carried once, as sense '{specialist.native.like}'"))
    for name, ref in specialist.tuned.items():
        unused: Told = ("left out", absent or kept.get(name, "the base's is kept"))
        for source in sources_of(ref):
            enter(source, unused if absent else of_slot.get(name, unused))
    for name, reason in specialist.dropped.items():
        enter(name, ("left out", reason))
    return (TensorFate(label, name, *told) for name, told in found.items())
