"""Measures jaxinfra, always as a ratio against something run beside it.

    python scripts/bench.py step [--peers]     a training step against hand-written JAX,
                                               and against compiled PyTorch with --peers
    python scripts/bench.py start              command to first step, cold and warm
    python scripts/bench.py loop               host time a step that the loop costs
    python scripts/bench.py data [--peers]     the stream on one core, and Grain and
                                               torch's DataLoader on the same file
    python scripts/bench.py checkpoint [--peers]   a state of 1 GB saved and restored,
                                               against bare threads, and Orbax
    python scripts/bench.py shakespeare        configs/shakespeare_char.py, three seeds
    python scripts/bench.py images [--fashion FOLDER]   digits_convnet, fashion_convnet,
                                               against plain flax and scikit-learn
    python scripts/bench.py rounding           parameters in bfloat16, rounded two ways,
                                               against float32 masters: 500 steps
    python scripts/bench.py quant              tiny in fp8, int8, mxfp8, with adamw in 8
                                               bits, with int8 traffic: 300 steps, three
                                               seeds; goes on where it was ended
    python scripts/bench.py compress --model SOURCE   a published model's perplexity by
                                               format and method; goes on likewise
    python scripts/bench.py qlora --model SOURCE   full fine-tuning and adapters over
                                               nf4, three rates each; goes on likewise
    python scripts/bench.py device             the accelerator that is here, or the CPU:
                                               kernels against float32, a step's MFU,
                                               offload, bandwidths (a larger model's
                                               steps: scripts/device_steps.py)
    python scripts/bench.py experts            a step of tiny_moe by every way to meet
                                               experts, and without them
    python scripts/bench.py sft --model SOURCE   a published model that learns answers
                                               cut from the shipped plays
    python scripts/bench.py published --model SOURCE   a published model (a folder or a
                                               .gguf) against transformers: the same
                                               perplexity, the same greedy text
    python scripts/bench.py meshes [--full] [--secs N]   every mesh of 8 devices, by
                                               schedule and kind, against one device
    python scripts/bench.py pipeline --peers   bytes that pipelines take on 8 v5p chips,
                                               by their compiler, against plain autodiff
    python scripts/bench.py faults [--full] [--rows 1,6] [--minutes 5]   the fault
                                               table: see scripts/faults/__init__.py

Each prints a table and writes it to scripts/results/<verb>.json. A peer never shares
this environment: `--peers` makes one for it in the cache folder. Machines are noisy:
quote the ratios, which come from runs in turn.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"
PEERS = ROOT / "scripts" / "peers"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = {"step": step, "start": start, "loop": loop}
    verbs |= {"shakespeare": shakespeare, "images": images, "published": published}
    verbs |= {"meshes": meshes, "pipeline": pipeline}
    verbs |= {"rounding": rounding, "sft": sft, "data": data, "faults": faults}
    verbs |= {"checkpoint": checkpoint, "device": device, "experts": experts}
    verbs |= {"quant": quant, "compress": compress, "qlora": qlora}
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("--peers", action="store_true", help="measure peers too")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs")
    parser.add_argument("--fashion", help="the folder of Fashion-MNIST, for images")
    parser.add_argument("--model", help="folder or .gguf file, of a model")
    parser.add_argument("--full", action="store_true", help="faults, meshes: all")
    parser.add_argument("--rows", default="", help="faults: these rows, as in 1,6,loop")
    parser.add_argument(
        "--trials", type=int, default=0, help="faults: at most, of a row"
    )
    parser.add_argument("--minutes", type=float, default=0, help="faults: stop after")
    parser.add_argument("--ledger", help="faults: the file of the verdicts so far")
    parser.add_argument(
        "--out", type=pathlib.Path, help="instead of results/<verb>.json"
    )
    parser.add_argument("--secs", type=float, default=math.inf, help="time for meshes")
    args = parser.parse_args(argv)
    result = verbs[args.verb](args)
    result["machine"] = _machine()
    print(json.dumps(result, indent=1))
    if result.pop("is_trial", False):
        return result["failed"]
    out = args.out or RESULTS / f"{args.verb}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def step(args) -> dict:
    """Seconds a step of a 5.2 M model, 8 x 256 tokens, float32: ours and naive in
    turn."""
    import jax
    import numpy as np

    sys.path.insert(0, str(PEERS))
    import naive_jax as naive  # pyright: ignore[reportMissingImports]

    tokens = np.random.default_rng(0).integers(
        0, naive.VOCAB, (naive.ROWS, naive.LENGTH + 1)
    )
    naive_step, naive_state = naive.make_step()
    our_step, our_state, batch = _our_step(naive, tokens)
    tokens = tokens.astype(np.int32)
    secs = {"naive": [], "ours": []}
    for _ in range(args.repeats + 1):
        begin = time.perf_counter()
        naive_state, value = naive_step(naive_state, tokens)
        jax.block_until_ready((naive_state, value))
        middle = time.perf_counter()
        our_state, metrics = our_step(our_state, batch)
        jax.block_until_ready((our_state, metrics))
        secs["naive"].append(middle - begin)
        secs["ours"].append(time.perf_counter() - middle)
    secs = {name: values[1:] for name, values in secs.items()}  # the first compiles
    ratios = [o / n for o, n in zip(secs["ours"], secs["naive"], strict=True)]
    result = {f"{name}_secs": statistics.median(v) for name, v in secs.items()}
    result["ours_over_naive"] = statistics.median(ratios)
    result["ours_over_naive_range"] = [min(ratios), max(ratios)]
    if args.peers:
        python = _peer_environment("torch", ["torch==2.13.0", "numpy"])
        command = [python, str(PEERS / "torch_step.py"), str(args.repeats)]
        peer = json.loads(_run(command))
        result["torch_compiled_secs"] = peer["median"]
        result["naive_over_torch"] = result["naive_secs"] / peer["median"]
    return result


def device(args) -> dict:
    """First contact with a device; see scripts/peers/device.py."""
    sys.path.insert(0, str(PEERS))
    import device as first_contact  # pyright: ignore[reportMissingImports]

    return first_contact.report(args.repeats)


def experts(args) -> dict:
    """How tokens meet experts; see scripts/peers/experts.py."""
    sys.path.insert(0, str(PEERS))
    import experts as ways  # pyright: ignore[reportMissingImports]

    return ways.report(args.repeats)


def start(args) -> dict:
    """Seconds from the command to the first step of `tiny`: an empty compile cache,
    then the same again."""
    secs: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            for kind in secs:
                secs[kind].append(_to_first_step(folder, kind))
    return {f"{kind}_secs": statistics.median(values) for kind, values in secs.items()}


def loop(args) -> dict:
    """Host milliseconds a step that the loop adds to a step that does nothing."""
    from jaxinfra import options
    from jaxinfra.train import loop as loops
    from jaxinfra.train.journal import Journal

    steps = 2000
    null_step, state, batch = _null_step()
    begin, late = time.perf_counter(), {}
    for _ in range(steps):  # the bare loop reads its metrics one step late too
        state, metrics = null_step(state, batch)
        _ = {name: value.item() for name, value in late.items()}
        late = metrics
    bare_secs = time.perf_counter() - begin

    config = options.parse(
        ["--train.steps", str(steps), "--run.log_every", str(steps)],
        options.load_config("tiny"),
    )
    schedule = loops.Schedule(
        steps=steps,
        save_every=steps,
        eval_every=steps,
        max_bad_steps=10,
        flops_of=lambda step: 1.0,
        peak_flops=1.0,
    )
    hooks = loops.Hooks(
        evaluate=lambda state: {},
        ballot=lambda wants: wants,
        stop_wanted=lambda: None,
        profile=lambda step: None,
    )
    null_step, state, batch = _null_step()
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(pathlib.Path(folder), is_first=True) as journal,
    ):
        journal.start(config, start=0, facts={})
        begin = time.perf_counter()
        loops.run(
            null_step,
            state,
            iter([_Fetched(batch, 0.0)] * steps),
            start=0,
            schedule=schedule,
            hooks=hooks,
            saver=_NoSaver(),
            journal=journal,
            lr=lambda step: 0.0,
        )
        secs = time.perf_counter() - begin
    return {
        "loop_ms": 1e3 * secs / steps,
        "bare_ms": 1e3 * bare_secs / steps,
        "overhead_ms": 1e3 * (secs - bare_secs) / steps,
    }


def data(args) -> dict:
    """Tokens a second to the host batch: rows of one file, a mixture of three data
    sets, the rows of a distant step; with --peers those of Grain and DataLoader."""
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, str(PEERS / "stream_ours.py"), folder]
        _run(ours)
        result = json.loads(_run([*ours, "measure"]))
        if args.peers:
            peers = {"grain": "grain==0.2.18", "torch": "torch==2.13.0"}
            for name, package in peers.items():
                python = _peer_environment(f"stream_{name}", [package, "numpy"])
                command = [python, str(PEERS / f"stream_{name}.py"), f"{folder}/whole"]
                rates = json.loads(_run(command))
                ours_rate = result["concat_from_row_1e+07_m_tokens_per_sec"]
                for kind, rate in rates.items():
                    result[f"{name}_{kind}_m_tokens_per_sec"] = rate
                    result[f"ours_over_{name}_{kind}"] = round(ours_rate / rate, 1)
    return result


def faults(args) -> dict:
    """The fault table; trials that the ledger has are not made again."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from faults import table

    return table.measure(args, RESULTS)


