"""What servers have in common, whoever answers HTTP: the options, and their parts."""

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import jaxspark
from jaxspark import load_drafter
from jaxspark.calibration.schedules import chosen_options
from jaxspark.configuration import option
from jaxspark.decoding.couplings import COUPLINGS, Coupling
from jaxspark.decoding.options import check_block_length
from jaxspark.drafters import Drafter
from jaxspark.launch import common
from jaxspark.parallel.messages import Sender
from jaxspark.pods.serving import DRAIN_S
from jaxspark.target import Target

if TYPE_CHECKING:
    from fastapi import FastAPI

    from jaxspark.serving import Engine
    from jaxspark.serving.app_options import AppOptions

log = logging.getLogger(__name__)
KEYS = "JAXSPARK_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(common.TargetOptions, common.DraftOptions, common.ScheduleOptions):
    """What is served, and how much of it."""

    served_name: str | None = option(
        "What clients call the model; by default the target's name.", None
    )
    slots: int = option("Outputs decoded at once.", 8, at_least=1)
    context: int | None = option(
        "Most tokens of a prompt and its output; by default what the target was made "
        "for, but not more than 2048 or what --cache_pages hold.",
        None,
        at_least=2,
    )
    max_prompt_tokens: int | None = option(
        "Most tokens of a prompt; by default what the context has room for.",
        None,
        at_least=1,
    )
    max_output_tokens: int | None = option(
        "Most new tokens, also where a client names no number; by default likewise.",
        None,
        at_least=1,
    )
    min_priority: int = option(
        "Lowest priority that clients may ask for; lower ones go first.", 0
    )
    coupling: Coupling = option(
        "How draft and target are tied: gumbel gives the very tokens of plain sampling "
        "with the same seed, rejection accepts more.",
        "gumbel",
        choices=COUPLINGS,
    )
    prefill_chunk: int | None = option(
        "Most tokens of each prompt that are read between two rounds: what a long "
        "prompt delays others by; by default 32 on CPUs, 256 elsewhere.",
        None,
        at_least=1,
    )
    prefill_together: int | None = option(
        "Prompts that are read at once; by default a quarter of the slots.",
        None,
        at_least=1,
    )
    max_stop_ids: int = option(
        "Most tokens that may end an output, the model's own among them.",
        16,
        at_least=1,
    )
    prefix_cache: bool = option(
        "Whether prompts that begin alike share what was computed; outputs stay the "
        "same to the last bit.",
        True,
    )
    cache_pages: int | None = option(
        "Memory for all outputs and shared prefixes, in pages of 128 tokens; when it "
        "runs out, the youngest outputs wait and go on later. Shards of slots have "
        "equally many, at least as many as one output can fill. By default as many as "
        "all slots can. See --cache_snapshot_bytes for memory beside them.",
        None,
        at_least=1,
    )
    cache_snapshot_bytes: int | None = option(
        "Memory for snapshots of sliding and compression windows, in bytes on all "
        "devices together: with models or drafters that have such windows, shared "
        "prefixes end at snapshots. By default as much as all pages take.",
        None,
        at_least=0,
    )
    grammars: bool = option(
        "Whether answers may have to obey grammars (response_format, "
        "structured_outputs, a tool_choice that forces calls). Without, fewer programs "
        "are compiled.",
        True,
    )
    max_queued: int = option(
        "Outputs that may wait for a slot; more are refused with 503.", 256, at_least=1
    )
    max_queued_tokens: int = option(
        "Tokens of the prompts that may wait.", 262_144, at_least=1
    )
    rounds_per_call: int = option(
        "Most rounds between two looks at what has come.", 16, at_least=1
    )
    call_seconds: float = option(
        "What these rounds take, about, while no prompt is read.", 0.1, at_least=0.001
    )
    api_key_file: str | None = option(
        "File with one API key per line. JAXSPARK_API_KEYS in the environment has them "
        "with commas between. Without keys everybody may come in.",
        None,
    )
    max_body_bytes: int = option(
        "Most bytes of a request's body.", 4 * 2**20, at_least=1
    )
    body_seconds: float = option(
        "Seconds in which a header must have come, and then a body.",
        30.0,
        at_least=0.001,
    )
    cors_origins: tuple[str, ...] = option(
        "Origins whose pages may ask, such as https://example.com; * for all.", ()
    )
    drain_seconds: float = option(
        "Seconds for requests that are there when SIGTERM or SIGINT comes.",
        DRAIN_S,
        at_least=0,
    )

    def app_options(self) -> "AppOptions":
        """What clients may do, with the keys that this process finds.

        Raises:
          ValueError: keys that are none.
        """
        from jaxspark.serving.app_options import AppOptions

        return AppOptions(
            api_keys=self.keys(),
            most_body_bytes=self.max_body_bytes,
            body_seconds=self.body_seconds,
            cors_origins=self.cors_origins,
        )

    def keys(self) -> tuple[str, ...]:
        """The API keys."""
        keys = os.environ.get(KEYS, "").split(",")
        if self.api_key_file is not None:
            lines = Path(self.api_key_file).read_text("utf-8").splitlines()
            keys += [line for line in lines if not line.startswith("#")]
        found = tuple(key.strip() for key in keys if key.strip())
        if self.api_key_file is not None and not found:
            raise ValueError(f"--api_key_file={self.api_key_file} has no key")
        return found


