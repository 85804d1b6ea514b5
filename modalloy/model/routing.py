"""Token routing: every token uses the low-rank update of its owner, and nothing is computed for owners that are absent.

SSAM section 3 (after DAMC): with h = [h^m, h^t], Q = [h^m W_m, h^t W_t] and likewise for K, V, the output projection
and the feed-forward network; one softmax attention runs over the whole mixed sequence. Here W_g = W_0 + up_g @ down_g,
W_0 stays bit-exact, and each owner's product runs on a gather of just its own tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modalloy.delta import LowRank

TEXT = "text"  # the owner of every token that belongs to no modality, and of all generated tokens

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Routes:
    """Which rows of the flattened batch belong to which owner; one object is shared by all routed linears of a model."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Tensor | None]] = [(TEXT, None)]  # None: all rows

    @contextmanager
    def use(self, owners: Tensor | None, names: tuple[str, ...]) -> Iterator[None]:
        """Route one forward pass. `owners` (batch, tokens) indexes `names`; None sends every token down the text path."""
        before = self.rows
        self.rows = [(TEXT, None)] if owners is None else self._group(owners.reshape(-1), names)
        try:
            yield
        finally:
            self.rows = before

    @staticmethod
    def _group(owners: Tensor, names: tuple[str, ...]) -> list[tuple[str, Tensor | None]]:
        present = [int(index) for index in owners.unique()]
        if len(present) == 1:
            return [(names[present[0]], None)]
        return [(names[index], (owners == index).nonzero().squeeze(1)) for index in present]


class RoutedLinear(nn.Module):
    """A linear layer with one optional low-rank update per owner.

    The base weight (out, in) and bias are those of the layer it replaces, untouched. `up[owner]` (out, rank) and
    `down[owner]` (rank, in) hold the updates, scaling folded in.
    """

    def __init__(self, base: nn.Linear, routes: Routes) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.routes = routes
        self.up = nn.ParameterDict()
        self.down = nn.ParameterDict()

    def add(self, owner: str, delta: LowRank, *, trainable: bool = False) -> None:
        """Give `owner`'s tokens the update `delta` (out, in)."""
        self.up[owner] = nn.Parameter(delta.up, requires_grad=trainable)
        self.down[owner] = nn.Parameter(delta.down, requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight, self.bias)
        flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for owner, rows in self.routes.rows:
            if owner not in self.up:
                continue
            up, down = self.up[owner], self.down[owner]
            if rows is None:
                flat_out.addmm_(flat_x @ down.T, up.T)
            else:
                flat_out.index_add_(0, rows, (flat_x[rows] @ down.T) @ up.T)
        return flat_out.view(out.shape)


def route_linears(decoder: nn.Module, routes: Routes) -> dict[str, RoutedLinear]:
    """Replace the seven linears of every block of a Llama-shaped decoder; returns them by the name of their weight.

    Example key: `model.layers.0.self_attn.q_proj.weight`.
    """
    routed = {}
    for name, module in list(decoder.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in LINEARS and isinstance(module, nn.Linear):
            routed[f"{name}.weight"] = RoutedLinear(module, routes)
            setattr(decoder.get_submodule(parent), leaf, routed[f"{name}.weight"])
    return routed


def low_rank_zeros(linear: nn.Linear | RoutedLinear, rank: int, generator: torch.Generator) -> LowRank:
    """The usual LoRA start: up = 0, down uniform in ±1/√in, so that the update is zero and its gradient is not."""
    out_features, in_features = linear.weight.shape
    down = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / in_features**0.5
    return LowRank(torch.zeros(out_features, rank), down)
