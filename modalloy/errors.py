"""Errors that mean "you can fix this": one clear line, exit code 2. Anything else is our bug and shows a traceback.

ModalloyError
├── RecipeError       the recipe (or a command's options) is wrong: unknown key, method, parameter, pattern
├── CheckpointError   a file or tensor of an input is missing, damaged, unsafe or of the wrong shape
├── MethodError       a merging method was given matrices or parameters it is not defined for
├── OutputError       the result cannot be written where or how it was asked for
├── OutOfMemoryError  what was asked for needs more memory than there is
├── MediaError        an image, sound, video or point cloud cannot be read
├── PassingError      a network or a cluster failed: what is finished is kept, and --resume goes on
├── LengthError       a conversation does not fit the model's context
└── MissingPackageError   a package of an optional extra is not installed (an ImportError too)
"""

import errno
import re
import reprlib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# how torch, the linker and Python's threads say that memory ran out, in errors of other kinds
NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
)
# package → the extra that installs it
EXTRAS = {
    **dict.fromkeys(
        ("transformers", "tokenizers", "sentencepiece", "google", "PIL", "soundfile", "soxr", "av"), "model"
    ),
    **dict.fromkeys(("accelerate", "gguf"), "builtin"),
    **dict.fromkeys(("resvg_py", "scipy", "zstandard"), "data"),
    **dict.fromkeys(("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "httpcore2", "starlette"), "serve"),
    **dict.fromkeys(("model_signing", "sigstore", "cyclonedx", "OpenSSL"), "sign"),
    **dict.fromkeys(("s3fs", "gcsfs", "aiohttp"), "remote"),
    **{
        "lm_eval": "evals",
        "plotly": "report",
        "optuna": "search",
        "torchao": "quantize",
        "xllamacpp": "llamacpp",
        "ray": "ray",
    },
}
MAX_PLAIN = 200  # characters of a name or a reason in a message


class ModalloyError(Exception):
    """A mistake the user can fix. The message says what was found, where, and what to do."""


class RecipeError(ModalloyError):
    """The recipe or an option is wrong."""


class CheckpointError(ModalloyError):
    """An input checkpoint is missing, damaged, unsafe or does not fit the others."""


class MethodError(ModalloyError):
    """A merging method cannot be applied to these matrices or parameters."""


class OutputError(ModalloyError):
    """The result cannot be written."""


class PassingError(ModalloyError):
    """Something failed that may work again: what a merge finished is kept, and `--resume` goes on."""


class OutOfMemoryError(ModalloyError):
    """Memory ran out, or would."""


class MediaError(ModalloyError):
    """A medium cannot be read."""


class LongMediaError(MediaError):
    """A medium is longer than the specialist of its modality takes."""


class LengthError(ModalloyError):
    """A conversation and its answer are longer than the model's context."""


class MissingPackageError(ModalloyError, ImportError):
    """A package of an optional extra is not installed."""


def missing_package(error: ImportError) -> MissingPackageError | None:
    """What to say of an import that lacked a package of an optional extra; None of any other import."""
    if isinstance(error, MissingPackageError):
        return error
    if isinstance(error, ModuleNotFoundError):
        words = [(error.name or "").partition(".")[0]]
    else:  # transformers' own words
        words = re.findall(r"\w+", str(error)) if "install" in str(error) else []
        words = [word for word in words if word != "transformers"]
    name = next((word for word in words if word in EXTRAS), None)
    if name is None:
        return None
    return MissingPackageError(
        f'{name} is not installed, and this needs it; run pip install "modalloy[{EXTRAS[name]}]"'
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or the system says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (RuntimeError, ImportError)):
        return any(words in str(error).lower() for words in NO_MEMORY)
    return isinstance(error, MemoryError)


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn memory that ran out into one OutOfMemoryError line that ends with `remedy`."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if not ran_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what filled the memory
        raise OutOfMemoryError(f"memory ran out; {remedy}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that lists the known names nearest to `name`: "did you mean 'rank'? known: rank, scale"."""
    import difflib  # only for a message

    known = sorted(known)
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"


class _Short(reprlib.Repr):
    """A representation that is short whatever the value: a stranger chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 2, 3, 3, 3, 3
        self.maxother = self.maxlong = 80

    def repr_str(self, x: str, level: int) -> str:
        text = x if len(x) <= 80 else f"{x[:50]}…{x[-29:]}"
        return repr(text) if text.isprintable() else ascii(text)

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4000 else f"a whole number of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """The value of a stranger's file for a message: Python's notation, printable, cut to about a line of a terminal."""
    return _SHORT.repr(value)


def cut(text: str) -> str:
    """A stranger's or user's name for a message: as it is, or as `shown` where it is long or not printable."""
    return text if len(text) <= 300 and text.isprintable() else shown(text)[1:-1]


def plain(text: object) -> str:
    """A name or a reason for a message: short, and printable whatever a stranger put into it."""
    words = " ".join(str(text).split())
    words = words if len(words) <= MAX_PLAIN else f"{words[: MAX_PLAIN // 2]} … {words[-MAX_PLAIN // 2 :]}"
    return words if words.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in words)


_SHORT = _Short()
