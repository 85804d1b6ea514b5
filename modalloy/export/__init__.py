"""Merged models in the forms of other runtimes: one target, one file."""

TARGETS = ("llama.cpp", "transformers", "vllm")
