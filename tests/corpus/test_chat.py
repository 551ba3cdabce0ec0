"""Chat templates: rendered as transformers renders them, or refused."""

import json
from pathlib import Path

import pytest

from tasks.corpus.chat import TemplateRefusalError, load_chat
from tasks.corpus.turns import Conversation, Turn
from tasks.errors import CorpusError
from tests.corpus.templates import CHATML_TOKENS, LLAMA2, NO_SYSTEM, QWEN25, TEMPLATES, write_named, write_tokenizer

ASKED = (Turn("user", "你好 "), Turn("assistant", "<b>你好</b>！"))
CONVERSATIONS: list[Conversation] = [
    ASKED,
    (*ASKED, Turn("user", "再见"), Turn("assistant", "<think>\n嗯\n</think>\n\n再见！")),
    (Turn("system", "简短"), *ASKED),
]


def test_chatml_is_used_where_there_is_no_template(tmp_path: Path) -> None:
    chat = load_chat(write_tokenizer(tmp_path, None))
    assert chat.render(ASKED) == "<|im_start|>user\n你好 <|im_end|>\n<|im_start|>assistant\n<b>你好</b>！<|im_end|>\n"
    assert chat.render(ASKED[:1], add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chatml"])
def test_a_template_gives_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_named(tmp_path, name)
    chat, reference = load_chat(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for conversation in CONVERSATIONS[: 2 if name in NO_SYSTEM else 3]:
        for turns, asks in ((conversation, False), (conversation[:-1], True)):
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
            if name == "llama 3":  # transformers writes the day; an example must not depend on it
                expected = expected.replace(expected.split("Today: ")[1].split("<|eot_id|>")[0], "26 Jul 2024", 1)
            assert chat.render(turns, add_generation_prompt=asks) == expected


def test_a_template_in_the_configuration_is_found_too(tmp_path: Path) -> None:
    for number, value in enumerate((QWEN25, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": QWEN25}])):
        folder = write_tokenizer(tmp_path / str(number), None, CHATML_TOKENS, {"eos_token": "<|im_end|>", "chat_template": value})
        assert load_chat(folder).render(ASKED).startswith("<|im_start|>system\n你是助手。")


def test_a_refusal_of_the_template_is_passed_on(tmp_path: Path) -> None:
    chat = load_chat(write_named(tmp_path, "llama 2"))
    with pytest.raises(TemplateRefusalError, match="no system turn, please"):
        chat.render((Turn("system", "简短"), *ASKED))


def test_a_template_runs_in_the_sandbox(tmp_path: Path) -> None:
    chat = load_chat(write_tokenizer(tmp_path, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"))
    with pytest.raises(TemplateRefusalError, match="refuses"):
        chat.render(ASKED)


def test_a_file_that_asks_to_cut_texts_is_not_obeyed(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, None) / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(settings))
    assert len(load_chat(tmp_path).tokenizer.encode("abcdef", add_special_tokens=False).ids) == 6


def test_padding_is_the_pad_token_or_the_end_of_document(tmp_path: Path) -> None:
    assert load_chat(write_named(tmp_path / "a", "qwen2.5")).padding_id == 256  # <|endoftext|>
    assert load_chat(write_named(tmp_path / "b", "zephyr")).padding_id == 257  # </s>
    assert load_chat(write_named(tmp_path / "c", "chatml")).vocab_size == 256 + 3 + 2


def test_a_tokenizer_that_holds_no_conversation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no chat template, and no special token <\|im_start\|> or <\|im_end\|>"):
        load_chat(write_tokenizer(tmp_path / "a", None, ("</s>",)))
    with pytest.raises(CorpusError, match="neither a pad_token nor an eos_token"):
        load_chat(write_tokenizer(tmp_path / "b", LLAMA2, ("</s>",), {"eos_token": "<end>"}))
    with pytest.raises(CorpusError, match="the chat template cannot be read"):
        load_chat(write_tokenizer(tmp_path / "c", "{% for %}"))
    with pytest.raises(CorpusError, match=r"tokenizer\.json: not a tokenizer"):
        load_chat(tmp_path)
