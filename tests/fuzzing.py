"""How much the fuzz targets (tests/test_fuzz_*.py) try: little in the suite, much by `benchmarks/fuzz.py`."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("MODALLOY_FUZZ_TIMES", "1"))  # factor of every target's number of examples


def examples(n: int) -> settings:
    """Settings of a fuzz target: `n` examples, the same ones in every run of the suite, others in a longer campaign."""
    return settings(
        max_examples=n * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
