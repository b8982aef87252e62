"""Figures and text as people read them; a missing figure is a dash."""

from __future__ import annotations

import unicodedata

NONE = "–"


def plain(text: object) -> str:
    """Text with � for control characters and lone surrogates.

    A model may write an escape sequence, which must not reach the terminal.
    """
    return "".join("�" if _is_control(character) else character for character in str(text))


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def count(value: float | None) -> str:
    """1,234,567."""
    return NONE if value is None else f"{value:,.0f}"


def decimal(value: float | None) -> str:
    """About four digits: 0.0123, 5.063, 21.59, 377.2, 12,346."""
    if value is None:
        return NONE
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.2e}"
    digits = 4 if size < 1 else max(0, 4 - len(f"{size:.0f}"))
    return f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """Three digits: 0.0001, 1.25e-05."""
    return NONE if value is None else f"{value:.3g}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.2 as 20.0%."""
    return NONE if value is None else f"{value:.{digits}%}"


def memory(value: float | None) -> str:
    """Bytes as KiB, MiB or GiB."""
    return _scale(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def macs(value: float | None) -> str:
    """Multiply-accumulates in thousands, millions (M), billions (G), trillions (T)."""
    return _scale(value, 1000, ("", "k", "M", "G", "T", "P"))


def _scale(value: float | None, base: int, units: tuple[str, ...]) -> str:
    if value is None:
        return NONE
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value, step = value / base, step + 1
    digits = 0 if step == 0 else 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f} {units[step]}".rstrip()


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 05 min."""
    if seconds is None:
        return NONE
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def change(first: float | None, last: float | None) -> str:
    """The last against the first, in percent."""
    return NONE if first is None or last is None or not first else f"{last / first - 1:+.1%}"


def span(values: list[float]) -> str:
    """The range of shares: 20% to 45%."""
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


def shorten(text: str, most: int) -> str:
    """One line of at most `most` characters."""
    text = " ".join(plain(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
