"""A published `config.json` <-> `ModelConfig`, by the table of `families`.

Every field of a `config.json` is accounted for: read, known to change no number, or
refused by name. Written, it is read again, and must say the same model.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxinfra import checks
from jaxinfra.config import (
    Config,
    ConfigError,
    DataConfig,
    DataError,
    LayerConfig,
    ModelConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
    did_you_mean,
)
from jaxinfra.interop import families, same_model
from jaxinfra.interop.families import Family
from jaxinfra.interop.hf_fields import (
    COUNT,
    FLAG,
    INDICES,
    KIND_OF,
    LAYERS,
    NEUTRAL,
    NUMBER,
    OBJECT,
    SIZE,
    TEXT,
    TEXTS,
    Fields,
    Taker,
)

_TYPES = {name: field.type for name, field in ModelConfig.__dataclass_fields__.items()}
_FULL, _SLIDING = "full_attention", "sliding_attention"  # of layer_types
# Published fields of a kind of rotary frequencies -> ours.
_SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq",
        "high_freq_factor": "high_freq",
        "original_max_position_embeddings": "original_length",
    },
}
_OURS = {"default": "none", "linear": "linear", "llama3": "llama3"}


def read_config(fields: Fields, *, where: str = "config.json") -> ModelConfig:
    """The model that a published `config.json` describes.

    Raises ConfigError that names the field for a family, field or value that is not
    known, and DataError for one that no such file has: lacking, of a wrong type, or
    contradicting another.
    """
    family = _family(fields.get("model_type", None), where)
    for name in ("vision_config", "text_config", "quantization_config"):
        if fields.get(name) is not None:
            raise ConfigError(
                f"{where}: field {name!r} is not supported; export the plain text model"
            )
    take = Taker(
        fields,
        of=family.model_type,
        where=where,
        defaults={**families.DEFAULTS, **family.defaults},
        nulls=family.nulls,
    )
    for spelling, published in family.spellings.items():
        take.rename(spelling, published)
    ours: dict[str, Any] = dict(family.fixed)
    for published, name in family.fields.items():
        ours[name] = _TYPES[name](take(published, KIND_OF[_TYPES[name]]))
    ours["num_kv_heads"] = ours.get("num_kv_heads") or ours["num_heads"]
    ours["ffn_width"] = ours["ffn_width"] or 4 * ours["width"]
    if "attention_bias" in family.fields:
        ours["out_bias"] = ours["qkv_bias"]
    ours["activation"] = take.one_of(*family.activation)
    local_theta = _read_rope(take, family, ours) if family.ropes else 0.0
    layers = _read_layers(take, family, local_theta)
    take.neutral({**NEUTRAL, **family.neutral})
    take.nothing_left(family.fields)
    model = ModelConfig(**ours, **same_model.stack(layers), residual_scale_init=False)
    _check(model, family, where)
    return model


def write_config(model: ModelConfig, family_name: str = "") -> Fields:
    """The published `config.json` of a model, as `family_name` or the first family that
    fits; ConfigError that says what does not fit.
    """
    names = [family_name] if family_name else families.PREFERENCE
    misfits = {}
    for name in names:
        family = _family(name, "--family")
        fields = _written(model, family)
        misfits[name] = _difference(model, fields)
        if family.heads_divide and model.width % model.num_heads:
            misfits[name] = f"{model.num_heads} heads do not divide {model.width}"
        if not misfits[name]:
            return fields
    reasons = "; ".join(f"{name}: {why}" for name, why in misfits.items())
    raise ConfigError(f"no published family has this model: {reasons}")


def _family(name: Any, where: str) -> Family:
    if name is not None and not TEXT.has(name):
        raise DataError(
            f"{where}: model_type={name!r} must be a text; restore the file"
        )
    if name not in families.FAMILIES:
        raise ConfigError(
            f"{where}: model_type={name!r} is not one of {', '.join(families.FAMILIES)}"
            f"{did_you_mean(str(name), families.FAMILIES)}"
        )
    return families.FAMILIES[name]


def _read_rope(take: Taker, family: Family, ours: dict[str, Any]) -> float:
    """Sets the rotary settings; returns the base of layers with a window, 0 if the
    same. Reads the spelling of transformers 5 (rope_parameters) and that before."""
    old, new = take("rope_scaling", OBJECT), take("rope_parameters", OBJECT)
    local: Fields = {}
    if family.has_local_rope:
        kinds = Taker(
            new,
            of="rope_parameters by layer type",
            where=f"{take.where}: rope_parameters",
            defaults={_FULL: {}, _SLIDING: {}},
            nulls={_FULL: {}, _SLIDING: {}},
        )
        new, local = kinds(_FULL, OBJECT), kinds(_SLIDING, OBJECT)
        kinds.nothing_left((_FULL, _SLIDING))
    places = {"rope_scaling": old, "rope_parameters": new}
    theta, scaling = _rotary(take, "rope_theta", places, family.ropes)
    ours |= {"rope_theta": theta, "rope_scaling": scaling}
    if scaling.kind == "llama3":
        take.neutral({"original_max_position_embeddings": (scaling.original_length,)})
    if not family.has_local_rope:
        return 0.0
    places = {f"rope_parameters.{_SLIDING}": local}
    local_theta, _ = _rotary(take, "rope_local_base_freq", places, ("default",))
    return 0.0 if local_theta == theta and scaling.kind == "none" else local_theta


def _rotary(
    take: Taker, field: str, places: Mapping[str, Fields], kinds: tuple[str, ...]
) -> tuple[float, RopeScaling]:
    """The base and the scaling that `field` and the `places` that say any agree on."""
    thetas: dict[str, Any] = {}
    scalings: dict[str, Any] = {}
    for place, fields in places.items():
        if not fields:
            continue
        said = Taker(
            fields,
            of=place,
            where=f"{take.where}: {place}",
            defaults={"rope_theta": None, "rope_type": "default"},
            nulls={},
        )
        said.rename("type", "rope_type")
        kind = said("rope_type", TEXT)
        if kind not in kinds:
            raise said.unsupported("rope_type", kind, f"one of {list(kinds)}")
        said.of = f"{place} of rope_type={kind!r}"
        types = RopeScaling.__dataclass_fields__
        values = {
            name: said(published, KIND_OF[types[name].type])
            for published, name in _SCALINGS[kind].items()
        }
        thetas[f"{place}.rope_theta"] = said("rope_theta", NUMBER)
        said.neutral({"partial_rotary_factor": NEUTRAL["partial_rotary_factor"]})
        said.nothing_left(["rope_type", "rope_theta", *_SCALINGS[kind]])
        scalings[place] = RopeScaling(kind=_OURS[kind], **values)
    theta = take.agree({field: take.stated(field, NUMBER), **thetas})
    scaling = take.agree(scalings)
    return float(theta or take(field, NUMBER)), scaling or RopeScaling()


def _read_layers(take: Taker, family: Family, local_theta: float) -> list[LayerConfig]:
    """The windows and experts of all layers."""
    windows = _read_windows(take, family, take(family.num_layers, LAYERS))
    has_experts = "num_experts" in family.fields.values()
    dense, step = [], 1
    if "mlp_only_layers" in family.defaults:
        dense = take("mlp_only_layers", INDICES)
        step = take("decoder_sparse_step", SIZE)
    if max(dense, default=0) >= len(windows):
        rule = f"a list of layers below {len(windows)}"
        raise take.damaged("mlp_only_layers", dense, rule)
    return [
        LayerConfig(
            window=window,
            rope_theta=local_theta if window else 0.0,
            feed_forward="experts"
            if has_experts and i not in dense and (i + 1) % step == 0
            else "dense",
        )
        for i, window in enumerate(windows)
    ]


def _read_windows(take: Taker, family: Family, num_layers: int) -> list[int]:
    """The window of each layer, 0 for none."""
    rule = family.windows
    is_optional = rule in ("use_sliding_window", "max_window_layers")
    window = 0 if rule == "none" else take("sliding_window", SIZE)
    if is_optional and not take("use_sliding_window", FLAG):
        window = 0
    first = take("max_window_layers", COUNT) if rule == "max_window_layers" else 0
    every = 0
    if rule == "pattern":  # whose layers must have a window: below, they get none
        every = family.pattern or take("sliding_window_pattern", SIZE)
    kinds = [
        _SLIDING
        if (window or every) and i >= first and (not every or (i + 1) % every)
        else _FULL
        for i in range(num_layers)
    ]
    if rule in ("pattern", "max_window_layers"):
        stated = take("layer_types", TEXTS)
        kinds = kinds if stated is None else stated
    if len(kinds) != num_layers or not set(kinds) <= {_FULL, _SLIDING}:
        names = f"{num_layers} of {_FULL!r} and {_SLIDING!r}"
        raise take.unsupported("layer_types", kinds, names)
    has_window = _SLIDING in kinds
    if has_window and not window:
        raise take.damaged(
            "sliding_window", None, f"a size, and used, for layers of {_SLIDING!r}"
        )
    take.neutral(
        {
            "sliding_window": (),
            "sliding_window_size": (window,),
            "sliding_window_pattern": (every,),
            "use_sliding_window": (has_window,),
            "layer_types": (kinds,),
            **({"max_window_layers": (0,)} if has_window else {}),
        }
    )
    return [window if kind == _SLIDING else 0 for kind in kinds]


def _check(model: ModelConfig, family: Family, where: str) -> None:
    """The rules between settings, in the words of config.json."""
    # One token a row and no folder of its own: only the model is in question.
    config = Config(
        name="published",
        model=model,
        train=TrainConfig(length=1),
        run=RunConfig(dir=os.sep),
        data=DataConfig(cache_dir=os.sep),
    )
    names = {ours: published for published, ours in family.fields.items()}
    names |= {ours: published for published, ours in _SCALINGS["llama3"].items()}
    try:
        checks.check(config)
    except ConfigError as error:
        rule = re.sub(
            r"\bmodel\.(?:rope_scaling\.)?(\w+)",
            lambda key: names.get(key[1], key[0]),
            str(error),
        )
        raise DataError(f"{where}: {rule}, or restore the file") from error


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
    field, values = family.activation
    by_ours = {ours: published for published, ours in reversed(values.items())}
    fields[field] = by_ours.get(model.activation, model.activation)
    fields[family.num_layers] = model.num_layers
    if not family.ropes:
        return fields
    fields["head_dim"] = model.head_width
    fields["max_position_embeddings"] = model.max_length or 131_072
    fields |= _written_rope(model, family)
    return fields | _written_layers(model, family)


def _written_rope(model: ModelConfig, family: Family) -> Fields:
    scaling = model.rope_scaling
    [kind] = [published for published, ours in _OURS.items() if ours == scaling.kind]
    parameters: Fields = {"rope_theta": model.rope_theta, "rope_type": kind}
    for published, ours in _SCALINGS[kind].items():
        parameters[published] = getattr(scaling, ours)
    # Both spellings: transformers before 5 takes a base of 10,000 where only the new
    # one is there.
    old: Fields = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if scaling.kind != "none":
        old["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    if not family.has_local_rope:
        return old | {"rope_parameters": parameters}
    thetas = {layer.rope_theta for layer in model.layers if layer.window}
    local = {"rope_theta": max(thetas, default=0.0) or model.rope_theta}
    return old | {
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {
            _FULL: parameters,
            _SLIDING: local | {"rope_type": "default"},
        },
    }


def _written_layers(model: ModelConfig, family: Family) -> Fields:
    layers = model.layers
    window = max(layer.window for layer in layers)
    kinds = [_SLIDING if layer.window else _FULL for layer in layers]
    fields: Fields = {}
    match family.windows:
        case "all":
            fields = {"sliding_window": window or None}
        case "pattern":
            fields = {"sliding_window": window or 4096, "layer_types": kinds}
        case "use_sliding_window":
            used = {"use_sliding_window": bool(window)}
            fields = used | {"sliding_window": window or None}
        case "max_window_layers":
            used = {"use_sliding_window": bool(window), "layer_types": kinds}
            fields = used | {"sliding_window": window or None}
            if window:
                fields["max_window_layers"] = kinds.index(_SLIDING)
    if family.model_type == "qwen3_moe":
        dense = [i for i, x in enumerate(layers) if x.feed_forward == "dense"]
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        fields["moe_intermediate_size"] = model.expert_width
        fields["num_local_experts"] = model.num_experts
    return fields


def _difference(model: ModelConfig, fields: Fields) -> str:
    """What reading `fields` again gives otherwise than `model`; empty if nothing."""
    try:
        again = read_config(json.loads(json.dumps(fields)))
    except (ConfigError, DataError) as error:
        what = str(error).removeprefix("config.json: ")
        return what.removesuffix("; restore the file")
    return "; ".join(same_model.differences(model, again))
