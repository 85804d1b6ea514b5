"""What does routing cost at inference? Prefill of 3,217 mixed tokens and a decode step, against the plain decoder, in one run.

    python benchmarks/runtime.py [--quick] [--builtin-only]

- plain: transformers' decoder with the same base weights and no updates, on as many tokens
- routed: the merged model as it loads, an update for each owner's own tokens, the base apart
- folded: the text update folded into the base weights
- published: ModelCompose's way, every adapter (each modality's own and its text adapter, weighted) on every token, then masks

The tokens are those of one image, sound, video and point cloud in ModelCompose (586 + 42 + 2066 + 523 = 3,217, media spans
between stretches of text; the text is 48 of the image's). Two decoder layers of Vicuna-7B's width with rank-128 updates and random
weights in float32, then the built-in decoder with the built-in specialists' ranks. The variants alternate; figures are medians
over the rounds, ratios medians of each round's ratio to plain. Memory is what a call adds to the resident size at its peak.
Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import machine, measured, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from modalloy import LowRank, builtin
from modalloy.model import ModalloyConfig, ModalloyForConditionalGeneration
from modalloy.model.routing import TEXT, RoutedLinear

MODALITIES = {"image": 586, "audio": 42, "video": 2066, "point": 523}
TEXT_TOKENS = 48  # of all, in five stretches
WIDE = LlamaConfig(  # Vicuna-7B's layers; a small vocabulary, so that the output head does not blur the comparison
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=256
)
AIMS = {"prefill": {"routed": 1.25}, "decode": {"routed": 1.10, "folded": 1.02}}


class EveryAdapter(nn.Module):
    """A linear that computes every adapter on every token and masks the results, as ModelCompose's does."""

    def __init__(self, base: RoutedLinear, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.base, self.masks = base, masks
        self.adapters = [(owner, base.update(owner)) for owner in MODALITIES]
        self.adapters += [(TEXT, base.update(TEXT)) for _ in MODALITIES]  # not merged: one of each specialist

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.base.weight)
        for owner, update in self.adapters:
            delta = (x @ update.down.T) @ update.up.T
            out = out + (delta if x.shape[1] == 1 and owner == TEXT else delta * self.masks[owner][:, : x.shape[1]])
        return out


