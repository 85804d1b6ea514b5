"""A decoder in llama.cpp: a base in GGUF, an adapter for each owner of tokens, and one cache for several sequences.

Tokens of one owner go through in a call of their own, before which the owner's adapter is set; the cache keeps what they
contributed. So every token uses the base and its owner's update, under one causal attention (SSAM section 3).
"""

import ctypes as c
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modalloy.errors import CheckpointError, OutOfMemoryError
from modalloy.llamacpp import binding
from modalloy.machine.cores import default_workers
from modalloy.machine.memory import room

BATCH, PIECE = 2048, 512  # tokens in one call, and in one pass of it
F32 = 0  # ggml's number of the type


class Decoder:
    """Decodes chunks of one owner's tokens each.

    Args:
        base: GGUF of the base.
        adapters: GGUF of each owner's LoRA; None: its tokens use the base alone. Owners may share a file.
        context: tokens that the cache holds, of all sequences together.
        sequences: how many there may be.
        exact: keys and values in float32, and no flash attention, which rounds otherwise.

    Raises:
        MissingPackageError, CheckpointError: of the binding (`binding.load`), or a file cannot be used.
        OutOfMemoryError: there is less memory than the base and the cache take.
    """

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path | None],
        *,
        context: int,
        sequences: int = 1,
        exact: bool = False,
    ) -> None:
        self.library = binding.load()
        self._model = self._context = None
        self.context, self.sequences = context, sequences
        self._check_memory(base, adapters)
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self.library.llama_model_load_from_file(str(base).encode(), params)
        if not self._model:
            raise CheckpointError(
                f"{base}: llama.cpp cannot load it ({binding.said()}); export again, or give another GGUF"
            )
        # before the context, whose graphs are sized by the adapters that there are
        loaded = {path: self._adapter(path) for path in dict.fromkeys(adapters.values()) if path is not None}
        self._adapters = {owner: None if path is None else loaded[path] for owner, path in adapters.items()}
        self._context = self._made(exact)
        self._memory = self.library.llama_get_memory(self._context)
        self.vocabulary = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self._model)))
        self.width = int(self.library.llama_model_n_embd_inp(self._model))
        self._owner: str | None = None  # whose adapter is set

    def close(self) -> None:
        """Free what llama.cpp holds."""
        if self._context:
            self.library.llama_free(self._context)
        if self._model:
            self.library.llama_model_free(self._model)
        self._model = self._context = None

    def __del__(self) -> None:
        if getattr(self, "library", None) is not None:
            self.close()

    def run(
        self, owner: str, inputs: Any, positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> np.ndarray:
        """Logits float32 (wanted tokens, vocabulary) after tokens of one owner.

        Args:
            inputs: token ids (n,), or embeddings float32 (n, width).
            positions, sequences: of each token (n,).
            wanted: for which tokens (n,) logits are given.

        Raises:
            OutOfMemoryError: the cache has no room for them.
        """
        self._use(owner)
        is_ids = np.ndim(inputs) == 1
        given = np.ascontiguousarray(inputs, np.int32 if is_ids else np.float32)
        rows = []
        for begin in range(0, len(given), BATCH):
            part = slice(begin, begin + BATCH)
            rows += self._decode(given[part], is_ids, positions[part], sequences[part], wanted[part])
        return np.stack(rows) if rows else np.empty((0, self.vocabulary), np.float32)

    def forget(self, sequence: int, begin: int = 0) -> None:
        """Take the tokens of a sequence from position `begin` on out of the cache."""
        self.library.llama_memory_seq_rm(self._memory, sequence, begin, -1)

    def _decode(
        self,
        given: np.ndarray,
        is_ids: bool,
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> list[np.ndarray]:
        count = len(given)
        places, own = np.array(positions, np.int32), np.array(sequences, np.int32)
        pointers = own.ctypes.data + own.itemsize * np.arange(count, dtype=np.uintp)
        flags, ones = np.array(wanted, np.int8), np.ones(count, np.int32)
        data = given.ctypes.data
        batch = binding.Batch(
            count,
            data if is_ids else None,
            None if is_ids else data,
            *(array.ctypes.data for array in (places, ones, pointers, flags)),
        )
        if (code := self.library.llama_decode(self._context, batch)) != 0:
            raise OutOfMemoryError(
                f"llama.cpp's cache of {self.context} tokens has no room for {count} more (code {code}); give a larger --context"
            )
        found = []
        for index in np.flatnonzero(flags):
            pointer = self.library.llama_get_logits_ith(self._context, int(index))
            found.append(np.ctypeslib.as_array(c.cast(pointer, c.POINTER(c.c_float)), (self.vocabulary,)).copy())
        return found

    def _use(self, owner: str) -> None:
        """Set the owner's adapter; llama.cpp builds its graphs again where it is another."""
        if owner == self._owner:
            return
        adapter = self._adapters[owner]
        adapters, scales = (c.c_void_p * 1)(adapter), (c.c_float * 1)(1.0)
        if self.library.llama_set_adapters_lora(self._context, adapters, int(adapter is not None), scales):
            raise CheckpointError(f"llama.cpp did not take the adapter of {owner} ({binding.said()}); export again")
        self._owner = owner

    def _adapter(self, path: Path) -> Any:
        adapter = self.library.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise CheckpointError(f"{path}: llama.cpp cannot load it for this base ({binding.said()}); export again")
        return adapter

    def _made(self, exact: bool) -> Any:
        params = self.library.llama_context_default_params()
        asked = {
            **{"n_ctx": self.context, "n_batch": min(BATCH, self.context), "n_ubatch": min(PIECE, self.context)},
            **{"n_seq_max": self.sequences, "n_threads": default_workers(), "n_threads_batch": default_workers()},
        }
        for field, value in asked.items():
            setattr(params, field, value)
        params.kv_unified = True
        if exact:
            params.type_k = params.type_v = F32
            params.flash_attn = 0
        found = self.library.llama_init_from_model(self._model, params)
        if not found:
            raise OutOfMemoryError(
                f"llama.cpp cannot make a cache of {self.context} tokens ({binding.said()}); give a smaller --context"
            )
        for field, value in asked.items():
            got = int(getattr(self.library, f"llama_{field}")(found))
            if got != value and not (field == "n_ctx" and got > value):  # which it may round up
                self.library.llama_free(found)
                raise CheckpointError(
                    f"llama.cpp made a context of {field} = {got} where {value} was asked: its structures are others than "
                    f"{binding.PACKAGE} {binding.VERSION} has; install that"
                )
        return found

    def _check_memory(self, base: Path, adapters: Mapping[str, Path | None]) -> None:
        files = [base, *dict.fromkeys(path for path in adapters.values() if path is not None)]
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; export again")
        needed, free = sum(path.stat().st_size for path in files), room()
        if free is not None and needed > free.n_bytes:
            raise OutOfMemoryError(
                f"{base}: it and its adapters take {needed / 1e9:.1f} GB, and {free.limit} leaves {free.n_bytes / 1e9:.1f} GB; "
                "export with --type q8_0, or give a smaller GGUF with --gguf"
            )
