"""How likely given tokens are: whole logits, or log-likelihoods of chosen targets.

`make_logits` is for few tokens; `make_score` never holds more logits than a chunk of
tokens has. Both run rows in batches on any mesh, each row one document that is padded
on the right, where no token of it sees. Lengths and batches are powers of two, so that
few programs are compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import mesh, sharding
from jaxinfra.config import ConfigError, DataError, ModelConfig
from jaxinfra.generate.rows import Row, Scored
from jaxinfra.models import transformer
from jaxinfra.ops import attention, seam
from jaxinfra.ops.seam import Context, Ops
from jaxinfra.parallel import expert
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout, Rules

# Tokens a device and batch: what fills its cores. Measured on 2 CPU cores: SmolLM2-135M
# is as fast with 1,024 as with 4,096.
_BATCH_TOKENS = {"cpu": 1 << 10}
_BATCH_TOKENS_DEFAULT = 1 << 14
# Bytes of float32 logits a device at a time: of one chunk of targets, of whole rows.
_CHUNK_BYTES = {"cpu": 16 << 20}
_CHUNK_BYTES_DEFAULT = 512 << 20
_LOGITS_BYTES = 1 << 30
# Shorter rows share one program; splash wants multiples of 128.
_MIN_LENGTH = {"tpu": 128}
_MIN_LENGTH_DEFAULT = 32


class Logits(Protocol):
    def __call__(
        self, params: Tree, ids_BT: np.ndarray, out_BTV: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 logits [B, T, V] of int ids, on the host, soft-capped, without the
        vocabulary's padding; written to `out_BTV` as they come, if given.

        DataError for ids, ConfigError for a length, that the model does not have.
        """
        ...


class ScoreRows(Protocol):
    def __call__(self, params: Tree, rows: Sequence[Row]) -> list[Scored]:
        """The scores of every row, in order.

        A row that is the beginning of another is read with it. DataError for ids,
        ConfigError for a length, that the model does not have.
        """
        ...


class _Batch(NamedTuple):
    """Rows of one program: `rows` are those that stand in its first places."""

    rows: list[int]
    ids_BT: np.ndarray
    places_BQ: np.ndarray
    targets_BQ: np.ndarray


def make_logits(
    cfg: ModelConfig, *, policy: Policy, layout: Layout, unroll: bool = False
) -> Logits:
    """Logits of whole rows, to be called where the mesh of `layout` is set.

    Limits: a row's logits are whole on its devices; one process; devices along
    `context` and `pipeline` repeat the work.
    """
    forward, rules = _forward(cfg, policy, layout, unroll)

    def logits(params, ids_BT):
        h_BTD, head_VD = forward(params, ids_BT)
        logits_BTV = jnp.einsum(
            "BTD,VD->BTV",
            h_BTD,
            seam.gather(head_VD, policy),
            precision=policy.matmul_precision,
            preferred_element_type=jnp.float32,
            out_sharding=sharding.spec(rules, "batch", None, "vocab"),
        )
        return _capped(logits_BTV, cfg)

    return functools.partial(_logits, logits=jax.jit(logits), cfg=cfg, layout=layout)


def make_score(
    cfg: ModelConfig, *, policy: Policy, layout: Layout, unroll: bool = False
) -> ScoreRows:
    """Log-likelihoods of targets, to be called where the mesh of `layout` is set.

    Limits: one process; devices along `context` and `pipeline` repeat the work.
    """
    forward, rules = _forward(cfg, policy, layout, unroll)

    def scores(params, ids_BT, places_BQ, targets_BQ):
        h_BTD, head_VD = forward(params, ids_BT)
        head_spec = jax.typeof(head_VD).sharding.spec
        rows = sharding.spec(rules, "batch", None)

        def local(h_BTD, head_VD, places_BQ, targets_BQ):
            h_BQD = jnp.take_along_axis(h_BTD, places_BQ[:, :, None], axis=1)
            whole_VD = sharding.all_gather(head_VD.astype(policy.compute), head_spec)
            return _chunked(
                h_BQD, whole_VD, targets_BQ, cfg=cfg, policy=policy, rules=rules
            )

        return jax.shard_map(
            local,
            in_specs=(sharding.spec(rules, "batch", None, None), head_spec, rows, rows),
            out_specs=(rows, rows),
            check_vma=False,
        )(h_BTD, head_VD, places_BQ, targets_BQ)

    return functools.partial(_score, scores=jax.jit(scores), cfg=cfg, layout=layout)


