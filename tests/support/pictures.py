"""A picture of which every turn, flip or mix-up of colours shows, and files made of it."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image, ImageDraw

SIZE = (80, 60)


def picture() -> Image.Image:
    """Red, green, blue and white quarters with a black mark at the top left: any turn, flip or mix-up shows."""
    made = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(made)
    draw.rectangle((0, 0, 39, 29), fill="red")
    draw.rectangle((40, 0, 79, 29), fill="lime")
    draw.rectangle((0, 30, 39, 59), fill="blue")
    draw.rectangle((0, 0, 9, 9), fill="black")
    return made


LOOKS = {(4, 4): (0, 0, 0), (30, 20): (255, 0, 0), (60, 15): (0, 255, 0), (20, 45): (0, 0, 255), (60, 45): (255,) * 3}


def seen_through(clear: tuple[int, int, int, int] = (50, 40, 70, 50)) -> Image.Image:
    """The picture with a hole in its white quarter."""
    made = picture().convert("RGBA")
    made.paste((0, 0, 0, 0), clear)
    return made


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


def unlike(image: Image.Image, looks: dict[tuple[int, int], tuple[int, ...]] = LOOKS, by: int = 12) -> dict[Any, Any]:
    """The places of ``image`` that do not look as they should."""
    shown = image.convert("RGB")
    found = {place: shown.getpixel(place) for place in looks}
    return {
        place: colour
        for place, colour in found.items()
        if max(abs(a - b) for a, b in zip(colour, looks[place], strict=True)) > by  # type: ignore[arg-type]
    }


def png(width: int, height: int, data: bytes = b"", *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file that says it has this size, whatever ``data`` holds."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *extra, (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body
