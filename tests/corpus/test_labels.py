"""What is learned of a conversation, on templates of every kind, and the proof of it against planted mistakes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from tasks.corpus.chat import Chat, load_chat
from tasks.corpus.labels import Rendered, make_examples, render
from tasks.corpus.proof import Claim, Proof
from tasks.corpus.turns import Conversation, Turn
from tasks.errors import CorpusError
from tasks.schemas import IGNORED_LABEL
from tests.corpus.templates import QWEN3, TEMPLATES, write_named, write_tokenizer

TWO_TURNS = (Turn("user", "你好"), Turn("assistant", "你好！"), Turn("user", "再见"), Turn("assistant", "再见。"))


def learned_turns(rendered: Rendered) -> tuple[int, ...]:
    return tuple(answer.turn for answer in rendered.answers)


def learned(chat: Chat, conversation: Conversation) -> list[str]:
    """The text of every run of labels, after the proof has passed."""
    rendered = render(chat, conversation)
    (example,) = make_examples(chat, [rendered])
    Proof(chat, "here").prove_example(example.input_ids, example.labels, Claim(1, conversation, learned_turns(rendered)))
    marks = example.labels != IGNORED_LABEL
    borders = np.flatnonzero(np.diff(marks, prepend=False, append=False)).reshape(-1, 2)
    return [chat.tokenizer.decode(example.labels[a:b].tolist(), skip_special_tokens=False) for a, b in borders]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("chatml", ["你好！<|im_end|>", "再见。<|im_end|>"]),
        ("qwen2.5", ["你好！<|im_end|>", "再见。<|im_end|>"]),
        ("qwen3", ["你好！<|im_end|>", "再见。<|im_end|>"]),
        ("asks with a thought", ["你好！<|im_end|>", "再见。<|im_end|>"]),
        ("llama 3", ["你好！<|eot_id|>", "再见。<|eot_id|>"]),
        ("zephyr", ["你好！</s>", "再见。</s>"]),
        ("mistral", [" 你好！</s>", " 再见。</s>"]),  # the blanks that the model is not asked with it has to write
        ("gemma", ["你好！<end_of_turn>", "再见。<end_of_turn>"]),
        ("own", ["你好！</turn>", "再见。</turn>"]),
        ("llama 2", [" 你好！ </s>", " 再见。 </s>"]),
    ],
)
def test_the_words_and_their_end_marker_are_learned_and_nothing_else(tmp_path: Path, name: str, runs: list[str]) -> None:
    assert learned(load_chat(write_named(tmp_path, name)), TWO_TURNS) == runs


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_the_whole_text(tmp_path: Path, name: str) -> None:
    chat = load_chat(write_named(tmp_path, name))
    rendered = render(chat, TWO_TURNS)
    (example,) = make_examples(chat, [rendered])
    assert example.input_ids.tolist() == chat.tokenizer.encode(rendered.text, add_special_tokens=False).ids
    assert example.input_ids.dtype == example.labels.dtype == np.int32


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_that_tells_its_ids_places_without_their_blanks_learns_the_same(tmp_path: Path, name: str) -> None:
    untrimmed = load_chat(write_named(tmp_path / "untrimmed", name))
    write_named(tmp_path, name)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert learned(load_chat(tmp_path), TWO_TURNS) == learned(untrimmed, TWO_TURNS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_equal_to_the_question_is_told_from_it(tmp_path: Path, name: str) -> None:
    chat = load_chat(write_named(tmp_path, name))
    same = (Turn("user", "好的"), Turn("assistant", "好的"), Turn("user", "好的"), Turn("assistant", "好的"))
    rendered = render(chat, same)
    assert [rendered.text.count("好的", 0, answer.start) for answer in rendered.answers] == [1, 3]
    assert len(learned(chat, same)) == 2


@pytest.mark.parametrize("words", ["assistant", "user", "think", "<think>", "im_end", "<|", "\n".join("ab"), "！" * 50])
@pytest.mark.parametrize("name", TEMPLATES)
def test_words_that_look_like_the_template_are_words(tmp_path: Path, name: str, words: str) -> None:
    chat = load_chat(write_named(tmp_path, name))
    (run,) = learned(chat, (Turn("user", words), Turn("assistant", words)))
    assert run.lstrip().startswith(words)


def test_words_that_are_what_stands_in_for_words_are_words(tmp_path: Path) -> None:
    chat = load_chat(write_named(tmp_path, "chatml"))
    words = "\ue0b51\ue0b6"
    assert learned(chat, (Turn("user", f"{words}user"), Turn("assistant", words))) == [f"{words}<|im_end|>"]


def test_an_empty_thought_that_the_template_puts_in_is_not_learned(tmp_path: Path) -> None:
    chat = load_chat(write_named(tmp_path, "qwen3"))
    assert "<think>\n\n</think>\n\n再见。" in render(chat, TWO_TURNS).text
    assert learned(chat, TWO_TURNS)[-1] == "再见。<|im_end|>"


def test_a_thought_of_the_assistants_own_is_learned_where_it_stands_in_the_text(tmp_path: Path) -> None:
    thought = (Turn("user", "一加一"), Turn("assistant", "<think>\n想\n</think>\n\n二"))
    for name in ("qwen3", "asks with a thought"):
        chat = load_chat(write_named(tmp_path / name.replace(" ", "-"), name))
        assert learned(chat, thought) == ["<think>\n想\n</think>\n\n二<|im_end|>"]


def test_an_earlier_answer_that_the_template_rewrites_is_counted_and_not_learned(tmp_path: Path) -> None:
    chat = load_chat(write_named(tmp_path, "qwen3"))
    thought = (Turn("user", "一加一"), Turn("assistant", "<think>\n想\n</think>\n\n二"), *TWO_TURNS[2:])
    assert render(chat, thought).num_rewritten == 1
    assert learned(chat, thought) == ["再见。<|im_end|>"]


def test_words_in_another_unicode_form_are_learned_as_the_tokenizer_sees_them(tmp_path: Path) -> None:
    chat = load_chat(write_named(tmp_path, "chatml"))
    assert learned(chat, (Turn("user", "e\u0301"), Turn("assistant", "cafe\u0301"))) == ["café<|im_end|>"]


def test_an_id_that_reaches_from_the_prompt_into_the_words_is_cut_there(tmp_path: Path) -> None:
    # Ċ is the byte-level letter of a line feed: this merge joins the header's last character with the word's first.
    chat = load_chat(write_tokenizer(tmp_path, None, merges=(("Ċ", "X"),)))
    assert len(chat.tokenizer.encode("\nX", add_special_tokens=False).ids) == 1
    conversation = (Turn("user", "问"), Turn("assistant", "X"), Turn("user", "X"), Turn("assistant", "Xa"))
    assert learned(chat, conversation) == ["X<|im_end|>", "Xa<|im_end|>"]


def test_a_template_that_closes_no_answer_is_refused(tmp_path: Path) -> None:
    chat = load_chat(write_tokenizer(tmp_path, "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"))
    with pytest.raises(CorpusError, match="no special token closes the answer '你好！'; the model could not learn to stop"):
        render(chat, TWO_TURNS)


def test_a_template_that_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(CorpusError, match=r"does not open an answer with '<\|im_start\|>assistant' when asked to"):
        render(load_chat(write_tokenizer(tmp_path, template)), TWO_TURNS)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return load_chat(write_tokenizer(tmp_path_factory.mktemp("qwen3"), QWEN3))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip).filter(bool)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_any_text_passes_the_proof(qwen3: Chat, pairs: list[tuple[str, str]]) -> None:
    turns = [turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said))]
    assert len(learned(qwen3, tuple(turns))) == len(pairs)
