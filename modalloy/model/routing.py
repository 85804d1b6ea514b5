"""Token routing: every token uses the low-rank update of its owner, and nothing is computed for owners that are absent.

SSAM section 3 (after DAMC): with h = [h^m, h^t], Q = [h^m W_m, h^t W_t] and likewise for K, V, the output projection
and the feed-forward network; one softmax attention runs over the whole mixed sequence. Here W_g = W_0 + s_g · up_g @ down_g,
W_0 stays bit-exact, and each owner's product runs on just its own tokens: a view of them where they are in one run, as a
medium's are, else a gather. W_0 may be held in codes of 8 or 4 bits (`quantised`); updates never are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modalloy.delta import LowRank
from modalloy.errors import RecipeError

TEXT = "text"  # the owner of every token that belongs to no modality, and of all generated tokens

HALF = (torch.float16, torch.bfloat16)
CAST_ROWS = 1024  # of a weight in half precision or in codes, brought to float32 at once: they stay in the cache
FEW = 16  # rows that torch's kernel for codes of 8 bits multiplies sooner than a product of floats does

Rows = slice | Tensor  # of the flattened batch


class Routes:
    """Which rows of the flattened batch belong to which owner; one object is shared by all routed linears of a model."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Rows]] = [(TEXT, slice(None))]

    @contextmanager
    def use(self, owners: Tensor | None, names: tuple[str, ...]) -> Iterator[None]:
        """Route one forward pass. `owners` (batch, tokens) indexes `names`; None sends every token down the text path."""
        before = self.rows
        self.rows = [(TEXT, slice(None))] if owners is None else self._group(owners.reshape(-1), names)
        try:
            yield
        finally:
            self.rows = before

    @staticmethod
    def _group(owners: Tensor, names: tuple[str, ...]) -> list[tuple[str, Rows]]:
        """Rows of each owner that is present: one slice for each of a few runs, one index for many scattered rows."""
        values, lengths = torch.unique_consecutive(owners, return_counts=True)
        runs: dict[int, list[slice]] = {}
        start = 0
        for owner, length in zip(values.tolist(), lengths.tolist(), strict=True):
            runs.setdefault(owner, []).append(slice(start, start + length))
            start += length
        grouped: list[tuple[str, Rows]] = []
        for owner in sorted(runs):
            if len(runs[owner]) == 1:
                grouped.append((names[owner], runs[owner][0]))
            else:
                grouped.append((names[owner], (owners == owner).nonzero().squeeze(1)))
        return grouped


