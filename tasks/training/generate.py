"""Text from a model folder, with or without an adapter: streamed to a person, or many greedy answers at once.

Reads   a Hugging Face model folder (safetensors, tokenizer files), a PEFT folder

This module imports torch: import it where it is used. Nothing here asks a server or runs code from a model folder.
The loop is our own, since ``model.generate`` fills what it is not told from the folder's generation_config.json (a
temperature, a repetition penalty), and an evaluation must not depend on what a publisher likes to read.

Shape suffixes: B rows of a batch, T positions, V vocabulary.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from tasks.errors import CorpusError, RecipeError
from tasks.training.adapters.virtual import as_called, positions_left
from tasks.training.framing import frame_of

log = logging.getLogger(__name__)

END_OF_TURN = "<|im_end|>"  # ChatML: a model that was finetuned closes its answer with it
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet

# 57 KB a token in float32 for a model of 1.5 billion parameters: 2 GB of keys and values.
MAX_BATCH_TOKENS = 32_768

# Below this the likeliest is taken as at 0: logits divided by it leave float32.
LEAST_TEMPERATURE = 1e-6

Turn = dict[str, str]  # role, content


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with what is needed to talk to it."""

    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    max_positions: int | None  # None: the config sets no limit

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """The ids that the model continues: ``prompt`` as it stands, or as a user's turn through the chat template.

        An empty prompt becomes one end id, behind which a document begins; RecipeError where the model knows none.
        """
        if chat:
            return self.encode_turns([{"role": "user", "content": prompt}])
        if ids := list(self.tokenizer.encode(prompt)) or sorted(self.stop_ids)[:1]:
            return ids
        raise RecipeError("prompt: empty, and the model knows no end of a document to begin behind; give a text")

    def encode_turns(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of a conversation through the chat template, up to where the model is to speak.

        Raises RecipeError where there is no template, or it refuses the conversation.
        """
        if not self.has_chat_template:
            raise RecipeError("chat: the model's tokenizer has no chat template; leave chat out, or name a finetuned model")
        try:
            text = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise RecipeError(f"chat: the chat template refuses the conversation: {error}; say it otherwise") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ``ids``, without the special tokens unless asked for."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)


def load_language_model(model_dir: Path, adapter_dir: Path | None = None, dtype: str = "float32") -> LanguageModel:
    """Load from local folders alone, onto the first GPU where there is one.

    Raises CorpusError where a folder is not such a model.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights: seconds, on the stream that the text goes to
    has_own_tokenizer = adapter_dir is not None and (adapter_dir / "tokenizer.json").exists()
    try:
        # tokenizer.json as it stands, by which the rows were made: AutoTokenizer has rules of its own for some types of model.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            adapter_dir if has_own_tokenizer else model_dir, local_files_only=True
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=getattr(torch, dtype)
        )
        if adapter_dir is not None:
            model = _with_adapter(model, adapter_dir)
    except (OSError, ValueError) as error:
        where = model_dir if adapter_dir is None else f"{model_dir} with {adapter_dir}"
        raise CorpusError(f"{where}: not a model that can be loaded ({_first_line(error)}); name a model folder") from error
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return LanguageModel(model, tokenizer, _stop_ids(model, tokenizer), positions_left(model))


def _with_adapter(model: Any, adapter_dir: Path) -> Any:
    from peft import PeftModel

    import tasks.training.adapters.bottleneck  # noqa: F401  # PEFT knows bottlenecks from here on

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of them about training and merging, which nobody does here
        return as_called(PeftModel.from_pretrained(model, str(adapter_dir), local_files_only=True))


def generate(
    model_dir: Path,
    prompt: str,
    *,
    adapter_dir: Path | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = False,
) -> Iterator[str]:
    """Load a model and yield its continuation of ``prompt``, piece by piece, in whole characters.

    temperature: 0 takes the likeliest token every time. chat: the prompt is a user's turn; None: where there is a chat template.
    Raises RecipeError where the prompt, or a number given, cannot be used.
    """
    _check_sampling(max_new_tokens, temperature, top_p, seed)  # before the seconds that loading takes
    loaded = load_language_model(model_dir, adapter_dir)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    yield from continue_text(loaded, prompt, **sampling, chat=loaded.has_chat_template if chat is None else chat)


