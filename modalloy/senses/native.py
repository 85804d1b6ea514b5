"""A specialist's own inner model as a sense: its decoder is replaced by a recorder, and what that is handed is the block.

Tiles, Q-Formers, audio lengths, wrapper tokens, three-dimensional positions: whatever a class does happens in its own code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modalloy.errors import CheckpointError
from modalloy.senses.anatomy import DEEPSTACK, FAULTS, USUAL, Anatomy, native_class_name

Table = Callable[[Tensor], Tensor]  # ids (…) to embeddings (…, width)


@dataclass(frozen=True)
class Prepared:
    """A conversation's media of one modality as the specialist's own processor prepares them, all together.

    `inputs` of the inner model's forward, one row; `places`: begin and end of each medium's tokens in it.
    """

    inputs: dict[str, Tensor]
    places: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each medium becomes."""
        return [end - begin for begin, end in self.places]

    def to(self, *args: Any, **kwargs: Any) -> "Prepared":
        """The same on a device; whole numbers keep their type."""
        return Prepared({name: value.to(*args, **kwargs) for name, value in self.inputs.items()}, self.places)


@dataclass(frozen=True)
class Block:
    """What one medium becomes in the decoder's sequence: n tokens in a row.

    `positions` (3, n) count from the block's beginning; None where they are the tokens' own. `deepstack` (layers, m, width)
    is added to the m tokens of `visual` (n,) after each of the first layers. `together` (n,) numbers the groups of tokens
    that see each other, whatever their order; −1 is none.
    """

    embeddings: Tensor
    positions: Tensor | None = None
    visual: Tensor | None = None
    deepstack: Tensor | None = None
    together: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def extent(self) -> int:
        """How far the position of what follows is from its own first."""
        return len(self) if self.positions is None else int(self.positions.max()) + 1

    def to(self, device: Any) -> "Block":
        """The same on a device."""
        fields = (self.embeddings, self.positions, self.visual, self.deepstack, self.together)
        return Block(*(None if one is None else one.to(device) for one in fields))  # type: ignore[arg-type]


class Recorder(nn.Module):
    """In a decoder's place: an embedding table, and a forward that keeps what it is given and gives it back."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.given: dict[str, Any] = {}
        self.table: Table | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of what the table gives."""
        return torch.float32

    def get_input_embeddings(self) -> Table:
        """The table of the model that asks."""
        assert self.table is not None
        return self.table

    embed_tokens = property(get_input_embeddings)

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.given = {"input_ids": input_ids} | given
        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])


class NativeSense(nn.Module):
    """The part of a multimodal model of transformers that is not its decoder.

    Args:
        config: of the whole model, with no blocks in its decoder (`anatomy.headless`).
        rows: ids of the vocabulary's rows that are its own; all others are looked up in the merged model's table.
        width: of the decoder.
    """

    def __init__(self, config: Mapping[str, Any], rows: Sequence[int], width: int) -> None:
        import transformers
        from transformers.models.auto import CONFIG_MAPPING

        super().__init__()
        content = dict(config)
        name = native_class_name(content)
        if name is None:
            raise CheckpointError(
                "config.json: a native modality names no multimodal class of transformers; merge again"
            )
        made = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        self.model: Any = getattr(transformers, name)(made)
        found = Anatomy(self.model, name)
        self.modality_path, self.decoder_path, self.is_decoder = found.inner, found.decoder, found.is_decoder
        text = made.get_text_config(decoder=True)
        if found.head is not None:
            self._replace(found.head, nn.Identity())
        if self.is_decoder:  # without blocks and norm, it gives what it was given
            inner = self.model.get_submodule(found.inner)
            inner.layers, inner.norm, inner.embed_tokens = nn.ModuleList(), nn.Identity(), _Lookup()
        else:
            self._replace(found.decoder, Recorder(text))
        for module in self.model.modules():  # nothing is tied any more
            if hasattr(module, "_tied_weights_keys"):
                module._tied_weights_keys = None
                module.all_tied_weights_keys = {}
        self.own_ids = sorted(rows)
        self.rows = nn.Parameter(torch.zeros(len(rows), width), requires_grad=False)

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    @torch.no_grad()
    def blocks(self, inputs: Mapping[str, Any], places: Sequence[tuple[int, int]], table: Any) -> list[Block]:
        """One block for each medium.

        Args:
            inputs: of the inner model's forward, for one row: `input_ids` (1, tokens), and what belongs to the media.
            places: begin and end of each medium's tokens.
            table: the merged model's embeddings.
        """
        given = self._recorded(inputs, table)
        embeddings, positions = given["inputs_embeds"][0], given.get("position_ids")
        if positions is not None:
            positions = positions.reshape(-1, positions.shape[-1])
            positions = positions[-3:] if len(positions) >= 3 else None
        odd = sorted(
            name
            for name, value in given.items()
            if value is not None and name not in USUAL and name not in DEEPSTACK and isinstance(value, Tensor)
        )
        if odd:
            raise CheckpointError(
                f"{type(self.model).__name__} hands its decoder {', '.join(odd)} beside the tokens, which a merged model has no "
                "place for; use another specialist"
            )
        visual, layers = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
        together = _groups(given.get("attention_mask"), len(embeddings))
        found = []
        for begin, end in places:
            own = slice(begin, end)
            shown = None if positions is None else positions[:, own] - positions[:, own].min()
            if layers is None or visual is None:
                found.append(Block(embeddings[own], shown, together=None if together is None else together[own]))
                continue
            mask = visual.reshape(-1)
            before, count = int(mask[:begin].sum()), int(mask[own].sum())
            added = torch.stack([one[before : before + count] for one in layers])
            found.append(Block(embeddings[own], shown, mask[own], added))
        return found

    def _recorded(self, inputs: Mapping[str, Any], table: nn.Module) -> dict[str, Any]:
        """What the decoder is handed for these inputs."""

        def lookup(ids: Tensor) -> Tensor:
            return self._embedded(ids, table)

        inner = self.model.get_submodule(self.modality_path)
        accepted = {name: value for name, value in inputs.items() if value is not None}
        if self.is_decoder:
            inner.embed_tokens.table = lookup
            output = inner(**accepted)
            return {"inputs_embeds": output.last_hidden_state}
        recorder = self.model.get_submodule(self.decoder_path)
        recorder.table = lookup
        try:
            inner(**accepted)
        except FAULTS as error:
            raise CheckpointError(
                f"{type(self.model).__name__}: fails at this medium ({' '.join(str(error).split())[:300]}); check the medium, and "
                "that the processor's files are those of the specialist"
            ) from error
        given, recorder.given, recorder.table = recorder.given, {}, None
        return given

    def _embedded(self, ids: Tensor, table: Any) -> Tensor:
        """Rows of the merged model's table, but for those that are the specialist's own."""
        height = table.weight.shape[0]
        found: Tensor = table(ids.clamp(max=height - 1).to(table.weight.device)).to(self.rows.dtype)
        if self.own_ids:
            own = torch.tensor(self.own_ids, device=ids.device)
            at = torch.searchsorted(own, ids).clamp(max=len(own) - 1)
            mine = own[at] == ids
            scale = getattr(table, "embed_scale", 1.0)
            found = torch.where(mine.unsqueeze(-1), self.rows[at] * torch.as_tensor(scale).to(self.rows), found)
        return found


class _Lookup(nn.Module):
    """An embedding table that is set for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Table | None = None

    def forward(self, ids: Tensor) -> Tensor:
        assert self.table is not None
        return self.table(ids)


def _groups(masks: Any, length: int) -> Tensor | None:
    """Which tokens of a row see each other, by the full attention mask that a class made; None where all is causal."""
    mask = masks.get("full_attention") if isinstance(masks, dict) else None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    later = seen.triu(1)
    if not bool(later.any()):
        return None
    linked = (later | later.T).any(1)
    first = (seen & seen.T).to(torch.uint8).argmax(1)  # the first token that sees it and that it sees
    return torch.where(linked, first, torch.full((length,), -1, device=first.device))
