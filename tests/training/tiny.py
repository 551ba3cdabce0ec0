"""A model of two layers with random weights, over bytes: for tests that need a real one."""

from pathlib import Path

from tasks.store import Built, Spec, Work, stage

END_ID = 256
VOCAB_SIZE = 259
NUM_POSITIONS = 64

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(folder: Path, *, chat_template: str | None = CHATML, seed: int = 0) -> Path:
    """A model folder: every byte is a token, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=NUM_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.2,  # wide, so that the likeliest token is likely by far
        bos_token_id=None,
        eos_token_id=END_ID,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


def byte_tokenizer(chat_template: str | None = CHATML):  # type: ignore[no-untyped-def]  # a class of transformers
    """Every byte a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE without a merge; the alphabet is the 256 characters that stand for bytes, in the bytes' order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    characters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    wrapped.chat_template = chat_template
    return wrapped


def save_tiny_adapter(model_dir: Path, folder: Path) -> Path:
    """A PEFT folder of a LoRA with random weights on the model in ``model_dir``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder)
    return folder


class FolderSpec(Spec):
    """Of a stage that has nothing to be told."""


@stage("pretrained", revision=1)
def build_tiny_model(work: Work, spec: FolderSpec) -> Built:
    """The model folder as an artifact."""
    save_tiny_model(work.folder)
    return Built()
