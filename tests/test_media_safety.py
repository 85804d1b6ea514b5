"""What a stranger's media cannot do: start a program, open another file, fill the memory, hang or crash the process."""

import io
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from modalloy import builtin
from modalloy.errors import MediaError
from modalloy.senses.media import child, jpeg, limits, load_audio, load_image, load_points, load_video, streams

LOADERS: dict[str, Callable[[Any], Any]] = {
    "image": load_image,
    "audio": load_audio,
    "video": lambda path: load_video(path, 2),
    "point": load_points,
}
each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n%%EOF\n",
        b"\xc5\xd0\xd3\xc6\x1e\0\0\0\x40\0\0\0"
        + b"\0" * 18
        + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        b"\xd7\xcd\xc6\x9a" + b"\0" * 200,  # WMF
        b"DDS " + b"\0" * 200,
        b"SIMPLE  =                    T" + b" " * 2850,  # FITS
    ],
    ids=["eps", "binary eps", "wmf", "dds", "fits"],
)
def test_other_formats_of_pillow_are_not_reached(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(content)
    for load in (load_image, LOADERS["video"]):
        with pytest.raises(MediaError, match=r"a\.jpg: not a readable (image|video)"):
            load(tmp_path / "a.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("form", ["ICO", "PCX", "TGA", "SGI", "DDS", "JPEG2000"])
def test_a_picture_of_an_unlisted_format_says_what_to_give(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", form)
    with pytest.raises(MediaError, match=r"a\.png: not a readable image \(of an unknown format\); give a PNG"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile other.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet/></Period></MPD>',
        "[playlist]\nFile1=other.wav\n",
    ],
)
def test_lists_of_other_files_are_not_followed(text: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "other.wav", np.zeros(800, np.float32), 8000)
    (tmp_path / "a.mp4").write_text(text)
    for load in (load_audio, LOADERS["video"]):
        with pytest.raises(MediaError, match=r"a\.mp4: not a readable"):
            load(tmp_path / "a.mp4")


def test_decoders_that_are_not_listed_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("huffyuv", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv422p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match=r"a\.avi: its video is huffyuv, which is not decoded; re-encode the file"):
        load_video(path, 1)


@each_loader
def test_what_is_no_file_is_refused_by_name(load: Callable[[Any], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        (tmp_path / "pipe.png", r"pipe\.png: is a pipe or a device, not a file"),
        ("/dev/zero", "/dev/zero: is a pipe or a device"),
        (tmp_path, "is a folder, not a file"),
        ("n" * 5000, "cannot be opened \\(File name too long\\)"),
        ("/".join(["n" * 200] * 40), "cannot be opened \\(File name too long\\)"),
        ("a\0b", r"cannot be opened \(embedded null byte\)"),
        ("a.png/b.png", "no such file"),
        (tmp_path / "a" / ".." / "b", "no such file"),
    ):
        with pytest.raises(MediaError, match=message) as caught:
            load(name)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(MediaError, match="cannot be opened"):
        load_image(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(1, 60_000_000), "has 1 × 60000000 pixels, more than the limit of 50000000"),
        (png(1, 100_000), "has 1 × 100000 pixels, more than 65535 on a side"),
        (png(30_000, 30_000), "has more pixels than the limit of 50000000"),
        (png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 40_000_000))), "not a readable image"),
        (png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 40_000_000))), "not a readable image"),
        (png(4, 4, *[chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"\0" * 1_000_000))] * 80), "not a readable image"),
        (png(5000, 5000), "not a readable image"),  # whose pixels are missing
    ],
    ids=["tall", "narrow", "large", "profile", "text", "texts", "empty"],
)
def test_pictures_that_unpack_to_much_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match=message):
        load_image(tmp_path / "a.png")


def test_frames_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controls = [chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 4000, 4000, 0, 0, 1, 10, 0, 0))]
    (tmp_path / "a.png").write_bytes(png(4000, 4000, chunk(b"acTL", struct.pack(">II", 100, 0)), *controls))
    with pytest.raises(MediaError, match=r"a\.png: its frames have more than 500000000 pixels in all; give a shorter"):
        load_video(tmp_path / "a.png", 2)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert load_video(path, 1).shape == (1, 48, 64, 3)
    monkeypatch.setattr(limits, "MAX_VIDEO_PIXELS", 8 * 64 * 48)
    with pytest.raises(MediaError, match=r"a\.mp4: its frames have more than \d+ pixels in all"):
        load_video(path, 1)


