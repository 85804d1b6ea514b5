"""Every method again in plain float64 NumPy, written from the papers and sharing no code with the package."""

import hashlib
import json

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
    rows = []
    for tile, start in enumerate(range(0, shape[0], 128)):
        n = min(128, shape[0] - start) * shape[1]
        key = hashlib.sha256(json.dumps([seed, model, slot, tile]).encode()).digest()
        stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        numbers = [half for word in stream.random_raw((n + 1) // 2).tolist() for half in (word % 2**32, word >> 32)]
        rows.append(np.array(numbers[:n], dtype=np.float64).reshape(-1, shape[1]) < density * 2**32)
    return np.concatenate(rows) if rows else np.zeros(shape, dtype=bool)


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
