"""Sounds and videos: libsndfile decodes plain sounds, FFmpeg the rest, each only the formats that are listed here."""

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from modalloy.errors import MediaError, plain
from modalloy.senses.media import limits
from modalloy.senses.media.limits import decoding, opened
from modalloy.senses.media.pictures import spaced

# what a file that libsndfile may open begins with; FFmpeg gets all others
PLAIN = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"caff")
# FFmpeg's demuxers of single files: no playlists, no lists of pictures, no streams
CONTAINERS = (
    *("mov", "matroska", "webm", "avi", "flv", "mpeg", "mpegvideo", "mpegts", "m4v", "h264", "hevc", "ivf"),
    *("ogg", "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "ac3", "eac3", "amr"),
)
VIDEO_DECODERS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video"),
    *("mpeg1video", "h263", "flv", "theora", "mjpeg", "prores", "dnxhd", "ffv1", "rawvideo"),
)
SOUND_DECODERS = (
    *("aac", "mp3float", "mp3", "mp2float", "mp2", "mp1float", "mp1", "opus", "libopus", "vorbis", "libvorbis", "flac"),
    *("alac", "ac3", "eac3", "amrnb", "amrwb", "pcm_u8", "pcm_s8", "pcm_alaw", "pcm_mulaw"),
    *(f"pcm_{kind}{order}" for kind in ("s16", "s24", "s32", "f32", "f64") for order in ("le", "be")),
)
OPTIONS = {
    # an open file and no protocol: neither the name nor a list inside can lead to another file or the network
    "protocol_whitelist": "none",
    "format_whitelist": ",".join(CONTAINERS),
    "codec_whitelist": ",".join((*VIDEO_DECODERS, *SOUND_DECODERS)),
    "max_streams": "100",
}
THREADS = 4  # each holds a frame
SOUND_REMEDY = "give a WAV, FLAC, OGG, MP3 or M4A file"
VIDEO_REMEDY = "give an MP4, WebM, MOV, MKV or AVI file"


@np.errstate(over="ignore", invalid="ignore")  # what float32 cannot hold becomes infinite, and is refused
def read_sound(path: str | Path, sampling_rate: int) -> np.ndarray:
    """Mono float32 waveform (samples,) at `sampling_rate` Hz: see `modalloy.senses.media.load_audio`."""
    import soxr

    with opened(path) as file:
        mono, rate = _plain_sound(path, file) or _sound_track(path, file)
    if mono.size == 0:
        raise MediaError(f"{plain(path)}: the sound has no samples; give a file that is not empty")
    if rate != sampling_rate:
        with decoding(path, "readable sound", SOUND_REMEDY):
            resampled = np.asarray(soxr.resample(mono, rate, sampling_rate), np.float32)
        if resampled.size == 0:
            raise MediaError(
                f"{plain(path)}: the sound is {mono.size} samples at {rate} Hz, less than one at {sampling_rate} Hz; "
                "give a longer one, or correct its sampling rate"
            )
        mono = resampled
    if not np.isfinite(mono).all():
        raise MediaError(f"{plain(path)}: the sound holds NaN or infinite samples; re-encode the file")
    return mono


def read_video(path: str | Path, n_frames: int) -> np.ndarray:
    """Frames uint8 (n_frames, height, width, 3): see `modalloy.senses.media.load_video`."""
    with opened(path) as file:
        frames, count = _frames(path, file, n_frames)
        if frames is None:  # the container told another number of frames than it holds, or none
            file.seek(0)
            frames, count = _frames(path, file, n_frames, count)
    if frames is None:
        raise MediaError(f"{plain(path)}: the frames are not the same when read again; re-encode the file")
    return frames


def _plain_sound(path: str | Path, file: BinaryIO) -> tuple[np.ndarray, int] | None:
    """Mono samples and their rate, where libsndfile knows the file."""
    import soundfile

    is_plain = file.read(4) in PLAIN
    file.seek(0)
    if not is_plain:
        return None
    try:
        sound = soundfile.SoundFile(_Within(file))
    except soundfile.LibsndfileError:  # such as an .avi, or a codec that only FFmpeg knows
        file.seek(0)
        return None
    with sound:
        limits.check_seconds(path, sound.frames / sound.samplerate)
        limits.check_samples(path, sound.frames, sound.channels)
        mono, done = np.empty(sound.frames, dtype=np.float32), 0
        # in blocks: all channels of a long sound would not fit in memory
        with decoding(path, "whole sound", "re-encode the file", soundfile.LibsndfileError):
            while len(block := sound.read(1 << 18, dtype="float32", always_2d=True)):  # (samples, channels)
                mono[done : done + len(block)] = block.mean(axis=1)
                done += len(block)
        if done < len(mono):
            raise MediaError(
                f"{plain(path)}: the sound ends after {done} of {len(mono)} samples; it is cut short, get it again"
            )
        return mono, sound.samplerate