def checkpoint(args) -> dict:
    """Rates of a save and of a verified restore from a cold page cache as ratios of
    bare threads' and Orbax's, the time that the loop is blocked, and host memory at two
    settings of checkpoint.staging_gib."""
    script, size = str(PEERS / "checkpoint_rates.py"), "1024"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:

        def measure(*words: str) -> dict:
            command = [sys.executable, script, *words]
            return json.loads(_run(command, env=environment))

        result = measure("rates", folder, str(args.repeats), size)
        if args.peers:  # in a process of its own, whose memory Orbax may crowd
            found = measure("rates", folder, "3", size, "orbax")
            result |= {key: value for key, value in found.items() if "orbax" in key}
        for staging in ("0", "256"):
            found = measure("memory", folder, staging, size)
            result |= {f"staging_{staging}_mb": found}
    return result


def shakespeare(args) -> dict:
    """Held-out nats a character and minutes of configs/shakespeare_char.py."""
    runs = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            command = _script("train")
            command += ["--config", "shakespeare_char", "--run.seed", str(seed)]
            _run([*command, "--run.dir", folder, "--sample.tokens", "0"])
            secs = time.perf_counter() - begin
            last = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()[-1]
            loss = json.loads(last)["eval/loss"]
            runs.append({"seed": seed, "nats": loss, "secs": secs})
            print(runs[-1], file=sys.stderr)
    return {
        "runs": runs,
        "median_nats": statistics.median(run["nats"] for run in runs),
        "median_secs": statistics.median(run["secs"] for run in runs),
    }


