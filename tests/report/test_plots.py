"""Plots: what their SVG may hold, and the same bytes every time."""

import re

from tasks.report.plots import Plot, accuracy_plot, curve_plot, inline_svg, lengths_plot, loss_plot, shards_plot


def a_loss_plot() -> Plot:
    return loss_plot("loss", "Loss", [(1, 3.0), (2, 2.0)], [(0, 3.5), (2, 2.1)], bits=0.4)


def test_a_plot_is_the_same_bytes_every_time() -> None:
    assert a_loss_plot() == a_loss_plot()


def test_an_svg_takes_its_colors_and_font_from_the_page() -> None:
    svg = a_loss_plot().svg
    assert "var(--first)" in svg
    assert "var(--second)" in svg
    assert "var(--font)" in svg
    assert "DejaVu" not in svg
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svg) == []


def test_an_svg_fills_the_width_that_the_page_gives_it() -> None:
    head = re.match(r"<svg[^>]*>", a_loss_plot().svg)
    assert head
    assert "viewBox" in head[0]
    assert not re.search(r'\s(width|height)="', head[0])


def test_a_loss_that_falls_far_has_an_axis_on_which_its_end_is_seen() -> None:
    def ticks(last: float) -> set[str]:
        svg = loss_plot("loss", "Loss", [(1, 11.0), (100, last)], [], bits=None).svg
        return set(re.findall(r">([\d.]+)</text>", svg))

    assert {"0.1", "1", "10"} <= ticks(0.05)
    assert {"4", "6", "8", "10"} <= ticks(2.0)


def test_ids_of_two_plots_differ() -> None:
    first = curve_plot("a", "A", "a", [(1, 1.0), (2, 3.0)]).svg
    second = curve_plot("b", "B", "b", [(1, 1.0), (2, 3.0)]).svg
    clips = [set(re.findall(r'<clipPath id="([^"]*)"', svg)) for svg in (first, second)]
    assert clips[0]
    assert not clips[0] & clips[1]


def test_a_file_becomes_a_part_of_a_page() -> None:
    document = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x" "http://a/b">\n<svg width="1pt" height="2pt" viewBox="0 0 1 2"></svg>'
    )
    assert inline_svg(document) == '<svg viewBox="0 0 1 2"></svg>'


def test_the_words_for_those_who_do_not_see_it_tell_both_ends() -> None:
    assert a_loss_plot().alt == "Loss: train from 3 at step 1 to 2 at step 2; validation from 3.5 at step 0 to 2.1 at step 2"
    told = accuracy_plot({"finetuned": (0.861, (0.84, 0.88))}, 0.536).alt
    assert told == "finetuned 86.1%; majority baseline 53.6%"


def test_every_plot_is_a_png_too() -> None:
    plots = [
        lengths_plot({"1": 3, "2": 8}),
        shards_plot([5_000_000, 100], []),
        shards_plot([10], [3]),
        loss_plot("one", "One", [], [(0, 1.0)], bits=None),
        curve_plot("rate", "Rate", "tokens per second", [(1, 5000.0)], from_zero=True),
    ]
    assert all(plot.png.startswith(b"\x89PNG") for plot in plots)


def test_ten_thousand_shards_are_one_outline() -> None:
    assert shards_plot([1000] * 10_000, [10]).svg.count("<path") < 30
