"""Fields that requests share: OpenAI's names, and the extras that vLLM's clients use.

Every field may be null, which is the same as absent, known or not. A body is strict: a
number in a string, or a field that nobody knows, is an error, not a guess. A few fields
that cannot change an answer are accepted and not looked at, others only with a value
that changes nothing.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from jaxspark.serving.errors import ApiError, explained

MOST_LOG_PROBS = 20
# Entries of a list of words, tokens or tools.
MOST_LISTED = 1024
# Outputs of one request.
MOST_CHOICES = 1024
# Bytes of what an answer must obey; llguidance's work grows with their square.
MOST_GRAMMAR = 256 * 1024
INT64 = 2**63


class Wire(BaseModel):
    """An object that a client sends."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @classmethod
    def read(cls, body: bytes | str | dict[str, Any]) -> Self:
        """The object of a body.

        Raises:
          ApiError: it does not fit; says where and why.
        """
        try:
            if isinstance(body, dict):
                return cls.model_validate(body)
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise explained(error, cls) from error
        except RecursionError as error:
            raise ApiError("the body is nested too deeply") from error


def listed(value: Any) -> Any:
    """One text as a list of it."""
    return [value] if isinstance(value, str) else value


def _type_of(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"@{kind}" if isinstance(kind, str) else "@"


type Text = Annotated[str, StringConstraints(min_length=1)]
type Token = Annotated[int, Field(ge=0)]
type RequestId = Annotated[str, StringConstraints(pattern=r"^[\w.:-]{1,128}$")]
type Texts = Annotated[list[Text], BeforeValidator(listed)]


class StreamOptions(Wire):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    # Would pad chunks, so that their sizes tell nothing; it changes no answer.
    include_obfuscation: bool | None = None


class Plain(Wire):
    """No format."""

    type: Literal["text"]


class AnyJson(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Wire):
    """A JSON schema with a name."""

    name: Text
    description: str | None = None
    # `schema` is a method of pydantic's.
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class JsonOfSchema(Wire):
    """JSON that obeys a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class TagFields(Wire):
    """JSON within a text; see `jaxspark.grammars.Tag`."""

    begin: Text
    # `schema` is a method of pydantic's.
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    end: str


class TextWithTags(Wire):
    """Text in which triggers oblige, in vLLM's and SGLang's form."""

    type: Literal["structural_tag"]
    structures: list[TagFields] = Field(min_length=1, max_length=MOST_LISTED)
    triggers: list[Text] = Field(min_length=1, max_length=MOST_LISTED)


type ResponseFormat = Annotated[
    Annotated[Plain, Tag("@text")]
    | Annotated[AnyJson, Tag("@json_object")]
    | Annotated[JsonOfSchema, Tag("@json_schema")]
    | Annotated[TextWithTags, Tag("@structural_tag")],
    Discriminator(
        _type_of,
        custom_error_type="response_format",
        custom_error_message="type should be 'text', 'json_object', 'json_schema' or "
        "'structural_tag'",
    ),
]


class StructuredOutputs(Wire):
    """A format in vLLM's form; one of these."""

    json_: dict[str, Any] | str | None = Field(alias="json", default=None)
    regex: Text | None = None
    choice: list[Text] | None = Field(default=None, min_length=1)
    grammar: Text | None = None


class SamplingFields(Wire):
    """What chats and completions have in common."""

    model: Text
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MOST_LISTED
    )
    allowed_token_ids: list[Token] | None = Field(None, min_length=1)
    bad_words: list[Text] | None = Field(None, max_length=MOST_LISTED)

    stop: Texts | None = Field(None, max_length=64)
    stop_token_ids: list[Token] | None = Field(None, max_length=MOST_LISTED)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: int | None = Field(None, ge=1)
    return_token_ids: bool | None = None
    return_drafted: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBS)

    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(None, gt=0)
    cache_salt: Text | None = None
    request_id: RequestId | None = None

    # Others are refused.
    best_of: int | None = None
    use_beam_search: Literal[False] | None = None

    # They name the caller or where its bill goes, and change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