def images(args) -> dict:
    """Held-out accuracy and seconds of the image configs, ours and in turn what
    scripts/peers/images.py has."""
    runs = {"digits_convnet": []}
    if args.fashion:
        runs["fashion_convnet"] = ["--data.path", args.fashion]
    result = {}
    for name, settings in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            command = _script("train")
            _run([*command, "--config", name, "--run.dir", folder, *settings])
            secs = time.perf_counter() - begin
            last = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()[-1]
        ours = {"accuracy": json.loads(last)["eval/held_out/accuracy"], "secs": secs}
        peers = _run([sys.executable, str(PEERS / "images.py"), name, *settings])
        result[name] = {"ours": ours} | json.loads(peers)
        print(name, result[name], file=sys.stderr)
    return result


def rounding(args) -> dict:
    """Held-out nats of configs/tiny.py after 500 steps, by optimizer and by how
    updates enter the parameters."""
    ways = {
        "float32 masters": ["bfloat16"],
        "bfloat16, stochastic": ["bfloat16_params"],
        "bfloat16, nearest": ["bfloat16_params", "--train.rounding", "nearest"],
    }
    optimizers = {
        "muon": ["--optimizer.name", "muon"],
        "adamw": ["--optimizer.name", "adamw", "--optimizer.learning_rate", "1e-3"],
    }
    result = {}
    for name, optimizer in optimizers.items():
        losses = {}
        for way, settings in ways.items():
            command = ["--train.steps", "500", *optimizer, "--precision", *settings]
            losses[way] = _train(command)["eval/loss"]
            print(name, way, losses[way], file=sys.stderr)
        base = losses["float32 masters"]
        result[name] = {
            way: {"held_out_nats": loss, "against_masters": loss / base - 1}
            for way, loss in losses.items()
        }
    return result


