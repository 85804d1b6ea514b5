"""A merged model of `form: omni`, opened for export: its config and every tensor, none of them read yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.forms import FORMS
from modalloy.model.config import ModalloyConfig, check_content
from modalloy.model.load import Stored, composed_weights, open_omni_processor
from modalloy.model.opening import check_code, opening
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.routing import TEXT
from modalloy.storage.folder import is_there, read_json
from modalloy.storage.locate import locate

DECODER = "decoder."


@dataclass(frozen=True)
class Merged:
    """A folder of `form: omni`, or one that `save_pretrained` wrote."""

    folder: Path
    config: ModalloyConfig
    weights: Mapping[str, Stored]  # by the model's names

    @cached_property
    def processor(self) -> ModalloyProcessor:
        """Its processor, with the tokenizer."""
        return open_omni_processor(self.folder)

    @property
    def decoder(self) -> dict[str, Stored]:
        """The decoder's tensors by transformers' names, without updates and a head that is the table again."""
        found = {}
        for name, one in self.weights.items():
            leaf = name.rpartition(".")[2]
            tied = name == f"{DECODER}lm_head.weight" and self.config.text_config.tie_word_embeddings
            if name.startswith(DECODER) and not tied and not leaf.startswith(("up_", "down_", "text_weight")):
                found[name.removeprefix(DECODER)] = one
        return found

    @property
    def senses(self) -> dict[str, Stored]:
        """All that is not the decoder's."""
        return {name: one for name, one in self.weights.items() if not name.startswith(DECODER)}

    def factors(self, owner: str) -> dict[str, tuple[Tensor, Tensor]]:
        """An owner's update: up (out, rank) and down (rank, in) by the name of the weight."""
        end = f".up_{owner}"
        found = {}
        for name, up in self.weights.items():
            if name.endswith(end):
                stem = name.removesuffix(end)
                slot = f"{stem.removeprefix(DECODER)}.weight"
                found[slot] = (up[...], self.weights[f"{stem}.down_{owner}"][...])
        return found

    def check_unfolded(self) -> None:
        """Refuse a text update that is folded into the base.

        Raises:
            CheckpointError: it is.
        """
        if self.config.folded:
            raise CheckpointError(
                f"{self.folder}: its text update is folded into the base; export the folder that was merged, not folded"
            )

    def path(self, owner: str) -> str | None:
        """The owner whose update an owner's tokens use: itself, text, or none."""
        updates = self.config.updates
        return owner if owner in updates else TEXT if TEXT in updates else None


def open_merged(path: str | Path) -> Merged:
    """Open a merged model that has senses.

    Raises:
        CheckpointError: the folder is another, or damaged.
    """
    folder = locate(str(path), whole=True)
    content: dict[str, Any] = read_json(folder / "config.json") if is_there(folder / "config.json") else {}
    check_code(folder)
    if content.get("model_type") != "modalloy":
        raise CheckpointError(f"{folder}: is no merge of output.form: omni; {_instead(folder)}")
    check_content(content, folder / "config.json")
    with opening(folder, "config.json", "used"):
        config = ModalloyConfig.from_pretrained(folder)
    return Merged(folder, config, composed_weights(config, folder))


def check_routable(merged: Merged, target: str) -> None:
    """Refuse updates that no adapter can say.

    Raises:
        CheckpointError: one has rank 0, is folded into the base, or is a dense matrix.
    """
    config, where = merged.config, merged.folder
    for owner, update in config.updates.items():
        if update["rank"] == 0:
            raise CheckpointError(
                f"{where}: the update of {owner} has rank 0, which no adapter of {target} has; merge again with k of 1 or more"
            )
    merged.check_unfolded()
    if dense := sorted(set(config.text_linears) - config.replaced):
        raise CheckpointError(
            f"{where}: text uses a dense matrix of its own in {len(dense)} weights ({dense[0]} …), where {target} can switch "
            "low-rank adapters only; merge with output.compress_rank or a method that gives low-rank updates"
        )


def _instead(folder: Path) -> str:
    form = read_json(folder / "manifest.json").get("form") if is_there(folder / "manifest.json") else None
    if form in FORMS:
        return f"output.form: {form} is a folder that other programs take as it is"
    return "give a folder that `modalloy merge` wrote with output.form: omni"
