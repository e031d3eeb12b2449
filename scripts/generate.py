"""Continues prompts with a model.

    python scripts/generate.py SOURCE --prompt "HAMLET." --prompt "KING."
    python scripts/generate.py SOURCE --chat --prompt "What is a tensor?"
    python scripts/generate.py SOURCE --adapter RUN --adapter RUN --prompt X --prompt Y

SOURCE is a run folder (RUN: its newest good checkpoint, or RUN@STEP), a published
folder of safetensors, or a .gguf file. With --chat each prompt is a user's message,
written by the model's chat template, or that of --chat_template FILE. Each --adapter,
one for all prompts or one a prompt, is a run of low-rank adapters (lora.rank) that was
trained beside SOURCE; the base is there once for all of them, and `none` is the base.

`--key value` says how the model writes, above all `--sample.tokens 400` (or `--tokens
400`), `--sample.temperature 0` (greedy), `--sample.top_k`, `--sample.top_p` and
`--run.seed`, and how it runs: `--mesh.fsdp 2`, `--precision bfloat16`,
`--runtime.cpu_devices 4`. A run brings its own defaults. Exit codes: 0 done, 2 wrong
input, 12 no usable checkpoint.
"""

import argparse
import datetime
import pathlib
import sys
from typing import Any

import numpy as np

from jaxinfra.config import Config, ConfigError, DataError
from jaxinfra.data import chat, chat_template
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.generate import settings
from jaxinfra.resilience import exitcodes


def main(argv: list[str] | None = None) -> int:
    """Prints each prompt with its continuation; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="run, published folder or .gguf file")
    parser.add_argument("--prompt", action="append", help="text; may be repeated")
    parser.add_argument("--tokens", type=int, help="new tokens a prompt")
    parser.add_argument("--chat", action="store_true", help="prompts are messages")
    parser.add_argument("--adapter", action="append", default=[], metavar="RUN")
    parser.add_argument("--chat_template", type=pathlib.Path, metavar="FILE")
    own, words = settings.split(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    try:
        settings.check_source("SOURCE", args.source)
        if args.tokens is not None:
            words += ["--sample.tokens", str(args.tokens)]
        default = settings.of_source(args.source, Config(name="generate"))
        config = settings.read(words, default, keys=(*settings.KEYS, "sample"))
        _check_adapters(args)
        if not config.sample.tokens:
            raise ConfigError("sample.tokens=0 generates nothing; set --tokens")
        from jaxinfra import launcher

        launcher.prepare_process(config)
        from jaxinfra.checkpoint.commits import CheckpointError

        try:
            texts = generate(args, config)
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return exitcodes.NO_USABLE_CHECKPOINT
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.INPUT
    print("\n---\n".join(texts))
    return exitcodes.DONE


def generate(args: argparse.Namespace, config: Config) -> list[str]:
    """The prompts, or sample.prompt, with their continuations: jax is loaded here."""
    import jax

    from jaxinfra import experiment, launcher, precision
    from jaxinfra.generate import decode
    from jaxinfra.interop import pretrained, tokenizers_of

    source = pretrained.open_source(args.source)
    tokenizer = tokenizers_of.open_tokenizer(args.source, source.model)
    texts = args.prompt or [config.sample.prompt]
    prompts, ends, between = texts, tokenizers_of.end_ids(args.source), ""
    if args.chat:
        prompts, more = _messages(args, texts, tokenizer)
        ends, between = [*ends, *more], "\n"
    launcher.start_jax(config)
    config = settings.for_model(config, source.model, num_devices=jax.device_count())
    layout = experiment.lay_out(config, jax.devices())
    policy = precision.policy(config.precision)
    with jax.set_mesh(layout.mesh):
        found = decode.continue_prompts(
            _weights(args, source, layout, policy, num_prompts=len(prompts)),
            prompts,
            tokenizer,
            config.sample,
            model=source.model,
            policy=policy,
            layout=layout,
            seed=config.run.seed,
            stop_ids=ends,
        )
    return [f"{text}{between}{then}" for text, then in zip(texts, found, strict=True)]


def _check_adapters(args: argparse.Namespace) -> None:
    num_prompts = len(args.prompt or [""])
    if len(args.adapter) not in (0, 1, num_prompts):
        raise ConfigError(
            f"{len(args.adapter)} --adapter and {num_prompts} --prompt; give one for"
            " all prompts, or one a prompt (none: the base)"
        )
    for adapter in args.adapter:
        if adapter != "none":
            settings.check_source("--adapter", adapter)


def _weights(
    args: argparse.Namespace, source: Any, layout: Any, policy: Any, *, num_prompts: int
) -> Any:
    """The parameters of SOURCE, with the adapters that each prompt is to have."""
    if set(args.adapter) <= {"none"}:
        return source.load_kept(layout=layout, dtype=policy.param)
    from jaxinfra.interop import tuned_runs

    named = [adapter for adapter in dict.fromkeys(args.adapter) if adapter != "none"]
    rows = [named.index(a) if a in named else -1 for a in args.adapter]
    rows = rows * num_prompts if len(rows) == 1 else rows
    return tuned_runs.by_row(source, named, rows, layout=layout)


def _messages(
    args: argparse.Namespace, texts: list[str], tokenizer: Tokenizer
) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """(ids of each text as a user's message, up to where the answer begins; the ids
    that end an answer)."""
    from jaxinfra.interop import tokenizers_of

    with tokenizers_of.folder(args.source) as folder:
        template = chat_template.load(
            tokenizer,
            folder=folder,
            file=args.chat_template or "",
            date=datetime.date.today(),
        )
    asked = [[{"role": "user", "content": text}] for text in texts]
    ids = [chat.chat_prompt(messages, template, tokenizer) for messages in asked]
    return ids, chat.answer_ends(asked[0], template, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
