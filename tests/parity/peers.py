"""Other projects' own drafter classes, driven by a program of its own.

Runs where PyTorch is (see `oracle.py`), with the checkouts of DeepSpec and of
vllm-project/speculators that JAXSPARK_DEEPSPEC and JAXSPARK_SPECULATORS name. Each line
of standard input is a JSON request about a case of `drafter_cases.py`:

  write: {"case": name, "target": folder, "save": folder, "out": path.npz}
         the case's model, as the project saves it
  read:  {"case": name, "target": folder, "folder": path, "out": path.npz}
         what the project says of a folder: logits [anchors, G, W] of drafting the
         tokens of `drafter_cases.tokens`, confidence [anchors, G] where it has that

The answer is {} or {"error": traceback}.
"""

import os
import sys
from types import SimpleNamespace

for variable, folders in (
    ("JAXSPARK_DEEPSPEC", ("",)),
    ("JAXSPARK_SPECULATORS", ("src", "hs_connectors/src")),
):
    for folder in folders if variable in os.environ else ():
        sys.path.insert(1, os.path.join(os.environ[variable], folder))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from drafter_cases import (  # noqa: E402
    ANCHORS,
    BLOCK,
    DEEPSPEC,
    SPECULATORS,
    TARGETS,
    drafter_weights,
    peer,
    tokens,
)
from oracle import build, serve  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from torch.nn.functional import pad  # noqa: E402

FLEX_BLOCK = 128  # flex_attention wants whole blocks of this many


class Arguments(SimpleNamespace):
    """What a DeepSpec builder takes: attributes that can be asked for by name."""

    def __contains__(self, name):
        return hasattr(self, name)


def write(name, target, folder):
    """Saves the case's model with random weights, as its project does."""
    config = transformers.AutoConfig.from_pretrained(target)
    if peer(name) == "deepspec":
        model = new_deepspec(name, config)
    else:
        model = new_speculators(name, target)
    saved = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.startswith("verifier_")
    }
    weights = drafter_weights(
        saved, load_file(os.path.join(target, "model.safetensors"))
    )
    state = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
    model.load_state_dict(state, strict=False)
    model.save_pretrained(folder, safe_serialization=True)


def new_deepspec(name, target_config):
    """A model of DeepSpec's classes, configured by its own builders."""
    from deepspec.modeling import dspark, eagle3

    package = (eagle3 if "eagle3" in name else dspark).qwen3
    config = package.build_draft_config(
        target_config=target_config,
        model_args=Arguments(**DEEPSPEC[name]),
    )
    kind = "Qwen3Eagle3Model" if "eagle3" in name else "Qwen3DSparkModel"
    return getattr(package, kind)(config)


def new_speculators(name, target):
    """A model of speculators' classes."""
    from speculators import SpeculatorsConfig, VerifierConfig, models
    from speculators.proposals import GreedyTokenProposalConfig

    kind, layers, options = SPECULATORS[name]
    depth = 1 if kind == "eagle3" else 2
    prefix = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle3"}[kind]
    config = getattr(models, prefix + "SpeculatorConfig")(
        transformer_layer_config=transformers.AutoConfig.for_model(
            **{**TARGETS[layers], "num_hidden_layers": depth}
        ),
        speculators_config=SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=BLOCK)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(target),
        ),
        **options,
    )
    unfused(config)
    return getattr(models, prefix + "DraftModel")(config)


def read(name, target, folder):
    """Logits and confidences of a folder."""
    target = build({"folder": target}).eval()
    if peer(name) == "deepspec":
        draft = deepspec_eagle3 if "eagle3" in name else deepspec_dspark
    else:
        draft = speculators_eagle3 if "eagle3" in name else speculators_blocks
    model = load(name, folder).eval()
    rows = []
    for anchor, ids in zip(ANCHORS, torch.from_numpy(tokens()).long()):
        states = target(ids[None], output_hidden_states=True).hidden_states
        rows.append(draft(model, states, ids, anchor))
    arrays = {}
    for index, key in enumerate(("logits", "confidence")):
        values = [row[index] for row in rows]
        if values[0] is not None:
            arrays[key] = torch.stack(values).numpy()
    return arrays


def load(name, folder):
    """The project's own loading, in float32 with unfused attention."""
    if peer(name) == "deepspec":
        import deepspec.modeling

        kind = "Qwen3Eagle3Model" if "eagle3" in name else "Qwen3DSparkModel"
        return getattr(deepspec.modeling, kind).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    unfused(config)
    return SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32)


