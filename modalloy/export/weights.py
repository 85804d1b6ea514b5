"""A decoder and its updates as GGUF, one tensor in memory at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modalloy.errors import CheckpointError, nearest, shown
from modalloy.model.load import Stored
from modalloy.model.opening import reason

TYPES = ("f16", "q8_0", "f32")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type: llama.cpp's
PAIRED = ("llama",)  # whose rows of queries and keys llama.cpp keeps as pairs, where transformers has halves
BLOCK = 32  # numbers of a row that share a scale in q8_0
SAME_VECTOR = 0.01  # of a norm's or bias's largest number: what bfloat16 or float16 rounds is less
SAME_WEIGHT = 0.9  # cosine with a weight that was quantised, to 2 bits or more
COMPARED = ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")  # of a GGUF of the user, besides vectors
ROWS = 64  # of these
Piece = tuple[
    str, tuple[int, ...], str, Callable[[], np.ndarray]
]  # a tensor's name, shape and type, and how it is read


@dataclass(frozen=True)
class Geometry:
    """What llama.cpp must know of a decoder, by its config in transformers.

    Raises:
        CheckpointError: the config has what llama.cpp's graph of this architecture has not.
    """

    config: Any

    def __post_init__(self) -> None:
        config = self.config
        if config.model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"a {config.model_type} decoder: routing in llama.cpp is known for {', '.join(ARCHITECTURES)}; "
                "export it --to transformers"
            )
        act, partial = config.hidden_act, self.rope.get("partial_rotary_factor") or 1.0
        if act != "silu" or partial != 1.0 or self.rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
            raise CheckpointError(
                f"a {config.model_type} decoder with hidden_act {act}, rope_type {self.rope['rope_type']} and "
                f"partial_rotary_factor {partial}: llama.cpp's {self.architecture} has none such; export it --to transformers"
            )

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return ARCHITECTURES[self.config.model_type]

    @property
    def rope(self) -> dict[str, Any]:
        """Parameters of the rotary embedding."""
        return {"rope_type": "default"} | dict(self.config.rope_parameters or {})

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def context(self) -> int:
        """Tokens within which all layers attend to all that came before."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        slides = window is not None and (kinds is None or "sliding_attention" in kinds)
        return min(self.config.max_position_embeddings, window) if slides else int(self.config.max_position_embeddings)

    def rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """A weight's, bias's or update's rows (out, …) in llama.cpp's order: of queries and keys in pairs, where it wants that."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = next((n for part, n in heads.items() if f".{part}." in name), None)
        if count is None or self.architecture not in PAIRED:
            return values
        halves = values.reshape(count, 2, len(values) // count // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

    def stored(self, name: str) -> str:
        """llama.cpp's name of a decoder's tensor.

        Raises:
            CheckpointError: it has no place for it.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(
                f"{name}: llama.cpp's {self.architecture} has no such tensor; export it --to transformers"
            )
        return str(found)

    @cached_property
    def _names(self) -> Any:
        import gguf

        kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(kinds[self.architecture], self.config.num_hidden_layers)

    def describe(self, writer: Any) -> None:
        """Write the keys of the architecture."""
        import gguf

        config, rope = self.config, self.rope
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            kind = gguf.RopeScalingType.LINEAR if rope["rope_type"] == "linear" else gguf.RopeScalingType.YARN
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)

    def frequencies(self) -> np.ndarray | None:
        """What Llama 3 divides each frequency by, float32 (head_dim / 2,); None of other rotary embeddings."""
        rope = self.rope
        if rope["rope_type"] != "llama3":
            return None
        frequency = rope["rope_theta"] ** -(np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def write_base(
    path: Path, geometry: Geometry, weights: Mapping[str, Stored], kind: str, add_tokenizer: Callable[[Any], None]
) -> None:
    """Write the decoder; `weights` by transformers' names. Vectors stay float32."""
    import gguf

    writer = _writer(path, geometry)
    writer.add_type(gguf.GGUFType.MODEL)
    geometry.describe(writer)
    files = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(files[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer)

    def tensors() -> Iterator[Piece]:
        if (found := geometry.frequencies()) is not None:
            yield "rope_freqs.weight", found.shape, "f32", lambda: found
        for name, one in weights.items():
            shape = one.shape
            yield geometry.stored(name), shape, "f32" if len(shape) == 1 else kind, _read(geometry, name, one)

    write_pieces(writer, list(tensors()))


def write_adapter(path: Path, geometry: Geometry, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Write one owner's update: by the weight's name, up (out, rank) and down (rank, in), of which scale · up @ down is added."""
    import gguf

    writer = _writer(path, geometry)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = next(iter(factors.values()))[0].shape[1]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp multiplies by alpha / rank
    tensors: list[Piece] = []
    for name, (up, down) in factors.items():
        stem = geometry.stored(name)
        rows = geometry.rows(name, (up.float() * scale).numpy())
        for side, values in (("a", down.float().numpy()), ("b", rows)):
            array = np.ascontiguousarray(values)
            tensors.append((f"{stem}.lora_{side}", array.shape, "f32", lambda array=array: array))  # type: ignore[misc]
    write_pieces(writer, tensors)


def check_base(path: Path, geometry: Geometry, weights: Mapping[str, Stored]) -> None:
    """Refuse a GGUF that is not that of the decoder: its sizes, all its norms, and parts of two weights are compared.

    Raises:
        CheckpointError: it is another's, or damaged.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        found = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # whatever a damaged file makes the library raise
        raise CheckpointError(f"{path}: is no GGUF that can be read ({reason(error)}); download it again") from error
    other = f"{path}: is not the base of this merge: {{}}; give the GGUF of that base"
    config, name = geometry.config, geometry.architecture
    for key, value in (
        ("general.architecture", name),
        (f"{name}.block_count", config.num_hidden_layers),
        (f"{name}.attention.head_count", config.num_attention_heads),
        (f"{name}.attention.head_count_kv", config.num_key_value_heads),
        (f"{name}.rope.freq_base", geometry.rope["rope_theta"]),
    ):
        if key in said and said[key] != value:  # old files leave out what is usual
            raise CheckpointError(other.format(f"its {key} is {shown(said[key])}, not {shown(value)}"))
    wanted = {geometry.stored(own): (own, one) for own, one in weights.items()}
    wanted.setdefault("output.weight", wanted["token_embd.weight"])  # tied
    for stored, (_, one) in wanted.items():
        if stored == "output.weight" and config.tie_word_embeddings and stored not in found:
            continue
        if stored not in found:
            raise CheckpointError(other.format(f"it has no {stored}"))
        shape = tuple(int(n) for n in reversed(found[stored].shape))
        if shape != one.shape:
            raise CheckpointError(other.format(f"{stored} is of shape {shape}, not {one.shape}"))
        is_vector = len(one.shape) == 1
        if not is_vector and stored not in COMPARED:
            continue
        exact = geometry.rows(wanted[stored][0], one[...].float().numpy())
        exact = (exact if is_vector else exact[:ROWS]).astype(np.float64).ravel()
        tensor = found[stored]
        try:
            values = gguf.dequantize(tensor.data if is_vector else tensor.data[:ROWS], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {stored} is of type {tensor.tensor_type.name}, which cannot be compared; give another GGUF"
            ) from error
        given = values.astype(np.float64).ravel()
        if is_vector:
            differs = np.abs(given - exact).max() > SAME_VECTOR * np.abs(exact).max()
        else:
            differs = given @ exact < SAME_WEIGHT * np.linalg.norm(given) * np.linalg.norm(exact)
        if differs:
            raise CheckpointError(
                other.format(
                    f"{stored} has other values (as after a merge that averages norms, which is for all tokens)"
                )
            )


def check_type(kind: str) -> None:
    """Refuse a type of numbers that is not written."""
    if kind not in TYPES:
        raise CheckpointError(
            f"--type {kind}: is not written; {nearest(kind, TYPES)}; others by a GGUF of your own: --gguf BASE.gguf"
        )


def _read(geometry: Geometry, name: str, one: Stored) -> Callable[[], np.ndarray]:
    return lambda: geometry.rows(name, one[...].float().numpy())


def _writer(path: Path, geometry: Geometry) -> Any:
    import gguf

    return gguf.GGUFWriter(path, geometry.architecture)


def write_pieces(writer: Any, tensors: list[Piece]) -> None:
    """Write a file of settings that `writer` has and these tensors: its header, then one tensor after another.

    Raises:
        CheckpointError: a tensor has values, or rows, that its type cannot hold.
    """
    import gguf

    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, shape, kind, _ in tensors:
        count, width = math.prod(shape), shape[-1]
        if kind == "q8_0":
            if width % BLOCK:
                raise CheckpointError(
                    f"{name}: rows of {width} numbers cannot be held in q8_0, which takes multiples of {BLOCK}; choose --type f16"
                )
            n_bytes = count // BLOCK * gguf.GGML_QUANT_SIZES[q8][1]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=q8)
            continue
        dtype = np.dtype(np.float16 if kind == "f16" else np.float32)
        writer.add_tensor_info(name, shape, dtype, count * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, kind, read in tensors:
            writer.write_tensor_data(_encoded(name, kind, read()))
    finally:
        writer.close()


def _encoded(name: str, kind: str, values: np.ndarray) -> np.ndarray:
    """A tensor's numbers as a file of this type has them."""
    import gguf

    if not np.isfinite(values).all() or (kind == "f16" and np.abs(values).max() > np.finfo(np.float16).max):
        raise CheckpointError(f"{name}: has values that {kind} cannot hold; see modalloy verify, or choose --type f32")
    if kind == "q8_0":
        found: np.ndarray = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return found
    return values.astype(np.float16 if kind == "f16" else np.float32)
