"""What outputs must obey: grammars over text, as masks over tokens.

A `Grammar` is what a user writes. `matcher_of` makes it a `Matcher`, the host's side of
one output. The work is done by llguidance, which runs an Earley parser over lexemes
whose automata are built as they are needed, and walks the trie of all tokens for a
mask.
"""

from jaxspark.grammars.grammar import (
    Calls,
    Grammar,
    GrammarKind,
    StructuralTags,
    Tag,
)
from jaxspark.grammars.matcher import GrammarError, Matcher
from jaxspark.grammars.source import matcher_of

__all__ = [
    "Calls",
    "Grammar",
    "GrammarError",
    "GrammarKind",
    "Matcher",
    "StructuralTags",
    "Tag",
    "matcher_of",
]