def continue_text(
    loaded: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[str]:
    """As ``generate``, with a model that is loaded already. The same arguments give the same text."""
    _check_sampling(max_new_tokens, temperature, top_p, seed)
    prompt_ids = loaded.encode(prompt, chat)
    return continue_ids(loaded, prompt_ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)


def continue_ids(
    loaded: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """As ``continue_text``, of ids."""
    _check_sampling(max_new_tokens, temperature, top_p, seed)
    room = max_new_tokens if loaded.max_positions is None else loaded.max_positions - len(prompt_ids)
    if room < 1:
        raise RecipeError(f"prompt: {len(prompt_ids)} tokens, the model has {loaded.max_positions} positions; shorten it")
    dice = torch.Generator().manual_seed(seed)
    ids = sample_ids(loaded, prompt_ids, min(room, max_new_tokens), lambda logits_V: choose(logits_V, temperature, top_p, dice))
    return whole_characters(ids, loaded.decode)


def sample_ids(
    loaded: LanguageModel, prompt_ids: Sequence[int], max_new_tokens: int, choose_id: Callable[[torch.Tensor], int]
) -> Iterator[int]:
    """Ids behind one prompt, as they are chosen, up to a stop id, which is not told."""
    decoding = Decoding(loaded.model, [prompt_ids])
    for _ in range(max_new_tokens):
        chosen = choose_id(decoding.logits()[0])
        if chosen in loaded.stop_ids:
            return
        yield chosen
        decoding.append(torch.tensor([chosen]))


def choose(logits_V: torch.Tensor, temperature: float, top_p: float, dice: torch.Generator) -> int:
    """One id: the likeliest at temperature 0, else drawn from the smallest set of ids that holds ``top_p`` of the mass."""
    logits_V = logits_V.float().cpu()
    if temperature < LEAST_TEMPERATURE:
        return int(logits_V.argmax())
    mass_V, ids_V = torch.softmax(logits_V / temperature, -1).sort(descending=True, stable=True)
    mass_V[mass_V.cumsum(-1) - mass_V >= top_p] = 0
    return int(ids_V[torch.multinomial(mass_V, 1, generator=dice)])


def whole_characters(ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Text of ``ids`` in pieces that never end inside a character; half a character at the very end is left out.

    Decodes with the ids of the piece before, since some decoders drop a space in front of the first id.
    """
    window: list[int] = []
    num_told = 0
    rest = ""
    for token in ids:
        window.append(token)
        rest = decode(window)[len(decode(window[:num_told])) :]
        if rest and not rest.endswith(REPLACEMENT):
            yield rest
            window, rest = window[num_told:], ""
            num_told = len(window)
    if rest := rest.rstrip(REPLACEMENT):
        yield rest


def greedy_answers(
    loaded: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[list[int]]:
    """The likeliest ids behind every prompt, up to a stop id, which is left out; in the prompts' order.

    Works in batches of like length; ``advance`` is told the prompts of every batch.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        found = _greedy_batch(loaded, [prompts[row] for row in rows], max_new_tokens)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        advance(len(rows))
    return answers


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches, shortest first: at most ``batch_size`` rows and about MAX_BATCH_TOKENS tokens, padding included."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[row] > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _greedy_batch(loaded: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    decoding = Decoding(loaded.model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    speaking = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        chosen_B = decoding.logits().argmax(-1).cpu()
        for row, chosen in enumerate(chosen_B.tolist()):
            if chosen in loaded.stop_ids:
                speaking.discard(row)
            elif row in speaking:
                answers[row].append(chosen)
        if not speaking:
            break
        decoding.append(chosen_B)
    return answers


class Decoding:
    """A batch of prompts being continued: padding stands left, so that the next token of every row is in the last column."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(len(prompt) for prompt in prompts)
        self.model = model
        self.cache: Any = None
        self.input_ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.input_ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            self.mask_BT[row, longest - len(prompt) :] = 1
        self.position_ids_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """(B, V) of the next token of every row."""
        told = self.model(
            input_ids=self.input_ids_BT.to(self.model.device),
            attention_mask=self.mask_BT.to(self.model.device),
            position_ids=self.position_ids_BT.to(self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = told.past_key_values
        logits_BV: torch.Tensor = told.logits[:, -1]
        return logits_BV

    def append(self, chosen_B: torch.Tensor) -> None:
        """Take one id a row."""
        self.input_ids_BT = chosen_B[:, None]
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.input_ids_BT)], dim=-1)
        self.position_ids_BT = self.position_ids_BT[:, -1:] + 1


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends a text: the end ids of the folder's generation config and tokenizer, and what closes an answer.

    An adapter's base need not know that: its generation config is that of a model which was never asked.
    """
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    ids.add(tokenizer.get_vocab().get(END_OF_TURN))
    ids.add(frame.end_id if (frame := frame_of(tokenizer)) else None)
    return frozenset(found for found in ids if found is not None)


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens: {max_new_tokens}; give 1 or more")
    if not temperature >= 0:  # or no number
        raise RecipeError(f"temperature: {temperature}; give 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p: {top_p}; give more than 0 and at most 1")
    if not -(1 << 63) <= seed < 1 << 64:
        raise RecipeError(f"seed: {seed}; give one of 64 bits")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
