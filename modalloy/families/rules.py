"""A family of models as a table of rules: native tensor name <-> canonical slots of the decoder.

A pattern holds `{i}` where the layer's index is, `{model}` and `{head}` where spellings of one family differ, and `{rest}`
for anything. A rule without roles names what is outside the decoder, or computed when the model is loaded.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from modalloy.errors import CheckpointError, shown
from modalloy.storage.views import Rows

Owner = Literal["language", "vision"]


@dataclass(frozen=True)
class Place:
    """A place in a decoder: what it does, in which layer (None: in none), for which tokens, and weight or bias.

    What serves all tokens is owned by "language"; "vision" owns the copies that some families have for image tokens.
    """

    role: str
    layer: int | None
    owner: Owner = "language"
    part: str = "weight"

    def __str__(self) -> str:
        place = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.owner} {self.role} {self.part}{place}"


@dataclass(frozen=True)
class NameRule:
    """One line of a family's table. Several `roles` are stored as one tensor, row after row.

    With `grouped` the rows of a fused attention weight are interleaved by key head, as InternLM2 has them: the queries of
    one group, its key, its value.
    """

    pattern: str
    roles: tuple[str, ...] = ()
    owner: Owner = "language"
    grouped: bool = False
    reason: str = ""  # why it has no slot

    @property
    def part(self) -> str:
        """ "weight" or "bias"."""
        return self.pattern.rpartition(".")[2]


@dataclass(frozen=True)
class Spelling:
    """How the names of one checkpoint begin: the decoder's, and its head's."""

    model: str = "model."
    head: str = ""


@dataclass(frozen=True)
class Geometry:
    """What two decoders must share before their weights can be compared, as the text part of a config says it."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: str
    norm_epsilon: float
    tied: bool

    def rows(self, role: str) -> int:
        """Rows of an attention projection."""
        return self.head_dim * (self.heads if role == "q" else self.kv_heads)


@dataclass(frozen=True)
class Found:
    """A native name, understood: its rule, its layer, what `{rest}` stood for, and its slots in the order of the rows."""

    rule: NameRule
    slots: tuple[Place, ...]
    layer: int | None = None
    rest: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture: its rules, the spellings that are read, and the classes that configs name."""

    name: str
    architectures: tuple[str, ...]
    decoders: tuple[str, ...]  # model types of the text part, where one class holds several
    rules: tuple[NameRule, ...]
    spellings: tuple[Spelling, ...] = (Spelling(),)
    defaults: dict[str, Any] = field(default_factory=dict, hash=False)  # of a config that does not say
    embedding: str = "{model}embed_tokens.weight"  # by which a checkpoint's spelling is known

    def spelling(self, names: Iterable[str]) -> Spelling:
        """The spelling in which these names are written.

        Raises:
            CheckpointError: none fits.
        """
        names = set(names)
        for spelling in self.spellings:
            if self.embedding.format(model=spelling.model) in names:
                return spelling
        wanted = " or ".join(self.embedding.format(model=spelling.model) for spelling in self.spellings)
        raise CheckpointError(
            f"no {wanted} among {len(names)} tensors, as a {self.name} model has; give the whole model"
        )

    def find(self, name: str, spelling: Spelling) -> Found | None:
        """The rule and slots of a native name, None if no rule has it."""
        for rule in self.rules:
            if match := _regex(rule.pattern, spelling.model, spelling.head).fullmatch(name):
                parts = match.groupdict()
                layer = int(parts["i"]) if "i" in parts else None
                slots = tuple(Place(role, layer, rule.owner, rule.part) for role in rule.roles)
                return Found(rule, slots, layer, parts.get("rest", ""))
        return None

    def native(self, found: Found, spelling: Spelling) -> str:
        """The native name of what `find` has understood, by its slots where it has any: the inverse of `find`."""
        rule = found.rule
        if found.slots:
            wanted = (tuple(slot.role for slot in found.slots), found.slots[0].owner, found.slots[0].part)
            rule = next(rule for rule in self.rules if (rule.roles, rule.owner, rule.part) == wanted)
        begun = _begun(rule.pattern, spelling.model, spelling.head)
        return begun.replace("{i}", str(found.layer)).replace("{rest}", found.rest)

    def geometry(self, config: dict[str, Any]) -> Geometry:
        """What the config says of the decoder.

        Raises:
            CheckpointError: a size is missing or not a number.
        """
        text = self.defaults | text_config(config)
        rope = _table(text, "rope_parameters")
        scaling = _table(text, "rope_scaling") or rope
        theta = rope.get("rope_theta", text.get("rope_theta", 10000.0))
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < 1e30:
            raise CheckpointError(f"config.json: rope_theta is {shown(theta)}, not a positive number; correct the file")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        heads, width = _number(text, "num_attention_heads"), _number(text, "hidden_size")
        return Geometry(
            layers=_number(text, "num_hidden_layers"),
            width=width,
            ffn=_number(text, "intermediate_size"),
            heads=heads,
            kv_heads=_number(text, "num_key_value_heads") if text.get("num_key_value_heads") is not None else heads,
            head_dim=_number(text, "head_dim") if text.get("head_dim") is not None else width // heads,
            rope_theta=float(theta),
            # positions in several dimensions use the same weights as those in one
            rope_scaling="none" if kind in ("default", "mrope") else f"{kind} × {scaling.get('factor')}",
            norm_epsilon=float(text.get("rms_norm_eps", 1e-6)),
            tied=bool(text.get("tie_word_embeddings", False)),
        )


def remaining(taken: Iterable[Rows], height: int) -> Rows:
    """The stretches of rows, of `height`, that are not in `taken`."""
    left, place = [], 0
    for begin, end in [*sorted(stretch for rows in taken for stretch in rows), (height, height)]:
        if begin > place:
            left.append((place, begin))
        place = end
    return tuple(left)


def rows_of(found: Found, geometry: Geometry, height: int) -> list[Rows]:
    """Where each slot's rows are in a tensor of `height` rows.

    Raises:
        ValueError: the sizes that the config gives do not add up to the tensor's.
    """
    if len(found.slots) == 1:
        return [((0, height),)]
    heights = [geometry.rows(slot.role) for slot in found.slots]
    if sum(heights) != height:
        sizes = " + ".join(f"{slot.role} {rows}" for slot, rows in zip(found.slots, heights, strict=True))
        raise ValueError(f"has {height} rows, but its config splits it into {sizes} = {sum(heights)}")
    groups = geometry.kv_heads if found.rule.grouped else 1
    shares = [rows // groups for rows in heights]
    step, begins = height // groups, [sum(shares[:index]) for index in range(len(shares))]
    return [
        tuple((group * step + begin, group * step + begin + share) for group in range(groups))
        for begin, share in zip(begins, shares, strict=True)
    ]


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key} is {shown(value)}, not a table; correct the file")
    return value or {}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of a config: what is nested goes before what is beside it."""
    for key in ("text_config", "llm_config"):
        if nested := _table(config, key):
            return config | {name: value for name, value in nested.items() if value is not None}
    return config


