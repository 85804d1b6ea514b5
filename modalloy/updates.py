"""One of a recipe's models as `verify` reads it: what it updates and what it carries, by the names of its tensors alone.

`checkpoints` sorts the same tensors for a merge, with every check; here is only what the layouts say, a second time.
"""

import fnmatch
import re
from pathlib import Path

from torch import Tensor

from modalloy.names import disk_name
from modalloy.recipe import Recipe
from modalloy.settings import is_zero
from modalloy.specialists.full import decoder_name, place_in_base
from modalloy.specialists.native import is_native, open_native, place_native
from modalloy.specialists.peft import alphas_of, open_peft
from modalloy.specialists.spelling import places_in, unwrapped
from modalloy.specialists.stacked import StackedLora, stacked_updates
from modalloy.storage.folder import present, read_json
from modalloy.storage.tensors import Checkpoint, ComposedRef, TensorRef, WeightFile, checked

FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[\w-]+))?\.weight")
TOKEN = re.compile(r"(?P<side>prefix|suffix)_tokens\.(?P<adapter>[\w-]+)")
PROJECTOR = re.compile(r"(?:model\.)?(?:modal_projectors\.[\w-]+|mm_projector)\.(?P<rest>.+)")
WHOLE = ("model", "pytorch_model")
ADAPTER = ("adapter_model",)
BESIDE = ("non_lora_trainables.bin", "mm_projector.bin")