class _Within:
    """A file in which no place before its beginning can be sought: libsndfile asks for some in damaged files, and what the
    operating system says of it would be a traceback that nothing catches."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.read = file.tell, file.read
        self.file, self.size = file, file.seek(0, os.SEEK_END)
        file.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new place."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        return self.file.seek(min(max(0, begin + offset), self.size))


@contextmanager
def _container(path: str | Path, file: BinaryIO, kind: str, remedy: str) -> Iterator[Any]:
    """The file as FFmpeg opens it."""
    import av

    with decoding(path, kind, remedy, av.FFmpegError):
        # what streams there are is found by decoding some; the limit holds for that too
        probing = [{"max_pixels": str(limits.MAX_FRAME_PIXELS)}] * int(OPTIONS["max_streams"])
        container = av.open(file, metadata_errors="replace", options=OPTIONS, stream_options=probing)
    with container:
        if container.duration is not None:
            limits.check_seconds(path, container.duration / av.time_base)
        yield container


def _decoded(path: str | Path, container: Any, stream: Any, kind: str, remedy: str) -> Iterator[Any]:
    """Every frame of a stream; a packet that is damaged is refused, not skipped."""
    import av

    packets = container.demux(stream)
    while True:
        with decoding(path, kind, remedy, av.FFmpegError):
            packet = next(packets, None)
            if packet is None:
                return
            damaged = packet.is_corrupt
            frames = [] if damaged else packet.decode()
        if damaged:
            raise MediaError(f"{plain(path)}: the file is damaged or cut short; get it again")
        yield from frames


def _sound_track(path: str | Path, file: BinaryIO) -> tuple[np.ndarray, int]:
    """Mono samples and their rate, of the first sound track."""
    import av

    kind = "readable sound"
    samples = array("f")  # grows in place
    with _container(path, file, kind, SOUND_REMEDY) as container:
        if not container.streams.audio:
            raise MediaError(f"{plain(path)}: the file has no sound track; give a file with one")
        stream = container.streams.audio[0]
        _check_decoder(path, stream, SOUND_DECODERS)
        limits.check_samples(path, 0, stream.codec_context.channels)
        rate: int = stream.rate
        to_float = av.AudioResampler(format="fltp")
        for frame in _decoded(path, container, stream, kind, SOUND_REMEDY):
            with decoding(path, kind, SOUND_REMEDY, av.FFmpegError):
                converted = [(out.to_ndarray(), out.sample_rate) for out in to_float.resample(frame)]
            for channels, rate in converted:
                samples.frombytes(channels.mean(axis=0, dtype=np.float32).tobytes())
                limits.check_samples(path, len(samples), len(channels))
                limits.check_seconds(path, len(samples) / rate)
    return np.frombuffer(samples, np.float32), rate


def _frames(path: str | Path, file: BinaryIO, n_frames: int, count: int | None = None) -> tuple[np.ndarray | None, int]:
    """The wanted frames of a video of `count` frames (None: as many as its container tells), and the exact count.

    Only wanted frames are converted and kept. They are None where `count` turns out to be wrong.
    """
    import av

    kind = "readable video"
    with _container(path, file, kind, VIDEO_REMEDY) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise MediaError(f"{plain(path)}: the file has no video; give a file with one")
        stream = streams[0]
        _check_decoder(path, stream, VIDEO_DECODERS)
        limits.check_pixels(path, stream.codec_context.width, stream.codec_context.height, limits.MAX_FRAME_PIXELS)
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = min(THREADS, os.cpu_count() or 1)
        stream.codec_context.options = {
            "max_pixels": str(limits.MAX_FRAME_PIXELS)
        }  # which may differ from the header's
        expected = stream.frames if count is None else count
        wanted = spaced(expected, n_frames) if expected else []
        result: np.ndarray | None = None
        found = pixels = 0
        for frame in _decoded(path, container, stream, kind, VIDEO_REMEDY):
            limits.check_pixels(path, frame.width, frame.height, limits.MAX_FRAME_PIXELS)
            if found in wanted:
                upright = _upright(path, frame)
                result = np.empty((n_frames, *upright.shape), np.uint8) if result is None else result
                if upright.shape != result.shape[1:]:
                    raise MediaError(f"{plain(path)}: the frames change their size; re-encode the file")
                result[[place for place, one in enumerate(wanted) if one == found]] = upright
            found, pixels = found + 1, pixels + frame.width * frame.height
            limits.check_frames(path, found, pixels, limits.MAX_VIDEO_PIXELS)
    if not found:
        raise MediaError(f"{plain(path)}: the video has no frames; give a file that is not empty")
    return (result if found == expected else None), found


def _check_decoder(path: str | Path, stream: Any, known: tuple[str, ...]) -> None:
    """Refuse what FFmpeg cannot decode, or would by a decoder that is not listed."""
    if stream.codec_context is None or stream.codec_context.name not in known:
        name = "in a format that FFmpeg cannot decode" if stream.codec_context is None else stream.codec_context.name
        raise MediaError(f"{plain(path)}: its {stream.type} is {name}, which is not decoded; re-encode the file")


def _upright(path: str | Path, frame: Any) -> np.ndarray:
    """Pixels (height, width, 3) turned and mirrored as the display matrix says.

    The matrix takes the pixel (x, y) to (a x + c y, b x + d y), in 16.16 fixed point.
    """
    import av

    with decoding(path, "readable video", VIDEO_REMEDY, av.FFmpegError):
        pixels: np.ndarray = frame.to_ndarray(format="rgb24")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        numbers = [] if matrix is None else np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if not numbers:
        return pixels
    a, b, _, c, d = numbers
    if not ((a and d and not (b or c)) or (b and c and not (a or d))):
        raise MediaError(
            f"{plain(path)}: the video is turned by an angle that is not a right one; re-encode it upright"
        )
    if b:
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
