"""Make PDFs as a job would, and read them back."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pypdfium2
import pypdfium2.raw as pdfium

import jobkit
from jobkit.contrib.renderers import pdf_document

RENDERERS = jobkit.Renderers()
pdf_document.register(RENDERERS)


@dataclass(frozen=True)
class Pdf:
    """What a PDF says, page by page, and how far to the left, down and right its characters reach."""

    filename: str
    body: bytes
    pages: list[str]
    outline: list[tuple[int, str]]
    metadata: dict[str, str]
    links: list[str]
    edges: tuple[float, float, float]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pages).split())


def read(body: bytes, filename: str = "") -> Pdf:
    """Open a PDF with another library than the one that made it."""
    with pypdfium2.PdfDocument(body) as document:
        pages, links, left, bottom, right = [], [], 999.0, 999.0, 0.0
        for page in document:
            text = page.get_textpage()
            # A hyphen at a line's end comes back as U+FFFE.
            pages.append(text.get_text_range().replace("\r\n", "\n").replace("\ufffe", "-"))
            boxes = [text.get_charbox(index) for index in range(text.count_chars())]
            left = min([left, *(box[0] for box in boxes if box[2] > box[0])])
            bottom = min([bottom, *(box[1] for box in boxes)])
            right = max([right, *(box[2] for box in boxes)])
            links += _links(document, page)
        outline = [(item.level, item.get_title()) for item in document.get_toc()]
        return Pdf(filename, body, pages, outline, document.get_metadata_dict(), links, (left, bottom, right))


def _links(document: Any, page: Any) -> list[str]:
    found, position, link = [], ctypes.c_int(0), pdfium.FPDF_LINK()
    while pdfium.FPDFLink_Enumerate(page, position, link):
        if pdfium.FPDFLink_GetDest(document, link):
            found.append("inside")
            continue
        action = pdfium.FPDFLink_GetAction(link)
        size = pdfium.FPDFAction_GetURIPath(document, action, None, 0)
        buffer = ctypes.create_string_buffer(size)
        pdfium.FPDFAction_GetURIPath(document, action, buffer, size)
        found.append(buffer.value.decode())
    return found


def render(markdown: str, **fields: Any) -> Pdf:
    """The PDF of a ``pdf-document`` job with this input."""
    (file,) = RENDERERS.render("pdf-document", {"markdown": markdown, **fields})
    assert file.content_type == "application/pdf"
    assert isinstance(file.body, bytes)
    return read(file.body, file.filename)
