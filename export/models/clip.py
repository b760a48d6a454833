"""The text towers: CLIP's of SD 1.x and SDXL, OpenCLIP's of SD 2.x and SDXL (transformers' ``CLIPTextModel``).

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig, check_divides
from calotype.runtime.errors import UnsupportedArchitectureError

ACTIVATIONS = ("quick_gelu", "gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(ModelConfig):
    """Transformers' settings of a ``CLIPTextConfig``; ``projection_dim`` counts only with ``with_projection``."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407
    with_projection: bool = False

    # Training-time settings, and the many defaults that transformers writes into every configuration.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures", "attention_dropout", "bos_token_id", "dropout", "dtype", "initializer_factor",
            "initializer_range", "model_type", "pad_token_id", "torch_dtype", "transformers_version",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise UnsupportedArchitectureError(
                f"hidden_act={self.hidden_act!r} of the text encoder is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        check_divides("the text encoder's num_attention_heads", self.num_attention_heads, (self.hidden_size,))


class Tower(Protocol):
    """What the towers of texts and of pictures have in common."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # (B, T, C) -> (B, T, C), where it is causal each token seeing itself and those before it
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, config: Tower) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        out: Tensor = self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: Tower, *, causal: bool = True) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, causal=causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> Tensor:
        # (B, T), (E, C) -> (B, T, C)
        table = self.token_embedding
        if extra_embeddings is None:
            tokens = table(input_ids)
        else:
            # Looked up apart: a table of both would be copied for every prompt.
            beyond = input_ids - table.num_embeddings  # (B, T)
            extra = F.embedding(beyond.clamp(min=0), extra_embeddings)
            tokens = torch.where(beyond[..., None] < 0, table(input_ids.clamp(max=table.num_embeddings - 1)), extra)
        return tokens + self.position_embedding.weight[: input_ids.shape[1]]


class Layers(nn.Module):
    def __init__(self, config: Tower, *, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal=causal) for _ in range(config.num_hidden_layers))


class TextTransformer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> list[Tensor]:
        """Hidden states (B, T, C): the embeddings, then each layer's output; the last is not normalised yet."""
        states = [self.embeddings(input_ids, extra_embeddings)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


class TextEncoder(nn.Module):
    """Token ids to per-token embeddings and one pooled embedding."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if config.with_projection else None
        )

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode.

        Args:
            input_ids: (B, T) int64.
            extra_embeddings: (E, C), what the ids from ``vocab_size`` up stand for: textual inversion, Gal et al. 2022
                (arXiv 2208.01618).

        Returns:
            The normalised last hidden state (B, T, C); the pooled embedding at the end token, (B, C), projected to
            (B, P) where the tower has a projection; all hidden states, not normalised, as a list of (B, T, C).
        """
        states = self.text_model(input_ids, extra_embeddings)
        last = self.text_model.final_layer_norm(states[-1])
        # Configurations written before transformers 4.31 say eos_token_id=2, a lie: there the end token is the
        # largest id of the vocabulary, and padding, where it is the end token too, comes after the first one.
        if self.config.eos_token_id == 2:
            end = input_ids.masked_fill(input_ids >= self.config.vocab_size, 0).argmax(dim=-1)
        else:
            end = (input_ids == self.config.eos_token_id).int().argmax(dim=-1)
        pooled = last[torch.arange(last.shape[0], device=last.device), end]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return last, pooled, states