def quant(args) -> dict:
    """Held-out nats of configs/tiny.py by precision, against bfloat16; each run is
    written when it ends (scripts/quant_runs.py)."""
    import quant_runs  # pyright: ignore[reportMissingImports]

    for kind in quant_runs.KINDS:  # each in a process of its own: devices differ
        _run([*_script("quant_runs"), kind])
    return quant_runs.summary()


def compress(args) -> dict:
    """A published model's matrices in few bits, by every format and method; each is
    written when it is known (scripts/compression_table.py)."""
    out = args.out or RESULTS / "compress.json"
    _run([*_script("compression_table"), _model(args), str(out)])
    return json.loads(out.read_text())


def qlora(args) -> dict:
    """A published model in a new domain: full fine-tuning, and adapters over nf4, on
    the same tokens (scripts/qlora_runs.py)."""
    import qlora_runs  # pyright: ignore[reportMissingImports]

    for kind, (_, rates) in qlora_runs.KINDS.items():
        for rate in rates:  # each in a process of its own: memory is given back
            _run([*_script("qlora_runs"), _model(args), kind, str(rate)])
    return qlora_runs.summary()


def _model(args) -> str:
    if not args.model:
        raise SystemExit(f"bench.py {args.verb} needs --model SOURCE")
    return args.model


def sft(args) -> dict:
    """Held-out nats an answer token before and while a published model learns to answer
    speeches of the shipped plays."""
    _model(args)
    text = (ROOT / "jaxinfra" / "data" / "corpus" / "shakespeare.txt").read_text()
    speeches = re.findall(r"\n\n([A-Z][A-Za-z ]{2,20})\.\n((?:[^\n]+\n)+)", text)
    asked = [
        (f"Answer {one.title()}, who says:\n{said.strip()}", answer.strip())
        for (one, said), (other, answer) in itertools.pairwise(speeches)
        if one != other and 30 < len(said) < 240 and 30 < len(answer) < 240
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model, data, run_dir = (str(folder / n) for n in ("model", "data", "run"))
        convert = [*_script("convert"), "--from", args.model, "--to", model]
        _run([*convert, "--format", "hf"])
        messages = [
            {"messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]}
            for question, answer in asked[:420]
        ]  # fmt: skip
        pairs = folder / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(m) + "\n" for m in messages))
        prepare = [*_script("prepare"), str(pairs), "--chat", "--tokenizer", model]
        _run([*prepare, "--out", data, "--split", "documents", "--held_out", "0.05"])
        evaluate = [
            *_script("evaluate"),
            "--data",
            data,
            "--out",
            str(folder / "r.json"),
        ]

        def held_out(source):
            _run([*evaluate, "--from", source])
            [found] = json.loads((folder / "r.json").read_text())["results"]
            return found["nats_per_token"]

        losses = {"0": held_out(model)}
        steps = ["--train.steps", "30", "--train.save_every", "10"]
        rate = ["--optimizer.learning_rate", "5e-5", "--optimizer.warmup_steps", "5"]
        rows = ["--train.batch_size", "8", "--train.length", "128"]
        begin = time.perf_counter()
        source = ["--data.path", data, "--init.from", model, "--init.model", "true"]
        adamw = ["--optimizer.name", "adamw", "--eval.batches", "1"]
        _train([*source, *adamw, *steps, *rate, *rows], run_dir)
        secs = time.perf_counter() - begin
        losses |= {str(n): held_out(f"{run_dir}@{n}") for n in (10, 20, 30)}
        out = str(folder / "out")
        _run([*_script("convert"), "--from", run_dir, "--to", out])
        generate = [*_script("generate"), out, "--chat", "--prompt", asked[-1][0]]
        said = _run([*generate, "--tokens", "40", "--sample.temperature", "0"])
    return {
        "model": pathlib.Path(args.model).name,
        "held_out_nats_by_step": losses,
        "train_secs": secs,
        "said_after_export": said,
    }