def test_frames_larger_than_the_header_says_are_refused(tmp_path: Path) -> None:
    """A GIF whose second frame is placed outside of its screen makes the screen grow."""
    file, frames = io.BytesIO(), [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=[frames[1]], loop=0)
    content = bytearray(file.getvalue())
    second = content.index(b",", content.rindex(b"\x21\xf9\x04") + 8)  # after its graphic control
    content[second + 1 : second + 9] = struct.pack("<HHHH", 60_000, 60_000, 8, 8)
    (tmp_path / "a.gif").write_bytes(content)
    with pytest.raises(MediaError, match=r"more (pixels )?than the limit"):
        load_video(tmp_path / "a.gif", 2)


def test_a_jpeg_of_many_scans_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg", progressive=True)
    assert load_image(tmp_path / "a.jpg").size == (64, 64)
    monkeypatch.setattr(limits, "MAX_SCANS", 5)
    with pytest.raises(MediaError, match=r"a\.jpg: has \d+ scans, more than 5; write it again"):
        load_image(tmp_path / "a.jpg")


def test_the_tiles_of_a_tiff_are_bounded(tmp_path: Path) -> None:
    """A small picture in one tile of 10¹² pixels, which would be unpacked whole."""
    data = zlib.compress(b"\0" * 1000)
    fields = {
        256: 32,
        257: 32,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: 1_000_000,
        323: 1_000_000,
        324: 200,
        325: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + b"\0" * 4
    (tmp_path / "a.tiff").write_bytes(content.ljust(200, b"\0") + data)
    with pytest.raises(MediaError, match="has 1000000 × 1000000 pixels, more than the limit of 50000000"):
        load_image(tmp_path / "a.tiff")


def test_sounds_of_many_channels_and_samples_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((10, 40), np.float32), 8000)
    with pytest.raises(MediaError, match=r"a\.wav: has 40 channels, more than 32; mix them down"):
        load_audio(tmp_path / "a.wav")
    monkeypatch.setattr(limits, "MAX_SAMPLES", 4000)
    for name in ("b.flac", "b.mp3"):
        soundfile.write(tmp_path / name, np.zeros(8000, np.float32), 8000)
        with pytest.raises(MediaError, match=rf"{name}: has more than 4000 samples"):
            load_audio(tmp_path / name)


