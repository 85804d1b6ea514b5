"""Whether a JPEG holds all the picture that it says: libjpeg, and so Pillow, fills up with grey what its data lacks.

FFmpeg's decoder notices, but in the last block, and is asked for a second opinion. Format: ITU-T T.81 (1992), annex B.
"""

from typing import BinaryIO

from modalloy.senses.media import limits

FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers
HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: those that FFmpeg decodes
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length


def check_scans(file: BinaryIO) -> None:
    """Refuse a JPEG whose data ends before the picture does, or is damaged on the way.

    Raises:
        ValueError: says so. A coding that FFmpeg does not know (arithmetic) is left to Pillow.
    """
    import av

    file.seek(0)
    data = file.read()
    if _frame_marker(data) not in HUFFMAN:
        return
    options = {"err_detect": "explode", "max_pixels": str(limits.MAX_PIXELS), "threads": "1"}
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.options = options
    try:
        decoder.decode(av.Packet(data))
        decoder.decode(None)
    except av.InvalidDataError as error:
        raise ValueError("its data is damaged, or ends before the picture does") from error


def _frame_marker(data: bytes) -> int | None:
    """The marker that begins the frame, and tells its coding."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind in FRAMES:
            return kind
        if kind == 0xFF:  # fill
            at += 1
        else:
            at += 2 if kind in ALONE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
