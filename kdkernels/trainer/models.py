"""A small Llama-style teacher from a configuration, a student cut out of it, and models that others have trained."""

import hashlib
from typing import Any

import torch

from ..cacheindex import sha256
from .config import UserError


def build(cfg, vocab_size, layers):
    """A LlamaForCausalLM with tied embeddings and weights drawn from cfg.seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(cfg.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=cfg.hidden,
            intermediate_size=cfg.ffn,
            num_hidden_layers=layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.heads,
            max_position_embeddings=cfg.seq_len,
            tie_word_embeddings=True,
            use_cache=False,
        )
    ).to(cfg.device)


def size(cfg, vocab_size, layers):
    """Parameters of `build`'s model, but for its norms."""
    return vocab_size * cfg.hidden + layers * cfg.hidden * (4 * cfg.hidden + 3 * cfg.ffn)


def pretrained(folder, cfg, vocab_size):
    """-> the causal language model in a folder of Hugging Face's, and its checksum.

    Nothing is downloaded, unpickled or run from there.
    """
    from transformers import AutoModelForCausalLM

    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise UserError(f"--teacher {folder}: no config.json, or no .safetensors file beside it")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            dtype=getattr(torch, cfg.dtype),
        )  # fmt: skip
        model, found = loaded
    except Exception as error:  # a damaged shard, an architecture it does not know: each has a type of its own
        raise UserError(f"--teacher {folder}: {str(error).splitlines()[0]}") from None
    if lacks := sorted([*found["missing_keys"], *(str(x) for x in found["mismatched_keys"])]):
        raise UserError(f"--teacher {folder}: its files lack {len(lacks)} of the model's weights, such as {lacks[0]}")
    about = model.config.get_text_config()
    for name, need in (("vocab_size", vocab_size), ("max_position_embeddings", cfg.seq_len)):
        if (has := getattr(about, name, None) or need) < need:
            raise UserError(f"--teacher {folder}: its {name} is {has}, the tokens and --seq-len need {need}")
    checksum = hashlib.sha256("".join(map(sha256, [folder / "config.json", *files])).encode()).hexdigest()
    return model.to(cfg.device).eval().requires_grad_(False), checksum


def cut_student(cfg, teacher):
    """The teacher's embeddings, final norm and chosen layers.

    A student that starts from noise only learns how frequent tokens are in the minutes that a demonstration has.
    """
    student = build(cfg, teacher.config.vocab_size, len(cfg.keep_layers))
    weights = teacher.state_dict()
    for place, layer in enumerate(cfg.keep_layers):
        student.model.layers[place].load_state_dict(teacher.model.layers[layer].state_dict())
    student.load_state_dict({k: v for k, v in weights.items() if ".layers." not in k}, strict=False)
    return student


def weights_of(model):
    """{name: parameter}; tied weights once."""
    return dict(model.named_parameters())


def fill(model, tensors):
    """Copy {name: tensor} into the model's parameters in place."""
    with torch.no_grad():
        for name, parameter in weights_of(model).items():
            parameter.copy_(tensors[name])


def autocast(device, dtype):
    """A context for forward passes; float32: none. Its cache would keep weights cast under no_grad without gradient."""
    kind = getattr(torch, dtype)
    return torch.autocast(device, kind, enabled=kind != torch.float32, cache_enabled=False)


def logits_of(model, inputs, dtype="float32"):
    """inputs (B, T) -> logits (B * T, V), in `dtype`: every position is a row of the loss."""
    with autocast(inputs.device.type, dtype):
        return model(input_ids=inputs).logits.flatten(0, 1)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
