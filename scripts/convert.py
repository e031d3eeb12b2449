"""Published models to run folders, and back.

    python scripts/convert.py --from HF_DIR --to RUN       a run folder of one step
    python scripts/convert.py --from RUN[@STEP] --to DIR   config.json + safetensors
    python scripts/convert.py --from FILE.gguf --to RUN    (extra gguf)

`--format hf` or `run` writes that form whatever the source is. The published form loads
in stock `transformers`; `--family` names which one, `--dtype` what its tensors hold.
`--tokenizer FOLDER` takes the tokenizer's files from there. `--key value` sets the mesh
and the devices, as for training: `--runtime.cpu_devices 4 --mesh.fsdp 4`.
"""

import argparse
import pathlib
import sys

from jaxinfra.config import Config, ConfigError, DataError
from jaxinfra.generate import settings
from jaxinfra.resilience import exitcodes

_KEYS = ("mesh", "zero", "runtime.cpu_devices", "runtime.devices")
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from", dest="source", required=True, metavar="SOURCE")
    parser.add_argument("--to", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--format", choices=("hf", "run"), help="default: the other")
    parser.add_argument("--family", default="", help="model_type, such as llama")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokenizer", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument(
        "--shard_bytes", type=int, default=5 * 10**9, help="a safetensors file's most"
    )
    own, words = settings.split(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    try:
        config = settings.read(words, Config(name="convert"), keys=_KEYS)
        settings.check_source("--from", args.source)
        if args.format == "run" and args.dtype == "float16":
            raise ConfigError("--format run has float32 or bfloat16, and no float16")
        if args.to.exists():
            raise ConfigError(f"--to {args.to} is there already; choose another folder")
        if args.tokenizer and not args.tokenizer.is_dir():
            raise ConfigError(f"--tokenizer {args.tokenizer} is no folder")
        if args.shard_bytes < 1:
            raise ConfigError(f"--shard_bytes {args.shard_bytes} must be 1 or more")
        from jaxinfra import launcher

        launcher.prepare_process(config)
        return convert(config, args)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.INPUT


def convert(config: Config, args: argparse.Namespace) -> int:
    """The conversion itself: from here on jax is loaded."""
    import jax
    import ml_dtypes  # noqa: F401 - gives numpy the name bfloat16
    import numpy as np

    from jaxinfra import experiment, launcher
    from jaxinfra.checkpoint.restore import CheckpointError
    from jaxinfra.interop import export, pretrained, tokenizers_of

    try:
        source = pretrained.open_source(args.source)
        if source.router_bias is not None:
            raise ConfigError(
                f"{args.source} was trained with train.router_bias_rate, and no other "
                "format has a place for the biases that its routers need; take it as "
                "it is"
            )
        to_run = args.format == "run" or (not args.format and bool(source.family))
        place = str(args.tokenizer or args.source)
        files, tokenizer = tokenizers_of.files(place), None
        if tokenizers_of.has_tokenizer(place):
            tokenizer = tokenizers_of.open_tokenizer(place, source.model)
        launcher.start_jax(config)
        config = settings.for_model(
            config, source.model, num_devices=jax.device_count()
        )
        layout = experiment.lay_out(config, jax.devices())
        with jax.set_mesh(layout.mesh):
            dtype = np.dtype(args.dtype)
            weights = source.load(layout=layout, dtype=dtype)
            if to_run:
                export.write_run(
                    args.to, weights, source.model, tokenizer=tokenizer, files=files
                )
                print(
                    f"{args.to}: a run folder of step 0; start from it by --init.from"
                )
                return exitcodes.DONE
            family = export.write_published(
                args.to,
                weights,
                source.model,
                family=args.family or source.family,
                dtype=dtype,
                files=files,
                shard_bytes=args.shard_bytes,
            )
            print(
                f"{args.to}: a {family} in {args.dtype}, with {len(files)} files of "
                "its tokenizer"
            )
            return exitcodes.DONE
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return exitcodes.NO_USABLE_CHECKPOINT


if __name__ == "__main__":
    sys.exit(main())
