"""Models and requests for audits: drafters by name, a small random DeepSeek-V4."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from jaxspark.checkpoints import Target, load_drafter
from jaxspark.configs import drafters as draft_configs
from jaxspark.configs import targets as target_configs
from jaxspark.drafters import DeepSeekV4DSpark, Drafter, DSparkDrafter, MTPDrafter
from jaxspark.generation import Request, SamplingParams
from jaxspark.models import DeepSeekV4


def audited_drafter(name: str, target: Target) -> Drafter:
    """A drafter by name; random weights propose badly, the harder test of exactness.

    Args:
      name: "dspark-<head>", "dflash", "mtp" or "deepseek_v4_dspark" with random
        weights, or what `load_drafter` takes.
      target: what it drafts for.

    Raises:
      ValueError: there is none of that name for the target.
    """
    kind, _, head = name.partition("-")
    model: Any = target.model
    options: dict[str, Any] = {"depth": 1, "block_size": 8}
    random: dict[str, Any] = {"dtype": model.dtype, "rngs": nnx.Rngs(7)}
    if name == "mtp":
        return MTPDrafter(model.config, block_length=5, **random)
    if name == "deepseek_v4_dspark":
        stages = draft_configs.deepseek_v4_dspark(model.config)
        return DeepSeekV4DSpark(stages, **random)
    if kind == "dspark" and head:
        # One head on the full vocabulary, the others on pruned ones.
        vocab = model.config.vocab_size
        pruned = {"vanilla": None, "gated": vocab // 6, "rnn": vocab // 12}
        if head not in pruned:
            raise ValueError(f"--drafters={name}: expected dspark-{'|'.join(pruned)}")
        config = draft_configs.dspark(
            model.config,
            markov_rank=64,
            markov_head_type=head,
            draft_vocab_size=pruned[head],
            **options,
        )
    elif kind == "dflash":
        config = draft_configs.dflash(model.config, **options)
    else:
        return load_drafter(name, target)
    return DSparkDrafter(config, **random)


class Bytes:
    """The tokenizer of models that have none: a text's bytes."""

    def chat(self, messages) -> list[int]:
        """All texts, one after the other."""
        return list("".join(m["content"] for m in messages).encode())

    def decode(self, ids) -> str:
        """The text of bytes, as far as they make one."""
        return bytes(ids).decode(errors="replace")


def random_v4() -> Target:
    """DeepSeek-V4 in small, with random weights and peaked distributions."""
    model = DeepSeekV4(target_configs.deepseek_v4_tiny(256), rngs=nnx.Rngs(0))
    model.embed_tokens.weight[...] *= 30.0
    tokenizer: Any = Bytes()
    return Target(
        model=model, tokenizer=tokenizer, stop_ids=(), name="deepseek_v4_tiny"
    )


def audited_requests(
    domains: Mapping[str, Sequence[Sequence[int]]], max_new_tokens: int
) -> list[Request]:
    """Greedy requests for the prompts of all domains, one of each in turn."""
    return [
        Request(
            tuple(prompt),
            SamplingParams(max_new_tokens=max_new_tokens),
            name=f"{domain}/{i}",
        )
        for i in range(max(map(len, domains.values())))
        for domain, prompts in domains.items()
        for prompt in prompts[i : i + 1]
    ]
