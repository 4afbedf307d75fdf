"""Text survives the way to ids and back, whole and piece by piece."""

import json

import pytest

from jaxspark.checkpoints import CheckpointError
from jaxspark.checkpoints.gguf_header import GGUFFile
from jaxspark.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from jaxspark.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from jaxspark.text import TextStream
from tests.checkpoints import tiny

TEXTS = [
    "The capital of France is Paris.",
    "Order 66 cost 1,234,567.89 in 2024",
    "def f(x):\n    if x:\n\t\treturn  x   \n\n\n",
    "naïve café — “quotes” … ½ ²",
    "日本語とРусский и العربية",
    "family 👩‍👩‍👧‍👦 flag 🇫🇷 zero\u200bwidth",
    "I'll, we've, don't, O'Brien's",
    " leading and trailing ",
    "\x00\x01\x7f\ufffd replacement",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(smollm2, text):
    for tokenizer in (smollm2.tokenizer, tiny.tokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(smollm2):
    ids = smollm2.tokenizer.encode("1234 + 56")
    pieces = [smollm2.tokenizer.decode([i]) for i in ids]
    assert pieces == ["1", "2", "3", "4", " +", " ", "5", "6"]


def test_digits_are_cut_off_before_spaces_are_grouped(smollm2):
    """The other order would leave the last space to the digit."""
    ids = smollm2.tokenizer.encode("x    1")
    assert [smollm2.tokenizer.decode([i]) for i in ids] == ["x", "    ", "1"]


def test_smollm2_ids_are_those_of_its_own_tokenizer(smollm2):
    """Ids of the published tokenizer, as transformers gives them."""
    assert smollm2.tokenizer.encode("Hello world") == [19556, 905]
    assert smollm2.tokenizer.encode("<|im_start|>") == [1]
    # <|im_end|> of the metadata; <|endoftext|> and <reponame> by their names.
    assert smollm2.tokenizer.stop_ids == smollm2.stop_ids == (2, 0, 4)
    assert smollm2.tokenizer.vocab_size == 49152


def test_the_chat_prompt_is_chatml(smollm2):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2+2?"},
    ]
    ids = smollm2.tokenizer.chat(messages)
    assert smollm2.tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 1 and 2 in ids
    closed = smollm2.tokenizer.chat(messages, add_generation_prompt=False)
    assert ids[: len(closed)] == closed and len(closed) < len(ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_streamed_pieces_join_to_the_text(smollm2, text, step):
    for tokenizer in (smollm2.tokenizer, tiny.tokenizer()):
        ids, stream = tokenizer.encode(text), TextStream(tokenizer)
        pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert "".join(pieces) + stream.flush() == text


def test_an_exported_tokenizer_is_the_same(smollm2, tmp_path):
    save_tokenizer(tmp_path, smollm2.tokenizer)
    loaded = load_tokenizer(tmp_path)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        assert loaded.encode(text) == smollm2.tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.chat(messages) == smollm2.tokenizer.chat(messages)
    # The end of text; a saved target tells the other ends in generation_config.json.
    assert loaded.stop_ids == smollm2.tokenizer.stop_ids[:1]
    assert loaded.special_tokens == smollm2.tokenizer.special_tokens


def test_a_tokenizer_does_not_cut_or_pad(tmp_path):
    core = tiny.tokenizer().core
    core.enable_truncation(max_length=4)
    core.enable_padding(length=6)
    core.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("ten chars.")) == 10


def test_the_template_may_be_a_file_a_text_or_a_named_list(tmp_path):
    save_tokenizer(tmp_path, tiny.tokenizer())
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    messages = [{"role": "user", "content": "x"}]

    def chat_with(template):
        path.write_text(json.dumps(config | {"chat_template": template}))
        tokenizer = load_tokenizer(tmp_path)
        return tokenizer.decode(tokenizer.chat(messages))

    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    assert chat_with("{{ messages[0].content }}") == "x"
    assert chat_with(named) == "D"
    with pytest.raises(CheckpointError, match="no chat template"):
        chat_with(None)
    with pytest.raises(CheckpointError, match="chat_template is 3, expected Jinja"):
        chat_with(3)
    (tmp_path / "chat_template.jinja").write_text("F")
    assert chat_with("overridden") == "F"


def test_damaged_tokenizer_files_are_named(tmp_path):
    save_tokenizer(tmp_path, tiny.tokenizer())
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    for content in (b"", b"{}", data[: len(data) // 2], b"\xff\xfe", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="tokenizer.json: is not a tokenizer"):
            load_tokenizer(tmp_path)
    path.write_bytes(data)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(CheckpointError, match=f"{name}: is not valid JSON"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    path.unlink()
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    "config, words",
    [
        ({"tokenizer_class": 3}, "tokenizer_class is 3, expected a string"),
        ({"tokenizer_class": "AutoModel"}, "'AutoModel', expected the name of a token"),
        ({"added_tokens_decoder": [1]}, "cannot be read.*transformers.AutoTokenizer"),
        ({"tokenizer_object": "x"}, "cannot be read"),
        ({"auto_map": {"AutoTokenizer": ["code.Own", None]}}, "code.Own.*is never run"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_named(tmp_path, config, words):
    """Names of classes are looked up in transformers alone; code is never run."""
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    save_tokenizer(tmp_path, tiny.tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{words}"):
        load_tokenizer(tmp_path)


def test_a_class_that_transformers_does_not_know_reads_tokenizer_json(tmp_path):
    """As does a model's configuration that it does not accept."""
    save_tokenizer(tmp_path, tiny.tokenizer())
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenizer_class": "OwnTokenizer", "eos_token": "</s>"}')
    broken = {"model_type": "llama", "hidden_size": 2.5, "rope_scaling": {"type": "x"}}
    for config in (broken, {"model_type": "unknown"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = load_tokenizer(tmp_path)
        assert loaded.encode("a</s>") == tiny.tokenizer().encode("a</s>")
        assert loaded.stop_ids == (257,)


def test_what_transformers_notes_is_not_written(tmp_path):
    """The folder says nothing of this machine, and transformers 4 can read it."""
    core = tiny.tokenizer().core
    core.save(str(tmp_path / "tokenizer.json"))
    config = {"additional_special_tokens": ["<new>"], "model_max_length": 77, "own": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, loaded)
    written = (tmp_path / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in written and "local" not in written
    written = json.loads(written)
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config.items() <= written.items() and "extra_special_tokens" not in written
    assert (
        loaded.vocab_size == 259 and len(load_tokenizer(tmp_path).encode("<new>")) == 1
    )


def metadata(tmp_path, **changes):
    """A GGUF file's metadata: bytes, one merge, one control, one user-defined token."""
    core = tiny.tokenizer().core
    alphabet = sorted(core.get_vocab(), key=core.token_to_id)[:256]
    values = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*alphabet, "12", "<end>", "<tool call>"],
        "token_type": [1] * 257 + [3, 4],
        "merges": ["1 2"],
        "eos_token_id": 257,
    }
    return GGUFFile(
        path=tmp_path / "m.gguf",
        metadata={f"tokenizer.ggml.{k}": v for k, v in (values | changes).items()},
        tensors={},
        data=None,
    )


def test_each_splitting_rule_cuts_digits_its_own_way(tmp_path):
    def pieces(rule):
        tokenizer = tokenizer_from_gguf(metadata(tmp_path, pre=rule, bos_token_id=257))
        text = tokenizer.core.pre_tokenizer.pre_tokenize_str("Is 1234'S\n")
        return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in text]

    assert pieces("gpt-2") == ["Is", " 1234", "'", "S", "\n"]
    assert pieces("smollm") == ["Is", " ", "1", "2", "3", "4", "'", "S", "\n"]
    assert pieces("llama-bpe") == ["Is", " ", "123", "4", "'S", "\n"]
    assert pieces("qwen2") == ["Is", " ", "1", "2", "3", "4", "'S", "\n"]


def test_named_templates_are_read_from_gguf(tmp_path):
    file = metadata(tmp_path)
    assert tokenizer_from_gguf(file).chat_template is None
    file.metadata["tokenizer.chat_template"] = "D"
    assert tokenizer_from_gguf(file).chat_template == "D"
    file.metadata["tokenizer.chat_templates"] = ["tool_use"]
    file.metadata["tokenizer.chat_template.tool_use"] = "T"
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.chat_template == {"default": "D", "tool_use": "T"}
    save_tokenizer(tmp_path, tokenizer)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_control_tokens_are_found_and_not_printed_user_ones_are(tmp_path):
    tokenizer = tokenizer_from_gguf(metadata(tmp_path, pre="gpt-2"))
    ids = tokenizer.encode("12<tool call><end>")
    assert ids == [256, 258, 257]
    assert tokenizer.decode(ids) == "12<tool call>"
    assert tokenizer.stop_ids == (257,)


def test_llama3_begins_texts_but_not_chats_with_its_token(tmp_path):
    file = metadata(tmp_path, pre="llama-bpe", bos_token_id=257)
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.encode("12") == [257, 256]
    assert tokenizer_from_gguf(
        metadata(tmp_path, pre="llama-bpe", bos_token_id=257, add_bos_token=False)
    ).encode("12") == [256]


def test_a_file_may_end_every_plain_text_with_its_token(tmp_path):
    file = metadata(tmp_path, pre="gpt-2", eos_token_id=257, add_eos_token=True)
    assert tokenizer_from_gguf(file).encode("12") == [256, 257]
    begun = {"bos_token_id": 1, "add_bos_token": True}
    file.metadata.update({f"tokenizer.ggml.{key}": v for key, v in begun.items()})
    assert tokenizer_from_gguf(file).encode("12") == [1, 256, 257]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "t5"}, "model is 't5', expected"),
        ({"pre": "falcon"}, "pre is 'falcon', expected one of"),
        ({"pre": None}, "pre is None"),
        ({"tokens": [1, 2]}, "tokens is not a list of strings"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "twice"),
        ({"token_type": [1]}, "1 token types for 259 tokens"),
        ({"merges": ["12"]}, "merge '12' is not two tokens"),
        ({"merges": ["q x"]}, "bad merges"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999, expected an id below 259"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"add_bos_token": True}, "bos_token_id is missing"),
    ],
)
def test_a_gguf_tokenizer_that_is_not_understood_is_named(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        tokenizer_from_gguf(metadata(tmp_path, **changes))
