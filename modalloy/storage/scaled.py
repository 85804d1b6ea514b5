"""Weights of 8-bit floating-point codes and their scales, read as the numbers that they stand for: code · scale.

Block-scaled as DeepSeek's and Qwen3's FP8 checkpoints (`weight_scale_inv`, blocks of the config's `weight_block_size`), by
row or by tensor as compressed-tensors' (`weight_scale`). A product of a code and a float32 scale is one rounding in float32.
Experts that are one tensor (experts, ·, ·) have as many such matrices. `requantised` goes back: the scale of a block is its
largest magnitude over the largest code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    """A matrix of codes times its scales, or one for each expert, as float32.

    `block`: rows and columns that share a scale. `of_two`: scales are powers of two.
    """

    codes: TensorRef | None = None
    scales: TensorRef | None = None
    block: tuple[int, int] = (1, 1)
    of_two: bool = False

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        return dequantised(self, read)

    def one(self, index: int) -> "ScaledRef":
        """One of the matrices of three dimensions."""
        assert self.codes is not None and self.scales is not None
        return replace(self, shape=self.shape[1:], codes=self.codes.one(index), scales=self.scales.one(index))


def is_scaled(refs: Mapping[str, TensorRef]) -> bool:
    """Whether any of a model's weights is such a product."""
    return any(isinstance(ref, ScaledRef) for ref in refs.values())


def with_scales(refs: Mapping[str, TensorRef], scheme: Any) -> dict[str, TensorRef]:
    """The tensors with codes and their scales as one; codes without a scale stay as they are, and are no weights.

    `scheme` is the config's `quantization_config`.

    Raises:
        CheckpointError: the scales do not fit their codes.
    """
    found, taken = dict(refs), set()
    for name, ref in refs.items():
        if ref.dtype not in CODES or len(ref.shape) not in (2, 3):
            continue
        named = [name + end for end in SCALES if name + end in refs]
        if len(named) != 1:
            continue
        scales = refs[named[0]]
        block = _block(ref, scales, scheme)
        of_two = isinstance(scheme, Mapping) and scheme.get("scale_fmt") == "ue8m0"
        found[name] = ScaledRef(name, torch.float32, ref.shape, ref.file, -1, ref, scales, block, of_two)
        taken.add(named[0])
    if taken:
        found = {name: ref for name, ref in found.items() if name not in taken and not name.endswith(OF_ACTIVATIONS)}
    return found


def _block(codes: TensorRef, scales: TensorRef, scheme: Any) -> tuple[int, int]:
    """How many rows and columns of the codes share a scale."""
    *experts, rows, columns = codes.shape
    of_one = scales.shape
    if experts:  # as many sets of scales
        of_one = scales.shape[1:] if scales.shape[:1] == tuple(experts) else (-1,)
    if of_one == () or set(of_one) == {1}:
        return rows, columns
    if of_one in ((rows,), (rows, 1)):
        return 1, columns
    given = scheme.get("weight_block_size") if isinstance(scheme, Mapping) else None
    if (
        isinstance(given, list)
        and len(given) == 2
        and all(type(one) is int and one > 0 for one in given)
        and of_one == (-(-rows // given[0]), -(-columns // given[1]))
    ):
        return given[0], given[1]
    raise CheckpointError(
        f"{scales.file}: {scales.name} is {scales.shape}, which are no scales of {' × '.join(map(str, codes.shape))} codes "
        f"(blocks of {shown(given)}); download the model again"
    )


def dequantised(ref: ScaledRef, read: Callable[[TensorRef], Tensor]) -> Tensor:
    """The numbers, float32."""
    assert ref.codes is not None and ref.scales is not None
    numbers, scales = read(ref.codes).to(torch.float32), read(ref.scales).to(torch.float32)
    if len(ref.shape) == 2:
        return _multiplied(numbers, scales, ref.block)
    for index, matrix in enumerate(numbers):
        _multiplied(matrix, scales[index], ref.block)
    return numbers


def _multiplied(numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """A matrix times its scales, in its own memory."""
    (rows, columns), (high, wide) = numbers.shape, block
    scales = scales.reshape(-(-rows // high), -(-columns // wide))
    for index, line in enumerate(scales):  # a stretch of rows at a time, so that no scale is held for every entry
        part = numbers[index * high : (index + 1) * high]
        part.mul_(line.repeat_interleave(wide)[:columns])
    return numbers


def scales_of(numbers: Tensor, ref: ScaledRef) -> Tensor:
    """The scale of each block of a matrix, stored as `ref` stores its own: the largest magnitude over the largest code."""
    assert ref.codes is not None and ref.scales is not None
    (rows, columns), (high, wide) = numbers.shape, ref.block
    largest = torch.empty(-(-rows // high), -(-columns // wide), dtype=numbers.dtype)
    for index, line in enumerate(largest):
        heights = numbers[index * high : (index + 1) * high].abs().amax(0)
        line.copy_(torch.nn.functional.pad(heights, (0, -columns % wide)).view(-1, wide).amax(1))
    scales = largest / torch.finfo(ref.codes.dtype).max
    scales[scales == 0] = 1.0  # of a block of zeros
    scales = torch.exp2(scales.log2().ceil()) if ref.of_two else scales
    return scales.to(ref.scales.dtype).reshape(ref.scales.shape)


def codes_of(numbers: Tensor, scales: Tensor, ref: ScaledRef) -> Tensor:
    """The code nearest to each entry of a matrix over its scale."""
    assert ref.codes is not None
    (rows, columns), (high, wide) = numbers.shape, ref.block
    wide_scales = scales.to(numbers.dtype).reshape(-(-rows // high), -(-columns // wide))
    codes, most = torch.empty(numbers.shape, dtype=ref.codes.dtype), torch.finfo(ref.codes.dtype).max
    for index, line in enumerate(wide_scales):
        part = slice(index * high, (index + 1) * high)
        codes[part] = (numbers[part] / line.repeat_interleave(wide)[:columns]).clamp_(-most, most).to(codes.dtype)
    return codes


def requantised(numbers: Tensor, ref: ScaledRef) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, in the scheme in which `ref` is stored."""
    scales = scales_of(numbers, ref)
    return codes_of(numbers, scales, ref), scales


def numbers_of(codes: Tensor, scales: Tensor, ref: ScaledRef) -> Tensor:
    """What codes and scales of a weight stand for, float32."""
    pair = {ref.codes: codes, ref.scales: scales}
    return dequantised(ref, pair.__getitem__)
