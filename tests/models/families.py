"""One base model of each family, as small as its config allows, made from seeds: the table of `test_families.py`.

A word for each family is transformers' own `model_type`. What is random here must be large: a low-rank change could
not turn small frozen weights into a model of anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_trials import Tiny
from transformers import AutoConfig, AutoTokenizer

from bilora_ray.measures import Task
from bilora_ray.training.model import AUTO_CLASS

POSITIONS = 64
# What most configs know under these names; who has other ones says so below.
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
N_WORDS = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": POSITIONS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    # Of the one layer nothing may be dropped.
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi": {},
    "phi3": GROUPED,
    "gpt2": N_WORDS,
    "gpt_bigcode": N_WORDS,
    "gptj": {**N_WORDS, "rotary_dim": 4},
    "codegen": {**N_WORDS, "rotary_dim": 4},
    "openai-gpt": N_WORDS,
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "dff": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    "stablelm": {"num_key_value_heads": 4},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED,
    "cohere": GROUPED,
    "cohere2": {**GROUPED, "sliding_window": 16},
    "starcoder2": {"num_key_value_heads": 2},
    "granite": GROUPED,
    "helium": GROUPED,
    "nemotron": GROUPED,
    "glm": GROUPED,
    "glm4": GROUPED,
    "exaone4": GROUPED,
    "smollm3": GROUPED,
    "ernie4_5": GROUPED,
    "seed_oss": GROUPED,
    "arcee": GROUPED,
    "ministral": GROUPED,
    "persimmon": {},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "init_std": 0.2},
    "biogpt": {},
    "modernbert-decoder": {"local_attention": 16},
    "mamba": {"state_size": 4, "expand": 2, "conv_kernel": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": POSITIONS},
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
    "mixtral": {**GROUPED, **EXPERTS},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**GROUPED, **EXPERTS},
    "olmoe": {**GROUPED, **EXPERTS},
    "granitemoe": {**GROUPED, **EXPERTS},
    "deepseek_v3": {**LATENT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "gpt_oss": {**GROUPED, **EXPERTS, "sliding_window": 16},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "camembert": {},
    "xlm-roberta": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta": {},
    "deberta-v2": {},
    "mpnet": {},
    "funnel": {
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 64,
        "block_sizes": [1, 1],
        "num_hidden_layers": None,
    },
    "convbert": {"embedding_size": 16},
    "longformer": {"attention_window": 8},
    "big_bird": {"attention_type": "original_full"},
    "modernbert": {"local_attention": 16},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "ernie": {},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roformer": {"embedding_size": 32},
    "squeezebert": {"embedding_size": 32},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 64},
    "megatron-bert": {},
    "data2vec-text": {},
    "ibert": {},
    "fnet": {},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16},
}
SEQ2SEQS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "longt5": {**T5, "local_radius": 7},
    "switch_transformers": {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "plbart": SEQ2SEQ,
    "mvp": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "m2m_100": SEQ2SEQ,
    "blenderbot": SEQ2SEQ,
    "blenderbot-small": SEQ2SEQ,
    "led": {**SEQ2SEQ, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    | {"attention_window": 8},
    "prophetnet": {"hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
    | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64}
    | {"decoder_ffn_dim": 64, "decoder_start_token_id": 1, "num_hidden_layers": None},
}
FAMILIES: dict[Task, dict[str, dict[str, Any]]] = {
    "causal-lm": DECODERS,
    "seq2seq-lm": SEQ2SEQS,
    "sequence-classification": {**DECODERS, **SEQ2SEQS, **ENCODERS},
}


def has(task: Task, family: str) -> bool:
    """Whether transformers has a model of `family` for `task`."""
    config = type(AutoConfig.for_model(family))
    return config in AUTO_CLASS[task]._model_mapping


def build(task: Task, family: str, tiny: Tiny, folder: Path, **settings: Any) -> Path:
    """Write a base model of `family` to `folder`, with the tokenizer of the `tiny` model of that task."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model(task))
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    wanted = {"vocab_size": len(tokenizer), **ids, **COMMON, **FAMILIES[task][family], **settings}
    config = AutoConfig.for_model(family, **{key: value for key, value in wanted.items() if value is not None})
    for spread in ("initializer_range", "init_std"):
        if hasattr(config, spread):
            setattr(config, spread, 0.2)
    torch.manual_seed(0)
    AUTO_CLASS[task].from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
