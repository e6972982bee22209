"""A random model of two layers with a tokenizer and a chat template: made on the spot, no file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from zsmerge_llm.llm import LLM

CHAT_TEMPLATE = """{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == "system" else "You help." }}
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
Answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call> to call one.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% elif message.role == "assistant" %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif not (tools and loop.first and message.role == "system") %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with tools, as Qwen2.5 writes it."""

CORPUS = """<tool_call>
{"name": "add", "arguments": {"a": 1, "b": 2}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"place": "Oslo", "unit": "celsius"}}
</tool_call>
{"name": "Oslo", "country": "Norway", "people": 700000}
the ship and the sea, the keeper of the light and the captain of the ship"""
"""Text whose frequent pairs of bytes become tokens of the tokenizer."""


def byte_level_tokenizer(
    corpus: Sequence[str], special_tokens: Sequence[str], vocab_size: int, **settings: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer as in GPT-2, Llama 3 and Qwen, trained on `corpus`: every byte has a token.

    `settings` go to `PreTrainedTokenizerFast`, such as `eos_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(special_tokens)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def tiny_model(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a random Llama of two layers in float32, and its tokenizer with a chat template that takes tools.

    It writes nonsense, the same for the same seed; grammars hold it to tool calls and JSON like any model.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<|im_end|>", "<|im_start|>"]
    tokenizer = byte_level_tokenizer([CORPUS] * 3, special, 440, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1_000_000,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25)  # wide enough that attention is far from uniform
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def tiny_llm(seed: int = 0, **settings: Any) -> LLM:
    """Return an `LLM` on `tiny_model(seed)`. `settings` are those of `LLM`, such as `cache`."""
    from zsmerge_llm.llm import LLM

    model, tokenizer = tiny_model(seed)
    return LLM(model, tokenizer=tokenizer, **settings)
