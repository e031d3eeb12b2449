"""A published `config.json` <-> `ModelConfig`, by the table of `families`.

Every field of a `config.json` is accounted for: read, known to change no number, or
refused by name. Written, it is read again, and must say the same model.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxinfra.config import (
    ConfigError,
    LayerConfig,
    ModelConfig,
    RopeScaling,
    did_you_mean,
)
from jaxinfra.interop import families, same_model
from jaxinfra.interop.families import Family

Fields = dict[str, Any]

# Fields that change no logit: names, ids, what only training or caching reads.
IGNORED = frozenset((
    "architectures", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "decoder_start_token_id", "initializer_range", "attention_dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "embedding_dropout", "hidden_dropout",
    "classifier_dropout", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits", "output_attentions", "output_hidden_states",
    "max_position_embeddings", "original_max_position_embeddings", "id2label",
    "label2id", "problem_type", "return_dict", "use_return_dict",
    "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "tokenizer_class",
    "auto_map", "cache_implementation", "task_specific_params", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "n_ctx", "pretraining_tp", "reorder_and_upcast_attn",
    "gradient_checkpointing", "keys_to_ignore_at_inference", "max_length",
))  # fmt: skip


def read_config(fields: Fields, *, where: str = "config.json") -> ModelConfig:
    """The model that a published `config.json` describes.

    Raises ConfigError that names the field for a family, field or value that is not
    known.
    """
    fields = _text_part(dict(fields), where)
    family = _family(fields.pop("model_type", None), where)
    for spelling, published in family.spellings.items():
        fields.setdefault(published, fields.pop(spelling, None))
    take = _Taker(fields, family, where)
    ours: dict[str, Any] = dict(family.fixed)
    for published, name in family.fields.items():
        ours[name] = take(published, default=_default(published, family, ours))
    num_layers = take("n_layer" if family.transposed else "num_hidden_layers")
    field, values = family.activation
    ours["activation"] = take.one_of(field, values, _first(values))
    if family.model_type == "gemma":  # where both stand, hidden_activation is meant
        meant = take.one_of("hidden_activation", values, None)
        ours["activation"] = meant or ours["activation"]
    for published, allowed in family.only.items():
        value = take(published, default=allowed[0])
        if value not in allowed:
            raise take.error(published, value, f"one of {list(allowed)}")
        if published == "attention_bias":
            ours |= {"qkv_bias": value, "out_bias": value}
    if family.model_type == "gpt2":
        ours["num_kv_heads"] = ours["num_heads"]
        inner = take("n_inner", default=None)
        ours["ffn_width"] = inner or 4 * ours["width"]
        layers = [LayerConfig()] * num_layers
    else:
        local_theta = _read_rope(take, ours)
        layers = _read_layers(take, family, num_layers, local_theta)
    take.nothing_left()
    return ModelConfig(**ours, **same_model.stack(layers), residual_scale_init=False)


def write_config(model: ModelConfig, family_name: str = "") -> Fields:
    """The published `config.json` of a model, as `family_name` or the first family that
    fits; ConfigError that says what does not fit."""
    names = [family_name] if family_name else families.PREFERENCE
    misfits = {}
    for name in names:
        family = _family(name, "--family")
        fields = _written(model, family)
        misfit = _difference(model, fields)
        if not misfit:
            return fields
        misfits[name] = misfit
    reasons = "; ".join(f"{name}: {why}" for name, why in misfits.items())
    raise ConfigError(f"no published family has this model: {reasons}")


class _Taker:
    """Takes fields out of a config.json, so that what is left was not understood."""

    def __init__(self, fields: Fields, family: Family, where: str):
        self._left, self._family, self._where = dict(fields), family, where

    def __call__(self, name: str, **default: Any) -> Any:
        """The field's value; `default` where it is absent or null."""
        value = self._left.pop(name, None)
        if value is None:
            if "default" not in default or default["default"] is _REQUIRED:
                raise ConfigError(
                    f"{self._where} has no field {name!r}, which every "
                    f"{self._family.model_type} has; restore the file"
                )
            return default["default"]
        return value

    def one_of(self, name: str, values: Mapping[str, str], default: Any) -> Any:
        """`values` of the field's value; `default` where the field is absent."""
        value = self(name, default=None)
        if value is None:
            return default
        if value not in values:
            raise self.error(name, value, f"one of {list(values)}")
        return values[value]

    def error(self, name: str, value: Any, rule: str) -> ConfigError:
        return ConfigError(
            f"{self._where}: {name}={value!r} is not supported for "
            f"{self._family.model_type}; it must be {rule}"
        )

    def nothing_left(self) -> None:
        unknown = sorted(self._left.keys() - IGNORED)
        unknown = [
            name
            for name in unknown
            if self._left[name] is not None and not name.startswith("_")
        ]
        if unknown:
            raise ConfigError(
                f"{self._where}: field {unknown[0]!r} of a {self._family.model_type} "
                "is not known here, and what it changes would be lost; remove it if it "
                f"changes nothing{did_you_mean(unknown[0], self._family.fields)}"
            )


