"""Text encoders and language models of transformers."""

from __future__ import annotations

import torch
from model_cases import LINE, SMALL, Grid, Made, encoder, encoder_case


@encoder_case("CLIPTextModel", dense=0, others=2, source="", note="causal")
def clip_text(grid: Grid, batch: int) -> Made:
    model = encoder(
        "CLIPTextModel",
        "CLIPTextConfig",
        **SMALL,
        intermediate_size=32,
        vocab_size=99,
        max_position_embeddings=64,
    )
    return model, {"input_ids": torch.randint(0, 99, (batch, 40))}


@encoder_case("BertModel", dense=2, source="given", grids=LINE, note="text")
def bert(grid: Grid, batch: int) -> Made:
    model = encoder(
        "BertModel",
        "BertConfig",
        **SMALL,
        intermediate_size=32,
        vocab_size=99,
        max_position_embeddings=512,
    )
    return model, {"input_ids": torch.randint(0, 99, (batch, grid[2]))}


@encoder_case("T5EncoderModel", dense=0, others=2, source="", note="text, scores with a bias")
def t5(grid: Grid, batch: int) -> Made:
    model = encoder(
        "T5EncoderModel",
        "T5Config",
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        vocab_size=99,
    )
    return model, {"input_ids": torch.randint(0, 99, (batch, 40))}


@encoder_case(
    "ModernBertModel",
    dense=1,
    others=1,
    source="given",
    grids=LINE,
    note="text; every other layer sees a window only",
)
def modern_bert(grid: Grid, batch: int) -> Made:
    model = encoder(
        "ModernBertModel",
        "ModernBertConfig",
        **SMALL,
        intermediate_size=32,
        vocab_size=50,
        pad_token_id=0,
        global_attn_every_n_layers=2,
        local_attention=32,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return model, {"input_ids": torch.randint(3, 50, (batch, grid[2]))}


@encoder_case(
    "LlamaModel",
    dense=0,
    others=2,
    source="",
    grids=LINE,
    note="causal, with a cache",
)
def llama(grid: Grid, batch: int) -> Made:
    model = encoder(
        "LlamaModel",
        "LlamaConfig",
        **SMALL,
        intermediate_size=32,
        vocab_size=50,
        num_key_value_heads=1,
    )
    return model, {"input_ids": torch.randint(0, 50, (batch, grid[2]))}
