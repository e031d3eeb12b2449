"""`scripts/plan.py`: what it prints, and what it refuses."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from jaxinfra import options
from jaxinfra.plan import compilers, targets

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = {
    "tiny": "v5e:1x1",
    "tiny_moe": "v6e:1x1",
    "shakespeare_char": "h100:1x1",
    "smollm2_135m": "v6e:2x4",
    "gpt2_124m": "h100:1x8",
    "llama3_8b": "v5p:2x2x2",
    "llama3_70b": "v5p:4x4x4",
    "llama3_405b": "v5p:8x8x16",
    "mixtral_8x7b": "v5p:4x4x4",
}
SMALL = (
    "--model.width", "128", "--model.ffn_width", "256", "--model.repeats", "2",
    "--model.vocab_size", "512", "--train.length", "256", "--train.batch_size", "8",
    "--precision", "bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "plan_script", ROOT / "scripts/plan.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def main(script):
    return script.main


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_planned_by_arithmetic(name, main, capsys):
    argv = ["--config", name, "--target", SHIPPED[name], "--analytic", "--json"]
    assert main(argv) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["hbm_bytes"] == targets.parse(SHIPPED[name]).chip.hbm_bytes
    whole = memory["arguments_bytes"] + memory["temporary_bytes"]
    assert memory["peak_bytes"] == whole
    assert 0 < memory["parameters_bytes"] < memory["arguments_bytes"]


def test_the_mesh_of_the_command_line_is_the_mesh_of_the_plan(main, capsys):
    argv = ["--config", "llama3_8b", "--target", "v6e:4x4", "--analytic"]
    assert main([*argv, "--mesh.fsdp", "4", "--mesh.tensor", "4"]) == 0
    assert "16 devices (fsdp 4 x tensor 4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--target", "v5q:2x2x2"], "did you mean v5p"),
        (["--target", "v5p:2x2x2", "--mesh.data", "4"], "takes 4 devices of 8"),
        (["--target", "v5p:2x2x2", "--mesh.fdsp", "8"], "did you mean --mesh.fsdp"),
        (["--target", "v5p:2x2x2", "--config", "lama"], "unknown config"),
        (["--target", "v5p:2x2x2", "--analytic", "--dump-hlo", "d"], "leave one of"),
    ],
)
def test_a_wrong_request_ends_with_code_2_before_jax_loads(argv, words):
    code = f"""
import sys
sys.argv = ["plan.py", *{argv!r}]
sys.path.insert(0, {str(ROOT / "scripts")!r})
import plan
code = plan.main()
assert "jax" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_compiler_that_is_not_there_is_told_with_its_extra(main, capsys, monkeypatch):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    for target, extra in (("v5p:2x2x2", "tpu"), ("h100:1x8", "cuda")):
        assert main(["--config", "llama3_8b", "--target", target]) == 2
        assert f"pip install 'jaxinfra[{extra}]'" in capsys.readouterr().err


def test_arithmetic_outside_its_limits_says_so(main, capsys):
    argv = ["--config", "tiny_moe", "--target", "v6e:1x1", "--analytic"]
    assert main(argv) == 0
    assert "limits: a model with experts" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["limits"]) == 1
    assert main(["--config", "tiny", *argv[2:]]) == 0
    assert "limits" not in capsys.readouterr().out


def test_programs_of_other_options_go_into_other_files(script):
    target = targets.parse("v5e:2x4")

    def name(*words):
        argv = ["--config", "tiny", *words, "--runtime.devices", "8"]
        config, _ = options.read_command(argv)
        return script.dump_name(config, target, {"fsdp": 8})

    assert name().startswith("tiny-v5e-2x4-fsdp8-none-")
    assert name("--train.remat", "save:key").startswith("tiny-v5e-2x4-fsdp8-save-key-")
    assert len({name(), name("--mesh.fsdp", "8"), name("--optimizer.beta1", ".8")}) == 3
    assert name() == name()


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_step_that_does_not_fit_ends_with_code_2_after_what_is_known(
    how, main, capsys, monkeypatch
):
    import jax

    def refuse(*asked):
        raise compilers.DoesNotFit(2**40)

    monkeypatch.setattr(compilers, "prepare_process", lambda target: None)
    monkeypatch.setattr(compilers, "devices", lambda target: jax.devices())
    monkeypatch.setattr(compilers, "versions", lambda target: {})
    monkeypatch.setattr(compilers, "compile_step", refuse)
    argv = ["--config", "tiny", "--target", "v5e:2x4", *SMALL, "--mesh.fsdp", "8"]
    assert main([*argv, *how]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: the step needs 1099.51 GB of each v5e, which has")
    assert err.count("\n") == 1
    for key in ("train.remat", "train.microbatches", "mesh.fsdp"):
        assert key in err
    if not how:
        assert "does not fit" in out
        assert "there is no word of" in out
        return
    found = json.loads(out)
    memory = found["memory"]
    assert memory["peak_bytes"] == 2**40
    assert memory["headroom_bytes"] == memory["hbm_bytes"] - 2**40 < 0
    at_rest = memory["analytic_arguments_bytes"]
    assert memory["analytic_peak_bytes"] > at_rest > memory["parameters_bytes"]
    assert found["compute"]["model_flops"] > 0
    assert "time of the step" in found["missing"]
    assert not {"wire", "step_secs", "mfu"} & {*found}


@pytest.mark.slow
def test_a_tpus_compiler_refuses_what_does_not_fit():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    argv = ["--config", "tiny", "--target", "v5e:1x1", "--train.length", "1024"]
    argv += ["--train.batch_size", "8192", "--model.repeats", "6"]
    argv += ["--precision", "bfloat16", "--train.remat", "none", "--json"]
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["peak_bytes"] > 10 * memory["hbm_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "package"), [("v5e:2x4", "libtpu"), ("h100:1x8", "jax_cuda13_plugin")]
)
def test_a_step_goes_through_the_compiler_of_absent_hardware(target, package, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    argv = ["--config", "tiny", "--target", target, *SMALL, "--mesh.fsdp", "8"]
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *argv, "--json", "--dump-hlo", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    memory, compute = found["memory"], found["compute"]
    assert memory["arguments_bytes"] > memory["parameters_bytes"]
    assert memory["peak_bytes"] < memory["hbm_bytes"]
    assert compute["hardware_flops"] >= 0.95 * compute["model_flops"] > 0
    assert compute["unknown_loops"] == 0
    assert ((compute["cycles"] or 0) > 0) == target.startswith("v5e")
    assert {wire["axes"] for wire in found["wire"]} <= {"fsdp"}
    assert 0 < found["mfu"] <= found["hfu"] < 1
    assert len(list(tmp_path.glob("*.hlo"))) == 1
