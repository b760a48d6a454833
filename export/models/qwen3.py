"""The language model whose hidden states transformers read prompts by (transformers' ``Qwen3ForCausalLM``).

Yang et al. 2025, "Qwen3 Technical Report" (arXiv 2505.09388). Only what leads to the last hidden state that is read is
here: neither the layers behind it, nor the final norm, nor the projection to words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig, check_divides
from calotype.runtime.errors import UnsupportedArchitectureError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """Transformers' settings of a ``Qwen3Config``."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    }
    # What training and writing text take, and what follows from the rest.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
            "layer_types", "max_window_layers", "model_type", "pad_token_id", "rope_parameters", "sliding_window",
            "torch_dtype", "transformers_version", "use_cache",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_divides("the text encoder's num_key_value_heads", self.num_key_value_heads, (self.num_attention_heads,))
        check_divides("twice two halves of the text encoder's heads", 2, (self.head_dim,))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Qwen3Config:
        """See :meth:`ModelConfig.from_json`; transformers 5 keeps the rotation's base in a table of its own."""
        rotary = values.get("rope_parameters") or {}
        if rotary.get("rope_type", "default") != "default":
            raise UnsupportedArchitectureError(
                f"rope_type={rotary['rope_type']!r} of the text encoder is not supported; supported: default"
            )
        found = {"rope_theta": rotary["rope_theta"], **values} if "rope_theta" in rotary else values
        return super().from_json(found)


class Attention(nn.Module):
    """Queries and keys are normed and turned; several heads of queries share one of keys and values."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        self.size, self.shared = size, config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        self.q_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(size, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        # (B, T, C), two of (T, size), (B, 1, T, T) -> (B, T, C)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.size)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotated(own, turn) for own in (self.q_norm(query), self.k_norm(key)))  # (B, T, heads, size)
        key, value = (own.repeat_interleave(self.shared, dim=2) for own in (key, value))
        query, key, value = (own.transpose(1, 2) for own in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Qwen3(nn.Module):
    """Token ids to the hidden states of some layers, side by side.

    Args:
        config: of the whole model.
        read: the hidden states that are read, rising; 0 are the embeddings, k what the k-th layer gives.
    """

    def __init__(self, config: Qwen3Config, read: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.read = config, read
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(read[-1]))

    @property
    def width(self) -> int:
        """Of what comes out."""
        return len(self.read) * self.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (B, T, width) of ids (B, T) int64, of which the mask (B, T) int64 is 1 where no padding is."""
        length = input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        size = self.config.head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = (places.float()[:, None] * frequencies).repeat(1, 2)  # (T, size)
        seen = (places[:, None] >= places)[None, None] & (attention_mask > 0)[:, None, None, :]  # (B, 1, T, T)
        x = self.embed_tokens(input_ids)
        states = {0: x}
        for number, layer in enumerate(self.layers, start=1):
            x = states[number] = layer(x, (angles.cos(), angles.sin()), seen)
        return torch.cat([states[number] for number in self.read], dim=-1)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of numbers, half a head apart, turned by cosines and sines (T, size); Su et al. 2021 (arXiv 2104.09864)."""
    # x (B, T, heads, size)
    cosines, sines = (own[:, None] for own in turn)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
