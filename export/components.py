"""Components that several families have, loaded from diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from calotype.export.contents import read_tensors
from calotype.export.flux2_keys import is_original, to_diffusers
from calotype.export.folder import Folder
from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.flux2 import Flux2Config, Flux2Transformer
from calotype.export.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig
from calotype.export.models.qwen3 import Qwen3, Qwen3Config
from calotype.export.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.weights import load_module

MODEL_WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS = ("Flux2Transformer2DModel",)
LANGUAGE_MODELS = ("Qwen3ForCausalLM", "Qwen3Model")
FLUX2_AUTOENCODERS = ("AutoencoderKLFlux2",)
UNETS = ("UNet2DConditionModel",)
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
# Settings that versions of transformers write into every configuration and that no text tower reads.
TRANSFORMERS_NOISE = frozenset(
    {
        "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
        "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
        "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    }
)  # fmt: skip


def load_unet(folder: Folder, name: str = "unet") -> tuple[UNet, int | None]:
    """The UNet, and the latents' size that it was trained with."""
    config = folder.config(name, UNETS)
    size = config.get("sample_size")
    unet = load_module(UNet, UNetConfig.from_json(config), folder.weights(name, MODEL_WEIGHTS), "UNet")
    return unet, max(size) if isinstance(size, list) else size


def load_text_encoder(folder: Folder, name: str) -> TextEncoder:
    """A text tower of CLIP's or OpenCLIP's."""
    config = folder.config(name, TEXT_ENCODERS)
    settings = {key: value for key, value in config.items() if key not in TRANSFORMERS_NOISE}
    settings["with_projection"] = config.get("architectures") == ["CLIPTextModelWithProjection"]
    state = folder.weights(name, "model")
    return load_module(TextEncoder, TextEncoderConfig.from_json(settings), state, name.replace("_", " "))


def load_autoencoder(folder: Folder, name: str = "vae") -> Autoencoder | TinyAutoencoder:
    """An autoencoder, or a tiny one, in the folder ``name``, which is empty where the folder itself is one."""
    config = folder.config(name, AUTOENCODERS)
    state = folder.weights(name, MODEL_WEIGHTS)
    if config.get("_class_name") == "AutoencoderTiny":
        return load_module(TinyAutoencoder, TinyAutoencoderConfig.from_json(config), state, "tiny autoencoder")
    return load_module(Autoencoder, AutoencoderConfig.from_json(config), state, "autoencoder")


def load_flux2_transformer(folder: Folder, name: str = "transformer") -> Flux2Transformer:
    """FLUX.2's transformer, the folder's own or one from a file in diffusers' or the original code's names."""
    config = Flux2Config.from_json(folder.config(name, TRANSFORMERS))
    if folder.transformer is None:
        state: Mapping[str, Tensor] = folder.weights(name, MODEL_WEIGHTS)
    else:
        state, _ = read_tensors(folder.transformer)
        state = to_diffusers(state) if is_original(state) else state
    return load_module(Flux2Transformer, config, state, "transformer")


def load_flux2_autoencoder(folder: Folder, name: str = "vae") -> Flux2Autoencoder:
    """FLUX.2's autoencoder."""
    config = Flux2AutoencoderConfig.from_json(folder.config(name, FLUX2_AUTOENCODERS))
    return load_module(Flux2Autoencoder, config, folder.weights(name, MODEL_WEIGHTS), "autoencoder")


def load_language_model(folder: Folder, name: str, shares: Sequence[Fraction]) -> Qwen3:
    """A language model down to the last of the layers that are read, those after such ``shares`` of all it has."""
    config = folder.config(name, LANGUAGE_MODELS)
    settings = {key: value for key, value in config.items() if key not in TRANSFORMERS_NOISE}
    known = Qwen3Config.from_json(settings)
    read = tuple(int(share * known.num_hidden_layers) for share in shares)
    # What is behind the last layer that is read, and what a language model has and a text encoder needs not.
    unread = ("norm.", "lm_head.", *(f"layers.{number}." for number in range(read[-1], known.num_hidden_layers)))
    state = {key.removeprefix("model."): tensor for key, tensor in folder.weights(name, "model").items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(unread)}
    return load_module(lambda own: Qwen3(own, read), known, state, name.replace("_", " "))
