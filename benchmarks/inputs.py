"""The command line of the corpus benchmarks: an archive, a store to work in, and the stages before the one that is measured.

The stages before it are found in the store where an earlier benchmark left them, so run documents, tokenizer, tokens and
blocks in this order on one store: otherwise their memory counts too.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokenizer import TokenizerSpec, TokenizerTrainingSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore


@dataclass(frozen=True)
class Inputs:
    """What a benchmark was told on its command line."""

    store: ArtifactStore
    archive_path: Path
    num_workers: int
    tokenizer_source: str | None
    vocab_size: int
    deduplicate: bool

    @property
    def tokenizer_spec(self) -> TokenizerSpec:
        if self.tokenizer_source:
            return TokenizerSpec(source=self.tokenizer_source)
        return TokenizerSpec(train=TokenizerTrainingSpec(vocab_size=self.vocab_size))

    @property
    def documents_spec(self) -> DocumentsSpec:
        return DocumentsSpec(deduplicate=self.deduplicate)

    def archive(self) -> Artifact:
        return build_archive(self.store, Machine(), ArchiveSpec(url=str(self.archive_path)))

    def documents(self) -> Artifact:
        machine = Machine(num_workers=self.num_workers)
        return build_documents(self.store, machine, self.documents_spec, archive=self.archive())

    def tokenizer(self) -> Artifact:
        needed = {} if self.tokenizer_source else {"documents": self.documents()}
        return build_tokenizer(self.store, Machine(), self.tokenizer_spec, **needed)

    def tokens(self) -> Artifact:
        machine = Machine(num_workers=self.num_workers)
        return build_tokens(self.store, machine, TokensSpec(), documents=self.documents(), tokenizer=self.tokenizer())

    def forget(self, *kinds: str) -> None:
        """Remove the artifacts of these kinds from the store, so that they are built again."""
        for kind in kinds:
            shutil.rmtree(self.store.root / kind, ignore_errors=True)


def read_inputs(description: str | None) -> Inputs:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("archive", type=Path, help="a corpus in any form that the archive stage takes")
    parser.add_argument("--store", type=Path, required=True, help="a folder for the artifacts; keep it between benchmarks")
    parser.add_argument("--workers", type=int, default=1, help="processes, and threads of decompression")
    parser.add_argument("--tokenizer", help="a folder with a tokenizer.json; without it one is trained")
    parser.add_argument("--vocab-size", type=int, default=8_000, help="tokens of a trained tokenizer")
    parser.add_argument("--deduplicate", action="store_true", help="drop equal documents")
    told = parser.parse_args()
    store = ArtifactStore(told.store)
    return Inputs(store, told.archive, told.workers, told.tokenizer, told.vocab_size, told.deduplicate)
