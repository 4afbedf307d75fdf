"""Options of one request's sampling, for launchers that decode what a user gives."""

from dataclasses import dataclass

from jaxspark import SamplingParams
from jaxspark.configuration import Configuration, ConfigurationError, option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Configuration):
    """How a request is continued; see `SamplingParams`."""

    max_new_tokens: int = option("Output budget.", 256, at_least=1)
    min_tokens: int = option(
        "Output tokens before which nothing ends the output.", 0, at_least=0
    )
    temperature: float = option(
        "Sampling temperature; 0 decodes greedily.", 0.0, at_least=0
    )
    top_k: int = option("Keep the k most likely tokens; 0 keeps all.", 0, at_least=0)
    top_p: float = option(
        "Keep the most likely tokens of this mass.", 1.0, at_least=0, at_most=1
    )
    min_p: float = option(
        "Keep tokens this likely relative to the best.", 0.0, at_least=0, at_most=1
    )
    presence_penalty: float = option(
        "Subtracted from logits of tokens that are in the output.",
        0.0,
        at_least=-2,
        at_most=2,
    )
    frequency_penalty: float = option(
        "Subtracted for each time that they are.", 0.0, at_least=-2, at_most=2
    )
    repetition_penalty: float = option(
        "Of tokens in prompt or output, divides positive logits, multiplies others.",
        1.0,
        at_least=0,
        at_most=100,
    )
    logit_bias: tuple[str, ...] = option(
        "Numbers added to logits, as token:number with commas between, such as "
        "198:-100,42:2.5.",
        (),
    )
    allowed_ids: tuple[int, ...] | None = option(
        "The only tokens that may be sampled; by default all.", None, at_least=0
    )
    bad_words: tuple[str, ...] = option("Texts that are not written.", ())
    seed: int = option("Seed of the request's randomness.", 0)
    log_probs: bool = option("Print each token's log-probability afterwards.", False)
    top_log_probs: int = option(
        "And so many of the most likely tokens beside it.", 0, at_least=0, at_most=20
    )
    prompt_log_probs: int | None = option(
        "Print log-probabilities of the prompt, and so many of the most likely tokens "
        "beside each.",
        None,
        at_least=0,
        at_most=20,
    )

    def __post_init__(self):
        super().__post_init__()
        _biases(self.logit_bias)

    def params(self) -> SamplingParams:
        """The same for a request."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias),
            allowed_ids=self.allowed_ids,
            bad_words=self.bad_words,
            seed=self.seed,
            log_probs=self.log_probs or self.top_log_probs > 0,
            top_log_probs=self.top_log_probs,
            prompt_log_probs=self.prompt_log_probs,
        )


def _biases(pairs: tuple[str, ...]) -> dict[int, float]:
    """By token.

    Raises:
      ConfigurationError: one that is no pair.
    """
    found = {}
    for pair in pairs:
        token, _, bias = pair.partition(":")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise ConfigurationError(
                f"logit_bias={pair}: expected token:number, such as 42:2.5"
            ) from None
    return found
