"""Exit codes of a run: what a supervisor reads when nobody looks at the log.

| code | name | meaning | what helps |
|---|---|---|---|
| 0 | DONE | the last step is saved | - |
| 1 | BUG | an error of ours, with a traceback | report it |
| 2 | INPUT | a config, path or data set that cannot work | the error says what |
| 10 | PREEMPTED | asked to stop, stopped after a committed save | the same command |
| 11 | DIVERGED | losses or gradients not finite too often | look at the events |
| 12 | NO_USABLE_CHECKPOINT | there are checkpoints, none validates | put one back |
| 13 | HANG | no step within the limit | the same command |
| 14 | PEER_LOST | another process died or stopped | the same command |
| 15 | SAVE_FAILED | the last save is not committed | free the disk, again |
| 16 | FOLDER_OWNED | another live run has the folder | wait for it, or end it |

`is_retriable` is the rule for a restart without a human.
"""

DONE = 0
BUG = 1
INPUT = 2
PREEMPTED = 10
DIVERGED = 11
NO_USABLE_CHECKPOINT = 12
HANG = 13
PEER_LOST = 14
SAVE_FAILED = 15
FOLDER_OWNED = 16


def is_retriable(code: int) -> bool:
    """Whether the same command may just be started again; a signal's death counts."""
    return code in (PREEMPTED, HANG, PEER_LOST, SAVE_FAILED) or code < 0 or code >= 128
