"""A tokenizer as GGUF holds it, where llama.cpp has its rules; what it then makes of awkward texts is compared with our own."""

import ctypes as c
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.llamacpp import binding
from modalloy.storage.folder import read_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS, REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the rules that split a text before merges, by the expression in tokenizer.json
SPLITS = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
}
AWKWARD = (
    "What is this?",
    "Ünïcødé 漢字 🙂 don't I'LL 12345 3.14",
    "  two  spaces\n\n\ttab\r\n x=1; // code",
    "a\u00a0b … “quoted” —dash— e\u0301",
    "1234567 000 ⅷ ²",
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ROOM = 512  # tokens of a text that is compared


def write_tokenizer(writer: Any, folder: Path, tokenizer: Any, size: int) -> None:
    """Write a tokenizer of `size` tokens: byte-level BPE by known rules, or sentencepiece's own file.

    Raises:
        CheckpointError: it is of another kind.
    """
    import gguf

    if (folder / "tokenizer.model").is_file():
        _write_sentencepiece(writer, folder, tokenizer, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rules(folder))
        by_id = {number: token for token, number in tokenizer.get_vocab().items()}
        added = tokenizer.added_tokens_decoder
        tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
        kinds = [UNUSED if number not in by_id else NORMAL for number in range(size)]
        for number, token in added.items():
            kinds[number] = CONTROL if token.special else USER_DEFINED
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=not (folder / "tokenizer.model").is_file(), n_vocab=size)
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer)


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Compare what llama.cpp makes of awkward texts with a GGUF's tokenizer, and what the model's own makes of them.

    Raises:
        CheckpointError: they differ.
    """
    library = binding.load()
    params = library.llama_model_default_params()
    params.vocab_only = True
    model = library.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise CheckpointError(
            f"{path}: llama.cpp cannot read its tokenizer ({binding.said()}); give the base's GGUF: --gguf BASE.gguf"
        )
    try:
        vocabulary = library.llama_model_get_vocab(model)
        specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        for text in (*AWKWARD, "".join(f"{one}x" for one in specials[:8])):
            data, buffer = text.encode(), (c.c_int32 * ROOM)()
            count = library.llama_tokenize(vocabulary, data, len(data), buffer, ROOM, False, True)
            own = tokenizer.encode(text, add_special_tokens=False)
            if list(buffer[: max(count, 0)]) != own:
                raise CheckpointError(
                    f"the tokenizer in llama.cpp's form splits {text!r} otherwise than the model's own, so other programs would be "
                    "given other tokens; give the base's GGUF that its makers published: --gguf BASE.gguf"
                )
    finally:
        library.llama_model_free(model)


def _write_sentencepiece(writer: Any, folder: Path, tokenizer: Any, size: int) -> None:
    import gguf

    try:
        found = [(text, score, int(kind)) for text, score, kind in gguf.SentencePieceVocab(folder).all_tokens()]
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.model'}: cannot be read ({error}); give the base's GGUF: --gguf BASE.gguf"
        ) from error
    found += [(f"[PAD{number}]".encode(), -1000.0, UNUSED) for number in range(len(found), size)]
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < size:
            _, score, _ = found[number]
            found[number] = (str(token).encode(), score, CONTROL if token.special else USER_DEFINED)
    tokens, scores, kinds = zip(*found[:size], strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))


def _rules(folder: Path) -> str:
    """llama.cpp's name of how a byte-level BPE tokenizer splits a text."""
    content = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    model, steps = content.get("model") or {}, content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    found = None
    if model.get("type") == "BPE" and kinds[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space"):
        uses_regex = parts[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and uses_regex:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and uses_regex and parts[0].get("individual_digits"):
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not uses_regex and parts[0].get("behavior") == "Isolated":
            found = SPLITS.get(str((parts[0].get("pattern") or {}).get("Regex")))
    if found is None:
        raise CheckpointError(
            f"{folder}: llama.cpp's rules for its tokenizer are not known here; give the base's GGUF that its makers published: "
            "--gguf BASE.gguf"
        )
    return found
