"""From conversations in files to packed training sequences."""

from jaxspark.jsonlines import MalformedRow
from jaxspark.training.data.conversations import Conversation, read_conversations
from jaxspark.training.data.regeneration import Dropped, Regenerated, regenerate

__all__ = [
    "Conversation",
    "Dropped",
    "MalformedRow",
    "Regenerated",
    "read_conversations",
    "regenerate",
]
