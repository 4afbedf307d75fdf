"""Architecture of DeepSeek-V4."""

from dataclasses import dataclass, field

from jaxspark.models.layers.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class DeepSeekV4Config:
    """Architecture, under the names of the released `config.json`.

    Attributes:
      compress_ratios: per layer, positions per compressed entry: 0 (window only),
        `csa_ratio` or `hca_ratio`.
      num_hash_layers: first layers, whose experts are looked up by token id.
      rope: of layers without entries.
      compress_rope: of layers with entries: queries, keys, entries and index.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    num_hash_layers: int = 3
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    compress_rope: RopeConfig = field(
        default_factory=lambda: RopeConfig(
            rope_type="yarn",
            rope_theta=160000.0,
            factor=16.0,
            original_max_position_embeddings=65536,
            attention_factor=1.0,
        )
    )
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02

    def __post_init__(self):
        known = {0, self.csa_ratio, self.hca_ratio}
        if not self.compress_ratios or not set(self.compress_ratios) <= known:
            raise ValueError(
                f"compress_ratios must hold one of {sorted(known)} for every layer, "
                f"got {self.compress_ratios}"
            )
        for name, value, divisor in (
            ("num_attention_heads", self.num_attention_heads, self.o_groups),
            ("qk_rope_head_dim", self.qk_rope_head_dim, 2),
        ):
            if value % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
        for name, value, least in (
            ("head_dim", self.head_dim, self.qk_rope_head_dim),
            ("index_head_dim", self.index_head_dim, self.qk_rope_head_dim),
            ("n_routed_experts", self.n_routed_experts, self.num_experts_per_tok),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("rope", "compress_rope"):
            scale = getattr(self, name).frequencies(self.qk_rope_head_dim)[1]
            if scale != 1:
                raise ValueError(
                    f"{name} scales cos and sin by {scale:.4g}, but outputs are turned "
                    "back by the same angles; set its attention_factor to 1"
                )

    @property
    def num_hidden_layers(self) -> int:
        """Depth."""
        return len(self.compress_ratios)

    def kind(self, layer: int) -> tuple[int, bool]:
        """What a layer is built from: its compression ratio, and hashed experts."""
        return self.compress_ratios[layer], layer < self.num_hash_layers

    @property
    def layer_pattern(self) -> tuple[int, int]:
        """Layers before the repeated pattern, and of one repetition: the least sum."""
        kinds = [self.kind(layer) for layer in range(self.num_hidden_layers)]
        depth = len(kinds)
        patterns = [
            (first, period)
            for first in range(depth)
            for period in range(1, depth - first + 1)
            if (depth - first) % period == 0
            and kinds[first:]
            == kinds[first : first + period] * ((depth - first) // period)
        ]
        return min(patterns, key=lambda pattern: (sum(pattern), pattern[1]))

    @property
    def layer_stacks(self) -> list[tuple[int, int]]:
        """First layer and number of layers of each stack, which lie `period` apart."""
        first, period = self.layer_pattern
        repetitions = (self.num_hidden_layers - first) // period
        alone = [(layer, 1) for layer in range(first)]
        return alone + [(first + offset, repetitions) for offset in range(period)]
