"""What keeps a run alive, or ends it with a code that says why.

| file | subject |
|---|---|
| `exitcodes` | the codes that a run ends with, and what to do about each |
| `ownership` | one run folder, one live run: owner records and fencing numbers |
| `preemption` | SIGTERM and SIGINT as a request to stop after the running step |

None of these imports jax.
"""
