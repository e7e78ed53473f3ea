"""The driver of a sweep: checks everything, runs the trials, lets the winners meet the test set, writes it all down."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from bootvit import checkpoint
from bootvit.config import Config, override
from bootvit.errors import UserError
from bootvit.runs import claim, take_lease
from bootvit.tracking import SweepRun, check_tracking, mlflow_available, tracking_uri
from bootvit.tracking.follow import PATIENCE_S, within
from bootvit.tracking.tags import git_commit
from bootvit.train import importlib_missing
from tune.budget import Budget
from tune.cluster import actor_resources, check_resources, check_room, start_ray, trial_cpus
from tune.conductor import Conductor
from tune.data import check_data, fingerprints
from tune.estimate import count_trials, describe_plan
from tune.folder import check_folder, claim_folder, read_state
from tune.groups import Stopper
from tune.load import load_sweep
from tune.log import ENDED, Log, Trial
from tune.pbt import copy_member
from tune.record import Document, Recorder, winners
from tune.schema import BudgetConfig, Sweep
from tune.search import make_source
from tune.ship import Shipper, is_shipped
from tune.space import Spec, check_space, metric_of, trial_config
from tune.trial import Job
from tune.winners import Chosen, plain, test_config

ParentStatus = Literal["FINISHED", "FAILED", "KILLED"]


def run_sweep(
    name: str, overrides: Sequence[str] = (), *, dry_run: bool = False, resume: bool = False, overwrite: bool = False
) -> int:
    """Run a sweep to its end; 0 if every trial ended as intended, 1 if one failed for good.

    Raises `UserError` before anything starts, for whatever in the file or on the cluster cannot work.
    """
    sweep = load_sweep(name, overrides)
    check_tracking(sweep.base)
    configs = check_space(sweep)
    check_resources(sweep)
    check_data(sweep, configs)
    if dry_run:
        print(describe_plan(sweep, configs))
        return 0
    if importlib_missing("optuna") and sweep.file.algorithm == "optuna":
        raise UserError("Optuna is not installed: pip install 'bootvit[ray]'")
    epochs = max(config.schedule.epochs for config in configs)
    del configs  # one for every trial, and not needed while they run
    state = check_folder(sweep, resume=resume, overwrite=overwrite)
    if state == "finished":
        print(f"{sweep.folder} is finished; nothing to do")
        Driver(sweep, epochs).catch_up()
        return exit_status(read_state(sweep.folder))
    start_ray(sweep)
    try:
        at_once = check_room(sweep)
        claim_folder(sweep, state)
        return exit_status(Driver(sweep, epochs).run(at_once))
    finally:
        stop_ray()


def exit_status(document: Document) -> int:
    """1 if a trial failed for good, or a winner could not be tested."""
    return 1 if document["counts"].get("failed") or document["reason"] else 0


class Driver:
    """One process's work on a sweep, from its log's last event to the end."""

    def __init__(self, sweep: Sweep, epochs: int) -> None:
        self._sweep, self._epochs = sweep, epochs
        self._cpus, self._gpus = trial_cpus(sweep), sweep.file.resources.gpu
        self._recorder = Recorder(sweep, self._cpus, self._gpus)
        self._commit = git_commit()
        self._planned = None if sweep.file.fidelity else count_trials(sweep)  # rungs take what turns out best
        self._parent = self._connect()
        self._shipper: Shipper | None = None
        self._untested: str | None = None  # why a winner did not meet the test set
        self._log = Log(sweep.folder / "events.jsonl")
        self._conductor = Conductor(
            sweep,
            self._log,
            make_source(sweep),
            Stopper(sweep, epochs),
            Budget(sweep.file.budget, self._gpus),
            on_end=self._trial_ended,
            on_copy=self._copy,
        )

    def run(self, slots: int) -> Document:
        """Everything; what is left undone by an interruption or an error is on disk, and `--resume` goes on from it."""
        try:
            self._announce(slots)
            self._shipper = self._ship("trial", self.config)
            self._settle_old()
            self._execute(slots)
            self._close_shipper()
        except BaseException as err:
            interrupted = isinstance(err, KeyboardInterrupt)
            print(f"{self._sweep.folder}: the same command with --resume goes on", file=sys.stderr)
            document = self._write("interrupted" if interrupted else "failed", one_line(err))
            self._finish("KILLED" if interrupted else "FAILED", document, [])
            raise
        document = self._write("finished", self._untested)
        files = self._report()
        self._finish("FAILED" if exit_status(document) else "FINISHED", document, files)
        self._print_summary(document)
        return document

    def catch_up(self) -> None:
        """Send to MLflow what a server that was down has missed of a finished sweep."""
        document = read_state(self._sweep.folder)
        places = [self._sweep.folder, *(self._sweep.folder / trial["run"] for trial in document["trials"])]
        if self._parent is None or all(is_shipped(place) for place in places if place.exists()):
            return
        self._shipper = self._ship("trial", self.config)
        self._settle_old()
        self._close_shipper()
        self._make_tests(self._winners_to_test())
        files = sorted((self._sweep.folder / "report").glob("*"))
        self._finish("FAILED" if exit_status(document) else "FINISHED", document, files)

    # ------------------------------------------------------------------------------------------- the trials

    def config(self, trial: Trial) -> Config:
        """A trial's whole config: an ordinary run at `trials/<id>/`."""
        config = trial_config(self._sweep, trial.overrides, trial.spec.seed, trial.spec.id)
        workers = config.ray.num_workers
        return override(config, {"ray": {"cpus_per_worker": self._cpus / workers, "use_gpu": self._gpus > 0}})

    def _job(self, trial: Trial) -> Job:
        if self._shipper is not None:
            self._shipper.started(trial)
        return Job(self.config(trial).model_dump(mode="json"), "never", self._cpus, trial.epochs)

    def _execute(self, at_once: int) -> None:
        from tune.execute import Slots, Stage, execute

        def stages() -> Iterator[Stage]:
            yield Stage(self._conductor, self._job)
            self._close_shipper()  # nothing may write to a winner's run any more
            chosen = self._winners_to_test()
            print("testing the winners" if chosen else "there is no winner, or no test split to test it on", flush=True)
            yield Stage(self._make_tests(chosen), self._test_job)

        slots = Slots(at_once, actor_resources(self._sweep))
        execute(stages(), slots, self._sweep.file.select.metric, self._sweep.folder)

    def _trial_ended(self, trial: Trial) -> None:
        self._settle(trial)
        self._write("running")
        over = sum(t.status in ENDED for t in self._conductor.trials.values())
        metric = metric_of(self.config(trial), self._sweep.file.select.metric)
        value = "" if trial.value is None else f"  {metric} {trial.value:.2f}"
        reason = f"  {trial.reason}" if trial.reason else ""
        total = self._planned or len(self._conductor.trials)
        print(
            f"[{over}/{total}] {trial.spec.id}  {trial.status} after {trial.epochs} epochs{value}{reason}", flush=True
        )

    def _settle(self, trial: Trial) -> None:
        """Write down in the run's own folder how the trial ended, and let MLflow know."""
        config = self.config(trial)
        if trial.status != "finished":
            claim(config, resume=True, overwrite=False)  # from now on nobody else writes there
            write_result(config, trial, self._recorder.held_out(trial), self._commit)
        if self._shipper is not None:
            self._shipper.ended(trial)

    def _settle_old(self) -> None:
        """What a killed driver had logged, but not yet written or shipped."""
        for trial in self._conductor.trials.values():
            run_dir = self.config(trial).run_dir
            recorded = (run_dir / "result.json").exists() and (self._shipper is None or is_shipped(run_dir))
            if trial.status in ENDED and not recorded:
                self._settle(trial)

    def _copy(self, member: Trial, donor: Trial, epoch: int) -> None:
        config = self.config(member)
        copy_member(config.run_dir, self.config(donor).run_dir, config, epoch)

    # --------------------------------------------------------------------------------------------- the test

    def _winners_to_test(self) -> list[Spec]:
        """The winners' trials whose data have a test split."""
        found = winners(self._sweep, self._conductor.trials)
        trials = [trial for score in found.values() for trial in score.trials]
        return [trial.spec for trial in trials if fingerprints(self.config(trial).data).has_test]

    def _make_tests(self, chosen: Sequence[Spec]) -> Conductor:
        """The winners' meeting with the test set."""
        sweep = plain(self._sweep)
        kind = "trial" if self._sweep.file.test == "trial" else "retrained winner"
        self._shipper = self._ship(kind, self._test_config)
        tests = Conductor(
            sweep,
            Log(self._sweep.folder / "test-events.jsonl"),
            Chosen(chosen),
            Stopper(sweep, self._epochs),
            Budget(BudgetConfig(), self._gpus),
            on_end=self._test_ended,
        )
        for trial in tests.trials.values():
            self._note_test(trial)
            if self._shipper is not None and trial.status == "finished":
                self._shipper.ended(trial)  # a killed driver may not have come to that; twice does no harm
        return tests

    def _test_config(self, trial: Trial) -> Config:
        return test_config(self._sweep, self.config(self._conductor.trials[trial.spec.id]))

    def _test_job(self, trial: Trial) -> Job:
        heard = self._conductor.trials[trial.spec.id].epochs if self._sweep.file.test == "trial" else trial.epochs
        return Job(self._test_config(trial).model_dump(mode="json"), "last", self._cpus, heard)

    def _test_ended(self, trial: Trial) -> None:
        self._note_test(trial)
        self._write("running")
        if self._shipper is not None and trial.status == "finished":
            self._shipper.ended(trial)

    def _note_test(self, trial: Trial) -> None:
        if trial.status == "failed":
            self._untested = f"winner {trial.spec.id} could not be tested: {trial.reason}"
        if trial.status != "finished":
            return
        run_dir = self._test_config(trial).run_dir
        self._recorder.final[trial.spec.id] = checkpoint.read_json(run_dir / "result.json")["final"]
        self._recorder.test_runs[trial.spec.id] = str(run_dir.relative_to(self._sweep.folder))

    # ------------------------------------------------------------------------------------------ the records

    def _write(self, status: str, reason: str | None = None) -> Document:
        document = self._recorder.write(self._conductor.trials, status, self._conductor.seconds, reason)
        if self._shipper is not None:
            self._shipper.update(document)
        return document

    def _connect(self) -> SweepRun | None:
        tracking = self._sweep.base.tracking
        if not tracking.enabled:
            return None
        if not mlflow_available():
            print("MLflow is not installed: this sweep is only in its folder", file=sys.stderr)
            return None
        dumped = self._sweep.file.model_dump(mode="json", exclude_defaults=True)["space"]
        space = {key: domains[0] if len(domains) == 1 else domains for key, domains in dumped.items()}
        uri = tracking_uri(tracking.uri)
        folder, name, path = self._sweep.folder, self._sweep.file.name, self._sweep.path
        return SweepRun(folder, uri, tracking.experiment, name=name, space=space, file=path)

    def _ship(self, kind: str, make_config: Any) -> Shipper | None:
        return None if self._parent is None else Shipper(self._parent, self._sweep.file.name, kind, make_config)

    def _close_shipper(self) -> None:
        if self._shipper is not None:
            shipper, self._shipper = self._shipper, None
            if not shipper.close():
                self._parent = None  # its thread may still wait for MLflow; `--resume` ships the rest

    def _finish(self, status: ParentStatus, document: Document, files: Sequence[Path]) -> None:
        self._close_shipper()
        if (parent := self._parent) is not None:
            within(lambda: parent.finish(status, document, files), PATIENCE_S, parent.folder)

    def _report(self) -> list[Path]:
        if importlib_missing("matplotlib") or importlib_missing("sklearn"):
            return []
        from bootvit.report import write_sweep_report

        return write_sweep_report(self._sweep.folder, self._sweep.folder / "report")

    # ------------------------------------------------------------------------------------------ the terminal

    def _announce(self, slots: int) -> None:
        known = self._conductor.trials.values()
        over = sum(trial.status in ENDED for trial in known)
        rest = f", {over} of {len(known)} trials have ended" if known else ""
        print(f"sweep {self._sweep.file.name}: {slots} trials at a time{rest}; {self._sweep.folder}", flush=True)

    def _print_summary(self, document: Document) -> None:
        from bootvit.report import print_sweep

        print_sweep(self._sweep.folder)
        if self._conductor.budget_note:
            print(f"not all trials were run: {self._conductor.budget_note}")


def write_result(config: Config, trial: Trial, held_out: Any, commit: str | None) -> None:
    """result.json of a trial that was stopped or failed."""
    prints = fingerprints(config.data)
    result = {
        "name": config.name,
        "method": config.method,
        "status": "failed" if trial.status == "failed" else "interrupted",
        "reason": trial.reason,
        "epochs": trial.epochs,
        "final": None,
        "best": {},
        "held_out": held_out,
        "images_per_second": None,
        "seconds": round(trial.seconds, 3),
        "gpu_seconds": None,
        "fraction": config.data.fraction,
        "seed": config.seed,
        "data_fingerprint": prints.data,
        "subset_digest": prints.subset,
        "git": commit,
        "mlflow_run_id": None,
    }
    take_lease(config.run_dir).write_result(result)


def one_line(err: BaseException) -> str:
    """An error for sweep.json."""
    lines = str(err).strip().splitlines()
    return lines[-1] if lines else type(err).__name__


def stop_ray() -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    ray.shutdown()
