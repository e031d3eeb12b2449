"""The fields of a published `config.json`: taken one by one, each of its type.

What a reader does not take must be known to change no logit, or is refused by name.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxinfra.checks import MAX_INT
from jaxinfra.config import ConfigError, DataError, did_you_mean

Fields = dict[str, Any]

# Fields that change no logit: names, ids, what only training, caching or generation
# reads. Those that begin with _ are private to the library that wrote them.
IGNORED = frozenset((
    "architectures", "transformers_version", "transformers.js_config", "torch_dtype",
    "dtype", "model_type", "name_or_path", "tokenizer_class", "auto_map",
    "unsloth_fixed", "unsloth_version", "use_cache", "cache_implementation",
    "attn_implementation", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "initializer_range", "attention_dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "embedding_dropout", "hidden_dropout", "dropout",
    "classifier_dropout", "gradient_checkpointing", "neftune_noise_alpha",
    "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "output_attentions", "output_hidden_states", "output_past", "output_scores",
    "return_dict", "use_return_dict", "return_dict_in_generate",
    "original_max_position_embeddings", "max_sequence_length", "model_max_length",
    "max_window_layers", "n_ctx", "n_special", "predict_special_tokens",
    "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward",
    "is_decoder", "pretraining_tp", "reorder_and_upcast_attn",
    "keys_to_ignore_at_inference", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "prefix",
))  # fmt: skip

# Fields of any family that does not read them -> the values at which they change
# nothing. At null every field is as good as absent.
NEUTRAL: dict[str, tuple] = {
    "is_llama_config": (True,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "partial_rotary_factor": (1.0, 1),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A type of fields: which values have it, in words and as a test."""

    rule: str
    has: Callable[[Any], bool]


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x <= MAX_INT  # which no nan is


def _all(x: Any, kind: type) -> bool:
    return type(x) is list and all(type(item) is kind for item in x)


SIZE = Kind(
    rule=f"a whole number from 1 to {MAX_INT}",
    has=lambda x: type(x) is int and 1 <= x <= MAX_INT,
)
COUNT = Kind(
    rule=f"a whole number from 0 to {MAX_INT}",
    has=lambda x: type(x) is int and 0 <= x <= MAX_INT,
)
LAYERS = Kind(  # each is an object here, and the deepest published model has some 130
    rule="a whole number from 1 to 512",
    has=lambda x: type(x) is int and 1 <= x <= 512,
)
NUMBER = Kind(rule=f"a number above 0 and at most {MAX_INT}", has=_is_number)
FLAG = Kind(rule="true or false", has=lambda x: type(x) is bool)
TEXT = Kind(rule="a text", has=lambda x: type(x) is str)
OBJECT = Kind(rule="an object of fields", has=lambda x: type(x) is dict)
TEXTS = Kind(rule="a list of texts", has=lambda x: _all(x, str))
INDICES = Kind(
    rule="a list of layers, which count from 0",
    has=lambda x: _all(x, int) and all(i >= 0 for i in x),
)
KIND_OF = {int: SIZE, float: NUMBER, bool: FLAG, str: TEXT}  # of our own settings

REQUIRED = object()


class Taker:
    """Takes fields out of a config.json, so that what is left was not understood.

    defaults: value of a field that is absent; what has none is required. nulls: value
    of a field that is null; any other must not be.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        *,
        of: str,
        where: str,
        defaults: Mapping[str, Any],
        nulls: Mapping[str, Any],
    ):
        self._left, self.of, self.where = dict(fields), of, where
        self._defaults, self._nulls = defaults, nulls

    def __call__(self, name: str, kind: Kind) -> Any:
        """The field's value: a DataError names it, if it has another type."""
        default = self._defaults.get(name, REQUIRED)
        value = self._left.pop(name, REQUIRED)
        if value is None and name in self._nulls:
            return self._nulls[name]
        if default is REQUIRED and (value is REQUIRED or value is None):
            raise DataError(
                f"{self.where} has no field {name!r}, which every {self.of} has; "
                "restore the file"
            )
        if value is REQUIRED:
            return default
        if not kind.has(value):
            raise self.damaged(name, value, kind.rule)
        return value

    def stated(self, name: str, kind: Kind) -> Any:
        """The field's value; None where it is absent."""
        return self(name, kind) if name in self._left else None

    def one_of(self, name: str, values: Mapping[str, str]) -> str:
        """`values` of the field's value."""
        value = self(name, TEXT)
        if value not in values:
            raise self.unsupported(name, value, f"one of {list(values)}")
        return values[value]

    def rename(self, spelling: str, name: str) -> None:
        """Takes `spelling` for another name of the field."""
        value = self._left.pop(spelling, None)
        if value is not None:
            self.agree({spelling: value, name: self._left.get(name)})
            self._left[name] = value

    def agree(self, stated: Mapping[str, Any]) -> Any:
        """The one value of fields that say the same thing; None if they are null."""
        stated = {name: x for name, x in stated.items() if x is not None}
        if any(value != next(iter(stated.values())) for value in stated.values()):
            found = " and ".join(f"{name}={value!r}" for name, value in stated.items())
            raise DataError(
                f"{self.where}: {found} say one thing and must be equal; remove the "
                "wrong one"
            )
        return next(iter(stated.values()), None)

    def neutral(self, allowed: Mapping[str, Iterable[Any]]) -> None:
        """Takes the fields that change nothing at these values; raises at others."""
        for name, values in allowed.items():
            value = self._left.pop(name, None)
            is_same = any(x == value and type(x) is type(value) for x in values)
            if value is not None and not is_same:
                rule = " or ".join(map(repr, values)) or "absent"
                raise self.unsupported(name, value, rule)

    def nothing_left(self, known: Iterable[str]) -> None:
        """Raises ConfigError for a field that was not taken; `known`: what to guess."""
        for name in sorted(self._left.keys() - IGNORED):
            if self._left[name] is not None and not name.startswith("_"):
                raise ConfigError(
                    f"{self.where}: field {name!r} of a {self.of} is not known here, "
                    "and what it changes would be lost; remove it if it changes "
                    f"nothing{did_you_mean(name, known)}"
                )

    def damaged(self, name: str, value: Any, rule: str) -> DataError:
        return DataError(
            f"{self.where}: {name}={_shown(value)} must be {rule}; restore the file"
        )

    def unsupported(self, name: str, value: Any, rule: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: {name}={_shown(value)} is not supported for {self.of}; "
            f"it must be {rule}"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
