"""What `jaxspark bench --suite=serving` measures."""

from dataclasses import dataclass

from jaxspark.benchmark.load import LoadOptions
from jaxspark.configuration import option


@dataclass(frozen=True, kw_only=True)
class ServingOptions(LoadOptions):
    """Who is asked, how often, and for how much."""

    url: tuple[str, ...] = option(
        "Servers to ask, with commas between, such as http://127.0.0.1:8000; any that "
        "speaks OpenAI's protocol. Without, servers of ours are started. "
        "OPENAI_API_KEY in the environment has their key.",
        (),
    )
    url_model: str | None = option(
        "Model that is asked for at --url; by default the first it lists.", None
    )
    servers: tuple[str, ...] = option(
        "Servers of ours that are compared: a drafter, as in --draft, and behind @ a "
        "schedule.",
        ("dspark@lagged", "none"),
    )
    serving_slots: int = option("Outputs our servers decode at once.", 16, at_least=1)
    arrivals: tuple[str, ...] = option(
        "Loads: closed:CLIENTS or poisson:REQUESTS_PER_SECOND; +long behind one lets a "
        "long prompt come every --long_seconds as well.",
        ("closed:1", "closed:4", "closed:16", "poisson:0.5"),
    )
    serving_requests: int = option("Requests per run.", 32, at_least=1)
    length_scale: float = option(
        "Factor of the trace's lengths of prompts and answers.", 1.0, at_least=0.001
    )
    long_prompt: int = option("Tokens of the long prompts.", 4000, at_least=1)
    long_seconds: float = option("Seconds between them.", 2.0, at_least=0.001)
    answer_seconds: float = option(
        "Seconds without any news after which an answer has failed.", 600.0, at_least=1
    )
