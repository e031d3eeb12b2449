"""The memory of a training step by arithmetic: from spec tree, mesh and batch.

What is at rest is exact: the sum over the arrays of the state, as they are laid out.
What the step adds is a model of how XLA schedules it. The peak is the largest of three
moments, each on top of what is at rest:

  loss      saved activations, and what the head's part of the loss holds
  backward  saved activations, all gradients, and one layer being recomputed
  update    all gradients, and with optimizer.offload what is there of its state

In a pipeline a stage's gradients, whole over fsdp, and what its schedule keeps of the
microbatches under way are there at the first two: of the four that results/plan.json
has the peak is within 5%. With several virtual stages it is too high by more.

Limits: dense decoders; splash or cuDNN attention. With optimizer.offload a rule that
needs arrays of its own, as muon and 8-bit moments do, has a higher peak than is said.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

import jaxinfra
from jaxinfra import checks, params, precision, sharding, tasks
from jaxinfra.config import (
    AXES,
    BATCH_AXES,
    ZERO_AXES,
    Config,
    LayerConfig,
    ModelConfig,
)
from jaxinfra.models import specs as model_specs
from jaxinfra.ops.layers import GATED
from jaxinfra.parallel import lowering, placement, schedules
from jaxinfra.params import Tree
from jaxinfra.sharding import Layout
from jaxinfra.train import optim, state

# Widths of compute dtype that the backward pass of one layer holds for each token
# beside what was saved: fitted to Llama-3-8B compiled for v5p, fsdp 8 (21.8 GB).
_WORKING_WIDTHS = 12  # of D
_WORKING_FFN = 6  # of F
_CHUNK_BYTES = 512 << 20  # of logits at a time, as `ops.loss` has it
# With optimizer.offload, of the state of the largest parameter: what came, what leaves
# and half of what comes next. Fitted to adamw's of 1.2 and 2.3 billion parameters
# compiled for H100 (10.31 and 19.37 GB, gradients among them).
_STATES_THERE = 2.5
_CUT_BYTES = 8  # four uint16 beside a row of tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. arguments = parameters + optimizer + the batch and scalars;
    temporary: what the step adds to them at its fullest moment; peak: both."""

    parameters_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    arguments_bytes: int
    temporary_bytes: int
    hbm_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.arguments_bytes + self.temporary_bytes

    @property
    def headroom_bytes(self) -> int:
        return self.hbm_bytes - self.peak_bytes


def limits(config: Config) -> list[str]:
    """What `memory` is not fitted to, of what this config has."""
    found, optimizer = [], config.optimizer
    if config.model.has_experts:
        found.append(
            "a model with experts: the arithmetic is fitted to dense ones, and counts"
            " activations as if each token met all experts"
        )
    virtual = config.parallel.virtual_stages
    if config.mesh.pipeline > 1 and virtual > 1:
        found.append(
            f"parallel.virtual_stages={virtual}: the peak by arithmetic is too high, by"
            " more than the 5% of other pipelines"
        )
    needs_arrays = optimizer.name == "muon" or optimizer.moments == "8bit"
    if optimizer.offload and needs_arrays:
        found.append(
            "optimizer.offload with arrays of the rule's own (muon, 8-bit moments): the"
            " peak is higher than by arithmetic"
        )
    return found


def layout_of(config: Config, num_devices: int) -> Layout:
    """The layout of `config` on a mesh without devices."""
    sizes = checks.resolve_mesh(config, num_devices)
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=explicit
    )
    return sharding.make_layout(mesh, zero=checks.resolve_zero(config))


def memory(config: Config, num_devices: int, hbm_bytes: int) -> Memory:
    """Of the training step of `config`, resolved, on a mesh of so many devices."""
    layout = layout_of(config, num_devices)
    specs = model_specs.param_specs(config.model)
    policy = precision.policy(config.precision)
    schedule = optim.make_schedule(config.optimizer, config.train.steps)
    tx = optim.make_optimizer(
        config.optimizer, specs, schedule, moments=policy.optimizer_state
    )
    places = state.make_shardings(specs, tx, layout)
    at_rest = state.abstract_state(
        specs,
        tx,
        places,
        layout,
        dtype=policy.param,
        loss_scale=policy.loss_scale,
    )
    size = sharding.bytes_per_device
    parameters, optimizer = size(at_rest.params), size(at_rest.opt_state)
    arguments = size(at_rest) + batch_bytes(config, layout)
    away = optimizer if config.optimizer.offload else 0
    gradients = size(params.abstract(specs, layout, layout.grads, np.dtype("float32")))
    sizes = layout.mesh.shape
    if sizes["pipeline"] > 1:
        saved = _stage_bytes(config, layout, specs)
        kept = summed = _whole_bytes(specs, layout, np.dtype("float32"))
    else:
        saved = sum(saved_bytes(config, x, layout) for x in config.model.layers)
        # The last layer's result.
        saved += _token_bytes(config, sizes, config.model.width)
        kept = gradients * (2 if config.train.microbatches > 1 else 1)
        summed = gradients if config.train.microbatches > 1 else 0
    moments = {
        "loss": saved + summed + _loss_bytes(config, sizes),
        "backward": saved + kept + _layer_bytes(config, specs, layout),
        "update": gradients + min(away, _there_bytes(away, specs, layout)),
    }
    return Memory(
        parameters_bytes=parameters,
        optimizer_bytes=optimizer,
        gradients_bytes=gradients,
        activations_bytes=saved,
        arguments_bytes=arguments - away,
        temporary_bytes=max(moments.values()),
        hbm_bytes=hbm_bytes,
    )


