"""Tokenizer files of a Hugging Face folder, read and written by transformers.

Which class reads a folder, and what it makes of the files there, has a history of its
own: added tokens stand in any of five places, some classes build their rules anew and
take only the vocabulary, `LlamaTokenizer` means two things. `AutoTokenizer` knows it.
"""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from jaxspark.checkpoints.fields import Fields, read_json, write_json
from jaxspark.errors import CheckpointError
from jaxspark.text.deepseek_v4 import encode_deepseek_v4
from jaxspark.text.tokenizer import Tokenizer
from jaxspark.text.transformers_library import quiet_transformers

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CONFIG = "tokenizer_config.json"
_OTHERS = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
# Of a model's configuration, only what the choice of a class depends on: the rest may
# be newer or looser than transformers accepts, and is checked where models are loaded.
_CHOOSING = ("tokenizer_class", "model_name")
# Models that ship no chat template, their encoder being code.
_ENCODERS = {"deepseek_v4": encode_deepseek_v4}
_CLASS = re.compile(r"\w*Tokenizer(Fast)?|\w+Backend")
# What transformers notes about where it read a tokenizer from.
_NOT_WRITTEN = ("is_local", "local_files_only")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None if it has no vocabulary file.

    It is the one that `transformers.AutoTokenizer` gives; nothing is downloaded and no
    code from the folder is run.

    Raises:
      CheckpointError: a file is damaged, or needs code or packages that are not here.
    """
    if not any((folder / name).exists() for name in _VOCABULARIES):
        return None
    config = _read_if_there(folder / _CONFIG)
    model = _read_if_there(folder / "config.json")
    for fields in (config, model):
        _check_class(fields)
    try:
        with quiet_transformers() as transformers:
            hf = transformers.AutoTokenizer.from_pretrained(
                folder,
                config=_model_config(transformers, model),
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # Files can be wrong in any way.
        raise _diagnosis(folder, config, error) from error
    if not isinstance(hf, transformers.PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{folder}: its tokenizer is a {type(hf).__name__}, expected one that the "
            "library tokenizers can run"
        )
    _check_templates(hf.chat_template, config)
    stop_ids = () if hf.eos_token_id is None else (hf.eos_token_id,)
    encoder = _ENCODERS.get(model.text("model_type", ""))
    return Tokenizer(hf, stop_ids=stop_ids, chat_encoder=encoder)


def _read_if_there(path: Path) -> Fields:
    return Fields(read_json(path) if path.exists() else {}, str(path))


def _check_class(fields: Fields) -> None:
    """Any name in transformers would do for AutoTokenizer, even that of a model."""
    name = fields.text("tokenizer_class", None)
    if name is not None and not _CLASS.fullmatch(name):
        raise fields.wrong("tokenizer_class", "the name of a tokenizer's class")


def _model_config(transformers: Any, model: Fields) -> Any:
    chosen = {key: model.values[key] for key in _CHOOSING if key in model}
    kind = model.text("model_type", "")
    try:
        return transformers.AutoConfig.for_model(kind, **chosen)
    except ValueError:  # A kind of model that transformers does not know.
        return transformers.PreTrainedConfig(model_type=kind, **chosen)


def _diagnosis(folder: Path, config: Fields, error: Exception) -> CheckpointError:
    """The file that is to blame, where it can be found."""
    path = folder / "tokenizer.json"
    try:
        for name in _OTHERS:
            _read_if_there(folder / name)
        if path.exists():
            Core.from_str(path.read_bytes().decode("utf-8"))
    except CheckpointError as found:
        return found
    except Exception as damage:  # The library raises plain Exception.
        return CheckpointError(f"{path}: is not a tokenizer ({damage})")
    if "auto_map" in config:
        return CheckpointError(
            f"{config.where}: auto_map is {config.values['auto_map']}, which is code, "
            "and a checkpoint's code is never run; if tokenizer.json says it all, take "
            "auto_map out"
        )
    return CheckpointError(
        f"{folder}: the tokenizer cannot be read; expected files that "
        f"transformers.AutoTokenizer reads, which says: {error}"
    )


def _check_templates(templates: Any, config: Fields) -> None:
    every = templates.values() if isinstance(templates, dict) else [templates]
    if not all(isinstance(each, str | None) for each in every):
        raise config.wrong("chat_template", "Jinja source")


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, with everything in them."""
    with quiet_transformers():
        tokenizer.hf.save_pretrained(folder, save_jinja_files=False)
    path = folder / _CONFIG
    config = read_json(path)
    for key in _NOT_WRITTEN:
        config.pop(key, None)
    # The names that transformers 4 knows too.
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)
