"""Qwen2 and Qwen2.5: Llama's names, with biases of queries, keys and values."""

from modalloy.families.rules import Family, decoder

RULES = decoder(bias=("q", "k", "v"))

QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), RULES)
