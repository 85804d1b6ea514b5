"""Every method again in plain float64 NumPy, written from the papers and sharing no code with the package."""

import hashlib
import json
from itertools import pairwise

import numpy as np

Matrix = np.ndarray


def top(symmetric: Matrix, k: int) -> Matrix:
    values, vectors = np.linalg.eigh(symmetric)
    return vectors[:, np.argsort(values)[::-1][:k]]


def ssam(deltas: list[Matrix], rank: float, scale: float, balance: str = "none", match: str = "none") -> Matrix:
    norms = [np.sqrt(np.sum(d**2)) for d in deltas]
    mean = np.sum(norms) / max(np.count_nonzero(norms), 1)
    units = [d / (norm or 1) for d, norm in zip(deltas, norms, strict=True)]
    seen = deltas if balance == "none" else units
    left, right = sum(d @ d.T for d in seen), sum(d.T @ d for d in seen)
    if rank < 1:
        rank = max(energy_rank(left, rank), energy_rank(right, rank))
    u, v = top(left, int(rank)), top(right, int(rank))
    summed = [mean * d for d in units] if balance == "updates" else deltas
    merged = sum(u @ u.T @ d @ v @ v.T for d in summed)
    size = np.linalg.norm(merged)
    if match == "norm":
        merged = merged * (mean / size if size > 1e-6 * mean else 0)
    return scale * merged


def energy_rank(symmetric: Matrix, share: float) -> int:
    energies = np.linalg.eigvalsh(symmetric)[::-1]
    return next((k for k in range(1, len(energies)) if energies[:k].sum() >= share * energies.sum()), len(energies))


def average(deltas: list[Matrix], scale: float) -> Matrix:
    return scale * np.sum(deltas, axis=0)


task_arithmetic = damc = average


def metagpt(deltas: list[Matrix], scale: float) -> Matrix:
    return metagpt_model([deltas], scale)[0]


def metagpt_model(layers: list[list[Matrix]], scale: float) -> list[Matrix]:
    squares = np.array([[np.sum(delta**2) for delta in deltas] for deltas in layers]).sum(0)
    weights = squares / squares.sum()
    return [scale * np.einsum("i,ijk->jk", weights, np.array(deltas)) for deltas in layers]


def linear(deltas: list[Matrix], alpha: float) -> Matrix:
    return alpha * np.mean(deltas, axis=0)


def triples(matrix: Matrix, k: int, largest: float | None = None) -> tuple[Matrix, Matrix, Matrix]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    k = min(k, int(np.sum(s > 1e-6 * (s[0] if largest is None else largest))))
    return u[:, :k], s[:k], vt[:k]


def polar(matrix: Matrix) -> Matrix:
    u, _, vt = triples(matrix, min(matrix.shape))
    return u @ vt


