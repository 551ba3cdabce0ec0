"""A tokenizer with its chat template: turns to the text that the model is trained on and asked with.

Reads   tokenizer/tokenizer.json, tokenizer_config.json, chat_template.jinja   (the latter two where there are any)

The template is rendered here, in Jinja's sandbox, as transformers renders it, whose import costs seconds. ``strftime_now``
is not defined: an example must not depend on the day it was made, and templates fall back to a date of their own.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.corpus.turns import Conversation
from tasks.errors import CorpusError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

# For a tokenizer without a template of its own.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateRefusalError(Exception):
    """The chat template refuses a conversation, and says why."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer that can hold a conversation.

    source: the template's text. special: the tokens that no text may write, each with its id. padding_id: what fills up a row.
    """

    tokenizer: "Tokenizer"
    source: str
    template: "Template"
    named_tokens: dict[str, str]
    special: dict[str, int]
    special_pattern: re.Pattern[str]
    padding_id: int
    vocab_size: int

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The conversation as text; with the opening of the next answer where asked. Raises TemplateRefusalError."""
        from jinja2 import TemplateError

        messages: list[dict[str, Any]] = [
            {"role": turn.role, "content": turn.content, **(json.loads(turn.extra) if turn.extra else {})}
            for turn in conversation
            if turn.role != "tools"
        ]
        tools = next((json.loads(turn.content) for turn in conversation if turn.role == "tools"), None)
        try:
            return self.template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **self.named_tokens
            )
        except (TemplateError, TypeError) as error:
            raise TemplateRefusalError(f"the chat template refuses it: {error}") from error


def load_chat(folder: Path) -> Chat:
    """Load the tokenizer of ``folder``. Raises CorpusError where it cannot hold a conversation."""
    tokenizer = _load_tokenizer(folder / "tokenizer.json")
    config = _load_config(folder / "tokenizer_config.json")
    named = {name: text for name in NAMED_TOKENS if (text := _token_text(config.get(name)))}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {text: vocabulary[text] for text in named.values() if text in vocabulary}
    source = _template_source(folder, config)
    if source is None:
        _check_chatml(folder, special)
        source = CHATML
    padding = named.get("pad_token") or named.get("eos_token")
    if padding not in vocabulary:
        raise CorpusError(f"{folder}: names neither a pad_token nor an eos_token of its vocabulary; one must fill up the rows")
    return Chat(
        tokenizer,
        source,
        _compile(folder, source),
        named,
        special,
        re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))),
        vocabulary[padding],
        max(vocabulary.values()) + 1,
    )


def _load_tokenizer(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise CorpusError(f"{path}: not a tokenizer that tokenizers can read ({error}); name another tokenizer") from error
    # A file may ask to cut every text to some length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Adds nothing here, where nobody asks for special tokens; but it may tell an id's place without the blank that it writes.
    tokenizer.post_processor = None
    return tokenizer


def _load_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error}); name another tokenizer") from error
    return config if isinstance(config, dict) else {}


def _token_text(value: object) -> str | None:
    """Configurations name a token by its text, or by an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _check_chatml(folder: Path, special: dict[str, int]) -> None:
    if missing := [token for token in CHATML_TOKENS if token not in special]:
        raise CorpusError(
            f"{folder}: no chat template, and no special token {' or '.join(missing)} for ChatML; "
            "add these to the tokenizer's special tokens, or a chat_template.jinja beside it"
        )


def _compile(folder: Path, source: str) -> "Template":
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for transformers; here it stands for its body."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CorpusError(f"{folder}: the chat template cannot be read ({error}); mend it or name another tokenizer") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would read; transformers' takes these arguments.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