_REQUIRED = object()


def _family(name: Any, where: str) -> Family:
    if name not in families.FAMILIES:
        raise ConfigError(
            f"{where}: model_type={name!r} is not one of {', '.join(families.FAMILIES)}"
            f"{did_you_mean(str(name), families.FAMILIES)}"
        )
    return families.FAMILIES[name]


def _text_part(fields: Fields, where: str) -> Fields:
    """A config with a vision tower is refused by name."""
    for name in ("vision_config", "text_config", "quantization_config"):
        if fields.get(name) is not None:
            raise ConfigError(
                f"{where}: field {name!r} is not supported; export the plain text model"
            )
    return fields


def _default(published: str, family: Family, ours: dict[str, Any]) -> Any:
    if published in family.defaults:
        return family.defaults[published]
    return {
        "num_key_value_heads": ours.get("num_heads"),
        "head_dim": 0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }.get(published, _REQUIRED)


def _first(values: Mapping[str, str]) -> str:
    return next(iter(values.values()))


def _read_rope(take: _Taker, ours: dict[str, Any]) -> float:
    """Sets the rotary settings; returns the base of layers with a window, 0 if the
    same. Reads the spelling of transformers 5 (rope_parameters) and that before."""
    theta = take("rope_theta", default=10_000.0)
    scaling = take("rope_scaling", default={})
    local_theta = take("rope_local_base_freq", default=0.0)
    new = take("rope_parameters", default={})
    if "full_attention" in new:
        local = dict(new.get("sliding_attention") or new["full_attention"])
        new = dict(new["full_attention"])
        local_theta = local.pop("rope_theta", 10_000.0)
        _read_scaling(take, local, allowed=("none",))
        is_same = local_theta == new.get("rope_theta")
        is_plain = new.get("rope_type", "default") == "default"
        local_theta = 0.0 if is_same and is_plain else local_theta
    elif new:
        new = dict(new)
    ours["rope_theta"] = float(new.pop("rope_theta", theta))
    ours["rope_scaling"] = _read_scaling(take, dict(new or scaling))
    return float(local_theta)


def _read_scaling(
    take: _Taker, fields: Fields, allowed: tuple = ("none", "linear", "llama3")
) -> RopeScaling:
    names = {"default": "none", "linear": "linear", "llama3": "llama3"}
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    if names.get(kind) not in allowed:
        raise take.error("rope_type", kind, f"one of {list(names)}")
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise take.error("partial_rotary_factor", "below 1", "1.0")
    values = {
        ours: fields.pop(published)
        for published, ours in _SCALING_FIELDS.items()
        if published in fields
    }
    if fields:
        raise take.error(f"rope field {sorted(fields)[0]}", "given", "absent")
    return (
        RopeScaling(kind=names[kind], **values) if kind != "default" else RopeScaling()
    )


_SCALING_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq",
    "high_freq_factor": "high_freq",
    "original_max_position_embeddings": "original_length",
}


