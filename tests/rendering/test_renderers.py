"""Renderers: what one may be and give, how its failures read, and rendering without a database."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jobkit
from jobkit import RenderContext, Rendered, Renderers

Renderer = Callable[[RenderContext], Any]


def note(name: str = "a.txt", body: Any = b"x") -> Rendered:
    return Rendered(name, "text/plain", body)


def rendered(renderer: Renderer, given: dict[str, Any] | None = None, **options: Any) -> list[Rendered]:
    renderers = Renderers()
    renderers.register("note", **options)(renderer)
    return renderers.render("note", given)


# --- what a renderer may give


def gives_one(ctx: RenderContext) -> Rendered:
    return note("1")


def gives_list(ctx: RenderContext) -> list[Rendered]:
    return [note("1"), note("2"), note("3")]


def generates(ctx: RenderContext) -> Iterator[Rendered]:
    yield note("1")
    yield note("2")


async def gives_one_later(ctx: RenderContext) -> Rendered:
    await asyncio.sleep(0)
    return note("1")


async def gives_list_later(ctx: RenderContext) -> list[Rendered]:
    return [note("1"), note("2")]


async def generates_later(ctx: RenderContext) -> AsyncIterator[Rendered]:
    yield note("1")
    await asyncio.sleep(0)
    yield note("2")


async def gives_a_generator_later(ctx: RenderContext) -> AsyncIterator[Rendered]:
    return generates_later(ctx)


class Counting:
    """An asynchronous iterator that is no generator."""

    def __init__(self, ctx: RenderContext) -> None:
        self.left = ["2", "1"]

    def __aiter__(self) -> Counting:
        return self

    async def __anext__(self) -> Rendered:
        if not self.left:
            raise StopAsyncIteration
        return note(self.left.pop())


class CallableRenderer:
    async def __call__(self, ctx: RenderContext) -> Rendered:
        return note("1")


def writes(ctx: RenderContext) -> None:
    for name in ("1", "2"):
        with ctx.writer(name, "text/plain") as out:
            out.write(b"x")


async def writes_later(ctx: RenderContext) -> None:
    writes(ctx)


def mixes(ctx: RenderContext) -> Iterator[Rendered]:
    with ctx.writer("1", "text/plain") as out:
        out.write(b"x")
    yield note("2")
    with ctx.writer("3", "text/plain") as out:
        with ctx.writer("4", "text/plain") as inner:
            inner.write(b"x")
        out.write(b"x")
    yield note("5")


def writes_and_gives(ctx: RenderContext) -> Rendered:
    writes(ctx)
    return note("3")


@pytest.mark.parametrize(
    ("renderer", "count"),
    [
        (gives_one, 1),
        (gives_list, 3),
        (lambda ctx: tuple(gives_list(ctx)), 3),
        (lambda ctx: map(note, "12"), 2),
        (generates, 2),
        (gives_one_later, 1),
        (gives_list_later, 2),
        (generates_later, 2),
        (gives_a_generator_later, 2),
        (Counting, 2),
        (CallableRenderer(), 1),
        (writes, 2),
        (writes_later, 2),
        (writes_and_gives, 3),
        (mixes, 5),
    ],
)
def test_outputs_of_every_kind_keep_their_order(renderer: Renderer, count: int) -> None:
    files = rendered(renderer)
    assert [file.filename for file in files] == [str(n + 1) for n in range(count)]
    assert {(file.content_type, file.body) for file in files} == {("text/plain", b"x")}


def test_a_body_is_read_before_the_next_output_is_asked_for(tmp_path: Path) -> None:
    def reuses_its_file(ctx: RenderContext) -> Iterator[Rendered]:
        for text in (b"first", b"second"):
            (tmp_path / "same").write_bytes(text)
            yield note(body=tmp_path / "same")

    assert [file.body for file in rendered(reuses_its_file)] == [b"first", b"second"]


def test_many_outputs_do_not_use_up_the_descriptors() -> None:
    held: list[int] = []

    def many(ctx: RenderContext) -> Iterator[Rendered]:
        for n in range(50):
            with ctx.writer(f"w{n}", "text/plain") as out:
                out.write(b"x")
            yield note(f"y{n}")
            held.append(len(os.listdir("/proc/self/fd")))

    assert len(rendered(many)) == 100
    assert max(held) < min(held) + 10  # a hundred outputs; threads of this process may open or close some meanwhile


# --- how failures read


async def none_later(ctx: RenderContext) -> None:
    pass


async def text_later(ctx: RenderContext) -> str:
    return "text"


async def bad_later(ctx: RenderContext) -> AsyncIterator[Any]:
    yield "text"


@pytest.mark.parametrize("renderer", [lambda ctx: None, none_later, lambda ctx: [], lambda ctx: iter(())])
def test_no_output_is_an_error_that_names_the_job_type(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="the renderer for 'note' gave no file"):
        rendered(renderer)


@pytest.mark.parametrize(
    ("renderer", "message"),
    [
        (lambda ctx: "text", "the renderer for 'note' returned str, not Rendered or an iterable of them"),
        (lambda ctx: b"bytes", "returned bytes, not Rendered"),
        (lambda ctx: {"filename": "a"}, "returned dict, not Rendered"),
        (lambda ctx: 7, "returned int, not Rendered"),
        (text_later, "returned str, not Rendered"),
        (lambda ctx: ["text"], "the renderer for 'note' yielded str, not Rendered"),
        (lambda ctx: [note(), None], "yielded NoneType, not Rendered"),
        (lambda ctx: bytearray(b"x"), "yielded int, not Rendered"),
        (lambda ctx: [[note()]], "yielded list, not Rendered"),
        (bad_later, "yielded str, not Rendered"),
        (lambda ctx: note(body="text"), "body is text"),
        (lambda ctx: note(body=["text"]), "body yields str, not bytes"),
        (lambda ctx: note(body=None), "body must be bytes"),
        (lambda ctx: note(name=7), "original_filename must be text"),  # type: ignore[arg-type]
        (lambda ctx: Rendered("a", None, b"x"), "content_type must be text"),  # type: ignore[arg-type]
    ],
)
def test_an_output_of_the_wrong_type_fails_with_what_it_is(renderer: Renderer, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rendered(renderer)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (note(name="a\0b"), ValueError, "original_filename contains a NUL"),
        (Rendered("a", "nonsense", b"x"), ValueError, "content_type 'nonsense' is not a media type"),
        (note(body=b""), jobkit.AssetEmpty, "'a.txt' is empty"),
        (note(body=Path("/does/not/exist")), FileNotFoundError, "/does/not/exist"),
    ],
)
def test_an_output_that_cannot_be_stored_fails(output: Rendered, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rendered(lambda ctx: output)


def test_an_output_over_the_limit_fails_and_ends_an_endless_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobkit.assets.store.MAX_GENERATED_ASSET_BYTES", 10)
    ended: list[str] = []

    def endless(ctx: RenderContext) -> Iterator[Rendered]:
        try:
            while True:
                yield note(body=b"x" * 11)
        finally:
            ended.append(str(ctx.workdir.is_dir()))

    async def endless_later(ctx: RenderContext) -> AsyncIterator[Rendered]:
        try:
            while True:
                yield note(body=b"x" * 11)
        finally:
            await asyncio.sleep(0)
            ended.append(str(ctx.workdir.is_dir()))

    for renderer in (endless, endless_later):
        with pytest.raises(jobkit.AssetTooLarge, match=r"'a\.txt' is larger than the limit of 10 bytes"):
            rendered(renderer)
    assert ended == ["True", "True"]  # both were closed, while their folder was still there


def test_a_refusal_that_a_renderer_swallows_fails_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobkit.assets.store.MAX_GENERATED_ASSET_BYTES", 10)

    def swallows(ctx: RenderContext) -> Iterator[Rendered]:
        try:
            with ctx.writer("big.txt", "text/plain") as out:
                out.write(b"x" * 11)
        except Exception:
            yield note("instead.txt")

    with pytest.raises(jobkit.AssetTooLarge, match=r"big\.txt"):
        rendered(swallows)


def test_an_output_whose_writer_raised_is_dropped_and_the_others_stay() -> None:
    def drops(ctx: RenderContext) -> Iterator[Rendered]:
        yield note("1")
        try:
            with ctx.writer("dropped", "text/plain") as out:
                out.write(b"half")
                raise ZeroDivisionError
        except ZeroDivisionError:
            yield note("2")

    assert [file.filename for file in rendered(drops)] == ["1", "2"]


# --- input, default, registration


@dataclasses.dataclass
class Letter:
    name: str
    lines: int = 1


class Validated:
    """What pydantic's models look like from outside."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    @classmethod
    def model_validate(cls, value: Any) -> Validated:
        if "name" not in value:
            raise ValueError("name: Field required")
        return cls(**value)


