"""`/tokenize`, `/detokenize`, `/v1/models`: a text's tokens, and the model's name."""

from typing import Any

from jaxspark.serving.conversation import chat_ids
from jaxspark.serving.errors import ApiError
from jaxspark.serving.other_requests import DetokenizeRequest, TokenizeRequest
from jaxspark.serving.served import Served


def tokenize(request: TokenizeRequest, served: Served) -> dict[str, Any]:
    """A text's or a conversation's tokens.

    Raises:
      ApiError: neither or both are given, or there are no tokens for it.
    """
    served.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("expected one of prompt and messages", param="prompt")
    if request.prompt is None:
        ids = chat_ids(request, served)
    else:
        try:
            ids = served.tokenizer.encode(request.prompt)
        except ValueError as error:
            raise ApiError(str(error), param="prompt") from error
    told: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": served.context,
        "tokens": ids,
    }
    if request.return_token_strs:
        told["token_strs"] = [
            served.tokenizer.decode([each], skip_special=False) for each in ids
        ]
    return told


def detokenize(request: DetokenizeRequest, served: Served) -> dict[str, Any]:
    """The text of tokens, control tokens among it.

    Raises:
      ApiError: one is not in the vocabulary.
    """
    served.check_model(request.model)
    served.check_tokens("tokens", request.tokens)
    return {"prompt": served.tokenizer.decode(request.tokens, skip_special=False)}


def models(served: Served) -> dict[str, Any]:
    """The models there are: one."""
    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "jaxspark",
        "max_model_len": served.context,
    }
    return {"object": "list", "data": [model]}
