"""How long a rank takes until it has its first rows, by the number of shards; and how long the plan takes that it is given.

    python -m benchmarks.rank_start FOLDER [--shards 10 10000] [--rows 4] [--rounds 3]

Writes so many shards of blocks into FOLDER, once. A rank is a process of its own that reads a plan with all of their paths, as
the worker does; its imports, the same for any number of shards, are told apart. No shard is in the page cache of a rank that
was not there before: FOLDER's files are read once by whoever writes them, so what is measured is opening, not the disk.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import orjson
import pyarrow as pa

from benchmarks.measure import measure
from tasks.schemas import blocks_schema
from tasks.training.run import count_rows

BLOCK_SIZE = 256

RANK = """
import sys, time
started = time.perf_counter()
import orjson, torch, transformers, deepspeed
from tasks.training.datasets import training_loader
from tasks.training.order import Share
from tasks.training.rows import Rows
imported, cpu = time.perf_counter(), time.process_time()
plan = orjson.loads(open(sys.argv[1], "rb").read())
rows = Rows(plan["train_files"], plan["train_counts"])
share = Share(0, 2, 4, 1)
loader = training_loader(plan["train_files"], 1, share, 0, 1000, rows=rows)
batch = next(iter(loader))
assert batch["input_ids"].shape[0] == 4
print(len(rows), imported - started, time.perf_counter() - imported, time.process_time() - cpu)
"""


def write_shards(folder: Path, number: int, num_rows: int) -> list[Path]:
    """Shards of blocks of random ids; those that are there are kept."""
    schema = blocks_schema(BLOCK_SIZE)
    flat = pa.array(np.random.default_rng(1).integers(0, 100, num_rows * BLOCK_SIZE, np.int32))
    batch = pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, type=schema.field(0).type)], schema=schema)
    paths = [folder / f"{shard:06}" / "blocks.arrow" for shard in range(number)]
    for path in paths:
        if not path.exists():
            path.parent.mkdir(parents=True)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                writer.write_batch(batch)
    return paths


def start(folder: Path, number: int, num_rows: int) -> dict[str, float]:
    """The seconds of node 0, which counts the rows and writes the plan, and of one rank."""
    paths = write_shards(folder, number, num_rows)
    started = time.perf_counter()
    plan = {"train_files": [str(path) for path in paths], "train_counts": [count_rows(path) for path in paths]}
    plan_path = folder / "plan.json"
    plan_path.write_bytes(orjson.dumps(plan))
    planned = time.perf_counter() - started
    told = subprocess.run([sys.executable, "-c", RANK, str(plan_path)], check=True, capture_output=True, text=True).stdout
    num_found, imports, first_rows, cpu = told.split()[-4:]
    assert int(num_found) == number * num_rows
    figures = {"imports_seconds": imports, "first_rows_seconds": first_rows, "first_rows_cpu_seconds": cpu}
    return {"plan_seconds": planned, **{name: float(value) for name, value in figures.items()}}


def median_start(folder: Path, number: int, num_rows: int, num_rounds: int) -> dict[str, float]:
    rounds = [start(folder, number, num_rows) for _ in range(num_rounds)]
    return {"num_shards": number, **{name: round(median(each[name] for each in rounds), 4) for name in rounds[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    for number in told.shards:
        measure("rank_start", partial(median_start, told.folder, number, told.rows, told.rounds))


if __name__ == "__main__":
    main()