def archive(path: Path, name: str, content: bytes, method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr(name, content)
    return path


def array(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def test_point_clouds_that_unpack_to_much_are_refused(tmp_path: Path) -> None:
    large = array("{'descr': '<f8', 'fortran_order': False, 'shape': (3000000000, 3), }", b"\0" * 100)
    objects = array("{'descr': '|O', 'fortran_order': False, 'shape': (3, 3), }", b"cos\nsystem\n.")
    for content, message in ((large, "are more than its 22[89] bytes"), (objects, "Python objects|not unpickled")):
        (tmp_path / "a.npy").write_bytes(content)
        archive(tmp_path / "a.npz", "points.npy", content, zipfile.ZIP_DEFLATED)
        for name in ("a.npy", "a.npz"):
            with pytest.raises(MediaError, match=f"{name}: not a usable point cloud: .*({message})"):
                load_points(tmp_path / name)
    cloud = io.BytesIO()
    np.save(cloud, np.zeros((9, 3)))
    archive(tmp_path / "b.npz", "points.npy", cloud.getvalue(), zipfile.ZIP_LZMA)
    with pytest.raises(MediaError, match="packed in another way than NumPy's"):
        load_points(tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as out:
        for index in range(2000):
            out.writestr(f"points{index}.npy", b"")
    with pytest.raises(MediaError, match="lists too many files"):
        load_points(tmp_path / "c.npz")


def test_plys_of_long_headers_and_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_text("ply\nformat ascii 1.0\n" + "comment x\n" * 200_000)
    with pytest.raises(MediaError, match="its header is longer than"):
        load_points(path)
    names = "".join(f"property float {name}\n" for name in "xyz")
    path.write_text(f"ply\nformat ascii 1.0\nelement vertex 2\n{names}end_header\n" + "1 " * 500_000)
    with pytest.raises(MediaError, match=r"a vertex has \d+ values, not 3"):
        load_points(path)
    path.write_text(f"ply\nformat ascii 1.0\nelement e {10**30}\nelement vertex 2\n{names}end_header\n1 2 3\n")
    with pytest.raises(MediaError, match="ends before its vertices"):
        load_points(path)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    np.save(tmp_path / "cloud.npy", np.ones((4, 3), np.float32))
    (tmp_path / "cloud.npy").rename(tmp_path / "cloud.ply")
    assert load_points(tmp_path / "cloud.ply").shape == (4, 3)
    (tmp_path / "dog.raw").write_bytes((builtin.SAMPLES / "dog.flac").read_bytes())
    assert np.array_equal(load_audio(tmp_path / "dog.raw"), load_audio(builtin.SAMPLES / "dog.flac"))


@pytest.mark.parametrize(
    ("modality", "name"),
    [("image", "dog.webp"), ("audio", "dog.flac"), ("video", "cow-animated.webp"), ("point", "dog.npy")],
)
def test_a_child_gives_what_the_process_itself_would(modality: str, name: str) -> None:
    load = LOADERS[modality]
    with child.isolated():
        found = load(builtin.SAMPLES / name)
    assert np.array_equal(np.asarray(found), np.asarray(load(builtin.SAMPLES / name)))
    assert not child.is_isolated()


def test_what_a_child_refuses_reads_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(MediaError) as own:
        load_image(tmp_path / "a.png")
    with child.isolated(), pytest.raises(MediaError) as other:
        load_image(tmp_path / "a.png")
    assert str(own.value) == str(other.value)


def test_a_child_has_bounded_memory(tmp_path: Path) -> None:
    row = b"\0" * 7001
    (tmp_path / "a.png").write_bytes(png(7000, 7000, data=row * 7000))
    with (
        child.isolated(memory_bytes=300_000_000),
        pytest.raises(MediaError, match=r"a\.png: .*(more memory than|crashed)"),
    ):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"its decoder crashed \(SIGSEGV\)"),
        ("import time; time.sleep(60)", "was not decoded in 2 s"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 9))\nwhile True: pass",
            "its decoder took more than 1 s|was not decoded in 2 s",  # on a busy machine
        ),
        ("import sys; sys.stderr.write(f'read {sys.stdin.read()!r}'); sys.exit(3)", "^read ''$"),
    ],
    ids=["crash", "hang", "loop", "input"],
)
def test_a_child_that_fails_is_a_broken_medium(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "BEGIN", code)
    begin = time.monotonic()
    with child.isolated(seconds=1), pytest.raises(MediaError, match=message):
        load_image(builtin.SAMPLES / "dog.webp")
    assert time.monotonic() - begin < 30


def test_a_fault_of_ours_in_a_child_is_no_broken_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "BEGIN", "raise KeyError('ours')")
    with child.isolated(), pytest.raises(RuntimeError, match="ours"):
        load_image(builtin.SAMPLES / "dog.webp")


def test_no_place_before_the_beginning_of_a_sound_is_sought() -> None:
    """libsndfile asks for such places in damaged files; what a seek raises there is a traceback that nothing catches."""
    file = streams._Within(io.BytesIO(bytes(range(10))))
    assert [file.seek(*to) for to in ((-3,), (4,), (-9, 1), (-20, 2), (-2, 2), (99,))] == [0, 4, 0, 0, 8, 10]


