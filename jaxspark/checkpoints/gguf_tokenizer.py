"""The tokenizer inside a GGUF file: byte-level BPE from metadata.

GGUF stores tokens, merges, and the *name* of the rule that splits text into words; the
rules are those of the models' own tokenizers. A rule that is not known here is an
error: a wrong split gives other ids for the same text, and nothing else would tell.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Core
from tokenizers import pre_tokenizers as pre

from jaxspark.checkpoints.fields import Fields
from jaxspark.checkpoints.gguf_file import gguf_stop_ids
from jaxspark.checkpoints.gguf_header import GGUFFile
from jaxspark.errors import CheckpointError
from jaxspark.text import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # token types, llama.cpp's llama_token_type
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_TEMPLATE = "tokenizer.chat_template"
# Llama 3 and Qwen2 differ in how many digits make a word: up to three, or one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_RULES = ("gpt-2", "smollm", *_LLAMA3, "qwen2")


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Builds the tokenizer that the file's metadata describes.

    Raises:
      CheckpointError: no tokenizer, another model than byte-level BPE, an unknown
        splitting rule, or inconsistent lists.
    """
    fields = Fields(file.metadata, str(file.path))
    model = fields.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise fields.wrong("tokenizer.ggml.model", "'gpt2' (byte-level BPE)")
    rule = fields.text("tokenizer.ggml.pre")
    if rule not in _RULES:
        raise fields.wrong("tokenizer.ggml.pre", f"one of {_RULES}")
    tokens = _texts(fields, "tokenizer.ggml.tokens")
    kinds = fields.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(kinds)} token types for {len(tokens)} tokens"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{file.path}: tokens occur twice in the vocabulary")
    merges = [_pair(fields, merge) for merge in _texts(fields, "tokenizer.ggml.merges")]
    try:
        # Llama 3 takes a word that is one token whole, whatever the merges say.
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _LLAMA3)
    except Exception as error:  # The library raises plain Exception.
        raise CheckpointError(f"{file.path}: bad merges ({error})") from error
    core = Core(bpe)
    core.pre_tokenizer = _splitter(rule)
    core.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        core.normalizer = normalizers.NFC()
    core.add_special_tokens(_added(tokens, kinds, _CONTROL))
    core.add_tokens(_added(tokens, kinds, _USER_DEFINED))
    special = _special_tokens(fields, tokens)
    _frame(core, fields, special, bos_unsaid=rule in _LLAMA3)
    return Tokenizer(
        core=core,
        stop_ids=gguf_stop_ids(file),
        special_tokens=special,
        chat_template=_chat_templates(fields),
    )


def _chat_templates(fields: Fields) -> dict[str, str] | None:
    """The default template and others by name, e.g. `tool_use`."""
    keys = {_TEMPLATE: "default"} | {
        key: key.removeprefix(f"{_TEMPLATE}.")
        for key in fields.values
        if key.startswith(f"{_TEMPLATE}.")
    }
    return {
        name: fields.text(key) for key, name in keys.items() if key in fields
    } or None


def _texts(fields: Fields, key: str) -> list[str]:
    value = fields.values.get(key)
    if not isinstance(value, list) or any(not isinstance(v, str) for v in value):
        raise CheckpointError(f"{fields.where}: {key} is not a list of strings")
    return value


def _pair(fields: Fields, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise CheckpointError(
            f"{fields.where}: merge {merge!r} is not two tokens separated by a space"
        )
    return left, right


def _splitter(rule: str) -> pre.PreTokenizer:
    """How text is cut into words before merging."""
    if rule == "gpt-2":
        return pre.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        return pre.Sequence(
            [
                pre.Digits(individual_digits=True),
                pre.ByteLevel(add_prefix_space=False),
            ]
        )
    words = Regex(_WORDS % ("{1,3}" if rule in _LLAMA3 else ""))
    return pre.Sequence(
        [
            pre.Split(words, behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _added(tokens: Sequence[str], kinds: Sequence[int], kind: int) -> list[AddedToken]:
    """Tokens of a kind, found in text before it is split; control ones do not print."""
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _special_tokens(fields: Fields, tokens: Sequence[str]) -> dict[str, str]:
    special = {}
    for role, name in _ROLES.items():
        key = f"tokenizer.ggml.{name}"
        if key not in fields:
            continue
        index = fields.integer(key, least=0)
        if index >= len(tokens):
            raise fields.wrong(key, f"an id below {len(tokens)}")
        special[role] = tokens[index]
    return special


def _frame(
    core: Core, fields: Fields, special: dict[str, str], *, bos_unsaid: bool
) -> None:
    """Tokens that begin and end every plain text, if the file wants any."""
    ids: dict[str, int] = {}

    def token(role: str, unsaid: bool) -> list[str]:
        if not fields.boolean(f"tokenizer.ggml.add_{role}_token", unsaid):
            return []
        index = fields.integer(f"tokenizer.ggml.{role}_token_id", least=0)
        ids[special[f"{role}_token"]] = index
        return [special[f"{role}_token"]]

    frame = [*token("bos", bos_unsaid), "$A", *token("eos", False)]
    if ids:
        core.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=list(ids.items())
        )
