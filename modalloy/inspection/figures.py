"""What is measured of a weight, of a pair of updates, and of a whole merge."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

DENSE_LIMIT = 2048  # spectra of dense updates are computed up to this size: their cost grows with its cube
IN_A_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # order of the data's way
SURE = (
    "a rule of thumb: merges of specialists of one 135M base stand behind it, twelve pairs and a set of four; search λ on "
    "questions of your own"
)


@dataclass(frozen=True)
class Finding:
    """Something about this merge that a person should know. `code` is stable; `slots` are the weights, worst first."""

    level: Literal["warning", "note"]
    code: str
    message: str
    specialists: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Update:
    """One specialist's update D of one weight, its `weight` in the recipe included.

    `stable_rank` is ‖D‖_F² / ‖D‖₂² (Rudelson and Vershynin 2007). `effective_rank` is exp(−Σ p log p), p = σ / Σ σ (Roy and
    Vetterli 2007): the number of directions it would have if all were equally strong. `kept` is the share of its
    energy that SSAM's projection keeps, ‖U Uᵀ D V Vᵀ‖² / ‖D‖², and `kept_curve` the same at every `WeightFigures.curve_k`.
    None where it is not defined (D = 0) or was not computed (`Inspection.findings` then says so).
    """

    specialist: str
    rank: int | None  # columns of its factors; None: dense
    norm: float  # Frobenius
    singular_values: tuple[float, ...] | None
    stable_rank: float | None
    effective_rank: float | None
    kept: float | None
    kept_curve: tuple[float, ...] | None


@dataclass(frozen=True)
class Pair:
    """Two specialists' updates of one weight, compared.

    An overlap is ‖U_iᵀ U_j‖_F² / min(r_i, r_j) over their top singular vectors, at most k (Hu et al., arXiv 2106.09685, eq. 4):
    1 if one subspace holds the other, 0 if they are orthogonal; `*_chance` is what random subspaces give on average.
    `sign_conflict` is the share of entries in which the two disagree in sign, among those where both are not zero;
    `sign_conflict_mass` weighs every entry by |D_i| |D_j|.
    """

    specialists: tuple[str, str]
    cosine: float | None
    left_overlap: float | None
    left_chance: float | None
    right_overlap: float | None
    right_chance: float | None
    sign_conflict: float | None
    sign_conflict_mass: float | None


@dataclass(frozen=True)
class WeightFigures:
    """One merged weight. `left_energy` and `right_energy` are the shares of the spectral energy of A = Σ D_i D_iᵀ and of
    B = Σ D_iᵀ D_i in their top `curve_k` directions; `k_for_energy` the k at which both reach a share. Where the recipe
    balances, A and B are those of D_i / ‖D_i‖.

    `coherence` is ‖Σ D_i‖ / Σ ‖D_i‖: 1 if all point one way, 1/√n if n of equal norm are orthogonal, 0 if they cancel.
    `merged_over_mean` is the norm of what the recipe merges over the norm of the plain mean (1/n) Σ D_i.
    """

    name: str
    layer: int | None
    module: str  # the name with its layer's number replaced by *
    shape: tuple[int, int]
    k: int | None
    updates: tuple[Update, ...]
    pairs: tuple[Pair, ...]
    curve_k: tuple[int, ...] | None
    left_energy: tuple[float, ...] | None
    right_energy: tuple[float, ...] | None
    k_for_energy: dict[str, int] | None
    coherence: float | None
    merged_norm: float | None
    merged_over_mean: float | None


@dataclass(frozen=True)
class SpecialistFacts:
    """One specialist as the recipe uses it; `norm` is over all merged weights."""

    label: str
    modality: str | None
    layout: str
    rank: int | None
    weight: float | tuple[Any, ...]  # several: over the depth, or by name
    norm: float


@dataclass(frozen=True)
class Advice:
    """What to merge with: `method`, `scale` (λ) and `rank` (SSAM's k) in words, the reasons, and how sure they are."""

    method: str
    scale: str
    rank: str
    reasons: tuple[str, ...]
    sureness: str = SURE

    @property
    def line(self) -> str:
        """All of it in a sentence or two."""
        return f"{self.method}; {self.scale}; {self.rank}: {'; '.join(self.reasons)} ({self.sureness})"


@dataclass(frozen=True)
class Inspection:
    """Everything that was measured, weight by weight, and what it means. Deterministic, whatever the number of workers."""

    method: str
    parameters: dict[str, Any]
    base: str
    k_of: str  # what `WeightFigures.k` is
    specialists: tuple[SpecialistFacts, ...]
    slots: tuple[WeightFigures, ...]
    findings: tuple[Finding, ...]
    advice: Advice | None

    @property
    def verdict(self) -> str:
        """One line: is this merge sane?"""
        warnings = sum(finding.level == "warning" for finding in self.findings)
        return f"{warnings} warning{'s' * (warnings > 1)}: read the findings" if warnings else "nothing looks wrong"

    @property
    def modules(self) -> dict[str, str]:
        """Every kind of weight in the order of the model, and its name without the part that all of them share."""
        patterns = sorted(dict.fromkeys(slot.module for slot in self.slots), key=place_in_layer)
        parents = [pattern.split(".")[:-1] for pattern in patterns]
        shared = 0  # names at the start that all have
        while parents and all(len(parent) > shared and parent[shared] == parents[0][shared] for parent in parents):
            shared += 1
        return {pattern: ".".join(pattern.split(".")[shared:]) for pattern in patterns}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return asdict(self) | {"verdict": self.verdict}


def place_in_layer(module: str) -> int:
    """Where a kind of weight stands in a layer; unknown kinds come last."""
    leaf = module.rpartition(".")[2]
    return IN_A_LAYER.index(leaf) if leaf in IN_A_LAYER else len(IN_A_LAYER)


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def norms_of(slots: Sequence[WeightFigures]) -> defaultdict[str, dict[str, float]]:
    """Specialist → weight → norm of its update."""
    norms: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for slot in slots:
        for update in slot.updates:
            norms[update.specialist][slot.name] = update.norm
    return norms
