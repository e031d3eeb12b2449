"""A worker that is killed at its second part; the first part of all is made."""

import os
import signal

from jaxinfra.data import parts

make = parts._make


def make_and_die(part, path, recipe, run):
    if part[0].start == 0:
        make(part, path, recipe, run)
    else:
        path.with_name(f".{path.name}.{run}.tmp").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def die(texts):
    os.kill(os.getpid(), signal.SIGKILL)
