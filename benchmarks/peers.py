"""A peer's tokenization as a program: datatrove's DocumentTokenizer, from the unpacked JSONL to its token files.

Reads   ARCHIVE, and TOKENIZER/tokenizer.json
Writes  FOLDER/parts           the JSONL in as many files as workers: a task of datatrove takes whole files
        FOLDER/tokens          what DocumentTokenizer keeps: one stream of ids a task and the documents' ends

datatrove has other requirements than this project, so it is run by its own Python, given to corpus_vs_recipe by
`--peer-python`: `python -m venv peer && peer/bin/pip install "datatrove[io,processing]" orjson`. Documents are not shuffled
there; the split into parts is not counted. That Python needs nothing of what this project requires.
"""

from itertools import cycle
from pathlib import Path

from benchmarks.process_tree import Phases, read_program
from benchmarks.recipe import unpack


def main() -> None:
    told = read_program(__doc__)
    # Installed in the peer's environment only.
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]

    phases = Phases()
    with phases.phase("unpack"):
        unpacked = unpack(told.archive, told.folder / "unpacked")
    split_lines(unpacked, told.folder / "parts", told.workers)
    unpacked.unlink()
    with phases.phase("tokenize"):
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(str(told.folder / "parts")),
                DocumentTokenizer(
                    str(told.folder / "tokens"),
                    tokenizer_name_or_path=str(told.tokenizer / "tokenizer.json"),
                    eos_token="<|endoftext|>",
                    shuffle_documents=False,
                ),
            ],
            tasks=told.workers,
            workers=told.workers,
            logging_dir=str(told.folder / "logs"),
            start_method="fork",  # its default, a fork server, ends without being waited for: its CPU would not count
        ).run()
    num_bytes = sum(path.stat().st_size for path in (told.folder / "tokens").rglob("*.ds"))
    phases.tell(token_file_bytes=num_bytes)


def split_lines(source: Path, folder: Path, count: int) -> None:
    """Deal the lines of ``source`` out to ``count`` files."""
    folder.mkdir()
    parts = [(folder / f"{number}.jsonl").open("wb") for number in range(count)]
    with source.open("rb") as lines:
        for line, part in zip(lines, cycle(parts), strict=False):
            part.write(line)
    for part in parts:
        part.close()


if __name__ == "__main__":
    main()
