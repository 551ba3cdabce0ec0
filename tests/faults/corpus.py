"""A small corpus written here, and the specs of every corpus stage over it: 13 shards a stage, a second or two in all."""

import bz2
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.examples import ExamplesSpec, build_examples
from tasks.corpus.tokenizer import TokenizerSpec, TokenizerTrainingSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, digest_file
from tests.corpus.archives import tar_of_one

NUM_DOCUMENTS, NUM_CONVERSATIONS = 2_000, 120
NODES = ("archive", "documents", "tokenizer", "tokens", "blocks", "conversations", "examples")

Pool = Literal["threads", "processes"]

SEASONS = ("spring", "summer", "autumn", "winter")
WHO = ("the ferryman", "a schoolteacher", "两个木匠", "the miller's dog", "卖花的人", "an old sailor", "邻居家的孩子")
DID = ("counted the boats", "把灯挂在门口", "wrote a long letter", "在桥上等了一夜", "mended the nets", "种下一棵梨树")


def document(i: int) -> str:
    """The i-th text: one to seven sentences, no two texts the same."""
    said = [f"In {SEASONS[(i + k) % 4]} {WHO[(i * 3 + k) % 7]} {DID[(i // 5 + k * 2) % 6]}." for k in range(1 + i % 7)]
    return f"No. {i}: " + " ".join(said)


def json_lines(num_documents: int = NUM_DOCUMENTS) -> bytes:
    """Documents one a line, a bad line and a blank one among them."""
    lines = [json.dumps({"text": document(i)}, ensure_ascii=False) for i in range(num_documents)]
    return "\n".join([*lines[:7], '{"text": ', "", *lines[7:], ""]).encode()


def conversations() -> bytes:
    turns = [[("human", f"{document(i)} Who?"), ("assistant", WHO[i * 3 % 7])] for i in range(NUM_CONVERSATIONS)]
    rows = [{"conversations": [{"from": role, "value": value} for role, value in pair]} for pair in turns]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Sources:
    """Where the published bytes are: each a URL or a path."""

    corpus: str
    conversations: str

    @classmethod
    def write(cls, folder: Path) -> "Sources":
        """Write both as files."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "corpus").write_bytes(bz2.compress(tar_of_one(json_lines()), 1))
        (folder / "conversations").write_bytes(conversations())
        return cls(str(folder / "corpus"), str(folder / "conversations"))


def build_node(name: str, store: ArtifactStore, machine: Machine, sources: Sources, had: dict[str, Artifact]) -> Artifact:
    """Find or build one of NODES; ``had`` holds those before it."""
    if name == "archive":
        return build_archive(store, machine, ArchiveSpec(url=sources.corpus))
    if name == "documents":
        return build_documents(store, machine, DocumentsSpec(validation_fraction=0.1, shard_bytes=49_152), archive=had["archive"])
    if name == "tokenizer":
        training = TokenizerTrainingSpec(vocab_size=320, max_bytes=20_000)
        return build_tokenizer(store, machine, TokenizerSpec(train=training), documents=had["documents"])
    if name == "tokens":
        return build_tokens(store, machine, TokensSpec(), documents=had["documents"], tokenizer=had["tokenizer"])
    if name == "blocks":
        return build_blocks(store, machine, BlocksSpec(block_size=64), tokens=had["tokens"])
    if name == "conversations":
        return build_archive(
            store, machine, ArchiveSpec(url=sources.conversations, sha256=digest_file(Path(sources.conversations)))
        )
    spec = ExamplesSpec(block_size=256, validation_fraction=0.1)
    return build_examples(store, machine, spec, conversations=had["conversations"], tokenizer=had["tokenizer"])


def build_all(store: ArtifactStore, machine: Machine, sources: Sources, until: str = NODES[-1]) -> dict[str, Artifact]:
    """Find or build the nodes up to ``until``, in order."""
    had: dict[str, Artifact] = {}
    for name in NODES[: NODES.index(until) + 1]:
        had[name] = build_node(name, store, machine, sources, had)
    return had
