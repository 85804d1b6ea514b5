"""One boundary round what the libraries do with a stranger's model folder: no code of its own, and one line for every fault.

transformers, tokenizers and torch raise whatever a damaged file makes them raise. Here it becomes a CheckpointError that
names the folder and the cause. What a line of modalloy itself raises is our bug, and passes.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import Lock, RLock
from typing import Any

from modalloy.errors import CheckpointError, ModalloyError
from modalloy.outputs.omni import AUTO_MAP
from modalloy.storage.folder import present, read_json

OURS = str(Path(__file__).resolve().parents[1]) + os.sep
MAX_REASON = 400  # characters of a library's message that are repeated
# files whose `auto_map` names classes that transformers would fetch and run
CODED = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
STORED: ContextVar[tuple[Any, dict[str, tuple[int, ...]]]] = ContextVar("stored", default=("", {}))
LOADER = RLock()
NEVER_ALONE = (KeyboardInterrupt, SystemExit, GeneratorExit)


@contextmanager
def opening(where: Any, what: str, done: str = "opened", *, silent: bool = False) -> Iterator[None]:
    """What libraries raise in the block becomes "WHERE: its WHAT cannot be DONE (cause)"; `silent` keeps stderr empty.

    Raises:
        CheckpointError: a library failed, at this folder's files.
    """
    try:
        with without_stderr() if silent else nullcontext():
            yield
    except (ModalloyError, MemoryError, *NEVER_ALONE):
        raise
    except BaseException as error:  # Rust's PanicException is no Exception
        if _is_ours(error):
            raise
        raise CheckpointError(
            f"{where}: its {what} cannot be {done} ({reason(error)}); give the whole folder of the published model, undamaged"
        ) from error


def reason(error: BaseException) -> str:
    """What a library's error says, in one line: its kind where its message alone says little."""
    said = " ".join(str(error).split())
    said = said if len(said) <= MAX_REASON else f"{said[:MAX_REASON]} …"
    plain = isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and len(said.split()) > 3
    return said if plain else f"{type(error).__name__}: {said}" if said else type(error).__name__


def _is_ours(error: BaseException) -> bool:
    """Whether a line of modalloy made Python raise it; torch's and Rust's own errors are never ours."""
    if isinstance(error, RuntimeError) or not isinstance(error, Exception):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(OURS)


@contextmanager
def without_stderr() -> Iterator[None]:
    """Nothing reaches stderr while such a block runs, in whatever thread: libraries in Rust write their panics there themselves."""
    SILENCE.enter()
    try:
        yield
    finally:
        SILENCE.leave()


class Silence:
    """Where stderr leads to, put aside by the first thread that enters and put back by the last that leaves."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.kept: int | None = None

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            try:
                self.kept = os.dup(2)
            except OSError:  # there is none
                return
            sys.stderr.flush()
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), 2)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside or self.kept is None:
                return
            sys.stderr.flush()
            os.dup2(self.kept, 2)
            os.close(self.kept)
            self.kept = None


SILENCE = Silence()


def check_code(folder: Path) -> None:
    """Refuse a model's folder that needs code of its own, or whose config chooses code to fetch. Nothing is run.

    An `auto_map` may stay where transformers (or modalloy) has the class that it names.

    Raises:
        CheckpointError: there is such a file, or one of the configs is damaged.
    """
    for name in present(folder, CODED):
        path = folder / name
        for key, value in _entries(read_json(path)):
            for text in _texts(value):
                if key == "auto_map" and text.rpartition(".")[2] not in _known_classes():
                    raise CheckpointError(
                        f"{path}: needs code of its own ({text} in auto_map), which is never run here; "
                        "give a model whose classes transformers has"
                    )
                if "/" in text and ("implementation" in key or "kernel" in key or key == "custom_generate"):
                    raise CheckpointError(
                        f"{path}: {key} names {text}, code that would be fetched and run; remove the entry"
                    )


@cache
def _known_classes() -> frozenset[str]:
    """Names that need no code of a folder's. transformers takes half a second to list its own."""
    import transformers

    return frozenset({*dir(transformers), *(place.rpartition(".")[2] for place in AUTO_MAP.values())})


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value


def _texts(value: Any) -> list[str]:
    """Every text in a value, at any depth."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, (dict, list)):
            left += one.values() if isinstance(one, dict) else one
    return found


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        CheckpointError: it is missing or damaged, or needs code of its own.
    """
    from transformers import AutoTokenizer

    check_code(folder)
    with opening(folder, "tokenizer", silent=True):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def set_ends(model: Any, folder: Path, content: dict[str, Any]) -> None:
    """Give a model the generation settings in its folder, with every end token that they and the config (`content`) list.

    Raises:
        CheckpointError: they are damaged.
    """
    from transformers import GenerationConfig

    from modalloy.model.ends import listed

    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
        with opening(folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
            ends = listed(model.generation_config.eos_token_id)
    else:
        ends = []
    parts = [content, content.get("text_config")]
    for part in parts:
        ends += [one for one in listed(part.get("eos_token_id")) if one not in ends] if isinstance(part, dict) else []
    model.generation_config.eos_token_id = ends or None


@contextmanager
def stored_in(where: Any, stored: Mapping[str, Any]) -> Iterator[None]:
    """A model that is made in this block refuses tensors that are stored in other shapes than its own.

    What transformers' loader makes has no memory yet; it would give it to all that do not fit.
    """
    token = STORED.set((where, {name: tuple(one.shape) for name, one in stored.items()}))
    try:
        yield
    finally:
        STORED.reset(token)


def check_stored(model: Any) -> None:
    """Refuse tensors that are stored in other shapes than the model has, where `stored_in` says how they are."""
    where, shapes = STORED.get()
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in shapes} if shapes else {}
    wrong = [(name, shapes[name], shape) for name, shape in own.items() if shapes[name] != shape]
    check_loaded(where, {"mismatched_keys": wrong})


def check_loaded(where: Any, info: dict[str, Any]) -> None:
    """Refuse what transformers' loader reports: a tensor that is missing, unknown, or of another shape."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(_told, info.get(problem, ()))):
            raise CheckpointError(
                f"{where}: {problem.split('_')[0]} tensor {names[0]} ({len(names)} in all); "
                "the files do not belong together, or are incomplete: merge or download them again"
            )


def _told(problem: Any) -> str:
    """A tensor's name, and both shapes where they differ."""
    if not isinstance(problem, tuple):
        return str(problem)
    name, stored, wanted = problem
    return f"{name} (stored as {tuple(stored)}, not {tuple(wanted)})"


@contextmanager
def one_loader() -> Iterator[None]:
    """transformers loads in the block, in one thread at a time and without warnings: it sets what holds for the whole process."""
    from transformers.utils import logging

    with LOADER:
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
