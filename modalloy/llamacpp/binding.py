"""The few functions of llama.cpp's C API that routing needs, by ctypes; and the guard that its structures are laid out so.

The library is the one inside the package xllamacpp, of exactly the version that the structures below were written for, or
the one that $MODALLOY_LLAMA_CPP names. llama.cpp promises no stable layout: a field more shifts all that follow, and flags
land in others. So `load` lets the library fill both structures of parameters, and refuses it where their sizes or defaults
are not those of this layout; `decoder` then asks the library whether it took what it was given.
"""

import ctypes as c
import os
import platform
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, missing_package

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
LIBRARY = "MODALLOY_LLAMA_CPP"  # environment variable: a libllama of the user's own
ROOM = 256  # bytes after each structure, so that a longer one of another version harms nothing
PASSES_A_POINTER = ("x86_64", "amd64")  # machines on which a structure is returned through a pointer given first
ERROR = 4  # ggml's level of a line in the log

P, I32, U32, F32 = c.c_void_p, c.c_int32, c.c_uint32, c.c_float


class ModelParams(c.Structure):
    """llama_model_params."""

    _fields_ = (
        *((name, P) for name in ("devices", "tensor_buft_overrides")),
        *((name, I32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, P) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *(
            (name, c.c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")
        ),
        ("room", c.c_char * ROOM),
    )


class ContextParams(c.Structure):
    """llama_context_params."""

    _fields_ = (
        *((name, U32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, U32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, I32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling", "pooling", "attention")),
        ("flash_attn", I32),
        *(
            (name, F32)
            for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")
        ),
        ("yarn_orig_ctx", U32),
        ("defrag_thold", F32),
        *((name, P) for name in ("cb_eval", "cb_eval_data")),
        *((name, I32) for name in ("type_k", "type_v")),
        ("moe_cache_size", c.c_size_t),
        *((name, P) for name in ("abort", "abort_data")),
        *(
            (name, c.c_bool)
            for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
        ),
        ("samplers", P),
        ("n_samplers", c.c_size_t),
        ("ctx_other", P),
        ("room", c.c_char * ROOM),
    )


class Batch(c.Structure):
    """llama_batch: `token` (n,) or `embd` (n, width), and of each its position, sequences, and whether logits are wanted."""

    _fields_ = (("n_tokens", I32), *((name, P) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")))


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [P, P]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (P, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [P]),
    "llama_model_get_vocab": (P, [P]),
    "llama_model_n_embd_inp": (I32, [P]),
    "llama_adapter_lora_init": (P, [P, c.c_char_p]),
    "llama_init_from_model": (P, [P, ContextParams]),
    "llama_free": (None, [P]),
    **{f"llama_n_{name}": (U32, [P]) for name in ("ctx", "batch", "ubatch", "seq_max")},
    **{f"llama_n_{name}": (I32, [P]) for name in ("threads", "threads_batch")},
    "llama_set_adapters_lora": (I32, [P, P, c.c_size_t, P]),
    "llama_decode": (I32, [P, Batch]),
    "llama_get_logits_ith": (P, [P, I32]),
    "llama_get_memory": (P, [P]),
    "llama_memory_seq_rm": (c.c_bool, [P, I32, I32, I32]),
    "llama_vocab_n_tokens": (I32, [P]),
    "llama_tokenize": (I32, [P, c.c_char_p, I32, P, I32, c.c_bool, c.c_bool]),
}
# what llama.h gives by default, and how many bytes each structure has
SIZES = {"llama_model_default_params": 80, "llama_context_default_params": 168}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_default_params": {
        **{"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "kv_overrides": None},
        **{"vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False},
    },
    "llama_context_default_params": {
        **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0},
        **{"n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling": -1},
        **{"flash_attn": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_ext": -1.0, "yarn_slow": -1.0},
        **{"yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": None, "type_k": 1, "type_v": 1, "moe_cache_size": 0},
        **{"embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True},
        **{"kv_unified": False, "samplers": None},
    },
}
_SAID: list[str] = []  # the last errors in llama.cpp's log


def _listen(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        _SAID[:] = [*_SAID[-4:], text.decode(errors="replace").strip()]


_LISTENER = c.CFUNCTYPE(None, c.c_int, c.c_char_p, P)(_listen)


def said() -> str:
    """What llama.cpp's log gave last as the reason of a failure."""
    return _SAID[-1] if _SAID else "no reason is given"


@cache
def load() -> Any:
    """The library, with the types of its functions.

    Raises:
        MissingPackageError: it is not installed.
        CheckpointError: it cannot be loaded, or is of another version than this module is for.
    """
    path = _library()
    wrong = f"{path}: is not the llama.cpp that this version of modalloy is for ({{}}); {_remedy()}"
    try:
        library = c.CDLL(str(path))
    except OSError as error:
        raise CheckpointError(wrong.format(error)) from error
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise CheckpointError(wrong.format(f"it has no {name}"))
        function.restype, function.argtypes = result, arguments
    for name, wanted in DEFAULTS.items():
        size = _size(library, name)
        if size is not None and size != SIZES[name]:
            raise CheckpointError(wrong.format(f"{name} gives {size} bytes instead of {SIZES[name]}"))
        found = getattr(library, name)()
        for field, value in wanted.items():
            if getattr(found, field) != value:
                raise CheckpointError(wrong.format(f"{name} gives {field} = {getattr(found, field)}, not {value}"))
    library.llama_log_set(c.cast(_LISTENER, P), None)
    library.llama_backend_init()
    return library


def _library() -> Path:
    if given := os.environ.get(LIBRARY):
        return Path(given)
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        error = ModuleNotFoundError(f"no {PACKAGE}", name=PACKAGE)
        raise missing_package(error) or error
    if (installed := version(PACKAGE)) != VERSION:
        raise CheckpointError(
            f"{PACKAGE} {installed} is installed, and this version of modalloy is for {VERSION}; {_remedy()}"
        )
    found = next(Path(spec.origin).parent.glob(f"{PACKAGE}*.so"), None)
    if found is None:
        raise CheckpointError(
            f"{PACKAGE} has no library that can be called on this system; name a libllama in ${LIBRARY}"
        )
    return found


def _remedy() -> str:
    return f'run pip install "{PACKAGE}=={VERSION}", and unset ${LIBRARY}'


def _size(library: Any, name: str) -> int | None:
    """How many bytes of a structure a function writes, seen by what it leaves in two buffers that were filled otherwise."""
    if platform.machine().lower() not in PASSES_A_POINTER:
        return None
    fill, written = c.CFUNCTYPE(P, P)((name, library)), []
    for poison in (0xAA, 0x55):
        buffer = (c.c_ubyte * (2 * ROOM))(*([poison] * 2 * ROOM))
        fill(c.addressof(buffer))
        written.append(bytes(buffer))
    last = max(i for i, (one, other) in enumerate(zip(*written, strict=True)) if one == other)
    return (last // 8 + 1) * 8
