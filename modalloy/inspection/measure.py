"""inspect(recipe): what the specialists' updates look like, and whether their merge looks sane. Nothing is written.

All of it is computed on the small cores that the merge itself works on. With D_i = Q_B C_i Q_Aᵀ and orthonormal Q_B and
Q_A, the norms, singular values, inner products and subspaces of the D_i are exactly those of the C_i. Only the conflict of
signs needs entries of the D_i; it is measured on a sample of their rows."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modalloy.compute import Read, Surveys, merged_update, survey, weighted_updates
from modalloy.delta import Delta, LowRank, norm, thin_svd
from modalloy.engines import local
from modalloy.errors import RecipeError
from modalloy.inspection.advice import advise
from modalloy.inspection.figures import (
    DENSE_LIMIT,
    Inspection,
    Pair,
    SpecialistFacts,
    Update,
    WeightFigures,
    norms_of,
    place_in_layer,
)
from modalloy.inspection.findings import findings
from modalloy.inspection.outliers import only_tokens, outliers
from modalloy.linalg import Basis, gram, top_eigenvectors
from modalloy.machine.cores import default_workers
from modalloy.methods import METHODS
from modalloy.methods.apply import apply, resolve
from modalloy.methods.ssam import balanced
from modalloy.planning.job import Job
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe

SAMPLED_ROWS = (
    256  # a share over 256 · in entries has a standard error of at most 0.5 / √(256 · in), 0.001 at in = 1024
)
CURVE_POINTS = 64  # of an energy curve, evenly spread: finer than a plot of usual width shows
SHOWN_VALUES = 128  # singular values that are listed of a dense update (of a low-rank one: all of them)
ENERGIES = (0.90, 0.95, 0.99)
Svd = tuple[Tensor, Tensor, Tensor]  # U (p, r), σ (r,), V (q, r)


def inspect(
    recipe: Recipe | str | Path,
    *,
    jobs: int | None = None,
    allow_base_mismatch: bool = False,
    on_job: Callable[[int, int], None] | None = None,
) -> Inspection:
    """The updates that `recipe` would merge, measured weight by weight, with findings in plain words.

    Args:
        recipe: a Recipe, or the path of its YAML file.
        jobs: workers (default: one per core). The figures do not depend on it.
        allow_base_mismatch: inspect specialists that record another base than the recipe's.
        on_job: called with (weights done, weights in all).

    Raises:
        ModalloyError: a mistake in the recipe or the inputs, as `merge` would raise. What is odd is a finding, not an error.

    Cost per weight: a merge, and for n specialists n SVDs of size r and n (n − 1) / 2 · SAMPLED_ROWS · in for the signs.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if not recipe.base_model:
        raise RecipeError(
            "inspect shows updates of a base, but linear has none; see the plan, or add base_model and a method"
        )
    planned = plan(recipe, allow_base_mismatch=allow_base_mismatch)
    merges = planned.merges()
    ranks = [s.rank for s in planned.counted if s.rank is not None]
    surveys = survey(merges, planned.inputs.read)
    projects = recipe.merge_method == "ssam"
    automatic = resolve("ssam", {}, n=len(planned.counted), lora_rank=max(ranks, default=None))["rank"]
    slots = []
    results = local.in_order(
        merges,
        lambda job: job.parameters["rank"] if job.method == "ssam" else automatic,
        lambda job, rank: _slot(job, planned.inputs.read, surveys, rank),
        jobs or default_workers(),
    )
    for done, (_, slot) in enumerate(results, 1):
        slots.append(slot)
        if on_job is not None:
            on_job(done, len(merges))
    slots.sort(key=lambda slot: (-1 if slot.layer is None else slot.layer, place_in_layer(slot.module)))
    norms = norms_of(slots)
    own = len(planned.models) - len(recipe.models)  # 1 where the target is one of the models
    weights = [*[1.0] * own, *(entry.parameters.weight for entry in recipe.models)]
    facts = tuple(
        SpecialistFacts(s.label, s.modality, s.layout, s.rank, weight, math.hypot(*norms[s.label].values()))
        for s, weight in zip(planned.models, weights, strict=True)
        if s.label not in planned.absent
    )
    found = findings(facts, slots, projects=projects, balance=planned.parameters.get("balance", "none"))
    found += [*outliers(facts, slots), *only_tokens(planned, slots, planned.inputs.read)]
    found.sort(key=lambda finding: finding.level != "warning")
    k_of = "the recipe's" if projects else f"SSAM's default, for comparison: {recipe.merge_method} projects nothing"
    return Inspection(
        recipe.merge_method,
        planned.parameters,
        planned.base_name,
        k_of,
        facts,
        tuple(slots),
        tuple(found),
        advise(slots),
    )


