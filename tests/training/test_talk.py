"""Conversations with a tiny model."""

from pathlib import Path

import pytest

from tasks.errors import RecipeError
from tasks.training.generate import LanguageModel, load_language_model
from tasks.training.talk import Talk, fitted
from tests.training.tiny import NUM_POSITIONS, save_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    # Short, so that a conversation fits the model's 64 positions: <user>...<end>
    template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}a"
    return load_language_model(save_tiny_model(tmp_path_factory.mktemp("model"), chat_template=template))


def test_a_turn_is_asked_with_all_that_was_said_before(loaded: LanguageModel) -> None:
    talk = Talk(loaded, system="S")
    first = "".join(talk.ask("hi", max_new_tokens=4))
    assert talk.turns == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]
    ids, kept = fitted(loaded, talk.opening, [*talk.turns, {"role": "user", "content": "so"}], 4)
    assert loaded.decode(ids, special=True) == f"sS<|im_end|>uhi<|im_end|>a{first}<|im_end|>uso<|im_end|>a"
    assert len(kept) == 3


def test_an_answer_that_is_left_half_way_is_remembered_as_far_as_it_was_heard(loaded: LanguageModel) -> None:
    talk = Talk(loaded)
    pieces = talk.ask("hi", max_new_tokens=30, temperature=2.0, seed=1)
    heard = next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # a generator
    assert talk.turns[-1] == {"role": "assistant", "content": heard}
    talk.reset()
    assert talk.turns == []


def test_the_earliest_questions_are_forgotten_where_positions_run_out_but_never_the_system_turn(loaded: LanguageModel) -> None:
    talk = Talk(loaded, system="S")
    talk.turns = [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "y" * 20}] * 2
    ids, kept = fitted(loaded, talk.opening, [*talk.turns, {"role": "user", "content": "so"}], 4)
    assert [turn["content"] for turn in kept] == ["x" * 20, "y" * 20, "so"]
    assert len(ids) + 4 <= NUM_POSITIONS
    assert loaded.decode(ids, special=True).startswith("sS<|im_end|>ux")
    list(talk.ask("so", max_new_tokens=4))
    assert talk.num_forgotten == 2


def test_a_question_longer_than_the_model_is_refused_and_forgotten(loaded: LanguageModel) -> None:
    talk = Talk(loaded)
    with pytest.raises(RecipeError, match="chat: 83 tokens, the model has 64 positions; say it in fewer words"):
        list(talk.ask("x" * 80, max_new_tokens=4))
    assert talk.turns == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("turns", [["u" * 80, "a"], ["a"]])
def test_a_system_turn_that_leaves_no_room_is_refused_whatever_stands_behind_it(loaded: LanguageModel, turns: list[str]) -> None:
    said = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=False)]
    with pytest.raises(RecipeError, match="the model has 64 positions"):
        fitted(loaded, [{"role": "system", "content": "S" * 80}], said, 4)


def test_a_last_question_is_never_forgotten(loaded: LanguageModel) -> None:
    said = [{"role": "user", "content": "u" * 30}, {"role": "assistant", "content": "a" * 20}]
    _, kept = fitted(loaded, [], said, 20)
    assert kept == said


def test_what_the_template_refuses_is_said_to_be_refused(tmp_path: Path) -> None:
    strict = load_language_model(save_tiny_model(tmp_path, chat_template="{{ raise_exception('no system turn') }}"))
    with pytest.raises(RecipeError, match="the chat template refuses the conversation: no system turn; say it otherwise"):
        list(Talk(strict).ask("hi", max_new_tokens=4))
