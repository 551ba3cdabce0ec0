"""Numbers as a person reads them."""

KILO = 1000


def count(number: float) -> str:
    """1.23 M; whole below 10,000."""
    if abs(number) < 10_000:
        return f"{number:,.0f}" if number == int(number) or abs(number) >= KILO else f"{number:.3g}"
    return _scaled(number, ("", " k", " M", " B", " T"))


def size(num_bytes: float) -> str:
    """4.5 MB, in powers of ten."""
    return f"{num_bytes:,.0f} B" if num_bytes < KILO else _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB", " PB"))


def whole(number: int) -> str:
    """1,234,567."""
    return f"{number:,}"


def share(part: float, total: float) -> str:
    """12.3%; "<0.1%" for what is there but would round to nothing; a dash where there is no total."""
    if not total:
        return "–"
    if 0 < part / total < 0.0005:
        return "<0.1%"
    return percent(part / total)


def percent(fraction: float) -> str:
    """87.3%."""
    return f"{fraction:.1%}"


def duration(seconds: float) -> str:
    """0.42 s, 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60:02d} s"
    return f"{whole_seconds // 3600} h {whole_seconds % 3600 // 60:02d} min"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    # 999,999 would round to "1000 k".
    while abs(number) >= KILO - 0.5 and power < len(units) - 1:
        number, power = number / KILO, power + 1
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{units[power]}"