def _forward(
    cfg: ModelConfig, policy: Policy, layout: Layout, unroll: bool
) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Rules]:
    """((params, ids_BT) -> (h_BTD, head_VD), the rules that they follow)."""
    rules = dataclasses.replace(layout.params, length=(), residual=())
    ops = Ops(
        seam.make_einsum(policy, rules),
        attention.make_attend(rules),
        expert.make_dispatch(cfg, policy=policy, rules=rules),
    )
    model = transformer.make_model(
        cfg, ops=ops, policy=policy, rules=rules, unroll=unroll
    )

    def forward(params, ids_BT):
        positions_BT = jnp.zeros_like(ids_BT) + jnp.arange(ids_BT.shape[1])
        h_BTD, head_VD, _ = model.forward(params, ids_BT, Context(positions_BT))
        return h_BTD, head_VD

    return forward, rules


def _logits(
    params: Tree,
    ids_BT: np.ndarray,
    out_BTV: np.ndarray | None = None,
    *,
    logits: Callable,
    cfg: ModelConfig,
    layout: Layout,
) -> np.ndarray:
    """See `Logits`."""
    ids_BT = np.asarray(ids_BT)
    B, T = ids_BT.shape
    _check(ids_BT, T, cfg)
    if out_BTV is None:
        out_BTV = np.empty((B, T, cfg.vocab_size), np.float32)
    length = _bucket(T, cfg)
    fitting = _LOGITS_BYTES // (4 * length * cfg.vocab_size)
    batch = _batch_rows(B, length, layout, at_most=max(1, fitting))
    for first in range(0, B, batch):
        rows_BT = ids_BT[first : first + batch]
        padded_BT = np.zeros((batch, length), np.int32)
        padded_BT[: len(rows_BT), :T] = rows_BT
        found_BTV = np.asarray(logits(params, _placed(padded_BT, layout)))
        found_BTV = found_BTV[: len(rows_BT), :T, : cfg.vocab_size]
        out_BTV[first : first + batch] = found_BTV
    return out_BTV


def _score(
    params: Tree,
    rows: Sequence[Row],
    *,
    scores: Callable,
    cfg: ModelConfig,
    layout: Layout,
) -> list[Scored]:
    """See `ScoreRows`: every batch is on its way before the first is waited for."""
    for row in rows:
        _check(row.ids_T, len(row.ids_T), cfg)
        _check(row.targets_Q, 0, cfg)
        places_Q = np.asarray(row.places_Q)
        if np.any((places_Q < 0) | (places_Q >= len(row.ids_T))):
            raise ValueError(
                f"a row of {len(row.ids_T)} tokens has no places {places_Q}; they "
                "count from 0"
            )
    groups = _sharing(rows)
    joined = [_joined([rows[i] for i in group]) for group in groups]
    running = [
        (batch.rows, scores(params, *(_placed(x, layout) for x in batch[1:])))
        for batch in _batches(joined, cfg, layout)
    ]
    found: list[Any] = [None] * len(rows)
    for numbers, (logprobs_BQ, is_greedy_BQ) in running:
        logprobs_BQ, is_greedy_BQ = np.asarray(logprobs_BQ), np.asarray(is_greedy_BQ)
        for b, number in enumerate(numbers):
            first = 0
            for i in groups[number]:
                mine = slice(first, first + len(rows[i].targets_Q))
                found[i] = Scored(logprobs_BQ[b, mine], is_greedy_BQ[b, mine])
                first = mine.stop
    return found


