"""How the winners meet the test set, once, after the selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bootvit.config import Config
from bootvit.result import read_result
from tune.decide.budget import Budget
from tune.decide.conductor import Conductor
from tune.decide.log import ENDED, Log, Trial, Trials
from tune.decide.stopping import Stopper
from tune.decide.winners import Chosen, plain, test_config, winners
from tune.run.data import fingerprints
from tune.run.job import Job
from tune.run.kept import SweepFolder
from tune.run.recording import Recording
from tune.spec.schema import BudgetConfig, Sweep
from tune.spec.space import Spec

TEST_LOG = "test-events.jsonl"


class Tests:
    """The winners' runs on the test set: a conductor of their own, without a budget or anything that stops them."""

    def __init__(
        self,
        sweep: Sweep,
        folder: SweepFolder,
        trials: Trials,
        make_config: Callable[[Trial], Config],
        recording: Recording,
    ) -> None:
        self._sweep, self._folder, self._trials = sweep, folder, trials
        self._make_config, self._recording = make_config, recording
        self.untested: str | None = None  # why a winner did not meet the test set
        self.chosen = chosen(sweep, trials, make_config)
        self.on_end: Callable[[], None] = lambda: None
        easy = plain(sweep)
        self.conductor = Conductor(
            easy,
            Log(events := sweep.folder / TEST_LOG, folder.sender(events)),
            Chosen(self.chosen),
            Stopper(easy, 1),
            Budget(BudgetConfig(), sweep.gpus),
            on_end=self._ended,
        )

    def begin(self, *, goes_on: bool = True) -> None:
        """Send them to MLflow; what an earlier driver has tested is taken from its runs, what failed is tried again."""
        kind = "trial" if self._sweep.file.test == "trial" else "retrained winner"
        self._recording.follow(kind, self.config, goes_on=goes_on)
        self.conductor.reopen(failed=True)
        for trial in self.conductor.trials.values():
            self._finished(trial)  # a killed driver may not have come to that; twice does no harm

    @property
    def left(self) -> bool:
        """Whether one is yet to be run."""
        known = self.conductor.trials
        return any(spec.id not in known or known[spec.id].status not in ENDED for spec in self.chosen)

    def config(self, trial: Trial) -> Config:
        """What a winner's trial becomes."""
        return test_config(self._sweep, self._make_config(self._trials[trial.spec.id]))

    def job(self, trial: Trial) -> Job:
        """What its actor is to do."""
        self._recording.started(trial)
        heard = self._trials[trial.spec.id].epochs if self._sweep.file.test == "trial" else trial.epochs
        return Job(self.config(trial).model_dump(mode="json"), "", "last", self._sweep.cpus, heard)

    def _ended(self, trial: Trial) -> None:
        self._finished(trial)
        self.on_end()

    def _finished(self, trial: Trial) -> None:
        """A test in its winner's own run adds to that run's result, and nothing to its time or cost."""
        self._note(trial)
        if trial.status == "finished":
            of = self._trials[trial.spec.id] if self._sweep.file.test == "trial" else trial
            self._recording.charge(self.config(trial), of)
            self._recording.ended(trial, of.ended_at)

    def _note(self, trial: Trial) -> None:
        if trial.status == "failed":
            self.untested = f"winner {trial.spec.id} could not be tested: {trial.reason}"
        if trial.status != "finished":
            return
        run_dir = self._folder.run_dir(self.config(trial))
        self._folder.fetch(run_dir)
        recorder = self._recording.recorder
        recorder.final[trial.spec.id] = read_result(run_dir / "result.json")["final"]
        recorder.test_runs[trial.spec.id] = str(run_dir.relative_to(self._sweep.folder))


def chosen(sweep: Sweep, trials: Trials, make_config: Callable[[Trial], Config]) -> Sequence[Spec]:
    """The winners' trials whose data have a test split."""
    found = [trial for score in winners(sweep, trials).values() for trial in score.trials]
    return [trial.spec for trial in found if fingerprints(make_config(trial).data).has_test]
