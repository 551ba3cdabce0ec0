"""A small world for end-to-end tests: a corpus and conversations written here, a recipe, the command as a user runs it."""

import bz2
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.settings import environment
from tests.corpus.archives import tar_of_one
from tests.corpus.http_server import Loopback, Published

WEATHER = ("晴", "阴", "多云", "小雨", "大风", "有雾")
PLACES = ("山里", "海边", "城南", "湖上", "桥头", "田间", "街角", "院中")
DOINGS = ("有人在下棋", "孩子们放风筝", "老人讲故事", "船慢慢靠岸", "花开得正好", "鸟飞过屋顶", "灯一盏盏亮了")
GOOD, BAD = ("很好", "满意", "喜欢"), ("很差", "失望", "讨厌")

RECIPE = """
name: small
archive: {{url: "{origin}/corpus", sha256: {corpus_sha256}}}
documents: {{validation_fraction: 0.1, shard_bytes: 16384}}
tokenizer: {{train: {{vocab_size: 320}}}}
blocks: {{block_size: 64}}
pretrained:
  model:
    config:
      {{model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, vocab_size: 320, max_position_embeddings: 512, tie_word_embeddings: true}}
  global_batch_size: 4
  num_steps: 20
  learning_rate: 5e-3
  checkpoint_steps: 10
  logging_steps: 5
  evaluation_steps: 10
conversations: {{url: "{origin}/conversations"}}
held_out: {{url: "{origin}/held-out"}}
examples: {{block_size: 256, validation_fraction: 0.1}}
finetuned: {{global_batch_size: 4, num_steps: 8, learning_rate: 5e-3}}
adapter:
  lora: {{rank: 4, alpha: 8, target_modules: [q_proj, embed_tokens]}}
  global_batch_size: 4
  num_steps: 4
  learning_rate: 5e-3
evaluation: {{prompts: [山里], max_sample_tokens: 8, max_held_out: 20}}
"""


def corpus(num_documents: int) -> bytes:
    """A .jsonl.tar.bz2 of distinct documents, a bad line among them."""
    lines = [json.dumps({"text": document(i)}, ensure_ascii=False) for i in range(num_documents)]
    lines.insert(7, '{"text": ')
    data = ("\n".join(lines) + "\n").encode()
    return bz2.compress(tar_of_one(data))


def document(i: int) -> str:
    """The i-th text: two to five sentences, no two the same."""
    sentences = [
        f"{PLACES[(i + k) % len(PLACES)]}{WEATHER[(i * 3 + k) % len(WEATHER)]}，{DOINGS[(i // 7 + k) % len(DOINGS)]}。"
        for k in range(2 + i % 4)
    ]
    return f"第{i}天：" + "".join(sentences)


def conversations(first: int, last: int) -> bytes:
    """BELLE's form: whether a sentence is glad or sad."""
    lines = []
    for i in range(first, last):
        word, answer = (GOOD[i % 3], "正面") if i % 2 else (BAD[i % 3], "负面")
        turns = [{"from": "human", "value": f"{document(i)}我觉得{word}。"}, {"from": "assistant", "value": answer}]
        lines.append(json.dumps({"id": str(i), "conversations": turns}, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


@dataclass
class World:
    """A folder with a recipe and a store, and a server that publishes what the recipe names."""

    folder: Path
    server: Loopback
    prefect_url: str | None = None  # None: every run starts a Prefect server of its own

    @classmethod
    def make(cls, folder: Path, server: Loopback) -> "World":
        archive = corpus(600)
        server.files["/corpus"] = Published(archive, faults=[("status", 503), ("drop", 1000)])
        server.files["/conversations"] = Published(conversations(0, 200))
        server.files["/held-out"] = Published(conversations(190, 240))  # 10 of them stand in the conversations too
        recipe = RECIPE.format(origin=server.url(""), corpus_sha256=hashlib.sha256(archive).hexdigest())
        (folder / "small.yaml").write_text(recipe)
        return cls(folder, server)

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SEQMILL_"))}
        settings = {"STORE": str(self.folder / "store"), "NUM_RANKS": "2", "NUM_WORKERS": "2"}
        chosen = {"PREFECT_API_URL": self.prefect_url} if self.prefect_url else {}
        return {**inherited, **{f"SEQMILL_{name}": value for name, value in settings.items()}, **chosen}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start `seqmill` with these arguments in the folder."""
        return subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def seqmill(self, *arguments: str, code: int = 0) -> str:
        """Run `seqmill` to its end; its standard output, or its standard error where it should fail."""
        with self.start(*arguments) as process:
            try:
                stdout, stderr = process.communicate()  # the test's own time limit is the bound
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, stderr
        return stdout if code == 0 else stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.seqmill(*arguments, "--json"))

    def here(self, *arguments: str, code: int = 0) -> str:
        """What ``seqmill`` says, in this process: half a second less where neither Prefect nor training is needed."""
        from flows.cli import main

        settings = {name: value for name, value in self.environment.items() if name.startswith("SEQMILL_")}
        told, failed = io.StringIO(), io.StringIO()
        with (
            environment(settings),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(failed),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", ["seqmill", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        assert (ended.value.code or 0) == code, failed.getvalue()
        return told.getvalue() if code == 0 else failed.getvalue()

    def json_here(self, *arguments: str) -> Any:
        return json.loads(self.here(*arguments, "--json"))