def _train(settings: list[str], run_dir: str = "") -> dict:
    """The last metrics of a run without a sample at its end."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = run_dir or f"{folder}/run"
        command = _script("train")
        _run([*command, "--run.dir", run_dir, "--sample.tokens", "0", *settings])
        lines = pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


# Begin 10 texts of several kinds, so that greedy text differs.
_PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "Water boils at",
    "To be, or not to be:",
    "The three laws of motion are",
    "Dear Sir or Madam,",
    "My favourite recipe for bread starts with",
    "1, 2, 3, 5, 8,",
    "In 1969, for the first time,",
]


def published(args) -> dict:
    """Perplexity of 100 kB and 50 greedy tokens after 10 prompts, by the commands that
    a user has, and by transformers on the same weights."""
    _model(args)
    packages = ["torch==2.13.*", "transformers==5.*"]
    peer = [_peer_environment("published", packages), str(PEERS / "published.py")]
    length, tokens, source = 1024, 50, args.model
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if source.endswith(".gguf"):
            source = str(folder / "model")
            command = [*_script("convert"), "--from", args.model, "--to", source]
            _run([*command, "--format", "hf"])
        corpus = ROOT / "jaxinfra" / "data" / "corpus" / "shakespeare.txt"
        (folder / "text.txt").write_bytes(corpus.read_bytes()[:100_000])
        (folder / "prompts.json").write_text(json.dumps(_PROMPTS))
        files = [folder / "text.txt", folder / "prompts.json"]
        theirs = json.loads(
            _run([*peer, source, *map(str, files), str(length), str(tokens)])
        )
        begin = time.perf_counter()
        command = [*_script("evaluate"), "--from", source, "--length", str(length)]
        _run([*command, "--text", str(files[0]), "--out", str(folder / "out.json")])
        score_secs, begin = time.perf_counter() - begin, time.perf_counter()
        [ours] = json.loads((folder / "out.json").read_text())["results"]
        command = [*_script("generate"), source, "--tokens", str(tokens)]
        command += [word for prompt in _PROMPTS for word in ("--prompt", prompt)]
        texts = _run([*command, "--sample.temperature", "0"]).rstrip("\n")
        same = [a == b for a, b in zip(texts.split("\n---\n"), theirs["texts"])]
    nats = ours["nats_per_token"], theirs["nats_per_token"]
    return {
        "model": pathlib.Path(args.model).name,
        "tokens": [ours["tokens"], theirs["tokens"]],
        "nats_per_token": nats,
        "perplexity_relative_difference": math.expm1(nats[0] - nats[1]),
        "greedy_texts_equal": f"{sum(same)} of {len(same)}",
        "score_secs_with_start": score_secs,
        "generate_secs_with_start": time.perf_counter() - begin,
        "transformers": {k: v for k, v in theirs.items() if k.endswith("secs")},
    }


def meshes(args) -> dict:
    """Loss and gradients of every mesh of 8 devices against one device; what
    results/meshes.json has is not run again."""
    import meshes as body  # pyright: ignore[reportMissingImports]

    from jaxinfra import config as c
    from jaxinfra import launcher

    devices = c.RuntimeConfig(cpu_devices=body.DEVICES)
    launcher.prepare_process(c.Config(name="meshes", runtime=devices))
    result, path = {}, RESULTS / "meshes.json"
    for result in body.measured(path, full=args.full, secs=args.secs):
        path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def pipeline(args) -> dict:
    """Bytes of one step's gradient by every schedule, as the TPU's compiler says."""
    import jax

    versions = [f"jax[tpu]=={jax.__version__}", "optax", "flax", "tensorstore"]
    python = _peer_environment("tpu", versions)
    path = RESULTS / "pipeline.json"
    _run([python, str(PEERS / "pipeline_memory.py"), str(path)])
    return json.loads(path.read_text())


def _our_step(naive, tokens):
    """Our training step for the naive model's shapes: (step, state, batch)."""
    import jax
    import numpy as np

    from jaxinfra import config as c
    from jaxinfra import experiment
    from jaxinfra.data import packing

    config = c.Config(
        name="bench",
        model=c.ModelConfig(
            vocab_size=naive.VOCAB,
            width=naive.WIDTH,
            ffn_width=naive.FFN,
            num_heads=naive.HEADS,
            num_kv_heads=naive.HEADS,
            repeats=naive.LAYERS,
        ),
        train=c.TrainConfig(
            batch_size=naive.ROWS, length=naive.LENGTH, unroll=True, steps=1000
        ),
    )
    ours = experiment.build(config, jax.devices()[:1])
    jax.set_mesh(ours.layout.mesh)
    place = experiment.batch_sharding(ours.layout)
    batch = packing.Batch(
        jax.device_put(tokens.astype(np.uint16), place),
        jax.device_put(np.full((len(tokens), 1), tokens.shape[1], np.uint16), place),
    )
    return ours.train_step, ours.init(), batch


