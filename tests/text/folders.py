"""Tiny tokenizer folders of the kinds people have.

Tokenizers: byte-level BPE as GPT-2, Llama 3, Qwen and DeepSeek-V4 have it, pieces with
byte fallback as Llama 2 and Gemma have them, and Unigram. Added tokens stand in each of
their files, chat templates in each of theirs.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TOOL_CALL = "<tool_call>"  # Added, but not special: it is printed.
SENTENCES = [
    "The weather in Paris is nice today, isn't it?",
    "user assistant system tool: content, arguments and names 1234 5678",
    "Größe naïve café — “quotes” 日本語 日本 Русский",
]

CHATML = """{%- if tools %}<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STRICT = """{{ bos_token }}{% if messages[0].role == 'tool' %}
{{- raise_exception('no tool has been called') }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message['content'] | trim }}
{{- eos_token }}{% endgeneration %}
{%- else %}[{{ message.role }}] {{ message['content'] | trim }} {% endif %}
{%- endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"""
DOCUMENTS = "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
NAMED = {
    "default": "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}",
    "tool_use": CHATML,
}


def byte_level(*, control: tuple[str, ...] = (*CONTROL, TOOL_CALL)) -> Tokenizer:
    """GPT-2's form: bytes, merged inside words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    _add(core, control)
    return core


def llama3() -> Tokenizer:
    """Words are found first; a text begins with its token."""
    core = byte_level()
    words = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    core.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(words), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def byte_fallback(*, prefix: bool = True) -> Tokenizer:
    """Llama 2's form, or Gemma's: pieces, and bytes for what has none."""
    letters = sorted({c for s in SENTENCES[:2] for c in s if c != " "})
    pieces = ["<unk>", *CONTROL[:2], *[f"<0x{b:02X}>" for b in range(256)], "▁"]
    pieces += [*letters, "▁t", "th", "▁th", "▁the"]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e")]
    core = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    first = [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*first, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add(core, (*CONTROL, TOOL_CALL))
    return core


def unigram() -> Tokenizer:
    """Pieces with scores; `clean_up_tokenization_spaces` is obeyed by this kind."""
    letters = sorted({c for s in SENTENCES for c in s if c != " "})
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁the", -2.0), ("▁.", -2.0)]
    core = Tokenizer(models.Unigram([*pieces, *((c, -4.0) for c in letters)], unk_id=0))
    core.pre_tokenizer = pre.Metaspace()
    core.decoder = decoders.Metaspace()
    _add(core, (*CONTROL, TOOL_CALL))
    return core


def _add(core: Tokenizer, tokens: tuple[str, ...]) -> None:
    core.add_special_tokens([token for token in tokens if token in CONTROL])
    others = [token for token in tokens if token not in CONTROL]
    core.add_tokens([AddedToken(token, normalized=False) for token in others])


def write(
    folder: Path, core: Tokenizer, files: dict[str, Any], model_type: str = "llama"
) -> Path:
    """A folder of `core` and `files`, texts or JSON by name."""
    core_text = {"tokenizer.json": core.to_str()}
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_config.json": roles | files.get("tokenizer_config.json", {})}
    model = {"config.json": {"model_type": model_type}}
    for name, content in (core_text | files | config | model).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return folder


def added(content: str, special: bool) -> dict[str, Any]:
    """A token as `added_tokens_decoder` holds it."""
    rules = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special} | rules


def every_kind(root: Path) -> dict[str, Path]:
    """One folder of each kind."""
    byte_size = byte_level(control=()).get_vocab_size()
    tokens = (*CONTROL, TOOL_CALL)
    decoder = {
        str(byte_size + i): added(token, token in CONTROL)
        for i, token in enumerate(tokens)
    }
    named = [{"name": k, "template": v} for k, v in NAMED.items()]

    def config(**values: Any) -> dict[str, Any]:
        return {"tokenizer_config.json": values}

    folders = {
        "gpt2": write(root / "gpt2", byte_level(), config(chat_template=CHATML)),
        "llama3": write(
            root / "llama3",
            llama3(),
            config(tokenizer_class="PreTrainedTokenizerFast")
            | {"chat_template.jinja": STRICT},
        ),
        "qwen3, added_tokens_decoder": write(
            root / "qwen3",
            byte_level(control=()),
            config(
                tokenizer_class="Qwen2Tokenizer",
                chat_template=CHATML,
                added_tokens_decoder=decoder,
                eos_token="<|im_end|>",
            ),
            model_type="qwen3",
        ),
        "deepseek_v4, named in a list": write(
            root / "v4",
            byte_level(),
            config(tokenizer_class="LlamaTokenizerFast", chat_template=named),
            model_type="deepseek_v4",
        ),
        "llama2, named in files": write(
            root / "llama2",
            byte_fallback(),
            config(tokenizer_class="LlamaTokenizer", add_bos_token=True)
            | {
                "chat_template.jinja": NAMED["default"],
                "additional_chat_templates/tool_use.jinja": CHATML,
            },
        ),
        "byte fallback, added_tokens.json": write(
            root / "added",
            byte_fallback(),
            config(chat_template=CHATML)
            | {
                "added_tokens.json": {"<new>": 400, "<|call|>": 401},
                "special_tokens_map.json": {"pad_token": "<|call|>"},
            },
        ),
        "gemma, additional_special_tokens": write(
            root / "gemma",
            byte_fallback(prefix=False),
            config(
                chat_template=DOCUMENTS + STRICT,
                additional_special_tokens=["<new>", "<|call|>"],
            ),
        ),
        "unigram that cleans up": write(
            root / "unigram",
            unigram(),
            config(chat_template=STRICT, clean_up_tokenization_spaces=True),
        ),
    }
    return folders
