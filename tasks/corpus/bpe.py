"""Byte-level BPE trained on documents, with Qwen2.5's text rules and ChatML's special tokens.

Reads   documents-shard  documents.parquet    DOCUMENTS: text, of the train split
Writes  tokenizer        tokenizer.json, tokenizer_config.json, chat_template.jinja
"""

import contextvars
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from pydantic import Field

from tasks.corpus.document_shards import open_documents
from tasks.corpus.shards import load_shard
from tasks.machine import Advance
from tasks.store import Artifact, Spec, Work

log = logging.getLogger(__name__)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # every byte is a token, so that every text can be encoded

# As in Qwen2.5's tokenizer.json: contractions, words, single digits, punctuation, line ends, other spaces.
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# PreTrainedTokenizerFast: tokenizer.json as it stands. Qwen2Tokenizer would build its own rules around the vocabulary.
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}

BATCH_DOCUMENTS = 1_000


class TokenizerTrainingSpec(Spec):
    """How a tokenizer is trained on the documents' train split."""

    vocab_size: int = Field(
        ge=MIN_VOCAB_SIZE, description="learn at most so many tokens, the 256 bytes and 3 special tokens among them"
    )
    min_frequency: int = Field(2, ge=1, description="merge pairs that occur at least so often")
    # 10 MB of Chinese take 1 GB of memory and 19 CPU seconds, nearly in proportion: a run of characters is one word.
    max_bytes: int = Field(
        10_000_000, ge=1, description="train on about so many bytes of text at most, drawn evenly from the split by digest"
    )


def train(work: Work, spec: TokenizerTrainingSpec, documents: Artifact) -> None:
    """Train, and write the tokenizer's files into the artifact's folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        min_frequency=spec.min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    total = documents.stats["train"]["num_bytes"]
    text = min(total, spec.max_bytes) / 1e6
    # Its trainer tells of no progress once it has read the text.
    log.info("tokenizer: learns %d tokens from %.1f MB of text; some %.0f s on one core", spec.vocab_size, text, 2 * text + 1)
    with work.machine.progress("tokenizer", min(total, spec.max_bytes), "B") as advance:
        texts = _sample(work, documents, spec.max_bytes / max(total, 1), advance)
        interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))
    if tokenizer.get_vocab_size() < spec.vocab_size:
        found = tokenizer.get_vocab_size()
        log.warning("%s: only %d of %d tokens could be learned from %d bytes", documents.short, found, spec.vocab_size, total)
    # Its own save raises a bare Exception where the disk is full.
    (work.folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (work.folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (work.folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def interruptible(call: Callable[[], None]) -> None:
    """Make a call in a thread of its own: native code lets no signal through, as SIGTERM, to the main thread while it runs."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            call()
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="learning", daemon=True).start()
    ended.result()


def _sample(work: Work, documents: Artifact, share: float, advance: Advance) -> Iterator[list[str]]:
    """Batches of the train split's texts, each text chosen by its digest, so that the choice is spread over the corpus."""
    for entry in documents.shards("train"):
        with open_documents(load_shard(work.store, entry).file("documents.parquet")) as table:
            for batch in table.iter_batches(BATCH_DOCUMENTS):
                texts = [text for text in batch["text"].to_pylist() if share >= 1 or _number(text) < share]
                yield texts
                advance(sum(len(text.encode()) for text in texts))


def _number(text: str) -> float:
    """A number in [0, 1) from the third 8 bytes of the text's digest: the first decide the split, the second the shard."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[16:24], "big") / 2**64