def seen_by(given: dict[str, Any] | None, **options: Any) -> Any:
    seen: list[Any] = []

    def renderer(ctx: RenderContext) -> Rendered:
        seen.append(ctx.input)
        return note()

    rendered(renderer, given, **options)
    return seen[0]


def test_an_input_model_makes_what_the_renderer_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen_by({"name": "x"}, input=Letter) == Letter("x")
    assert seen_by({"name": "x"}, input=Validated).values == {"name": "x"}
    assert seen_by({"name": "x"}, input=sorted) == ["name"]
    struct = type("Struct", (), {"__struct_fields__": ("name",)})
    msgspec = types.SimpleNamespace(convert=lambda value, kind: (value["name"], kind))
    monkeypatch.setitem(sys.modules, "msgspec", msgspec)
    assert seen_by({"name": "x"}, input=struct) == ("x", struct)
    with pytest.raises(TypeError, match="name"):
        seen_by({}, input=Letter)
    with pytest.raises(ValueError, match="Field required"):
        seen_by({}, input=Validated)


def test_the_input_is_a_deep_copy_and_a_json_object() -> None:
    given = {"list": [1, (2, 3)], "nested": {"a": {}}}
    seen = seen_by(given)
    assert seen == {"list": [1, [2, 3]], "nested": {"a": {}}}
    seen["nested"]["a"]["changed"] = seen["list"].append(4)
    assert given == {"list": [1, (2, 3)], "nested": {"a": {}}}
    assert seen_by(None) == {}
    for wrong in ([], "", 0, [1], {"x": float("nan")}, {"x": object()}):
        with pytest.raises(ValueError, match="input"):
            seen_by(wrong)  # type: ignore[arg-type]


