"""``convert``: an image of the same company in another format or size. Needs ``jobkit[images]``.

The job's input::

    {"sourceAssetId": "0190163d-…", "targetFormat": "webp", "maxWidth": 800, "maxHeight": 600, "quality": 80,
     "background": "#ffffff", "filename": "photo.webp"}

Only the first two are needed. ``targetFormat``: ``png``, ``jpeg``, ``webp``, ``gif``, ``bmp``, ``tiff``, and ``avif``
where Pillow has it. ``maxWidth``, ``maxHeight``: the picture is made smaller to fit, never larger, and keeps its
proportions. ``quality``: 1 to 100, for ``jpeg``, ``webp`` and ``avif``. ``background``: what shows through where
``jpeg`` and ``bmp`` have no transparency, and at the edges of ``gif``; white by default.

Read are the same formats, told by their bytes and not by the asset's content type; never SVG, PDF or PostScript. Of an
animation or of several pages the first picture is taken. It is turned as its EXIF orientation says, its colours become
sRGB with 8 bits a channel, and nothing else of the source is kept: no EXIF, position, comment, profile or thumbnail.

Refused with ``ValueError``: more than 50 million pixels (``register(renderers, max_pixels=…)`` sets another limit),
which is looked at before any is decoded, a file of more than 256 MiB, a damaged file, samples of 32 bits. A job needs
about 12 bytes of memory a pixel, to write ``gif``, ``webp`` and ``avif`` up to 40.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from jobkit.base.text import error_message
from jobkit.contrib.renderers import _fields
from jobkit.errors import ConfigurationError
from jobkit.rendering.context import RenderContext
from jobkit.rendering.renderers import Renderers

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

JOB_TYPE = "convert"
MAX_PIXELS = 50_000_000
MAX_SOURCE_BYTES = 256 << 20

_FIELDS = ("sourceAssetId", "targetFormat", "quality", "maxWidth", "maxHeight", "background", "filename")
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_MAX_SIDE = 65_535
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A format that can be written: how, and what it can hold."""

    endings: tuple[str, ...]
    options: dict[str, Any]
    quality: int | None = None
    alpha: bool = True
    max_side: int = 2**31 - 1


TARGETS = {
    "png": Target((".png",), {}),
    "jpeg": Target((".jpg", ".jpeg"), {"progressive": True}, quality=85, alpha=False, max_side=65_500),
    "webp": Target((".webp",), {}, quality=80, max_side=16_383),
    "gif": Target((".gif",), {}, max_side=65_535),
    "bmp": Target((".bmp",), {}, alpha=False),
    "tiff": Target((".tiff", ".tif"), {"compression": "tiff_adobe_deflate"}),
    "avif": Target((".avif",), {}, quality=70, max_side=32_768),
}


def register(renderers: Renderers, *, max_pixels: int = MAX_PIXELS) -> None:
    """Make ``render`` the renderer of ``convert``; ``ConfigurationError`` without ``jobkit[images]``."""
    formats()
    renderers.register(JOB_TYPE)(partial(render, max_pixels=max_pixels))


