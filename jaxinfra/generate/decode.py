"""Text from a model: prompts into caches at once, then a token a row at a time.

`make_generate` works on ids, `generate_text` on strings, `continue_prompts` by the
settings of `SampleConfig`. Two programs are compiled:
`_prefill`, once for each power of two of prompt lengths, and `_decode`, whose loop ends
as soon as every row has met a stop token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import sharding
from jaxinfra.config import ConfigError, DataError, ModelConfig, SampleConfig
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.generate import cache, rows, sample
from jaxinfra.models import transformer
from jaxinfra.ops import attention, seam
from jaxinfra.ops.seam import Context, Ops
from jaxinfra.parallel import expert
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout, Rules

PADDING = -1  # no token's id, so that taking it for one is an error
_MIN_PREFILL = 16  # tokens; shorter prompts share one program


class Generated(NamedTuple):
    """Host int32 arrays: `lengths_B` new tokens a row, its stop token included, then
    `PADDING`."""

    tokens_BN: np.ndarray
    lengths_B: np.ndarray


class Generate(Protocol):
    def __call__(
        self,
        params: Tree,
        prompts_BP: np.ndarray,
        lengths_B: np.ndarray,
        key: jax.Array,
        rows_B: np.ndarray | None = None,
    ) -> Generated:
        """Continues the prompts, ids in the first `lengths_B` >= 1 places of each row.

        Any B: dummy rows fill the mesh. rows_B: ids that rows draw by, else 0 .. B-1.
        On several processes all call alike. Errors: ValueError for a prompt that is
        empty, too long, or has an id that the model does not know.
        """
        ...


class _Rows(NamedTuple):
    """What a row draws by and where its prompt ends; of dummy rows at 0."""

    key: jax.Array
    ids_B: jax.Array
    lengths_B: jax.Array


def make_generate(
    cfg: ModelConfig,
    *,
    policy: Policy,
    layout: Layout,
    max_new_tokens: int,
    capacity: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int = 0,
    unroll: bool = False,
) -> Generate:
    """Generation by `sample.sample`, to be called where the mesh of `layout` is set.

    capacity: tokens a row, prompt and new. vocab_size: ids below it may be chosen; 0
    means all of the model's. unroll: layers as a flat program and not a loop.
    Errors: ValueError where learned positions have no room for `capacity`.
    Limits: parameters split over fsdp are gathered for every token (lay them out with
    zero=0 for long texts); devices along `context` and `pipeline` repeat the work.
    """
    if not 0 < max_new_tokens < capacity:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be above 0 and below "
            f"capacity={capacity}, which holds the prompt too; raise capacity"
        )
    if cfg.positions == "learned" and capacity > cfg.max_length:
        raise ValueError(
            f"capacity={capacity} exceeds model.max_length={cfg.max_length}, the count "
            "of learned positions; ask for fewer tokens or shorten the prompt"
        )
    # A row's one new token cannot be split by length.
    rules = dataclasses.replace(layout.params, length=(), residual=())
    make_ops = functools.partial(
        Ops,
        seam.make_einsum(policy, rules),
        dispatch=expert.make_dispatch(cfg, policy=policy, rules=rules),
    )
    make_model = functools.partial(
        transformer.make_model, cfg, policy=policy, rules=rules, unroll=unroll
    )
    prefill_attend = cache.make_prefill_attend(attention.make_attend(rules), rules)
    choose = functools.partial(
        _choose,
        logits=functools.partial(logits, cfg=cfg, policy=policy, rules=rules),
        draw=functools.partial(
            sample.sample, temperature=temperature, top_k=top_k, top_p=top_p
        ),
        vocab_size=vocab_size or cfg.vocab_size,
    )
    prefill = functools.partial(
        _prefill,
        forward=make_model(ops=make_ops(prefill_attend)).forward,
        choose=choose,
        make_caches=functools.partial(
            cache.make_caches, cfg, capacity=capacity, policy=policy, layout=layout
        ),
    )
    decode = functools.partial(
        _decode,
        forward=make_model(ops=make_ops(cache.make_cached_attend(rules))).forward,
        choose=choose,
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(stop_ids),
    )
    return functools.partial(
        _generate,
        prefill=jax.jit(prefill),
        decode=jax.jit(decode, donate_argnames="caches"),
        layout=layout,
        max_prompt=capacity - max_new_tokens,
        vocab_size=cfg.vocab_size,
    )


def as_rows(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(prompts_BP, lengths_B) as `Generate` takes them, of one or more prompts."""
    lengths_B = np.array([len(row) for row in prompts])
    prompts_BP = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for b, row in enumerate(prompts):
        prompts_BP[b, : len(row)] = row
    return prompts_BP, lengths_B


