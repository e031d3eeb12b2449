"""Every setting of a run: frozen dataclasses, checked without jax.

A `Config` is built by `configs/<name>.py`, changed by options of the same names
(`--train.steps 100` sets `config.train.steps`; see `jaxinfra.options`), written to
`config.json` in the run folder, and stored in every checkpoint. `jaxinfra.checks`
holds all rules that need no device; a broken rule raises `ConfigError` with the key to
change.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Literal

Precision = Literal[
    "float32", "bfloat16", "bfloat16_params", "float16", "fp8", "int8", "mxfp8"
]


class ConfigError(ValueError):
    """A setting that cannot work: says what is wrong, the rule, the fix, the key."""


class DataError(ValueError):
    """A bad file, option or data set: the message says what, the rule and the fix."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X?` with the choice spelled most like `word`, or nothing."""
    spelled = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), spelled, n=1)
    return f"; did you mean {spelled[near[0]]}?" if near else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder and what identifies the run.

    dir: where the run lives; empty means runs/<name>. seed: of parameters, order of
    data and dropout. accept_changes: resume although the config changed.
    log_every: steps between console lines.
    """

    dir: str = ""
    seed: int = 0
    accept_changes: bool = False
    log_every: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer.

    window: keys a query sees, itself included; 0 means all before it. rope_theta: base
    of the rotary frequencies; 0 means model.rope_theta. feed_forward: dense or experts.
    """

    window: int = 0
    rope_theta: float = 0.0
    feed_forward: Literal["dense", "experts"] = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: prefix + pattern x repeats + suffix.

    vocab_size 0 takes the tokenizer's. num_kv_heads below num_heads is grouped-query
    attention. head_dim 0 means width / num_heads. max_length: rows of a learned table
    of positions. attention_softcap, logit_softcap: cap * tanh(x / cap), 0 means none.
    residual_scale_init: scale the initial output projections by 1/sqrt(2 layers).
    init_std 0 means 1/sqrt(fan in). document_mask: attention stays within a document of
    the row; without it a row is one document, which cuDNN covers.
    """

    vocab_size: int = 0
    width: int = 256
    ffn_width: int = 1024
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 0
    prefix: tuple[LayerConfig, ...] = ()
    pattern: tuple[LayerConfig, ...] = (LayerConfig(),)
    repeats: int = 4
    suffix: tuple[LayerConfig, ...] = ()
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    max_length: int = 0
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared"] = (
        "swiglu"
    )
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.0
    residual_scale_init: bool = True
    document_mask: bool = True
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.prefix) + len(self.pattern) * self.repeats + len(self.suffix)

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self.prefix + self.pattern * self.repeats + self.suffix

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it becomes rows.

    path: a prepared folder, a text or JSONL file, a folder of them, or the shipped
    corpus by the name 'shakespeare'. tokenizer, split, held_out: used when path is text
    (a prepared folder has its own). split: hold out whole documents, or the tail of the
    corpus. prefetch: batches made ahead of the step. cache_dir: where prepared text and
    compiled programs are kept; empty means ~/.cache/jaxinfra.
    """

    path: str = "shakespeare"
    tokenizer: Literal["byte", "char"] = "byte"
    split: Literal["documents", "tail"] = "tail"
    held_out: float = 0.1
    shuffle: bool = True
    prefetch: int = 2
    cache_dir: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length and shape of training.

    batch_size: global rows a step. length: tokens a row. microbatches: parts of a batch
    whose gradients are summed one after another. remat: none, full, dots, or
    save:NAME+NAME of named activations. unroll: layers as a flat program and not a
    loop. max_secs: stop with a committed save after so long; 0 means no limit.
    loss_chunk: tokens a device whose logits exist at a time; 0 lets the size decide.
    max_bad_steps: non-finite steps in a row before the run gives up (exit 11).
    """

    steps: int = 300
    batch_size: int = 16
    length: int = 256
    microbatches: int = 1
    remat: str = "none"
    unroll: bool = False
    save_every: int = 100
    max_secs: float = 0.0
    log_batch_digest: bool = False
    loss_chunk: int = 0
    z_loss: float = 0.0
    max_bad_steps: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule.

    muon updates matrices by `learning_rate` and all else by adamw with
    `adam_learning_rate`. Weight decay falls on matrices alone, by kind. decay_fraction:
    the part of all steps over which 'wsd' falls; final_fraction: of the peak, at the
    end. clip_norm 0 means no clipping.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    adam_learning_rate: float = 3e-3
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation.

    every: steps between evaluations; 0 means only at the end. batches: at most so many
    of each set; 0 means all. sets: further prepared sets by name
    (`--eval.sets.bible PATH`), evaluated whole; the data's own held-out split is always
    there as 'held_out'.
    """

    every: int = 100
    batches: int = 0
    batch_size: int = 0
    sets: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1, once, takes the rest.

    data replicates parameters, fsdp shards them (see zero), tensor splits heads, ffn
    and vocabulary. slices: how many slices or nodes a slow network joins.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the pipeline and context axes work."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    virtual_stages: int = 1
    context: Literal["ring", "ulysses", "all_gather"] = "ring"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The processes and devices of the run; none of it changes a result.

    cpu_devices: simulate so many CPU devices; 0 means the real ones. coordinator,
    num_processes, process_id: several processes (host:port of process 0).
    devices: the count the mesh must fit, checked before jax loads; 0 means unknown.
    compile_cache: keep compiled programs in data.cache_dir.
    """

    cpu_devices: int = 0
    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    devices: int = 0
    compile_cache: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A jax.profiler trace of `steps` steps from step `start` on; 0 means none."""

    start: int = 10
    steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where first parameters come from: empty means random, else RUN@STEP, a folder."""

    from_: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: `keep` newest stay."""

    keep: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The text that the run ends with; tokens 0 means none. top_k 0, top_p 1: all."""

    prompt: str = "\n"
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment. zero: what the fsdp axis shards: 0 nothing, 1 optimizer state, 2
    and gradients, 3 and parameters; -1 means 3, or 1 with a pipeline. check: trace the
    whole step, print the parameter table and stop."""

    name: str
    check: bool = False
    zero: int = -1
    precision: Precision = "float32"
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    profile: ProfileConfig = ProfileConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()


# Keys that a resumed run may change: they move work, not results.
RESUMABLE = (
    "check", "run.dir", "run.accept_changes", "run.log_every", "runtime", "mesh",
    "zero",
    "parallel", "profile", "eval", "sample", "checkpoint", "data.cache_dir",
    "data.prefetch", "train.steps", "train.microbatches", "train.remat",
    "train.unroll", "train.save_every", "train.max_secs", "train.log_batch_digest",
    "train.loss_chunk",
)  # fmt: skip

# Activations that `train.remat` save:NAME+NAME may keep; the model names them so.
REMAT_NAMES = (
    "query", "key", "value", "attention", "attention_out", "ffn_in", "ffn_out",
)  # fmt: skip

AXES = ("data", "fsdp", "expert", "context", "tensor", "pipeline")
