"""A worker that is killed at its second part; the first part of all is made."""

import os
import signal

from jaxinfra.data import parts

make = parts._make


def make_and_die(part, path, recipe):
    if part[0].start == 0:
        make(part, path, recipe)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
