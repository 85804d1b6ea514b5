"""A base whose linears hold 8 or 4 bits a number, by torchao; updates and all else stay as they are.

Only the weights are quantised (W8A16 and W4A16): int8 with one scale for each output, int4 with a scale and a zero for each
GROUP inputs. transformers quantises each weight as it is read (its `TorchAoConfig`), so that no more than one is ever held
whole. On a CPU, torchao itself makes each int8 weight whole again for every product; torch's own kernels, which read the
codes, take their place here. These take bfloat16, so there the input and the output of a product with codes are rounded to it.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from modalloy.errors import CheckpointError, OutputError, RecipeError, missing_package, nearest
from modalloy.model.config import ModalloyConfig
from modalloy.model.decoder import build_decoder
from modalloy.model.routing import RoutedLinear, Routes, is_quantised, route_linears

KINDS = ("int8", "int4")
GROUP = 32  # inputs that share a scale and a zero in int4; every kernel has it, and every usual width is a multiple
OUTPUTS = 16  # of which the int4 kernels make whole blocks
UNTOUCHED = ("encoders", "projectors", "senses", "prefix_tokens", "suffix_tokens")


def quantisation(kind: str, device: str, dtype: torch.dtype | str) -> Any:
    """The `quantization_config` for transformers that quantises to "int8" or "int4" on a device, "cpu" or "cuda".

    Raises:
        RecipeError: there is no such kind, or the device has no kernel for it.
        MissingPackageError: torchao is not installed.
    """
    if kind not in KINDS:
        raise RecipeError(f"quantize {kind}: no such kind; {nearest(kind, KINDS)}")
    if device not in ("cpu", "cuda"):
        raise RecipeError(
            f"quantize {kind}: weights are laid out for one device; give device cpu or cuda, not {device}"
        )
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from error
    from transformers import TorchAoConfig

    if kind == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if device == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))
    if dtype != torch.bfloat16:
        raise RecipeError(f"quantize {kind}: its kernels on a GPU take bfloat16 only; give dtype bfloat16 as well")
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))


def only_the_base(given: Any, config: ModalloyConfig, where: Any) -> Any:
    """transformers' `quantization_config`, so that it leaves all but the linears of the decoder's blocks as they are.

    Raises:
        RecipeError: it would replace the linears, and with them their updates; or the model has dense weights of text.
        CheckpointError: the config says that the model is quantised already, or a linear's shape cannot be.
    """
    if hasattr(config, "quantization_config"):
        raise CheckpointError(
            f"{where}: its config.json says that it is quantised (quantization_config), which no model is that modalloy wrote; "
            "remove the entry if its weights are plain numbers"
        )
    from transformers import TorchAoConfig

    if not isinstance(given, TorchAoConfig):
        raise RecipeError(
            f"quantization_config: {type(given).__name__} would replace the routed linears, whose updates were lost; "
            "give transformers' TorchAoConfig"
        )
    if given.include_input_output_embeddings:
        raise RecipeError(
            "quantization_config: embeddings are not quantised; leave out include_input_output_embeddings"
        )
    if set(config.text_linears) - set(config.replaced):
        raise RecipeError(
            "quantize: text uses dense weights of its own here, whose small distance from the base's would drown in the "
            "rounding of both; load the model without it"
        )
    with torch.device("meta"):
        decoder = build_decoder(config.text_config)
        linears = route_linears(decoder, Routes())
    group = int(getattr(given.quant_type, "group_size", None) or 1)
    for name, linear in linears.items():
        if group > 1 and (linear.in_features % group or linear.out_features % OUTPUTS):
            raise CheckpointError(
                f"{name}: {linear.out_features} × {linear.in_features} cannot be held in int4, which takes multiples of "
                f"{OUTPUTS} × {group}; use int8"
            )
    others = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    kept = [f"decoder.{name}" for name in others if f"{name}.weight" not in linears]
    given.modules_to_not_convert = [*(given.modules_to_not_convert or ()), *UNTOUCHED, *kept]
    return given


def settle(linears: dict[str, RoutedLinear]) -> None:
    """Bring what torchao made of the weights to the type that the kernels of this device take."""
    for linear in linears.values():
        if is_quantised(linear.weight) and _is_int4_of_cpu(linear.weight):
            linear.weight = nn.Parameter(_with_scales(linear.weight, torch.bfloat16), requires_grad=False)


def check_writable(where: Any, linears: dict[str, RoutedLinear]) -> None:
    """Refuse to write a model that is quantised: what is written has the base's own weights.

    Raises:
        OutputError: it is.
    """
    if any(is_quantised(linear.weight) for linear in linears.values()):
        raise OutputError(
            f"{where}: a quantised model is not written; load it without quantize, write that, and quantise what you load"
        )


def report(linears: dict[str, RoutedLinear]) -> None:
    """Say on stderr what became smaller, and what did not."""
    done = [one.weight for one in linears.values() if is_quantised(one.weight)]
    before, after = sum(one.numel() for one in done) * 2, sum(map(stored_bytes, done))
    print(
        f"quantize {len(done)} of {len(linears)} linears of the decoder's blocks: {after / 1e6:.0f} MB "
        f"(in 16 bits {before / 1e6:.0f} MB); all else is as it was",
        file=sys.stderr,
    )


def parts(tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that a quantised one holds, by their attributes."""
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}  # type: ignore[attr-defined]


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor takes in memory, quantised or not."""
    return sum(one.nbytes for one in parts(tensor).values()) if is_quantised(tensor) else tensor.nbytes


def _is_int4_of_cpu(weight: Tensor) -> bool:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    return isinstance(weight, Int4OpaqueTensor)


def _with_scales(weight: Any, dtype: torch.dtype) -> Any:
    return type(weight)(weight.qdata, weight.scale_and_zero.to(dtype), weight.block_size, weight.shape)
