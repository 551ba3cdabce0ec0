"""Whether Transformers reads a model folder's tokenizer as its tokenizer.json has it.

Of some types of model, such as qwen2, AutoTokenizer takes no more than the vocabulary from there, and puts the type's own rules
around it.

Reads   config.json, tokenizer.json and what lies beside it
"""

from pathlib import Path

# Blanks, line ends, digits, marks, capitals, a letter in two forms: where the rules of tokenizers differ.
PROBE = " Aa  don't\n\n 12,345.67\t你好 ＡＢ，e\u0301é\r\n  x_y…… 👍🏽 \n"


def is_read_alike(folder: Path) -> bool:
    """Whether AutoTokenizer writes and reads the same ids as tokenizer.json."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    as_it_stands = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = as_it_stands.encode(PROBE, add_special_tokens=False).ids
    text = known.decode(ids, clean_up_tokenization_spaces=False)
    same_text: bool = text == as_it_stands.decode(ids, skip_special_tokens=False)
    return same_text and list(known.encode(PROBE, add_special_tokens=False)) == ids
