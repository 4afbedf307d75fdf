"""DSpark drafting in plain NumPy, written from the equations and nothing else.

One sequence at a time, tokens as rows, float64, no cache: every draft layer computes
the keys and values of the whole context again. Weights come as {DeepSpec tensor name:
array}. It shares no code and no layout with `jaxspark.drafters`.
"""

import numpy as np


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


def softmax(x):
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):
    """Over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, positions, theta):
    """Turns x [T, heads, H] by its positions; pairs are (i, i + H/2)."""
    width = x.shape[-1]
    frequencies = theta ** (-np.arange(0, width, 2) / width)
    angles = positions[:, None, None] * frequencies
    turned = np.empty_like(x)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    turned[..., : width // 2] = first * np.cos(angles) - second * np.sin(angles)
    turned[..., width // 2 :] = second * np.cos(angles) + first * np.sin(angles)
    return turned


class NumpyDSpark:
    """The draft of one block for one sequence.

    Args:
      weights: tensors by DeepSpec name.
      embedding: the target's embedding table [V, D].
      head: rows of the LM head that the draft uses, [V or draft vocabulary, D].
      heads, kv_heads, eps, theta: of the draft layers.
      mask_token: fills the block after the anchor.
      kind: "vanilla", "gated", "rnn", or None without a sequential head.
      confidence: None, "plain" or "markov".
      target_ids: target id of each row of a pruned head, or None.
      anchor_predicts: row j predicts position a+1+j (DSpark); otherwise G mask rows
        after the anchor predict their own positions (DFlash as published).
    """

    def __init__(
        self,
        weights,
        embedding,
        head,
        *,
        heads,
        kv_heads,
        eps,
        theta,
        mask_token,
        kind=None,
        confidence=None,
        target_ids=None,
        anchor_predicts=True,
    ):
        self.w = {name: value.astype(np.float64) for name, value in weights.items()}
        self.embedding, self.head = embedding.astype("f8"), head.astype("f8")
        self.heads, self.kv_heads, self.eps, self.theta = heads, kv_heads, eps, theta
        self.mask_token, self.kind, self.confidence = mask_token, kind, confidence
        self.target_ids, self.anchor_predicts = target_ids, anchor_predicts
        self.depth = len({n.split(".")[1] for n in self.w if n.startswith("layers.")})

    def context(self, taps):
        """taps [m, S, D] -> features [S, D]."""
        joined = np.concatenate(list(taps), axis=-1)
        mixed = joined @ self.w["fc.weight"].T
        return rms_norm(mixed, self.w["hidden_norm.weight"], self.eps)

    def backbone(self, context, anchor, length):
        """Normed hidden states [G, D] of a block whose anchor follows `context`."""
        rows = length if self.anchor_predicts else length + 1
        ids = [anchor] + [self.mask_token] * (rows - 1)
        x = self.embedding[ids]
        for index in range(self.depth):
            x = self.layer(f"layers.{index}.", x, context)
        x = rms_norm(x, self.w["norm.weight"], self.eps)
        return x if self.anchor_predicts else x[1:]

    def layer(self, name, x, context):
        """One draft layer: block rows see all of the context and of the block."""
        w = self.w

        def projected(rows, which, heads, norm=None):
            y = rows @ w[f"{name}self_attn.{which}_proj.weight"].T
            y = y.reshape(len(rows), heads, -1)
            if norm is None:
                return y
            return rms_norm(y, w[f"{name}self_attn.{norm}_norm.weight"], self.eps)

        h = rms_norm(x, w[name + "input_layernorm.weight"], self.eps)
        both = np.concatenate([context, h])
        positions = np.arange(len(both), dtype=float)
        q = projected(h, "q", self.heads, "q")
        k = projected(both, "k", self.kv_heads, "k")
        v = projected(both, "v", self.kv_heads)
        q = rope(q, positions[len(context) :], self.theta)
        k = rope(k, positions, self.theta)
        outputs = []
        for n in range(self.heads):
            shared = n // (self.heads // self.kv_heads)
            scores = q[:, n] @ k[:, shared].T / np.sqrt(q.shape[-1])
            outputs.append(softmax(scores) @ v[:, shared])
        o = np.concatenate(outputs, axis=-1) @ w[name + "self_attn.o_proj.weight"].T
        x = x + o
        h = rms_norm(x, w[name + "post_attention_layernorm.weight"], self.eps)
        gate = h @ w[name + "mlp.gate_proj.weight"].T
        up = h @ w[name + "mlp.up_proj.weight"].T
        return x + (gate * sigmoid(gate) * up) @ w[name + "mlp.down_proj.weight"].T

    def bias(self, state, previous, h):
        """Next state and b of one row of the sequential head."""
        if self.kind is None:
            return state, 0.0
        w1 = self.w["markov_head.markov_w1.weight"]
        w2 = self.w["markov_head.markov_w2.weight"]
        y = w1[previous]
        if self.kind == "vanilla":
            return state, w2 @ y
        if self.kind == "gated":
            weight = self.w["markov_head.gate_proj.weight"]
            gate = weight @ np.concatenate([h, y])
            gate = sigmoid(gate + self.w["markov_head.gate_proj.bias"])
            return state, w2 @ (gate * y)
        z = self.w["markov_head.joint_proj.weight"] @ np.concatenate([state, y, h])
        g, c, o = np.split(z + self.w["markov_head.joint_proj.bias"], 3)
        state = sigmoid(g) * state + (1 - sigmoid(g)) * np.tanh(c)
        return state, w2 @ np.tanh(o)

    def confidence_logit(self, previous, h):
        """k_j, or 0 without a confidence head."""
        if self.confidence is None:
            return 0.0
        if self.confidence == "markov":
            h = np.concatenate([h, self.w["markov_head.markov_w1.weight"][previous]])
        weight = self.w["confidence_head.proj.weight"][0]
        return weight @ h + self.w["confidence_head.proj.bias"][0]

    def draft(self, taps, anchor, length, chosen=None):
        """Drafts left to right.

        Args:
          taps: [m, S, D] of all positions before the anchor.
          anchor: its token.
          length: G.
          chosen: tokens to take instead of the most likely ones.

        Returns:
          hidden [G, D], base logits [G, W], corrected logits [G, W], tokens [G] and
          confidence logits [G].
        """
        hidden = self.backbone(self.context(taps), anchor, length)
        base = hidden @ self.head.T
        rank = self.w.get("markov_head.markov_w1.weight", np.zeros((1, 1))).shape[1]
        state, previous = np.zeros(rank), anchor
        corrected, tokens, confidences = [], [], []
        for j in range(length):
            confidences.append(self.confidence_logit(previous, hidden[j]))
            state, bias = self.bias(state, previous, hidden[j])
            corrected.append(base[j] + bias)
            best = int(np.argmax(corrected[-1]))
            best = best if self.target_ids is None else int(self.target_ids[best])
            previous = best if chosen is None else int(chosen[j])
            tokens.append(previous)
        return hidden, base, np.array(corrected), tokens, np.array(confidences)