def tsv(deltas: list[Matrix], rank: int | str, scale: float) -> Matrix:
    k = max(min(deltas[0].shape) // len(deltas), 1) if rank == "auto" else rank
    parts = [triples(d, k) for d in deltas]
    values = np.concatenate([s for _, s, _ in parts])
    return (
        scale * polar(np.hstack([u for u, _, _ in parts])) @ np.diag(values) @ polar(np.vstack([v for *_, v in parts]))
    )


def iso_c(deltas: list[Matrix], mean_over: str, scale: float) -> Matrix:
    total = np.sum(deltas, axis=0)
    u, s, vt = triples(total, min(total.shape))
    return scale * s.sum() / max(1, min(total.shape) if mean_over == "all" else len(s)) * u @ vt


def iso_cts(deltas: list[Matrix], common: float, mean_over: str, scale: float) -> Matrix:
    total, tasks = np.sum(deltas, axis=0), len(deltas)
    rank = len(triples(total, min(total.shape))[1])
    own = round((rank - int(rank * common)) / tasks) * tasks
    u, s, vt = triples(total, rank - own)
    us, ss, vts = [], [], []
    for d in deltas:
        left, values, right = triples(d - u @ u.T @ d, own // tasks, np.linalg.norm(d))
        us, ss, vts = [*us, left], [*ss, values], [*vts, right]
    values = np.concatenate([*ss, s])
    mean = values.sum() / max(1, min(total.shape) if mean_over == "all" else len(values))
    return scale * mean * polar(np.hstack([*us, u])) @ polar(np.vstack([*vts, vt]))


def best(matrix: Matrix, k: int) -> Matrix:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] @ np.diag(s[:k]) @ vt[:k]


def gradient(x: Matrix, targets: list[Matrix], projectors: list[Matrix], deltas: list[Matrix]) -> Matrix:
    terms = [
        2 * (x - g) @ p.T @ p / np.sum(d**2) for g, p, d in zip(targets, projectors, deltas, strict=True) if d.any()
    ]
    return np.sum([0 * x, *terms], axis=0)


def adam(x: Matrix, problem: tuple[list[Matrix], ...], iterations: int, lr: float) -> Matrix:
    m, v = 0 * x, 0 * x
    for step in range(1, iterations + 1):
        g = gradient(x, *problem)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return x


def sgd(x: Matrix, problem: tuple[list[Matrix], ...], iterations: int, lr: float, momentum: float) -> Matrix:
    v = 0 * x
    for _ in range(iterations):
        v = momentum * v + gradient(x, *problem)
        x = x - lr * v
    return x


def wudi(deltas: list[Matrix], solver: str, iterations: int, lr: float, scale: float) -> Matrix:
    """exact: least squares X [D_1ᵀ/‖D_1‖ …] = [D_1 D_1ᵀ/‖D_1‖ …] of the smallest norm, without any D_iᵀD_i."""
    if solver == "adam":
        return scale * adam(np.sum(deltas, axis=0), (deltas, deltas, deltas), iterations, lr)
    norms = [np.linalg.norm(d) or 1 for d in deltas]
    inputs = np.vstack([d / norm for d, norm in zip(deltas, norms, strict=True)])
    outputs = np.vstack([d @ d.T / norm for d, norm in zip(deltas, norms, strict=True)])
    return scale * np.linalg.lstsq(inputs, outputs, rcond=1e-6)[0].T


def swudi(deltas: list[Matrix], variant: str, time: float, keep: float, scale: float) -> Matrix:
    weights = [1 / np.sum(d**2) if d.any() else 0 for d in deltas]
    c = np.sum([w * d.T @ d for w, d in zip(weights, deltas, strict=True)], axis=0)
    e = np.sum([w * d @ d.T @ d for w, d in zip(weights, deltas, strict=True)], axis=0)
    values, vectors = np.linalg.eigh(c)
    if variant == "swudi":
        filters = 1 - np.exp(-np.maximum(values, 1e-8) * time)
        k = int(np.ceil(len(c) * keep))
    else:
        roots = np.sqrt(np.where(values > 1e-12, values, 0))
        filters, k = np.ones(len(c)), int(np.ceil(roots.sum() ** 2 / max(np.sum(roots**2), 1e-300)))
    filters[: len(c) - k] = 0
    total = np.sum(deltas, axis=0)
    kept = total - total @ vectors @ np.diag(filters) @ vectors.T
    return scale * (kept + e @ vectors @ np.diag(filters / np.maximum(values, 1e-8)) @ vectors.T)


def optmerge(
    deltas: list[Matrix], variant: str, iterations: int, lr: float | str, momentum: float, scale: float
) -> Matrix:
    k = max(min(deltas[0].shape) // len(deltas), 1)
    projectors, mean = [best(d, k) for d in deltas], np.mean(deltas, axis=0)
    if variant == "full":
        targets = [mean + best(d - mean, k) for d in deltas]
        return scale * adam(
            np.sum(deltas, axis=0), (targets, projectors, deltas), iterations, 1e-5 if lr == "auto" else lr
        )
    return scale * sgd(mean, (projectors, projectors, deltas), iterations, 1e-4 if lr == "auto" else lr, momentum)


Factors = list[tuple[Matrix, Matrix]]


def factorwise(deltas: Factors, mode: str, adapter_scale: float, density: float, scale: float) -> Matrix:
    ups, downs = [up / adapter_scale for up, _ in deltas], [down for _, down in deltas]
    if mode == "ties":
        up, down = ties_model([ups, downs], density, "mean", 1)
    else:
        up, down = apart(ups, mode), apart(downs, mode)
    return scale * adapter_scale * up @ down


def apart(factors: list[Matrix], mode: str) -> Matrix:
    if mode == "tsv":
        return tsv(factors, "auto", 1)
    if mode == "wudi":
        return wudi(factors, "adam", 300, 1e-5, 1)
    if mode == "optmerge":
        targets = [best(x, max(min(x.shape) // 5, 1)) for x in factors]
        return sgd(np.mean(factors, axis=0), (targets, factors, factors), 300, 5e-2, 0.9)
    return {"sum": np.sum, "mean": np.mean}[mode](factors, axis=0)


def ties(deltas: list[Matrix], density: float, combine: str, scale: float, threshold: str = "tensor") -> Matrix:
    return ties_model([deltas], density, combine, scale)[0]


def ties_model(layers: list[list[Matrix]], density: float, combine: str, scale: float) -> list[Matrix]:
    """Algorithm 1 of the paper on the flattened model: one list of updates per weight."""
    vectors = [np.concatenate([layer[i].ravel() for layer in layers]) for i in range(len(layers[0]))]
    kept = []
    for vector in vectors:
        largest = np.sort(np.abs(vector))[::-1][: max(1, round(density * len(vector)))]
        kept.append(np.where(np.abs(vector) >= largest.min(initial=np.inf), vector, 0))
    sign = np.sign(np.sum(kept, axis=0))
    sign[sign == 0] = np.sign(np.sum(sign))
    merged = np.zeros_like(vectors[0])
    for entry, elected in enumerate(sign):
        agreeing = [abs(v[entry]) for v in kept if v[entry] * elected > 0]
        if agreeing:
            merged[entry] = elected * {"mean": np.mean, "sum": np.sum, "max": np.max}[combine](agreeing)
    sizes = np.cumsum([layer[0].size for layer in layers])[:-1]
    return [scale * part.reshape(layer[0].shape) for part, layer in zip(np.split(merged, sizes), layers, strict=True)]


def dare_mask(shape: tuple[int, int], density: float, seed: int, model: int, slot: str) -> Matrix:
    return philox(shape, seed, model, slot) < density * 2**32


def dare(deltas: list[Matrix], density: float, seed: int, slot: str) -> list[Matrix]:
    return [dare_mask(d.shape, density, seed, i, slot) * d / density for i, d in enumerate(deltas)]


def dare_linear(deltas: list[Matrix], density: float, seed: int, scale: float, slot: str = "") -> Matrix:
    return scale * np.sum(dare(deltas, density, seed, slot), axis=0)


def dare_ties(
    deltas: list[Matrix],
    density: float,
    seed: int,
    trim_density: float,
    combine: str,
    scale: float,
    threshold: str = "tensor",
    slot: str = "",
) -> Matrix:
    return ties(dare(deltas, density, seed, slot), trim_density, combine, scale)


def consensus(deltas: list[Matrix], agreement: int, mask_scale: float, scale: float) -> Matrix:
    tau = np.sum(deltas, axis=0)
    masks = [np.abs(d) > mask_scale * np.abs(tau - d) for d in deltas]
    return scale * np.where(np.sum(masks, axis=0) >= agreement, tau, 0)


def fisher(deltas: list[Matrix], fishers: list[Matrix], floor: float, normalize: str, scale: float) -> Matrix:
    floored = [np.maximum(f, floor) for f in fishers]
    if normalize == "l2":
        floored = [f / np.linalg.norm(f) for f in floored]
    return scale * sum(f * d for f, d in zip(floored, deltas, strict=True)) / sum(floored)


def knots(deltas: list[Matrix], density: float, combine: str, scale: float) -> Matrix:
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = s > 1e-5 * s.max(initial=0)
    coordinates = np.split(s[kept, None] * vt[kept], len(deltas), axis=1)
    return u[:, kept] @ ties(coordinates, density, combine, scale)


def core_space(factors: list[tuple[Matrix, Matrix]], inner: str, density: float, combine: str, scale: float) -> Matrix:
    u, s_u, _ = np.linalg.svd(np.concatenate([b for b, _ in factors], axis=1), full_matrices=False)
    _, s_v, vt = np.linalg.svd(np.concatenate([a for _, a in factors], axis=0), full_matrices=False)
    u, vt = u[:, s_u > 1e-12 * s_u.max(initial=0)], vt[s_v > 1e-12 * s_v.max(initial=0)]
    cores = [u.T @ b @ a @ vt.T for b, a in factors]
    return u @ (ties(cores, density, combine, scale) if inner == "ties" else scale * np.sum(cores, axis=0)) @ vt


def cosine_of(one: Matrix, other: Matrix) -> float:
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.clip(np.sum(one * other) / size, -1, 1)) if size else 0.0


def angle(one: Matrix, other: Matrix) -> float:
    return float(np.arccos(cosine_of(one, other)))


def on_the_arc(one: Matrix, other: Matrix, t: float, straight: float) -> Matrix:
    theta = angle(one, other)
    if abs(np.cos(theta)) > straight:
        return (1 - t) * one + t * other
    return (np.sin((1 - t) * theta) * one + np.sin(t * theta) * other) / np.sin(theta)


def slerp(deltas: list[Matrix], t: float, base: Matrix) -> Matrix:
    return on_the_arc(base, base + deltas[0], t, 0.9995) - base


def nuslerp(
    deltas: list[Matrix],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
    origin: str,
    weights: tuple[float, float] = (1, 1),
    base: Matrix | None = None,
) -> Matrix:
    start = base if origin == "zero" else np.zeros_like(deltas[0])
    one, other = start + deltas[0], start + deltas[1]
    t = weights[1] / sum(weights)
    if nuslerp_flatten:
        return on_the_arc(one, other, t, 1 - 1e-12) - start
    if nuslerp_row_wise:
        return np.array([on_the_arc(a, b, t, 1 - 1e-12) for a, b in zip(one.T, other.T, strict=True)]).T - start
    return np.array([on_the_arc(a, b, t, 1 - 1e-12) for a, b in zip(one, other, strict=True)]) - start


def multislerp(
    deltas: list[Matrix],
    normalize_weights: bool,
    eps: float,
    origin: str,
    weights: list[float] | None = None,
    base: Matrix | None = None,
) -> Matrix:
    """The step in the tangent space written out."""
    start = base if origin == "zero" else np.zeros_like(deltas[0])
    points = [start + delta for delta in deltas]
    w = np.ones(len(points)) if weights is None else np.array(weights)
    if len(points) == 1 or not any(np.any(point) for point in points):
        return deltas[0]
    w = w / w.sum() if normalize_weights else w
    units = [point / max(np.linalg.norm(point), eps) for point in points]
    mean = np.einsum("i,ijk->jk", w, np.array(units))
    if np.linalg.norm(mean) < 1e-7 and len(points) == 2:
        return w[0] * deltas[0] + w[1] * deltas[1]
    mean /= np.linalg.norm(mean)
    tangent = sum(share * (unit - np.sum(unit * mean) * mean) for share, unit in zip(w, units, strict=True))
    size = np.linalg.norm(tangent) + 1e-30
    there = np.cos(size) * mean + np.sin(size) / size * tangent
    return sum(share * np.linalg.norm(point) for share, point in zip(w, points, strict=True)) * there - start


def karcher(deltas: list[Matrix], max_iter: int, tol: float, base: Matrix) -> Matrix:
    weights = [base + delta for delta in deltas]
    if len(weights) == 1:
        return deltas[0]
    norms = [np.linalg.norm(weight) for weight in weights]
    units = [weight / norm for weight, norm in zip(weights, norms, strict=True) if norm > tol]
    mean = sum(units) / len(units)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros_like(base)
        for unit in units:
            theta = angle(mean, unit)
            if theta >= tol and np.sin(theta) > 1e-9:
                step += theta / np.sin(theta) * (unit - np.cos(theta) * mean) / len(units)
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean /= np.linalg.norm(mean)
    return np.mean(norms) * mean - base


def nearswap(deltas: list[Matrix], t: float) -> Matrix:
    (delta,) = deltas
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.minimum(1, np.where(delta == 0, 1, t / np.abs(delta)))
    return share * delta


def arcee_fusion(deltas: list[Matrix], base: Matrix) -> Matrix:
    def chances(row: np.ndarray) -> np.ndarray:
        powers = np.exp(row - row.max())
        return powers / powers.sum() + 1e-8

    (delta,) = deltas
    importance = np.empty_like(base)
    for index, (before, change) in enumerate(zip(base, delta, strict=True)):
        p, q = chances(before + change), chances(before)
        importance[index] = np.abs(change) * max(0, np.sum(p * np.log(p / q)))
    ordered = np.sort(importance.ravel())
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), delta, 0)


def model_stock(deltas: list[Matrix], filter_wise: bool) -> Matrix:
    if filter_wise:
        return np.array([model_stock(list(rows), False) for rows in zip(*deltas, strict=True)])
    n = len(deltas)
    cosines = [cosine_of(deltas[i], deltas[j]) for i in range(n) for j in range(i)]
    cosine = np.mean(cosines)
    denominator = 1 + (n - 1) * cosine
    t = 0 if abs(denominator) < 1e-6 else n * cosine / denominator
    return t * np.mean(deltas, axis=0)


def elected(kept: list[Matrix], combine: str, scale: float) -> Matrix:
    return ties(kept, 1.0, combine, scale)


def della_pruned(
    deltas: list[Matrix], density: float, epsilon: float, rescale: str, seed: int, slot: str
) -> list[Matrix]:
    found = []
    for model, d in enumerate(deltas):
        if density == 1:
            found.append(d)
            continue
        numbers, chances, left = philox(d.shape, seed, model, slot), np.zeros(d.shape), np.zeros(d.shape)
        for row in range(len(d)):
            for place, column in enumerate(sorted(range(d.shape[1]), key=lambda c: (abs(d[row, c]), c))):
                rank = place / (d.shape[1] - 1) if d.shape[1] > 1 else 0.5
                chances[row, column] = density - epsilon + 2 * epsilon * rank
        kept = numbers < chances * 2**32
        left[kept] = d[kept] / (chances[kept] if rescale == "probability" else 1)
        if rescale == "norm" and left.any():
            left *= np.abs(d).sum() / np.abs(left).sum()
        found.append(left)
    return found


def philox(shape: tuple[int, int], seed: int, model: int, slot: str) -> Matrix:
    rows = []
    for tile, start in enumerate(range(0, shape[0], 128)):
        n = min(128, shape[0] - start) * shape[1]
        key = hashlib.sha256(json.dumps([seed, model, slot, tile]).encode()).digest()
        stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        numbers = [half for word in stream.random_raw((n + 1) // 2).tolist() for half in (word % 2**32, word >> 32)]
        rows.append(np.array(numbers[:n], dtype=np.float64).reshape(min(128, shape[0] - start), shape[1]))
    return np.concatenate(rows) if rows else np.zeros(shape)


def della_linear(
    deltas: list[Matrix], density: float, epsilon: float, rescale: str, seed: int, scale: float, slot: str = ""
) -> Matrix:
    return scale * np.sum(della_pruned(deltas, density, epsilon, rescale, seed, slot), axis=0)


def della(
    deltas: list[Matrix],
    density: float,
    epsilon: float,
    rescale: str,
    seed: int,
    combine: str,
    scale: float,
    slot: str = "",
) -> Matrix:
    return elected(della_pruned(deltas, density, epsilon, rescale, seed, slot), combine, scale)


def crumbs(deltas: list[Matrix], density: float, gamma: float, rescale: str) -> list[Matrix]:
    found = []
    for d in deltas:
        ascending = np.sort(np.abs(d), axis=None)
        kept = max(1, round(density * d.size))
        first = max(0, d.size - round(gamma * d.size) - kept)
        band = ascending[first : first + kept]
        left = np.where((np.abs(d) >= band.min(initial=np.inf)) & (np.abs(d) <= band.max(initial=-1)), d, 0)
        found.append(left * (np.abs(d).sum() / np.abs(left).sum() if rescale == "norm" and left.any() else 1))
    return found


def breadcrumbs(deltas: list[Matrix], density: float, gamma: float, rescale: str, scale: float) -> Matrix:
    return scale * np.sum(crumbs(deltas, density, gamma, rescale), axis=0)


def breadcrumbs_ties(
    deltas: list[Matrix], density: float, gamma: float, rescale: str, combine: str, scale: float
) -> Matrix:
    return elected(crumbs(deltas, density, gamma, rescale), combine, scale)


def sce(deltas: list[Matrix], select_topk: float, scale: float) -> Matrix:
    d = np.array(deltas)
    if select_topk < 1:
        variance = d.var(axis=0)
        varying = np.sort(variance[variance > 0])[::-1]
        if not len(varying):
            return 0 * d[0]
        d = d * (variance >= varying[max(1, round(select_topk * len(varying))) - 1])
    weights, merged, sums = np.sum(d**2, axis=(1, 2)), 0 * d[0], d.sum(axis=0)
    for place in np.ndindex(merged.shape):
        agreeing = [(w, own[place]) for w, own in zip(weights, d, strict=True) if own[place] * sums[place] > 0]
        if agreeing:
            merged[place] = scale * sum(w * own for w, own in agreeing) / sum(w for w, _ in agreeing)
    return merged


def ram(deltas: list[Matrix], epsilon: float, scale: float) -> Matrix:
    return ramplus_tl(deltas, 0, 0, epsilon, scale)


def ramplus_tl(deltas: list[Matrix], r: float, alpha: float, epsilon: float, scale: float) -> Matrix:
    active = np.array([np.abs(d) > epsilon for d in deltas])
    count, merged = active.sum(axis=0), 0 * deltas[0]
    factors = [1 + r * min(np.sum(a & (count > 1)) / max(np.sum(a & (count == 1)), 1e-300), alpha) for a in active]
    for place in np.ndindex(merged.shape):
        owners = [i for i in range(len(deltas)) if active[i][place]]
        if len(owners) == 1:
            merged[place] = factors[owners[0]] * deltas[owners[0]][place]
        elif owners:
            merged[place] = np.mean([deltas[i][place] for i in owners])
    return scale * merged


def do_merging(deltas: Factors, iterations: int, penalty: float, scale: float) -> Matrix:
    ups, downs = apart_by_descent([b.T for b, _ in deltas], iterations, penalty), [a for _, a in deltas]
    updates = [b.T @ a for b, a in zip(ups, apart_by_descent(downs, iterations, penalty), strict=True)]
    magnitudes = [np.linalg.norm(w, axis=0) for w in updates]
    directions = [
        w * np.where(m > 1e-6 * m.max(), 1 / np.where(m > 0, m, 1), 0) for w, m in zip(updates, magnitudes, strict=True)
    ]
    return scale * np.mean(magnitudes, axis=0) * np.sum(directions, axis=0)


def apart_by_descent(factors: list[Matrix], iterations: int, penalty: float) -> list[Matrix]:
    """Gradient descent on the factors themselves, one pair at a time."""
    squares = [row @ row for factor in factors for row in factor if row.any()]
    if not squares:
        return factors
    size = np.sqrt(np.mean(squares))
    start = [factor / size for factor in factors]
    step = 1 / (2 * penalty + 12 * np.linalg.svd(np.concatenate(start), compute_uv=False)[0] ** 2)
    now = start
    for _ in range(iterations):
        slopes = [
            2 * penalty * (v - w) + sum((4 * v @ other.T @ other for j, other in enumerate(now) if j != i), 0 * v)
            for i, (v, w) in enumerate(zip(now, start, strict=True))
        ]
        now = [v - step * slope for v, slope in zip(now, slopes, strict=True)]
    return [size * v for v in now]


def dc_merge(deltas: list[Matrix], rank: int | str, smoothing: str, rho: float, density: float, scale: float) -> Matrix:
    k = max(min(deltas[0].shape) // len(deltas), 1) if rank == "auto" else int(rank)
    parts = [triples(d, k) for d in deltas]
    u, v = polar(np.hstack([u for u, _, _ in parts])), polar(np.vstack([v for *_, v in parts]))
    spaces = np.cumsum([0, *(len(s) for _, s, _ in parts)])
    cores = []
    for left, s, right in parts:
        course = {"none": s, "mean": np.ones(len(s))}.get(smoothing)
        if course is None:
            course = np.linspace(min(rho, s[0] / s[-1]) if len(s) else 1, 1, len(s))
        cores.append(u.T @ left @ np.diag(s.sum() * course / max(course.sum(), 1e-300)) @ right @ v.T)
    kept = []
    for core, (_, s, _) in zip(cores, parts, strict=True):
        count = (
            max(len(s), round(0.001 * core.size)) if isinstance(density, str) else max(1, round(density * core.size))
        )
        largest = np.sort(np.abs(core), axis=None)[::-1][:count]
        cut = max((1 - 1e-6) * largest.min(initial=np.inf), 1e-6 * largest.max(initial=0))
        kept.append(np.where(np.abs(core) >= cut, core, 0))
    total, merged = np.sum(kept, axis=0), np.zeros_like(cores[0])
    for begin, end in pairwise(spaces):
        for place in np.ndindex(end - begin, end - begin):
            entry = (begin + place[0], begin + place[1])
            agreeing = [core[entry] for core in kept if core[entry] * total[entry] > 0]
            merged[entry] = np.mean(agreeing) if agreeing else 0
    return scale * u @ merged @ v
