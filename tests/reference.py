"""Every method again in plain float64 NumPy, written from the papers and sharing no code with the package."""

import numpy as np

Matrix = np.ndarray


def top(symmetric: Matrix, k: int) -> Matrix:
    values, vectors = np.linalg.eigh(symmetric)
    return vectors[:, np.argsort(values)[::-1][:k]]


def ssam(deltas: list[Matrix], rank: int, scale: float) -> Matrix:
    left, right = sum(d @ d.T for d in deltas), sum(d.T @ d for d in deltas)
    u, v = top(left, rank), top(right, rank)
    return scale * sum(u @ u.T @ d @ v @ v.T for d in deltas)


def average(deltas: list[Matrix], scale: float) -> Matrix:
    return scale * np.sum(deltas, axis=0)


task_arithmetic = damc = average


def linear(deltas: list[Matrix], alpha: float) -> Matrix:
    return alpha * np.mean(deltas, axis=0)


def triples(matrix: Matrix, k: int, largest: float | None = None) -> tuple[Matrix, Matrix, Matrix]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    k = min(k, int(np.sum(s > 1e-6 * (s[0] if largest is None else largest))))
    return u[:, :k], s[:k], vt[:k]


def polar(matrix: Matrix) -> Matrix:
    u, _, vt = triples(matrix, min(matrix.shape))
    return u @ vt


def tsv(deltas: list[Matrix], components: int | str, scale: float) -> Matrix:
    k = max(min(deltas[0].shape) // len(deltas), 1) if components == "auto" else components
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
        merged = ties(
            np.array([np.hstack([up.ravel(), down.ravel()]) for up, down in zip(ups, downs, strict=True)]), density
        )
        up, down = merged[: ups[0].size].reshape(ups[0].shape), merged[ups[0].size :].reshape(downs[0].shape)
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


def ties(vectors: Matrix, density: float) -> Matrix:
    merged = np.zeros(vectors.shape[1])
    kept = np.zeros_like(vectors)
    for row, vector in zip(kept, vectors, strict=True):
        least = np.sort(np.abs(vector))[max(len(vector) - int(len(vector) * density) - 1, 0)]
        row[np.abs(vector) >= least] = vector[np.abs(vector) >= least]
    signs = np.sign(kept.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    for entry, sign in enumerate(signs):
        voters = [v for v in kept[:, entry] if v * sign > 0]
        merged[entry] = np.mean(voters) if voters else 0
    return merged
