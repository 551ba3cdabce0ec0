"""The report's plots: each a PNG for the Prefect UI and an inline SVG whose colors follow the page, light or dark.

Text is English: matplotlib's own font has no CJK glyphs.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A color stands for a role; in the SVG it becomes the page's variable of that role. Blue against orange is told apart in
# every common form of color blindness, and in grey.
INK, MUTED, GRID, FIRST, SECOND = "#20242b", "#5d6675", "#dde1e8", "#2563c9", "#c2570c"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", FIRST: "var(--first)", SECOND: "var(--second)"}
SVG_FONT = re.compile(r"'DejaVu Sans'(, [^;\"]*)?")

MANY_TIMES = 20  # from here on a loss falls so far that on an even axis all but its first steps are one line
INCHES = (5.6, 3.1)
THOUSANDS = 1000  # from here on a number is read by its commas
PNG_DOTS_PER_INCH = 150

Point = tuple[float, float]
Draw = Callable[[Any], None]  # takes matplotlib's Axes


@dataclass(frozen=True)
class Plot:
    """A drawn plot; ``name`` is its file name without the ending."""

    name: str
    title: str
    alt: str
    png: bytes
    svg: str


def loss_plot(name: str, title: str, train: Sequence[Point], validation: Sequence[Point], bits: float | None) -> Plot:
    """Loss over steps. bits: what turns a loss into bits per byte, drawn as the right axis; None leaves that out."""

    def draw(axes: Any) -> None:
        if train:
            axes.plot(*_columns(train), color=FIRST, linewidth=1.6, label="train")
        if validation:
            axes.plot(*_columns(validation), color=SECOND, linewidth=1.6, marker="o", markersize=3.5, label="validation")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        _whole_steps(axes)
        losses = [loss for _, loss in (*train, *validation)]
        if min(losses, default=0) > 0 and max(losses) / min(losses) >= MANY_TIMES:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.tick_params(which="minor", length=0)
        _legend(axes)
        if bits:
            right = axes.secondary_yaxis("right", functions=(lambda loss: loss * bits, lambda value: value / bits))
            right.set_ylabel("bits per byte", color=MUTED)
            right.tick_params(colors=MUTED, length=0)
            right.spines["right"].set_visible(False)

    return _plot(name, title, f"{title}: {_ends('train', train)}; {_ends('validation', validation)}", draw)


def curve_plot(name: str, title: str, label: str, points: Sequence[Point], *, from_zero: bool = False) -> Plot:
    """One value over steps."""

    def draw(axes: Any) -> None:
        axes.plot(*_columns(points), color=FIRST, linewidth=1.6)
        axes.set(xlabel="step", ylabel=label)
        _whole_steps(axes)
        if from_zero:
            axes.set_ylim(bottom=0)
        if max(value for _, value in points) >= THOUSANDS:
            axes.yaxis.set_major_formatter("{x:,.0f}")

    return _plot(name, title, f"{title}: {_ends(label, points)}", draw)


def lengths_plot(histogram: Mapping[str, int]) -> Plot:
    """Documents by length. histogram: the least length of a bar (a power of two, in characters) to documents."""
    bars = sorted((int(bound), number) for bound, number in histogram.items())

    def draw(axes: Any) -> None:
        axes.bar(range(len(bars)), [number for _, number in bars], color=FIRST, width=0.86)
        step = -(-len(bars) // 8)  # more than 8 labels touch each other
        axes.set_xticks(range(0, len(bars), step), [f"{bound:,}" for bound, _ in bars[::step]])
        axes.set(xlabel="characters, from", ylabel="documents")
        axes.yaxis.set_major_formatter("{x:,.0f}")

    return _plot("lengths", "Document length", f"documents by length in {len(bars)} bars, each twice as long as the last", draw)


def shards_plot(train: Sequence[int], validation: Sequence[int]) -> Plot:
    """The size of every shard, in bytes of text."""

    def draw(axes: Any) -> None:
        top = max([*train, *validation])
        scale, unit = next((s, u) for s, u in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B")) if top >= s)
        # One outline, not one bar each: a corpus may have ten thousand shards.
        for sizes, start, color, label in ((train, 0, FIRST, "train"), (validation, len(train), SECOND, "validation")):
            if sizes:
                edges = range(start, start + len(sizes) + 1)
                axes.stairs([size / scale for size in sizes], edges, fill=True, color=color, label=label)
        axes.set(xlabel="shard", ylabel=f"text ({unit})")
        _whole_steps(axes)
        _legend(axes)

    return _plot("shards", "Shard size", f"the sizes of {len(train)} train and {len(validation)} validation shards", draw)


def accuracy_plot(accuracies: Mapping[str, tuple[float, tuple[float, float]]], majority_share: float) -> Plot:
    """Accuracy of every model with its interval, and the baseline as a line. accuracies: {model: (share, interval)}."""
    names = list(accuracies)

    def draw(axes: Any) -> None:
        shares = [accuracies[name][0] for name in names]
        errors = [[share - low, high - share] for share, (low, high) in accuracies.values()]
        axes.barh(names, [100 * share for share in shares], color=FIRST, height=0.55)
        for place, (share, error) in enumerate(zip(shares, errors, strict=True)):
            span = [[100 * error[0]], [100 * error[1]]]
            axes.errorbar(100 * share, place, xerr=span, color=INK, capsize=4, linewidth=1.4)
        axes.axvline(100 * majority_share, color=SECOND, linewidth=1.6, linestyle="--", label="majority baseline")
        axes.set(xlabel="held-out accuracy (%)", xlim=(0, 100))
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        _legend(axes)

    told = ", ".join(f"{name} {share:.1%}" for name, (share, _) in accuracies.items())
    alt = f"{told}; majority baseline {majority_share:.1%}"
    return _plot("accuracy", "Held-out accuracy", alt, draw, height=1.1 + 0.4 * len(names))


def _plot(name: str, title: str, alt: str, draw: Draw, height: float = INCHES[1]) -> Plot:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "svg.fonttype": "none",  # text stays text: the page's font, selectable
        "svg.hashsalt": name,  # ids that no other plot on the page has, the same on every run
        "svg.id": name,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(INCHES[0], height), layout="constrained")
        axes = figure.add_subplot()
        _dress(axes)
        draw(axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    return Plot(name, title, alt, png.getvalue(), inline_svg(svg.getvalue()))


def _dress(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _whole_steps(axes: Any) -> None:
    """No mark between two whole numbers."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any) -> None:
    """Above the plot, where no curve or bar comes."""
    axes.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)


def inline_svg(document: str) -> str:
    """An SVG file as a part of a page: no XML head, no fixed size, colors and font from the page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return SVG_FONT.sub("var(--font)", svg)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _ends(label: str, points: Sequence[Point]) -> str:
    if not points:
        return f"no {label}"
    return f"{label} from {points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step {points[-1][0]:g}"
