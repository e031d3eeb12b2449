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
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "max_position_embeddings": "max_length",
}
_ATTENTION_BIAS = {"attention_bias": "qkv_bias"}  # and out_bias
_CAPS = {
    "query_pre_attn_scalar": "attention_scale_dim",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
_EXPERTS = {"num_experts_per_tok": "experts_per_token"}
_SILU = {"silu": "swiglu", "swish": "swiglu"}
_GELU = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}

# What a field is where it is absent, unless a family says otherwise; a field that is
# in neither is required. 0: as many heads of keys as of queries; width / heads; no
# window; four times the width; not stated.
DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 0,
    "head_dim": 0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    "rope_scaling": {},
    "rope_parameters": {},
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "sliding_window_pattern": 6,
    "layer_types": None,
}
# The same of a field that is null; any other field must not be.
_NULLS: Mapping[str, Any] = {
    "num_key_value_heads": 0,
    "head_dim": 0,
    "max_position_embeddings": 0,
    "n_inner": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "rope_scaling": {},
    "rope_parameters": {},
    "sliding_window": 0,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "mlp_only_layers": [],
}
_NULLS_BUT_HEAD_DIM = {k: v for k, v in _NULLS.items() if k != "head_dim"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type.

    fields: published field -> ours. defaults, nulls: published field -> its value where
    it is absent, over DEFAULTS, and where it is null. fixed: settings of ours that the
    family always has. neutral: further fields and the values at which they change
    nothing. activation: the field, its values -> ours. spellings: other names of
    fields. num_layers: the field. ropes: kinds of rotary frequencies, none where
    positions are learned. windows: which layers have the window: none, all, all if
    'use_sliding_window', by 'pattern' (all but each pattern-th; 0: a field says it) or
    by 'max_window_layers'. names: our paths -> tensors. transposed: matrices are stored
    inputs first. heads_divide: transformers asks it of the width even beside head_dim.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: _COMMON)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nulls: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _NULLS)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    activation: tuple[str, Mapping[str, str]] = ("hidden_act", _SILU)
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_layers: str = "num_hidden_layers"
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    windows: str = "none"
    pattern: int = 0
    transposed: bool = False
    heads_divide: bool = False

    @property
    def has_local_rope(self) -> bool:
        """Whether layers with a window have rotary frequencies of their own."""
        return "rope_local_base_freq" in self.defaults


_GEMMA = {
    "norm_from_zero": True,
    "embedding_scale": True,
    "norm": "rmsnorm",
    "positions": "rotary",
}
_GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA_2_DEFAULTS = _GEMMA_DEFAULTS | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_3_DEFAULTS = _GEMMA_2_DEFAULTS | {
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
# Beside hidden_activation, which is what counts.
_OLD_GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu")}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            heads_divide=True,
            names=_LLAMA,
            fields=_COMMON | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            names=_LLAMA,
            defaults={"num_key_value_heads": 8},
            fixed=_NO_BIAS,
            windows="all",
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            names=_LLAMA,
            defaults={"num_key_value_heads": 32},
            fixed={"qkv_bias": True, "out_bias": False, "mlp_bias": False},
            windows="max_window_layers",
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            names=_LLAMA,
            fields=_COMMON | _ATTENTION_BIAS,
            defaults={"num_key_value_heads": 32, "head_dim": 128},
            nulls=_NULLS_BUT_HEAD_DIM,
            fixed={"qk_norm": "head", "mlp_bias": False},
            windows="max_window_layers",
        ),
        Family(
            model_type="gemma",
            architecture="GemmaForCausalLM",
            names=_LLAMA,
            defaults=_GEMMA_DEFAULTS
            | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
            nulls=_NULLS_BUT_HEAD_DIM,
            fixed=_GEMMA | _NO_BIAS,
            # Of Gemma 1 alone, gelu is the tanh form in the reference code as well.
            activation=("hidden_act", _GELU | {"gelu": "geglu"}),
            neutral={"hidden_activation": ("gelu_pytorch_tanh", "gelu_new")},
        ),
        Family(
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            heads_divide=True,
            names=_LLAMA | _BOTH_NORMS,
            fields=_COMMON | _CAPS,
            defaults=_GEMMA_2_DEFAULTS,
            nulls=_NULLS_BUT_HEAD_DIM,
            fixed=_GEMMA | _NO_BIAS | {"norm_placement": "both"},
            activation=("hidden_activation", _GELU),
            neutral=_OLD_GELU,
            windows="pattern",
            pattern=2,
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            heads_divide=True,
            names=_LLAMA | _BOTH_NORMS,
            fields=_COMMON | _CAPS,
            defaults=_GEMMA_3_DEFAULTS,
            nulls=_NULLS_BUT_HEAD_DIM,
            fixed=_GEMMA | _NO_BIAS | {"norm_placement": "both", "qk_norm": "head"},
            activation=("hidden_activation", _GELU),
            neutral=_OLD_GELU,
            windows="pattern",
        ),
        Family(
            model_type="olmo2",
            architecture="Olmo2ForCausalLM",
            names=_LLAMA | _POST_NORMS,
            defaults={"rms_norm_eps": 1e-5},
            fixed=_NO_BIAS | {"norm_placement": "post", "qk_norm": "all"},
        ),
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            names=_PHI3,
            defaults={"rms_norm_eps": 1e-5, "sliding_window": 0},
            fixed=_NO_BIAS,
            ropes=("default",),
            windows="all",
        ),
        Family(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            names=_ATTENTION | _MIXTRAL_EXPERTS,
            fields=_COMMON | _EXPERTS | {"num_local_experts": "num_experts"},
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "sliding_window": 0,
                "num_experts_per_tok": 2,
                "num_local_experts": 8,
            },
            spellings={"num_experts": "num_local_experts"},
            fixed=_NO_BIAS | {"router_renormalize": True},
            windows="all",
        ),
        Family(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            names=_LLAMA | _QWEN_EXPERTS,
            fields=_COMMON
            | _ATTENTION_BIAS
            | _EXPERTS
            | {
                "num_experts": "num_experts",
                "moe_intermediate_size": "expert_ffn_width",
                "norm_topk_prob": "router_renormalize",
            },
            defaults={
                "num_key_value_heads": 4,
                "num_experts_per_tok": 8,
                "num_experts": 128,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "mlp_only_layers": [],
                "decoder_sparse_step": 1,
            },
            spellings={"num_local_experts": "num_experts"},
            fixed={"qk_norm": "head", "mlp_bias": False},
            windows="use_sliding_window",
        ),
        Family(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            names=_GPT2,
            fields={
                "vocab_size": "vocab_size",
                "n_embd": "width",
                "n_inner": "ffn_width",
                "n_head": "num_heads",
                "n_positions": "max_length",
                "layer_norm_epsilon": "norm_eps",
                "tie_word_embeddings": "tied",
            },
            defaults={
                "n_inner": 0,
                "tie_word_embeddings": True,
                "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new",
            },
            spellings={
                "hidden_size": "n_embd",
                "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer",
                "max_position_embeddings": "n_positions",
            },
            fixed={
                "norm": "layernorm",
                "positions": "learned",
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            },
            activation=(
                "activation_function",
                {
                    "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh",
                    "gelu": "gelu",
                },
            ),
            num_layers="n_layer",
            ropes=(),
            transposed=True,
        ),
    )
}
# Where several families fit a model, the first is taken.
PREFERENCE = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma2",
    "gemma3_text", "mixtral", "qwen3_moe",
)  # fmt: skip