def _there_bytes(away: int, specs: Tree, layout: Layout) -> int:
    """Of the `away` bytes of the optimizer's state, those on the device at once, each
    parameter's being a like part of the whole."""
    like = params.abstract(specs, layout, layout.optimizer, np.dtype("float32"))
    sizes = [sharding.bytes_per_device(leaf) for leaf in jax.tree.leaves(like)]
    return int(_STATES_THERE * away * max(sizes) / sum(sizes))


def batch_bytes(config: Config, layout: Layout) -> int:
    """Of the rows of a batch on one device: tokens, and where documents are cut."""
    rows = _rows(config, layout.mesh.shape) * config.train.microbatches
    token = 2 if config.model.vocab_size <= 2**16 else 4
    return rows * ((config.train.length + 1) * token + _CUT_BYTES)


def saved_bytes(config: Config, layer: LayerConfig, layout: Layout) -> int:
    """Of the activations that one layer keeps for its backward pass, on one device and
    of one microbatch, as train.remat says."""
    model, remat, sizes = config.model, config.train.remat, layout.mesh.shape
    split = sizes["tensor"]
    heads = model.num_heads * model.head_width // split
    keys = model.num_kv_heads * model.head_width // split
    ffn = _ffn_width(model, layer) // split
    into = ffn * (2 if model.activation in GATED else 1)
    # float32 sums of the attention kernel, one a query and head, counted in bfloat16.
    sums = 2 * model.num_heads // split
    between = _width_between(config, layout)
    named = {
        "layer_input": between,
        "query": heads,
        "key": keys,
        "value": keys,
        "attention": heads + sums,
        "attention_out": between,
        "ffn_in": into,
        "ffn_out": between,
    }
    match remat:
        case "full":
            kept = {"layer_input"}
        case "dots":
            kept = {*named} - {"attention", "ffn_out"}
        case "none":
            kept = {*named}
        case _:
            names = jaxinfra.remat_names(remat)
            kept = {"layer_input", *names["save"]} - {*names["offload"]}
    widths = sum(named[name] for name in kept)
    if remat == "none":
        # Both norms' results, and in float32 what they are made of; the parts of a
        # gated product; the kernel's own layouts of queries and keys.
        widths += (2 + 8) * between + into + ffn + heads + keys
    return _token_bytes(config, sizes, widths)


def _stage_bytes(config: Config, layout: Layout, specs: Tree) -> int:
    """Of what a stage of a pipeline holds all the time, but its parameters at rest and
    its gradients: its stashes, what one microbatch puts there and reads, parameters
    that were gathered or that travelled to their chunks."""
    model, parallel, sizes = config.model, config.parallel, layout.mesh.shape
    placed = placement.place(
        model.repeats,
        stages=sizes["pipeline"],
        virtual=parallel.virtual_stages,
        size=len(model.pattern),
        prefix=len(model.prefix),
        suffix=len(model.suffix),
    )
    schedule = schedules.schedule_of(config, sizes["pipeline"])
    slots = lowering.lower(schedule)[1]
    layers = [*model.prefix, *model.pattern * placed.depth, *model.suffix]
    of_layers = sum(saved_bytes(config, layer, layout) for layer in layers)
    x = _token_bytes(config, sizes, _width_between(config, layout))
    kept = x if parallel.recompute else of_layers
    travelling = 2 * schedule.is_balanced  # one on its way out, and one that comes
    total = (slots.kept + travelling) * kept + (slots.x + slots.dy) * x + 2 * of_layers
    if parallel.schedule == "zero_bubble":
        # What meets in the gradients of a layer's matrices: both sides of each.
        ffn = max(_ffn_width(model, layer) for layer in layers)
        ffn *= 3 if model.activation in GATED else 2
        heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_width
        widths = 4 * model.width + (ffn + heads) // sizes["tensor"]
        left = _token_bytes(config, sizes, widths)
        total += (slots.left + 2) * len(layers) * left
    whole = _whole_bytes(specs, layout, precision.policy(config.precision).param)
    copies = (checks.resolve_zero(config) >= 3) + bool(placed.rounds)
    return total + copies * whole


