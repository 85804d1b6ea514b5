"""Factor-wise merging: what ModelCompose (Chen et al., ACL 2024, arXiv 2402.12750) and OptMerge's modality merging do."""

from typing import Literal

import torch
from torch import Tensor

from modalloy.delta import Delta, LowRank
from modalloy.errors import MethodError
from modalloy.linalg import require_finite
from modalloy.methods.method import LINEAR_LAWS, Method
from modalloy.methods.optmerge import momentum_gain, truncate
from modalloy.methods.parameters import Number, Positive, Share
from modalloy.methods.ties import ties
from modalloy.methods.tsv import tsv
from modalloy.methods.wudi import Interference, wudi


def factorwise(
    deltas: list[Delta],
    *,
    mode: Literal["sum", "mean", "ties", "tsv", "wudi", "optmerge"] = "sum",
    adapter_scale: Positive = 2.0,
    density: Share = 0.2,
    scale: Number,
    shape: tuple[int, int],
) -> LowRank:
    """λ s f(B_1 … B_T) f(A_1 … A_T): the A's (lora_A) and the B's (lora_B) merged apart, as if each were an update.

    Not a merge of the updates s B_i A_i: it makes cross terms B_i A_j, and depends on how an update is factored
    (B_i G and G⁻¹A_i are the same update). It is here to reproduce published results; the rank stays r.
    - sum, mean: of the factors. NaiveMC; a mean weighs each own term B_i A_i by 1/T².
    - ties: as the method of that name on A and B together, per weight; the original trims over the whole adapter.
    - tsv, wudi: as the methods of that name on each factor; wudi with Adam, 300 steps of 1e-5, as published.
    - optmerge: targets truncated to ⌊r/5⌋, projectors whole, 300 steps of 5e-2 with momentum 0.9 from the mean.

    Args:
        deltas: one `LowRank` update per specialist, all of one rank r (or 0, which counts as zero
            factors); `up` is s B_i, `down` is A_i.
        mode: f.
        adapter_scale: s = alpha/r of the adapters, which modalloy folds into `up`: taken out before the B's are merged,
            and put back (ModelCompose: 256/128). Without effect on sum and mean.
        density: share of the entries that ties keeps, the largest.
        scale: λ, 1 by default.
        shape: of the original weight (out, in).

    Raises:
        MethodError: an update is a full matrix, or the ranks differ.

    Cost: sum, mean and ties O(T (out + in) r); tsv and optmerge O((out + in)(T r)²); wudi 300 times O((out + in) T r²).
    """
    adapters = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(adapters) < len(deltas):
        raise MethodError(
            "factorwise merges the factors of LoRA updates, and a full matrix has none; choose another method"
        )
    ranks = sorted({adapter.rank for adapter in adapters} - {0}) or [0]
    if len(ranks) > 1:
        found = ", ".join(str(adapter.rank) for adapter in adapters)
        raise MethodError(f"factorwise needs LoRA updates of one rank, but these have {found}; choose another method")
    missing = LowRank(adapters[0].up.new_zeros(shape[0], ranks[0]), adapters[0].down.new_zeros(ranks[0], shape[1]))
    adapters = [adapter if adapter.rank else missing for adapter in adapters]
    ups, downs = [adapter.up / adapter_scale for adapter in adapters], [adapter.down for adapter in adapters]
    for factor in (*ups, *downs):
        require_finite(factor)
    if mode == "ties":
        vectors = [torch.cat([down.flatten(), up.flatten()])[None] for down, up in zip(downs, ups, strict=True)]
        merged = ties(vectors, density=density, scale=1.0, shape=(1, vectors[0].numel()))
        flat_down, flat_up = merged[0].split([downs[0].numel(), ups[0].numel()])
        down, up = flat_down.view_as(downs[0]), flat_up.view_as(ups[0])
    else:
        down, up = _merge(downs, mode), _merge(ups, mode)
    dtype = adapters[0].up.dtype
    return LowRank((scale * adapter_scale * up).to(dtype), down.to(dtype))


def _merge(factors: list[Tensor], mode: str) -> Tensor:
    total, shape = sum(factors[1:], factors[0]), (factors[0].shape[0], factors[0].shape[1])
    if mode == "sum":
        return total
    if mode == "tsv":
        return tsv(factors, scale=1.0, shape=shape).dense()
    if mode == "wudi":
        return wudi(factors, solver="adam", scale=1.0, shape=shape)
    mean = total / len(factors)
    if mode == "mean":
        return mean
    targets = [truncate(factor, max(1, min(shape) // 5))[0] for factor in factors]
    return Interference(mean, targets, factors, factors).relax(momentum_gain(300, 5e-2, 0.9))


METHOD = Method(
    factorwise,
    "factors",
    "arXiv 2402.12750",
    tuple(law for law in LINEAR_LAWS if law not in ("gauge", "factored = dense")),
    one_rank=True,
)
