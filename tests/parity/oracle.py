"""The oracle: Hugging Face transformers on PyTorch, a program of its own.

Runs in an environment with PyTorch, which need not be the project's, and never touches
the network. Each line of standard input is a JSON request, each answer a JSON line:

  weights: {"config": {...}, "seed": n} | {"folder": path} | {"gguf": path}
  save:    optional folder, gets config.json and model.safetensors
  tokens:  optional list of token id lists
  hidden:  also return all hidden states (default false)
  chosen:  also return what every indexer chose, chosen_<i>_<layer> [T, X] (-1: none)
  text:    optional list of strings to tokenize ("gguf" only)
  out:     an .npz path for logits_<i> [T, V], hidden_<i> [L+1, T, D], ids_<i> [T]

The answer is {} or {"error": traceback}.
"""

import json
import os
import sys
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from v4_weights import random_weights as v4_weights  # noqa: E402
from weights import random_weights  # noqa: E402

EXACT = {"dtype": torch.float32, "attn_implementation": "eager"}


def build(request):
    """The model a request asks for, in float32 with unfused attention."""
    if "folder" in request:
        return transformers.AutoModelForCausalLM.from_pretrained(
            request["folder"], **EXACT
        )
    if "gguf" in request:
        folder, name = os.path.split(request["gguf"])
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, **EXACT
        )
    config = transformers.AutoConfig.for_model(**request["config"])
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    v4 = request["config"]["model_type"] == "deepseek_v4"
    weights = (v4_weights if v4 else random_weights)(request["config"], request["seed"])
    buffers = set(dict(model.named_buffers())) & set(model.state_dict())
    expected = set(dict(model.named_parameters())) | buffers
    if expected != set(weights):
        raise ValueError(f"tensor names differ: {sorted(expected ^ set(weights))}")
    model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in weights.items()},
        strict=False,
    )
    return model


def answer(request, models):
    """Runs one request; the last model is kept for requests with the same weights."""
    if not request:  # a sign of life
        return {}
    key = json.dumps([request.get(k) for k in ("config", "seed", "folder", "gguf")])
    if key not in models:
        models.clear()
        models[key] = build(request).eval()
    model = models[key]
    if "save" in request:
        model.save_pretrained(request["save"], safe_serialization=True)
    arrays = {}
    chosen = record_choices(model) if request.get("chosen", False) else {}
    for index, ids in enumerate(request.get("tokens", [])):
        with torch.no_grad():
            result = model(
                torch.tensor([ids]), output_hidden_states=request.get("hidden", False)
            )
        for layer, choice in chosen.items():
            arrays[f"chosen_{index}_{layer}"] = choice[0].numpy()
        arrays[f"logits_{index}"] = result.logits[0].numpy()
        if request.get("hidden", False):
            states = torch.stack([state[0] for state in result.hidden_states])
            arrays[f"hidden_{index}"] = states.numpy()
    if "text" in request:
        folder, name = os.path.split(request["gguf"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        for index, text in enumerate(request["text"]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            arrays[f"ids_{index}"] = np.asarray(ids, np.int32)
    if "out" in request:
        np.savez(request["out"], **arrays)
    return {}


def record_choices(model):
    """A dict that gets each indexer's last output, by layer."""
    chosen = {}
    for layer, block in enumerate(model.model.layers):
        indexer = getattr(block.self_attn.compressor, "indexer", None)
        if indexer is not None:
            indexer.register_forward_hook(
                lambda module, inputs, output, layer=layer: chosen.update(
                    {layer: output}
                )
            )
    return chosen


def serve(answer):
    """Answers requests until standard input ends."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    models = {}
    serve(lambda request: answer(request, models))
