"""Text that a model writes until it writes a given string.

Stop strings are looked for in the text, not in the ids: a string may come out in other
tokens than those it is encoded to. So tokens are drawn in pieces, each twice as long as
the one before, and rows whose text is complete take no part in the next.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from jaxinfra import sharding
from jaxinfra.config import ConfigError, ModelConfig
from jaxinfra.generate import decode
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout

_PIECE, _MAX_PIECE = 16, 128  # tokens
_MAX_ROWS = 64  # a device and batch
_CACHE_BYTES = 1 << 30  # of keys and values a device
_MIN_CAPACITY = 64  # tokens a row


class Complete(Protocol):
    def __call__(
        self,
        params: Tree,
        prompts: Sequence[np.ndarray],
        until: Sequence[Sequence[str]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """What follows each prompt, ids [T >= 1]: up to the first of its stop strings,
        a stop id, or `max_new_tokens`; neither string nor id is part of it.

        A prompt too long for that loses its beginning. Temperature 0 is greedy, else
        row i draws by (seed, i, position).
        """
        ...


def make_complete(
    cfg: ModelConfig,
    *,
    policy: Policy,
    layout: Layout,
    to_text: Callable[[np.ndarray], str],
    stop_ids: Sequence[int],
    vocab_size: int = 0,
    max_length: int = 0,
) -> Complete:
    """Completion by `decode.make_generate`, to be called where the mesh of `layout` is
    set.

    to_text: of ids, special ones left out. vocab_size: ids below it may be chosen.
    max_length: tokens of prompt and text together; 0 is no limit but that of learned
    positions. Limits: as make_generate's; each piece reads the prompt again.
    """
    limits = [max_length] if max_length else []
    if cfg.positions == "learned":
        limits.append(cfg.max_length)
    make = functools.cache(
        functools.partial(
            decode.make_generate,
            cfg,
            policy=policy,
            layout=layout,
            stop_ids=tuple(stop_ids),
            vocab_size=min(vocab_size or cfg.vocab_size, cfg.vocab_size),
        )
    )
    return functools.partial(
        _complete,
        make=make,
        to_text=to_text,
        stop_ids=frozenset(stop_ids),
        limit=min(limits, default=0),
        rows_of=functools.partial(_batch_rows, cfg=cfg, policy=policy, layout=layout),
    )


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop strings, of which empty ones are none."""
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text


def _complete(
    params: Tree,
    prompts: Sequence[np.ndarray],
    until: Sequence[Sequence[str]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    make: Callable[..., decode.Generate],
    to_text: Callable[[np.ndarray], str],
    stop_ids: frozenset[int],
    limit: int,
    rows_of: Callable[[int], int],
) -> list[str]:
    """See `Complete`."""
    if limit and max_new_tokens >= limit:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in rows of "
            f"{limit} tokens; ask for fewer, or for longer rows by --length"
        )
    room = limit - max_new_tokens if limit else None
    given = [np.asarray(p)[-room if room else None :] for p in prompts]
    rows = list(given)  # prompts and what follows them so far
    key = jax.random.key(seed)
    waiting, done, piece = list(range(len(rows))), 0, _PIECE
    while waiting and done < max_new_tokens:
        waiting.sort(key=lambda i: -len(rows[i]))
        longest = len(rows[waiting[0]])
        piece = min(piece, limit - longest) if limit else piece
        capacity = max(_MIN_CAPACITY, 1 << (longest + piece - 1).bit_length())
        generate = make(
            max_new_tokens=piece,
            capacity=min(capacity, limit) if limit else capacity,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        batch = rows_of(capacity)
        for first in range(0, len(waiting), batch):
            numbers = waiting[first : first + batch]
            for i, new in zip(
                numbers, _generated(generate, params, rows, numbers, key), strict=True
            ):
                rows[i] = np.concatenate([rows[i], new])
        done += piece
        piece = min(2 * piece, _MAX_PIECE)
        waiting = [
            i
            for i in waiting
            if rows[i][-1] not in stop_ids
            and not any(s and s in to_text(rows[i][len(given[i]) :]) for s in until[i])
        ]
    texts = []
    for row, prompt, stops in zip(rows, given, until, strict=True):
        new = row[len(prompt) :][:max_new_tokens]
        if len(new) and new[-1] in stop_ids:
            new = new[:-1]
        texts.append(cut(to_text(new), stops))
    return texts


def _generated(
    generate: decode.Generate,
    params: Tree,
    rows: Sequence[np.ndarray],
    numbers: Sequence[int],
    key: jax.Array,
) -> list[np.ndarray]:
    """The next tokens of the rows of these numbers."""
    # Filled up to a power of two, so that few programs are compiled, by a row again: it
    # ends when that does.
    count = 1 << (len(numbers) - 1).bit_length()
    filled = [*numbers, *[numbers[-1]] * (count - len(numbers))]
    prompts = decode.as_rows([rows[i] for i in filled])
    tokens_BN, counts_B = generate(params, *prompts, key, np.array(filled))
    return [tokens_BN[b, : counts_B[b]] for b in range(len(numbers))]


def _batch_rows(
    capacity: int, *, cfg: ModelConfig, policy: Policy, layout: Layout
) -> int:
    """Rows of a batch, a power of two a device, whose caches fit."""
    per_token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_width
    per_row = capacity * per_token * policy.compute.itemsize
    each = max(1, min(_MAX_ROWS, _CACHE_BYTES // per_row))
    parts = sharding.axis_product(layout.mesh, layout.params.batch)
    return parts * (1 << (each.bit_length() - 1))