def owners() -> Tensor:
    """Owner of each of the 3,217 positions (1, tokens): text, then a medium and text, four times."""
    order = ("text", *sorted(MODALITIES))
    rows = [0] * (TEXT_TOKENS // 4)
    for modality, count in MODALITIES.items():
        rows += [order.index(modality)] * (count - TEXT_TOKENS * (modality == "image"))
        rows += [0] * (TEXT_TOKENS - TEXT_TOKENS // 4 if modality == "point" else 0)
    return torch.tensor([rows])


def routed_model(config: Any, rank: int) -> ModalloyForConditionalGeneration:
    """A random merged model of that decoder, with an update for text and each modality; encoders are not part of it."""
    update = {"rank": rank, "scale": 2.0, "linears": None}
    model = ModalloyForConditionalGeneration(ModalloyConfig(config, {}, update)).eval()
    generator = torch.Generator().manual_seed(0)
    for linear in model.linears.values():
        for owner in (TEXT, *MODALITIES):
            up = torch.randn(linear.out_features, rank, generator=generator) * 1e-3
            linear.add(owner, LowRank(up, torch.randn(rank, linear.in_features, generator=generator)), scale=2.0)
    return model


def plain_model(model: ModalloyForConditionalGeneration) -> Any:
    """The decoder alone, on the same weights (which take no memory twice)."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config.text_config)
    for name, _ in list(plain.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, model.decoder.get_parameter(name))
    plain.model.rotary_emb = model.decoder.model.rotary_emb
    plain.tie_weights()
    assert not any(parameter.is_meta for parameter in plain.parameters())
    return plain.eval()


def published_model(model: ModalloyForConditionalGeneration, rows: Tensor) -> Any:
    """The decoder with every adapter on every token."""
    plain = plain_model(model)
    order = ("text", *sorted(MODALITIES))
    masks = {name: (rows == index).unsqueeze(-1).float() for index, name in enumerate(order)}
    for slot, linear in model.linears.items():
        parent, _, leaf = slot.removesuffix(".weight").rpartition(".")
        setattr(plain.get_submodule(parent), leaf, EveryAdapter(linear, masks))
    return plain


@torch.no_grad()
def compare(name: str, config: Any, rank: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Rows of (phase, variant): seconds, ratio to plain, memory added."""
    rows, names = owners(), ("text", *sorted(MODALITIES))
    model = routed_model(config, rank)
    folded = routed_model(config, rank)
    folded.fold()
    plain, published = plain_model(model), published_model(model, rows)
    embeds = torch.randn(1, rows.shape[1], config.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.02
    step = embeds[:, :1]

    def routed(which: ModalloyForConditionalGeneration) -> Callable[..., Any]:
        def call(embeds: Tensor, **kwargs: Any) -> Any:
            with which.routes.use(rows if embeds.shape[1] > 1 else None, names):
                return which.decoder(inputs_embeds=embeds, **kwargs)

        return call

    variants: dict[str, Callable[..., Any]] = {
        "plain": lambda embeds, **kwargs: plain(inputs_embeds=embeds, **kwargs),
        "routed": routed(model),
        "folded": routed(folded),
        "published": lambda embeds, **kwargs: published(inputs_embeds=embeds, **kwargs),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    caches: dict[str, DynamicCache] = {}
    for _ in range(rounds):
        for variant, call in variants.items():
            cost, output = measured(lambda call=call: call(embeds, use_cache=True, logits_to_keep=1))  # type: ignore[misc]
            found.setdefault(("prefill", variant), []).append(cost)
            caches[variant] = output.past_key_values
            del output
    for _ in range(steps):
        for variant, call in variants.items():
            cache = caches[variant]
            call(step, past_key_values=cache, use_cache=True)  # so that the step before was its own, as in an answer
            cache.crop(-1)
            cost, _ = measured(lambda call=call, cache=cache: call(step, past_key_values=cache, use_cache=True))  # type: ignore[misc]
            cache.crop(-1)
            found.setdefault(("decode", variant), []).append(cost)
    result = []
    for (phase, variant), costs in found.items():
        ratios = [cost["seconds"] / base["seconds"] for cost, base in zip(costs, found[phase, "plain"], strict=True)]
        result.append(
            {
                "decoder": name,
                "phase": phase,
                "variant": variant,
                "seconds": statistics.median(cost["seconds"] for cost in costs),
                "ratio": statistics.median(ratios),
                "added_mb": max(cost["added_mb"] for cost in costs),
                "aim": AIMS[phase].get(variant),
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--builtin-only", action="store_true", help="leave out the layers of 7B width")
    args = parser.parse_args()
    rounds = 1 if args.quick else 5
    results = []
    if not args.builtin_only:
        results += compare("2 layers of 7B width, rank 128", WIDE, 128, rounds, 8 * rounds)
    config = AutoModelForCausalLM.from_pretrained(builtin.base()).config
    results += compare("built-in decoder (135M), rank 8", config, 8, rounds, 8 * rounds)
    cells = [
        [
            r["decoder"],
            r["phase"],
            r["variant"],
            f"{r['seconds']:.3f}",
            f"{r['ratio']:.2f}" + (f" (aim {r['aim']})" if r["aim"] else ""),
            f"{r['added_mb']:.0f}",
        ]
        for r in results
    ]
    print(table(["decoder", "phase", "variant", "seconds", "ratio to plain", "MB added"], cells))
    print(json.dumps({"tokens": owners().shape[1], "results": results, **machine()}))


if __name__ == "__main__":
    main()
