"""Figures of a model: perplexity of documents, multiple choice, exact match.

A task is a file of JSON lines, all of one kind:

    {"question": "...", "choices": ["...", "..."], "answer": 1}
    {"prompt": "...", "answer": "...", "until": ["\\n"]}

Of the first kind the likeliest choice is taken; `context` is another word for
`question`, and one space stands between it and a choice, unless one of the two brings
its own. Of the second kind the model writes greedily up to one of `until` (default: a
line's end); `answer` may be a list of right ones, and space around an answer does not
count. Imports no jax.
"""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.shards import Split
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.generate import rows
from jaxinfra.generate.rows import Score

Figures = dict[str, float]

_FORMS = (
    'must be {"question": text, "choices": [text, text, ...], "answer": number of the '
    'right one, from 0} or {"prompt": text, "answer": text or list, "until": list}'
)


class Choice(NamedTuple):
    """A question with its choices, of which `answer` is the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


class Answer(NamedTuple):
    """A prompt with the answers that are right, and where writing ends."""

    prompt: str
    answers: tuple[str, ...]
    until: tuple[str, ...]


def read(file: str | pathlib.Path) -> list[Choice] | list[Answer]:
    """The items of a task file, all of one kind.

    Raises DataError, naming file and line.
    """
    file = pathlib.Path(file)
    items: list[Any] = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); give a .jsonl file") from (
            error
        )
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(f"{file}:{number}", line))
            if type(items[-1]) is not type(items[0]):
                raise DataError(
                    f"{file}:{number} is of another kind than the first line; a file "
                    "has either choices or prompts"
                )
    if not items:
        raise DataError(f"{file} has no line; give a .jsonl file of a task")
    return items


class Document(NamedTuple):
    """ids_N without BOS; counts_N: 1 where a token is to be scored, None: all are."""

    ids_N: np.ndarray
    counts_N: np.ndarray | None = None


def documents(split: Split, tokenizer: Tokenizer) -> list[Document]:
    """The documents of a data set: without their EOD too, unless the data say which
    tokens count."""
    found = []
    for shard in split.shards:
        for start, end in shard.spans():
            start += shard.tokens[start] == tokenizer.bos_id
            if shard.mask is None:
                end -= end > start and shard.tokens[end - 1] == tokenizer.eod_id
            counts_N = None if shard.mask is None else shard.mask[start:end]
            found.append(Document(shard.tokens[start:end].astype(np.int64), counts_N))
    return found


def perplexity(
    texts: Sequence[Document],
    tokenizer: Tokenizer,
    score: Score,
    *,
    num_bytes: int,
    length: int,
    stride: int = 0,
) -> Figures:
    """Nats per token, and bits per byte where all of them count, of documents: every
    token that counts is scored once.

    num_bytes: of all the text in UTF-8. The first token of a document is scored after
    BOS, or EOD where there is none; windows are those of `rows.windows`.
    """
    start = rows.start_id(tokenizer)
    all_rows = [
        row
        for ids_N, counts_N in texts
        for row in rows.windows(
            ids_N, start, length=length, stride=stride, counts_N=counts_N
        )
        if len(row.targets_Q)
    ]
    if not all_rows:
        raise DataError("there is no token to score; give some text")
    nats = -math.fsum(x for row in score(all_rows) for x in row.logprobs_Q.tolist())
    num_targets = sum(len(row.targets_Q) for row in all_rows)
    figures: Figures = {
        "documents": len(texts),
        "tokens": sum(len(ids_N) for ids_N, _ in texts),
        "nats_per_token": nats / num_targets,
        "perplexity": math.exp(min(nats / num_targets, 700.0)),
    }
    if any(counts_N is not None for _, counts_N in texts):
        return figures | {"targets": num_targets}
    bits = nats / math.log(2)
    return figures | {"bytes": num_bytes, "bits_per_byte": bits / num_bytes}


def multiple_choice(
    items: Sequence[Choice], tokenizer: Tokenizer, score: Score, *, length: int
) -> Figures:
    """How often the likeliest choice is right: by its log-likelihood, and by that over
    its bytes (the harness's acc and acc_bytes)."""
    asked = [_pair(item.question, choice) for item in items for choice in item.choices]
    encoded = [rows.encode_pair(tokenizer, *pair) for pair in asked]
    scored = score(
        [rows.continuation(*pair, length=length) for pair in encoded],
    )
    sums = iter([math.fsum(found.logprobs_Q.tolist()) for found in scored])
    is_right, is_right_by_bytes = [], []
    for item in items:
        logprobs_C = np.array([next(sums) for _ in item.choices])
        bytes_C = np.array([len(choice.encode()) for choice in item.choices])
        is_right.append(np.argmax(logprobs_C) == item.answer)
        is_right_by_bytes.append(np.argmax(logprobs_C / bytes_C) == item.answer)
    return (
        {"n": len(items)}
        | _share("accuracy", is_right)
        | _share("accuracy_by_bytes", is_right_by_bytes)
    )


def exact_match(
    items: Sequence[Answer],
    tokenizer: Tokenizer,
    complete: Callable[[list[np.ndarray], list[tuple[str, ...]]], list[str]],
) -> Figures:
    """How often the text that `complete` writes after a prompt, up to its stop strings,
    is one of the answers."""
    prompts = [rows.prompt_ids(tokenizer, item.prompt) for item in items]
    texts = complete(prompts, [item.until for item in items])
    is_right = [
        text.strip() in {answer.strip() for answer in item.answers}
        for text, item in zip(texts, items, strict=True)
    ]
    return {"n": len(items)} | _share("exact_match", is_right)


def _pair(question: str, choice: str) -> tuple[str, str]:
    has_space = not question or question[-1].isspace() or choice[:1].isspace()
    return question, choice if has_space else f" {choice}"


def _share(name: str, is_right: Sequence[Any]) -> Figures:
    """The share that is right, and its standard error, that of a sample of more than
    one, as the harness's."""
    n, mean = len(is_right), float(np.mean(is_right))
    if n == 1:
        return {name: mean}
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / (n - 1))}


def _item(where: str, line: str) -> Choice | Answer:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); one object a line") from error
    match fields:
        case {"choices": [_, _, *_] as choices, "answer": int(answer)} if (
            not isinstance(answer, bool)
            and all(isinstance(c, str) and c for c in choices)
            and 0 <= answer < len(choices)
            and isinstance(question := _question(fields), str)
        ):
            return Choice(question, tuple(choices), answer)
        case {"prompt": str(prompt), "answer": str() | [_, *_] as answer}:
            answers = _texts(answer)
            until = _texts(fields.get("until", "\n"))
            if answers and until:
                return Answer(prompt, answers, until)
    raise DataError(f"{where} {_FORMS}")


def _question(fields: dict[str, Any]) -> Any:
    return fields.get("question", fields.get("context"))


def _texts(value: Any) -> tuple[str, ...]:
    """The texts of a text or a list of them; none for anything else."""
    texts = [value] if isinstance(value, str) else value
    is_good = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
    return tuple(texts) if is_good else ()
