"""Memory for large tensors that is used again."""

import threading

import torch
from torch import Tensor

MIN_BUFFER_BYTES = 8 << 20  # of a tensor whose memory is used again


class Buffers:
    """Memory for large tensors that is used again: fresh pages cost more than the reads that fill them."""

    def __init__(self, *, keep: bool = True) -> None:
        """With `keep` False nothing is kept for later, so that no more is held than what is in use."""
        self.keep = keep
        self.free: list[Tensor] = []
        self.lock = threading.Lock()

    def take(self, n_bytes: int) -> Tensor | None:
        """A buffer (uint8) of at least `n_bytes`; None if a tensor is too small to gain by it."""
        if n_bytes < MIN_BUFFER_BYTES or not self.keep:
            return None
        with self.lock:
            fitting = [buffer for buffer in self.free if buffer.numel() >= n_bytes]
            taken = min(fitting, key=Tensor.numel) if fitting else max(self.free, key=Tensor.numel, default=None)
            self.free = [buffer for buffer in self.free if buffer is not taken]
        return taken if fitting else torch.empty(n_bytes, dtype=torch.uint8)

    def give(self, tensor: Tensor) -> None:
        """Take back the memory of a tensor that nobody uses any more."""
        buffer = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if buffer.numel() >= MIN_BUFFER_BYTES and self.keep:
            with self.lock:
                self.free.append(buffer)
