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
