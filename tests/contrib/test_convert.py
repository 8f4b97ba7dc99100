"""``convert``: pictures keep how they look and lose all else; hostile files fail their own job, and only that."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from sqlalchemy.orm import Session

import jobkit
from jobkit.contrib.renderers import convert
from tests.support.pictures import LOOKS, SIZE, encoded, picture, png, seen_through, unlike
from tests.support.rendering import attempt

RENDERERS = jobkit.Renderers()
convert.register(RENDERERS)
FORMATS = convert.formats()
OPAQUE = ("jpeg", "bmp")


def converted(source: bytes, target: str = "png", *, limit: int = convert.MAX_PIXELS, **fields: Any) -> Image.Image:
    (file,) = raw(source, target, limit=limit, **fields)
    assert file.content_type == f"image/{target}"
    assert isinstance(file.body, bytes)
    opened = Image.open(io.BytesIO(file.body), formats=[target.upper()])
    opened.load()
    return opened


def raw(source: bytes, target: str = "png", *, limit: int = convert.MAX_PIXELS, **fields: Any) -> list[jobkit.Rendered]:
    input = {"sourceAssetId": "a", "targetFormat": target, **fields}
    return attempt(lambda ctx: convert.render(ctx, max_pixels=limit), input, assets={"a": source})


# --- how it looks


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_format_becomes_every_other_and_looks_the_same(source: str, target: str) -> None:
    made = converted(encoded(picture(), source), target)
    assert (made.size, unlike(made, by=25)) == (SIZE, {})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", ["jpeg", "png", "webp", "tiff"])
def test_a_picture_is_turned_as_its_camera_says(source: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture() if orientation == 1 else picture().transpose(undo[orientation])
    lossless = {"webp": {"lossless": True}, "jpeg": {"quality": 100, "subsampling": 0}}.get(source, {})
    made = converted(encoded(stored, source, exif=exif, **lossless), "png")
    assert (made.size, unlike(made)) == (SIZE, {})


def _palette() -> Image.Image:
    made = picture().quantize(8)
    made.info["transparency"] = made.getpixel((60, 45))
    return made


DEEP = picture().convert("L").convert("I").point(lambda value: value * 257)
GREY = {place: (picture().convert("L").getpixel(place),) * 3 for place in LOOKS}
KINDS: list[tuple[str, bytes, Any]] = [
    ("CMYK JPEG", encoded(picture().convert("CMYK"), "jpeg", quality=95), LOOKS),
    ("CMYK TIFF", encoded(picture().convert("CMYK"), "tiff"), LOOKS),
    ("YCbCr TIFF", encoded(picture().convert("YCbCr"), "tiff"), LOOKS),
    ("16-bit PNG", encoded(DEEP.convert("I;16"), "png"), GREY),
    ("16-bit TIFF", encoded(DEEP.convert("I;16"), "tiff"), GREY),
    ("big-endian TIFF", encoded(DEEP.convert("I;16B"), "tiff"), GREY),
    ("grey and alpha", encoded(picture().convert("LA"), "png"), GREY),
    ("two colours", encoded(picture().convert("L").point(lambda v: 255 * (v > 200)).convert("1"), "png"), None),
    ("profile that is none", encoded(picture(), "png", icc_profile=b"nonsense" * 40), LOOKS),
    (
        "LAB TIFF",
        encoded(
            ImageCms.profileToProfile(
                picture(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            ),  # type: ignore[arg-type]
            "tiff",
        ),
        LOOKS,
    ),
]


@pytest.mark.parametrize("target", ["png", "jpeg", "gif"])
@pytest.mark.parametrize(("source", "looks"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
def test_every_kind_of_pixel_becomes_eight_bits_that_look_the_same(source: bytes, looks: Any, target: str) -> None:
    made = converted(source, target)
    assert made.mode in ("L", "RGB", "RGBA", "P")
    assert unlike(made, looks or {(4, 4): (0, 0, 0), (60, 45): (255,) * 3}, by=25) == {}


def test_colours_are_those_that_the_profile_means() -> None:
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {plain[at : at + 4]: at + 4 for at in range(132, 132 + 12 * struct.unpack(">I", plain[128:132])[0], 12)}
    swapped = bytearray(plain)
    for one, other in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        swapped[tags[one] : tags[one] + 8] = plain[tags[other] : tags[other] + 8]
    for source in (picture(), seen_through()):
        made = converted(encoded(source, "png", icc_profile=bytes(swapped)), "png")
        assert made.mode == source.mode
        assert made.getpixel((30, 20))[:3] == pytest.approx((0, 0, 255), abs=2)  # type: ignore[index]
        assert made.getpixel((20, 45))[:3] == pytest.approx((255, 0, 0), abs=2)  # type: ignore[index]


@pytest.mark.parametrize(
    "source",
    [
        encoded(seen_through(), "png"),
        encoded(seen_through(), "webp", lossless=True),
        encoded(seen_through().convert("LA"), "png"),
        encoded(seen_through().quantize(8, method=Image.Quantize.FASTOCTREE), "png"),
        encoded(seen_through().convert("RGBa").convert("RGBA"), "tiff"),
        encoded(_palette(), "gif", transparency=_palette().getpixel((60, 45))),
        encoded(picture(), "png", transparency=(255, 255, 255)),
    ],
    ids=["png", "webp", "grey", "palette with alpha", "tiff", "gif", "colour key"],
)
@pytest.mark.parametrize("target", FORMATS)
def test_a_hole_stays_a_hole_or_shows_the_background(source: bytes, target: str) -> None:
    made = converted(source, target, background="#ff00ff")
    if target in OPAQUE:
        assert made.mode == "RGB"
        assert unlike(made, {(60, 45): (255, 0, 255)}, by=25) == {}
    else:
        hole = made.convert("RGBA")
        assert [hole.getpixel(place)[3] for place in ((60, 45), (30, 20), (4, 4))] == [0, 255, 255]  # type: ignore[index]


def test_a_gif_is_clear_where_the_picture_was_more_than_half_transparent() -> None:
    source = Image.new("RGBA", (4, 1))
    for at, alpha in enumerate((0, 127, 128, 255)):
        source.putpixel((at, 0), (0, 0, 0, alpha))
    made = converted(encoded(source, "png"), "gif").convert("RGBA")
    shown: list[Any] = [made.getpixel((at, 0)) for at in range(4)]
    assert [colour[3] for colour in shown] == [0, 0, 255, 255]
    assert shown[3] == (0, 0, 0, 255)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (80, 60)),
        ({"maxWidth": 40}, (40, 30)),
        ({"maxHeight": 15}, (20, 15)),
        ({"maxWidth": 40, "maxHeight": 15}, (20, 15)),
        ({"maxWidth": 1}, (1, 1)),
        ({"maxWidth": 4_000}, (80, 60)),
    ],
)
def test_a_picture_is_made_smaller_to_fit_and_never_larger(fields: dict[str, int], size: tuple[int, int]) -> None:
    assert converted(encoded(picture(), "png"), "webp", **fields).size == size


def test_the_size_asked_for_is_that_of_the_turned_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert converted(encoded(picture(), "jpeg", exif=exif), maxWidth=30).size == (30, 40)


@pytest.mark.parametrize("source", ["gif", "webp", "tiff", "png"])
def test_of_several_pictures_the_first_is_taken(source: str) -> None:
    more = [Image.new("RGB", SIZE, colour) for colour in ("black", "yellow")]
    body = encoded(picture(), source, save_all=True, append_images=more)
    made = converted(body, "png")
    assert (getattr(made, "n_frames", 1), unlike(made, by=25)) == (1, {})


@pytest.mark.parametrize("target", ["jpeg", "webp", "avif"])
def test_quality_decides_the_size_of_the_file(target: str) -> None:
    noise = encoded(Image.effect_noise((100, 100), 80), "png")
    sizes = [len(raw(noise, target, quality=quality)[0].body) for quality in (10, 50, 95)]  # type: ignore[arg-type]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_a_file_is_named_after_its_format_unless_it_is_named() -> None:
    source = encoded(picture(), "png")
    names = [raw(source, "jpeg", **fields)[0].filename for fields in ({}, {"filename": "a"}, {"filename": "b.JPEG"})]
    assert names == ["image.jpg", "a.jpg", "b.JPEG"]


# --- what is left behind

SECRET = b"SECRET-POSITION"


@pytest.mark.parametrize("target", FORMATS)
def test_nothing_that_the_source_says_about_itself_is_kept(target: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = SECRET.decode()
    exif.get_ifd(0x8825)[0x001D] = SECRET.decode()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    info.add_text(SECRET.decode(), SECRET.decode())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + SECRET
    sources = [
        encoded(picture(), "png", pnginfo=info, exif=exif, icc_profile=profile, dpi=(123, 123)),
        encoded(picture(), "jpeg", exif=exif, comment=SECRET, icc_profile=profile, xmp=SECRET),
        encoded(picture(), "webp", exif=exif, icc_profile=profile, xmp=SECRET),
        encoded(picture(), "gif", comment=SECRET),
        encoded(picture(), "tiff", exif=exif, icc_profile=profile),
        encoded(picture(), "tiff", exif=exif),
    ]
    for source in sources:
        body = raw(source, target)[0].body
        assert isinstance(body, bytes)
        told = Image.open(io.BytesIO(body)).info
        assert SECRET in source
        assert SECRET not in body
        assert not {"exif", "icc_profile", "xmp", "comment"} & {key for key, value in told.items() if value}


# --- hostile files


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/owned) (w) file\n%%EOF\n"
NO_PICTURE = {
    "EPS": EPS,
    "PDF": b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "HTML": b"<html>",
    "empty": b"\n",
    "PPM": encoded(picture(), "ppm"),
    "ICO": encoded(picture(), "ico"),
    "TGA": encoded(picture(), "tga"),
    "PSD": b"8BPS" + bytes(200),
    "noise": random.Random(1).randbytes(5_000),
}


@pytest.mark.parametrize("source", NO_PICTURE.values(), ids=NO_PICTURE)
def test_what_is_no_picture_of_the_kinds_that_are_read_is_refused(
    source: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # whoever starts a program fails otherwise
    with pytest.raises(ValueError, match=r"^sourceAssetId: asset a (is no picture of a kind that is read: png|cannot)"):
        raw(source)


@pytest.mark.parametrize("filters", ["error", "ignore"])
@pytest.mark.parametrize(
    "source",
    [
        png(7_072, 7_072),
        png(10_000, 10_000),
        png(60_000, 60_000),
        png(2**31 - 1, 1),
        encoded(Image.new("1", (8_000, 8_000)), "tiff", compression="group4"),
        encoded(Image.new("P", (7_100, 7_100)), "gif"),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["just over", "over", "far over", "one line", "tiff", "gif", "bmp"],
)
def test_too_many_pixels_are_refused_before_one_is_decoded(
    source: bytes, filters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(ValueError, match="asset a has more than 50000000 pixels, the limit"):
            raw(source)


def test_the_limit_of_pixels_may_be_another_and_is_kept_where_pillows_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    source = encoded(picture(), "png")
    assert converted(source, limit=4_800).size == SIZE
    with pytest.raises(ValueError, match="asset a has more than 4799 pixels"):
        raw(source, limit=4_799)
    renderers = jobkit.Renderers()
    convert.register(renderers, max_pixels=9)
    assert renderers.find("convert").renderer.keywords == {"max_pixels": 9}  # type: ignore[union-attr]


def test_a_file_that_is_too_large_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_SOURCE_BYTES", 10)
    with pytest.raises(ValueError, match="asset a has more than 10 bytes, the limit"):
        raw(encoded(picture(), "png"))


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("source", FORMATS)
def test_a_cut_file_is_refused(source: str, cut: float) -> None:
    body = encoded(Image.effect_noise((200, 200), 90).convert("RGB"), source)
    with pytest.raises(ValueError, match=r"^sourceAssetId: asset a (cannot be read|is no picture)"):
        raw(body[: int(len(body) * cut)])


@settings(max_examples=150, deadline=None)
@given(
    source=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    near=st.booleans(),
)
def test_a_damaged_file_becomes_a_picture_or_a_value_error_that_names_it(
    source: str, edits: list[tuple[float, int]], near: bool
) -> None:
    body = bytearray(encoded(picture(), source))
    for place, value in edits:
        body[int(place * min(len(body), 100 if near else len(body)))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            refusal = None if raw(bytes(body), limit=1_000_000) else "no file"
        except ValueError as error:
            refusal = str(error)
    assert refusal is None or refusal.startswith("sourceAssetId: asset a ")


def test_chunks_of_text_that_unpack_to_much_more_are_refused_or_dropped() -> None:
    bomb = b"Comment\0\0" + zlib.compress(bytes(50 << 20))
    with pytest.raises(ValueError, match="asset a cannot be read"):
        raw(png(1, 1, zlib.compress(b"\0abc"), (b"zTXt", bomb)))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_of_32_bits_are_refused(mode: str) -> None:
    source = Image.new(mode, (2, 2), 100_000)
    with pytest.raises(ValueError, match="asset a cannot be read: its samples have 32 bits"):
        raw(encoded(source, "tiff"))


@pytest.mark.parametrize(("target", "side"), [("webp", 16_384), ("jpeg", 65_501), ("gif", 65_536), ("avif", 32_769)])
def test_a_side_that_the_format_does_not_have_is_refused_with_the_way_out(target: str, side: int) -> None:
    source = encoded(Image.new("L", (side, 1)), "png")
    limit = convert.TARGETS[target].max_side
    with pytest.raises(
        ValueError, match=f"targetFormat {target} has at most {limit} pixels a side, .* has {side}: give"
    ):
        raw(source, target)
    assert converted(source, target, maxWidth=limit).size == (limit, 1)


# --- input


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ({}, "sourceAssetId is missing"),
        ({"sourceAssetId": 7}, "sourceAssetId must be text, not int"),
        ({"sourceAssetId": " "}, "sourceAssetId is blank"),
        ({"sourceAssetId": "x" * 101}, "sourceAssetId has 101 characters"),
        ({"sourceAssetId": "a"}, "targetFormat is missing"),
        ({"sourceAssetId": "a", "targetFormat": "svg"}, "targetFormat 'svg' is not one of png, jpeg, webp"),
        ({"sourceAssetId": "a", "targetFormat": "PNG"}, "targetFormat 'PNG' is not one of"),
        ({"sourceAssetId": "a", "targetFormat": ["png"]}, "targetFormat ['png'] is not one of"),
        ({"sourceAssetId": "a", "targetFormat": "png", "quality": 80}, "quality means nothing for png"),
        ({"sourceAssetId": "a", "targetFormat": "jpeg", "quality": 0}, "quality must be a whole number from 1 to 100"),
        ({"sourceAssetId": "a", "targetFormat": "jpeg", "quality": True}, "quality must be a whole number"),
        (
            {"sourceAssetId": "a", "targetFormat": "png", "maxWidth": 0},
            "maxWidth must be a whole number from 1 to 65535",
        ),
        ({"sourceAssetId": "a", "targetFormat": "png", "maxHeight": 1.5}, "maxHeight must be a whole number"),
        ({"sourceAssetId": "a", "targetFormat": "png", "background": "red"}, "background 'red' is not a colour"),
        ({"sourceAssetId": "a", "targetFormat": "png", "filename": "a/b"}, "filename 'a/b' has a character"),
        ({"sourceAssetId": "a", "targetFormat": "png", "width": 5}, "'width' is not a field of convert"),
    ],
)
def test_a_wrong_input_is_refused_by_its_field(input: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        attempt(convert.render, input, assets={"a": encoded(picture(), "png")})


def test_without_its_extra_registering_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    convert.formats.cache_clear()
    with pytest.raises(jobkit.ConfigurationError, match=r"needs Pillow: pip install jobkit\[images\]"):
        convert.register(jobkit.Renderers())


def test_importing_the_built_in_renderers_imports_none_of_their_libraries() -> None:
    script = (
        "import sys; from jobkit.contrib.renderers import convert, spreadsheet, pdf_document\n"
        "print({'PIL', 'xlsxwriter', 'typst', 'markdown_it'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


# --- as a job


def test_a_job_reads_an_asset_of_its_own_company_and_no_other(
    engine: sa.Engine, assets: jobkit.AssetStore, create: Callable[..., jobkit.Job]
) -> None:
    def keep(company: str, body: bytes, content_type: str = "image/png") -> jobkit.Asset:
        stored = assets.put_file(company, original_filename="a", content_type=content_type, body=body)
        with Session(engine) as session, session.begin():
            return assets.create(session, company, stored, source_task_id=None)

    source = encoded(picture(), "jpeg")
    own, mislabelled, foreign = keep("acme", source), keep("acme", source, "application/pdf"), keep("beta", source)
    deleted, broken = keep("acme", source), keep("acme", source[:300])
    with Session(engine) as session, session.begin():
        assets.delete(session, deleted)
    unknown = jobkit.base.ids.new_id()
    wanted = [own.id, str(own.id).upper(), mislabelled.id, foreign.id, unknown, deleted.id, "nope", "../a", broken.id]
    jobs = [create("convert", input={"sourceAssetId": str(id), "targetFormat": "webp"}) for id in wanted]
    assert jobkit.Runner(engine, assets, RENDERERS, concurrency=4).run_until_idle(timeout=60) == len(jobs)
    with Session(engine) as session:
        ended = [jobkit.JobStore(session).get_by_id(job.id) for job in jobs]
        for job in jobs[:3]:
            (asset,) = assets.list_by_job(session, job.id)
            with assets.open(asset) as file:
                assert unlike(Image.open(io.BytesIO(file.read())), by=25) == {}
    messages = [job.error_message for job in ended if job]
    assert messages[:3] == [None] * 3
    assert messages[3:8] == [f"no asset {id}" for id in wanted[3:8]]
    assert messages[8] is not None
    assert messages[8].startswith(f"sourceAssetId: asset {broken.id} cannot be read: ")