def decoder(
    *, without: tuple[str, ...] = (), bias: tuple[str, ...] = (), reads_inv_freq: bool = True
) -> tuple[NameRule, ...]:
    """The rules of a plain Llama-like decoder, without those roles that a family stores otherwise."""
    layer = "{model}layers.{i}."
    names = {
        "input_norm": f"{layer}input_layernorm",
        "q": f"{layer}self_attn.q_proj",
        "k": f"{layer}self_attn.k_proj",
        "v": f"{layer}self_attn.v_proj",
        "o": f"{layer}self_attn.o_proj",
        "post_norm": f"{layer}post_attention_layernorm",
        "gate": f"{layer}mlp.gate_proj",
        "up": f"{layer}mlp.up_proj",
        "down": f"{layer}mlp.down_proj",
        "embed": "{model}embed_tokens",
        "norm": "{model}norm",
        "head": "{head}lm_head",
    }
    rules = [NameRule(f"{name}.weight", (role,)) for role, name in names.items() if role not in without]
    rules += [NameRule(f"{names[role]}.bias", (role,)) for role in bias]
    if reads_inv_freq:
        rules.append(NameRule(f"{layer}self_attn.rotary_emb.inv_freq", reason="computed when the model is loaded"))
    return tuple(rules)


def twins(layer: str, *, language: str, vision: str, roles: tuple[str, ...]) -> tuple[NameRule, ...]:
    """Two rules for one weight that image tokens have a copy of."""
    prefix = "{model}layers.{i}."
    return NameRule(prefix + layer.format(language), roles), NameRule(prefix + layer.format(vision), roles, "vision")


def outside(reason: str, *patterns: str) -> tuple[NameRule, ...]:
    """Rules for what is beside the decoder."""
    return tuple(NameRule(pattern, reason=reason) for pattern in patterns)


def _begun(pattern: str, model: str, head: str) -> str:
    return pattern.replace("{model}", model).replace("{head}", head)


@cache
def _regex(pattern: str, model: str, head: str) -> re.Pattern[str]:
    text = re.escape(_begun(pattern, model, head))
    return re.compile(text.replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)").replace(r"\{rest\}", "(?P<rest>.+)"))


def _number(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {shown(value)}, not a positive number; correct the file")
    return value
