"""SFT conversations to examples: ids and labels, packed whole into rows of block_size; and held-out questions.

Reads   conversations/archive, held_out/archive   conversations in any published form
        tokenizer/                                with its chat template; ChatML where it has none
Writes  examples/train.arrow, validation.arrow    EXAMPLES; a split without an example has no file
        examples/held-out.arrow                   HELD_OUT
        examples/quarantine.parquet               QUARANTINE: what holds no conversation
        examples/chat_template.jinja              the template that was used

Every conversation read is counted once: num_conversations = num_examples + num_quarantined + num_duplicates
+ num_in_held_out + num_too_long + num_nothing_to_learn. What the rows teach is proven on the files: tasks.corpus.proof.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from tasks.corpus.chat import Chat, TemplateRefusalError, load_chat
from tasks.corpus.conversations import Format, conversation_digest
from tasks.corpus.held_out import HeldOut, batches, question_keys, with_system
from tasks.corpus.intake import Intake, write_quarantine
from tasks.corpus.labels import Example, Rendered, make_examples, render
from tasks.corpus.packing import Packer
from tasks.corpus.proof import Claim, Claims, Proof
from tasks.corpus.turns import Conversation
from tasks.errors import CorpusError, RecipeError
from tasks.schemas import SPLITS
from tasks.store import Artifact, Built, Spec, Work, stage

# Enough to keep every core of the tokenizer busy in a call. Not in the spec: it cannot change the output.
BATCH_CONVERSATIONS = 1_000
# Proven at once, not only when the rows are written: a template that does not fit is told within seconds.
FIRST_LOOK = 100


class ExamplesSpec(Spec):
    """How conversations become examples."""

    block_size: int = Field(ge=8, description="length of a row, in tokens")
    format: Format = Field("auto", description="the form of the conversations; auto: told by the fields of each")
    train_on: Literal["all", "last"] = Field(
        "all",
        description="which of the assistant's answers are learned: all of them, or the last alone; one that its conversation "
        "marks with train: false, or weight: 0, never is",
    )
    system: str | None = Field(None, min_length=1, description="the system turn of a conversation that has none")
    too_long: Literal["drop", "drop_turns"] = Field(
        "drop",
        description="a conversation longer than block_size: drop it, or drop its earliest question and answer until it fits",
    )
    validation_fraction: float = Field(0.0, ge=0, lt=1, description="share of the conversations in the split validation, 0 to 1")
    max_conversations: int | None = Field(None, ge=1, description="conversations read, the first ones; absent: all of them")
    max_quarantined_fraction: float = Field(
        0.01, ge=0, le=1, description="share of the conversations that may go to quarantine before the stage fails, 0 to 1"
    )
    deduplicate: bool = Field(True, description="keep a conversation once, however often it stands there")


@stage("examples", revision=3)
def build_examples(
    work: Work, spec: ExamplesSpec, conversations: Artifact, tokenizer: Artifact, held_out: Artifact | None = None
) -> Built:
    """Tokenize, label, prove and pack every conversation that is not held out."""
    chat = load_chat(tokenizer.path)
    _check_system(spec, chat)
    intakes = [Intake(conversations.file("archive"), spec.format, chat.special_pattern, "conversations", work.scratch)]
    stats: dict[str, Any] = {"block_size": spec.block_size, "vocab_size": chat.vocab_size}
    asked = HeldOut(chat, spec.system, spec.block_size)
    if held_out:
        intakes.append(Intake(held_out.file("archive"), spec.format, chat.special_pattern, "held_out", work.scratch))
        with _reading(work, intakes[1]) as advance:
            stats |= asked.write(work.folder / "held-out.arrow", intakes[1], advance)
        intakes[1].check(spec.max_quarantined_fraction)
    (work.folder / "chat_template.jinja").write_text(chat.source, encoding="utf-8")
    maker = Maker(work.scratch, spec, chat, intakes[0], asked.questions)
    with _reading(work, intakes[0]) as advance:
        maker.take(intakes[0].read(advance, spec.max_conversations))
    stats |= maker.finish(work)
    write_quarantine(work.folder / "quarantine.parquet", *intakes)
    return Built(stats)


def _reading(work: Work, intake: Intake) -> Any:
    return work.machine.progress(intake.name, intake.path.stat().st_size, "B")


def _check_system(spec: ExamplesSpec, chat: Chat) -> None:
    if spec.system and (match := chat.special_pattern.search(spec.system)):
        raise RecipeError(f"examples.system: holds the special token {match[0]}; the template writes those: leave it away")


class Numbered(NamedTuple):
    """A conversation, and the line of the archive that it stands on."""

    line: int
    conversation: Conversation


class Maker:
    """Makes the examples of one archive, and counts where every conversation went."""

    def __init__(self, scratch: Path, spec: ExamplesSpec, chat: Chat, intake: Intake, held_out: set[bytes]) -> None:
        self.spec, self.chat, self.intake, self.held_out = spec, chat, intake, held_out
        self.packers = {split: Packer(scratch, split, spec.block_size) for split in SPLITS}
        self.claims = {split: Claims(scratch, split) for split in SPLITS}
        self.proof = Proof(chat, intake.name)
        self.seen: set[bytes] = set()  # 16 bytes of each digest: about 0.3 GB for 3.5 million conversations
        self.counts: Counter[str] = Counter()

    def take(self, conversations: Iterable[tuple[int, Conversation]]) -> None:
        """Make an example of every conversation that is to have one."""
        for batch in batches(self._sift(conversations), BATCH_CONVERSATIONS):
            rendered = [(one, text) for one in batch if (text := self._render(one))]
            examples = make_examples(self.chat, [text for _, text in rendered])
            for (one, text), example in zip(rendered, examples, strict=True):
                if fitted := self._fitted(one, text, example):
                    self._place(*fitted)

    def _sift(self, conversations: Iterable[tuple[int, Conversation]]) -> Iterator[Numbered]:
        for line, conversation in conversations:
            if self.spec.deduplicate and self._is_seen(conversation):
                self.counts["num_duplicates"] += 1
            elif self._is_held_out(conversation):
                self.counts["num_in_held_out"] += 1
            else:
                yield Numbered(line, self._to_learn(with_system(conversation, self.spec.system)))

    def _to_learn(self, conversation: Conversation) -> Conversation:
        """The conversation with its answers marked as the spec wants them learned."""
        if self.spec.train_on == "all":
            return conversation
        return (*(turn._replace(is_learned=False) for turn in conversation[:-1]), conversation[-1])

    def _is_held_out(self, conversation: Conversation) -> bool:
        """Whether a held-out question is answered anywhere on its way."""
        return not self.held_out.isdisjoint(question_keys(conversation))

    def _split(self, conversation: Conversation) -> str:
        # By the first question: conversations that begin alike do not stand on both sides.
        first = int.from_bytes(question_keys(conversation)[0][:8])
        return SPLITS[first < self.spec.validation_fraction * 2**64]

    def _is_seen(self, conversation: Conversation) -> bool:
        digest = bytes.fromhex(conversation_digest(conversation)[:32])
        is_seen = digest in self.seen
        self.seen.add(digest)
        return is_seen

    def _render(self, one: Numbered) -> Rendered | None:
        try:
            return render(self.chat, one.conversation)
        except TemplateRefusalError as refusal:
            self.intake.refuse(one.line, str(refusal), [list(turn) for turn in one.conversation])
            return None

    def _fitted(self, one: Numbered, text: Rendered, example: Example) -> tuple[Numbered, Rendered, Example] | None:
        """Drop the earliest question and its answer until the rest fits, where the spec says so; None for a rest refused."""
        if len(example.input_ids) <= self.spec.block_size or self.spec.too_long != "drop_turns":
            return one, text, example
        while len(example.input_ids) > self.spec.block_size and (shorter := without_first_pair(one.conversation)):
            one = one._replace(conversation=shorter)
            if (rest := self._render(one)) is None:
                return None
            text = rest
            (example,) = make_examples(self.chat, [text])
        self.counts["num_shortened"] += len(example.input_ids) <= self.spec.block_size
        return one, text, example

    def _place(self, one: Numbered, text: Rendered, example: Example) -> None:
        self.counts["num_turns_rewritten"] += text.num_rewritten
        if len(example.input_ids) > self.spec.block_size:
            self.counts["num_too_long"] += 1
        elif self._is_held_out(one.conversation):  # now that its earlier turns are dropped
            self.counts["num_in_held_out"] += 1
        elif not text.answers:
            self.counts["num_nothing_to_learn"] += 1
        else:
            self._keep(one, tuple(answer.turn for answer in text.answers), example)

    def _keep(self, one: Numbered, learned: tuple[int, ...], example: Example) -> None:
        claim, split = Claim(one.line, one.conversation, learned), self._split(one.conversation)
        if sum(map(len, self.claims.values())) < FIRST_LOOK:
            self.proof.prove_example(example.input_ids, example.labels, claim)
        self.counts["num_answers_not_learned"] += sum(turn.is_answer and not turn.is_learned for turn in one.conversation)
        self.counts["num_calls"] += sum(turn.is_call for turn in one.conversation)
        self.packers[split].add(example.input_ids, example.labels)
        self.claims[split].add(claim)

    def finish(self, work: Work) -> dict[str, Any]:
        """Write the rows; returns the ledger. Raises CorpusError where too much was refused or nothing is left."""
        self.intake.check(self.spec.max_quarantined_fraction)
        splits = {split: self._write(work, split, packer) for split, packer in self.packers.items()}
        totals = {name: sum(split[name] for split in splits.values()) for name in splits["train"]}
        num_read = self.intake.num_read
        names = ("num_duplicates", "num_in_held_out", "num_too_long", "num_nothing_to_learn")
        lost = {"num_quarantined": len(self.intake.refused), **{name: self.counts[name] for name in names}}
        assert num_read == totals["num_examples"] + sum(lost.values()), f"{totals} and {lost} are not {num_read}"
        if not splits["train"]["num_examples"]:
            raise CorpusError(f"{self.intake.name}: no example is left of {num_read} conversations ({lost}); see each count")
        names = ("num_shortened", "num_turns_rewritten", "num_answers_not_learned", "num_calls")
        told = {name: self.counts[name] for name in names}
        ends = {"end_markers": {shape.end_marker: self.chat.special[shape.end_marker] for shape in self.proof.shapes}}
        return {"num_conversations": num_read, **lost, **told, **totals, **ends, **splits}

    def _write(self, work: Work, split: str, packer: Packer) -> dict[str, int]:
        path, num_examples = work.folder / f"{split}.arrow", len(packer.lengths)
        with work.machine.progress(f"{split} rows", num_examples, "examples") as advance:
            num_rows = packer.write(path, self.chat.padding_id, advance)
        with work.machine.progress(f"{split} proof", num_examples, "examples") as advance:
            proven = self.proof.read(path, packer.rows, self.claims[split], advance) if num_rows else Counter()
        assert proven["num_examples_proven"] == num_examples, f"{proven} of {num_examples}"
        assert proven["num_supervised_tokens"] == packer.num_supervised_tokens
        told = {name: proven[name] for name in ("num_supervised_tokens", "num_answers_proven")}
        return {"num_examples": num_examples, "num_rows": num_rows, "num_tokens": sum(packer.lengths), **told}


def without_first_pair(conversation: Conversation) -> Conversation | None:
    """The conversation without its earliest question and what answers it, tools and system turn kept; None where it has one."""
    asked = [number for number, turn in enumerate(conversation) if turn.role == "user"]
    return (*conversation[: asked[0]], *conversation[asked[1] :]) if len(asked) > 1 else None