def _read_layers(
    take: _Taker, family: Family, num_layers: int, local_theta: float
) -> list[LayerConfig]:
    """The windows and experts of all layers."""
    window = take("sliding_window", default=0)
    kinds = take("layer_types", default=None)
    # Every how many layers one sees all: a fact of the family, or a field.
    every = {"gemma2": 2, "gemma3_text": 6}.get(family.model_type, 0)
    every = take("_sliding_window_pattern", default=every)
    every = take("sliding_window_pattern", default=every)
    from_layer = take("max_window_layers", default=num_layers)
    is_used = take("use_sliding_window", default=family.windows != "max_window_layers")
    has_window = {
        "none": lambda i: False,
        "all": lambda i: True,
        "pattern": lambda i: (i + 1) % every != 0,
        "max_window_layers": lambda i: bool(is_used) and i >= from_layer,
    }[family.windows]
    if kinds is None:
        kinds = [
            "sliding_attention" if has_window(i) and window else "full_attention"
            for i in range(num_layers)
        ]
    names = ("full_attention", "sliding_attention")
    if len(kinds) != num_layers or not set(kinds) <= set(names):
        raise take.error("layer_types", kinds, f"{num_layers} of {names}")
    if "sliding_attention" in kinds and not window:
        raise take.error("sliding_window", window, "the size of the layers' window")
    dense = set(take("mlp_only_layers", default=[]))
    step = take("decoder_sparse_step", default=1)
    has_experts = "num_experts" in family.fields.values()
    layers = []
    for i, kind in enumerate(kinds):
        is_local = kind == "sliding_attention"
        is_sparse = has_experts and i not in dense and (i + 1) % step == 0
        layers.append(
            LayerConfig(
                window=window if is_local else 0,
                rope_theta=local_theta if is_local else 0.0,
                feed_forward="experts" if is_sparse else "dense",
            )
        )
    return layers


def _written(model: ModelConfig, family: Family) -> Fields:
    """`model` as the family would say it, whether or not it can."""
    fields: Fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    for published, name in family.fields.items():
        value = getattr(model, name)
        is_none = published.endswith("softcapping") and value == 0
        fields[published] = None if is_none else value
    if "head_dim" in fields:
        fields["head_dim"] = model.head_width
    field, values = family.activation
    by_ours = {ours: published for published, ours in reversed(values.items())}
    fields[field] = by_ours.get(model.activation, model.activation)
    fields |= {name: allowed[0] for name, allowed in family.only.items()}
    if "attention_bias" in family.only:
        fields["attention_bias"] = model.qkv_bias
    if family.model_type == "gpt2":
        inner = None if model.ffn_width == 4 * model.width else model.ffn_width
        return fields | {"n_layer": model.num_layers, "n_inner": inner}
    fields["num_hidden_layers"] = model.num_layers
    fields["max_position_embeddings"] = model.max_length or 131_072
    fields |= _written_rope(model, family)
    return fields | _written_layers(model, family)


def _written_rope(model: ModelConfig, family: Family) -> Fields:
    scaling = model.rope_scaling
    parameters: Fields = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if scaling.kind != "none":
        keep = 4 if scaling.kind == "llama3" else 1
        parameters["rope_type"] = scaling.kind
        for published, ours in list(_SCALING_FIELDS.items())[:keep]:
            parameters[published] = getattr(scaling, ours)
    if family.model_type != "gemma3_text":
        return {"rope_parameters": parameters}
    thetas = {layer.rope_theta for layer in model.layers if layer.window}
    local = {"rope_theta": max(thetas, default=0.0) or model.rope_theta}
    return {
        "rope_parameters": {
            "full_attention": parameters,
            "sliding_attention": local | {"rope_type": "default"},
        }
    }


def _written_layers(model: ModelConfig, family: Family) -> Fields:
    layers = model.layers
    windows = {layer.window for layer in layers if layer.window}
    fields: Fields = {"sliding_window": max(windows, default=None)}
    kinds = [
        "sliding_attention" if layer.window else "full_attention" for layer in layers
    ]
    match family.windows:
        case "pattern":
            fields["layer_types"] = kinds
            fields["sliding_window"] = fields["sliding_window"] or 4096
        case "max_window_layers":
            fields["use_sliding_window"] = bool(windows)
            fields["layer_types"] = kinds
            if windows:
                fields["max_window_layers"] = kinds.index("sliding_attention")
        case "none":
            del fields["sliding_window"]
    if family.model_type == "qwen3_moe":
        dense = [i for i, x in enumerate(layers) if x.feed_forward == "dense"]
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        fields["moe_intermediate_size"] = model.expert_width
        fields["num_local_experts"] = fields["num_experts"] = model.num_experts
    return fields


def _difference(model: ModelConfig, fields: Fields) -> str:
    """What reading `fields` again gives otherwise than `model`; empty if nothing."""
    try:
        again = read_config(json.loads(json.dumps(fields)))
    except ConfigError as error:
        return str(error)
    return "; ".join(same_model.differences(model, again))
