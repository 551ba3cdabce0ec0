"""The proof of the mask against the mistakes that trainers have made: each, planted, stops the build with the line.

Mistakes of a single example are planted into a packed row under templates of every kind, and into the maker of labels of a
build; those of rows into the filling of rows. Without a mistake all pass.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tasks.corpus import examples, packing
from tasks.corpus.chat import load_chat
from tasks.corpus.examples import ExamplesSpec, build_examples
from tasks.corpus.labels import Example, make_examples, render
from tasks.corpus.packing import fill_row
from tasks.corpus.proof import Claim, Proof
from tasks.corpus.turns import Role, Turn
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import IGNORED_LABEL
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage
from tests.corpus.templates import TEMPLATES, write_named

Ids = np.ndarray
Mistake = Callable[[Ids, Ids, list[slice]], tuple[Ids, Ids]]

BLOCK_SIZE = 512
# On line 3 stands the one with which mistakes are made; its question is its answer, and so is its second.
LINES = [["甲乙", "丙丁"], ["一", "二三", "四", "五六"], ["好的", "好的", "好的", "好的"], ["子丑", "寅卯辰"]]
WRONG_LINE = 3


class NameSpec(Spec):
    name: str


@stage("tokenizer", revision=1)
def build_named_tokenizer(work: Work, spec: NameSpec) -> Built:
    write_named(work.folder, spec.name)
    return Built()


@stage("archive", revision=1)
def build_lines(work: Work, spec: NameSpec) -> Built:
    names = ("human", "assistant")
    listed = [[{"from": names[n % 2], "value": said} for n, said in enumerate(turns)] for turns in LINES]
    (work.folder / "archive").write_text("".join(json.dumps({"conversations": turns}) + "\n" for turns in listed))
    return Built()


def build(root: Path, name: str) -> Artifact:
    store = ArtifactStore(root)
    inputs = {
        "conversations": build_lines(store, Machine(), NameSpec(name="lines")),
        "tokenizer": build_named_tokenizer(store, Machine(), NameSpec(name=name)),
    }
    return build_examples(store, Machine(), ExamplesSpec(block_size=BLOCK_SIZE), **inputs)


# Mistakes: ids, labels and the runs that are rightly learned, to ids and labels


def keep(ids: Ids, marks: Ids) -> tuple[Ids, Ids]:
    return ids, np.where(marks, ids, IGNORED_LABEL)


def marked(ids: Ids, runs: list[slice]) -> Ids:
    marks = np.zeros(len(ids), bool)
    for run in runs:
        marks[run] = True
    return marks


def labels_are_the_pad_id(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return ids, np.where(labels == IGNORED_LABEL, 256, labels)


def one_to_the_left(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.start - 1, run.stop - 1) for run in runs]))


def one_to_the_right(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.start + 1, run.stop + 1) for run in runs]))


def shifted_as_the_model_shifts(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return ids, np.append(labels[1:], np.int32(IGNORED_LABEL))


def begins_one_early(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.start - 1, run.stop) for run in runs]))


def begins_one_late(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.start + 1, run.stop) for run in runs]))


def end_marker_is_not_learned(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.start, run.stop - 1) for run in runs]))


def last_end_marker_is_not_learned(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [*runs[:-1], slice(runs[-1].start, runs[-1].stop - 1)]))


def end_marker_alone(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.stop - 1, run.stop) for run in runs]))


def prompt_is_learned(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return ids, ids.copy()


def first_prompt_is_learned(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(0, runs[0].stop), *runs[1:]]))


def role_header_is_learned(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, [slice(run.start - 3, run.stop) for run in runs]))


def question_instead_of_answer(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    """What the user says, which reads as the answer does, up to whatever stands behind it."""
    answer = ids[runs[0]][:-1]
    places = [n for n in range(runs[0].start) if np.array_equal(ids[n : n + len(answer)], answer)]
    size = runs[0].stop - runs[0].start
    return keep(ids, marked(ids, [slice(places[0], places[0] + size), *runs[1:]] if places else runs[1:]))


def answer_is_cut(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    end = runs[-1].stop - 3
    return ids[:end], labels[:end]


def answer_is_cut_inside(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    kept = np.ones(len(ids), bool)
    kept[runs[0].stop - 3 : runs[0].stop - 1] = False
    return ids[kept], labels[kept]


def answer_stands_twice(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    end = runs[0].stop
    return np.concatenate([ids[:end], ids[runs[0]], ids[end:]]), np.concatenate([labels[:end], labels[runs[0]], labels[end:]])


def answer_stands_twice_learned_once(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    end, unlearned = runs[0].stop, np.full_like(labels[runs[0]], IGNORED_LABEL)
    return np.concatenate([ids[:end], ids[runs[0]], ids[end:]]), np.concatenate([labels[:end], unlearned, labels[end:]])


def another_answer(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    ids, labels = ids.copy(), labels.copy()
    other = slice(runs[0].stop - 3, runs[0].stop - 1)
    ids[other] = labels[other] = ids[other][::-1]
    return ids, labels


def question_is_another(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    ids = ids.copy()
    place = runs[1].start - 30 if runs[1].start > 40 else runs[0].start // 2
    ids[place] = ids[place] ^ 1
    return ids, labels


def first_answer_is_forgotten(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return keep(ids, marked(ids, runs[1:]))


def nothing_is_learned(ids: Ids, labels: Ids, runs: list[slice]) -> tuple[Ids, Ids]:
    return ids, np.full_like(labels, IGNORED_LABEL)


MISTAKES: list[Mistake] = [
    labels_are_the_pad_id, one_to_the_left, one_to_the_right, shifted_as_the_model_shifts, begins_one_early, begins_one_late,
    end_marker_is_not_learned, last_end_marker_is_not_learned, end_marker_alone, prompt_is_learned, first_prompt_is_learned,
    role_header_is_learned, question_instead_of_answer, answer_is_cut, answer_is_cut_inside, answer_stands_twice,
    answer_stands_twice_learned_once, another_answer, question_is_another, first_answer_is_forgotten, nothing_is_learned,
]  # fmt: skip


def runs_of(labels: Ids) -> list[slice]:
    borders = np.flatnonzero(np.diff(labels != IGNORED_LABEL, prepend=False, append=False)).reshape(-1, 2)
    return [slice(int(a), int(b)) for a, b in borders]


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_a_mistake_every_answer_is_proven(tmp_path: Path, name: str) -> None:
    stats = build(tmp_path, name).stats
    assert (stats["num_examples"], stats["num_answers_proven"]) == (4, 6)


class Right(NamedTuple):
    """Examples of LINES with a proof that they pass."""

    proof: Proof
    examples: list[Example]
    claims: list[Claim]


@pytest.fixture(scope="module", params=TEMPLATES)
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Right:
    chat = load_chat(write_named(tmp_path_factory.mktemp("tokenizer"), request.param))
    roles: tuple[Role, ...] = ("user", "assistant")
    conversations = [tuple(Turn(roles[n % 2], said) for n, said in enumerate(turns)) for turns in LINES]
    rendered = [render(chat, conversation) for conversation in conversations]
    learned = [tuple(answer.turn for answer in one.answers) for one in rendered]
    claims = [Claim(n, *told) for n, told in enumerate(zip(conversations, learned, strict=True), 1)]
    return Right(Proof(chat, "conversations"), make_examples(chat, rendered), claims)


def row_of(made: list[Example], padding_id: int) -> tuple[Ids, Ids, Ids]:
    row = tuple(np.full(2 * BLOCK_SIZE, value, np.int32) for value in (padding_id, IGNORED_LABEL, 0))
    fill_row([(one.input_ids, one.labels != IGNORED_LABEL) for one in made], *row)
    at = 0
    for one in made:  # a label that is not the id at its place, too
        row[1][at : at + len(one.labels)] = one.labels
        at += len(one.labels)
    return row[0], row[1], row[2]


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_mistake_in_one_example_of_a_row_is_found_under_every_template(right: Right, mistake: Mistake | None) -> None:
    made, one = list(right.examples), right.examples[WRONG_LINE - 1]
    if mistake is None:
        counts = right.proof.prove_row(*row_of(made, right.proof.chat.padding_id), right.claims)
        assert (counts["num_examples_proven"], counts["num_answers_proven"]) == (4, 6)
        return
    made[WRONG_LINE - 1] = Example(*mistake(one.input_ids, one.labels, runs_of(one.labels)))
    with pytest.raises(CorpusError, match=rf"^conversations: line {WRONG_LINE}: (labels|ids): .*⟦"):
        right.proof.prove_row(*row_of(made, right.proof.chat.padding_id), right.claims)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_label_maker_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    def mistaken(chat: Any, rendered: Any) -> list[Example]:
        made = real(chat, rendered)
        one = made[WRONG_LINE - 1]
        made[WRONG_LINE - 1] = Example(*mistake(one.input_ids, one.labels, runs_of(one.labels)))
        return made

    real = examples.make_examples
    monkeypatch.setattr(examples, "make_examples", mistaken)
    monkeypatch.setattr(examples, "FIRST_LOOK", 0)  # so that the rows, as they were written, must show it
    with pytest.raises(CorpusError, match=rf"^conversations: line {WRONG_LINE}: (labels|ids): .*⟦"):
        build(tmp_path, "qwen3")


# Mistakes of rows: what fill_row has put there, and where its examples begin


def padding_is_learned(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    labels[starts[-1] :] = input_ids[starts[-1] :]


def positions_run_on(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    position_ids[:] = np.arange(len(position_ids))


def one_border_is_gone(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    position_ids[starts[1] : starts[2]] += position_ids[starts[1] - 1] + 1


def a_border_is_one_late(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    position_ids[starts[1] : starts[2]] -= 1
    position_ids[starts[1]] = starts[1]


def examples_change_places(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    middle, size = starts[1], starts[2]
    for column in (input_ids, labels, position_ids):
        column[:size] = np.concatenate([column[middle:size], column[:middle]])


def labels_change_places(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    labels[: starts[2]] = np.concatenate([labels[starts[1] : starts[2]], labels[: starts[1]]])


def an_example_stands_twice(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    free, size = starts[-1], starts[1]
    for column in (input_ids, labels, position_ids):
        column[free : free + size] = column[:size]
    position_ids[free + size :] = np.arange(len(position_ids) - free - size)


def the_last_example_is_lost(starts: list[int], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    input_ids[starts[-2] :] = input_ids[-1]
    labels[starts[-2] :] = IGNORED_LABEL
    position_ids[starts[-2] :] = np.arange(len(position_ids) - starts[-2])


@pytest.mark.parametrize(
    "mistake",
    [
        padding_is_learned, positions_run_on, one_border_is_gone, a_border_is_one_late, examples_change_places,
        labels_change_places, an_example_stands_twice, the_last_example_is_lost,
    ],
)  # fmt: skip
def test_a_mistake_in_a_row_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[list[int], Ids, Ids, Ids], None]
) -> None:
    def mistaken(filled: list[tuple[Ids, Ids]], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
        real(filled, input_ids, labels, position_ids)
        starts = np.cumsum([0, *(len(ids) for ids, _ in filled)]).tolist()
        assert len(starts) == 5
        assert starts[-1] + starts[1] < BLOCK_SIZE
        mistake(starts, input_ids, labels, position_ids)

    real = packing.fill_row
    monkeypatch.setattr(packing, "fill_row", mistaken)
    with pytest.raises(CorpusError, match=r"^conversations: line \d: (labels|ids|positions): "):
        build(tmp_path, "chatml")