def unfused(config):
    """Plain attention for blocks, whose masks are compiled for the other kind.

    Eagle3 stays: its plain masks let later steps see what they should not.
    """
    if config.speculators_model_type != "eagle3":
        config.transformer_layer_config._attn_implementation = "eager"


def deepspec_dspark(model, states, ids, anchor):
    """One block: logits with the bias of the given tokens, and the confidence."""
    from deepspec.modeling import dspark

    size = model.block_size
    block = torch.full((1, size), model.mask_token_id)
    block[0, 0] = ids[anchor]
    context = dspark.extract_context_feature(states, model.target_layer_ids)
    hidden = model._forward_backbone(
        target_hidden_states=context[:, :anchor],
        noise_embedding=model.embed_tokens(block),
        position_ids=torch.arange(anchor + size)[None],
        attention_mask=None,
        is_causal=False,
    )
    logits, previous = model.compute_logits(hidden), ids[None, anchor : anchor + size]
    if model.markov_head is not None:
        logits = model.markov_head.apply_block_logits(
            logits[:, None], token_ids=previous[:, None], hidden_states=hidden[:, None]
        )[:, 0]
    confidence = model.predict_confidence_step(hidden, prev_token_ids=previous)
    return logits[0], None if confidence is None else confidence[0]


def deepspec_eagle3(model, states, ids, anchor):
    """Token by token over a cache, as DeepSpec's evaluation drafts."""
    from deepspec.modeling.eagle3 import extract_eagle3_context_feature

    positions = torch.arange(len(ids))[None]
    features = extract_eagle3_context_feature(states, model.target_layer_ids)
    cache = transformers.DynamicCache()
    hidden = model.extend_draft_cache(
        hidden_states=features[:, :anchor],
        input_ids=ids[None, 1 : anchor + 1],
        position_ids=positions[:, :anchor],
        past_key_values=cache,
    )
    logits = [model.compute_logits(hidden)[0, -1]]
    for place in range(anchor, anchor + model.ttt_length - 1):
        hidden = model(
            hidden_states=hidden,
            input_ids=ids[None, place + 1 : place + 2],
            position_ids=positions[:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(model.compute_logits(hidden)[0, -1])
    return torch.stack(logits), None


def recorded_metrics(model, *arguments, **options):
    """What the training forward of speculators hands to its metrics, call by call."""
    module = sys.modules[type(model).__module__]
    seen, original = [], module.compute_metrics

    def record(*given, **named):
        seen.append(given)
        return torch.zeros(()), {}

    module.compute_metrics = record
    try:
        model(*arguments, **options)
    finally:
        module.compute_metrics = original
    return seen


def inputs_of_layers(model, states):
    """Taps as speculators numbers them: state k is the input of layer k."""
    return torch.cat([states[layer] for layer in model.target_layer_ids], dim=-1)


def speculators_blocks(model, states, ids, anchor):
    """One block of DFlash or DSpark in a sequence with this anchor alone."""
    mask = torch.zeros(1, len(ids))
    mask[0, anchor] = 1
    ((logits, _, third, *_),) = recorded_metrics(
        model,
        inputs_of_layers(model, states),
        ids[None],
        mask,
        states[-1],
        torch.zeros(1, len(ids), dtype=torch.long),
        max_anchors=1,
    )
    first = 0 if model.config.sample_from_anchor else 1
    confident = getattr(model.config, "enable_confidence_head", False)
    return logits[0, first:], third[0, first:] if confident else None


def speculators_eagle3(model, states, ids, anchor):
    """The training-time test's steps at the pair of the anchor."""
    pairs, padding = len(ids) - 1, FLEX_BLOCK - len(ids) + 1
    documents = torch.full((1, FLEX_BLOCK), -1)
    documents[:, :pairs] = 0
    steps = recorded_metrics(
        model,
        pad(inputs_of_layers(model, states)[:, :-1], (0, 0, 0, padding)),
        pad(ids[None, 1:], (0, padding)),
        documents,
        verifier_last_hidden_states=pad(states[-1][:, 1:], (0, 0, 0, padding)),
        ttt_steps=BLOCK,
    )
    return torch.stack([logits[0, anchor - 1] for logits, *_ in steps]), None


def answer(request):
    """Does what a request asks for."""
    if not request:  # a sign of life
        return {}
    arrays = {}
    if "save" in request:
        write(request["case"], request["target"], request["save"])
    else:
        with torch.no_grad():
            arrays = read(request["case"], request["target"], request["folder"])
    np.savez(request["out"], **arrays)
    return {}


if __name__ == "__main__":
    serve(answer)