def generate_text(
    params: Tree,
    prompts: Sequence[str | np.ndarray],
    tokenizer: Tokenizer,
    *,
    generate: Generate,
    key: jax.Array,
) -> list[str]:
    """What follows each prompt, which starts a document: after BOS where the tokenizer
    has one; an empty one without it after EOD. Ids are taken as they are.

    `generate` is of `make_generate`, best with `stop_ids=(tokenizer.eod_id,)` and
    `vocab_size=tokenizer.vocab_size`.
    """
    if not prompts:
        return []
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    generated = generate(params, *as_rows(ids), key)
    texts = []
    for row, tokens_N, length in zip(ids, *generated, strict=True):
        # Together: a tokenizer may write no space before the first token of a text.
        whole = tokenizer.decode(np.concatenate([row, tokens_N[:length]]))
        texts.append(whole[len(tokenizer.decode(row)) :])
    return texts


def continue_prompts(
    params: Tree,
    prompts: Sequence[str | np.ndarray],
    tokenizer: Tokenizer,
    settings: SampleConfig,
    *,
    model: ModelConfig,
    policy: Policy,
    layout: Layout,
    seed: int,
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """What follows each prompt, as for `generate_text`, up to the document's end or one
    of `stop_ids`.

    Learned positions bound the tokens: what does not fit is not generated.
    """
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    longest, num_tokens = max(map(len, ids), default=1), settings.tokens
    if model.positions == "learned":
        num_tokens = min(num_tokens, model.max_length - longest)
        if num_tokens < 1:
            raise ConfigError(
                f"sample.prompt has {longest} tokens and model.max_length="
                f"{model.max_length} leaves none to generate; shorten the prompt"
            )
    generate = make_generate(
        model,
        policy=policy,
        layout=layout,
        max_new_tokens=num_tokens,
        capacity=longest + num_tokens,
        stop_ids=(tokenizer.eod_id, *stop_ids),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        vocab_size=tokenizer.vocab_size,
    )
    key = jax.random.key(seed)
    return generate_text(params, ids, tokenizer, generate=generate, key=key)


def _ids(tokenizer: Tokenizer, prompt: str | np.ndarray) -> np.ndarray:
    if isinstance(prompt, str):
        return rows.prompt_ids(tokenizer, prompt)
    return prompt


def logits(
    h_BD: jax.Array,
    head_VD: jax.Array,
    *,
    cfg: ModelConfig,
    policy: Policy,
    rules: Rules,
) -> jax.Array:
    """float32 logits [B, V], whole over the vocabulary, which is not padded."""
    logits_BV = jnp.einsum(
        "BD,VD->BV",
        h_BD,
        seam.gather(head_VD, policy),
        precision=policy.matmul_precision,
        preferred_element_type=jnp.float32,
        out_sharding=sharding.spec(rules, "batch", "vocab"),
    )
    logits_BV = jax.reshard(logits_BV, sharding.spec(rules, "batch", None))
    if cfg.logit_softcap:
        logits_BV = cfg.logit_softcap * jnp.tanh(logits_BV / cfg.logit_softcap)
    return logits_BV[:, : cfg.vocab_size]


def _generate(
    params: Tree,
    prompts_BP: np.ndarray,
    lengths_B: np.ndarray,
    key: jax.Array,
    rows_B: np.ndarray | None = None,
    *,
    prefill: Callable,
    decode: Callable,
    layout: Layout,
    max_prompt: int,
    vocab_size: int,
) -> Generated:
    """See `Generate`: fills up batch and prompts, runs both programs, cuts again."""
    prompts_BP, lengths_B = np.asarray(prompts_BP), np.asarray(lengths_B)
    _check_prompts(prompts_BP, lengths_B, max_prompt, vocab_size)
    B = len(prompts_BP)
    dummies = -B % sharding.axis_product(layout.mesh, layout.params.batch)
    longest = int(lengths_B.max())
    P = min(max(_MIN_PREFILL, 1 << (longest - 1).bit_length()), max_prompt)

    def place(x: np.ndarray, *pad: tuple[int, int]) -> jax.Array:
        x = np.pad(x.astype(np.int32), ((0, dummies), *pad))
        names = ("batch", None)[: x.ndim]
        return jax.device_put(
            x, sharding.sharding(layout, layout.params, x.shape, names)
        )

    ids_B = np.arange(B) if rows_B is None else np.asarray(rows_B)
    rows = _Rows(key, place(ids_B), place(lengths_B))
    padded_BP = place(prompts_BP[:, :longest], (0, P - longest))
    caches, first_B = prefill(params, padded_BP, rows)
    _, tokens_BN = decode(params, caches, first_B, rows)
    tokens_BN = np.asarray(tokens_BN)[:B]
    return Generated(tokens_BN, (tokens_BN != PADDING).sum(axis=1, dtype=np.int32))


def _check_prompts(prompts_BP, lengths_B, max_prompt: int, vocab_size: int) -> None:
    B, P = prompts_BP.shape
    if B == 0 or lengths_B.shape != (B,) or lengths_B.min() < 1:
        raise ValueError(
            f"prompts of shape {prompts_BP.shape} need a row, and each row a length of "
            f"at least 1; got lengths {lengths_B}; start an empty prompt with EOD"
        )
    if lengths_B.max() > min(P, max_prompt):
        raise ValueError(
            f"a prompt of {lengths_B.max()} tokens exceeds its array ({P}) or "
            f"capacity - max_new_tokens = {max_prompt}; shorten it, or raise capacity"
        )
    ids = prompts_BP[np.arange(P) < lengths_B[:, None]]
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise DataError(
            f"prompts have ids from {ids.min()} to {ids.max()} and the model has 0 to "
            f"{vocab_size - 1}; encode them with the tokenizer that it was trained with"
        )


def _prefill(params, prompts_BP, rows: _Rows, *, forward, choose, make_caches):
    """(caches that hold the prompts, first new token of each row)."""
    B, P = prompts_BP.shape
    places_BP = jnp.zeros_like(prompts_BP) + jnp.arange(P)
    segments_BP = (places_BP < rows.lengths_B[:, None]).astype(jnp.int32)
    context = Context(places_BP, segments_BP)
    h_BPD, head_VD, caches = forward(params, prompts_BP, context, make_caches(batch=B))
    is_last_BP = places_BP == rows.lengths_B[:, None] - 1
    h_BD = jnp.sum(jnp.where(is_last_BP[:, :, None], h_BPD, 0), axis=1)
    return caches, choose(h_BD, head_VD, rows, rows.lengths_B)


def _decode(
    params, caches, first_B, rows: _Rows, *, forward, choose, max_new_tokens, stop_ids
):
    """(caches, all new tokens of each row, on every device), given the first.

    The caches come back only so that donating them lets the loop write them in place.
    """

    def is_stop(token_B):
        return (token_B[:, None] == jnp.array(stop_ids, jnp.int32)).any(axis=-1)

    def is_going_on(state):
        n, _, _, is_done_B, _ = state
        return (n < max_new_tokens) & ~is_done_B.all()

    def step(state):
        """Token n of each row, from token n - 1, which is not in the caches yet."""
        n, caches, token_B, is_done_B, tokens_BN = state
        positions_B = rows.lengths_B + n
        context = Context(positions_B[:, None] - 1)
        h_BTD, head_VD, caches = forward(params, token_B[:, None], context, caches)
        token_B = choose(h_BTD[:, 0], head_VD, rows, positions_B)
        shown_B = jnp.where(is_done_B, PADDING, token_B)
        tokens_BN = jax.lax.dynamic_update_index_in_dim(tokens_BN, shown_B, n, axis=1)
        return n + 1, caches, token_B, is_done_B | is_stop(token_B), tokens_BN

    tokens_BN = jnp.pad(
        first_B[:, None], ((0, 0), (0, max_new_tokens - 1)), constant_values=PADDING
    )
    is_done_B = is_stop(first_B) | (rows.lengths_B == 0)
    state = (jnp.int32(1), caches, first_B, is_done_B, tokens_BN)
    _, caches, _, _, tokens_BN = jax.lax.while_loop(is_going_on, step, state)
    return caches, jax.reshard(tokens_BN, jax.P())


def _choose(h_BD, head_VD, rows: _Rows, positions_B, *, logits, draw, vocab_size):
    """The token of each row at `positions_B`, among ids below `vocab_size`."""
    keys_B = sample.row_keys(rows.key, rows.ids_B, positions_B)
    return draw(logits(h_BD, head_VD)[:, :vocab_size], keys_B)