def render(ctx: RenderContext, *, max_pixels: int = MAX_PIXELS) -> None:
    """The picture in the target format. ``ValueError``, naming the field, when the input or the picture is not right;
    ``AssetNotFound`` when the company has no such asset.
    """
    wanted = Conversion.of(ctx.input)
    source = ctx.workdir / "source"
    _copy(ctx, wanted.source, source)
    with _told_of(wanted.source, max_pixels):
        picture = _read(source, ctx, max_pixels)
    ctx.check()
    picture = wanted.fitted(picture)
    ctx.check()
    target = TARGETS[wanted.format]
    if target.alpha and wanted.format != "gif":
        options = target.options
    else:
        picture, options = _without_half_tones(picture, wanted)
    options = options if target.quality is None else {**options, "quality": wanted.quality or target.quality}
    picture.info.clear()  # writers take what they find there: profiles, comments, transparency
    ctx.check()
    with ctx.writer(wanted.filename, f"image/{wanted.format}") as out:
        picture.save(cast("IO[bytes]", out), format=wanted.format, **options)


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read and written here; ``ConfigurationError`` without ``jobkit[images]``."""
    try:
        from PIL import features
    except ImportError as error:
        raise ConfigurationError(f"{JOB_TYPE} needs Pillow: pip install jobkit[images]") from error
    with warnings.catch_warnings():  # an older Pillow does not know the name
        warnings.simplefilter("ignore")
        return tuple(name for name in TARGETS if name != "avif" or features.check("avif"))


@dataclass(frozen=True, slots=True)
class Conversion:
    """A job's input, checked."""

    source: str
    format: str
    quality: int | None
    max_width: int | None
    max_height: int | None
    background: str
    filename: str

    @classmethod
    def of(cls, value: Any) -> Conversion:
        _fields.object_of(value, _FIELDS, JOB_TYPE)
        source = _fields.text(value, "sourceAssetId", limit=100)
        if source is None:
            raise ValueError("sourceAssetId is missing")
        format = _fields.choice(value, "targetFormat", formats())
        if format is None:
            raise ValueError("targetFormat is missing")
        target = TARGETS[format]
        quality = _fields.count(value, "quality", least=1, most=100)
        if quality is not None and target.quality is None:
            raise ValueError(f"quality means nothing for {format}")
        background = _fields.text(value, "background", limit=100) or "#ffffff"
        if not _COLOUR.fullmatch(background):
            raise ValueError(f"background {background!r} is not a colour such as '#ffffff'")
        return cls(
            source,
            format,
            quality,
            _fields.count(value, "maxWidth", least=1, most=_MAX_SIDE),
            _fields.count(value, "maxHeight", least=1, most=_MAX_SIDE),
            background,
            _fields.filename(value, *target.endings) or f"image{target.endings[0]}",
        )

    def fitted(self, picture: Picture) -> Picture:
        """``picture``, made smaller where it is larger than was asked for."""
        from PIL import Image

        width, height = picture.size
        scale = min(1.0, (self.max_width or width) / width, (self.max_height or height) / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        limit = TARGETS[self.format].max_side
        if max(size) > limit:
            raise ValueError(
                f"targetFormat {self.format} has at most {limit} pixels a side, the picture has {max(size)}: "
                "give maxWidth or maxHeight"
            )
        return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _copy(ctx: RenderContext, asset_id: str, path: Path) -> None:
    """The asset as a local file: what a storage raises is never mistaken for a damaged picture."""
    size = 0
    with ctx.open_asset(asset_id) as source, open(path, "wb") as copy:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > MAX_SOURCE_BYTES:
                raise ValueError(f"sourceAssetId: asset {asset_id} has more than {MAX_SOURCE_BYTES} bytes, the limit")
            copy.write(chunk)
            ctx.check()


@contextmanager
def _told_of(asset_id: str, max_pixels: int) -> Iterator[None]:
    """Whatever a decoder raises becomes a ``ValueError`` that says which asset cannot be read, and why."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(
            f"sourceAssetId: asset {asset_id} is no picture of a kind that is read: {', '.join(formats())}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"sourceAssetId: asset {asset_id} has more than {max_pixels} pixels, the limit") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"sourceAssetId: asset {asset_id} cannot be read: {error_message(error)}") from error


def _read(path: Path, ctx: RenderContext, max_pixels: int) -> Picture:
    """The first picture of a file, upright, as L, RGB or RGBA in sRGB, with nothing of the file about it."""
    from PIL import Image, ImageOps

    # Only these: Pillow's reader of PostScript runs a program, others read what nobody asked for.
    with Image.open(path, formats=[name.upper() for name in formats()]) as opened:
        if opened.width * opened.height > max_pixels:
            raise Image.DecompressionBombError
        opened.load()
        ctx.check()
        ImageOps.exif_transpose(opened, in_place=True)
        picture = _in_srgb(_of_eight_bits(opened))
        # The opened file's own object knows more than its pixels.
        return picture.copy() if picture is opened else picture


def _of_eight_bits(picture: Picture) -> Picture:
    """``picture`` as L, RGB, RGBA, CMYK or LAB."""
    mode = picture.mode
    if mode.startswith("I"):
        picture = picture.convert("I")
        low, high = picture.getextrema()
        if low < 0 or high > 65_535:  # type: ignore[operator]
            raise ValueError("its samples have 32 bits")
        return picture.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if mode == "F":
        raise ValueError("its samples have 32 bits")
    if picture.has_transparency_data:
        return picture if mode == "RGBA" else picture.convert("RGBA")
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return picture
    return picture.convert("L" if mode == "1" else "RGB")


def _in_srgb(picture: Picture) -> Picture:
    """``picture`` as L, RGB or RGBA, its colours those of sRGB as far as its profile can be understood."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if profile or picture.mode == "LAB":
        try:
            known: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
            mode = "RGBA" if picture.mode == "RGBA" else "RGB"
            converted = ImageCms.profileToProfile(picture, known, ImageCms.createProfile("sRGB"), outputMode=mode)
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            if picture.mode == "LAB":
                raise
    return picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")


def _without_half_tones(picture: Picture, wanted: Conversion) -> tuple[Picture, dict[str, Any]]:
    """``picture`` on its background; for ``gif`` with what was more than half transparent left out."""
    from PIL import Image

    options = TARGETS[wanted.format].options
    clear = None
    if picture.mode == "RGBA":
        alpha = picture.getchannel("A")
        ground = Image.new("RGB", picture.size, wanted.background)
        ground.paste(picture, mask=alpha)
        picture = ground
        clear = alpha.point(lambda value: 255 * (value < 128))
    if wanted.format != "gif" or picture.mode == "L":
        return picture, options
    colours = picture.quantize(255)
    palette = (colours.getpalette() or [])[:765]
    colours.putpalette(palette + palette[:3] * (256 - len(palette) // 3))  # the last is no new colour: none has it
    picture = picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    if clear is None or clear.getbbox() is None:
        return picture, options
    picture.paste(255, mask=clear)
    return picture, {**options, "transparency": 255}
