"""What the engine cannot do yet is refused by the name that clients know it by."""

from jaxspark.serving.demands import Demand
from jaxspark.serving.errors import ApiError

_FIELDS = {
    "allowed_ids": "allowed_token_ids",
    "top_log_probs": "top_logprobs",
    "prompt_log_probs": "prompt_logprobs",
    "grammar": "response_format",
    "tool_use": "tool_choice",
}
_INSTEAD = {
    "top_log_probs": "the log-probabilities of chosen tokens are there: logprobs true "
    "in chats, 0 in completions",
    "prompt_log_probs": "those of the output are there; echo needs no logprobs",
    "grammar": "describe the form in the prompt, and check the answer",
    "tool_use": "'auto' and 'none' are there; nothing can force a call",
}


def check_supported(demand: Demand) -> None:
    """That the engine can do all that is asked for.

    Raises:
      ApiError: it cannot; names the first field.
    """
    for name in demand.extras.asked_for():
        field, advice = _FIELDS.get(name, name), _INSTEAD.get(name, "leave it out")
        raise ApiError(
            f"{field}: this server cannot do that yet; {advice}",
            param=field,
            code="unsupported_parameter",
        )
