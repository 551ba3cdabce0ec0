"""The users' recipe as a program: what Happy-LLM's chapter 6 and Transformers' run_clm.py do before they train.

Reads   ARCHIVE                a .jsonl.tar.bz2, one ``{"text": ...}`` a line
Writes  FOLDER/unpacked        the JSONL; `tar -xjf` with the system's bzip2
        FOLDER/cache           what `datasets` keeps: the text, the tokens, the blocks

`python -m benchmarks.recipe ARCHIVE FOLDER --tokenizer DIR --workers 2`, as corpus_vs_recipe runs it. The two functions given
to `map` are theirs, word for word; only the number of processes is this machine's (theirs is 10).
"""

import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.process_tree import Phases, read_program

BLOCK_SIZE = 2048
GROUP_BATCH_SIZE = 40_000


def main() -> None:
    told = read_program(__doc__)
    from datasets import load_dataset
    from transformers import AutoTokenizer

    phases = Phases()
    with phases.phase("unpack"):
        unpacked = unpack(told.archive, told.folder / "unpacked")
    with phases.phase("load"):
        cache = str(told.folder / "cache")
        corpus = load_dataset("json", data_files=str(unpacked), cache_dir=cache, split="train")
    with phases.phase("tokenize"):
        tokenizer = AutoTokenizer.from_pretrained(str(told.tokenizer))
        assert tokenizer.is_fast, "the recipe is measured with the fast tokenizer"

        def tokenize_function(examples: dict[str, Any]) -> Any:
            return tokenizer(list(examples["text"]))

        tokens = corpus.map(tokenize_function, batched=True, num_proc=told.workers, remove_columns=corpus.column_names)
    with phases.phase("group"):
        blocks = tokens.map(group_texts, batched=True, num_proc=told.workers, batch_size=GROUP_BATCH_SIZE)
    phases.tell(num_documents=len(corpus), num_blocks=len(blocks), columns=blocks.column_names)


def unpack(archive: Path, folder: Path) -> Path:
    """Extract all of the archive, as users do; returns its one file."""
    folder.mkdir()
    subprocess.run(["tar", "-xjf", str(archive), "-C", str(folder)], check=True)
    (found,) = (path for path in folder.rglob("*") if path.is_file())
    return found


def group_texts(examples: dict[str, Any]) -> dict[str, Any]:
    """Concatenate every column of a map batch, cut it into rows of BLOCK_SIZE and drop the remainder (run_clm.py)."""
    concatenated_examples = {k: list(chain(*examples[k])) for k in examples}
    total_length = len(concatenated_examples[next(iter(examples.keys()))])
    total_length = (total_length // BLOCK_SIZE) * BLOCK_SIZE
    result = {k: [t[i : i + BLOCK_SIZE] for i in range(0, total_length, BLOCK_SIZE)] for k, t in concatenated_examples.items()}
    result["labels"] = result["input_ids"].copy()
    return result


if __name__ == "__main__":
    main()