def test_a_default_renders_what_nobody_registered() -> None:
    renderers = Renderers(default=lambda ctx: note(body=ctx.job_type.encode()))
    renderers.register("known")(lambda ctx: note(body=b"known one"))
    assert [renderers.render(kind)[0].body for kind in ("typo", "known")] == [b"typo", b"known one"]


def test_an_unknown_job_type_is_named() -> None:
    with pytest.raises(jobkit.UnknownJobType, match="no renderer for job type 'pdf-documnet'"):
        Renderers().render("pdf-documnet")
    assert issubclass(jobkit.UnknownJobType, LookupError)


def test_registering_keeps_the_function_and_refuses_what_would_fail_later() -> None:
    renderers = Renderers()
    assert renderers.register("note")(gives_one) is gives_one
    with pytest.raises(ValueError, match="job_type 'note' has a renderer already"):
        renderers.register("note")(generates)
    for blank in ("", "  ", "a\0", "x" * 256):
        with pytest.raises(ValueError, match="job_type"):
            renderers.register(blank)
    for wrong in (None, "text", Rendered("a", "text/plain", b"x")):
        with pytest.raises(TypeError, match="a renderer must be callable"):
            renderers.register("other")(wrong)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="a renderer must be callable"):
        Renderers(default="text")  # type: ignore[arg-type]
    assert renderers.render("note")[0].filename == "1"


def test_rendering_needs_no_database_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    services = object()
    renderers = Renderers(services=services)

    @renderers.register("note")
    async def renderer(ctx: RenderContext) -> Rendered:
        assert ctx.services is services
        assert (ctx.job_type, ctx.attempt) == ("note", 1)
        with pytest.raises(jobkit.AssetNotFound, match="no database"):
            ctx.open_asset(ctx.job_id)
        (ctx.workdir / "draft.txt").write_text("text")
        return note(body=ctx.workdir / "draft.txt")

    assert renderers.render("note") == [note(body=b"text")]
    renderers.register("broken")(lambda ctx: [note(), 1 / 0])
    with pytest.raises(ZeroDivisionError):
        renderers.render("broken")
    assert list(tmp_path.iterdir()) == []
    loops = [thread for thread in threading.enumerate() if thread.name == "jobkit-loop"]
    for thread in loops:
        thread.join(60)
    assert not any(thread.is_alive() for thread in loops)


def test_an_async_renderer_can_be_rendered_from_within_a_running_loop() -> None:
    async def caller() -> list[Rendered]:
        return rendered(gives_one_later)

    assert asyncio.run(caller())[0].filename == "1"
