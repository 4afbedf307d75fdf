"""How one request is continued, as its user says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxspark.grammars import Grammar


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    Logits are adjusted first, as OpenAI and vLLM do and in vLLM's order: allowed ids,
    bad words, min_tokens, bias, then penalties (`jaxspark.decoding.adjustments` has the
    equations). Then come temperature, top-k, top-p and min-p. Greedy decoding takes the
    best of the adjusted logits.

    All log-probabilities are the model's own: of its logits as they are, before any of
    this (vLLM's `raw_logprobs`).

    Attributes:
      max_new_tokens: output budget.
      temperature: 0 is greedy.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest most likely set of this mass; 1 keeps all.
      min_p: keeps tokens at least this likely relative to the best; 0 keeps all.
      seed: of the request's randomness, in [0, 2**32). Under rejection sampling with a
        schedule, requests decoded together need seeds that differ. None takes one that
        follows from the request's index.
      stop_ids: tokens that end the output; None takes the target's.
      min_drafts: drafts verified in every round that drafts.
      max_drafts: most drafts verified in a round; None, or more than a block: all.
      log_probs: whether the completion has the model's log-probabilities.
      top_log_probs: the number of most likely tokens, at most 20, that it has beside
        each of these.
      prompt_log_probs: the same for the tokens of the prompt, and 0 for theirs alone;
        None has none.
      presence_penalty: subtracted from the logits of tokens that are in the output; in
        [-2, 2].
      frequency_penalty: subtracted for each time that they are; in [-2, 2].
      repetition_penalty: of tokens that are in prompt or output, divides positive
        logits and multiplies others; in (0, 100], 1 does nothing.
      logit_bias: numbers in [-100, 100] that are added to logits, by token id.
      allowed_ids: the only tokens that may be sampled; None allows all.
      bad_words: texts, or lists of token ids, whose last token is not sampled where the
        others were just put out. A text's tokens are those that it has at the beginning
        of a text and those that it has behind a space.
      min_tokens: output tokens before which none of `stop_ids` is sampled.
      grammar: what the output obeys, if it ends with a stop token; None is nothing. It
        is the stronger where it and allowed_ids, bad_words or min_tokens together leave
        no token.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: Sequence[int] | None = None
    min_drafts: int = 0
    max_drafts: int | None = None
    log_probs: bool = False
    top_log_probs: int = 0
    prompt_log_probs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None
