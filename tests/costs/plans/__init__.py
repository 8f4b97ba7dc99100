"""How each hot statement reads tables, as somebody has looked at it: a text for each database."""

from __future__ import annotations

from pathlib import Path


def kept(dialect: str) -> Path:
    """The text for a database."""
    return Path(__file__).parent / f"{dialect}.txt"
