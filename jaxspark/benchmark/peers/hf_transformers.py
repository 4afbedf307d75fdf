"""Greedy decoding with Hugging Face transformers, driven line by line.

Runs under a Python that has torch and transformers (not jaxspark). Arguments: a folder
with a checkpoint, a number of threads. Each input line is {"prompt": ids, "tokens": n};
each output line is {"seconds": decoding time, "tokens": ids}.
"""

import json
import sys
import time

import torch
import transformers


def main() -> None:
    """Serves requests until the input ends."""
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with torch.inference_mode():
            print(json.dumps(decode(model, request)), flush=True)


def decode(model, request) -> dict:
    """Prefill untimed, then one token at a time through the library's own cache."""
    ids = torch.tensor([request["prompt"]])
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    tokens, last = [], ids[:, -1:]
    begin = time.perf_counter()
    for _ in range(request["tokens"]):
        logits = model(last, past_key_values=cache).logits
        last = logits[:, -1:].argmax(-1)
        tokens.append(int(last))
    return {"seconds": time.perf_counter() - begin, "tokens": tokens}


if __name__ == "__main__":
    main()
