"""Every artifact of a recipe to a report: one page for a person, and the same in short for the Prefect UI.

Reads   the manifest of every artifact that the recipe has, and evaluation.json
Writes  report.html   one self-contained page: no request, plots inside, light and dark
        report.md     its short version
        tables.json   {name: [{column: cell}...]}
        *.png         the plots
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field

from tasks.report.corpus import inline_image
from tasks.report.page import Page, page_of
from tasks.report.tables import Table
from tasks.store import Artifact, Built, Spec, Work, stage

TEMPLATES = Path(__file__).parent
MAIN_PLOTS = ("pretrained-loss.png", "accuracy.png", "lengths.png")


class ReportSpec(Spec):
    """What the report is called."""

    title: str | None = Field(None, description="headline of the page; absent: a plain one")


@stage("report", revision=4)
def build_report(work: Work, spec: ReportSpec, **artifacts: Artifact) -> Built:
    """Write the report on the artifacts that there are, by node name; a section without its artifacts is left out."""
    page = page_of(artifacts, spec.title)
    for plot in page.plots():
        (work.folder / f"{plot.name}.png").write_bytes(plot.png)
    (work.folder / "report.html").write_text(render(page, "page.html.jinja"), encoding="utf-8")
    (work.folder / "report.md").write_text(render(page, "brief.md.jinja"), encoding="utf-8")
    (work.folder / "tables.json").write_bytes(orjson.dumps(records(page), option=orjson.OPT_INDENT_2))
    return Built(stats={"title": page.title, "num_plots": len(list(page.plots()))})


def render(page: Page, template: str) -> str:
    """The page through one of the templates beside this module."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment.get_template(template).render(page=page)


def markdown_cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table, and is no markup."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("*", "&#42;").replace("`", "&#96;")
    return " ".join(escaped.split())


def records(page: Page) -> dict[str, list[dict[str, str]]]:
    """The tables that a page has, by name, as Prefect takes a table."""
    named: Mapping[str, Table | None] = {
        "stages": page.stages,
        **page.corpus,
        "comparison": page.comparison,
        "accuracy": page.accuracy,
        "likelihood": page.likelihood,
    }
    return {name: table.records() for name, table in named.items() if table}


def prefect_markdown(report: Artifact) -> str:
    """The short version of a finished report with its main plots inside, as Prefect's UI shows them."""
    text = report.file("report.md").read_text(encoding="utf-8")
    plots = [name for name in MAIN_PLOTS if report.has_file(name)]
    images = [inline_image(name, report.file(name).read_bytes()) for name in plots]
    return "\n\n".join([text, *images])


def prefect_tables(report: Artifact) -> dict[str, list[dict[str, Any]]]:
    """The tables of a finished report, by name (lower case, as Prefect's artifact keys are)."""
    tables: dict[str, list[dict[str, Any]]] = orjson.loads(report.file("tables.json").read_bytes())
    return tables
