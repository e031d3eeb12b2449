"""What low precision costs in quality: runs of `tiny`, for `bench.py quant`.

    python scripts/quant_runs.py KIND [SEED ...]   its runs that are not in the results

A run is 300 steps of configs/tiny.py on the shipped text and the loss on its held-out
tenth, in the compute dtype. Results go to scripts/results/quant.json, or --results, of
another device say, after each run, so that what was ended goes on where it was.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "quant.json"
STEPS, SEEDS = 300, (0, 1, 2)
_ADAMW = ["--optimizer.name", "adamw", "--optimizer.learning_rate", "1e-3"]
_GATHERS = ["--precision", "bfloat16", "--mesh.fsdp", "8", "--comm.gather", "int8"]
_GATHERS += ["--runtime.cpu_devices", "8"]
# Kind -> (settings, the kind it is measured against).
KINDS = {
    "bfloat16": (["--precision", "bfloat16"], None),
    "fp8": (["--precision", "fp8"], "bfloat16"),
    "fp8 delayed": (
        ["--precision", "fp8", "--quant.scaling", "delayed"],
        "bfloat16",
    ),
    "int8": (["--precision", "int8"], "bfloat16"),
    "mxfp8": (["--precision", "mxfp8"], "bfloat16"),
    "adamw": (["--precision", "bfloat16", *_ADAMW], None),
    "adamw 8 bits": (
        ["--precision", "bfloat16", *_ADAMW, "--optimizer.moments", "8bit"],
        "adamw",
    ),
    "int8 gathers": (_GATHERS, "bfloat16"),
    "int8 gathers and reductions": ([*_GATHERS, "--comm.reduce", "int8"], "bfloat16"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    for seed in args.seeds:
        known = _read(args.results).get(args.kind, {}).get("held_out_nats", {})
        if str(seed) not in known:
            _record(args.results, args.kind, seed, *run(args.kind, seed))
    return 0


def run(kind: str, seed: int) -> tuple[float, str]:
    """(held-out nats a byte after training, what the task says of its precision)."""
    from jaxinfra import launcher, options

    settings, _ = KINDS[kind]
    command = [*settings, "--train.steps", str(STEPS), "--run.seed", str(seed)]
    config = options.parse(command, options.load_config("tiny"))
    launcher.prepare_process(config)
    import jax

    from jaxinfra import experiment, tasks
    from jaxinfra.data import device
    from jaxinfra.train import evaluate

    data = tasks.open_sets(config)
    config = experiment.resolve(config, data[""].tokenizer.vocab_size)
    text = functools.partial(tasks.text, data=data)
    exp = experiment.build(config, get_task=text)
    place = experiment.batch_sharding(exp.layout)
    begin = time.perf_counter()
    with jax.set_mesh(exp.layout.mesh):
        state = exp.init()
        for k in range(STEPS):
            batch = device.to_device(
                exp.task.stream.batch,
                k,
                batch_size=config.train.batch_size,
                sharding=place,
            )
            state, metrics = exp.train_step(state, batch)
            if k % 50 == 0:
                secs = time.perf_counter() - begin
                print(
                    kind, seed, k, float(metrics["loss"]), f"{secs:.0f} s", flush=True
                )
        sets = {
            name: evaluate.eval_set(rows, batches=0, sharding=place)
            for name, rows in exp.task.eval_sets.items()
        }
        found = evaluate.evaluate(exp.eval_step, sets, state.params, state.model_state)
    return found["eval/held_out/loss"], exp.task.notes.splitlines()[-1]


def summary(path: pathlib.Path = RESULTS) -> dict:
    """Kinds with their mean against the one they are measured by, seed by seed."""
    found = _read(path)
    results = {kind: found[kind] for kind in KINDS if kind in found}
    for kind, (_, base) in KINDS.items():
        mine = results.get(kind, {}).get("held_out_nats", {})
        theirs = results.get(base, {}).get("held_out_nats", {})
        pairs = [mine[s] / theirs[s] - 1 for s in mine if s in theirs]
        if pairs:
            results[kind]["against"] = base
            results[kind]["relative"] = statistics.mean(pairs)
            results[kind]["relative_range"] = [min(pairs), max(pairs)]
    return results


def _record(path: pathlib.Path, kind: str, seed: int, nats: float, says: str) -> None:
    results = _read(path)
    entry = results.setdefault(kind, {"held_out_nats": {}})
    entry["held_out_nats"][str(seed)] = nats
    entry["held_out_nats"] = dict(sorted(entry["held_out_nats"].items()))
    if "FLOPs" in says:
        entry["says"] = says
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.write_text(json.dumps(summary(path), indent=1) + "\n")
    print(kind, seed, nats, says)


def _read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
