"""How a merged model takes in each modality: an encoder and a projector that fit each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, RecipeError, shown
from modalloy.names import disk_name
from modalloy.planning.native import check_sense
from modalloy.recipe import Recipe
from modalloy.senses.encoders import EncoderChoice, choose, registered, sizes
from modalloy.senses.projectors import NAMED, build_projector, recognise
from modalloy.specialists.companions import companions
from modalloy.specialists.specialist import Native, Specialist
from modalloy.storage.folder import present
from modalloy.storage.locate import is_portable, locate
from modalloy.storage.tensors import Checkpoint

ENCODER_CONFIGS = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Sense:
    """How the merged model takes in one modality: its encoder, with the place of its files, and its projector."""

    choice: EncoderChoice
    path: Path | None
    settings: dict[str, Any]  # of the encoder
    projector: dict[str, Any]
    n_tokens: int  # projected features of one medium
    is_portable: bool  # whether the encoder's location means the same on another machine

    @property
    def local(self) -> Path | None:
        """The place of the encoder's files if only this machine would find it."""
        return None if self.is_portable else self.path

    def source(self, modality: str) -> str | None:
        """Where an omni folder says that the encoder's files are."""
        if self.local is None:
            return self.choice.location
        return f"encoders/{modality}" + ("" if self.local.is_dir() else f"/{self.local.name}")

    def files(self) -> list[Path]:
        """The encoder's files that an omni folder takes a copy of."""
        if self.local is None:
            return []
        if self.local.is_file():
            return [self.local]
        if pickled := sorted(self.local.glob("*.pt")):  # of encoders that are published as a single file
            return pickled
        return model_files(Checkpoint(self.local, ("model", "pytorch_model")), ENCODER_CONFIGS)


@dataclass(frozen=True)
class NativeSense:
    """How the merged model takes in one modality by a native specialist's own inner model, which is carried with it."""

    folder: Path  # of the specialist
    native: Native
    frame: str | None = None
    path: None = None  # everything is in the specialist's folder
    local: None = None

    def files(self) -> list[Path]:
        """The processor's and the tokenizer's files, which an omni folder takes a copy of."""
        return [self.folder / name for name in companions(self.folder)]


def number_senses(recipe: Recipe, specialists: Sequence[Specialist]) -> None:
    """Number the specialists of each modality.

    Raises:
        RecipeError: two are of one modality, and the recipe does not say that their tokens stand side by side.
    """
    counted: dict[str, int] = {}
    for specialist in specialists:
        if specialist.modality is None:
            continue
        counted[specialist.modality] = specialist.place = counted.get(specialist.modality, 0) + 1
        if specialist.place > 1 and recipe.output.same_modality == "refuse":
            raise RecipeError(
                f"two specialists claim modality '{specialist.modality}' ({specialist.label}); write output.same_modality: "
                "side_by_side to show each medium to both, or remove one, or write form: adapter or full"
            )
    models: dict[Path, Specialist] = {}
    for specialist in specialists:
        if specialist.native is not None:
            first = models.setdefault(specialist.checkpoint.folder.resolve(), specialist)
            specialist.native.like = None if first is specialist else first.sense


def choose_senses(recipe: Recipe, specialists: list[Specialist], width: int) -> dict[str, Sense | NativeSense]:
    """Encoder and projector of each modality: the recipe's encoder, else one that the specialist names and that is built in;
    a native specialist brings its own.

    `width` is the decoder's. Raises RecipeError or CheckpointError where they do not lead from one to the other.
    """
    senses: dict[str, Sense | NativeSense] = {}
    for entry, specialist in zip(recipe.models, specialists, strict=True):
        modality = specialist.modality if specialist.native is None else check_sense(entry, specialist)
        if modality is None:
            raise RecipeError(
                f"output.form 'omni' needs the modality of every specialist, but '{specialist.label}' records none; "
                "add `modality:` to it"
            )
        if not specialist.projector and specialist.native is None:
            raise RecipeError(
                f"output.form 'omni' needs a projector from every specialist, but '{specialist.label}' has none; "
                "write form: adapter or full, or leave it out"
            )
        name = specialist.sense or modality
        if specialist.native is not None:
            senses[name] = NativeSense(specialist.checkpoint.folder, specialist.native, entry.frame)
            continue
        if entry.frame is not None:
            raise RecipeError(
                f"{specialist.label} specialist: `frame:` is of multimodal models of transformers; remove it"
            )
        given = entry.encoder or recorded_encoder(specialist)
        if given is None:
            raise RecipeError(
                f"no encoder for modality '{modality}'; add `encoder:` to the {specialist.label} specialist"
            )
        senses[name] = open_sense(given, specialist, width, recipe.folder)
    return senses


def recorded_encoder(specialist: Specialist) -> str | None:
    """The encoder that a specialist's config names, if that is a name and not a place on its author's machine."""
    recorded = specialist.config.get(f"mm_{disk_name(specialist.modality or '')}_encoder")
    return recorded if recorded in registered() else None


def open_sense(given: str | dict[str, Any], specialist: Specialist, width: int, folder: Path) -> Sense:
    """The encoder that `given` names and the specialist's projector, which must fit each other and the decoder's width."""
    modality = specialist.modality
    assert modality is not None
    choice = choose(given, modality)
    path = None if choice.location is None else locate(choice.location, folder)
    settings = choice.settings(path)
    dim, n_features = sizes(choice.name, settings)
    for ref in specialist.projector.values():
        if not ref.dtype.is_floating_point or ref.dtype.itemsize < 2:
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} of its projector is stored as {str(ref.dtype).removeprefix('torch.')} "
                f"({ref.file}), codes whose scales are not known here; give it in float32, bfloat16 or float16"
            )
    projector = recognise({name: ref.shape for name, ref in specialist.projector.items()}, specialist.label)
    said = specialist.config.get(f"mm_{disk_name(modality)}_projector_type")
    if said not in (None, projector["type"]) and (said in NAMED or projector["type"] in NAMED):
        raise CheckpointError(
            f"{specialist.label} specialist: its config says that its projector is {shown(said)}, but its tensors are those of "
            f"{projector['type']}, which computes otherwise; say which in the config, or use the checkpoint as it was published"
        )
    built = build_projector(projector, meta=True)
    if (built.dim, built.width) != (dim, width):
        raise CheckpointError(
            f"{specialist.label} specialist: its projector takes {built.dim} features to {built.width}, but the encoder "
            f"'{given}' gives {dim} and the base takes {width}; set the `encoder:` it was trained with"
        )
    for ref in specialist.tokens.values():
        if len(ref.shape) != 3 or ref.shape[0] != 1 or ref.shape[2] != width:
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} is {ref.shape}, not (1, tokens, {width}) ({ref.file}); "
                "use the base it was trained from"
            )
    n_tokens = built.n_tokens(n_features)
    portable = choice.location is None or is_portable(choice.location, folder)
    return Sense(choice, path, settings, projector, n_tokens, portable)


def model_files(checkpoint: Checkpoint, configs: Iterable[str]) -> list[Path]:
    """Those of a model's `configs` that there are, its weights and their index."""
    folder = checkpoint.folder
    found = [folder / name for name in present(folder, configs)]
    return [*found, *(file.path for file in checkpoint.files), *sorted(folder.glob("*.index.json"))]
