"""Measures a model: logits, perplexity, tasks, lm-evaluation-harness.

    python scripts/evaluate.py --from SOURCE --ids IDS.npy --logits OUT.npy
    python scripts/evaluate.py --from SOURCE --text FILE ... [--length N] [--stride N]
    python scripts/evaluate.py --from SOURCE --data DATASET [--split train]
    python scripts/evaluate.py --from SOURCE --tasks FILE.jsonl ...
    python scripts/evaluate.py --from SOURCE --harness TASK ... [--include_path DIR]

SOURCE is a run folder (RUN, or RUN@STEP), a published folder of safetensors, or a .gguf
file. IDS.npy holds integers [B, T], OUT.npy gets float32 [B, T, V]; a row is a document
from its start. The form of task files is in `jaxinfra/generate/benchmarks.py`. Several
of these may be asked for at once.

`--key value` says how the model runs: --mesh.fsdp 2, --mesh.tensor 2, --zero 3,
--precision bfloat16 (default float32, whatever it was trained in),
--runtime.cpu_devices 4. Exit codes: 0 done, 2 wrong input, 12 no usable checkpoint.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfra import options, runfolder
from jaxinfra.config import Config, ConfigError, DataError, ModelConfig
from jaxinfra.data import shards, sources
from jaxinfra.generate import benchmarks, settings
from jaxinfra.generate.rows import Row, Scored
from jaxinfra.resilience import exitcodes

Found = dict[str, benchmarks.Figures]  # by what they are of
_LENGTH = 1024  # tokens a window of text at most, unless --length says another


class Asked(NamedTuple):
    """The command line, and what it names, opened and checked without jax."""

    args: argparse.Namespace
    config: Config
    ids_BT: np.ndarray | None
    files: list[pathlib.Path]
    data: shards.Dataset | None
    tasks: dict[str, list[Any]]


class Model(NamedTuple):
    """A source whose parameters are on the mesh that is set.

    score, complete, logits: of `jaxinfra.generate`, for these parameters. text: an
    `interop.source_text.SourceText`; it and complete are None where none is needed.
    """

    config: ModelConfig
    text: Any
    score: "Counted"
    logits: Any
    complete: Any


class Counted:
    """A `rows.Score` that counts the tokens that it reads."""

    def __init__(self, score: Callable[[Sequence[Row]], list[Scored]]):
        self._score, self.tokens = score, 0

    def __call__(self, rows: Sequence[Row]) -> list[Scored]:
        self.tokens += sum(len(row.ids_T) for row in rows)
        return self._score(rows)


def main(argv: list[str] | None = None) -> int:
    """Measures what `argv` asks for; returns the exit code."""
    try:
        asked = read(sys.argv[1:] if argv is None else argv)
        from jaxinfra import launcher

        launcher.prepare_process(asked.config)
        from jaxinfra.checkpoint.commits import CheckpointError

        try:
            return evaluate(asked)
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return exitcodes.NO_USABLE_CHECKPOINT
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.INPUT


def read(argv: list[str]) -> Asked:
    """Everything that can be wrong before jax is loaded is found here."""
    own, words = settings.split(argv)
    args = _parser().parse_args(own)
    config = settings.read(words, Config(name="evaluate"))
    settings.check_source("--from", args.source)
    if (args.ids is None) != (args.logits is None):
        raise ConfigError("--ids and --logits go together; give both or neither")
    if not (args.ids or args.text or args.data or args.tasks or args.harness):
        raise ConfigError(
            "nothing is asked for; give --ids and --logits, --text, --data, --tasks or "
            "--harness"
        )
    for option, value in (("length", args.length), ("new_tokens", args.new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} must be 1 or more")
    if args.include_path and not args.include_path.is_dir():
        raise ConfigError(f"--include_path {args.include_path} is no folder of tasks")
    if args.harness and not importlib.util.find_spec("lm_eval"):
        raise ConfigError(
            "--harness needs the extra eval: pip install 'jaxinfra[eval]'"
        )
    for option, path in (("logits", args.logits), ("out", args.out)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(
                f"--{option} {path} is a folder, or in none; give a file to write"
            )
    data = shards.open_dataset(args.data) if args.data else None
    if data:
        data.split(args.split)
    return Asked(
        args=args,
        config=config,
        ids_BT=_read_ids(args.ids) if args.ids else None,
        files=sources.find_files(args.text) if args.text else [],
        data=data,
        tasks={file: benchmarks.read(file) for file in args.tasks},
    )


def evaluate(asked: Asked) -> int:
    """Loads the model, measures, prints a table and writes the results."""
    results = []
    with _model(asked) as model:
        for what, measure in _measures(asked, model):
            start, before = time.perf_counter(), model.score.tokens
            found = measure()
            cost = {"seconds": time.perf_counter() - start}
            if tokens := model.score.tokens - before:
                cost["tokens_per_sec"] = tokens / cost["seconds"]
            for of, figures in found.items():
                results.append({"what": what, "of": of, **figures, **cost})
                print("\n".join(_lines(results[-1])), flush=True)
        if asked.args.out:
            _write_results(asked, results)
    return exitcodes.DONE


@contextlib.contextmanager
def _model(asked: Asked) -> Iterator[Model]:
    """The source's model, within whose mesh the block runs."""
    import jax

    from jaxinfra import experiment, launcher, precision
    from jaxinfra.generate import score, until
    from jaxinfra.interop import pretrained, source_text

    args = asked.args
    source = pretrained.open_source(args.source)
    _check_fits(asked, source.model)
    launcher.start_jax(asked.config)
    config = settings.for_model(
        asked.config, source.model, num_devices=jax.device_count()
    )
    layout = experiment.lay_out(config, jax.devices())
    how: dict[str, Any] = {"policy": precision.policy(config.precision)}
    how["layout"] = layout
    has_text = asked.files or asked.data or asked.tasks or args.harness
    text = None
    if has_text:
        text = source_text.open_text(args.source, source.model, has_chat=args.chat)
    with jax.set_mesh(layout.mesh):
        weights = source.load_kept(layout=layout, dtype=how["policy"].param)
        complete = None
        if text is not None:
            complete = until.make_complete(
                source.model,
                **how,
                to_text=text.decode,
                stop_ids=text.stop_ids,
                vocab_size=text.tokenizer.vocab_size,
                max_length=args.length or text.max_length,
            )
        yield Model(
            config=source.model,
            text=text,
            score=Counted(
                functools.partial(score.make_score(source.model, **how), weights)
            ),
            logits=functools.partial(score.make_logits(source.model, **how), weights),
            complete=functools.partial(complete, weights) if complete else None,
        )


