"""Hand-made artifacts of every node, through the real store: small, and with every case that the report tells."""

import math
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from tasks.machine import Machine
from tasks.schemas import QUARANTINE
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, shard_entry, stage

BLOCK_SIZE = 2048


class FakeSpec(Spec):
    """What a hand-made artifact is to hold."""

    files: dict[str, str] = Field(default_factory=dict)
    stats: dict[str, Any] = Field(default_factory=dict)
    produced_by: dict[str, Any] = Field(default_factory=dict)
    shards: tuple[tuple[str, dict[str, Any]], ...] = ()
    global_batch_size: int | None = None


def fake_build(work: Work, spec: FakeSpec, **inputs: Artifact) -> Built:
    for name, text in spec.files.items():
        (work.folder / name).write_text(text, encoding="utf-8")
    shards, kind = [], work.folder.parent.name
    for name, stats in spec.shards:
        shard = fake(work.store, f"{kind}-shard", FakeSpec(files={"data": name}, stats=stats))
        shards.append(shard_entry(name, shard))
    return Built(spec.stats, tuple(shards), spec.produced_by)


def fake(store: ArtifactStore, kind: str, spec: FakeSpec, **inputs: Artifact) -> Artifact:
    """An artifact of any kind, made from ``inputs``."""
    made = stage(kind, revision=1)(fake_build)
    made.input_names = tuple(inputs)
    return made(store, Machine(), spec, **inputs)


def metrics(num_steps: int, first: float, last: float, every: int, validation_every: int) -> list[dict[str, Any]]:
    """A loss that falls as losses do, with a little noise that is the same every time."""

    def loss(step: int) -> float:
        return last + (first - last) * math.exp(-4 * step / num_steps)

    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "num_steps": every,
            "loss": loss(step) + 0.05 * math.sin(step * 12.9898),
            "learning_rate": 1e-3 * min(1, step / 20) * (1 - step / num_steps),
            "grad_norm": 0.6 + 0.5 * math.exp(-step / 30) + 0.08 * math.sin(step * 7.13),
            "tokens_per_second": 5200 + 160 * math.sin(step * 3.7),
        }
        for step in range(every, num_steps + 1, every)
    ]
    rows += [{"step": step, "validation_loss": loss(step) + 0.08} for step in range(0, num_steps + 1, validation_every)]
    return sorted(rows, key=lambda row: row["step"])


def quarantine_file(store: ArtifactStore) -> bytes:
    rows = [
        {"line": 17, "reason": "not JSON", "excerpt": b'{"text": "cut sh'},
        {"line": 212, "reason": "not UTF-8", "excerpt": b'{"text": "\xff\xfe"}'},
        {"line": 380, "reason": "not JSON", "excerpt": b"<script>alert(1)</script>"},
    ]
    path = store.root / "quarantine.parquet"
    store.root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE), path)
    return path.read_bytes()


SPLITS = {
    "train": {"num_documents": 52_310, "num_bytes": 21_400_000, "num_characters": 7_300_000, "num_shards": 24},
    "validation": {"num_documents": 540, "num_bytes": 223_000, "num_characters": 76_100, "num_shards": 1},
}
TOKENS = {
    "train": {"num_documents": 52_310, "num_tokens": 5_130_412, "num_bytes": 21_400_000, "num_shards": 24},
    "validation": {"num_documents": 540, "num_tokens": 53_690, "num_bytes": 223_000, "num_shards": 1},
}
BLOCKS = {
    "train": {
        "num_tokens": 5_130_412,
        "num_blocks": 2505,
        "num_remainder": 172,
        "num_documents": 52_310,
        "num_bytes": 21_400_000,
    },
    "validation": {"num_tokens": 53_690, "num_blocks": 26, "num_remainder": 442, "num_documents": 540, "num_bytes": 223_000},
}
HISTOGRAM = {"1": 12, "2": 40, "4": 410, "8": 3120, "16": 9800, "32": 14_720, "64": 12_900, "128": 7400, "256": 3300, "512": 1148}


@stage("documents", revision=1)
def build_documents(work: Work, spec: FakeSpec, archive: Artifact) -> Built:
    (work.folder / "quarantine.parquet").write_bytes(quarantine_file(ArtifactStore(work.scratch)))
    return fake_build(work, spec)


