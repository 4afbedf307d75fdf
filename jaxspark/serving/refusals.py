"""What the engine cannot do yet is refused by the name that clients know it by."""

from jaxspark.serving.demands import Demand
from jaxspark.serving.errors import ApiError

_FIELDS = {"grammar": "response_format", "tool_use": "tool_choice"}
_INSTEAD = {
    "grammar": "describe the form in the prompt, and check the answer",
    "tool_use": "'auto' and 'none' are there; nothing can force a call",
}


def check_supported(demand: Demand) -> None:
    """That the engine can do all that is asked for.

    Raises:
      ApiError: it cannot; names the first field.
    """
    for name in demand.extras.asked_for():
        field = _FIELDS[name]
        raise ApiError(
            f"{field}: this server cannot do that yet; {_INSTEAD[name]}",
            param=field,
            code="unsupported_parameter",
        )