def png_rows(rows: int, *, interlaced: bool = False) -> bytes:
    """A grey PNG of 40 × 40, or as much of it as these rows; interlaced, the first pass has the last of them too few."""
    kept = zlib.compress(bytes(41 * rows)) if not interlaced else zlib.compress(_passes(rows))
    head = struct.pack(">IIBBBBB", 40, 40, 8, 0, 0, 0, int(interlaced))
    parts = [chunk(b"IHDR", head), *(chunk(b"IDAT", kept[at : at + 7]) for at in range(0, len(kept), 7))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _passes(rows: int) -> bytes:
    """Data of the seven passes of a grey 40 × 40, but for the last 40 − rows rows of the last pass, which has 20."""
    columns_rows = [(5, 5), (5, 5), (10, 5), (10, 10), (20, 10), (20, 20), (40, 20 - (40 - rows))]
    return b"".join(bytes(1 + columns) * count for columns, count in columns_rows)


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_whose_data_ends_early_is_damaged(interlaced: bool, tmp_path: Path) -> None:
    """Pillow fills the other rows with black, and says nothing: a zlib stream that ends is no error to it."""
    path = tmp_path / "a.png"
    path.write_bytes(png_rows(40, interlaced=interlaced))
    assert load_image(path).size == (40, 40) and load_video(path, 2).shape == (2, 40, 40, 3)
    path.write_bytes(png_rows(39, interlaced=interlaced))
    assert Image.open(path).convert("L").size == (40, 40)  # else our own check is no longer needed
    for load in (load_image, LOADERS["video"]):
        with pytest.raises(MediaError, match=r"a\.png: not a readable image \(its data ends before the last row\)"):
            load(path)


def test_a_frame_of_a_png_whose_data_ends_early_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    frames = [Image.fromarray(np.full((30, 30), 60 * index, np.uint8)) for index in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    whole = path.read_bytes()
    assert load_video(path, 3).shape == (3, 30, 30, 3)
    at = whole.rindex(b"fdAT") - 4
    length = int.from_bytes(whole[at : at + 4], "big")
    cut = whole[at + 8 : at + 12] + zlib.compress(zlib.decompress(whole[at + 12 : at + 8 + length])[:-20])
    path.write_bytes(whole[:at] + chunk(b"fdAT", cut) + whole[at + 12 + length :])
    with pytest.raises(MediaError, match="the data of its frame 3 ends before the last row"):
        load_video(path, 3)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "cmyk", "restarts", "MPO"])
def test_a_jpeg_whose_data_ends_early_is_damaged(kind: str, tmp_path: Path) -> None:
    """An end marker in the midst of a scan: libjpeg warns, and Pillow gives the picture with the rest of it grey."""
    path = tmp_path / "a.jpg"
    mode, options = {
        "progressive": ("RGB", {"progressive": True}),
        "grey": ("L", {}),
        "cmyk": ("CMYK", {}),
        "restarts": ("RGB", {"restart_marker_rows": 1}),
    }.get(kind, ("RGB", {}))
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    image.save(path, "MPO" if kind == "MPO" else "JPEG", exif=b"Exif\0\0\xff\xc9\xff\xd9", **options)
    whole = path.read_bytes()
    assert load_image(path).size == (128, 96) and load_video(path, 2).shape == (2, 96, 128, 3)
    path.write_bytes(whole + b"more")  # after the end; photographs have such
    load_image(path)
    scan = whole.rindex(b"\xff\xda")
    end = whole.index(b"\xff\xd9", scan)
    for share in (0.2, 0.7, 0.95):
        early = whole[: scan + int(share * (end - scan))].rstrip(b"\xff") + b"\xff\xd9"
        path.write_bytes(early)
        assert Image.open(path).convert("RGB").size == (128, 96)  # else our own check is no longer needed
        for load in (load_image, LOADERS["video"]):
            with pytest.raises(MediaError, match=r"a\.jpg: not a readable image \(its data is damaged, or ends before"):
                load(path)


def test_a_jpeg_that_ffmpeg_does_not_know_is_left_to_pillow(tmp_path: Path) -> None:
    """Arithmetic coding, and markers that stand before it."""
    data = b"\xff\xd8\xff\xe0\x00\x04\xff\xc0\xff\xff\xfe\x00\x04hi" + b"\xff\xc9\x00\x0b"
    assert jpeg._frame_marker(data) == 0xC9 not in jpeg.HUFFMAN
    assert jpeg._frame_marker(b"\xff\xd8\xff") is None and jpeg._frame_marker(data[:6]) is None
    jpeg.check_scans(io.BytesIO(data))