def _slot(job: Job, read: Read, surveys: Surveys, rank: int | float) -> WeightFigures:
    """Every figure of one weight; `rank` is SSAM's k, or below 1 the share of energy that chooses it."""
    deltas, shape = _deltas(job, read), (job.shape[0], job.shape[1])
    factored = [delta for delta in deltas.values() if isinstance(delta, LowRank)]
    if len(factored) == len(deltas):
        small: list[Delta] = [*_in_common_bases(factored)]
    else:
        small = [_dense(delta).to(torch.float64) for delta in deltas.values()]
    cores = [_dense(delta) for delta in small]
    products = torch.stack([torch.stack([(a * b).sum() for b in cores]) for a in cores])  # ⟨D_i, D_j⟩
    norms = products.diagonal().sqrt().tolist()
    sum_norm = math.sqrt(max(float(products.sum()), 0.0))  # rounding may leave a cancelled sum just below zero
    decomposed = max(cores[0].shape) <= DENSE_LIMIT or len(factored) == len(deltas)
    spectra = [thin_svd(delta) if decomposed else None for delta in small]
    balances = job.parameters.get("balance", "none") != "none"
    seen = [_dense(delta) for delta in balanced(small)] if decomposed and balances else cores
    kept = _Kept(seen, rank) if decomposed else None
    merged_norm = None
    if decomposed:
        # a method that turns with its inputs gives a result of the same norm on the cores
        method = METHODS[job.method]
        turns = "rotation" in method.laws and not method.takes("weights") and not method.sides(job.parameters)
        merged = apply(job.method, small, job.parameters, shape) if turns else merged_update(job, read, surveys=surveys)
        merged_norm = norm(merged)
    mean_norm = sum_norm / len(job.models)
    rows = _sampled_rows(job.name, shape[0])
    entries = [_rows_of(delta, rows) for delta in deltas.values()]
    k = kept.k if kept else None
    layer, module = _layer(job.name)
    return WeightFigures(
        name=job.name,
        layer=layer,
        module=module,
        shape=shape,
        k=k,
        updates=tuple(
            _update(label, delta, norms[i], spectra[i], kept, i) for i, (label, delta) in enumerate(deltas.items())
        ),
        pairs=tuple(
            Pair(
                (a, b),
                float(products[i, j]) / (norms[i] * norms[j]) if norms[i] and norms[j] else None,
                *_overlap(spectra[i], spectra[j], 0, k, shape[0]),
                *_overlap(spectra[i], spectra[j], 2, k, shape[1]),
                *_sign_conflict(entries[i], entries[j]),
            )
            for (i, a), (j, b) in combinations(enumerate(deltas), 2)
        ),
        curve_k=kept.grid if kept else None,
        left_energy=kept.at_grid(kept.left) if kept else None,
        right_energy=kept.at_grid(kept.right) if kept else None,
        k_for_energy={f"{share:.2f}": kept.needed(share) for share in ENERGIES} if kept else None,
        coherence=sum_norm / sum(norms) if sum(norms) else None,
        merged_norm=merged_norm,
        merged_over_mean=merged_norm / mean_norm if merged_norm is not None and mean_norm else None,
    )


def _deltas(job: Job, read: Read) -> dict[str, Delta]:
    """The update of one weight by specialist, weighted as the recipe says; those without one are not listed."""
    deltas = zip(job.labels, job.models, weighted_updates(job, read), strict=True)
    return {label: delta for label, model, delta in deltas if model is not None}


def _in_common_bases(deltas: list[LowRank]) -> list[LowRank]:
    """The updates in orthonormal bases of their stacked factors: Q_Bᵀ D_i Q_A, still as factors, in float64."""
    splits = [delta.rank for delta in deltas]
    left = Basis(*(delta.up for delta in deltas)).triangle.split(splits, 1)
    right = Basis(*(delta.down.T for delta in deltas)).triangle.split(splits, 1)
    return [LowRank(up, down.T) for up, down in zip(left, right, strict=True)]