class Model:
    """One of the recipe's models, understood by the names of its tensors: what it updates, and what it carries."""

    def __init__(self, label: str, folder: Path, recipe: Recipe, index: int, base: Checkpoint) -> None:
        self.label, self.entry, self.folder, self.index = label, recipe.models[index], folder, index
        name = self.entry.parameters.fisher
        self.fisher = None if name is None else WeightFile(recipe.folder / Path(name).expanduser())
        self.tuned: dict[str, TensorRef] = {}
        self.factors: dict[str, tuple[TensorRef, TensorRef, float]] = {}
        self.stacked: dict[str, StackedLora] = {}  # of experts that are one tensor
        self.carried: dict[str, TensorRef] = {}
        self.sense, self.is_native = "", False
        if is_native(folder) and not is_native(base.folder):
            self._read_native(recipe, base)
            return
        is_adapter = (folder / "adapter_config.json").is_file() or any(folder.glob("adapter_model.*"))
        self.is_adapter = is_adapter
        settings = folder / "adapter_config.json"
        if settings.is_file() and read_json(settings).get("target_parameters"):
            self._read_stacked(recipe, base)
            return
        stems, beside = (ADAPTER, present(folder, BESIDE)) if is_adapter else (WHOLE, [])
        self.checkpoint = Checkpoint(folder, stems, beside)
        self.sense = self._modality() or ""
        pairs: dict[str, dict[str, TensorRef]] = {}
        respelled: dict[str, str] = {}
        if not is_adapter:
            names = list(unwrapped(self.checkpoint.refs).values())
            respelled = places_in(base, read_json(base.folder / "config.json"), names, folder)
        plain_names = unwrapped(self.checkpoint.refs)
        for name, ref in self.checkpoint.refs.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.ignore):
                continue
            bare = plain_names[name].removeprefix("base_model.model.")
            disk = disk_name(self._modality() or "")
            if (place := respelled.get(bare, bare)) in base.refs:
                self.tuned[place] = ref
            elif factor := FACTOR.fullmatch(bare):
                if factor["adapter"] in (None, "default"):
                    pairs.setdefault(factor["stem"], {})[factor["side"]] = ref
                else:
                    self.carried[bare] = ref
            elif token := TOKEN.fullmatch(bare):
                if token["adapter"] != "default":
                    self.carried[bare] = ref
            elif projector := PROJECTOR.fullmatch(bare):
                self.carried[f"model.modal_projectors.{disk}.{projector['rest']}"] = ref
            else:
                plain = bare.replace(".base_layer.", ".")
                slot = self._slot(plain, base)
                if slot in base.refs:
                    self.tuned[slot] = ref
        configs = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
        config = read_json(folder / configs[0]) if configs else {}
        is_peft = configs[:1] == ["adapter_config.json"]
        default = [config.get("lora_alpha", 256)] * len(pairs)
        alphas = alphas_of(config, list(pairs), folder / configs[0]) if is_peft else default
        for (stem, pair), alpha in zip(pairs.items(), alphas, strict=True):
            slot = self._slot(f"{stem}.weight", base)
            a, b = pair["A"], pair["B"]
            by_root = is_peft and config.get("use_rslora")
            divisor = a.shape[0] ** 0.5 if by_root else a.shape[0]
            self.factors[slot] = (a, b, alpha / divisor)

    def _slot(self, name: str, base: Checkpoint) -> str:
        """The base's name of a tensor."""
        if name in base.refs:
            return name
        folder = base.folder if self.is_adapter else self.folder
        found = places_in(base, read_json(base.folder / "config.json"), [name], folder)
        return found.get(name) or decoder_name(name)

    def _read_stacked(self, recipe: Recipe, base: Checkpoint) -> None:
        """An adapter of parameters of experts, of which only transformers knows how files store them."""
        opened = open_peft(self.folder, self.label, recipe.ignore)
        place_in_base(opened, base, read_json(base.folder / "config.json"))
        self.checkpoint, self.tuned = opened.checkpoint, opened.tuned
        self.stacked = stacked_updates(opened.text_lora)
        plain = {slot: one for slot, one in opened.text_lora.items() if slot not in self.stacked}
        self.factors = {slot: (one.a, one.b, one.scale) for slot, one in plain.items()}

    def _read_native(self, recipe: Recipe, base: Checkpoint) -> None:
        """A multimodal model of transformers, whose names only transformers knows."""
        opened = open_native(self.folder, self.label, recipe.ignore)
        place_native(opened, base, read_json(base.folder / "config.json"))
        assert opened.native is not None
        self.is_native = True
        self.is_adapter, self.checkpoint, self.tuned = not opened.is_whole, opened.checkpoint, opened.tuned
        self.factors = {slot: (one.a, one.b, one.scale) for slot, one in opened.text_lora.items()}
        self.sense = self.entry.modality or opened.native.modalities[0]
        if self.entry.own == "same":
            disk = disk_name(self.sense)
            for slot, (a, b, _) in self.factors.items():
                stem = slot.removesuffix(".weight")
                self.carried |= {f"{stem}.lora_A.{disk}.weight": a, f"{stem}.lora_B.{disk}.weight": b}
        self.carried |= opened.native.carried(self.sense)

    def renumber(self, place: int) -> None:
        """Make it a further sense of its modality."""
        before, self.sense = self.sense, f"{self.sense}_{place}"
        parts = {
            f".{disk_name(before)}.": f".{disk_name(self.sense)}.",
            f"_tokens.{disk_name(before)}": f"_tokens.{self.sense}",
        }
        parts |= {f"senses.{before}.": f"senses.{self.sense}."}
        renamed = {}
        for name, ref in self.carried.items():
            for old, new in parts.items():
                if old in name and (old != f".{disk_name(before)}." or ".lora_" in name or "modal_projectors" in name):
                    name = name.replace(old, new, 1)
                    break
            renamed[name] = ref
        self.carried = renamed

    def _modality(self) -> str | None:
        """The recipe's, else the one that a tensor's name holds."""
        if self.entry.modality is not None:
            return self.entry.modality
        found = (re.search(r"modal_projectors\.([\w-]+)\.", name) for name in self.checkpoint.refs)
        return next((match[1] for match in found if match), None)

    @property
    def is_weighed(self) -> bool:
        """Whether its weight is not 0 everywhere."""
        return not is_zero(self.entry.parameters.weight)

    def has(self, slot: str) -> bool:
        """Whether it has an update, or a copy, of a tensor of the base."""
        return slot in self.factors or slot in self.tuned or slot in self.stacked

    def read(self, ref: TensorRef) -> Tensor:
        """The data of one of its tensors, without NaN and infinity."""
        if self.fisher is not None and ref.file == self.fisher.path:
            return self.fisher.read(ref)
        if isinstance(ref, ComposedRef):
            return ref.composed(self.read)
        return checked(self.checkpoint.read(ref), ref, f"{self.label} specialist")
