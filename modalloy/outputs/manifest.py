"""The manifest of a result: what made it, from what, and the hash of every file. No times, hosts or absolute paths.

It is read as a stranger wrote it.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from modalloy._version import __version__
from modalloy.builtin import PREFIX
from modalloy.errors import CheckpointError, shown
from modalloy.families.vocabulary import VOCABULARY_FILES
from modalloy.forms import AUTO, known_form
from modalloy.outputs.sources import SOURCES, Sha256, Sources, problem
from modalloy.planning.job import Run
from modalloy.planning.models import labels
from modalloy.planning.plan import Plan
from modalloy.recipe import Recipe
from modalloy.specialists.specialist import Specialist
from modalloy.storage.folder import file_sha256, present, read_json, reading
from modalloy.storage.locate import hub_commit, hub_id, is_hub_id, is_portable_name
from modalloy.storage.staging import MANIFEST as MANIFEST
from modalloy.storage.staging import SIGNATURE as SIGNATURE
from modalloy.storage.tensors import Checkpoint, WeightFile

NOT_HASHED = (MANIFEST, SOURCES, SIGNATURE)  # of these `sources.json` says where the inputs were on this machine
START_CONFIGS = ("config.json",)  # of a base or target: its sizes, and what its weights are

Share = Annotated[float, Field(ge=0, le=1)]
Fate = Annotated[list[str], Field(min_length=4, max_length=4)]


class Manifest(BaseModel):
    """The types of what a manifest holds; what its values must be, `verify` works out from recipe and inputs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    modalloy: Annotated[str, StringConstraints(pattern=r"^[0-9][0-9A-Za-z.+]{0,40}$")]
    method: str
    parameters: dict[str, Any]
    form: Annotated[str, AfterValidator(known_form)]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, Sha256]
    surveys: dict[str, dict[str, Any]] = Field(default_factory=dict)
    compression: dict[str, Share] = Field(default_factory=dict)
    check: dict[str, Any] = Field(default_factory=dict)  # what `modalloy check` found
    tensors: list[Fate]


def build_manifest(planned: Plan, run: Run, folder: Path) -> dict[str, Any]:
    """The manifest of the files in `folder`."""
    whole: dict[str, Any] = {"surveys": run.surveys} if run.surveys else {}
    if run.compression:
        whole["compression"] = dict(sorted(run.compression.items()))
    told = described(planned, planned.recipe, {})
    tensors = told.pop("tensors")
    outputs = {name: run.sha256.get(name) or file_sha256(folder / name) for name in result_files(folder)}
    return {"modalloy": __version__, **told, "outputs": outputs, **whole, "tensors": tensors}