class _Fetched:
    def __init__(self, batch, wait_secs):
        self.batch, self.wait_secs = batch, wait_secs


class _NoSaver:
    def save(self, step, state): ...

    def poll(self):
        return []

    wait = poll

    def close(self):
        return []


def _null_step():
    """A jitted step with the metrics of a real one and no work."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def null(state, batch):
        value = (state + batch).astype(jnp.float32)
        names = ("loss", "grad_norm", "param_norm", "tokens", "log_z_squared")
        metrics = dict.fromkeys(names, value) | {"padding_frac": value * 0}
        return state + 1, metrics | {"is_finite": value >= 0}

    state, batch = jnp.int32(0), jnp.int32(1)
    null(state, batch)
    return null, state, batch


def _to_first_step(cache: str, kind: str) -> float:
    """Seconds until metrics.jsonl has its first line."""
    run_dir = pathlib.Path(cache, f"run_{kind}")
    command = _script("train")
    command += ["--run.dir", str(run_dir), "--data.cache_dir", f"{cache}/cache"]
    command += ["--train.steps", "3", "--sample.tokens", "0", "--eval.batches", "1"]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        path = run_dir / "metrics.jsonl"
        while not (path.exists() and path.stat().st_size):
            if process.poll() not in (None, 0):
                raise RuntimeError(f"{command} ended with {process.returncode}")
            time.sleep(0.01)
        return time.perf_counter() - begin


def _peer_environment(name: str, packages: list[str]) -> str:
    """The Python of an environment with `packages`, made once in the cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home, "jaxinfra", "peers", name)
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", *packages], check=True)
        (folder / "complete").touch()
    return str(python)


def _script(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / f"{name}.py")]


def _run(command: list[str], **options) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, **options
    )
    return done.stdout


def _machine() -> dict:
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    model = ""
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        models = [line for line in lines if line.startswith("model name")]
        model = models[0].partition(": ")[2] if models else ""
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **versions,
    }


if __name__ == "__main__":
    sys.exit(main())
