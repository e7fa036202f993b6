"""Image files of every kind that people have, and of kinds that nobody should: for the tests of what reads them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from tests.files import noise

Size = tuple[int, int]  # width, height

PLAIN = {  # format: Pillow's modes
    "PNG": "1 L LA P RGB RGBA I;16",
    "JPEG": "L RGB CMYK YCbCr",
    "BMP": "1 L P RGB RGBA",
    "GIF": "L P",
    "TIFF": "1 L LA P RGB RGBA CMYK LAB I;16 I F",
    "WEBP": "RGB",
    "PPM": "1 L RGB",
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # format, Pillow's mode, how it is saved
    **{f"{format} {mode}": (format, mode, {}) for format, modes in PLAIN.items() for mode in modes.split()},
    "PNG L and transparency": ("PNG", "L", {"transparency": 7}),
    "PNG P and transparency": ("PNG", "P", {"transparency": 3}),
    "PNG P and transparencies": ("PNG", "P", {"transparency": bytes(range(256))}),
    "PNG RGB and transparency": ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    "PNG of frames": ("PNG", "RGB", {"frames": 3}),
    "PNG of grey frames": ("PNG", "L", {"frames": 3}),
    "JPEG in scans": ("JPEG", "RGB", {"progressive": True}),
    "JPEG of frames": ("MPO", "RGB", {"frames": 2}),
    "GIF P and transparency": ("GIF", "P", {"transparency": 3}),
    "GIF of frames": ("GIF", "P", {"frames": 3}),
    "TIFF of a fax": ("TIFF", "1", {"compression": "group4"}),
    "TIFF deflated": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "TIFF with LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF of a JPEG": ("TIFF", "YCbCr", {"compression": "jpeg"}),
    "TIFF of pages": ("TIFF", "RGB", {"frames": 2}),
    "WEBP RGBA": ("WEBP", "RGBA", {"lossless": True}),
    "WEBP of frames": ("WEBP", "RGB", {"frames": 3}),
    "PGM of 16 bits": ("PPM", "I", {}),
    "PFM": ("PPM", "F", {}),
}
UNREADABLE = {"TIFF LAB", "TIFF I", "TIFF F", "PFM"}  # no colours, or no range, that we could know
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # that Pillow knows, and data sets do not consist of
    name: (name, mode, {})
    for name, mode in (
        ("EPS", "RGB"), ("ICO", "RGBA"), ("TGA", "RGB"), ("JPEG2000", "RGB"), ("PCX", "RGB"), ("SGI", "RGB"),
        ("DDS", "RGBA"), ("ICNS", "RGBA"), ("PDF", "RGB"), ("MSP", "1"), ("XBM", "1"),
    )
}  # fmt: skip


@lru_cache(maxsize=2048)
def encoded(kind: str, size: Size = (8, 8), orientation: int | None = None) -> bytes:
    """A file of noise. orientation: EXIF's, where the format has it."""
    format, mode, settings = (KINDS | OTHERS)[kind]
    settings = dict(settings)
    frames = [picture(mode, size, seed=i) for i in range(settings.pop("frames", 1))]
    if len(frames) > 1:
        settings |= {"save_all": True, "append_images": frames[1:]}
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        settings["exif"] = exif
    buffer = io.BytesIO()
    frames[0].save(buffer, format, **settings)
    return buffer.getvalue()


def picture(mode: str, size: Size, *, seed: int = 0) -> Image.Image:
    """Noise in any of Pillow's modes."""
    width, height = size
    if mode in ("I;16", "I", "F"):
        deep = noise(height, width, seed=seed).astype(np.uint16) * 257
        return Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32 if mode == "I" else np.float32))
    if mode == "1":
        return Image.fromarray(noise(height, width, seed=seed) > 127)
    if mode == "P":
        image = Image.frombytes("P", size, noise(height, width, seed=seed).tobytes())
        image.putpalette(noise(256, 3, seed=99).tobytes())
        return image
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, noise(height, width, bands, seed=seed).tobytes())


# --- PNG and TIFF by hand ---------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(size: Size, *, depth: int = 8, colours: int = 0, rows: bytes = b"", between: Sequence[bytes] = ()) -> bytes:
    """A PNG file that claims this size, whatever its rows (each with a filter byte before it) are.

    colours: 0 grey, 2 RGB. between: chunks before those of the rows.
    """
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n", head, *between, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"".join(parts)


def checked(content: bytes) -> bytes:
    """A damaged PNG file with the right checksums, so that a reader believes it."""
    at, parts = 8, [content[:8]]
    while content.startswith(b"\x89PNG") and at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if at + 12 + length > len(content):
            break
        parts.append(chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts) + content[at:]


def tiff(size: Size, tile: Size, content: bytes) -> bytes:
    """A grey TIFF file of one deflated tile, which may be far larger than the image."""
    entries = {
        256: size[0], 257: size[1], 258: 8, 259: 8, 262: 1, 277: 1, 322: tile[0], 323: tile[1],
        324: 200, 325: len(content),
    }  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    directory = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + struct.pack("<I", 0)
    return directory.ljust(200, b"\0") + content
