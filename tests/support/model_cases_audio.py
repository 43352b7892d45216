"""Audio: diffusion transformers of diffusers, encoders of transformers."""

from __future__ import annotations

import torch
from model_cases import LINE, SMALL, Grid, Made, build, case, encoder, encoder_case, inner, text
from model_cases_vision import WIDE


@case(
    "StableAudioDiTModel",
    dense=2,
    others=2,
    kind="joint",
    before=1,
    source="given",
    grids=LINE,
    note="audio, grouped heads, one global token in front",
)
def stable_audio(grid: Grid, batch: int) -> Made:
    model = build(
        "StableAudioDiTModel",
        sample_size=grid[2],
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=16,
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, grid[2]),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": torch.randn(batch, 1, 8),
        "rotary_embedding": (torch.randn(grid[2] + 1, 4), torch.randn(grid[2] + 1, 4)),
        "return_dict": False,
    }


@case(
    "StableAudio3DiTModel",
    dense=4,
    others=4,
    kind="joint",
    before=4,
    source="given",
    grids=LINE,
    note="audio; the difference of two attentions, tokens of memory in front",
)
def stable_audio3(grid: Grid, batch: int) -> Made:
    model = inner(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=4,
        use_differential_attention=True,
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, grid[2]),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": torch.randn(batch, 16),
        "local_add_cond": torch.randn(batch, 5, grid[2]),
        "return_dict": False,
    }


@case("LongCatAudioDiTTransformer", dense=2, others=2, source="given", grids=LINE, note="audio")
def longcat_audio(grid: Grid, batch: int) -> Made:
    model = inner(
        "LongCatAudioDiTTransformer",
        dit_dim=32,
        dit_depth=2,
        dit_heads=2,
        dit_text_dim=16,
        latent_dim=4,
    )
    return model, {
        "hidden_states": torch.randn(batch, grid[2], 4),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, 7, dtype=torch.bool),
        "timestep": torch.rand(batch),
        "latent_cond": torch.randn(batch, grid[2], 4),
        "return_dict": False,
    }


@case(
    "AceStepTransformer1DModel",
    dense=1,
    others=3,
    source="given",
    grids=LINE,
    note="audio, grouped heads; every other layer sees a window only",
)
def ace_step(grid: Grid, batch: int) -> Made:
    model = build(
        "AceStepTransformer1DModel",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        patch_size=2,
        sliding_window=16,
        encoder_hidden_size=16,
    )
    return model, {
        "hidden_states": torch.randn(batch, 2 * grid[2], 4),
        "timestep": torch.rand(batch),
        "timestep_r": torch.rand(batch),
        "encoder_hidden_states": text(batch),
        "context_latents": torch.randn(batch, 2 * grid[2], 8),
        "return_dict": False,
    }


@case(
    "MiniMaxMusic3Transformer1DModel",
    dense=2,
    kind="joint",
    before=1,
    source="given",
    grids=LINE,
    note="audio; the time step is a token in front",
)
def minimax_music(grid: Grid, batch: int) -> Made:
    model = build(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=32,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, grid[2]),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, grid[2], 16),
        "return_dict": False,
    }


@encoder_case("WhisperModel", dense=2, source="given", grids=LINE, note="audio encoder")
def whisper(grid: Grid, batch: int) -> Made:
    model = encoder(
        "WhisperModel",
        "WhisperConfig",
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=grid[2],
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return model.get_encoder(), {"input_features": torch.randn(batch, 8, 2 * grid[2])}


@encoder_case(
    "WhisperModel",
    dense=2,
    source="given",
    grids=LINE,
    note="audio encoder, attention written out (eager)",
)
def whisper_eager(grid: Grid, batch: int) -> Made:
    model, inputs = whisper(grid, batch)
    model.set_attn_implementation("eager")
    return model, inputs


@encoder_case("Wav2Vec2Model", dense=2, source="given", grids=LINE, note="audio")
def wav2vec2(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        **SMALL,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return model, {"input_values": torch.randn(batch, 8 * grid[2])}


@encoder_case("HubertModel", dense=2, source="given", grids=((1, 1, 300),), note="audio")
def hubert(grid: Grid, batch: int) -> Made:
    model = encoder(
        "HubertModel",
        "HubertConfig",
        **SMALL,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return model, {"input_values": torch.randn(batch, 8 * grid[2])}


@encoder_case("Wav2Vec2ConformerModel", dense=2, source="given", grids=((1, 1, 300),), note="audio")
def conformer(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        **SMALL,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        position_embeddings_type="rotary",
    )
    return model, {"input_values": torch.randn(batch, 8 * grid[2])}


@encoder_case(
    "ASTModel", dense=2, kind="joint", before=2, grids=WIDE, note="audio: a spectrogram as an image"
)
def spectrogram(grid: Grid, batch: int) -> Made:
    model = encoder(
        "ASTModel",
        "ASTConfig",
        **SMALL,
        intermediate_size=32,
        patch_size=2,
        frequency_stride=2,
        time_stride=2,
        max_length=2 * grid[2],
        num_mel_bins=2 * grid[1],
    )
    return model, {"input_values": torch.randn(batch, 2 * grid[2], 2 * grid[1])}
