"""Small checkpoints of FLUX.2 klein with random weights, as diffusers and transformers write them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

LATENT_CHANNELS = 4
WIDTH = 32  # of the text encoder
MERGES = 400
TEXTS = (
    "a red apple on a wooden table, soft light, photograph of a lighthouse at dusk, the quick brown fox jumps over "
    "the lazy dog; it's raining cats and dogs, they're waiting for you'll-never-guess what comes next 1234567890"
)
# What Qwen3's own frame comes to for one message, with thinking on and off; the base of transformers' templates.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<think>", "</think>")
SPECIAL = 3  # of the added ones
GAIN = 3.0  # of the transformer's weights over PyTorch's own, which hardly let a prompt be seen
READ = (1, 2, 3)  # the hidden states that are read, as diffusers' pipeline is told of them


def tokenizer() -> Any:
    """A small tokenizer of Qwen's kind, of transformers."""
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learned.train_from_iterator([TEXTS], trainer)
    model = json.loads(learned.to_str())["model"]
    found = transformers.Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], chat_template=CHAT_TEMPLATE
    )
    found.add_tokens(
        [AddedToken(token, special=number < SPECIAL, normalized=False) for number, token in enumerate(ADDED)]
    )
    return found


def text_encoder(vocabulary: int) -> Any:
    """Four layers, of which the first three are read; heads that are wider than the model, as in Qwen3 4B."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(config)


def transformer(**settings: Any) -> Any:
    """One block of two streams, and two of one."""
    import diffusers

    usual: dict[str, Any] = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return diffusers.Flux2Transformer2DModel(**usual | settings)


def autoencoder(**settings: Any) -> Any:
    """Two levels, so that a packed latent spans four pixels."""
    import diffusers

    usual: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return diffusers.AutoencoderKLFlux2(**usual | settings)


def pipeline(*, distilled: bool = True, seed: int = 0) -> Any:
    """A pipeline of diffusers, no tensor of which begins as zeros or ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        torch.manual_seed(seed)
        own = tokenizer()
        found = diffusers.Flux2KleinPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(),
            text_encoder=text_encoder(len(own)),
            tokenizer=own,
            transformer=transformer(),
            is_distilled=distilled,
        )
        for part in (found.vae, found.text_encoder, found.transformer):
            give_values(part)
    return found


def give_values(module: Any) -> None:
    """Move norms' weights off one, and statistics off zero and one; let all that a transformer is given matter."""
    import torch

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif name.endswith("running_mean"):
                tensor.copy_(torch.randn_like(tensor) * 0.3)
            elif tensor.ndim == 1 and "inv_freq" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif type(module).__name__ == "Flux2Transformer2DModel":
                tensor.mul_(GAIN)


def write_klein(folder: Path, *, distilled: bool = True, seed: int = 0, shard: str | None = None) -> Path:
    """The checkpoint in ``folder``, weights in float16; ``shard`` is the most bytes of one of its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        whole = pipeline(distilled=distilled, seed=seed).to(torch.float16)
        whole.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    return folder
