"""SWUDI and ASWUDI: closed-form spectral regularisation of WUDI (Wei et al., arXiv 2606.07289)."""

import math
from typing import Literal

import torch
from torch import Tensor

from modalloy.linalg import inverse
from modalloy.methods.method import ROW_LAWS, Method
from modalloy.methods.parameters import Number, Positive, Share
from modalloy.methods.wudi import Interference


def swudi(
    deltas: list[Tensor],
    *,
    variant: Literal["swudi", "aswudi"] = "swudi",
    time: Positive = 300.0,
    keep: Share = 0.65,
    scale: Number,
    shape: tuple[int, int],
) -> Tensor:
    """λ X with X between Σ D_i and WUDI's minimiser: the strong modes of the interference are solved, the weak ones left.

    With C = V diag(l) Vᵀ and E as in `wudi`: X = X_0 (I − V f Vᵀ) + E V diag(f/l) Vᵀ from X_0 = Σ D_i.
    SWUDI: f = 1 − exp(−l t) on the strongest K = ⌈keep · in⌉ modes, 0 on the others. ASWUDI: f = 1 on the strongest
    K = ⌈(Σ √l)²/Σ l⌉ modes (their participation), without `time` and `keep`.
    The published code first raises every l to 1e-8, the zero ones too, which adds to ASWUDI's K; here they are zero.
    Its settings for multimodal LLMs: time 1300, keep 0.01, scale 0.2 for Qwen2-VL-7B; time 300, keep 0.65, scale 0.1 for
    InternVL2.5-1B.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in; a zero one contributes nothing.
        variant: "swudi" or "aswudi".
        time: t, how long SWUDI follows the gradient flow; l is in units of squared relative norm, Σ l = T. Published:
            1300 for Qwen2-VL-7B, 300 for InternVL2.5-1B.
        keep: K over the number of inputs, for SWUDI; on LoRA updates all modes are kept if keep · in ≥ Σ rank_i.
            Published: 0.01 for Qwen2-VL-7B, 0.65 for InternVL2.5-1B.
        scale: λ, 1 by default (the authors' sum over n updates is often used with 1/n). Published: 0.2 for
            Qwen2-VL-7B, 0.1 for InternVL2.5-1B.
        shape: of the original weight (out, in).

    Cost: O(T mn·min(m, n) + n³) for m × n matrices.
    """

    def gain(modes: Tensor) -> Tensor:  # f/l; modes are in ascending order
        if variant == "aswudi":
            total = float(modes.sum())
            count = math.ceil(float(modes.sqrt().sum()) ** 2 / total * (1 - 1e-9)) if total else 0
            full = inverse(modes)
        else:
            count = math.ceil(shape[1] * keep * (1 - 1e-9))
            full = torch.where(modes > 0, -torch.expm1(-modes * time) / modes, time)
        full[: max(len(modes) - count, 0)] = 0
        return full

    return scale * Interference(sum(deltas[1:], deltas[0]), deltas, deltas, deltas).relax(gain)


METHOD = Method(swudi, "core", "arXiv 2606.07289", ROW_LAWS)
