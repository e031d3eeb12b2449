"""Full fine-tuning and QLoRA on the same tokens, for `bench.py qlora`.

    python scripts/qlora_runs.py SOURCE              all that is not in the results
    python scripts/qlora_runs.py SOURCE qlora 1e-3   kind, peak learning rate

SOURCE is a published model (a folder, a .gguf file or a run); its new domain is the
shipped text in passages of 1,000 tokens, of which every tenth is held out. A run goes
to scripts/results/qlora.json when it ends, so that what was cut short goes on there.
"""

import functools
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "qlora.json"
STEPS, ROWS, LENGTH, PASSAGE = 50, 4, 128, 1000
EVAL_BATCHES, EVAL_ROWS = 4, 8
_LORA = ["--lora.rank", "8", "--lora.alpha", "16", "--lora.base", "nf4"]
# Kind -> (settings, peak learning rates).
KINDS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "full": ([], (2e-5, 5e-5, 1e-4)),
    "qlora": (_LORA, (1e-3, 2e-3, 4e-3)),
}


def main(argv: list[str]) -> int:
    source, *one = argv
    wanted = [(kind, rate) for kind, (_, rates) in KINDS.items() for rate in rates]
    if one:
        wanted = [(one[0], float(one[1]))]
    for kind, rate in wanted:
        if f"{rate:g}" not in _results().get(kind, {}).get("held_out_nats", {}):
            _record(kind, rate, run(source, kind, rate))
    return 0


def run(source: str, kind: str, rate: float) -> dict[str, Any]:
    """Nats a token on the held-out passages before the first step and after the last,
    bytes of what is trained and of its moments; of adapters, how far merged logits
    are off."""
    import jax
    import numpy as np

    from jaxinfra import experiment, options, params, tasks
    from jaxinfra.config import Config
    from jaxinfra.data import device
    from jaxinfra.interop import pretrained
    from jaxinfra.train import evaluate

    settings = {
        "init.from": source,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": f"{rate:g}",
        "optimizer.warmup_steps": "5",
        "optimizer.weight_decay": "0",
        "train.steps": str(STEPS),
        "train.batch_size": str(ROWS),
        "train.length": str(LENGTH),
        "eval.batch_size": str(EVAL_ROWS),
        "sample.tokens": "0",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    config = options.parse([*words, *KINDS[kind][0]], Config(name="qlora"))
    opened = pretrained.open_source(source)
    config = opened.adopt(config)
    with tempfile.TemporaryDirectory() as folder:
        data = {"": _passages(source, opened.model, pathlib.Path(folder, "data"))}
        config = experiment.resolve(config, data[""].tokenizer.vocab_size)
        text = functools.partial(tasks.text, data=data)
        exp = experiment.build(config, jax.devices()[:1], get_task=text)
        place = experiment.batch_sharding(exp.layout)
        with jax.set_mesh(exp.layout.mesh):
            weights, _ = opened.begin(
                config.model, layout=exp.layout, dtype=exp.policy.param
            )
            state = exp.init(begun=exp.task.adopt(weights))
            del weights
            held_out = {
                "held_out": evaluate.eval_set(
                    exp.task.eval_sets["held_out"],
                    batches=EVAL_BATCHES,
                    sharding=place,
                )
            }

            def nats(state) -> float:
                found = evaluate.evaluate(
                    exp.eval_step, held_out, state.params, state.model_state
                )
                return found["eval/held_out/loss"]

            before, begin = nats(state), time.perf_counter()
            for k in range(STEPS):
                batch = device.to_device(
                    exp.task.stream.batch, k, batch_size=ROWS, sharding=place
                )
                state, metrics = exp.train_step(state, batch)
                if k % 10 == 0:
                    secs = time.perf_counter() - begin
                    loss = float(metrics["loss"])
                    print(kind, rate, k, loss, f"{secs:.0f} s", flush=True)
            found = {
                "held_out_nats": nats(state),
                "before": before,
                "trained": params.count(exp.task.specs),
                "trained_and_moments_bytes": sum(
                    x.nbytes
                    for x in jax.tree.leaves((state.params, state.opt_state))
                    if isinstance(x, jax.Array)
                ),
            }
            if kind == "qlora":
                batch = next(held_out["held_out"].batches())
                ids_BT = np.asarray(jax.device_get(batch.tokens_BT1))[:2, :LENGTH]
                found["merged"] = _merged(exp, state, ids_BT)
    return found


def _merged(exp: Any, state: Any, ids_BT: Any) -> dict[str, float]:
    """Logits of the base and its pairs against those of the merged arrays."""
    import numpy as np

    from jaxinfra.generate import score
    from jaxinfra.tune import lora

    logits = score.make_logits(exp.config.model, policy=exp.policy, layout=exp.layout)
    whole = exp.task.whole(state.params, state.model_state)
    apart_BTV, one_BTV = logits(whole, ids_BT), logits(lora.merge(whole), ids_BT)
    return {
        "largest_difference": float(np.abs(apart_BTV - one_BTV).max()),
        "logits_standard_deviation": float(apart_BTV.std()),
    }


def _passages(source: str, model: Any, folder: pathlib.Path) -> Any:
    """The shipped text as a data set, in the model's ids."""
    import numpy as np

    from jaxinfra.data import prepare, writer
    from jaxinfra.interop import tokenizers_of

    tokenizer = tokenizers_of.open_tokenizer(source, model)
    text = pathlib.Path(prepare.CORPORA["shakespeare"]).read_text()
    ids_N = np.concatenate(list(tokenizer.encode_batch([text]))).astype(np.uint16)
    passages = np.array_split(ids_N, len(ids_N) // PASSAGE)
    parts = {"held_out": passages[9::10]}
    parts["train"] = [p for i, p in enumerate(passages) if i % 10 != 9]
    size = len(text.encode()) // len(passages)
    return writer.write_dataset(
        folder,
        tokenizer=tokenizer,
        splits={
            name: writer.SplitContent(documents=part, text_bytes=size * len(part))
            for name, part in parts.items()
        },
        shard_tokens=10**6,
    )


def summary() -> dict[str, Any]:
    """The results, and what QLoRA reaches of full fine-tuning's gain, each at its best
    rate, from where the model in full precision begins."""
    results = _results()
    best = {kind: min(results[kind]["held_out_nats"].values()) for kind in KINDS}
    begin = results["full"]["before"]
    results["gain_nats"] = {kind: begin - nats for kind, nats in best.items()}
    results["part_of_the_gain"] = (begin - best["qlora"]) / (begin - best["full"])
    sizes = [results[kind]["trained_and_moments_bytes"] for kind in ("qlora", "full")]
    results["trained_and_moments_part"] = sizes[0] / sizes[1]
    return results


def _record(kind: str, rate: float, found: dict[str, Any]) -> None:
    results = _results()
    entry = results.setdefault(kind, {"held_out_nats": {}})
    entry["held_out_nats"][f"{rate:g}"] = found.pop("held_out_nats")
    entry |= found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if all(name in results for name in KINDS):
        RESULTS.write_text(json.dumps(summary(), indent=1) + "\n")
    print(kind, rate, entry)


def _results() -> dict[str, Any]:
    about = {"steps": STEPS, "tokens_a_step": ROWS * LENGTH}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else about


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
