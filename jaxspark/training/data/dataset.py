"""Training data as packed sequences, some of them held out."""

import sys
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from jaxspark.configuration import Configuration, option
from jaxspark.jsonlines import first_reasons
from jaxspark.parallel.agreement import leads
from jaxspark.text import Tokenizer
from jaxspark.training.data.conversations import read_conversations
from jaxspark.training.data.documents import read_documents
from jaxspark.training.data.packing import Batches, Packed, pack


@dataclass(frozen=True, kw_only=True)
class DataOptions(Configuration):
    """What is trained on."""

    data: tuple[str, ...] = option("Answered conversations: JSON lines or datasets.")
    sequence_length: int = option("Tokens per sequence.", 512, at_least=8)
    held_out: int = option("Sequences kept for evaluation.", 8, at_least=0)


def read_packed(
    console: Console, options: DataOptions, tokenizer: Tokenizer, vocab_size: int
) -> Packed:
    """The data as packed sequences; says what was cut and dropped.

    Args:
      console: where it is said.
      options: which data.
      tokenizer: with a chat template.
      vocab_size: how many tokens the target has.

    Raises:
      ValueError: they hold no answer.
    """
    with console.status("reading and packing"):
        documents, cut, dropped = read_documents(
            tokenizer,
            read_conversations(options.data),
            max_tokens=options.sequence_length,
            vocab_size=vocab_size,
        )
        packed = pack(documents, options.sequence_length)
    if cut:
        console.print(f"{cut} documents were cut to {options.sequence_length} tokens")
    if dropped and leads():
        count = f"{len(dropped)} of {len(dropped) + len(documents)} lines dropped"
        print(f"{count}: {first_reasons(dropped)}", file=sys.stderr)
    return packed


def split(
    packed: Packed, *, held_out: int, sequences: int, seed: int
) -> tuple[Batches, Packed | None]:
    """Micro-batches to train on, and the sequences that are only evaluated.

    Raises:
      ValueError: either is less than a micro-batch.
    """
    if 0 < held_out < sequences:
        raise ValueError(
            f"held_out={held_out} is less than a batch of sequences={sequences}; 0 "
            "evaluates nothing"
        )
    left = len(packed.index_P) - held_out
    if left < sequences:
        raise ValueError(
            f"the data fill {len(packed.index_P)} sequences, of which held_out="
            f"{held_out} are kept for evaluation; a micro-batch has {sequences}: give "
            "more data, shorter sequences, or lower one of the two"
        )
    batches = Batches(packed[np.arange(held_out, held_out + left)], sequences, seed)
    return batches, packed[np.arange(held_out)] if held_out else None
