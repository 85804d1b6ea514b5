"""llama.cpp's own encoding of pictures (its library mtmd) by ctypes: what llama-server does with an mmproj."""

import ctypes as c
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from modalloy.llamacpp import binding

P = c.c_void_p
TEXT, IMAGE = 0, 1  # kinds of a chunk
SIZE = 96  # bytes of the parameters, in the pinned version


class Params(c.Structure):
    """mtmd_context_params."""

    _fields_ = (
        *(("use_gpu", c.c_bool), ("device", P), ("print_timings", c.c_bool), ("n_threads", c.c_int)),
        *(("image_marker", c.c_char_p), ("media_marker", c.c_char_p), ("flash_attn", c.c_int), ("warmup", c.c_bool)),
        *(("min_tokens", c.c_int), ("max_tokens", c.c_int), ("eval", P), ("eval_data", P), ("batch_tokens", c.c_int)),
        *(("progress", P), ("progress_data", P)),
    )


class Text(c.Structure):
    """mtmd_input_text."""

    _fields_ = (("text", c.c_char_p), ("length", c.c_size_t), ("add_special", c.c_bool), ("parse_special", c.c_bool))


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (Params, []),
    "mtmd_log_set": (None, [P, P]),
    "mtmd_init_from_file": (P, [c.c_char_p, P, Params]),
    "mtmd_free": (None, [P]),
    "mtmd_bitmap_init": (P, [c.c_uint32, c.c_uint32, P]),
    "mtmd_bitmap_free": (None, [P]),
    "mtmd_input_chunks_init": (P, []),
    "mtmd_input_chunks_free": (None, [P]),
    "mtmd_input_chunks_size": (c.c_size_t, [P]),
    "mtmd_input_chunks_get": (P, [P, c.c_size_t]),
    "mtmd_tokenize": (c.c_int32, [P, P, P, P, c.c_size_t]),
    "mtmd_input_chunk_get_type": (c.c_int, [P]),
    "mtmd_input_chunk_get_n_tokens": (c.c_size_t, [P]),
    "mtmd_input_chunk_get_tokens_text": (c.POINTER(c.c_int32), [P, P]),
    "mtmd_encode_chunk": (c.c_int32, [P, P]),
    "mtmd_get_output_embd": (c.POINTER(c.c_float), [P]),
}
_QUIET = c.CFUNCTYPE(None, c.c_int, c.c_char_p, P)(lambda *_: None)


@cache
def library() -> Any:
    found = binding.load()
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.mtmd_log_set(c.cast(_QUIET, P), None)
    params = found.mtmd_context_params_default()
    assert c.sizeof(Params) == SIZE and params.media_marker == b"<__media__>" and params.flash_attn == -1
    assert (params.n_threads, params.warmup, params.min_tokens, params.batch_tokens) == (4, True, -1, 1024)
    return found


def chunks(mmproj: Path, model: Any, text: str, picture: np.ndarray, width: int) -> list[np.ndarray]:
    """A prompt in which `<__media__>` stands for a picture (height, width, 3): ids (n,), embeddings (n, width), ids (n,)."""
    lib = library()
    params = lib.mtmd_context_params_default()
    params.use_gpu, params.warmup, params.flash_attn, params.n_threads = False, False, 0, 1
    context = lib.mtmd_init_from_file(str(mmproj).encode(), model, params)
    assert context, binding.said()
    pixels, data = np.ascontiguousarray(picture), text.encode()
    bitmap = lib.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], pixels.ctypes.data)
    made = lib.mtmd_input_chunks_init()
    given = Text(data, len(data), False, True)
    try:
        assert lib.mtmd_tokenize(context, made, c.byref(given), (P * 1)(bitmap), 1) == 0
        return [
            _chunk(lib, context, lib.mtmd_input_chunks_get(made, index), width)
            for index in range(lib.mtmd_input_chunks_size(made))
        ]
    finally:
        lib.mtmd_input_chunks_free(made)
        lib.mtmd_bitmap_free(bitmap)
        lib.mtmd_free(context)


def _chunk(lib: Any, context: Any, chunk: Any, width: int) -> np.ndarray:
    count = lib.mtmd_input_chunk_get_n_tokens(chunk)
    if lib.mtmd_input_chunk_get_type(chunk) == TEXT:
        length = c.c_size_t()
        ids = lib.mtmd_input_chunk_get_tokens_text(chunk, c.byref(length))
        return np.ctypeslib.as_array(ids, (length.value,)).copy()
    assert lib.mtmd_encode_chunk(context, chunk) == 0
    return np.ctypeslib.as_array(lib.mtmd_get_output_embd(context), (count, width)).copy()