def _width_between(config: Config, layout: Layout) -> int:
    """Numbers a token that a device holds between blocks, where activations may be cut
    along the length too: parallel.sequence."""
    is_cut = "tensor" in tasks.activation_rules(config, layout).residual
    return config.model.width // (layout.mesh.shape["tensor"] if is_cut else 1)


def _whole_bytes(specs: Tree, layout: Layout, dtype: np.dtype) -> int:
    """Of the parameters on a device in `dtype`, whole over ZeRO's axes."""
    rules = dataclasses.replace(layout.params, embed=())
    return sharding.bytes_per_device(params.abstract(specs, layout, rules, dtype))


def _token_bytes(config: Config, sizes: Mapping[str, int], width: float) -> int:
    """Of `width` numbers of compute dtype for each token of a microbatch."""
    itemsize = precision.policy(config.precision).compute.itemsize
    tokens = _rows(config, sizes) * config.train.length // sizes["context"]
    return int(tokens * width * itemsize)


def _rows(config: Config, sizes: Mapping[str, int]) -> int:
    """Rows of a microbatch on one device."""
    over = math.prod(sizes[axis] for axis in BATCH_AXES)
    return config.train.batch_size // config.train.microbatches // over


def _ffn_width(model: ModelConfig, layer: LayerConfig) -> int:
    is_dense = layer.feed_forward == "dense"
    return model.ffn_width if is_dense else model.expert_width * model.num_experts


def _loss_bytes(config: Config, sizes: Mapping[str, int]) -> int:
    """Head, its float32 gradient, the activations that meet it and their gradient, and
    one chunk of logits with its exponentials."""
    model, policy = config.model, precision.policy(config.precision)
    n = math.prod(sizes[axis] for axis in ZERO_AXES)
    V = -(-model.vocab_size // (sizes["tensor"] * sizes["pipeline"]))
    tokens = _rows(config, sizes) * config.train.length // sizes["context"]
    compute, reduce = policy.compute.itemsize, policy.reduce.itemsize
    travels = (
        checks.resolve_zero(config) >= 3
        and sizes["pipeline"] == 1  # where a stage's parameters are whole
        and n > 1
        and V % n == 0
        and n * tokens * 2 * compute < V * (compute + reduce) * (n - 1) // n
    )
    if travels:  # tokens of the axis against a part of the vocabulary
        V, tokens = V // n, tokens * n
    head = V * model.width * (compute + 4)
    chunk = config.train.loss_chunk or max(256, _CHUNK_BYTES // (4 * V))
    logits = min(chunk, tokens) * V * (4 + 4 + compute)
    return head + 2 * tokens * model.width * compute + logits


def _layer_bytes(config: Config, specs, layout: Layout) -> int:
    """The heaviest layer at work: its parameters gathered, its gradients, activations
    recomputed and their gradients."""
    model, policy = config.model, precision.policy(config.precision)
    sizes = layout.mesh.shape
    split = sizes["tensor"]
    stacks = [specs["prefix"], specs["pattern"], specs["suffix"]]
    layers = [layer for stack in stacks for layer in stack]
    weights = max(
        sum(
            math.prod(spec.shape) // (spec.shape[0] if spec.axes[0] == "layers" else 1)
            for spec in jax.tree.leaves(layer)
        )
        for layer in layers
    )
    # This layer's and, ahead of its turn, the next one's; and the gradient of one
    # matrix, whole as it is made and as it arrives summed.
    gathered = 2 * weights // split * policy.compute.itemsize
    largest = max(
        math.prod(spec.shape) // (spec.shape[0] if spec.axes[0] == "layers" else 1)
        for layer in layers
        for spec in jax.tree.leaves(layer)
    )
    gathered += 2 * largest // split * policy.reduce.itemsize
    widest = max(_ffn_width(model, layer) for layer in model.layers) // split
    widths = _WORKING_WIDTHS * model.width + _WORKING_FFN * widest
    return (
        gathered + _token_bytes(config, sizes, widths) + _meeting_bytes(config, sizes)
    )


def _meeting_bytes(config: Config, sizes: Mapping[str, int]) -> int:
    """Of attention over rows that are split: float32 sums, and in a ring the gradients
    of keys and values on their way; or both gathered, whole, and their gradients in
    compute dtype and float32."""
    model, parts = config.model, sizes["context"]
    if parts == 1 or config.parallel.context == "ulysses":
        return 0
    compute = precision.policy(config.precision).compute.itemsize
    heads, keys = (
        n * model.head_width // sizes["tensor"]
        for n in (model.num_heads, model.num_kv_heads)
    )
    tokens = _rows(config, sizes) * config.train.length // parts
    if config.parallel.context == "ring":
        return tokens * 4 * (heads + 2 * 2 * keys)
    return tokens * parts * 2 * keys * (2 * compute + 4)
