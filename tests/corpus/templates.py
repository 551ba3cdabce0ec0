"""Chat templates of the kinds that published models have, and tokenizers that carry them."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

# Qwen2.5's: a system turn of its own where there is none.
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\n你是助手。<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Qwen3's: thoughts of earlier turns are left away, the last answer gets an empty thought where it has none.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# QwQ's: the model is asked with an opened thought, which the text of an answer need not have.
ASKS_WITH_A_THOUGHT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""

# Llama 3's: a header of special tokens, words trimmed, today's date where that can be told.
LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date = strftime_now('%d %b %Y') %}
{%- else %}
    {%- set date = '26 Jul 2024' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Zephyr's: headers that are ordinary text; with the tag by which transformers finds the assistant's words.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}

{% else %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}
"""

# Llama 2's: no system header, a blank before the end marker, and a refusal of its own.
LLAMA2 = """\
{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}
{% endfor %}
"""

# Mistral's: no header for the assistant, a blank that it is not asked with, the system turn in the last question, tools as JSON.
MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set user = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == user[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if message == user[-1] and system is defined %}
            {{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
        {{- ']' + eos_token }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# Gemma's: the assistant is called model, and there is no system turn.
GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message.role == 'assistant' else message.role %}
{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

# A user's own, with tools in the system turn and results between tags.
OWN = """\
{% if tools %}{{ '<turn>tools: ' + tools | tojson + '</turn>' }}{% endif %}
{% for m in messages %}
{{ '<turn>' + m.role + ': ' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '[[' + call.function | tojson + ']]' }}{% endfor %}
{{ '</turn>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<turn>assistant: ' }}{% endif %}
"""

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SENTENCE_TOKENS = ("<s>", "</s>")
MISTRAL_TOKENS = (
    *SENTENCE_TOKENS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
GEMMA_TOKENS = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

NO_SYSTEM = ("gemma", "llama 2")

TEMPLATES = {
    "chatml": (None, CHATML_TOKENS, {"eos_token": "<|endoftext|>"}),
    "qwen2.5": (QWEN25, CHATML_TOKENS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen3": (QWEN3, CHATML_TOKENS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "asks with a thought": (ASKS_WITH_A_THOUGHT, CHATML_TOKENS, {"eos_token": "<|im_end|>"}),
    "llama 3": (LLAMA3, LLAMA3_TOKENS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "zephyr": (
        ZEPHYR,
        SENTENCE_TOKENS,
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}},
    ),
    "mistral": (MISTRAL, MISTRAL_TOKENS, {"bos_token": "<s>", "eos_token": "</s>"}),
    "gemma": (GEMMA, GEMMA_TOKENS, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "own": (OWN, ("<end>", "<turn>", "</turn>"), {"eos_token": "<end>"}),
    "llama 2": (LLAMA2, SENTENCE_TOKENS, {"bos_token": "<s>", "eos_token": "</s>"}),
}


def write_tokenizer(
    folder: Path,
    template: str | None,
    special: tuple[str, ...] = CHATML_TOKENS,
    config: dict[str, object] | None = None,
    merges: tuple[tuple[str, str], ...] = (),
) -> Path:
    """Write a tokenizer of the 256 bytes, with merges where wanted; ids follow the order: bytes, merges, special, <think>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": special[0]} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_named(folder: Path, name: str) -> Path:
    """Write the tokenizer of one of TEMPLATES."""
    template, special, config = TEMPLATES[name]
    return write_tokenizer(folder, template, special, config)
