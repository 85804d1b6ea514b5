"""What runs the jobs of a merge: `run(jobs, inputs, compute, …)` yields (job, done) in the jobs' order. One line an engine."""

from modalloy.engines import local

ENGINES = {"local": local.run}
NAMES = ("local", "ray")  # `ray.Cluster` is imported where it is asked for
