"""Eight simulated CPU devices for every test, set before jax is first imported.

Tests compile hundreds of small programs and run each a few times, so the compiler's
late passes are left out; the scripts that tests start have them.
"""

import os
import signal

# The processes of pytest-xdist ignore it, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
