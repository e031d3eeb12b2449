"""From a checked config to a running process: devices, processes, compile cache, codes.

The only module that touches process-wide state: environment variables before jax loads,
`jax.distributed`, jax's compile cache. Every way out has an exit code.
"""

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jaxinfra
from jaxinfra import checks, runfolder
from jaxinfra.config import Config, ConfigError, DataError
from jaxinfra.resilience import exitcodes

# A full or failing disk; saves meet them too, and tell them as SaveError.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run(config: Config, get_task: Callable[..., Any] | None = None) -> int:
    """Trains `config`, on the task that `get_task` makes or on text, in this process;
    returns an exit code of `exitcodes`.

    Raises ConfigError and DataError for input that cannot work.
    """
    local_id = None
    if config.runtime.discover and (job := jaxinfra.find_job(os.environ)):
        config, local_id = jaxinfra.with_job(config, job), job.local_id
        checks.check(config)  # the mesh again: now the processes are known
    prepare_process(config)
    from jaxinfra import experiment
    from jaxinfra.checkpoint.commits import IncompatibleCheckpoint, NoUsableCheckpoint
    from jaxinfra.resilience.ownership import FolderOwned

    try:
        start_jax(config, local_id)
        with _job(config):
            config, source = _begin(config)
            return experiment.train(config, get_task, source)
    except (ConfigError, DataError):
        raise
    except FolderOwned as error:
        return _ended(exitcodes.FOLDER_OWNED, error)
    except NoUsableCheckpoint as error:
        return _ended(exitcodes.NO_USABLE_CHECKPOINT, error)
    except IncompatibleCheckpoint as error:
        return _ended(exitcodes.INPUT, error)
    except Exception as error:  # the one place that turns a bug into its code
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return _ended(exitcodes.SAVE_FAILED, error)
        traceback.print_exc()
        is_peer = config.runtime.num_processes > 1 and "Gloo" in str(error)
        return exitcodes.PEER_LOST if is_peer else exitcodes.BUG


def prepare_process(config: Config) -> None:
    """Sets what must stand in the environment before jax is imported."""
    logging.basicConfig(format="%(name)s: %(message)s")
    if config.runtime.cpu_devices:
        count = f"--xla_force_host_platform_device_count={config.runtime.cpu_devices}"
        flags = os.environ.get("XLA_FLAGS", "").split()
        kept = [f for f in flags if not f.startswith(count.partition("=")[0])]
        os.environ["XLA_FLAGS"] = " ".join([*kept, count])
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA makes as many threads as cores or devices, and a collective holds one for
        # each device: with 2 devices on 2 cores no thread was left for the work that
        # the second waited for, and the run ended in XLA's rendezvous time-out.
        threads = max(os.cpu_count() or 1, 4 * config.runtime.cpu_devices)
        os.environ.setdefault("NPROC", str(threads))


def start_jax(config: Config, local_id: int | None = None) -> None:
    """Where compiled programs are kept, and the other processes, once jax is there.

    `local_id`: this process's number on a host whose accelerators it shares out; each
    process then takes one.
    """
    import jax

    runtime = config.runtime
    if runtime.compile_cache:
        cache_dir = runfolder.cache_dir(config)
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if runtime.num_processes > 1:
        jax.distributed.initialize(
            runtime.coordinator,
            runtime.num_processes,
            runtime.process_id,
            local_device_ids=None if runtime.cpu_devices else local_id,
            cluster_detection_method="deactivate",
            # `watched` comes first, with a code of ours: jax ends a process by SIGABRT.
            heartbeat_timeout_seconds=60,
        )


def _begin(config: Config) -> tuple[Config, Any]:
    """The config with the model that init.model takes, and where the first parameters
    come from: None where they are random, or the run has saved them all."""
    if not config.init.from_:
        return config, None
    old = jaxinfra.begun(config) if runfolder.has_checkpoint(config) else None
    if old and not (config.lora.rank or config.train.freeze):
        return jaxinfra.as_begun(config, old), None
    # By its public name, which loads the module: a plain run needs none of it.
    source = jaxinfra.open_source(config.init.from_)
    if old:
        return jaxinfra.as_begun(config, old), source
    return (source.adopt(config) if config.init.model else config), source


@contextlib.contextmanager
def _job(config: Config) -> Iterator[None]:
    """Within it the processes listen to each other; they leave it together, since the
    first one's end would be an error to those that are not done."""
    if config.runtime.num_processes == 1:
        yield
        return
    import jax

    from jaxinfra.checkpoint import commits, processes
    from jaxinfra.resilience.ownership import FolderOwned

    agreed = (FolderOwned, commits.NoUsableCheckpoint, commits.IncompatibleCheckpoint)
    group = processes.this_job()
    try:
        # By its public name, which loads the module: one process needs none of it.
        with jaxinfra.watched(group.store, group.rank):
            yield
    except agreed:  # raised in all processes alike
        jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()


def _ended(code: int, error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
