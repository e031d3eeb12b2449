"""Training on several data sets by weights, with a batch that rises, through a crash;
and on data that is damaged."""

import json
import signal

import numpy as np
import pytest
from e2e import command

from jaxinfra.data import prepare as preparation
from jaxinfra.data import shards

OPTIONS = {"tokenizer": "byte", "split": "documents", "held_out": 0.1, "seed": 0}
STEPS = 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Options for two data sets: letters laid out by best fit, and digits."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    found = {}
    for name, signs in {"letters": "abcdefgh ", "digits": "0123456789 "}.items():
        texts = ["".join(rng.choice(list(signs), n)) for n in rng.integers(5, 90, 150)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        is_fit = name == "letters"
        layout = shards.Layout("best_fit", 32) if is_fit else shards.CONCAT
        preparation.prepare([file], folder / name, layout=layout, **OPTIONS)
        found[f"data.sets.{name}"] = folder / name
    return found | {
        "data.weights.letters": "0.75 0.25@12",
        "data.weights.digits": "0.25 0.75@12",
        "train.batch_ramp": "4 8@6",
        "train.steps": STEPS,
        "eval.every": STEPS,
    }


@pytest.fixture(scope="module")
def quiet_mixed(sets, cache, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("mixed") / "run"
    done = command.train(cache | sets | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
def test_weights_and_batches_change_at_their_steps(quiet_mixed):
    metrics = command.metrics(quiet_mixed)
    tokens = [line["train/tokens"] for line in metrics]
    assert max(tokens[:6]) <= 4 * 32 < 5 * 32 < min(tokens[6:])
    # Rows of best fit are filled up, rows of concat are not.
    padding = [line["data/padding_frac"] for line in metrics]
    assert 0 < np.mean(padding[12:]) < np.mean(padding[:12]) < 0.1
    last = metrics[-1]
    names = ("held_out_letters", "held_out_digits")
    losses = [last[f"eval/{name}/loss"] for name in names]
    weights = [last[f"eval/{name}/tokens"] for name in names]
    mean = np.average(losses, weights=weights)
    assert last["eval/loss"] == pytest.approx(mean, abs=1e-12)


@pytest.mark.slow
def test_a_killed_mixture_goes_on_to_the_bit(quiet_mixed, sets, cache, tmp_path):
    run_dir = tmp_path / "run"
    settings = cache | sets | {"run.dir": run_dir}
    for count in (4, 15):
        process = command.start(settings)
        command.freeze_when(
            process, lambda count=count: command.steps_done(run_dir) >= count
        )
        assert command.end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    assert command.history(run_dir) == command.history(quiet_mixed)


@pytest.mark.slow
def test_no_sample_is_missing_or_repeated_after_twenty_kills(
    quiet_mixed, sets, cache, tmp_path
):
    run_dir, rng = tmp_path / "run", np.random.default_rng(1)
    settings = cache | sets | {"run.dir": run_dir, "train.save_every": 2}
    resumed = []
    for number in range(20):
        resumed.append(max(command.saved_steps(run_dir), default=0))
        # Most are killed before they save anything, some after they did.
        last = min(resumed[-1] + int(rng.integers(1, 4)), STEPS - 1)
        is_to_save = number % 4 == 0 and last < STEPS // 2

        def is_time(saved=resumed[-1], last=last, is_to_save=is_to_save):
            if is_to_save:
                return max(command.saved_steps(run_dir), default=0) > saved
            return command.steps_done(run_dir) >= last

        process = command.start(settings)
        command.freeze_when(process, is_time)
        assert command.end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(set(resumed)) >= 2  # resumed from several places,
    assert len(resumed) > 3 * len(set(resumed))  # from some of them again and again
    done = command.train(settings)
    assert done.returncode == 0, done.stderr
    expected = [line["data/digest"] for line in command.metrics(quiet_mixed)]
    assert len(set(expected)) == STEPS  # a digest is of one batch and no other
    assert [line["data/digest"] for line in command.metrics(run_dir)] == expected
    assert command.history(run_dir) == command.history(quiet_mixed)


def test_changed_weights_are_refused_on_resume(quiet_mixed, sets, cache, tmp_path):
    run_dir = command.copy_as_of(15, quiet_mixed, tmp_path / "run")
    changed = {"data.weights.letters": "0.5", "run.dir": run_dir}
    done = command.train(cache | sets | changed)
    assert done.returncode == 2
    assert "data.weights.letters: '0.75 0.25@12' -> '0.5'" in done.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data.sets.letters": "none"}, "data.sets.letters='none' is not there"),
        ({"data.weights.latin": "1"}, "give each set a weight, or none at all"),
        ({"train.batch_ramp": "4 6@3"}, "ends with 6 rows and train.batch_size=8"),
        ({"train.batch_ramp": "3 8@3", "train.microbatches": 2}, "train.batch_ramp=3"),
        ({"train.length": 16}, "laid out by best_fit for rows of 32 tokens"),
        ({"data.path": "none"}, "data.path='none' and data.sets are both given"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sets, cache, tmp_path, changed, message):
    run_dir = tmp_path / "run"
    done = command.train(cache | sets | {"run.dir": run_dir} | changed)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()


def test_sets_of_two_vocabularies_are_refused(sets, cache, tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "characters"
    file.write_text("to be or not to be. " * 200)
    options = OPTIONS | {"split": "tail", "tokenizer": "char"}
    preparation.prepare([file], folder, **options)
    mixed = {k: v for k, v in sets.items() if "weights" not in k}
    mixed |= {"data.sets.characters": folder, "run.dir": tmp_path / "run"}
    done = command.train(cache | mixed)
    assert done.returncode == 2, done.stderr
    assert f"data.sets.characters={folder} has another tokenizer than" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_damaged_data_ends_the_run_or_is_logged(sets, cache, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("to be or not to be. " * 2_000)
    folder = tmp_path / "set"
    preparation.prepare([file], folder, **OPTIONS | {"split": "tail"})
    tokens = folder / "train-00000.tokens.npy"
    data = bytearray(tokens.read_bytes())
    data[-5] ^= 1
    tokens.write_bytes(data)
    settings = cache | {"data.path": folder, "train.steps": 3, "eval.every": 0}
    done = command.train(settings | {"run.dir": tmp_path / "stop"})
    assert done.returncode == 2
    assert "train-00000.tokens.npy has checksum" in done.stderr
    run_dir = tmp_path / "on"
    quarantine = {"run.dir": run_dir, "data.damaged": "quarantine"}
    done = command.train(settings | quarantine)
    assert done.returncode == 0, done.stderr
    [event] = command.events(run_dir, "quarantine")
    assert "train-00000.tokens.npy is damaged between bytes 0 and" in event["reason"]
    assert event["reason"] in done.stderr
    assert {line["data/padding_frac"] for line in command.metrics(run_dir)} == {1.0}
