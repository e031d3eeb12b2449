"""A model with its matrices in few bits.

    python scripts/compress.py --from SOURCE --to FOLDER --format int4 --method gptq
    python scripts/compress.py --from SOURCE --to FOLDER --format int8 --group 0

SOURCE is a run, a published folder or a .gguf file; FOLDER becomes a run folder that
generate, evaluate, convert and --init.from take. --format: int8, int4 (symmetric) or
nf4. --group: inputs that share a scale for each output, 0: a scale a channel. --method:
nearest, or gptq or awq, which are calibrated on text. --targets: patterns of the
matrices, as lora.targets; embedding, head and norms stay as they are.

Text, whose last tenth measures the perplexity before and after: --text FILE ..., or
--data DATASET, prepared with SOURCE's tokenizer, which brings its own held-out part;
default: the text that ships with the project. `--key value` says how the model runs:
--mesh.fsdp 2, --precision bfloat16_params, --runtime.cpu_devices 4. Exit codes: 0
done, 2 wrong input, 12 no usable checkpoint.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from jaxinfra.config import Config, ConfigError, DataError, ModelConfig
from jaxinfra.data import prepare, shards, sources
from jaxinfra.generate import benchmarks, settings
from jaxinfra.resilience import exitcodes

_BATCH = 8  # rows that the model reads at once


class Texts(NamedTuple):
    """Token ids to calibrate on, and documents to measure perplexity on."""

    ids_N: np.ndarray
    held_out: list[benchmarks.Document]


def main(argv: list[str] | None = None) -> int:
    """Compresses; returns the exit code."""
    own, words = settings.split(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(own)
    try:
        config = settings.read(words, Config(name="compress"))
        settings.check_source("--from", args.source)
        if args.to.exists():
            raise ConfigError(f"--to {args.to} is there already; choose another folder")
        least = {"group": 0, "rows": 1, "length": 2, "score_tokens": 1}
        for option, low in least.items():
            if (value := getattr(args, option)) < low:
                raise ConfigError(f"--{option} {value} must be {low} or more")
        if args.format == "nf4" and not args.group:
            raise ConfigError("--format nf4 has groups by definition; set --group 64")
        if args.text and args.data:
            raise ConfigError("--text and --data are both given; leave one of them out")
        if config.precision not in ("float32", "bfloat16_params"):
            raise ConfigError(
                f"precision={config.precision}: what stays as it is is kept in float32"
                " or, by bfloat16_params, in bfloat16; choose one of the two"
            )
        from jaxinfra import launcher

        launcher.prepare_process(config)
        from jaxinfra.checkpoint.commits import CheckpointError

        try:
            return compress(config, args)
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return exitcodes.NO_USABLE_CHECKPOINT
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.INPUT


def compress(config: Config, args: argparse.Namespace) -> int:
    """The compression itself: from here on jax is loaded."""
    import jax

    from jaxinfra import experiment, launcher, precision, sharding
    from jaxinfra.generate import score
    from jaxinfra.interop import export, pretrained, tokenizers_of
    from jaxinfra.quant import calibration, compression
    from jaxinfra.tune import roles

    source = pretrained.open_source(args.source)
    if source.router_bias is not None:
        raise ConfigError(
            f"--from {args.source} has biases of routers, which a compressed model does"
            " not hold; convert it to a published folder first"
        )
    tokenizer = tokenizers_of.open_tokenizer(args.source, source.model)
    launcher.start_jax(config)
    config = settings.for_model(config, source.model, num_devices=jax.device_count())
    layout = experiment.lay_out(config, jax.devices())
    policy = precision.policy(config.precision)
    texts = read_texts(args, tokenizer)
    parts = sharding.axis_product(layout.mesh, layout.params.batch)
    rows = calibration_rows(texts.ids_N, args.rows, args.length, parts)
    model = model_of(source.model, policy, layout)
    measure = functools.partial(
        perplexity,
        texts.held_out,
        tokenizer,
        score.make_score(source.model, policy=policy, layout=layout),
        length=args.length,
        most=args.score_tokens,
    )
    how = compression.Compression(
        format=args.format,
        method=args.method,
        group=args.group,
        matrices=tuple(roles.matrices("--targets", args.targets, model.specs)),
    )
    try:
        compression.abstract(model.specs, how, layout, policy.param)
    except ConfigError as error:  # before anything is read or measured
        raise ConfigError(f"--group {args.group}: {error}") from error
    with jax.set_mesh(layout.mesh):
        weights = source.load(layout=layout, dtype=policy.param)
        before = measure(weights)
        few, _ = calibration.compress(
            model,
            source.model,
            weights,
            rows,
            how,
            layout=layout,
            tell=lambda line: print(line, file=sys.stderr),
        )
        after = measure(few)
        export.write_run(
            args.to,
            few,
            source.model,
            tokenizer=tokenizer,
            files=tokenizers_of.files(args.source),
            how=how,
        )
        sizes = [sharding.bytes_per_device(tree) / 1e9 for tree in (weights, few)]
    print(f"{args.to}: {args.format} by {args.method}, {_groups(args.group)}")
    print(f"  perplexity {before:.4f} -> {after:.4f} ({after / before - 1:+.2%})")
    print(f"  {sizes[0]:.3f} GB -> {sizes[1]:.3f} GB")
    return exitcodes.DONE


def model_of(cfg: ModelConfig, policy: Any, layout: Any) -> Any:
    """The functions of the model, for whole rows on each device."""
    from jaxinfra.models import transformer
    from jaxinfra.ops import attention, seam
    from jaxinfra.parallel import expert

    rules = dataclasses.replace(layout.params, length=(), residual=())
    ops = seam.Ops(
        seam.make_einsum(policy, rules),
        attention.make_attend(rules),
        expert.make_dispatch(cfg, policy=policy, rules=rules),
    )
    return transformer.make_model(cfg, ops=ops, policy=policy, rules=rules)


def read_texts(args: argparse.Namespace, tokenizer: Any) -> Texts:
    """The texts that the command line names, in the tokenizer's ids."""
    if args.data:
        data = shards.open_dataset(args.data)
        if data.tokenizer.digest() != tokenizer.digest():
            raise ConfigError(
                f"--data {args.data} has another tokenizer than --from {args.source}; "
                "prepare it with the model's, or give its text by --text"
            )
        train = benchmarks.documents(data.split("train"), tokenizer)
        held_out = benchmarks.documents(data.split("held_out"), tokenizer)
        return Texts(np.concatenate([ids_N for ids_N, *_ in train]), held_out)
    files = args.text or [prepare.CORPORA["shakespeare"]]
    documents = list(sources.read_documents(sources.find_files(files)))
    ids_N = np.concatenate(list(tokenizer.encode_batch(documents))).astype(np.int64)
    cut = len(ids_N) - len(ids_N) // 10
    return Texts(ids_N[:cut], [benchmarks.Document(ids_N[cut:])])


