"""Runs side by side: every run that a grid lacks is a task of Ray, on a core or a GPU of this machine or of a cluster.

Ray places runs and does nothing else. The truth is in outputs/: whoever trains a run holds its folder, and the rows
there tell the driver how far it is. So several drivers can share a grid, and a run whose worker died goes on from its
checkpoint, wherever it is placed then.
"""

import dataclasses

from wide import UserError
from wide.grids.cluster import cluster, import_ray
from wide.grids.driver import Driver
from wide.grids.one_run import Failures, first_line, say
from wide.grids.pace import Pace, makespan
from wide.grids.study import Study
from wide.runs.folder import RunFolder


def train_side_by_side(study: Study, missing: list[RunFolder], pace: Pace) -> Failures:
    """Train these runs on whatever cores or GPUs there are. Ctrl-C and SIGTERM end the workers, too.

    Raises:
        UserError: no cluster answers, none of its machines has what a run needs, or one does not see the same files.
    """
    ray = import_ray()
    try:
        with cluster(ray, elsewhere(study)) as places:
            folders = in_order(missing, pace, places.slots())
            say(f"{places}{'; widest first' if folders != missing else ''}")
            with Driver(places, folders, pace) as driver:
                return driver.work()
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray gave up ({first_line(error)}); the same command goes on") from error


def elsewhere(study: Study) -> Study:
    """The study for processes that work in other folders."""
    options = study.options
    data = dataclasses.replace(options.data, folder=options.data.folder.absolute())
    options = dataclasses.replace(options, outputs=options.outputs.absolute(), data=data)
    return dataclasses.replace(study, options=options)


def in_order(missing: list[RunFolder], pace: Pace, slots: int) -> list[RunFolder]:
    """The widest first if that shortens the whole by a twentieth; else as they are, which fills the table evenly."""
    widest_first = sorted(missing, key=lambda folder: -folder.run.width)
    as_they_are, other = (makespan([pace.left([f]) for f in order], slots) for order in (missing, widest_first))
    return widest_first if other < 0.95 * as_they_are else missing