def described(planned: Plan, written: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of a plan before anything is computed: method, parameters, form, inputs, fates.

    `written` is the recipe as it was written, where the plan's has places on this machine; `names` are those of base and
    target, by label, where the plan's are places too.
    """
    named = dict(zip(labels(planned.recipe), labels(written), strict=True))
    inputs = {
        named[s.label]: {
            "layout": s.layout,
            "modality": s.modality,
            "sha256": input_sha256(
                s, fisher, tokens=planned.vocabulary is not None or (bool(planned.maps) and s.is_whole)
            ),
            **_revision(s.checkpoint.folder),
        }
        for s, fisher in zip(planned.specialists, planned.fishers, strict=True)
    }
    fates = (dataclasses.replace(fate, source=named.get(fate.source, fate.source)) for fate in planned.fates)
    return {
        "method": planned.recipe.merge_method,
        "parameters": planned.parameters,
        "form": planned.recipe.output.form,
        "inputs": _starts(planned, names) | inputs,
        "tensors": [dataclasses.astuple(fate) for fate in fates],
    }


def _starts(planned: Plan, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the manifest says of base and target, by label."""
    label, form = planned.target_label, planned.form
    name = names.get(label, planned.target_name)
    copied = form.is_model and form.refers_to_base and not is_portable_name(name)
    vocabulary = (
        VOCABULARY_FILES if planned.maps or planned.vocabulary else ()
    )  # by which the rows of embeddings were chosen
    found = {label: _start(planned.target, name, (*START_CONFIGS, *vocabulary), read=form.is_whole or copied)}
    for further, model in planned.starts[1:]:
        found[further] = _start(model, names.get(further, planned.base_name), START_CONFIGS, read=True)
    return found


def _start(model: Checkpoint, name: str, configs: Sequence[str], *, read: bool) -> dict[str, Any]:
    """A base or a target: its name, its headers' hash, its commit, and the hashes of its configs, and of its weights if
    they were read."""
    hashes = {name: file_sha256(model.folder / name) for name in present(model.folder, configs)}
    hashes |= {file.path.name: file.sha256 for file in model.files} if read else {}
    return {"name": name, "header_sha256": model.header_sha256(), **_revision(model.folder), "sha256": hashes}


def start_names(written: Recipe, places: Sources, manifest: dict[str, Any]) -> dict[str, str]:
    """The names of base and target that the manifest must have: a repository's as the recipe writes it, else the folder's.

    A name such as "models/base" may be either; it is a repository's if the place is in the hub's cache, and if it is
    neither there nor called so, what the manifest says decides.
    """
    found = {}
    for key, place in places.starts.items():
        label = "target" if key == "target" else "base"
        location = hub_id(str(getattr(written, key)))
        said = manifest["inputs"].get(label, {}).get("name")
        portable = location.startswith(PREFIX) or (
            is_hub_id(location) and (hub_commit(place) is not None or said == location)
        )
        found[label] = location if portable else place.name
    return found


def input_sha256(specialist: Specialist, fisher: WeightFile | None, *, tokens: bool) -> dict[str, str]:
    """Hashes of the files that a specialist's part depends on: weights, the config that sets their scaling, Fisher file.

    With `tokens`, its tokenizer too, by which the rows of its embeddings were chosen.
    """
    folder = specialist.checkpoint.folder
    inside = f"{specialist.adapter}/" if specialist.adapter else ""
    wanted = ("config.json", f"{inside}adapter_config.json", *(VOCABULARY_FILES if tokens else ()))
    configs = present(folder, wanted)
    weights = {file.path.name: file.sha256 for file in specialist.checkpoint.files}
    weights |= {} if fisher is None else {"fisher": fisher.sha256}
    with reading(folder):
        return weights | {name: file_sha256(folder / name) for name in configs}


def _revision(folder: Path) -> dict[str, str]:
    """The commit of an input that came from the hub."""
    commit = hub_commit(folder)
    return {"revision": commit} if commit else {}


def result_files(folder: Path) -> list[str]:
    """Every file of a result that its manifest must list, as relative names in order.

    Raises:
        CheckpointError: something is there that is no file: a link, a pipe, a device.
    """
    found: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=False, onerror=_raise):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe, a device or a socket"
                raise CheckpointError(f"{path}: is {kind}, and a result holds plain files only; remove it")
            if stat.S_ISREG(mode):
                found.append(path.relative_to(folder).as_posix())
    return sorted(name for name in found if name not in NOT_HASHED)


