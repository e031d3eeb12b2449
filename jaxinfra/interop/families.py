"""Published model families: what each calls its settings and its tensors.

One `Family` is a row of facts; `hf_config` and `hf` use it both ways. Source: the
classes of the transformers library, release 5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_ATTENTION = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
    "attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "attention/query": "model.layers.{layer}.self_attn.q_proj.weight",
    "attention/key": "model.layers.{layer}.self_attn.k_proj.weight",
    "attention/value": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention/out": "model.layers.{layer}.self_attn.o_proj.weight",
    "attention/query_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "attention/key_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "attention/value_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "attention/out_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "attention/query_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "attention/key_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "ffn_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
}
_MLP = {
    "ffn/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "ffn/up": "model.layers.{layer}.mlp.up_proj.weight",
    "ffn/down": "model.layers.{layer}.mlp.down_proj.weight",
    "ffn/gate_bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "ffn/up_bias": "model.layers.{layer}.mlp.up_proj.bias",
    "ffn/down_bias": "model.layers.{layer}.mlp.down_proj.bias",
}
_LLAMA = _ATTENTION | _MLP
_POST_NORMS = {
    "attention_post_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "ffn_post_norm/scale": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
_BOTH_NORMS = _POST_NORMS | {
    "ffn_norm/scale": "model.layers.{layer}.pre_feedforward_layernorm.weight"
}
# Of layers with experts; `expert` counts them.
_QWEN_EXPERTS = {
    "experts/router": "model.layers.{layer}.mlp.gate.weight",
    "experts/gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "experts/up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "experts/down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
_MIXTRAL_EXPERTS = {
    "experts/router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "experts/gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "experts/up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "experts/down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}
# Several of our arrays in one tensor share its name, and follow each other in it.
_PHI3 = _LLAMA | {
    "attention/query": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "attention/key": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "attention/value": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "ffn/gate": "model.layers.{layer}.mlp.gate_up_proj.weight",
    "ffn/up": "model.layers.{layer}.mlp.gate_up_proj.weight",
}
_GPT2 = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "head": "lm_head.weight",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
    "attention_norm/scale": "transformer.h.{layer}.ln_1.weight",
    "attention_norm/bias": "transformer.h.{layer}.ln_1.bias",
    "attention/query": "transformer.h.{layer}.attn.c_attn.weight",
    "attention/key": "transformer.h.{layer}.attn.c_attn.weight",
    "attention/value": "transformer.h.{layer}.attn.c_attn.weight",
    "attention/query_bias": "transformer.h.{layer}.attn.c_attn.bias",
    "attention/key_bias": "transformer.h.{layer}.attn.c_attn.bias",
    "attention/value_bias": "transformer.h.{layer}.attn.c_attn.bias",
    "attention/out": "transformer.h.{layer}.attn.c_proj.weight",
    "attention/out_bias": "transformer.h.{layer}.attn.c_proj.bias",
    "ffn_norm/scale": "transformer.h.{layer}.ln_2.weight",
    "ffn_norm/bias": "transformer.h.{layer}.ln_2.bias",
    "ffn/up": "transformer.h.{layer}.mlp.c_fc.weight",
    "ffn/up_bias": "transformer.h.{layer}.mlp.c_fc.bias",
    "ffn/down": "transformer.h.{layer}.mlp.c_proj.weight",
    "ffn/down_bias": "transformer.h.{layer}.mlp.c_proj.bias",
}

# Published field -> ours, of the Llama-like.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
_HEAD_DIM = {"head_dim": "head_dim"}
_SILU = {"silu": "swiglu", "swish": "swiglu"}
# What Gemma's checkpoints call gelu is its tanh form in the reference code as well.
_GELU = {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type.

    fields: published field -> ours. defaults: values where a field is absent or null.
    fixed: settings of ours that the family always has. only: published fields that may
    have these values alone, the first of which is written. activation: the field, its
    values -> ours. spellings: other names of fields. windows: which layers have the
    window: none, all, by 'pattern' or by 'max_window_layers'. names: our paths ->
    tensors. transposed: matrices are stored inputs first.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: _COMMON)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    activation: tuple[str, Mapping[str, str]] = ("hidden_act", _SILU)
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    windows: str = "none"
    transposed: bool = False


_GEMMA = {
    "norm_from_zero": True,
    "embedding_scale": True,
    "norm": "rmsnorm",
    "positions": "rotary",
}
_GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
_NO_ATTENTION_BIAS = {"attention_bias": (False,)}
_CAPS = {
    "query_pre_attn_scalar": "attention_scale_dim",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
_EXPERTS = {"num_experts_per_tok": "experts_per_token"}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            names=_LLAMA,
            fields=_COMMON | _HEAD_DIM | {"mlp_bias": "mlp_bias"},
            defaults={"mlp_bias": False},
            only={"attention_bias": (False, True)},
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            names=_LLAMA,
            fields=_COMMON | _HEAD_DIM,
            fixed=_NO_BIAS,
            windows="all",
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            names=_LLAMA,
            fixed={"qkv_bias": True, "out_bias": False, "mlp_bias": False},
            windows="max_window_layers",
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            names=_LLAMA,
            fields=_COMMON | _HEAD_DIM,
            defaults={"head_dim": 128},
            fixed={"qk_norm": "head", "mlp_bias": False},
            only={"attention_bias": (False, True)},
            windows="max_window_layers",
        ),
        Family(
            model_type="gemma",
            architecture="GemmaForCausalLM",
            names=_LLAMA,
            fields=_COMMON | _HEAD_DIM,
            defaults=_GEMMA_DEFAULTS,
            fixed=_GEMMA | _NO_BIAS,
            only=_NO_ATTENTION_BIAS | {"use_bidirectional_attention": (None, False)},
            # The field hidden_activation, where it is, wins over hidden_act.
            activation=("hidden_act", _GELU),
        ),
        Family(
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            names=_LLAMA | _BOTH_NORMS,
            fields=_COMMON | _HEAD_DIM | _CAPS,
            defaults=_GEMMA_DEFAULTS
            | {
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 0.0,
                "final_logit_softcapping": 0.0,
            },
            fixed=_GEMMA | _NO_BIAS | {"norm_placement": "both"},
            only=_NO_ATTENTION_BIAS | {"use_bidirectional_attention": (None, False)},
            activation=("hidden_activation", _GELU),
            windows="pattern",
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            names=_LLAMA | _BOTH_NORMS,
            fields=_COMMON | _HEAD_DIM | _CAPS,
            defaults=_GEMMA_DEFAULTS
            | {
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 0.0,
                "final_logit_softcapping": 0.0,
            },
            fixed=_GEMMA | _NO_BIAS | {"norm_placement": "both", "qk_norm": "head"},
            only=_NO_ATTENTION_BIAS | {"use_bidirectional_attention": (False, None)},
            activation=("hidden_activation", _GELU),
            windows="pattern",
        ),
        Family(
            model_type="olmo2",
            architecture="Olmo2ForCausalLM",
            names=_LLAMA | _POST_NORMS,
            fixed=_NO_BIAS | {"norm_placement": "post", "qk_norm": "all"},
            only=_NO_ATTENTION_BIAS,
        ),
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            names=_PHI3,
            fixed=_NO_BIAS,
            only={"partial_rotary_factor": (1.0,)} | _NO_ATTENTION_BIAS,
            windows="all",
        ),
        Family(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            names=_ATTENTION | _MIXTRAL_EXPERTS,
            fields=_COMMON
            | _HEAD_DIM
            | _EXPERTS
            | {"num_local_experts": "num_experts"},
            fixed=_NO_BIAS | {"router_renormalize": True},
            windows="all",
        ),
        Family(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            names=_LLAMA | _QWEN_EXPERTS,
            fields=_COMMON
            | _HEAD_DIM
            | _EXPERTS
            | {
                "num_experts": "num_experts",
                "moe_intermediate_size": "expert_ffn_width",
                "norm_topk_prob": "router_renormalize",
            },
            defaults={"norm_topk_prob": False, "head_dim": 0},
            spellings={"num_local_experts": "num_experts"},
            fixed={"qk_norm": "head", "mlp_bias": False},
            only={"attention_bias": (False, True)},
            windows="max_window_layers",
        ),
        Family(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            names=_GPT2,
            fields={
                "vocab_size": "vocab_size",
                "n_embd": "width",
                "n_head": "num_heads",
                "n_positions": "max_length",
                "layer_norm_epsilon": "norm_eps",
                "tie_word_embeddings": "tied",
            },
            defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
            fixed={
                "norm": "layernorm",
                "positions": "learned",
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            },
            only={
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
            activation=(
                "activation_function",
                {
                    "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh",
                    "gelu": "gelu",
                },
            ),
            transposed=True,
        ),
    )
}
# Where several families fit a model, the first is taken.
PREFERENCE = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma2",
    "gemma3_text", "mixtral", "qwen3_moe",
)  # fmt: skip
