"""The report stage on hand-made artifacts: whole, in part, and with text that would be markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest

from tasks.machine import Machine
from tasks.report.page import Page, page_of, readable
from tasks.report.report import ReportSpec, build_report, markdown_cell, prefect_markdown, prefect_tables
from tasks.store import Artifact, ArtifactStore
from tests.report.artifacts import FakeSpec, corpus_artifacts, evaluation, every_artifact, fake

VOID = {"meta", "link", "br"}


class Balance(HTMLParser):
    """Checks that every element is closed in its turn; keeps what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def artifacts(store: ArtifactStore) -> dict[str, Artifact]:
    return every_artifact(store)


@pytest.fixture(scope="module")
def report(store: ArtifactStore, artifacts: dict[str, Artifact]) -> Artifact:
    return build_report(store, Machine(), ReportSpec(title="Reviews & news"), **artifacts)


@pytest.fixture(scope="module")
def page(artifacts: dict[str, Artifact]) -> Page:
    return page_of(artifacts, None)


@pytest.fixture(scope="module")
def html(report: Artifact) -> str:
    return report.file("report.html").read_text(encoding="utf-8")


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_the_page_has_every_section_and_closes_every_element(html: str) -> None:
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert headings(html) == [
        "How the models do", "What they say", "Pretraining", "Finetuning", "Adapter", "Conversations", "Corpus",
        "Where it comes from",
    ]  # fmt: skip
    assert "<title>Reviews &amp; news</title>" in html


def test_the_page_asks_no_server(html: str) -> None:
    balance = Balance()
    balance.feed(html)
    assert [address for address in balance.addresses if not address.startswith(("#", "data:"))] == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import", html) == []


def test_the_headline_tells_first_and_last(page: Page) -> None:
    figures = {figure.label: (figure.before, figure.value, figure.note) for figure in page.figures}
    assert figures == {
        # 160 steps x 16 rows x 2,048 tokens
        "Tokens of pretraining": ("", "5.24 M", "160 steps"),
        "Validation loss": ("9.130", "5.027", "step 0 to 160"),
        "Bits per byte": ("3.171", "1.746", "validation split"),
        "Accuracy, finetuned": ("", "86.1%", "baseline 53.6%"),
        "Accuracy, adapter": ("", "82.7%", "baseline 53.6%"),
    }


def test_text_of_the_corpus_is_never_markup(html: str, report: Artifact) -> None:
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "便宜 &lt;b&gt;好&lt;/b&gt;" in html
    assert markdown_cell("a|b\n*c* `d` <e>") == "a&#124;b &#42;c&#42; &#96;d&#96; &lt;e>"
    assert "<b>" not in report.file("report.md").read_text(encoding="utf-8")


def test_the_short_version_has_tables_of_one_width(report: Artifact) -> None:
    text = report.file("report.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 8
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_prefect_gets_the_tables_by_keys_that_it_takes(report: Artifact) -> None:
    tables = prefect_tables(report)
    assert {"stages", "splits", "lines", "packing", "quarantined", "shard-sizes", "shards", "accuracy"} <= set(tables)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in tables)
    assert tables["stages"][1]["Made from"] == "archive"


def test_prefect_gets_the_main_plots_inside_the_text(report: Artifact) -> None:
    text = prefect_markdown(report)
    assert text.startswith("# Reviews &amp; news")
    assert re.findall(r"!\[(.*?)\]\(data:image/png;base64,iVBOR", text) == ["pretrained-loss.png", "accuracy.png", "lengths.png"]


def test_the_plots_are_files_too(report: Artifact) -> None:
    names = {entry.name for entry in report.manifest.files if entry.name.endswith(".png")}
    assert names == {
        "accuracy.png", "adapter-loss.png", "finetuned-loss.png", "gradient-norm.png", "learning-rate.png", "lengths.png",
        "pretrained-loss.png", "shards.png", "throughput.png",
    }  # fmt: skip


def test_the_same_artifacts_give_the_same_bytes(report: Artifact, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    again = build_report(ArtifactStore(tmp_path), Machine(num_workers=2), ReportSpec(title="Reviews & news"), **artifacts)
    assert again.content == report.content


def test_a_recipe_of_the_corpus_alone_has_its_sections_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    report = build_report(store, Machine(), ReportSpec(), **corpus_artifacts(store))
    html = report.file("report.html").read_text(encoding="utf-8")
    assert headings(html) == ["Corpus", "Where it comes from"]
    assert "<h1>Training report</h1>" in html


def test_a_model_alone_has_a_report(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    model = fake(store, "pretrained", FakeSpec(stats={"num_parameters": 10, "num_steps": 2}))
    report = build_report(store, Machine(), ReportSpec(), pretrained=model)
    assert headings(report.file("report.html").read_text(encoding="utf-8")) == ["Pretraining", "Where it comes from"]


def test_documents_without_a_bad_line_have_no_quarantine(tmp_path: Path, artifacts: dict[str, Artifact]) -> None:
    store = ArtifactStore(tmp_path)
    clean = fake(store, "documents", FakeSpec(stats=artifacts["documents"].stats))
    report = build_report(store, Machine(), ReportSpec(), documents=clean)
    html = report.file("report.html").read_text(encoding="utf-8")
    assert headings(html) == ["Corpus", "Where it comes from"]
    assert "Quarantined lines" not in html


def test_a_recipe_without_held_out_conversations_has_no_accuracy_plot(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    model = fake(store, "pretrained", FakeSpec(stats={"num_parameters": 10, "num_steps": 2}))
    told = fake(store, "evaluation", evaluation(5.0, None, ("甲", "乙")), model=model)
    page = page_of({"pretrained": model, "evaluation_pretrained": told}, None)
    assert page.accuracy_plot is None
    assert page.accuracy
    assert page.accuracy.rows == (("pretrained", "5.000", "1.737", "–", "–", "–"),)


def test_samples_of_one_prompt_stand_side_by_side(page: Page) -> None:
    continued, asked = page.samples
    assert (continued.prompt, continued.is_chat) == ("春天来了，", False)
    assert [model for model, _ in continued.texts] == ["pretrained", "finetuned", "adapter"]
    assert asked.is_chat


def test_a_prompt_is_read_without_its_markers_and_cut() -> None:
    assert readable("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") == "hi"
    assert readable("[INST] hi<|end|>") == "[INST] hi"
    assert readable("好" * 241) == "好" * 240 + "…"


def test_the_title_changes_the_key() -> None:
    assert ReportSpec(title="a").identity() != ReportSpec().identity()


def test_tables_json_is_json(report: Artifact) -> None:
    assert orjson.loads(report.file("tables.json").read_bytes())["lines"][0] == {
        "Lines": "documents",
        "Count": "52,850",
        "Share": "98.0%",
    }