def _raise(error: OSError) -> None:
    with reading(Path(str(error.filename))):
        raise error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a result, of whose values the types are checked.

    Raises:
        CheckpointError: the folder has none, or one of something else.
    """
    path = folder / MANIFEST
    with reading(path):
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: has no {MANIFEST}, so it is no result of modalloy merge; give the merged folder"
            )
    content = read_json(path)
    try:
        Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {problem(error)}; merge again") from None
    return content


def differences(wanted: Any, found: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Place and both values of the first difference of two JSON values, None if there is none; 1, 1.0 and true differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            below = f"{place}.{key}" if place else str(key)
            if key not in wanted or key not in found:
                return below, wanted.get(key, MISSING), found.get(key, MISSING)
            if different := differences(wanted[key], found[key], below):
                return different
        return None
    if isinstance(wanted, list) and isinstance(found, list):
        for index, (own, other) in enumerate(zip(wanted, found, strict=False)):
            if different := differences(own, other, f"{place}[{index}]"):
                return different
        if len(wanted) != len(found):
            index = min(len(wanted), len(found))
            values = (each[index] if index < len(each) else MISSING for each in (wanted, found))
            own, other = values
            return f"{place}[{index}]", own, other
        return None
    return None if type(wanted) is type(found) and wanted == found else (place, wanted, found)


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def check_recipe(manifest: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """Refuse a manifest that contradicts the recipe beside it, as far as that is known without the inputs."""
    wanted = {
        "method": recipe.merge_method,
        "form": manifest["form"] if recipe.output.form == AUTO else recipe.output.form,  # which the plan will tell
        "inputs": sorted([*recipe.starts, *labels(recipe)]),
    }
    found = {"method": manifest["method"], "form": manifest["form"], "inputs": sorted(manifest["inputs"])}
    if different := differences(wanted, found):
        place, own, told = different
        raise CheckpointError(
            f"{folder / MANIFEST}: {place} is {shown(told)}, but recipe.yaml gives {shown(own)}; merge again"
        )


def check_described(manifest: dict[str, Any], planned: Plan, written: Recipe, places: Sources, folder: Path) -> None:
    """Refuse a manifest that does not say what recipe and inputs give.

    One of another version of modalloy may word the fates otherwise and hold fewer hashes.

    Raises:
        CheckpointError: names the first value that is another, and the input if that has changed.
    """
    wanted = json.loads(json.dumps(described(planned, written, start_names(written, places, manifest))))
    found: dict[str, Any] = {key: manifest[key] for key in wanted}
    if manifest["modalloy"] != __version__:
        for one in (wanted, found):
            one["tensors"] = [fate[:3] for fate in one["tensors"]]
        for label, own in wanted["inputs"].items():
            recorded = found["inputs"].get(label, {}).get("sha256")
            if isinstance(recorded, dict):
                own["sha256"] = {name: value for name, value in own["sha256"].items() if name in recorded}
    for label, own in wanted["inputs"].items():
        told = found["inputs"].get(label, {})
        if "revision" not in own and _is_commit(told.get("revision")) and is_portable_name(_location(written, label)):
            own["revision"] = told["revision"]  # of a copy outside the hub's cache, whose hashes are the same
    different = differences(wanted, found)
    if different is None:
        return
    place, own, told = different
    parts = place.split(".")
    if parts[0] == "inputs" and any(part in place for part in (".sha256.", ".header_sha256")) and told is not MISSING:
        label = next(label for label in (*wanted["inputs"], *found["inputs"]) if place.startswith(f"inputs.{label}."))
        if own is not MISSING:
            raise CheckpointError(
                f"{_folder_of(label, planned, written)}: the {label}{'' if label in ('base', 'target') else ' specialist'} "
                f"has changed since the merge (its sha256 is not the one in {MANIFEST}); merge again"
            )
    raise CheckpointError(
        f"{folder / MANIFEST}: {place} is {shown(told)}, but recipe and inputs give {shown(own)}; merge again"
    )


def _folder_of(label: str, planned: Plan, written: Recipe) -> Path:
    """Where an input of the manifest is."""
    for own, model in planned.starts:
        if label == own:
            return model.folder
    named = dict(zip(labels(planned.recipe), labels(written), strict=True))
    return next(s.checkpoint.folder for s in planned.specialists if named[s.label] == label)


def _location(written: Recipe, label: str) -> str:
    """What the recipe writes for an input of the manifest."""
    if label in ("base", "target"):
        return str(written.target if label == "target" else written.base_model)
    return next(entry.model for entry, own in zip(written.models, labels(written), strict=True) if own == label)


def _is_commit(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 40 and set(value) <= set("0123456789abcdef")