class _Kept:
    """The energy that the top k directions U of A = Σ D_i D_iᵀ and V of B = Σ D_iᵀ D_i hold, for every k at once.

    The leading k × k block of Uᵀ D_i V is what the projection keeps of D_i; whole rows sum to A's spectrum, columns to B's.
    """

    def __init__(self, cores: list[Tensor], rank: int | float) -> None:
        A, B = gram(*(core.T for core in cores)), gram(*cores)
        U, V = top_eigenvectors(A, len(A)), top_eigenvectors(B, len(B))
        squares = [(U.T @ core @ V) ** 2 for core in cores]
        total = torch.stack(squares).sum(0)
        self.blocks = [square.cumsum(0).cumsum(1) for square in squares]
        self.left, self.right = _shares(total.sum(1)), _shares(total.sum(0))
        self.size = max(total.shape)
        self.k = int(rank) if rank >= 1 else self.needed(rank)
        spread = (
            {round(1 + i * (self.size - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)} if self.size else set()
        )
        self.grid = tuple(sorted(spread | ({self.k} if self.k <= self.size else set())))

    def needed(self, share: float) -> int:
        """The smallest k at which both A and B keep `share` of their energy; as `ssam` chooses it."""
        return max(_first(self.left, share), _first(self.right, share))

    def at_grid(self, shares: Tensor) -> tuple[float, ...]:
        """Cumulative shares at every k of the grid; 1 beyond the last."""
        return tuple(float(shares[min(k, len(shares)) - 1]) if len(shares) else 1.0 for k in self.grid)

    def of(self, index: int, k: int) -> float | None:
        """The share of the energy of one update that is kept at k; None for a zero update."""
        block = self.blocks[index]
        if not block.numel() or not float(block[-1, -1]):
            return None
        return float(block[min(k, block.shape[0]) - 1, min(k, block.shape[1]) - 1] / block[-1, -1])


def _shares(energies: Tensor) -> Tensor:
    """Cumulative shares of a spectrum's energy; all 1 if there is none."""
    total = float(energies.sum())
    return energies.cumsum(0) / total if total else torch.ones_like(energies)


def _first(shares: Tensor, share: float) -> int:
    """The first k whose cumulative share reaches `share`; 0 for an empty spectrum."""
    return int((shares >= share * (1 - 1e-12)).to(torch.int8).argmax()) + 1 if len(shares) else 0


def _update(label: str, delta: Delta, norm: float, spectrum: Svd | None, kept: _Kept | None, index: int) -> Update:
    rank = delta.rank if isinstance(delta, LowRank) else None
    if spectrum is None or kept is None:
        return Update(label, rank, norm, None, None, None, None, None)
    values = spectrum[1]
    listed = tuple(values[:SHOWN_VALUES].tolist() if rank is None else values.tolist())
    at_k = kept.of(index, kept.k)
    if at_k is None:
        return Update(label, rank, norm, listed, None, None, None, None)
    p = values[values > 0] / values.sum()
    curve = tuple(share for k in kept.grid if (share := kept.of(index, k)) is not None)
    stable = norm**2 / float(values[0]) ** 2
    return Update(label, rank, norm, listed, stable, math.exp(-float((p * p.log()).sum())), at_k, curve)


def _overlap(
    first: Svd | None, second: Svd | None, side: Literal[0, 2], k: int | None, size: int
) -> tuple[float | None, float | None]:
    """Overlap of the top-k left (side 0) or right (side 2) singular subspaces, and of random ones in `size` dimensions."""
    if first is None or second is None or k is None:
        return None, None
    bases = [svd[side][:, : min(k, _numerical_rank(svd[1], size))] for svd in (first, second)]
    smaller, larger = sorted(basis.shape[1] for basis in bases)
    if not smaller:
        return None, None
    return float((bases[0].T @ bases[1]).square().sum()) / smaller, larger / size


def _numerical_rank(values: Tensor, size: int) -> int:
    """How many singular values are not rounding errors of the first."""
    return int((values > size * torch.finfo(values.dtype).eps * values[:1]).sum())


def _sampled_rows(slot: str, n_rows: int) -> Tensor:
    """Which rows of a weight the signs are compared on: all, or SAMPLED_ROWS drawn without replacement, seeded by its name."""
    seed = int.from_bytes(hashlib.sha256(slot.encode()).digest()[:7], "big")
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))[:SAMPLED_ROWS].sort().values


def _rows_of(delta: Delta, rows: Tensor) -> Tensor:
    return (delta.up[rows] @ delta.down if isinstance(delta, LowRank) else delta[rows]).to(torch.float64)


def _sign_conflict(first: Tensor, second: Tensor) -> tuple[float | None, float | None]:
    """The share of entries, and of Σ |a b|, in which two matrices disagree in sign; entries where one is zero are left out."""
    product = first * second
    mass = float(product.abs().sum())
    if not mass:
        return None, None
    against = product < 0
    return int(against.sum()) / int((product != 0).sum()), -float(product[against].sum()) / mass


def _dense(delta: Delta) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


def _layer(slot: str) -> tuple[int | None, str]:
    """A weight's layer and kind: model.layers.3.mlp.up_proj.weight → 3, model.layers.*.mlp.up_proj."""
    stem = slot.removesuffix(".weight")
    number = re.search(r"(?<=\.)\d+(?=\.)", stem)
    return (int(number[0]), f"{stem[: number.start()]}*{stem[number.end() :]}") if number else (None, stem)
