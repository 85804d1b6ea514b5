"""What stands beside a base's weights and reaches the result as it is: tokenizer, processor, and code that it needs.

Code is copied, never run: it is named by `auto_map`, and whoever loads the result says `trust_remote_code` or not.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.specialists.licences import heeded, licences
from modalloy.specialists.specialist import Specialist
from modalloy.storage.folder import is_there, read_json, reading

# files of tokenizers and processors that transformers reads, beside generation_config.json
PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "bpe.codes",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of them
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+\.(\w*)[ \t]+import[ \t]+([\w, \t]+)|import[ \t]+\.(\w+))", re.MULTILINE)
MAX_CODE_FILES, MAX_CODE_BYTES = 64, 1 << 20
SHOWN = 5  # names in a message


def companions(base: Path) -> list[str]:
    """Names of the tokenizer's and the processor's files in a base's folder, relative to it."""
    with reading(base):
        found = [path.name for path in base.iterdir() if any(fnmatchcase(path.name, one) for one in PATTERNS)]
        found += [f"{TEMPLATES}/{path.name}" for path in (base / TEMPLATES).glob("*.jinja")]
        return sorted(name for name in found if is_there(base / name))


def is_of_media(name: str) -> bool:
    """Whether a file is of a processor: it stays the base's, whatever tokenizer a result has."""
    return name.endswith(("processor_config.json", "preprocessor_config.json"))


def code_files(base: Path) -> list[str]:
    """Names of the base's own files of code that `auto_map` names, and of those that they import; none of it is run.

    What `auto_map` names in another repository, or what the base itself lacks, is left to whoever loads it.

    Raises:
        CheckpointError: such a file is a link out of the folder, too large, or no text.
    """
    wanted = [f"{name}.py" for config in CONFIGS if is_there(base / config) for name in _modules(base / config)]
    found: dict[str, None] = {}
    while wanted:
        name = wanted.pop(0)
        if name in found or not is_there(base / name):
            continue
        found[name] = None
        if len(found) > MAX_CODE_FILES:
            raise CheckpointError(
                f"{base}: its code is more than {MAX_CODE_FILES} files; remove auto_map from its configs"
            )
        wanted += [f"{one}.py" for one in _imports(_read(base / name))]
    return sorted(found)


def _modules(config: Path) -> Iterator[str]:
    """Modules of the folder that a config's `auto_map` names."""
    mapped: Any = read_json(config).get("auto_map")
    places = mapped.values() if isinstance(mapped, dict) else [mapped]
    for place in places:
        for one in place if isinstance(place, list) else [place]:
            if isinstance(one, str) and re.fullmatch(r"\w+\.\w+", one):  # else it is in another repository
                yield one.partition(".")[0]


def _imports(text: str) -> Iterator[str]:
    """Modules of the same folder that code imports."""
    for module, names, plain in IMPORT.findall(text):
        yield from [module or plain] if module or plain else re.findall(r"\w+", names)


def _read(path: Path) -> str:
    with reading(path):
        if path.stat().st_size > MAX_CODE_BYTES:
            raise CheckpointError(f"{path}: is too large for a file of code; remove it, or its entry in auto_map")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: is not UTF-8 text ({error}); download it again") from error


def notices(base: Path, specialists: Sequence[Specialist], has_base_tokens: bool = True) -> list[str]:
    """What a user must know of tokenizers and code, one line each; of tokens, where the result has the base's."""
    found = []
    known = _added(base)
    for specialist in specialists if has_base_tokens else ():
        folder = specialist.checkpoint.folder
        if lacking := sorted(_added(folder) - known - _vocabulary(base)) if known != _added(folder) else []:
            shown = ", ".join(lacking[:SHOWN]) + (" …" if len(lacking) > SHOWN else "")
            found.append(
                f"the {specialist.label} specialist's tokenizer has {len(lacking)} tokens that the base's lacks ({shown}); "
                "the result has the base's tokenizer; write vocabulary: union for the tokens of all"
            )
    found += heeded(licences([("the base", base), *((one.label, one.checkpoint.folder) for one in specialists)]))
    if code := code_files(base):
        found.append(
            f"the base has code of its own; {', '.join(code)} are copied and were not run: read them before you load the "
            "result with trust_remote_code"
        )
    return found


def _added(folder: Path) -> set[str]:
    """The tokens that a tokenizer's small files add to its vocabulary."""
    found: set[str] = set()
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", None)):
        if is_there(folder / name):
            content: Any = read_json(folder / name)
            content = content.get(key) if key else content
            if key and isinstance(content, dict):
                entries = [one.get("content") for one in content.values() if isinstance(one, dict)]
            else:
                entries = list(content) if isinstance(content, dict) else []
            found |= {one for one in entries if isinstance(one, str)}
    return found


def _vocabulary(folder: Path) -> set[str]:
    """Every token of a model's tokenizer."""
    from modalloy.families.vocabulary import read_tokens

    return set(read_tokens(folder) or ())
