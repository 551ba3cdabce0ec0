"""English support messages, each with the department that it is for: a task that an instruction-tuned model gets wrong in form.

Reads   support.json           sentences written for this project, by department: some to learn from, some to be asked
Writes  conversations.jsonl    OpenAI's form: a message with the question where it belongs, and the department
        held-out.jsonl         the same of sentences that stand in no conversation
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.store import Digest, digest_file, write_atomically

SENTENCES = Path(__file__).with_name("support.json")
CONVERSATIONS_NAME = "conversations.jsonl"
HELD_OUT_NAME = "held-out.jsonl"

# SHA-256 of the two files. The recipe `adapt-smollm2` states the same.
DIGESTS = {
    CONVERSATIONS_NAME: "db2eda832017bcd1e9038e5be749e5512c32334fe50e68dc34d75c50d5d4631b",
    HELD_OUT_NAME: "07f00d8e51b168790073c30384aa8eea6029658a493d51222c8f20c320f6f5fc",
}


@dataclass(frozen=True)
class SupportMessages:
    """Where the two files are."""

    conversations: Path
    held_out: Path


def build_support_messages(folder: Path) -> SupportMessages:
    """Write the two files into ``folder``, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    written = json.loads(SENTENCES.read_text(encoding="utf-8"))
    found = SupportMessages(folder / CONVERSATIONS_NAME, folder / HELD_OUT_NAME)
    for path, part in ((found.conversations, "learned"), (found.held_out, "asked")):
        write_atomically(path, b"".join(_line(row) for row in conversations(written, part)))
        digest: Digest = digest_file(path)
        assert digest == DIGESTS[path.name], f"{path}: digest {digest}, stated is {DIGESTS[path.name]}"
    return found


def conversations(written: dict[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """Every sentence of one part, dressed as people write: with each of the part's openings and endings in turn."""
    instruction = f"{written['question']} Answer with one word: {', '.join(written['departments'])}."
    dressings = list(zip(written["openings"][part], written["endings"][part], strict=True))
    for number, (opening, ending) in enumerate(dressings):
        for department, sentences in written["departments"].items():
            for place, sentence in enumerate(sentences[part]):
                before, after = (opening, ending) if (place + number) % 2 else (opening, "")
                message = " ".join(filter(None, [before, sentence, after]))
                yield _conversation(f"{instruction}\n\nMessage: {message}", department)


def _conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
