"""The driver of a sweep: checks everything, runs the trials, lets the winners meet the test set, writes it all down."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bootvit.addresses import public
from bootvit.config import Config, override
from bootvit.errors import RunFailed, UserError
from bootvit.heartbeat import Heartbeat, check_nobody_writes
from bootvit.remote import TakenOver
from bootvit.runs import claim
from bootvit.storage import Store
from bootvit.tracking import check_tracking
from bootvit.tracking.link import charts
from tune.decide.budget import Budget, Spent
from tune.decide.conductor import Conductor
from tune.decide.log import ENDED, Log, Trial, read_events
from tune.decide.search import make_source
from tune.decide.stopping import Stopper
from tune.run.capacity import Room, actor_resources, check_resources, start_ray
from tune.run.data import check_data, plan
from tune.run.folder import check_folder, claim_folder, read_state
from tune.run.job import Job
from tune.run.kept import SweepFolder, open_folder
from tune.run.recording import Recording
from tune.run.tune_searchers import check_searcher, searcher_of
from tune.run.winners import TEST_LOG, Tests
from tune.spec.load import load_sweep
from tune.spec.schema import Sweep
from tune.spec.space import check_space, metric_of, trial_config
from tune.tell.dry_run import describe_plan
from tune.tell.record import Document

if TYPE_CHECKING:
    from ray.tune import ResultGrid


class How(NamedTuple):
    """How a sweep is to be begun or gone on with."""

    resume: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    take_over: bool = False  # also from a driver that is alive
    callbacks: Sequence[Any] = ()  # of Tune's, beside those that the file names


AS_NEW = How()


def run_sweep(name: str, overrides: Sequence[str] = (), how: How = AS_NEW, *, dry_run: bool = False) -> int:
    """Run a sweep to its end; 0 if every trial ended as intended, 1 if one failed for good.

    Raises `UserError` before anything starts, for whatever in the file or on the cluster cannot work.
    """
    sweep, configs = checked(name, overrides)
    if dry_run:
        print(describe_plan(sweep, plan(configs)))
        return 0
    epochs = max(config.schedule.epochs for config in configs)
    del configs  # one for every trial, and not needed while they run
    if check_folder(sweep, resume=how.resume, overwrite=how.overwrite, retry_failed=how.retry_failed) == "finished":
        print(f"{sweep.place} is finished; nothing to do")
        Driver(*open_folder(sweep, anew=False), epochs, how).catch_up()
    else:
        run(sweep, epochs, how)
    return exit_status(read_state(sweep.place))


def sweep(
    name: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    retry_failed: bool = False,
    take_over: bool = False,
    callbacks: Sequence[Any] = (),
) -> ResultGrid:
    """Run a sweep to its end, as `bootvit sweep` does, and return Tune's results: one for every trial that was begun.

    `callbacks` are Ray Tune's. The connection to Ray is left as it was found.
    """
    found, configs = checked(name, overrides)
    epochs = max(config.schedule.epochs for config in configs)
    return run(found, epochs, How(resume, overwrite, retry_failed, take_over, callbacks))


def checked(name: str, overrides: Sequence[str]) -> tuple[Sweep, list[Config]]:
    """A sweep file with the configs that it leads to, all of which can run."""
    sweep = load_sweep(name, overrides)
    check_tracking(sweep.base)
    configs = check_space(sweep)
    check_resources(sweep)
    check_data(sweep, configs)
    if find_spec("optuna") is None and sweep.file.algorithm == "optuna":
        raise UserError("Optuna is not installed: pip install 'bootvit[ray]'")
    check_searcher(sweep)
    return sweep, configs


def run(sweep: Sweep, epochs: int, how: How) -> ResultGrid:
    """The sweep on Ray; one that is finished gives its results again."""
    state = check_folder(sweep, resume=how.resume, overwrite=how.overwrite, retry_failed=how.retry_failed)
    connected = start_ray(sweep)
    try:
        from tune.run.callbacks import make_callbacks

        callbacks = make_callbacks(sweep, how.callbacks)
        room = Room(sweep)
        if state == "finished":
            return Driver(*open_folder(sweep, anew=False), epochs, how).results(room)
        if (how.resume or how.overwrite or how.retry_failed) and not how.take_over:
            check_nobody_writes(sweep.place)
        sweep, folder = open_folder(sweep, anew=state == "absent")
        claim_folder(sweep, state)
        folder.put(sweep.folder / "sweep.yaml")
        with Heartbeat(sweep.place):
            return Driver(sweep, folder, epochs, how).run(room, callbacks)
    finally:
        if connected:
            stop_ray()


def exit_status(document: Document) -> int:
    """1 if a trial failed for good, or a winner could not be tested."""
    return 1 if document["counts"].get("failed") or document["reason"] else 0


class Driver:
    """One process's work on a sweep, from its log's last event to the end."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, epochs: int, how: How) -> None:
        self._sweep, self._folder, self._how = sweep, folder, how
        self._recording = Recording(sweep, folder, self.config)
        self._tests: Tests | None = None
        self._spent = tests_spent(sweep)
        self._conductor = Conductor(
            sweep,
            Log(events := sweep.folder / "events.jsonl", folder.sender(events)),
            make_source(sweep, searcher_of(sweep)),
            Stopper(sweep, epochs),
            Budget(sweep.file.budget, sweep.gpus, self._spent),
            on_end=self._trial_ended,
            on_copy=self._copy,
        )
        ended = [self.config(trial) for trial in self._conductor.trials.values() if trial.status in ENDED]
        folder.fetch(*map(folder.run_dir, ended))

    def run(self, room: Room, callbacks: Sequence[Any]) -> ResultGrid:
        """Everything; what is left undone by an interruption or an error is on disk, and `--resume` goes on from it."""
        try:
            self._announce(room)
            self._recording.follow("trial", self.config)
            self._conductor.reopen(failed=self._how.retry_failed)
            self._recording.settle_old(self._conductor.trials.values())
            self._write("running")
            grid = self._run_trials(room, callbacks)
            self._run_tests(room)
            self._recording.close()
        except BaseException as err:
            if isinstance(err, TakenOver):  # what is written down is the other one's
                raise
            interrupted = isinstance(err, KeyboardInterrupt)
            print(f"{self._sweep.place}: the same command with --resume goes on", file=sys.stderr)
            try:
                document = self._write("interrupted" if interrupted else "failed", one_line(err))
                self._recording.finish("KILLED" if interrupted else "FAILED", document, [])
            except RunFailed as second:  # the store, of which the first one tells as well
                print(f"bootvit: warning: {second}", file=sys.stderr)
            raise
        document = self._write("finished", self._tests.untested if self._tests else None)
        files = self._recording.report()
        self._recording.finish("FAILED" if exit_status(document) else "FINISHED", document, files)
        self._print_summary()
        return grid

    def results(self, room: Room) -> ResultGrid:
        """A finished sweep's results."""
        return self._run_trials(room, ())

    def catch_up(self) -> None:
        """Send to MLflow what a server that was down has missed of a finished sweep."""
        document = read_state(self._sweep.folder)
        if self._recording.is_complete(document):
            return
        ended = (self._sweep.folder / "sweep.json").stat().st_mtime  # its last word
        self._recording.follow("trial", self.config, goes_on=False)
        self._recording.settle_old(self._conductor.trials.values())
        self._make_tests().begin(goes_on=False)
        files = sorted((self._sweep.folder / "report").glob("*"))
        self._recording.finish("FAILED" if exit_status(document) else "FINISHED", document, files, ended)

    # ------------------------------------------------------------------------------------------- the trials

    def config(self, trial: Trial) -> Config:
        """A trial's whole config: an ordinary run at `trials/<id>/`."""
        config = trial_config(self._sweep, trial.overrides, trial.spec.seed, trial.spec.id)
        workers = config.ray.most
        each = {"cpus_per_worker": self._sweep.cpus / workers, "use_gpu": self._sweep.gpus > 0}
        return override(config, {"ray": each})

    def _run_trials(self, room: Room, callbacks: Sequence[Any]) -> ResultGrid:
        from tune.run.tuner import execute

        work = self._work(room, self._conductor, self._job)
        file = self._sweep.file
        work = work._replace(callbacks=callbacks, table=file.progress == "table")
        return execute(work, self._sweep.folder, "trials")

    def _work(self, room: Room, conductor: Conductor, job: Any) -> Any:
        from tune.run.work import Work

        sweep = self._sweep
        several = sweep.base.ray.most > 1
        retries, timeout = sweep.file.retries, sweep.file.trial_timeout
        return Work(conductor, job, room, actor_resources(sweep), several, retries, timeout)

    def _job(self, trial: Trial) -> Job:
        config = self.config(trial)
        if not isinstance(self._sweep.place, Store):
            claim(config, resume=True, overwrite=False)  # before Tune puts anything there
        self._recording.started(trial)
        metric = metric_of(config, self._sweep.file.select.metric)
        return Job(config.model_dump(mode="json"), metric, "never", self._sweep.cpus, trial.epochs)

    def _trial_ended(self, trial: Trial) -> None:
        self._recording.settle(trial)
        self._write("running")
        self._recording.say_end(trial, self._conductor.trials)

    def _copy(self, member: Trial, donor: Trial, epoch: int) -> None:
        self._folder.copy_member(self.config(member), self.config(donor), epoch)

    # --------------------------------------------------------------------------------------------- the test

    def _make_tests(self) -> Tests:
        self._recording.close()  # nothing may write to a winner's run any more
        self._tests = Tests(self._sweep, self._folder, self._conductor.trials, self.config, self._recording)
        self._tests.on_end = lambda: self._write("running")  # type: ignore[assignment]
        return self._tests

    def _run_tests(self, room: Room) -> None:
        from tune.run.tuner import execute

        tests = self._make_tests()
        print(
            "testing the winners" if tests.chosen else "there is no winner, or no test split to test it on", flush=True
        )
        tests.begin()
        if not tests.left:
            return
        folder = self._sweep.folder
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tune-", ignore_cleanup_errors=True) as storage:
            execute(self._work(room, tests.conductor, tests.job), Path(storage), "tests")

    # ------------------------------------------------------------------------------------------ the records

    def _write(self, status: str, reason: str | None = None) -> Document:
        tests = self._tests.conductor if self._tests else None
        recorder = self._recording.recorder
        recorder.tests_seconds = sum(t.seconds for t in tests.trials.values()) if tests else self._spent.held
        seconds = self._conductor.seconds + self._spent.seconds
        return self._recording.write(self._conductor.trials, status, seconds, reason)

    def _announce(self, room: Room) -> None:
        known = self._conductor.trials.values()
        over = sum(trial.status in ENDED for trial in known)
        rest = f", {over} of {len(known)} trials have ended" if known else ""
        print(f"sweep {self._sweep.file.name}: {room.trials()} trials at a time{rest}; {self._sweep.place}", flush=True)

    def _print_summary(self) -> None:
        from bootvit.report import print_sweep

        print_sweep(self._sweep.folder)
        if self._conductor.budget_note:
            print(f"not all trials were run: {self._conductor.budget_note}")
        if shown := charts(self._sweep.folder):
            print(f"charts: {shown}")


def tests_spent(sweep: Sweep) -> Spent:
    """What earlier drivers have spent on the winners' tests; it counts in the budget."""
    events = list(read_events(sweep.folder / TEST_LOG))
    held = sum(event.get("seconds", 0.0) + sum(event.get("running", {}).values()) for event in events)
    return Spent(events[-1]["elapsed"] if events else 0.0, held)


def one_line(err: BaseException) -> str:
    """An error for sweep.json."""
    lines = public(str(err)).strip().splitlines()
    return lines[-1] if lines else type(err).__name__


def stop_ray() -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    ray.shutdown()
