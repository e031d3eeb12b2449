"""Conversations and pairs -> documents in which the answers alone are targets.

A line of a .jsonl file is a conversation, `{"messages": [{"role": ..., "content":
...}, ...]}` with an optional `"tools"`, or a pair, `{"prompt": "...", "completion":
"..."}`; other keys are left alone.

A conversation becomes text by a chat template: Jinja, as Hugging Face tools write it,
run in a sandbox. The template writes every token, a BOS too. Answers are what it puts
between `{% generation %}` and `{% endgeneration %}`; in a template without these, what
message i, an assistant's, adds to the messages before it with `add_generation_prompt`,
up to its end-of-turn token. A pair is a prompt and a completion one after the other,
as a document of plain text.

A token counts as a target if any of its characters lies in an answer. The EOD that ends
a document is left out where the template wrote it; where it ends an answer that has no
end-of-turn token, it counts.

Special tokens are for the template to write: a message that says "<|im_end|>" says
those letters. For this its characters are parted by `GUARD`, whose tokens are dropped.
Keys of its JSON, which a template may write too, may not hold such a name.
"""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import prepare, shards, sources, splits, urls, writer
from jaxinfra.data.chat_template import END, GUARD, START, ChatTemplate
from jaxinfra.data.tokenizer import Tokenizer, id_dtype
from jaxinfra.data.tokenizer_json import HfTokenizer

_BATCH = 1_000  # conversations encoded at a time


class Conversation(NamedTuple):
    """A document before it is encoded; `text` may hold `GUARD`s."""

    text: str
    answers: tuple[tuple[int, int], ...]  # [start, stop) in characters of `text`
    is_pair: bool  # plain text, which the template did not write


def prepare_chat(
    inputs: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    held_out: float,
    seed: int,
    shard_tokens: int = writer.SHARD_TOKENS,
    layout: shards.Layout = shards.CONCAT,
) -> shards.Dataset:
    """Writes the data set `out`, with masks, from .jsonl files and opens it.

    As `prepare.prepare` with data.split=documents. Raises DataError, naming file and
    line, before anything is written.
    """
    prepare.check_options("documents", held_out, seed, shard_tokens, layout)
    writer.make_way(out)
    special = special_names(tokenizer)
    found: list[Conversation] = []
    for file in sources.find_files(inputs):
        if file.suffix != ".jsonl":
            raise DataError(
                f"{file} is not .jsonl; conversations are one object a line"
            )
        found += [
            read_conversation(where, value, template=template, special=special)
            for where, value in sources.read_objects(file)
        ]
    if not found:
        first = urls.redacted(str(inputs[0]))
        raise DataError(f"{first} holds no conversation; give files with lines")
    keys = [splits.key(conversation.text, seed=seed) for conversation in found]
    numbers = splits.split(
        np.array(keys, splits.KEY_DTYPE), held_out=held_out, seed=seed
    )
    contents = {
        name: encode(tokenizer, [found[i] for i in here])
        for name, here in numbers.items()
    }
    return writer.write_dataset(
        pathlib.Path(out),
        tokenizer=tokenizer,
        splits=writer.laid_out(contents, layout),
        shard_tokens=shard_tokens,
    )