def _sharing(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of the rows in groups: each one's first row begins with all others."""
    # As big-endian bytes, ids sort as numbers do, and a beginning stands before what
    # goes on from it.
    keys = [np.asarray(row.ids_T).astype(">u4").tobytes() for row in rows]
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=keys.__getitem__, reverse=True):
        if groups and keys[groups[-1][0]].startswith(keys[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _joined(rows: list[Row]) -> Row:
    """All targets of rows that share ids, on the longest, which is the first."""
    places_Q = np.concatenate([row.places_Q for row in rows])
    return Row(rows[0].ids_T, places_Q, np.concatenate([row.targets_Q for row in rows]))


def _batches(rows: Sequence[Row], cfg: ModelConfig, layout: Layout) -> Iterator[_Batch]:
    """The rows by length and number of targets, the longest first: a batch that does
    not fit into memory is met at once."""
    buckets: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        num_targets = 8
        while num_targets < len(row.targets_Q):
            num_targets *= 4
        size = (_bucket(len(row.ids_T), cfg), num_targets)
        buckets.setdefault(size, []).append(number)
    for (T, Q), numbers in sorted(buckets.items(), reverse=True):
        B = _batch_rows(len(numbers), max(T, Q), layout)
        for first in range(0, len(numbers), B):
            batch = _Batch(
                numbers[first : first + B],
                np.zeros((B, T), np.int32),
                np.zeros((B, Q), np.int32),
                np.zeros((B, Q), np.int32),
            )
            for b, number in enumerate(batch.rows):
                row = rows[number]
                batch.ids_BT[b, : len(row.ids_T)] = row.ids_T
                batch.places_BQ[b, : len(row.places_Q)] = row.places_Q
                batch.targets_BQ[b, : len(row.targets_Q)] = row.targets_Q
            yield batch


def _bucket(length: int, cfg: ModelConfig) -> int:
    """The length of the program that takes rows of `length`."""
    least = _MIN_LENGTH.get(mesh.platform(), _MIN_LENGTH_DEFAULT)
    bucket = max(least, 1 << (length - 1).bit_length())
    # Learned positions end there; past them a row would read numbers that are none.
    return min(bucket, cfg.max_length) if cfg.positions == "learned" else bucket


def _batch_rows(
    num_rows: int, length: int, layout: Layout, *, at_most: int = 1 << 30
) -> int:
    """Rows of a batch that the mesh divides: as many as the devices take, or as there
    are, up to a power of two."""
    parts = sharding.axis_product(layout.mesh, layout.params.batch)
    budget = _BATCH_TOKENS.get(mesh.platform(), _BATCH_TOKENS_DEFAULT)
    each = -(-num_rows // parts)
    wanted = 1 << (each - 1).bit_length()
    return parts * max(1, min(wanted, budget // length, at_most))


def _placed(x_BX: np.ndarray, layout: Layout) -> jax.Array:
    place = sharding.sharding(layout, layout.params, x_BX.shape, ("batch", None))
    return jax.device_put(x_BX, place)


def _check(ids: np.ndarray, length: int, cfg: ModelConfig) -> None:
    if cfg.positions == "learned" and length > cfg.max_length:
        raise ConfigError(
            f"a row of {length} tokens exceeds model.max_length={cfg.max_length}, the "
            "count of learned positions; cut it"
        )
    if np.size(ids) and not 0 <= np.min(ids) <= np.max(ids) < cfg.vocab_size:
        raise DataError(
            f"ids from {np.min(ids)} to {np.max(ids)} are given and the model has 0 to "
            f"{cfg.vocab_size - 1}; encode text with the model's own tokenizer"
        )


def _chunked(
    h_BQD: jax.Array,
    head_VD: jax.Array,
    targets_BQ: jax.Array,
    *,
    cfg: ModelConfig,
    policy: Policy,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """(log-likelihoods, is greedy) [B, Q] of one device's rows, a chunk at a time."""
    B, Q, D = h_BQD.shape
    budget = _CHUNK_BYTES.get(mesh.platform(), _CHUNK_BYTES_DEFAULT)
    num_chunks = -(-B * Q // max(256, budget // (4 * head_VD.shape[0])))
    size = -(-B * Q // num_chunks)
    pad = num_chunks * size - B * Q
    h_CND = jnp.pad(h_BQD.reshape(B * Q, D), ((0, pad), (0, 0)))
    targets_CN = jnp.pad(targets_BQ.reshape(B * Q), (0, pad))
    one = functools.partial(
        _targets, head_VD=head_VD, cfg=cfg, policy=policy, rules=rules
    )
    found = jax.lax.map(
        lambda chunk: one(*chunk),
        (h_CND.reshape(num_chunks, size, D), targets_CN.reshape(num_chunks, size)),
    )
    return jax.tree.map(lambda x: x.reshape(-1)[: B * Q].reshape(B, Q), found)


def _targets(h_ND, targets_N, *, head_VD, cfg, policy, rules):
    """(log-likelihoods, is greedy) [N]; V is this device's part of the vocabulary."""
    axes = rules.vocab
    logits_NV = jnp.einsum(
        "ND,VD->NV",
        h_ND,
        head_VD,
        precision=policy.matmul_precision,
        preferred_element_type=jnp.float32,
    )
    ids_V = jax.lax.axis_index(axes) * head_VD.shape[0] + jnp.arange(head_VD.shape[0])
    logits_NV = jnp.where(ids_V < cfg.vocab_size, _capped(logits_NV, cfg), -jnp.inf)
    max_N = jax.lax.pmax(jnp.max(logits_NV, axis=-1), axes)
    exp_NV = jnp.exp(logits_NV - max_N[:, None])
    log_z_N = max_N + jnp.log(jax.lax.psum(jnp.sum(exp_NV, axis=-1), axes))
    is_target_NV = ids_V == targets_N[:, None]
    label_N = jax.lax.psum(jnp.sum(jnp.where(is_target_NV, logits_NV, 0), -1), axes)
    is_max_NV = logits_NV == max_N[:, None]
    # Of equals the lowest id is the likeliest, as in `sample.greedy`.
    first_N = jnp.min(jnp.where(is_max_NV, ids_V, jnp.iinfo(jnp.int32).max), axis=-1)
    return label_N - log_z_N, jax.lax.pmin(first_N, axes) == targets_N


def _capped(logits: jax.Array, cfg: ModelConfig) -> jax.Array:
    cap = cfg.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits
