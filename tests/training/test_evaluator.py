"""The evaluator on a tiny model, and the stage around it through the real store and launcher."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import HELD_OUT, IGNORED_LABEL, blocks_schema, examples_schema
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, shard_entry, stage
from tasks.training.evaluate import as_written, blocks_per_batch, evaluate, response_likelihoods, validate, validate_examples
from tasks.training.evaluation import EvaluationSpec, build_evaluation, evaluation_of, evaluator_plan
from tasks.training.framing import Frame, answer_ids, frame_of
from tasks.training.generate import load_language_model
from tasks.training.likelihood import answer_losses, label_losses
from tests.training.test_generate import sentence_tokenizer
from tests.training.tiny import CHATML, END_ID, VOCAB_SIZE, FolderSpec, build_tiny_model, save_tiny_adapter

BLOCK_SIZE = 16


@stage("adapter", revision=1)
def build_adapter(work: Work, spec: FolderSpec, base: Artifact) -> Built:
    save_tiny_adapter(base.path, work.folder)
    return Built()


class BlocksSpec(Spec):
    rows: tuple[tuple[int, ...], ...]


def write_blocks(path: Path, rows: list[tuple[int, ...]]) -> None:
    schema = blocks_schema(BLOCK_SIZE)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([{"input_ids": list(row)} for row in rows], schema=schema))


@stage("blocks-shard", revision=1)
def build_blocks_shard(work: Work, spec: BlocksSpec) -> Built:
    write_blocks(work.folder / "blocks.arrow", list(spec.rows))
    return Built()


@stage("blocks", revision=1)
def build_blocks(work: Work, spec: BlocksSpec) -> Built:
    *rows, tail = spec.rows
    shard = build_blocks_shard(work.store, work.machine, BlocksSpec(rows=tuple(rows)))
    write_blocks(work.folder / "validation-tail.arrow", [tail])
    counts = {"num_blocks": len(spec.rows), "num_tokens": 50, "num_bytes": 100}
    return Built({"block_size": BLOCK_SIZE, "validation": counts}, (shard_entry("validation/00000", shard),))


@stage("examples", revision=1)
def build_examples(work: Work, spec: FolderSpec) -> Built:
    rows = [{"prompt_ids": list(b"ab" * length), "response": "x"} for length in (1, 3, 2, 32)]
    with pa.OSFile(str(work.folder / "held-out.arrow"), "wb") as sink, pa.ipc.new_stream(sink, HELD_OUT) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=HELD_OUT))
    return Built()


ROWS = tuple(tuple(range(start, start + BLOCK_SIZE)) for start in (0, 60, 200))
SPEC = EvaluationSpec(prompts=("ab", "好"), chat_prompts=("ab",), max_sample_tokens=8, max_new_tokens=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store: ArtifactStore) -> dict[str, Artifact]:
    model = build_tiny_model(store, Machine(), FolderSpec())
    return {
        "model": model,
        "adapter": build_adapter(store, Machine(), FolderSpec(), base=model),
        "blocks": build_blocks(store, Machine(), BlocksSpec(rows=ROWS)),
        "examples": build_examples(store, Machine(), FolderSpec()),
    }


@pytest.fixture(scope="module")
def bar() -> "Bar":
    return Bar()


@pytest.fixture(scope="module")
def evaluation(store: ArtifactStore, inputs: dict[str, Artifact], bar: "Bar") -> Artifact:
    return build_evaluation(store, Machine(progress=bar), SPEC, **inputs)


def cross_entropy_by_hand(logits: np.ndarray, ids: tuple[int, ...]) -> float:
    """Summed over all but the first id, in float64."""
    logits = logits.astype(np.float64)
    log_mass = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -sum(log_mass[position, ids[position + 1]] for position in range(len(ids) - 1))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_validation_loss_is_the_mean_cross_entropy_by_hand(inputs: dict[str, Artifact], batch_size: int) -> None:
    loaded = load_language_model(inputs["model"].path)
    blocks = iter(np.array(ROWS, dtype=np.int32))
    with torch.inference_mode():
        by_hand = [cross_entropy_by_hand(loaded.model(torch.tensor([ids])).logits[0].numpy(), ids) for ids in ROWS]
    result = validate(loaded.model, blocks, batch_size)
    assert result is not None
    assert result["loss"] == pytest.approx(sum(by_hand) / (3 * (BLOCK_SIZE - 1)), rel=1e-5)
    assert (result["num_blocks"], result["num_tokens"]) == (3, 45)


def test_documents_that_do_not_see_each_other_are_measured_as_each_by_itself(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path)
    documents = [(5, 9, 7, END_ID), (8, 8, END_ID), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
    block = np.array([id_ for document in documents for id_ in document], dtype=np.int32)
    with torch.inference_mode():
        by_hand = sum(cross_entropy_by_hand(loaded.model(torch.tensor([ids])).logits[0].numpy(), ids) for ids in documents)
        for before, document in itertools.pairwise(documents):  # the first id of a document is told by the end of the one before
            logits = loaded.model(torch.tensor([before])).logits[0, -1:].numpy()
            by_hand += cross_entropy_by_hand(logits, (0, document[0]))
    within = validate(loaded.model, iter([block]), 1, END_ID)
    across = validate(loaded.model, iter([block]), 1)
    assert within is not None
    assert across is not None
    assert within["loss"] == pytest.approx(by_hand / (BLOCK_SIZE - 1), rel=1e-5)
    assert abs(across["loss"] - within["loss"]) > 1e-3


def test_an_answers_loss_is_that_of_its_ids_behind_its_prompt_whatever_stands_beside_it(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path)
    prompts, answers = [[1, 2, 3], [4], [9, 9, 9, 9, 9, 9]], [[7], [5, 6, 258], [8, 258]]
    with torch.inference_mode():
        by_hand = [
            cross_entropy_by_hand(
                loaded.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :].numpy(), (0, *answer)
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    assert answer_losses(loaded.model, prompts, answers, batch_size=3) == pytest.approx(by_hand, rel=1e-5)
    assert answer_losses(loaded.model, prompts, answers, batch_size=1) == pytest.approx(by_hand, rel=1e-5)


def test_labels_behind_a_prompt_that_is_read_once_are_as_likely_as_each_alone(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path, inputs["adapter"].path)
    prompts, labels = [[1, 2, 3], [4], [9, 9, 9, 9, 9, 9]], [[7], [5, 6, 258], [8, 258]]
    together = label_losses(loaded.model, prompts, labels, batch_size=2)
    for prompt, losses in zip(prompts, together, strict=True):
        assert losses == pytest.approx(answer_losses(loaded.model, [prompt] * 3, labels, batch_size=3), rel=1e-4)


def test_of_few_labels_the_likeliest_is_told_and_of_open_questions_none(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path)
    rows = [{"prompt_ids": [1, 2], "response": "ab"}, {"prompt_ids": [3], "response": "c"}]
    told = response_likelihoods(loaded, rows, 258)
    for row, likelihood in zip(rows, told, strict=True):
        losses = {text: answer_losses(loaded.model, [row["prompt_ids"]], [[*text.encode(), 258]], 1)[0] for text in ("ab", "c")}
        assert likelihood["likely"] == min(losses, key=lambda text: losses[text])
        assert likelihood["loss"] == pytest.approx(losses[row["response"]], rel=1e-5)
        assert likelihood["num_tokens"] == len(row["response"]) + 1
    assert response_likelihoods(loaded, rows[:1], 258)[0]["likely"] is None


def test_a_prompt_that_leaves_no_room_has_no_likeliest_label_and_no_loss(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path)
    rows = [{"prompt_ids": [1] * 64, "response": "a"}, {"prompt_ids": [3], "response": "b"}]
    assert response_likelihoods(loaded, rows, 258)[0] == {"likely": None, "loss": 0.0, "num_tokens": 0}


# As Mistral and Llama 2: blanks around the words, the first of which the model is not asked with.
BLANKS = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} <|im_end|>{% endif %}{% endfor %}"
)


def test_an_answer_is_the_ids_that_its_template_taught_the_blanks_around_the_words_too(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path)
    asked = {"prompt_ids": list(b"[INST] ab [/INST]"), "response": "x"}
    taught = [*b" x ", 258]
    loss = answer_losses(loaded.model, [asked["prompt_ids"]], [taught], 1)[0]
    told = response_likelihoods(loaded, [asked], 258, BLANKS)[0]
    assert told["num_tokens"] == len(taught)
    assert told["loss"] == pytest.approx(loss, rel=1e-5)


def test_an_answer_is_tokenized_behind_what_opens_it() -> None:
    tokenizer = sentence_tokenizer()  # writes a blank before a text that stands alone
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    frame = frame_of(wrapped, CHATML)
    assert frame == Frame("<|im_start|>assistant\n", "", "<|im_end|>", tokenizer.token_to_id("<|im_end|>"))
    opening, whole = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in (frame.opening, f"{frame.opening}好<|im_end|>")
    )
    assert answer_ids(wrapped, "好", frame) == whole[len(opening) :]
    assert answer_ids(wrapped, "好", frame._replace(opening="")) != whole[len(opening) :]


def test_an_answer_that_the_tokenizer_writes_otherwise_is_right_as_it_writes_it(
    inputs: dict[str, Artifact],
) -> None:
    loaded = load_language_model(inputs["model"].path)
    loaded.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    rows = [
        {"prompt_ids": [1], "response": "ＡＢ"},
        {"prompt_ids": [2], "response": "ＡＢ"},
        {"prompt_ids": [3], "response": "x"},
    ]
    said = iter(["AB", "A", "AB"])
    assert [as_written(loaded, row["response"], next(said)) for row in rows] == ["ＡＢ", "A", "AB"]


def test_an_answer_is_not_right_for_what_the_tokenizer_has_no_word_for(inputs: dict[str, Artifact]) -> None:
    """Else every answer without it would be, an empty one too."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    loaded = replace(load_language_model(inputs["model"].path), tokenizer=tokenizer)
    assert [as_written(loaded, "a z", "a"), as_written(loaded, "z", ""), as_written(loaded, "a", "a")] == ["a", "", "a"]


def test_long_answers_make_smaller_batches_of_losses(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_language_model(inputs["model"].path)
    prompts, answers = [[1, 2, 3], [4], [9, 9]], [[7] * 20, [5, 6, 258], [8, 258]]
    at_once = answer_losses(loaded.model, prompts, answers, batch_size=3)
    shapes: list[torch.Size] = []
    forward = loaded.model.forward

    def watched(**inputs: torch.Tensor) -> torch.Tensor:
        told = forward(**inputs)
        shapes.append(told.logits.shape)
        return told

    monkeypatch.setattr(loaded.model, "forward", watched)
    monkeypatch.setattr("tasks.training.likelihood.LOGITS_BYTES", 4 * 22 * VOCAB_SIZE)
    assert answer_losses(loaded.model, prompts, answers, batch_size=3) == pytest.approx(at_once, rel=1e-5)
    assert all(shape.numel() * 4 <= 4 * 22 * VOCAB_SIZE for shape in shapes)


def test_packed_examples_are_measured_by_their_supervised_tokens_each_example_by_itself(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    loaded = load_language_model(inputs["model"].path)
    examples = [([1, 2, 3, 4], 2), ([9, 8, 7, 6, 5], 3)]  # ids; where the answer begins
    padding = BLOCK_SIZE - 9
    row = {
        "input_ids": [id_ for ids, _ in examples for id_ in ids] + [END_ID] * padding,
        "labels": [id_ if at >= begin else IGNORED_LABEL for ids, begin in examples for at, id_ in enumerate(ids)]
        + [IGNORED_LABEL] * padding,
        "position_ids": [*range(4), *range(5), *range(padding)],
    }
    path, schema = tmp_path / "validation.arrow", examples_schema(BLOCK_SIZE)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    by_hand = sum(
        answer_losses(loaded.model, [ids[:begin] for ids, begin in examples], [ids[begin:] for ids, begin in examples], 1)
    )
    told = validate_examples(loaded.model, str(path), 1)
    assert (told["num_rows"], told["num_tokens"]) == (1, 4)
    assert told["loss"] == pytest.approx(by_hand / 4, rel=1e-5)


def test_a_token_beyond_the_models_vocabulary_is_refused(inputs: dict[str, Artifact]) -> None:
    loaded = load_language_model(inputs["model"].path)
    with pytest.raises(CorpusError, match=f"token id {VOCAB_SIZE}, the model's vocabulary has {VOCAB_SIZE}"):
        validate(loaded.model, iter([np.array([0, VOCAB_SIZE], dtype=np.int32)]), 1)


def test_a_model_whose_loss_is_no_number_is_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(inputs["model"].path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plan = evaluator_plan(SPEC, tmp_path, **{**inputs, "adapter": None})
    with pytest.raises(CorpusError, match="validation: the loss is nan; the model's weights are damaged, or overflow in float32"):
        evaluate(replace(plan, model_dir=str(folder)))
    assert not (tmp_path / "result.json").exists()


def test_a_batch_is_as_large_as_its_logits_allow() -> None:
    assert blocks_per_batch(block_size=2048, vocab_size=8192) == 8
    assert blocks_per_batch(block_size=2048, vocab_size=151_936) == 1


def test_the_stage_measures_what_its_inputs_allow(evaluation: Artifact) -> None:
    written = orjson.loads(evaluation.file("evaluation.json").read_bytes())
    assert written["validation"]["num_blocks"] == 3
    assert written["held_out"]["num_rows"] == 4
    # 64 tokens of prompt fill the model's 64 positions.
    assert written["held_out"]["num_without_room"] == 1
    told = [(sample["prompt"], sample["is_chat"]) for sample in written["samples"]]
    assert told == [("ab", False), ("好", False), ("ab", True)]


def test_every_row_is_counted(evaluation: Artifact, bar: "Bar") -> None:
    assert (bar.total, bar.done) == (3 + 4 + 3, 10)


def test_another_process_writes_the_same_bytes(evaluation: Artifact, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    evaluate(evaluator_plan(SPEC, tmp_path, **inputs))  # in this one; the artifact is of one that was launched
    again = evaluation_of(orjson.loads((tmp_path / "result.json").read_bytes()), inputs["blocks"].stats["validation"])
    assert orjson.dumps(again, option=orjson.OPT_INDENT_2) == evaluation.file("evaluation.json").read_bytes()


class Bar:
    """A fake progress bar that counts."""

    total: int | None = None
    done = 0

    def __call__(self, label: str, total: int | None, unit: str) -> "Bar":
        self.total = total
        return self

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self.advance

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, amount: int) -> None:
        self.done += amount
