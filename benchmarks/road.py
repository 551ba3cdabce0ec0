"""Our road as a program: the project's stages from archive to blocks, in an empty store.

Reads   ARCHIVE, and a folder with a tokenizer.json
Writes  FOLDER                 a store with the archive, documents, tokenizer, tokens and blocks

`python -m benchmarks.road ARCHIVE FOLDER --tokenizer DIR --workers 2`, as corpus_vs_recipe runs it. The machine is the one that
`seqmill run` makes for so many workers: its pool starts with the first stage that needs it and serves them all. Hashing,
fsync, manifests, the pool's start, the tokenizer's load and the check against the reference encoder are in the phases.
"""

from benchmarks.process_tree import Phases, read_program
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore

BLOCK_SIZE = 2048


def main() -> None:
    told = read_program(__doc__)
    phases, store, machine = Phases(), ArtifactStore(told.folder), Machine(num_workers=told.workers)
    with phases.phase("archive"):
        archive = build_archive(store, machine, ArchiveSpec(url=str(told.archive)))
    with phases.phase("documents"):
        documents = build_documents(store, machine, DocumentsSpec(), archive=archive)
    with phases.phase("tokenizer"):
        tokenizer = build_tokenizer(store, machine, TokenizerSpec(source=str(told.tokenizer)))
    with phases.phase("tokens"):
        tokens = build_tokens(store, machine, TokensSpec(), documents=documents, tokenizer=tokenizer)
    with phases.phase("blocks"):
        blocks = build_blocks(store, machine, BlocksSpec(block_size=BLOCK_SIZE), tokens=tokens)
    phases.tell(
        text_bytes=_total(tokens, "num_bytes"),
        num_documents=_total(tokens, "num_documents"),
        num_tokens=_total(tokens, "num_tokens"),
        num_blocks=_total(blocks, "num_blocks"),
        num_shards=len(blocks.manifest.shards),
        blocks_bytes=blocks.num_bytes,
        content=blocks.content,
        encoders=tokens.manifest.produced_by["encoders"],
        tokens=tokens.ref,
        documents=documents.ref,
    )


def _total(artifact: Artifact, name: str) -> int:
    return sum(artifact.stats[split][name] for split in ("train", "validation"))


if __name__ == "__main__":
    main()
