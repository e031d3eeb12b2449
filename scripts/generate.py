"""Continues prompts with a model.

    python scripts/generate.py SOURCE --prompt "HAMLET." --prompt "KING."

SOURCE is a run folder (RUN: its newest good checkpoint, or RUN@STEP), a published
folder of safetensors, or a .gguf file. `--key value` says how the model writes, above
all `--sample.tokens 400` (or `--tokens 400`), `--sample.temperature 0` (greedy),
`--sample.top_k`, `--sample.top_p` and `--run.seed`, and how it runs: `--mesh.fsdp 2`,
`--precision bfloat16`, `--runtime.cpu_devices 4`. A run brings its own defaults. Exit
codes: 0 done, 2 wrong input, 12 no usable checkpoint.
"""

import argparse
import sys

from jaxinfra.config import Config, ConfigError, DataError
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
    own, words = settings.split(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    try:
        settings.check_source("SOURCE", args.source)
        if args.tokens is not None:
            words += ["--sample.tokens", str(args.tokens)]
        default = settings.of_source(args.source, Config(name="generate"))
        config = settings.read(words, default, keys=(*settings.KEYS, "sample"))
        if not config.sample.tokens:
            raise ConfigError("sample.tokens=0 generates nothing; set --tokens")
        from jaxinfra import launcher

        launcher.prepare_process(config)
        from jaxinfra.checkpoint.commits import CheckpointError

        try:
            texts = generate(args.source, config, args.prompt)
        except CheckpointError as error:
            print(f"error: {error}", file=sys.stderr)
            return exitcodes.NO_USABLE_CHECKPOINT
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.INPUT
    print("\n---\n".join(texts))
    return exitcodes.DONE


def generate(path: str, config: Config, prompts: list[str] | None) -> list[str]:
    """The prompts, or sample.prompt, with their continuations: jax is loaded here."""
    import jax

    from jaxinfra import experiment, launcher, precision
    from jaxinfra.generate import decode
    from jaxinfra.interop import pretrained, tokenizers_of

    source = pretrained.open_source(path)
    tokenizer = tokenizers_of.open_tokenizer(path)
    launcher.start_jax(config)
    config = settings.for_model(config, source.model, num_devices=jax.device_count())
    layout = experiment.lay_out(config, jax.devices())
    policy = precision.policy(config.precision)
    with jax.set_mesh(layout.mesh):
        return decode.continue_prompts(
            source.load(layout=layout, dtype=policy.param),
            prompts or [config.sample.prompt],
            tokenizer,
            config.sample,
            model=source.model,
            policy=policy,
            layout=layout,
            seed=config.run.seed,
        )


if __name__ == "__main__":
    sys.exit(main())