def calibration_rows(
    ids_N: np.ndarray, num_rows: int, length: int, parts: int
) -> list[np.ndarray]:
    """Batches [B, T] of rows from all over the text, the same every time; `parts`, of
    the mesh, divide B."""
    if len(ids_N) < num_rows * length:
        raise DataError(
            f"the text has {len(ids_N)} tokens to calibrate on, and --rows {num_rows} x"
            f" --length {length} ask for {num_rows * length}; give more text, or ask"
            " for less"
        )
    starts = np.linspace(0, len(ids_N) - length, num_rows).astype(np.int64)
    rows_BT = np.stack([ids_N[start : start + length] for start in starts])
    batch = max(parts, min(_BATCH, num_rows) // parts * parts)
    if num_rows % batch:
        raise ConfigError(
            f"--rows {num_rows} are no whole batches of {batch}; give a multiple"
        )
    return list(rows_BT.reshape(-1, batch, length))


def perplexity(
    documents: list[benchmarks.Document],
    tokenizer: Any,
    score_rows: Any,
    weights: Any,
    *,
    length: int,
    most: int,
) -> float:
    """Of the first `most` tokens of the documents."""
    taken = []
    for ids_N, *_ in documents:
        if most > 0:
            taken.append(benchmarks.Document(ids_N[:most]))
            most -= len(ids_N)
    figures = benchmarks.perplexity(
        taken,
        tokenizer,
        functools.partial(score_rows, weights),
        num_bytes=1,
        length=length,
    )
    return float(figures["perplexity"])


def _groups(group: int) -> str:
    return f"groups of {group}" if group else "a scale a channel"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, path = parser.add_argument, pathlib.Path
    add("--from", dest="source", required=True, metavar="SOURCE")
    add("--to", type=path, required=True, metavar="FOLDER")
    add("--format", choices=("int8", "int4", "nf4"), required=True)
    add("--method", choices=("nearest", "gptq", "awq"), default="nearest")
    add("--group", type=int, default=64, help="inputs a scale; 0: a channel's")
    add("--targets", default="attention up gate down", help="patterns of matrices")
    add("--text", nargs="+", default=[], metavar="FILE", help=sources.ACCEPTED)
    add("--data", type=path, metavar="DATASET", help="a folder that prepare wrote")
    add("--rows", type=int, default=32, help="rows to calibrate on (default: 32)")
    add("--length", type=int, default=256, help="tokens a row (default: 256)")
    add("--score_tokens", type=int, default=20_000, help="of perplexity, at most")
    return parser


if __name__ == "__main__":
    sys.exit(main())
