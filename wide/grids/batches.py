"""How a step is made up of batches, where one run may be shared by several processes."""

from wide import UserError
from wide.options import StepOptions
from wide.runs.folder import RunFolder


def batches_of_a_step(step: StepOptions, batch_size: int, processes: int) -> tuple[int, int]:
    """The size of a batch that is normalised by itself, and how many of them make a step.

    Every process has batches of its own, unless normalisation is synchronised: then theirs are parts of one.

    Raises:
        UserError: they cannot be shared out evenly.
    """
    if step.synchronised:
        if step.batches is not None:
            raise UserError("with --sync-normalisation a step is one batch; leave out --batches-per-step")
        return batch_size * processes, 1
    batches = step.batches or processes
    if batches % processes:
        raise UserError(f"--batches-per-step {batches} is no multiple of the {processes} processes; choose one that is")
    return batch_size, batches


def require_same_batches(step: StepOptions, folders: list[RunFolder]) -> None:
    """Raise UserError for a run that was begun with another number of batches per step, unless this one was asked for.

    Else a run that goes on with another number of processes would silently start anew.
    """
    if step.batches is not None or step.synchronised:
        return
    for folder in folders:
        others = [o for o in folder.begun_with_other_batches() if o.batch_size == folder.run.batch_size]
        for other in others:
            raise UserError(
                f"{other.name} was begun with {other.batches} batches per step, but here are {folder.run.batches}, one "
                f"per process; go on with --batches-per-step {other.batches}, or start anew with "
                f"--batches-per-step {folder.run.batches}"
            )


def note_other_batches(folders: list[RunFolder]) -> None:
    """Say which runs were begun with other batches and would be left alone."""
    for folder in folders:
        for other in folder.begun_with_other_batches():
            print(f"note: {other.name} was begun; this command makes {folder.run.name}", flush=True)
