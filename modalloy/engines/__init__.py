"""Engines run independent jobs: one function each, `run(jobs, work, n_workers) -> iterator of (job, result)` in order."""
