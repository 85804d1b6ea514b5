"""Weights of 8-bit floating-point codes and their scales, read as the numbers that they stand for: code · scale.

Block-scaled as DeepSeek's and Qwen3's FP8 checkpoints (`weight_scale_inv`, blocks of the config's `weight_block_size`), by
row or by tensor as compressed-tensors' (`weight_scale`). A product of a code and a float32 scale is one rounding in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modalloy.errors import CheckpointError, shown
from modalloy.storage.tensors import ComposedRef, TensorRef

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")  # after the weight's name
OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".input_scale_ub")


@dataclass(frozen=True)
class ScaledRef(ComposedRef):
    """A matrix of codes times its scales, as float32. `block`: rows and columns that share a scale."""

    codes: TensorRef | None = None
    scales: TensorRef | None = None
    block: tuple[int, int] = (1, 1)

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        return dequantised(self, read)


def is_scaled(refs: Mapping[str, TensorRef]) -> bool:
    """Whether any of a model's weights is such a product."""
    return any(isinstance(ref, ScaledRef) for ref in refs.values())


def joined(refs: Mapping[str, TensorRef], scheme: Any) -> dict[str, TensorRef]:
    """The tensors with codes and their scales as one; codes without a scale stay as they are, and are no weights.

    `scheme` is the config's `quantization_config`.

    Raises:
        CheckpointError: the scales do not fit their codes.
    """
    found, taken = dict(refs), set()
    for name, ref in refs.items():
        if ref.dtype not in CODES or len(ref.shape) != 2:
            continue
        named = [name + end for end in SCALES if name + end in refs]
        if len(named) != 1:
            continue
        scales = refs[named[0]]
        block = _block(ref, scales, scheme)
        found[name] = ScaledRef(name, torch.float32, ref.shape, ref.file, -1, ref, scales, block)
        taken.add(named[0])
    if taken:
        found = {name: ref for name, ref in found.items() if name not in taken and not name.endswith(OF_ACTIVATIONS)}
    return found


def _block(codes: TensorRef, scales: TensorRef, scheme: Any) -> tuple[int, int]:
    """How many rows and columns of the codes share a scale."""
    rows, columns = codes.shape
    count = 1
    for size in scales.shape:
        count *= size
    if count == 1:
        return rows, columns
    if scales.shape in ((rows,), (rows, 1)):
        return 1, columns
    given = scheme.get("weight_block_size") if isinstance(scheme, Mapping) else None
    if (
        isinstance(given, list)
        and len(given) == 2
        and all(type(one) is int and one > 0 for one in given)
        and scales.shape == (-(-rows // given[0]), -(-columns // given[1]))
    ):
        return given[0], given[1]
    raise CheckpointError(
        f"{scales.file}: {scales.name} is {scales.shape}, which are no scales of {codes.shape[0]} × {columns} codes (blocks of "
        f"{shown(given)}); download the model again"
    )


def dequantised(ref: ScaledRef, read: Callable[[TensorRef], Tensor]) -> Tensor:
    """The numbers (rows, columns), float32."""
    assert ref.codes is not None and ref.scales is not None
    rows, columns = ref.shape
    numbers = read(ref.codes).to(torch.float32)
    scales = read(ref.scales).to(torch.float32)
    if scales.numel() == 1:
        return numbers.mul_(scales.reshape(()))
    high, wide = ref.block
    scales = scales.reshape(-(-rows // high), -(-columns // wide))
    for index, line in enumerate(scales):  # a stretch of rows at a time, so that no scale is held for every entry
        part = numbers[index * high : (index + 1) * high]
        part.mul_(line.repeat_interleave(wide)[:columns])
    return numbers
