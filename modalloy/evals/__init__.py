"""Evaluation: benchmarks, one file each; a runner with a log; tables and comparisons that are made from the log only."""

from modalloy.errors import ModalloyError, nearest
from modalloy.evals import avqa, mcub, mmau, mmlu, music_avqa, ocrbench, senses
from modalloy.evals.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        music_avqa.BENCHMARK,
        avqa.BENCHMARK,
        mcub.MCUB3,
        mcub.MCUB4,
        mmlu.BENCHMARK,
        mmlu.GENERATIVE,
        ocrbench.BENCHMARK,
        ocrbench.LLAVA,
        mmau.BENCHMARK,
        senses.BENCHMARK,
        senses.GENERATED,
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name."""
    if name not in BENCHMARKS:
        raise ModalloyError(f"no task '{name}'; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
