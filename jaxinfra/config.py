"""Every setting of a run: frozen dataclasses, checked without jax.

A `Config` is built by `configs/<name>.py`, changed by options of the same names
(`--train.steps 100` sets `config.train.steps`; see `jaxinfra.options`), written to
`config.json` in the run folder, and stored in every checkpoint. `jaxinfra.checks`
holds all rules that need no device; a broken rule raises `ConfigError` with the key to
change.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Literal

Precision = Literal[
    "float32", "bfloat16", "bfloat16_params", "float16", "fp8", "int8", "mxfp8"
]


# Those that are bfloat16 but for the matmuls of a recipe (`quant.*`).
LOW_PRECISION = ("fp8", "int8", "mxfp8")


class ConfigError(ValueError):
    """A setting that cannot work: says what is wrong, the rule, the fix, the key."""


class DataError(ValueError):
    """A bad file, option or data set: the message says what, the rule and the fix."""


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s\"']+")
_SHOWN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/+)([^?#]*)(.*)", re.DOTALL)


def redacted(url: str) -> str:
    """The URL without what may be secret: user, password, query and fragment.

    Where people write a password as it is, with /, ? or # in it, no rule tells it from
    a path: of `host:80/a@b` too only what follows the @ is shown. A pathlib.Path of a
    URL, which has lost a slash, is one here; another text is given as it is.
    """
    found = _SHOWN.fullmatch(url)
    if not found:
        return url
    scheme, place, rest = found.groups()
    server, _, path = place.partition("/")
    if "@" in server or (":" in server and "@" in path):
        place = ("...@" if "@" in path else "") + place.rpartition("@")[2]
    elif ":" in server and "@" in rest:
        return f"{scheme}..."
    return scheme + place + (f"{rest[0]}..." if len(rest) > 1 else "")


def without_secrets(text: str) -> str:
    """The text with every URL in it `redacted`."""
    return _URL.sub(lambda url: redacted(url[0]), text)


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
    of the rotary frequencies, which are then not scaled; 0 means model.rope_theta,
    scaled as model.rope_scaling says. feed_forward: dense or experts.
    """

    window: int = 0
    rope_theta: float = 0.0
    feed_forward: Literal["dense", "experts"] = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies for rows longer than the model was first trained on.

    linear: all are divided by `factor`. llama3: those that turn less than low_freq
    times in original_length tokens are divided, those that turn more than high_freq
    times stay, those between are mixed.
    """

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: prefix + pattern x repeats + suffix.

    vocab_size 0 takes the tokenizer's. num_kv_heads below num_heads is grouped-query
    attention. head_dim 0 means width / num_heads. max_length: rows of a learned table
    of positions; of a rotary model, tokens a row that it was made for, which limit no
    training, 0 if not known. residual_scale_init: scale the initial output projections
    by 1/sqrt(2 layers). init_std 0 means 1/sqrt(fan in). document_mask: attention stays
    within a document of the row; without it a row is one document, which cuDNN covers.

    Norms: norm_placement before each part of a layer (pre), after it (post) or both;
    norm_from_zero: the stored scales are offsets from 1. qk_norm: of each query and key
    head by itself, or of all heads of a token together. Scores are divided by
    sqrt(attention_scale_dim), 0 means head_dim, then capped: attention_softcap,
    logit_softcap: cap * tanh(x / cap), 0 means none. embedding_scale: embeddings times
    sqrt(width).

    Experts: a layer with feed_forward='experts' sends each token to the
    experts_per_token likeliest of num_experts; their shares are made to sum to 1 if
    router_renormalize, then multiplied by router_scale. router: scores are a softmax
    over experts, or each one's own sigmoid. router_groups: experts of the
    router_top_groups best of so many groups alone are taken; 0 means all.
    shared_experts: further ones that every token meets. expert_ffn_width 0 means
    ffn_width. capacity_factor: in training an expert takes at most so many times its
    even share of a row, in order of position, and the rest is dropped; 0 drops none.
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
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_from_zero: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_length: int = 0
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared"] = (
        "swiglu"
    )
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    embedding_scale: bool = False
    attention_scale_dim: int = 0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.0
    residual_scale_init: bool = True
    document_mask: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_width: int = 0
    router_renormalize: bool = True
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_scale: float = 1.0
    router_groups: int = 0
    router_top_groups: int = 0
    shared_experts: int = 0
    capacity_factor: float = 0.0

    @property
    def num_layers(self) -> int:
        return len(self.prefix) + len(self.pattern) * self.repeats + len(self.suffix)

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self.prefix + self.pattern * self.repeats + self.suffix

    @property
    def has_experts(self) -> bool:
        kinds = self.prefix + self.pattern + self.suffix  # not `layers`: may be huge
        return any(layer.feed_forward == "experts" for layer in kinds)

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def expert_width(self) -> int:
        return self.expert_ffn_width or self.ffn_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it becomes rows.

    path: a prepared folder or its URL, a file of texts (`data.sources`), a folder of
    them, or the shipped corpus 'shakespeare'. tokenizer, eod, bos, split, held_out: for
    path of text (a prepared folder has its own). tokenizer: byte, char, or a path: a
    Hugging Face folder, a tokenizer.json, a SentencePiece .model, a .tiktoken file.
    eod: its token that ends a document; empty takes its EOS. bos: whether documents
    start with its BOS. split: hold out whole documents, or the tail of the corpus.
    sets: name -> path of several data sets, which take the place of path and are mixed
    by weights: name -> stages, as in "0.7 0.3@2000", which is 0.7, and 0.3 from step
    2000 on; none: by their numbers of rows. shuffle_block: rows that stay near each
    other, for storage that is read by ranges; 0: none. damaged: end the run where a
    block of bytes is not what was written, or count its rows as padding and log it.
    prefetch: batches made ahead of the step. cache_dir: where prepared text, compiled
    programs and what is read by URL are kept; empty means ~/.cache/jaxinfra. cache_gib:
    the most that is kept of the last, for all processes of a machine.
    """

    path: str = "shakespeare"
    tokenizer: str = "byte"
    eod: str = ""
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    split: Literal["documents", "tail"] = "tail"
    held_out: float = 0.1
    sets: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    shuffle: bool = True
    shuffle_block: int = 0
    damaged: Literal["stop", "quarantine"] = "stop"
    prefetch: int = 2
    cache_dir: str = ""
    cache_gib: float = 50.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length and shape of training.

    batch_size: global rows a step. batch_ramp: stages that it rises by, as in
    "8 16@200" for batch_size 16. length: tokens a row. microbatches: parts of a batch
    whose gradients are summed one after another. remat: what layers keep: none (all),
    full, dots, save:NAME+NAME, offload:NAME+NAME, as `jaxinfra.ops.rematerialisation`
    explains. unroll: layers as a flat program and not a loop. max_secs: stop with a
    committed save after so long; 0 means no limit. loss_chunk: tokens a device whose
    logits exist at a time; 0 lets the size decide.
    label_smoothing: the part of every target that is spread over the vocabulary, in
    training alone. freeze: patterns, as LoraConfig's, of parameters that stay as they
    come from init.from. quantize_aware: matrices are rounded so in the loss, to the
    nearest, quantize_group inputs to a scale (0: all), as `compress` then keeps them.
    balance_loss, router_z_loss: weights, in training alone, of how
    unevenly each layer's experts are used (1 is even) and of the router's squared
    log-sum-exp, means over a row's targets; router_bias_rate: how far each expert's
    bias moves a step to even out their use. rounding: how an update enters parameters
    kept in bfloat16. max_bad_steps: non-finite steps in a row before the run gives up
    (exit 11).
    """

    steps: int = 300
    batch_size: int = 16
    batch_ramp: str = ""
    length: int = 256
    microbatches: int = 1
    remat: str = "none"
    unroll: bool = False
    save_every: int = 100
    max_secs: float = 0.0
    log_batch_digest: bool = False
    loss_chunk: int = 0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    freeze: str = ""
    quantize_aware: Literal["none", "int8", "int4", "nf4"] = "none"
    quantize_group: int = 64
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    router_bias_rate: float = 0.0
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    max_bad_steps: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule.

    muon updates matrices by `learning_rate` and all else by adamw with
    `adam_learning_rate`. adafactor's rate is relative to the root mean square of each
    matrix. momentum: muon's and sgd's. Weight decay falls on matrices alone, by kind.
    decay_fraction: the part of all steps over which 'wsd' falls; final_fraction: of the
    peak, at the end ('constant' and 'inverse_sqrt' end where they are). clip_norm 0
    means no clipping. ema_decay: evaluate and sample with an average of the parameters
    that keeps this part of itself each step; 0 means none. moments: how adamw's two
    are kept; a checkpoint of either kind goes on as the other, if changes are accepted.
    offload: the rule's state rests in the host's memory between steps.
    """

    name: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 3e-3
    adam_learning_rate: float = 3e-3
    schedule: Literal[
        "constant", "cosine", "wsd", "linear", "exponential", "inverse_sqrt"
    ] = "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    moments: Literal["float32", "8bit"] = "float32"
    offload: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How precision fp8, int8 and mxfp8 multiply; see `jaxinfra.quant.recipe`.

    scaling: by the magnitudes at hand, or (fp8) of `history` steps before. backward:
    both backward matmuls too, or in the compute dtype. skip: `patterns` of parameters
    that stay as they are, such as "attention/out pattern/0". figures: measure
    saturation (0 but with delayed scales), underflow and scales (metrics quant/...).
    """

    scaling: Literal["current", "delayed"] = "current"
    backward: Literal["low", "compute"] = "low"
    history: int = 16
    skip: str = ""
    figures: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """In how many bits a block's weights and their gradients cross the fsdp axis.

    gather: parameters, on their way to each use; reduce: gradients, on their way to
    their shard. compute: as precision says.
    """

    gather: Literal["compute", "int8", "fp8"] = "compute"
    reduce: Literal["compute", "int8", "fp8"] = "compute"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation, of the averaged parameters where optimizer.ema_decay is set.

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

    data replicates parameters, fsdp, expert and context shard them (see zero), tensor
    splits heads, ffn and vocabulary, pipeline the repeats of the stack, and the
    vocabulary too. slices: how many slices or nodes a slow network joins.
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
    """How the pipeline, context, expert and tensor axes work.

    schedule: of a pipeline over train.microbatches. gpipe: all forward, then all
    backward; 1f1b: backward as soon as can be, so that the stages, and not the
    microbatches, say how much is kept; interleaved: the same over several
    virtual_stages of each device, which wait less; zero_bubble: weight gradients fill
    the ticks in which a stage would wait. balanced: late stages keep a part for early
    ones, which travels; auto: with train.remat full or recompute, on a fast network.
    recompute: stages keep only what enters them, and run their layers once more.
    reduce_once: gradients of microbatches are summed over data (zero 0 or 1: fsdp too)
    after the last one, as pipelines do anyway; auto: of text, on GPUs 3 or more.
    context: keys and values go round the devices (ring), heads are exchanged for length
    (ulysses), or keys and values are gathered. experts: tokens go to their experts
    (dropless), or every expert meets every token (dense). sequence: activations between
    blocks are cut along the length over tensor, where `tasks.activation_rules` can.
    """

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    virtual_stages: int = 1
    balanced: Literal["auto", "true", "false"] = "auto"
    recompute: bool = False
    reduce_once: Literal["auto", "true", "false"] = "auto"
    context: Literal["ring", "ulysses", "all_gather"] = "ring"
    experts: Literal["dropless", "dense"] = "dropless"
    sequence: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The processes and devices of the run; none of it changes a result.

    cpu_devices: simulate so many CPU devices; 0 means the real ones. coordinator,
    num_processes, process_id: several processes (host:port of process 0); where none
    are stated and `discover`, those that a launcher tells of (`launch.discovery`).
    devices: the count the mesh must fit, checked before jax loads; 0 means unknown.
    compile_cache: keep compiled programs in data.cache_dir. compiler_options: changes
    to what `jaxinfra.compiler_options` has for the devices: name=value, name= to drop
    one, none to drop all, with commas between.
    """

    cpu_devices: int = 0
    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    discover: bool = True
    devices: int = 0
    compile_cache: bool = True
    compiler_options: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A jax.profiler trace of `steps` steps from step `start` on; 0 means none."""

    start: int = 10
    steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where first parameters come from, and nothing else of it: empty means random,
    else RUN, RUN@STEP, a published folder or a .gguf file. model: take model.* from
    there too, but for dropout, document_mask and a vocab_size that is not 0."""

    from_: str = ""
    model: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, which alone are trained, beside the parameters of init.from.

    A matrix W that the patterns `targets` match becomes W + alpha / rank * A B, of A
    and B with `rank` columns and rows; rank 0 means none. whole: patterns of parameters
    that are trained as they are too. A pattern is a part of a path or several, with *
    and ?: ffn, attention/query, *norm, suffix/0; several are set apart by spaces. base:
    how the adapted matrices are kept; group: weights that share a scale there, 0: all
    of a channel.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "attention up gate down"
    whole: str = ""
    base: Literal["plain", "int8", "int4", "nf4"] = "plain"
    group: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which steps stay, and what a save takes of the host.

    keep: so many newest stay. And so do, where not 0: every step that is a multiple of
    keep_every; the keep_best best ones by best_metric, of those evaluated when they
    were saved; all of the last keep_hours. staging_gib: host memory for copies on their
    way to the disk or from it; 0: what the state takes, and a save blocks the loop
    least. defer_copies: the devices copy the state, which takes room for a second one,
    and its way to the host overlaps the next steps.
    """

    keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "eval/loss"
    best: Literal["lowest", "highest"] = "lowest"
    keep_hours: float = 0.0
    staging_gib: float = 0.0
    defer_copies: bool = False


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
    """One experiment.

    task: text, or own, which get_task of the config file makes; the keys of TEXT_KEYS
    are then as that says. zero: what the axes fsdp, expert and context shard: 0
    nothing, 1 optimizer state, 2 and gradients, 3 and parameters (of these two, where
    there are stages, fsdp alone); -1 means 3, or 1 with a pipeline. check: trace the
    whole step, print the parameter table and stop.
    """

    name: str
    task: Literal["text", "own"] = "text"
    check: bool = False
    zero: int = -1
    precision: Precision = "float32"
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    quant: QuantConfig = QuantConfig()
    comm: CommConfig = CommConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    profile: ProfileConfig = ProfileConfig()
    init: InitConfig = InitConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()


# Settings of a model that only training reads: they change no logit.
FOR_TRAINING = (
    "dropout", "init_std", "residual_scale_init", "document_mask", "capacity_factor",
)  # fmt: skip

# Keys that a resumed run may change: they move work, not results.
RESUMABLE = (
    "check", "run.dir", "run.accept_changes", "run.log_every", "runtime", "mesh",
    "zero", "parallel", "profile", "eval", "sample", "checkpoint", "data.cache_dir",
    "data.prefetch", "data.damaged", "data.cache_gib", "train.steps",
    "train.microbatches", "train.remat", "train.unroll", "train.save_every",
    "train.max_secs", "train.log_batch_digest", "train.loss_chunk",
    "optimizer.offload",
)  # fmt: skip

# Keys that only the task of text reads; a config file with a task of its own names
# those that it reads too in TASK_KEYS.
TEXT_KEYS = (
    "init", "lora", "model", "sample", "data.path", "data.tokenizer", "data.eod",
    "data.bos", "data.split", "data.held_out", "data.shuffle", "data.sets",
    "data.weights", "data.shuffle_block", "data.damaged", "data.cache_gib",
    "train.batch_ramp",
    "train.length", "train.remat", "train.unroll", "train.loss_chunk", "train.z_loss",
    "train.label_smoothing", "train.freeze", "train.quantize_aware",
    "train.quantize_group", "train.balance_loss", "train.router_z_loss",
    "train.router_bias_rate", "eval.sets",
)  # fmt: skip

# Activations that `train.remat` may save or offload; the model names them so.
REMAT_NAMES = ("layer_input", "query", "key", "value", "attention", "attention_out",
               "ffn_in", "ffn_out")  # fmt: skip

AXES = ("data", "fsdp", "expert", "context", "tensor", "pipeline")
# Which split the rows of a batch.
BATCH_AXES = ("data", "fsdp", "expert")
# Over which ZeRO shards, where there are no stages: all that split tokens but `data`.
ZERO_AXES = ("fsdp", "expert", "context")
