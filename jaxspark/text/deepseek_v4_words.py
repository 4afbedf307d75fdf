"""Words that DeepSeek-V4 was trained to see in its prompts.

They are part of the model's interface, so they stand here to the letter, as the file
`encoding/README.md` of the released checkpoints gives them (MIT license). "high" and
"max" of the release of 31 July are told apart by text; the preview had "max" alone.
"""

from collections.abc import Mapping
from types import MappingProxyType

from jaxspark.text.dsml import MARK

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"

_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the "
    "problem to resolve the root cause, rigorously stress-testing your logic against "
    "all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every "
    "intermediate step, considered alternative, and rejected hypothesis to ensure "
    "absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to "
    "chance: exhaustively decompose the problem into its most fundamental components, "
    "trace every causal chain to its root, and resolve the underlying cause rather "
    "than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from "
    "multiple angles and are certain that no assumption remains unchecked and no error "
    "remains undiscovered.\n\n"
)
# By edition and effort. Names that only OpenAI's clients have are mapped as DeepSeek's
# own service does.
EFFORTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "preview": MappingProxyType(
            dict.fromkeys(("minimal", "low", "medium", "high", "xhigh"), "")
            | {"max": _ABSOLUTE}
        ),
        "0731": MappingProxyType(
            {"minimal": "", "low": ""}
            | dict.fromkeys(("medium", "high", "xhigh"), _ABSOLUTE)
            | {"max": _BEYOND}
        ),
    }
)

TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke \
tools by writing a "<{MARK}tool_calls>" block like the following:

<{MARK}tool_calls>
<{MARK}invoke name="$TOOL_NAME">
<{MARK}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE\
</{MARK}parameter>
...
</{MARK}invoke>
<{MARK}invoke name="$TOOL_NAME2">
...
</{MARK}invoke>
</{MARK}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other \
types (numbers, booleans, arrays, objects), pass the value in JSON format and set \
`string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete \
reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke \
tool calls.
"""
RESPONSE_FORMAT = """## Response Format:

You MUST strictly adhere to the following schema to reply:
%s"""
