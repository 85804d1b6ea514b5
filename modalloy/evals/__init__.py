"""Evaluation: benchmarks, one file each; a runner with a log; tables and comparisons that are made from the log only."""

from modalloy.errors import ModalloyError, nearest
from modalloy.evals import mmau, mmlu, ocrbench, senses
from modalloy.evals.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    found.name: found
    for found in (
        senses.BENCHMARK,
        senses.GENERATED,
        mmlu.BENCHMARK,
        mmlu.GENERATIVE,
        ocrbench.BENCHMARK,
        ocrbench.LLAVA,
        mmau.BENCHMARK,
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name."""
    if name not in BENCHMARKS:
        raise ModalloyError(f"no task '{name}'; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
