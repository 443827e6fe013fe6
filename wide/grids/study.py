"""An experiment of a subject, as it is asked for here: its runs, their data, and where its report goes."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from wide import UserError
from wide.grids.batches import batches_of_a_step
from wide.grids.experiments import Experiment, Subject, beside
from wide.models.rules import RULES
from wide.options import PAPER_SEED, Options
from wide.reports.shown import Shown
from wide.runs.folder import RunFolder
from wide.runs.run import Run, effective_batch
from wide.training.devices import (
    choose_algorithms,
    choose_compiler,
    choose_device,
    choose_precision,
    device_name,
)
from wide.training.gaps import Gaps
from wide.training.processes import ALONE, Processes, join
from wide.training.recorders import AlignmentScores, Angles, Changes, KeptParameters, Recorder
from wide.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where runs are computed: on which device, how precisely, and by which processes together."""

    device: torch.device
    precision: str
    processes: Processes = ALONE

    @classmethod
    def chosen(cls, options: Options) -> "Machine":
        """
        Raises:
            UserError: what is asked for is not here.
        """
        alone = cls.alone(options)
        return dataclasses.replace(alone, processes=join(alone.device))

    @classmethod
    def alone(cls, options: Options) -> "Machine":
        """Of this process alone, whatever others the environment speaks of; raises as `chosen` does."""
        choose_algorithms(options.deterministic)
        device = choose_device(options.device)
        choose_compiler(options.compile, device)
        if options.threads:
            torch.set_num_threads(options.threads)
        return cls(device, choose_precision(options.precision, device))


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment of a subject, as it is asked for here.

    Args:
        experiment: with what the options replace in it.
        compared: another experiment, whose finished runs are shown beside.
    """

    subject: Subject
    experiment: Experiment
    compared: Experiment | None
    options: Options
    machine: Machine

    @classmethod
    def of(cls, subject: Subject, experiments: Mapping[int, Experiment], options: Options, machine: Machine) -> "Study":
        """The experiment that the options choose.

        Raises:
            UserError: the processes cannot train it together.
        """
        subject = subject.chosen(options.quick)
        experiment = experiments[options.experiment].chosen(options)
        compared = beside(experiments, experiment) if experiment.beside else None
        study = cls(subject, experiment, compared, options, machine)
        count = machine.processes.count
        if count > 1 and not subject.distributed:
            raise UserError("a run is trained by one process here; started several times, the command shares out runs")
        if options.record.angles and (count > 1 or (options.step.batches or 1) > 1):
            raise UserError("--log-alignment needs one process and one batch per step")
        return study

    @property
    def epochs(self) -> int:
        return self.experiment.epochs

    @property
    def processes(self) -> Processes:
        return self.machine.processes

    @property
    def outputs(self) -> Path:
        """The folder of the subject's runs and reports."""
        return self.options.outputs / self.subject.dataset

    @functools.cached_property
    def runs(self) -> list[Run]:
        """In an order that fills the table evenly: all rules at the smallest width first.

        Raises:
            UserError: a rule that is not defined for the kind of network; batches that cannot be shared out.
        """
        return self._runs_of(self.experiment)

    @functools.cached_property
    def folders(self) -> list[RunFolder]:
        """Of the runs."""
        return [RunFolder(self.options.outputs, run) for run in self.runs]

    @functools.cached_property
    def compared_folders(self) -> list[RunFolder]:
        """Of runs that the report shows beside, where they are done."""
        runs = self._runs_of(self.compared) if self.compared else []
        return [RunFolder(self.options.outputs, run) for run in runs if run not in self.runs]

    @functools.cached_property
    def shown(self) -> Shown:
        """What the report is handed."""
        subject = self.subject
        return Shown(
            path=self.outputs / f"{subject.stem}_{self.options.experiment}",
            title=f"{subject.title}: {self.experiment.title}",
            epochs=self.epochs,
            folders=self.folders,
            compared_folders=self.compared_folders,
            view=self.experiment.view,
            metrics=self.experiment.metrics or subject.metrics,
            references=functools.partial(subject.references, self.options.data),
            examples=subject.examples,
            image_size=subject.image_size,
            strides=subject.strides,
            record=self.options.record,
        )

    def task(self) -> Task:
        """Read the data.

        Raises:
            UserError: they are missing or damaged.
        """
        return self.subject.task(self.options.data, self.machine.device)

    def on_the_processor(self) -> "Study":
        """The same runs, where data are only looked at, and take no memory of a GPU."""
        return dataclasses.replace(self, machine=dataclasses.replace(self.machine, device=torch.device("cpu")))

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """Those whose parameters are kept."""
        record = self.options.record
        keep = self.experiment.keep if record.keep is None else record.keep
        if record.shuffle_seed != PAPER_SEED:  # controls in metrics.csv are of the published seed
            keep = tuple(sorted({0, *keep, *self.experiment.report.scored_epochs(self.shown)}))
        return keep

    def recorders(self) -> list[Recorder]:
        """What is recorded beside the metrics of one run, which they belong to."""
        record, found = self.options.record, []
        if record.angles or self.experiment.logged:
            found += [Angles(), Changes()]
        if self.subject.scored:
            found.append(AlignmentScores(self.subject.image_size, record.score_epochs))
        if self.experiment.compared:
            found.append(Gaps(self.experiment.compared))
        if self.kept_epochs:
            found.append(KeptParameters(self.kept_epochs))
        return found

    def _runs_of(self, grid: Experiment) -> list[Run]:
        axes = (grid.widths, grid.data_limits, grid.seeds, grid.learning_rates, grid.rules)
        return list(dict.fromkeys(self._run(grid, place) for place in itertools.product(*axes)))

    def _run(self, grid: Experiment, place: tuple) -> Run:
        """The run of a grid at (width, data limit, seed, learning rate, rule)."""
        width, limit, seed, learning_rate, rule = place
        network = self.options.network or grid.network or self.subject.networks[0]
        if reason := RULES[rule].unsuited.get(network):
            raise UserError(f"--rules {rule}: {reason}")
        limit = None if limit and limit >= self.subject.examples else limit  # the same run as with all images
        size = grid.batch_size or self.subject.batch_size
        settings = dict(RULES[rule].settings)
        if self.options.step.decay is not None:
            settings["decay"] = self.options.step.decay
        size, batches = batches_of_a_step(self.options.step, size, self.processes.count)
        return Run(
            dataset=self.subject.dataset,
            network=network,
            rule=rule,
            width=width,
            learning_rate=learning_rate,
            seed=seed,
            batch_size=effective_batch(size, limit),
            batches=batches,
            data_limit=limit,
            optimizer=grid.optimizer,
            parameterisation=grid.parameterisation,
            variant=self.options.data.variant,
            precision=self.machine.precision,
            timed_on=device_name(self.machine.device) if grid.timed else None,
            centred=self.options.step.centred,
            **settings,
        )
