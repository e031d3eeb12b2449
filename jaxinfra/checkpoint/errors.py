"""What can go wrong with a checkpoint, by name; `resilience.exitcodes` has the
codes."""


class CheckpointError(Exception):
    """A checkpoint is damaged or not there; a restore walks back one step."""


class IncompatibleCheckpoint(CheckpointError):
    """A sound checkpoint of another model, or format: walking back cannot help."""


class NoUsableCheckpoint(CheckpointError):
    """There are checkpoints and none validates: the run must not start at 0."""


class SaveError(Exception):
    """A save behind the training loop failed; every process raises the same text."""