def _measures(asked: Asked, model: Model) -> Iterator[tuple[str, Callable[[], Found]]]:
    """(what is measured, the measuring of it)."""
    args = asked.args
    if asked.ids_BT is not None:
        yield "logits", functools.partial(_logits, args.logits, asked.ids_BT, model)
    for file in asked.files:
        yield "perplexity", functools.partial(_text, file, args, model)
    if asked.data is not None:
        yield "perplexity", functools.partial(_data, asked.data, args, model)
    for file, items in asked.tasks.items():
        yield "task", functools.partial(_task, file, items, args, model)
    if args.harness:
        yield "harness", functools.partial(_harness, asked, model)


def _logits(out: pathlib.Path, ids_BT: np.ndarray, model: Model) -> Found:
    """Writes the logits beside `out`, and gives them its name when they are whole."""
    shape = (*ids_BT.shape, model.config.vocab_size)
    aside = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        array = np.lib.format.open_memmap(aside, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a signal
            with aside.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
        model.logits(ids_BT, array)
        array.flush()
        os.replace(aside, out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); free the disk or "
            "choose another path"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return {str(out): dict(zip(("rows", "length", "vocabulary"), shape, strict=True))}


def _text(file: pathlib.Path, args: argparse.Namespace, model: Model) -> Found:
    documents = list(sources.read_documents([file]))
    tokenizer = model.text.tokenizer
    texts = [
        benchmarks.Document(ids.astype(np.int64))
        for ids in tokenizer.encode_batch(documents)
    ]
    num_bytes = sum(len(document.encode()) for document in documents)
    return {str(file): _perplexity(texts, num_bytes, args, model)}


def _data(data: shards.Dataset, args: argparse.Namespace, model: Model) -> Found:
    tokenizer, split = model.text.tokenizer, data.split(args.split)
    if tokenizer.digest() != data.tokenizer.digest():
        raise ConfigError(
            f"--data {data.folder} has another tokenizer than --from {args.source}; "
            "prepare it with the model's, or give its text by --text"
        )
    documents = benchmarks.documents(split, tokenizer)
    figures = _perplexity(documents, split.text_bytes, args, model)
    return {f"{data.folder} {split.name}": figures}


def _perplexity(
    documents: list[benchmarks.Document],
    num_bytes: int,
    args: argparse.Namespace,
    model: Model,
) -> benchmarks.Figures:
    return benchmarks.perplexity(
        documents,
        model.text.tokenizer,
        model.score,
        num_bytes=num_bytes,
        length=args.length or min(model.text.max_length or _LENGTH, _LENGTH),
        stride=args.stride,
    )


def _task(file: str, items: list[Any], args: argparse.Namespace, model: Model) -> Found:
    if isinstance(items[0], benchmarks.Choice):
        length = args.length or model.text.max_length
        figures = benchmarks.multiple_choice(
            items, model.text.tokenizer, model.score, length=length
        )
    else:
        figures = benchmarks.exact_match(
            items,
            model.text.tokenizer,
            functools.partial(model.complete, max_new_tokens=args.new_tokens),
        )
    return {file: figures}


def _harness(asked: Asked, model: Model) -> Found:
    from jaxinfra.interop import lm_eval_adapter

    args = asked.args
    lm = lm_eval_adapter.make_lm(
        model.text,
        model.score,
        model.complete,
        name=args.source,
        max_length=args.length or 0,
        seed=asked.config.run.seed,
    )
    return lm_eval_adapter.run(
        lm, args.harness, folder=args.include_path, limit=args.limit, has_chat=args.chat
    )


def _read_ids(file: pathlib.Path) -> np.ndarray:
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"--ids {file} cannot be read ({error}); give a .npy file"
        ) from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 2:
        shape = getattr(ids, "shape", "several arrays")
        raise DataError(
            f"--ids {file} holds {getattr(ids, 'dtype', 'archive')} {shape}; give "
            "integers [rows, length]"
        )
    if not ids.size:
        raise DataError(
            f"--ids {file} holds no id, {ids.shape}; give a row and a token"
        )
    return ids