@dataclass(frozen=True)
class Service:
    """A server's parts.

    Attributes:
      name: what clients call the model.
      engine: computes; not started yet.
      app: answers HTTP by it.
    """

    name: str
    engine: "Engine"
    app: "FastAPI"


def make_service(
    config: ServeOptions,
    *,
    on_failure: Callable[[], None],
    others: Sender | None = None,
    app_options: "AppOptions | None" = None,
) -> Service:
    """Loads the models and makes an engine and its application.

    Args:
      config: what is served.
      on_failure: called if the engine fails.
      others: the other processes of this one's job, if there are any and it leads.
      app_options: what clients may do; None takes the configuration's.

    Raises:
      ValueError: what cannot be served, or a package is missing.
    """
    check_packages()
    from jaxspark.serving import Engine, Pace, QueueLimits, Served
    from jaxspark.serving.app import make_app
    from jaxspark.serving.memory import keep_everything
    from jaxspark.serving.metrics import Metrics
    from jaxspark.serving.tracing import Tracing

    app_options = config.app_options() if app_options is None else app_options
    target, _ = config.load()
    drafter = load_drafter(config.draft, target)
    context = _context(config, target, drafter)
    options, _ = chosen_options(
        config.schedule,
        config.costs,
        target,
        drafter,
        draft=config.draft,
        block_length=config.block_length,
        tokens=context,
        coupling=config.coupling,
        temperature=1.0,
        slots=config.slots,
        confidences=config.confidences,
        measure=False,  # The engine times its own rounds.
    )
    changes = {"name": config.served_name} if config.served_name else {}
    served = Served.of(
        target,
        fingerprint=fingerprint(config),
        context=context,
        most_prompt=config.max_prompt_tokens,
        most_output=config.max_output_tokens,
        least_priority=config.min_priority,
        **changes,
    )
    metrics = Metrics(served.name)
    engine = Engine(
        target,
        drafter,
        slots=config.slots,
        context=context,
        options=options,
        chunk=config.prefill_chunk,
        together=config.prefill_together,
        max_stop_ids=config.max_stop_ids,
        prefix_cache=config.prefix_cache,
        cache_pages=config.cache_pages,
        snapshot_bytes=config.cache_snapshot_bytes,
        grammars=config.grammars,
        queue=QueueLimits(requests=config.max_queued, tokens=config.max_queued_tokens),
        pace=Pace(most=config.rounds_per_call, seconds=config.call_seconds),
        observers=[metrics],
        on_ready=keep_everything,
        on_failure=on_failure,
        others=others,
    )
    metrics.watch(engine)
    tracing = Tracing.of_environment(os.environ, served.name)
    app = make_app(engine, served, app_options, metrics, tracing)
    return Service(served.name, engine, app)


def _context(config: ServeOptions, target: Target, drafter: Drafter) -> int:
    """Most tokens of a prompt and its output; by default no more than pages hold."""
    from jaxspark.serving.cache_memory import most_context

    if config.context is not None:
        return config.context
    context = min(target.model.config.max_position_embeddings, 2048)
    if config.cache_pages is None:
        return context
    block = check_block_length(drafter, config.block_length)
    held = max(2, most_context(config.cache_pages, block))
    if held < context:
        log.info("the context is %d: --cache_pages hold no more", held)
    return min(context, held)


def show_logs() -> None:
    """Shows what is logged on standard output."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("jaxspark").setLevel(logging.INFO)


def check_packages() -> None:
    """That a server can be made here.

    Raises:
      ValueError: a package is missing.
    """
    try:
        import jaxspark.serving.app
        import jaxspark.serving.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a server needs more packages: pip install 'jaxspark[serve]' ({error})"
        ) from error


def fingerprint(config: ServeOptions) -> str:
    """Tells clients whether a seed can mean the same as before."""
    parts = (
        *(jaxspark.__version__, config.target, config.dtype, config.coupling),
        *(config.mesh, jax.default_backend(), jax.__version__),
    )
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:10]}"
