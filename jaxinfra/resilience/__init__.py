"""What keeps a run alive, or ends it with a code that says why.

| file | subject |
|---|---|
| `exitcodes` | the codes that a run ends with, and what to do about each |
| `ownership` | one run folder, one live run: owner records and fencing numbers |
| `preemption`, `peers` | a request to stop, the loss of another process |

None of these imports jax.
"""
