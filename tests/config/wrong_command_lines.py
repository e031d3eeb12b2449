"""Command lines that no run can follow, and what the error must say of each.

`WRONG` is read twice: by `test_wrong_command_lines` in this process, and by the test of
scripts/train.py, which wants exit 2, no traceback, nothing written and no jax. Paths
begin at the root of the checkout. No line leans on a value that tiny may change.
"""

# (arguments, parts of the message: what is wrong, the rule or fix, the hint)
WRONG: list[tuple[list[str], list[str]]] = [
    # What is not an option
    (["--train.stepz", "5"], ["--train.stepz", "did you mean --train.steps?"]),
    (["--steps", "5"], ["unknown option", "did you mean --train.steps?"]),
    (["--batch_size=5"], ["unknown option", "did you mean --train.batch_size?"]),
    (["--optim.name", "muon"], ["unknown option", "did you mean --optimizer.name?"]),
    (["--init.from_", "x"], ["unknown option", "did you mean --init.from?"]),
    (["--qqqq", "1"], ["unknown option --qqqq", "--help lists all"]),
    (["--train", "5"], ["--train is a section", "--train.steps"]),
    (["--eval.sets", "x"], ["--eval.sets is a section", "--eval.sets.NAME"]),
    (["--train.steps"], ["--train.steps has no value", "--train.steps=int"]),
    (["--run.accept_changes", "yes"], ["run.accept_changes", "true or false"]),
    (["--train.steps", "5", "--train.steps=6"], ["--train.steps", "given twice"]),
    (["train.steps=5"], ["unexpected argument", "did you mean --train.steps?"]),
    (["5"], ["unexpected argument '5'", "--key value"]),
    # Config files
    (["--config", "tinny"], ["unknown config 'tinny'", "did you mean tiny?"]),
    (["--config", "configs/gone.py"], ["configs/gone.py", "shipped", "gpt2_124m"]),
    (["--config"], ["--config has no value"]),
    # Values of the wrong type
    (["--train.steps", "3.5"], ["train.steps='3.5'", "an integer"]),
    (["--train.steps", "1e3"], ["train.steps='1e3'", "an integer", "1000"]),
    (["--train.steps="], ["train.steps=''", "an integer"]),
    (["--optimizer.learning_rate", "nan"], ["learning_rate=nan", "finite number"]),
    (["--optimizer.learning_rate", "fast"], ["='fast'", "finite number"]),
    (["--model.tied", "True"], ["model.tied='True'", "true or false"]),
    (["--model.norm", "rmsnrm"], ["must be one of", "did you mean rmsnorm?"]),
    (["--precision", "bf16"], ["precision='bf16'", "bfloat16_params"]),
    (["--model.pattern", "{}"], ["model.pattern='{}'", "a JSON list"]),
    (
        ["--model.pattern", '[{"windw": 3}]'],
        ["model.pattern[0].windw", "did you mean window?"],
    ),
    # Numbers out of range
    (["--train.batch_size", "0"], ["train.batch_size=0", "at least 1"]),
    (["--train.steps", "-1"], ["train.steps=-1", "at least 0"]),
    (["--train.steps", "9_999_999_999"], ["train.steps=9999999999", "at most"]),
    (["--model.dropout", "1"], ["model.dropout=1.0", "below 1"]),
    (["--sample.top_p", "0"], ["sample.top_p=0.0", "above 0"]),
    (["--zero", "4"], ["zero=4", "-1, 0, 1, 2 or 3"]),
    (["--run.seed", "-1"], ["run.seed=-1", "from 0"]),
    # The model
    (
        ["--model.num_heads", "4", "--model.num_kv_heads", "3"],
        ["model.num_kv_heads=3", "one of 1, 2, 4"],
    ),
    (
        ["--model.width=64", "--model.num_heads=5", "--model.num_kv_heads=1"],
        ["model.num_heads=5 does not divide model.width=64", "set model.head_dim"],
    ),
    (["--model.head_dim", "7"], ["width 7 is odd", "set model.head_dim"]),
    (
        ["--model.positions", "learned", "--train.length", "128"],
        ["model.max_length=0", "set model.max_length to 128 or more"],
    ),
    (["--model.repeats", "0"], ["no layer", "model.repeats"]),
    (
        ["--model.pattern", '[{"feed_forward": "experts"}]'],
        ["feed_forward='experts'", "model.experts_per_token=0"],
    ),
    (
        ["--init.model", "true"],
        ["init.model=true", "init.from", "set it"],
    ),
    (["--init.from", "runs/nowhere@7"], ["init.from=", "is not there"]),
    # Parts of a model
    (["--lora.rank", "4"], ["lora.rank=4", "set init.from"]),
    (["--train.freeze", "ffn"], ["train.freeze='ffn'", "set init.from"]),
    (
        ["--lora.rank", "4", "--init.from", "configs", "--train.freeze", "ffn"],
        ["train.freeze=ffn", "lora.rank=4", "lora.whole"],
    ),
    (["--lora.base", "nf4"], ["lora.base='nf4'", "lora.rank=0", "set lora.rank"]),
    (["--lora.alpha", "3"], ["lora.alpha=3.0", "lora.rank=0", "set lora.rank"]),
    (["--lora.targets", "up"], ["lora.targets='up'", "leave lora.targets out"]),
    (
        ["--lora.rank", "4", "--init.from", "configs", "--lora.group", "16"],
        ["lora.group=16", "set lora.base"],
    ),
    (["--train.quantize_group", "16"], ["=16", "set train.quantize_aware"]),
    (["--lora.base", "nf5"], ["must be one of", "did you mean nf4?"]),
    (
        ["--lora.rank", "4", "--init.from", "configs", "--lora.targets", " "],
        ["lora.targets is empty"],
    ),
    (
        ["--train.quantize_aware=nf4", "--train.quantize_group=0"],
        ["train.quantize_group=0", "set it to 64"],
    ),
    (
        ["--train.quantize_aware=int8", "--init.from=configs", "--train.freeze=ffn"],
        ["train.quantize_aware=int8", "train.freeze=ffn", "to none"],
    ),
    (
        [
            "--model.rope_scaling.kind",
            "llama3",
            "--model.rope_scaling.high_freq",
            "0.5",
        ],
        ["model.rope_scaling.high_freq=0.5", "low_freq"],
    ),
    # Training
    (
        ["--train.batch_size", "16", "--train.microbatches", "3"],
        ["train.microbatches=3", "one of 1, 2, 4, 8, 16"],
    ),
    (
        ["--optimizer.decay_fraction", "1.5"],
        ["optimizer.decay_fraction=1.5", "from 0 to 1"],
    ),
    (
        ["--optimizer.schedule=exponential", "--optimizer.final_fraction=0"],
        ["optimizer.schedule='exponential'", "set optimizer.final_fraction above 0"],
    ),
    (["--optimizer.ema_decay", "1"], ["optimizer.ema_decay=1.0", "below 1"]),
    (["--optimizer.name", "adam"], ["must be one of", "did you mean adamw?"]),
    (["--train.remat", "ful"], ["train.remat='ful'", "did you mean full?"]),
    (["--train.remat", "save:qery"], ["'qery'", "did you mean query?"]),
    (["--train.remat", "offload:key+qery"], ["'qery'", "did you mean query?"]),
    (["--train.remat", "save:"], ["there is no activation ''", "the names are"]),
    (["--train.remat", "save:key,save:query"], ["must be none", "offload:NAME+NAME"]),
    (["--train.remat", "save:key,offload:key"], ["'key' is there twice"]),
    (
        ["--quant.scaling", "delayed"],
        ["quant.scaling='delayed' is for precision fp8", "precision=float32"],
    ),
    (
        ["--precision=fp8", "--quant.scaling=delayed", "--quant.backward=compute"],
        ["keeps scales of gradients", "quant.backward to low"],
    ),
    (
        ["--quant.backward", "compute"],
        ["quant.backward='compute'", "fp8, int8, mxfp8", "precision=float32"],
    ),
    (["--quant.skip", "*/out", "--precision", "bfloat16"], ["quant.skip='*/out'"]),
    (
        ["--quant.history", "4", "--precision", "fp8"],
        ["quant.history=4", "quant.scaling='delayed'", "leave quant.history out"],
    ),
    (["--comm.gather", "int8"], ["comm.gather='int8'", "mesh.fsdp=1", "2 or more"]),
    (
        ["--comm.reduce=fp8", "--runtime.devices=1", "--mesh.data=1", "--mesh.fsdp=-1"],
        ["comm.reduce='fp8'", "mesh.fsdp=1"],
    ),
    (
        ["--comm.reduce", "fp8", "--mesh.fsdp", "2", "--zero", "1"],
        ["comm.reduce='fp8'", "zero=1", "set zero to 3"],
    ),
    (
        ["--comm.reduce=int8", "--mesh.fsdp=2", "--mesh.pipeline=2"],
        ["comm.reduce='int8'", "zero=1", "set zero to 2"],
    ),
    (["--quant.history", "0"], ["quant.history=0", "at least 1"]),
    (["--optimizer.moments", "8bit", "--optimizer.name", "muon"], ["is for adamw"]),
    (
        ["--comm.gather=int8", "--precision=int8", "--mesh.fsdp=2"],
        ["comm.gather='int8'", "precision=int8", "gathers what it multiplies"],
    ),
    (
        ["--config", "digits_convnet", "--precision", "fp8"],
        ["precision=fp8", "a task of its own", "bfloat16"],
    ),
    (
        ["--config", "digits_convnet", "--comm.reduce=int8", "--mesh.fsdp=2"],
        ["comm.reduce=int8", "a task of its own", "set comm.reduce to compute"],
    ),
    # The mesh
    (
        ["--runtime.cpu_devices=4", "--eval.batch_size=3"],
        ["eval.batch_size=3", "4 parts", "multiple of 4"],
    ),
    (["--mesh.fsdp", "0"], ["mesh.fsdp=0", "at least 1, or -1"]),
    (["--mesh.fsdp", "-1"], ["mesh.data=-1 x mesh.fsdp=-1", "set mesh.fsdp to 1"]),
    (["--mesh.pipeline", "64"], ["mesh.pipeline=64", "model.repeats=4", "4 or less"]),
    (
        ["--parallel.virtual_stages", "2"],
        ["parallel.virtual_stages=2", "parallel.schedule=interleaved", "not 1f1b"],
    ),
    (
        ["--parallel.reduce_once=true", "--mesh.data=2"],
        ["reduce_once='true'", "train.microbatches=1", "2 or more"],
    ),
    (
        [
            "--parallel.reduce_once=true",
            "--train.microbatches=2",
            "--mesh.data=1",
            "--mesh.fsdp=2",
        ],
        ["reduce_once='true'", "zero=3 and mesh.data=1", "zero to 1 with mesh.fsdp"],
    ),
    (
        [
            "--parallel.reduce_once=true",
            "--train.microbatches=2",
            "--mesh.data=1",
            "--zero=1",
        ],
        ["reduce_once='true'", "mesh.data=1 and mesh.fsdp=1", "mesh.data to 2"],
    ),
    (
        [
            "--config=digits_convnet",
            "--parallel.reduce_once=true",
            "--train.microbatches=2",
            "--mesh.data=2",
        ],
        ["reduce_once=true", "a task of its own", "parallel.reduce_once to auto"],
    ),
    (
        ["--mesh.pipeline=2", "--parallel.schedule=interleaved"],
        ["interleaved", "is 1f1b", "parallel.virtual_stages to 2 or more"],
    ),
    (
        ["--mesh.pipeline=2", "--parallel.schedule=2f2b"],
        ["parallel.schedule='2f2b'", "must be one of gpipe, 1f1b, interleaved"],
    ),
    (
        ["--config", "tiny_moe", "--mesh.expert", "3"],
        ["model.num_experts=8", "'expert' of size 3", "set mesh.expert to"],
    ),
    (
        ["--mesh.context", "3"],
        ["train.length=128", "6 parts", "'ring'", "multiple of 6"],
    ),
    (
        ["--mesh.context", "8", "--parallel.context", "ulysses"],
        ["model.num_kv_heads=4", "of size 8", "set parallel.context to ring"],
    ),
    (
        ["--config", "tiny_moe", "--model.router_groups", "3"],
        ["model.router_groups=3", "model.num_experts=8", "to 0"],
    ),
    (
        [
            *("--config", "tiny_moe", "--model.router_groups", "8"),
            *("--model.router_top_groups", "1"),
        ],
        ["model.router_top_groups=1", "model.experts_per_token=2", "raise it"],
    ),
    (
        ["--config", "digits_convnet", "--mesh.pipeline", "2"],
        ["mesh.pipeline=2", "set mesh.pipeline to 1"],
    ),
    (
        [
            *("--model.width=48", "--model.num_heads=6", "--model.num_kv_heads=6"),
            "--mesh.tensor=4",
        ],
        ["model.num_heads=6 does not divide over mesh axis 'tensor' of size 4"],
    ),
    (
        ["--model.width=64", "--model.head_dim=16", "--mesh.fsdp=5"],
        ["model.width=64", "'fsdp' of size 5", "set mesh.fsdp to a divisor of 64"],
    ),
    (
        [
            *("--model.width=64", "--model.head_dim=16", "--mesh.fsdp=32"),
            "--train.batch_size=16",
        ],
        ["train.batch_size=16", "a multiple of 32"],
    ),
    (
        ["--mesh.fsdp", "16", "--runtime.cpu_devices", "8"],
        ["mesh.fsdp=16 takes 16 devices of 8", "set mesh.fsdp", "divides 8"],
    ),
    (
        ["--mesh.data", "2", "--mesh.tensor", "2", "--runtime.devices", "8"],
        ["mesh.data=2 x mesh.tensor=2 takes 4 devices of 8", "-1 to take the rest"],
    ),
    (
        ["--runtime.cpu_devices", "4", "--runtime.devices", "8"],
        ["runtime.devices=8", "set runtime.devices to 4"],
    ),
    (["--mesh.slices", "3", "--mesh.data", "4"], ["mesh.slices=3", "multiple of 3"]),
    # Processes
    (["--runtime.num_processes", "2"], ["runtime.num_processes=2", "host:port"]),
    (["--runtime.process_id", "1"], ["runtime.process_id=1", "count from 0"]),
    (["--runtime.coordinator", "a:1"], ["'a:1'", "set runtime.num_processes"]),
    (
        ["--runtime.num_processes=2", "--runtime.coordinator=here"],
        ["runtime.coordinator='here'", "host:port"],
    ),
    # Paths
    (["--data.path", "shakespere"], ["'shakespere'", "did you mean shakespeare?"]),
    (["--data.path", "configs/tini.py"], ["is not there", "configs/tiny.py?"]),
    (["--data.tokenizer", "bite"], ["data.tokenizer='bite'", "did you mean byte?"]),
    (["--data.tokenizer", "configs/tini.py"], ["is not there", "configs/tiny.py?"]),
    (["--data.bos", "sometimes"], ["data.bos", "always"]),
    (["--run.dir", "ftp://bucket/run"], ["run.dir=ftp://...", "gs://bucket/"]),
    (
        ["--run.dir", "s3://me:secret@bucket/run"],
        ["run.dir=s3://...", "without a user"],
    ),
    (
        ["--run.dir", "gs://bucket/run", "--profile.steps", "2"],
        ["profile.steps=2", "run.dir to a path"],
    ),
    (
        ["--checkpoint.keep_best", "1", "--checkpoint.best_metric", "train/loss"],
        ["checkpoint.best_metric='train/loss'", "eval/loss"],
    ),
    (
        ["--checkpoint.keep_best", "1", "--eval.every", "0"],
        ["checkpoint.keep_best=1", "eval.every to train.save_every"],
    ),
    (["--run.dir", "configs/tiny.py/x"], ["run.dir=", "tiny.py' is a file"]),
    (["--eval.sets.held_out", "configs"], ["eval.sets.held_out", "another name"]),
    (["--eval.sets.A-b", "configs"], ["eval.sets.A-b", "a-z, 0-9 and _"]),
    (["--eval.sets.bible", "gone"], ["eval.sets.bible='gone'", "is not there"]),
    (["--name", "../up"], ["name='../up'", "letters"]),
]
