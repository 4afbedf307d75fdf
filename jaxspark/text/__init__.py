"""Text in and out of a model: tokenizers, chat prompts, streams."""

from jaxspark.text.stream import TextStream
from jaxspark.text.tokenizer import Message, Tokenizer

__all__ = ["Message", "TextStream", "Tokenizer"]
