"""Text in and out of a model: tokenizers, chat prompts, streams, stops, parsers."""

from jaxspark.text.output import Ending, Output, ReadOptions
from jaxspark.text.stream import TextStream
from jaxspark.text.tokenizer import Message, Tokenizer

__all__ = [
    "Ending",
    "Message",
    "Output",
    "ReadOptions",
    "TextStream",
    "Tokenizer",
]