class RoutedLinear(nn.Linear):
    """A linear layer whose tokens may each have their owner's update.

    The base weight (out, in) and bias are those of the layer that it replaces, untouched. `up_OWNER` (out, rank),
    `down_OWNER` (rank, in) and `scales[OWNER]` hold the low-rank updates; `text_weight` (out, in), where there is one,
    is what text tokens use instead of the base's (dense merges). On a CPU, products with 16-bit weights are made in float32,
    which is several times faster there and rounds once.
    """

    def __init__(self, base: nn.Linear, routes: Routes) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.text_weight: nn.Parameter | None = None
        self.routes = routes
        self.scales: dict[str, float] = {}
        self.folded = False  # whether the weight holds the text update already

    def update(self, owner: str) -> LowRank:
        """`owner`'s low-rank update (out, in), scaling folded in."""
        up, down = self._factors(owner)
        return LowRank(up.detach() * self.scales[owner], down.detach())

    def add(self, owner: str, delta: LowRank, *, scale: float = 1.0, trainable: bool = False) -> None:
        """Give `owner`'s tokens the update scale · `delta` (out, in)."""
        self.register_parameter(f"up_{owner}", nn.Parameter(delta.up, requires_grad=trainable))
        self.register_parameter(f"down_{owner}", nn.Parameter(delta.down, requires_grad=trainable))
        self.scales[owner] = scale

    def remove(self, owner: str) -> None:
        """Take `owner`'s update away again, if it has one."""
        if self.scales.pop(owner, None) is not None:
            del self._parameters[f"up_{owner}"], self._parameters[f"down_{owner}"]

    def fold(self) -> float:
        """Round the text update into the weight; returns the Frobenius norm of what rounding lost."""
        if is_quantised(self.weight):
            raise RecipeError(
                "fold: the base's weights are quantised, and would lose the update; load the model without fold"
            )
        delta = self.update(TEXT)
        exact = torch.addmm(self.weight.double(), delta.up.double(), delta.down.double())
        self.weight.data.copy_(exact)
        self.folded = True
        return float((self.weight.double() - exact).norm())

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu"
        in_float32 = x.dtype in HALF and on_cpu
        in_codes = on_cpu and is_quantised(self.weight)
        if len(self.routes.rows) == 1 and self.weight.dtype == x.dtype and not (in_float32 or in_codes):
            return self._alone(x, self.routes.rows[0][0])
        flat_x = x.reshape(-1, x.shape[-1]).to(torch.float32 if in_float32 else x.dtype)
        if self.text_weight is None:
            out = matmul(flat_x, self.weight)
        else:
            out = flat_x.new_empty(len(flat_x), self.out_features)
            for owner, rows in self._rows(flat_x):
                out[rows] = matmul(flat_x[rows], self._weight(owner))
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        for owner, rows in self._rows(flat_x):
            for up, down, scale in self._terms(owner):
                inner = matmul(flat_x[rows], down)
                wide = up.to(inner.dtype).T
                if isinstance(rows, slice):
                    out[rows].addmm_(inner, wide, alpha=scale)
                else:
                    out.index_add_(0, rows, inner @ wide, alpha=scale)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _alone(self, x: Tensor, owner: str) -> Tensor:
        """All tokens are `owner`'s, as in every step of decoding: nothing to gather, and as few operations as there can be."""
        out = nn.functional.linear(x, self._weight(owner), self.bias)
        for up, down, scale in self._terms(owner):
            inner = nn.functional.linear(x, down)
            out.view(-1, len(up)).addmm_(inner.view(-1, len(down)), up.T, alpha=scale)
        return out

    def _weight(self, owner: str) -> Tensor:
        """What `owner`'s tokens use before their update."""
        return self.weight if self.text_weight is None or owner != TEXT else self.text_weight

    def _factors(self, owner: str) -> tuple[Tensor, Tensor]:
        up, down = self._parameters[f"up_{owner}"], self._parameters[f"down_{owner}"]
        assert up is not None and down is not None
        return up, down

    def _terms(self, owner: str) -> list[tuple[Tensor, Tensor, float]]:
        """What is added up to `owner`'s update: scale · up @ down of each (up, down, scale)."""
        own = [(*self._factors(owner), self.scales[owner])] if owner in self.scales else []
        if not self.folded or TEXT not in self.scales:
            return own
        return [] if owner == TEXT else [*own, (*self._factors(TEXT), -self.scales[TEXT])]

    def _rows(self, x: Tensor) -> list[tuple[str, Rows]]:
        """The rows of each owner, where `x` is (layers may be on several devices)."""
        return [(owner, rows if isinstance(rows, slice) else rows.to(x.device)) for owner, rows in self.routes.rows]


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in the type of `x` (rows, in); a weight of another type is cast a block of rows at a time."""
    if is_quantised(weight):
        return _matmul_codes(x, weight)
    if weight.dtype == x.dtype:
        return x @ weight.T
    out = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), CAST_ROWS):
        rows = slice(start, start + CAST_ROWS)
        out[:, rows] = x @ weight[rows].to(x.dtype).T
    return out


def _matmul_codes(x: Tensor, weight: Any) -> Tensor:
    """The same with a weight that torchao quantised (`quantised`); in float32 or bfloat16 on a CPU."""
    if x.device.type != "cpu" or getattr(weight, "act_quant_kwargs", None) is not None:
        return nn.functional.linear(x, weight)
    if hasattr(weight, "scale_and_zero"):  # int4: each group's scale and zero are in bfloat16
        return nn.functional.linear(x.to(weight.scale_and_zero.dtype), weight).to(x.dtype)
    codes, scales = weight.qdata, weight.scale.flatten()
    if len(x) <= FEW:
        ones = scales.new_ones(len(scales), dtype=torch.bfloat16)
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, ones).to(x.dtype).mul_(scales)
    return matmul(x, codes).mul_(scales)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds codes of torchao's."""
    return type(weight) not in (nn.Parameter, Tensor)


def route_linears(decoder: nn.Module, routes: Routes) -> dict[str, RoutedLinear]:
    """Replace the linears of a decoder; returns those of its blocks, whatever they are called, by the name of their weight.

    Example key: `model.layers.0.self_attn.q_proj.weight`. The output head is replaced too, for its type of arithmetic.
    """
    routed = {}
    for name, module in list(decoder.named_modules()):
        parent, _, leaf = name.rpartition(".")
        in_a_block = any(part.isdecimal() for part in parent.split("."))
        if type(module) is nn.Linear and (in_a_block or leaf == "lm_head"):
            replacement = RoutedLinear(module, routes)
            setattr(decoder.get_submodule(parent), leaf, replacement)
            if in_a_block:
                routed[f"{name}.weight"] = replacement
    return routed


def low_rank_zeros(linear: nn.Linear, rank: int, generator: torch.Generator) -> LowRank:
    """The usual LoRA start: up = 0, down uniform in ±1/√in, so that the update is zero and its gradient is not."""
    out_features, in_features = linear.weight.shape
    down = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / in_features**0.5
    return LowRank(torch.zeros(out_features, rank), down)