def special_names(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens of a tokenizer, by their texts; longer ones first."""
    if not isinstance(tokenizer, HfTokenizer):
        return ()
    library = tokenizer.library_tokenizer(has_special_text=True)
    added = library.get_added_tokens_decoder().values()
    return tuple(sorted((t.content for t in added if t.special), key=len)[::-1])


def unknown_names(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a template's text holds that looks like <|a special token|>, and is no token
    of the tokenizer: it would be read as letters."""
    names = sorted({*re.findall(r"<\|[\w.-]+\|>", template.source)})
    if isinstance(tokenizer, HfTokenizer):
        library = tokenizer.library_tokenizer(has_special_text=True)
        names = [name for name in names if library.token_to_id(name) is None]
    return tuple(names)


def read_conversation(
    where: str,
    value: Any,
    *,
    template: ChatTemplate | None,
    special: tuple[str, ...],
) -> Conversation:
    """The document of a JSON line; raises DataError, starting with `where`.

    special: `special_names`, which a message does not get to write.
    """
    try:
        if not isinstance(value, dict):
            raise DataError(f"is {type(value).__name__}, not a JSON object")
        keys = ("messages", "tools", "prompt", "completion")
        value = {key: _guarded(value[key], special) for key in keys if key in value}
        if isinstance(value.get("messages"), list) and value["messages"]:
            messages, tools = value["messages"], value.get("tools")
            return _rendered(messages, tools, template=template, special=special)
        prompt, completion = value.get("prompt"), value.get("completion")
        if isinstance(prompt, list) or isinstance(completion, list):
            raise DataError(
                "has a prompt and completion of messages; write one list of all of "
                "them under messages, where every assistant's is an answer"
            )
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise DataError("has an empty completion; remove the line")
            text = prompt + completion
            return Conversation(text, ((len(prompt), len(text)),), is_pair=True)
        raise DataError(
            "needs a list of messages, or prompt and completion as texts, and has "
            f"{sorted(value) or 'neither'}"
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: is nested too deeply") from error


def chat_prompt(
    messages: Sequence[Any], template: ChatTemplate | None, tokenizer: Tokenizer
) -> np.ndarray:
    """int64 [N]: the ids of the messages as the template writes them, with the header
    of an answer at the end; what a model that was trained on `encode`'s continues.

    Raises DataError for messages that the template does not write.
    """
    messages = _checked(_guarded(list(messages), special_names(tokenizer)), template)
    text, _ = _without_marks(template.render(messages, is_prompt=True))
    [(ids, *_)] = _encoded(tokenizer, [text])
    if not ids.size:
        raise DataError("the chat template writes nothing for these messages")
    return ids.astype(np.int64)


def answer_ends(
    messages: Sequence[Any], template: ChatTemplate | None, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """The ids that end an answer to `messages`: EOD, and the special token that the
    template writes after one, if it does."""
    special = special_names(tokenizer)
    messages = _checked(_guarded(list(messages), special), template)
    answer = {"role": "assistant", "content": "Answer"}
    whole, _ = _without_marks(template.render([*messages, answer]))
    after = whole.rpartition(answer["content"])[2].lstrip()
    ends = [name for name in special if after.startswith(name)][:1]
    found = [ids[0] for ids, *_ in _encoded(tokenizer, ends)]
    return tuple(sorted({tokenizer.eod_id, *map(int, found)}))


def encode(
    tokenizer: Tokenizer, documents: Sequence[Conversation]
) -> writer.SplitContent:
    """Ids and masks of the documents, one of each for each."""
    dtype = id_dtype(tokenizer.vocab_size)
    eod, bos = tokenizer.eod_id, tokenizer.bos_id
    ids_of, masks = [], []
    encoded = _encoded(tokenizer, [document.text for document in documents])
    for document, (ids, spans_N2, is_special) in zip(documents, encoded, strict=True):
        mask = _mask(document, spans_N2)
        is_text = spans_N2[:, 0] < len(document.text.rstrip())
        if not (is_text.any() and ids[is_text][-1] == eod):
            # Where the answer ended with a token of its own, EOD is nothing to learn.
            counts = bool(mask.size and mask[-1] and not is_special[-1])
            ids, mask = np.append(ids, eod), np.append(mask, counts)
        if document.is_pair and bos is not None:
            ids, mask = np.insert(ids, 0, bos), np.insert(mask, 0, False)
        ids_of.append(ids.astype(dtype))
        masks.append(mask.astype(shards.MASK_DTYPE))
    text = "".join(document.text for document in documents).replace(GUARD, "")
    return writer.SplitContent(
        documents=ids_of, text_bytes=len(text.encode("utf-8")), masks=masks
    )


def _guarded(value: Any, special: tuple[str, ...]) -> Any:
    """JSON with a `GUARD` inside each name of a special token; keys hold none."""
    if isinstance(value, dict):
        for key in value:
            if _guarded(key, special) != key:
                raise DataError(f"the key {key!r} holds a special token; rename it")
        return {key: _guarded(item, special) for key, item in value.items()}
    if isinstance(value, list):
        return [_guarded(item, special) for item in value]
    if not isinstance(value, str):
        return value
    if bad := {GUARD, START, END}.intersection(value):
        raise DataError(f"holds the noncharacter U+{ord(min(bad)):04X}; remove it")
    value = sources.checked_text("a text", value)
    for name in special:
        if name in value:
            if len(name) == 1:
                raise DataError(f"holds the special token {name!r}; remove it")
            value = value.replace(name, f"{name[0]}{GUARD}{name[1:]}")
    return value


def _checked(messages: list[Any], template: ChatTemplate | None) -> list[Any]:
    """The messages, if they are some and there is a template for them."""
    if template is None:
        raise DataError(
            "messages need a chat template, and the tokenizer has none; give one with "
            "--chat_template FILE"
        )
    for number, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise DataError(f"message {number} has no role; give role and content")
        if message.get("content", "") is None and not message.get("tool_calls"):
            raise DataError(
                f"message {number} has null for content and calls no tool; give it a "
                "text, or remove it"
            )
    return messages


def _rendered(
    messages: list[Any],
    tools: Any,
    *,
    template: ChatTemplate | None,
    special: tuple[str, ...],
) -> Conversation:
    messages = _checked(messages, template)
    assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not assistants:
        raise DataError("has no message of role assistant, so nothing to learn from")
    whole = template.render(messages, tools=tools)
    if template.has_marks:
        whole, answers = _without_marks(whole)
    else:
        answers = []
        for i in assistants:
            start = template.render(messages[:i], tools=tools, is_prompt=True)
            stop = template.render(messages[: i + 1], tools=tools)
            if not (whole.startswith(stop) and stop.startswith(start)):
                raise DataError(
                    f"the chat template writes message {i} otherwise when it is the "
                    "last, or the messages before it otherwise as a prompt, so its "
                    "answer cannot be told; put {% generation %} and {% endgeneration "
                    "%} around answers in a copy, and give that with --chat_template"
                )
            if stop.rstrip().endswith(special):  # the line end after it is no answer
                stop = stop.rstrip()
            answers.append((len(start), max(len(start), len(stop))))
    if not any(start < stop for start, stop in answers):
        raise DataError("the chat template writes no answer for its assistant messages")
    return Conversation(whole, tuple(answers), is_pair=False)


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and what stood between them."""
    *parts, last = re.split(f"([{START}{END}])", marked)
    texts, marks = parts[::2], parts[1::2]
    if marks != [START, END] * (len(marks) // 2):
        raise DataError("the chat template has {% generation %} inside another one")
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return "".join([*texts, last]), list(zip(ends[::2], ends[1::2]))


def _encoded(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids [N], characters [start, stop) of each [N, 2], whether it is special [N]) of
    every text, special tokens read as such and `GUARD`s left out."""
    if not isinstance(tokenizer, HfTokenizer):
        for text in texts:  # ids of a text are those of its characters
            sizes = {c: tokenizer.encode(c).size for c in {*text}}
            starts = np.repeat(np.arange(len(text)), [sizes[c] for c in text])
            ids = tokenizer.encode(text)
            yield ids, np.stack([starts, starts + 1], 1), np.zeros(ids.size, bool)
        return
    import tokenizers

    library = tokenizer.library_tokenizer(has_special_text=True)
    # It would cut the spaces off a token's span.
    library.post_processor = tokenizers.processors.Sequence([])
    is_special = tokenizer.is_special
    for at in range(0, len(texts), _BATCH):
        batch = texts[at : at + _BATCH]
        found = library.encode_batch(batch, add_special_tokens=False)
        for text, encoding in zip(batch, found, strict=True):
            ids = np.array(encoding.ids, np.int64)
            spans_N2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            if GUARD in text:
                ids, spans_N2 = _unguarded(text, ids, spans_N2)
            yield ids, spans_N2, is_special[ids]


def _unguarded(
    text: str, ids: np.ndarray, spans_N2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    guards = np.cumsum([0, *(c == GUARD for c in text)])
    num_guards = guards[spans_N2[:, 1]] - guards[spans_N2[:, 0]]
    is_guard = num_guards == spans_N2[:, 1] - spans_N2[:, 0]
    if (num_guards[~is_guard] > 0).any():
        raise DataError(
            "a message holds the name of a special token, which this tokenizer cannot "
            f"write as letters; remove it from {text.replace(GUARD, '')[:80]!r}"
        )
    is_guard &= num_guards > 0
    return ids[~is_guard], spans_N2[~is_guard]


def _mask(document: Conversation, spans_N2: np.ndarray) -> np.ndarray:
    """bool [N]: tokens with a character in an answer."""
    is_answer = np.zeros(len(document.text) + 1, bool)
    for start, stop in document.answers:
        is_answer[start:stop] = True
    before = np.concatenate([[0], np.cumsum(is_answer)])
    return before[spans_N2[:, 1]] > before[spans_N2[:, 0]]