def _check_fits(asked: Asked, model: ModelConfig) -> None:
    """What only the model's settings tell to be wrong."""
    ids_BT, limit = asked.ids_BT, model.max_length
    lengths = {"--length": asked.args.length or 0}
    if ids_BT is not None:
        if not 0 <= ids_BT.min() <= ids_BT.max() < model.vocab_size:
            raise DataError(
                f"--ids has ids from {ids_BT.min()} to {ids_BT.max()}, and the model "
                f"has 0 to {model.vocab_size - 1}"
            )
        lengths["--ids"] = ids_BT.shape[1]
    for option, length in lengths.items():
        if model.positions == "learned" and length > limit:
            raise ConfigError(
                f"{option}: rows of {length} tokens exceed the {limit} positions that "
                f"the model has learned; give {limit} or fewer"
            )


def _lines(result: dict[str, Any]) -> list[str]:
    """A result as a small table."""
    shown = {k: v for k, v in result.items() if k not in ("what", "of")}
    shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in shown.items()}
    title = f"{result['what']}  {result['of']}"
    return [title, *(f"  {name:<24} {value}" for name, value in shown.items())]


def _write_results(asked: Asked, results: list[dict[str, Any]]) -> None:
    import jax

    leaves = options.leaves(asked.config)
    args = asked.args
    shown = {"length": args.length, "stride": args.stride, "split": args.split}
    kept = ("mesh", "zero", "precision", "runtime.cpu_devices")
    shown |= {k: v for k, v in leaves.items() if k.startswith(kept)}
    about = {"source": args.source, "settings": shown, "results": results}
    about["environment"] = runfolder.environment([str(d) for d in jax.devices()])
    runfolder.write_json(args.out, about)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, path = parser.add_argument, pathlib.Path
    add("--from", dest="source", required=True, metavar="SOURCE")
    add("--ids", type=path, metavar="IDS.npy", help="integers [rows, length]")
    add("--logits", type=path, metavar="OUT.npy", help="where logits are written")
    add("--text", nargs="+", default=[], metavar="FILE", help=sources.ACCEPTED)
    add("--data", type=path, metavar="DATASET", help="a folder that prepare wrote")
    add("--split", default="held_out", help="of --data (default: held_out)")
    add("--length", type=int, help="tokens that the model reads at once")
    add("--stride", type=int, default=0, help="tokens that a later window scores")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="own tasks, .jsonl")
    add("--new_tokens", type=int, default=64, help="of an answer (default: 64)")
    add("--harness", nargs="+", default=[], metavar="TASK", help="by name")
    add("--include_path", type=path, metavar="DIR", help="where --harness finds tasks")
    add("--limit", type=int, help="items of each --harness task at most")
    add("--chat", action="store_true", help="--harness asks by the chat template")
    add("--out", type=path, metavar="FILE.json", help="where results are written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
