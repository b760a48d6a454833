"""Attention in three plain operations, for training on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """While it is on, attention without a mask is two matrix products and a softmax.

    PyTorch's fused one saves memory, not time: on a CPU its backward pass took half of talbot's training step.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute ``func`` as it is, but for that."""
        if func is not F.scaled_dot_product_attention or kwargs:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        shares = torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1), dim=-1)
        return shares.to(value.dtype) @ value