def documents(store: ArtifactStore, archive: Artifact) -> Artifact:
    sizes = [(f"train/{number:05d}", 610_000 + 97_000 * (number * 7 % 11)) for number in range(24)]
    sizes.append(("validation/00000", 223_000))
    shards = tuple((name, {"num_documents": size // 410, "num_bytes": size, "num_characters": size // 3}) for name, size in sizes)
    stats = {
        "num_lines": 53_933,
        "num_documents": 52_850,
        "num_quarantined": 3,
        "num_filtered": 0,
        "num_duplicates": 1079,
        "num_blank": 1,
        "length_histogram": HISTOGRAM,
        **SPLITS,
    }
    return build_documents(store, Machine(), FakeSpec(stats=stats, shards=shards), archive=archive)


def held_out(accuracy: int, wrong: str) -> dict[str, Any]:
    num_rows, majority = 1000, 536
    prompt = "<|im_start|>user\n判断这条评论的情感。\n评论：房间很干净 & 便宜 <b>好</b><|im_end|>\n<|im_start|>assistant\n"
    low, high = accuracy / num_rows - 0.02, accuracy / num_rows + 0.02
    return {
        "num_rows": num_rows,
        "num_right": accuracy,
        "num_without_room": 0,
        "accuracy": accuracy / num_rows,
        "interval": [round(low, 4), round(high, 4)],
        "majority_response": "正面",
        "majority_share": majority / num_rows,
        "confusion": {
            "正面": {"正面": accuracy - 400, "负面": 936 - accuracy, "(other)": 0},
            "负面": {"正面": 60, "负面": 400, "(other)": 4},
        },
        "answers": [
            {"prompt": prompt, "response": "正面", "answer": wrong, "is_right": False},
            {"prompt": prompt, "response": "正面", "answer": None, "is_right": False},
            {"prompt": prompt, "response": "正面", "answer": "正面", "is_right": True},
        ],
    }


def evaluation(loss: float, answers: dict[str, Any] | None, texts: tuple[str, str]) -> FakeSpec:
    bits = loss / math.log(2) * 53_690 / 223_000
    told = {
        "validation": {"loss": loss, "bits_per_byte": bits, "num_blocks": 26, "num_tokens": 53_222},
        "held_out": answers,
        "samples": [
            {"prompt": "春天来了，", "is_chat": False, "text": texts[0]},
            {"prompt": "这家店怎么样？", "is_chat": True, "text": texts[1]},
        ],
    }
    return FakeSpec(files={"evaluation.json": orjson.dumps(told).decode()})


def corpus_artifacts(store: ArtifactStore) -> dict[str, Artifact]:
    """archive to blocks."""
    archive = fake(store, "archive", FakeSpec(files={"archive": "bytes"}, stats={"num_bytes": 5}))
    text = documents(store, archive)
    tokenizer = fake(store, "tokenizer", FakeSpec(files={"tokenizer.json": "{}"}, stats={"vocab_size": 8192}), documents=text)
    names = [entry.name for entry in text.shards()]
    token_shards = tuple((name, {"num_tokens": 213_000 + 1000 * number}) for number, name in enumerate(names))
    tokens = fake(store, "tokens", FakeSpec(stats=TOKENS, shards=token_shards), documents=text, tokenizer=tokenizer)
    blocks = fake(store, "blocks", FakeSpec(stats={"block_size": BLOCK_SIZE, "vocab_size": 8192, **BLOCKS}), tokens=tokens)
    return {"archive": archive, "documents": text, "tokenizer": tokenizer, "tokens": tokens, "blocks": blocks}


def every_artifact(store: ArtifactStore) -> dict[str, Artifact]:
    """One artifact a node of a whole recipe."""
    corpus = corpus_artifacts(store)
    config = '{"model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 256}'
    model = FakeSpec(
        files={"config.json": config},
        stats={"num_parameters": 5_250_304, "num_steps": 160, "train_loss": 4.9, "validation_loss": 5.01},
        produced_by={
            "metrics": metrics(160, 9.05, 4.87, every=2, validation_every=20),
            "tokens_per_second": 5210,
            "num_ranks": 2,
            "zero_stage": 2,
            "micro_batch_size": 4,
            "accumulation": 2,
        },
        global_batch_size=16,
    )
    pretrained = fake(store, "pretrained", model, blocks=corpus["blocks"], tokenizer=corpus["tokenizer"])
    conversations = fake(store, "archive", FakeSpec(files={"archive": "conversations"}))
    held_out_archive = fake(store, "archive", FakeSpec(files={"archive": "held out"}))
    ledger = {"num_conversations": 15_711, "num_examples": 15_700, "num_too_long": 9, "num_in_held_out": 2, "num_duplicates": 0}
    counts = {**ledger, "num_rows": 1420, "num_tokens": 727_000, "num_supervised_tokens": 47_100}
    made = {"conversations": conversations, "tokenizer": corpus["tokenizer"], "held_out": held_out_archive}
    examples = fake(store, "examples", FakeSpec(stats=counts), **made)
    tuned = FakeSpec(
        stats={"num_parameters": 5_250_304, "num_steps": 220},
        produced_by={"metrics": metrics(220, 3.1, 0.22, every=4, validation_every=44), "num_ranks": 2, "zero_stage": 2},
        global_batch_size=16,
    )
    finetuned = fake(store, "finetuned", tuned, base=pretrained, examples=examples)
    lora = FakeSpec(
        stats={"num_parameters": 5_250_304, "num_trainable_parameters": 32_768, "num_steps": 100},
        produced_by={"metrics": metrics(100, 2.8, 0.4, every=4, validation_every=20), "num_ranks": 2, "zero_stage": 2},
    )
    adapter = fake(store, "adapter", lora, base=pretrained, examples=examples)
    evaluations = {
        "evaluation_pretrained": evaluation(5.01, held_out(412, "酒店"), ("花开了，人们走到街上。", "店的人说，")),
        "evaluation_finetuned": evaluation(5.43, held_out(861, "负面"), ("花开了。正面", "正面")),
        "evaluation_adapter": evaluation(5.12, held_out(827, "负面"), ("花开了，天气也暖和了。", "正面")),
    }
    inputs = {
        "evaluation_pretrained": {"model": pretrained},
        "evaluation_finetuned": {"model": finetuned},
        "evaluation_adapter": {"model": pretrained, "adapter": adapter},
    }
    return {
        **corpus,
        "pretrained": pretrained,
        "conversations": conversations,
        "held_out": held_out_archive,
        "examples": examples,
        "finetuned": finetuned,
        "adapter": adapter,
        **{
            name: fake(store, "evaluation", spec, **inputs[name], blocks=corpus["blocks"], examples=examples)
            for name, spec in evaluations.items()
        },
    }
