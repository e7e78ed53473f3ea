"""The command line: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from bootvit.output import print_json

app = typer.Typer(
    name="bootvit",
    help="Train a vision Transformer from scratch on little data, with the agent CNN that mirrors it.\n\n"
    "Example: bootvit train digits/joint data.fraction=0.1 --local\n\n"
    "Next: bootvit COMMAND --help has an example of each; bootvit configs lists what is shipped",
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Look at, check and pack a data set, list its subsets, and suggest a config for it.\n\n"
    "Example: bootvit data suggest flowers/ > flowers.yaml\n\nNext: bootvit train flowers.yaml --local"
)
track_app = typer.Typer(
    help="What MLflow has of a run.\n\nExample: bootvit track sync digits-joint\n\n"
    "Next: bootvit report --experiment digits"
)


def _version(asked: bool) -> None:
    if asked:
        from bootvit import __version__

        typer.echo(f"bootvit {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    _help_alone(context)


def _help_alone(context: typer.Context) -> None:
    """A group without a command prints its help, with status 0."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.add_typer(
    data_app,
    name="data",
    callback=_help_alone,
    invoke_without_command=True,
)
app.add_typer(
    track_app,
    name="track",
    callback=_help_alone,
    invoke_without_command=True,
)


def _shipped(incomplete: str) -> list[tuple[str, str]]:
    """For the shell's completion."""
    from bootvit.config import shipped_configs

    return [(one.name, one.about) for one in shipped_configs() if one.name.startswith(incomplete)]


ConfigName = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="a YAML file, or a shipped one such as digits/joint", autocompletion=_shipped
    ),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="such as data.fraction=0.1; a text is taken as typed, any other value is YAML; the last one wins "
        "(bootvit config --explain lists the keys)",
    ),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="a run's folder, its name below ./runs, or s3://BUCKET/FOLDER/NAME")
]
Local = Annotated[bool, typer.Option("--local", help="in this process, without Ray")]
Best = Annotated[bool, typer.Option("--best", help="the checkpoint that checkpoint.best has kept, not the newest")]
Ema = Annotated[bool, typer.Option("--ema", help="the averaged weights that optim.ema has kept, not the last ones")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if key == "notes":
            for note in value:
                typer.echo(f"note: {note}")
        else:
            typer.echo(f"{key}: {value}")


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
    local: Local = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete a run of this name first")] = False,
    take_over: Annotated[bool, typer.Option("--take-over", help="also from a process that trains it now")] = False,
) -> None:
    """Train one run.

    Example: bootvit train digits/joint data.fraction=0.1 --local

    Next: bootvit eval digits-joint --local
    """
    from bootvit.driver import train as run
    from bootvit.load import load_config
    from bootvit.progress import print_result, what_next

    checked = load_config(config, overrides or [])
    print_result(run(checked, local=local, resume=resume, overwrite=overwrite, take_over=take_over))
    typer.echo(what_next(checked))


@app.command()
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="a YAML file, or such as sweeps/digits-fractions")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print trials, resources and estimated cost")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an unfinished sweep")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete a sweep of this name first")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="--resume, and run failed trials again")] = False,
    take_over: Annotated[bool, typer.Option("--take-over", help="also from a process that runs it now")] = False,
) -> int:
    """Run a sweep: its own keys go to the sweep, all others to its base config.

    Example: bootvit sweep sweeps/digits-fractions --dry-run

    Next: bootvit report --sweep digits-fractions
    """
    from tune.run.driver import How, run_sweep

    return run_sweep(sweep, overrides or [], How(resume, overwrite, retry_failed, take_over), dry_run=dry_run)


@app.command("eval")
def evaluate(
    run: RunName, overrides: Overrides = None, local: Local = False, best: Best = False, as_json: Json = False
) -> None:
    """Evaluate a run's newest checkpoint: exact counts, whatever the batch and the number of workers.

    Example: bootvit eval digits-joint --local

    Next: bootvit predict digits-joint IMAGE
    """
    from bootvit.evaluate import EVAL_KEYS
    from bootvit.evaluate import evaluate as score
    from bootvit.load import change_config
    from bootvit.runs import open_run

    config, folder = open_run(run, "best" if best else "newest")
    found = score(change_config(config, overrides or [], EVAL_KEYS), folder, local=local, best=best)
    for where, reason in found.skipped.items():
        typer.echo(f"bootvit: left out: {where}: {reason}", err=True)
    if as_json:
        print_json(found.counts)
        return
    for net, counts in found.counts.items():
        right = f"{counts['correct']} of {counts['total']}"
        typer.echo(f"{net}: top-1 {counts['top1']:.2f}% ({right}), top-5 {counts['top5']:.2f}%")
        if "ema_top1" in counts:
            typer.echo(f"{net}, averaged weights: top-1 {counts['ema_top1']:.2f}%, top-5 {counts['ema_top5']:.2f}%")


@app.command()
def predict(
    run: RunName,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="image files, folders of them, or -: an image, or names, on stdin"),
    ],
    top: Annotated[int, typer.Option(min=1, help="classes an image")] = 5,
    best: Best = False,
    ema: Ema = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document a line")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="a line for each class of an image and network")] = False,
) -> int:
    """Class names and probabilities of images; status 1 if one of them could not be read.

    Example: bootvit predict digits-joint seven.png; find . -name '*.png' | bootvit predict digits-joint - --csv

    Next: bootvit export digits-joint --format onnx
    """
    import sys

    from bootvit.predict import as_line, csv_lines, from_stdin
    from bootvit.predict import predict as guess
    from bootvit.runs import open_run

    if as_json and as_csv:
        raise typer.BadParameter("--json or --csv, not both", param_hint="--csv")
    config, folder = open_run(run, "best" if best else "newest")
    failed = False
    if as_csv:
        typer.echo("image,network,rank,class,probability,error")
    with from_stdin(images, sys.stdin.buffer) as given:
        for row in guess(config, folder.path, given, top, best=best, ema=ema):
            if "error" in row:
                failed = True
                typer.echo(f"bootvit: failed: {row['image']}: {row['error']}", err=True)
            if as_json:
                print_json(row, line=True)
            elif as_csv:
                typer.echo(csv_lines(row), nl=False)
            elif "error" not in row:
                typer.echo(as_line(row))
    return int(failed)


@app.command()
def explain(
    run: RunName,
    images: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(metavar="[IMAGE]...", help="image files, and folders of them; default: a few that are fixed"),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="images of the evaluation set, where none are given")] = 32,
    out: Annotated[Optional[Path], typer.Option(help="folder for figures and data; default: RUN/explain")] = None,  # noqa: UP045
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Look inside a run: where its ViT looks, how convolutional its heads are, how alike it and its agent are.

    Example: bootvit explain digits-joint

    Next: bootvit report runs/digits-joint, which shows the figures
    """
    from bootvit.explain.command import command

    command(run, images or [], count=count, out=out, best=best, as_json=as_json)


@app.command()
def logs(
    run: RunName,
    rank: Annotated[Optional[int], typer.Option(metavar="N", help="only this worker; default: all")] = None,  # noqa: UP045
    attempt: Annotated[Optional[int], typer.Option(metavar="N", help="default: the newest")] = None,  # noqa: UP045
) -> None:
    """Print what the workers of a run have said, wherever they ran: warnings, errors with their tracebacks, epochs.

    Example: bootvit logs digits-joint --rank 0

    Next: bootvit train CONFIG --resume, if it ended early
    """
    from bootvit.runs import open_run
    from bootvit.worker_log import read_logs

    for line in read_logs(open_run(run)[1], rank, attempt):
        typer.echo(line)


@app.command("config")
def show_config(
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="CONFIG|KEY", help="as for train; with --explain a key", autocompletion=_shipped),
    ] = None,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="what a key, a section's keys, or all keys mean")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="with --explain: all keys as docs/config.md")] = False,
) -> None:
    """Print the resolved config; that file, run again, is the same run. Or explain keys, of runs and of sweep files.

    Example: bootvit config digits/joint data.fraction=0.1; bootvit config --explain data

    Next: bootvit train CONFIG
    """
    if explain:
        from bootvit.config import meanings as keys

        typer.echo(keys.markdown() if markdown else keys.explain(config), nl=not markdown)
        return
    if config is None:
        raise typer.BadParameter("name a config, or a key with --explain", param_hint="CONFIG")
    from bootvit.config import dump_config
    from bootvit.load import load_config

    typer.echo(dump_config(load_config(config, overrides or [])), nl=False)


@app.command("configs")
def list_configs(
    words: Annotated[Optional[list[str]], typer.Argument(metavar="[WORD]...", help="only those that name all")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """What is shipped: configs of runs, sweeps, and presets to extend, a line each.

    Example: bootvit configs digits

    Next: bootvit config digits/joint, or `extends: digits/joint` in a file of yours
    """
    from bootvit.config import shipped_configs

    found = [one for one in shipped_configs() if all(word.lower() in " ".join(one).lower() for word in words or [])]
    if as_json:
        print_json([one._asdict() for one in found])
        return
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        typer.echo(f"{one.kind:6}  {one.name:{width}}  {one.about}")


@app.command()
def report(
    folders: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[FOLDER]...", help="or s3://BUCKET/FOLDER; default: ./runs"),
    ] = None,
    experiment: Annotated[Optional[str], typer.Option(help="read this MLflow experiment instead")] = None,  # noqa: UP045
    sweep: Annotated[
        str | None, typer.Option(help="report a sweep: its folder or address, or its name below ./runs")
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="where report.md, report.html and the plots go")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Method x fraction tables and plots from run folders or from MLflow.

    Example: bootvit report --sweep digits-fractions --out report

    Next: report/report.html in a browser
    """
    from bootvit.report.command import command

    command(folders or [], experiment=experiment, sweep=sweep, out=out, as_json=as_json)


@app.command("list")
def list_runs(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="where runs lie, or s3://BUCKET/FOLDER")] = "runs",
    trials: Annotated[bool, typer.Option("--trials", help="the trials of sweeps too")] = False,
    as_json: Json = False,
) -> None:
    """The runs and sweeps below a folder, the newest last.

    Example: bootvit list

    Next: bootvit show RUN; bootvit compare RUN RUN
    """
    from bootvit import manage
    from bootvit.storage import place_at

    found = manage.list_runs(place_at(folder), trials=trials)
    if as_json:
        print_json([one._asdict() for one in found])
    else:
        typer.echo(manage.table(found))


@app.command()
def show(run: RunName, as_json: Json = False) -> None:
    """What a run is and how it went.

    Example: bootvit show digits-joint

    Next: bootvit eval RUN --local; bootvit config runs/digits-joint/config.yaml
    """
    from bootvit.manage import columns, in_short, show_run

    facts = show_run(run)
    if as_json:
        print_json(facts)
        return
    typer.echo(columns([(key, in_short(value)) for key, value in facts.items()]))


@app.command()
def compare(first: RunName, second: RunName, as_json: Json = False) -> None:
    """What differs between two runs: keys of their configs, and results.

    Example: bootvit compare digits-joint digits-shared

    Next: bootvit report
    """
    from bootvit.manage import columns, compare_runs, in_short

    found = compare_runs(first, second)
    if as_json:
        print_json(found)
        return
    rows = [(key, *map(in_short, values)) for key, values in found.items()]
    typer.echo(columns([("", first, second), *rows]))


@app.command("rm")
def remove(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs, or names below ./runs")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Delete runs: checkpoints, journal and result. MLflow keeps what it has. One that is being trained is refused.

    Example: bootvit rm digits-joint --yes

    Next: bootvit list
    """
    import shutil

    from bootvit.manage import removable

    for path in [removable(run) for run in runs]:
        if yes or typer.confirm(f"delete {path}?"):
            shutil.rmtree(path)
            typer.echo(f"deleted {path}")


@track_app.command("sync")
def track_sync(run: RunName, overrides: Overrides = None) -> None:
    """Send MLflow what it has not got of a run, such as when its server was down; only tracking.* may be changed.

    Example: bootvit track sync digits-joint

    Next: bootvit report --experiment digits
    """
    from bootvit.load import change_config
    from bootvit.runs import open_run
    from bootvit.tracking.sync import sync_run

    config, folder = open_run(run, "all")
    typer.echo(sync_run(change_config(config, overrides or [], ("tracking.",)), folder))


@data_app.command("info")
def data_info(config: ConfigName, overrides: Overrides = None, as_json: Json = False) -> None:
    """What is in a data set.

    Example: bootvit data info digits/joint

    Next: bootvit data check CONFIG
    """
    from bootvit.data.info import describe
    from bootvit.load import load_config

    _print_facts(describe(load_config(config, overrides or []).data), as_json)


@data_app.command("check")
def data_check(config: ConfigName, overrides: Overrides = None, as_json: Json = False) -> int:
    """Read every image once, before somebody pays for a GPU; status 1 if something is wrong.

    Example: bootvit data check digits/joint

    Next: bootvit train CONFIG
    """
    from bootvit.data.check import report
    from bootvit.load import load_config

    found = report(load_config(config, overrides or []).data)
    if as_json:
        print_json(found)
        return int(bool(found["problems"]))
    for problem in found["problems"]:
        typer.echo(f"{problem['image']}: {problem['reason']}")
    for note in found["notes"]:
        typer.echo(f"note: {note}")
    counts = ", ".join(f"{count} {split}" for split, count in found["images"].items())
    typer.echo(
        f"{counts} images read in {found['seconds']:.1f} s ({found['images_per_second']:.0f} images/s): "
        f"{len(found['problems']) or 'no'} problem{'' if len(found['problems']) == 1 else 's'}"
    )
    return int(bool(found["problems"]))


@data_app.command("pack")
def data_pack(
    config: ConfigName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="folder for the Parquet files")] = Path("packed"),
    as_json: Json = False,
) -> None:
    """Write Parquet files in which every fraction is a prefix.

    Example: bootvit data pack digits/joint --out packed

    Next: bootvit train CONFIG data.source=parquet data.root=packed
    """
    from bootvit.data.pack import pack
    from bootvit.load import load_config

    _print_facts(pack(load_config(config, overrides or []).data, out), as_json)


@data_app.command("fraction")
def data_fraction(
    config: ConfigName,
    overrides: Overrides = None,
    keys: Annotated[bool, typer.Option("--keys", help="print the images' keys, one a line")] = False,
    as_json: Json = False,
) -> None:
    """The subset that `data.fraction` takes: its digest, size and classes.

    Example: bootvit data fraction digits/joint data.fraction=0.1

    Next: bootvit train CONFIG data.fraction=0.1
    """
    from bootvit.data.info import fraction_keys, fraction_report
    from bootvit.load import load_config

    data = load_config(config, overrides or []).data
    if keys:
        for key in fraction_keys(data):
            typer.echo(key)
        return
    _print_facts(fraction_report(data), as_json)


@data_app.command("suggest")
def data_suggest(
    place: Annotated[str, typer.Argument(metavar="FOLDER|CONFIG", help="a folder of images, or a config with data")],
    overrides: Overrides = None,
) -> None:
    """Print a config that fits your images: their size, patch, width and epochs, and why.

    Example: bootvit data suggest flowers/ > flowers.yaml

    Next: bootvit train flowers.yaml --local
    """
    from bootvit.data.suggest import suggest

    typer.echo(suggest(place, overrides or []), nl=False)


@app.command()
def models(as_json: Json = False) -> None:
    """Every row of the paper's tables with its parameters and GFLOPs.

    Example: bootvit models

    Next: bootvit configs vit-base
    """
    from bootvit.models import sizes

    if as_json:
        print_json(sizes.document())
    else:
        typer.echo(sizes.table())


@app.command("import")
def import_reference(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a .pth file of the reference")],
    config: Annotated[Path, typer.Option("--config", metavar="YAML", help="the reference's file of that run")],
    overrides: Overrides = None,
    name: Annotated[Optional[str], typer.Option(help="the run's name; default: as the YAML file")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete a run of this name first")] = False,
) -> None:
    """Turn a checkpoint of the reference implementation into a run.

    Example: bootvit import checkpoint.pth --config joint.yaml

    Next: bootvit eval RUN data.root=FOLDER --local
    """
    from bootvit.reference.importing import import_checkpoint

    done = import_checkpoint(checkpoint, config, overrides or [], name=name, overwrite=overwrite)
    moments = "with" if done.moments else "without"
    typer.echo(f"{done.run}: {done.epoch} epochs done, {moments} optimiser moments")


@app.command()
def export(
    run: RunName,
    form: Annotated[
        str,
        typer.Option("--format", metavar="timm|torch|onnx|pt2|torchscript", help="timm and torch write a folder"),
    ],
    network: Annotated[Optional[str], typer.Option(metavar="vit|agent", help="default: the run's first")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="file or folder; default: in RUN/export/")] = None,  # noqa: UP045
    convolutions: Annotated[
        bool, typer.Option("--convolutions", help="the agent, as an ordinary CNN of Conv2d layers (torch: always)")
    ] = False,
    best: Best = False,
    ema: Ema = False,
) -> None:
    """Write a run's weights in a format that others load.

    Example: bootvit export digits-joint --format timm

    Next: bootvit train CONFIG model.vit.weights=FOLDER starts from it, and timm loads it
    """
    from bootvit.export import export as write
    from bootvit.runs import open_run

    config, folder = open_run(run, "best" if best else "newest")
    made = write(config, folder.path, form, network=network, out=out, best=best, ema=ema, convolutions=convolutions)
    typer.echo(made if out else folder.keep_export(made))


@app.command()
def doctor(
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[CONFIG]", help="whose storage, tracking and devices; default: the defaults"),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Check versions, devices, storage, tracking, Ray and the clock, and say what to type; status 1 if one is wrong.

    Example: bootvit doctor digits/joint ray.storage_path=/shared/runs

    Next: bootvit train digits/joint --local
    """
    from bootvit.doctor import command

    return command(config, overrides or [], as_json=as_json)


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- train|sweep ...", help="the command to run there")],
    address: Annotated[Optional[str], typer.Option(help="the cluster's dashboard, http://host:8265")] = None,  # noqa: UP045
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the job's log to its end")] = True,
    pip: Annotated[bool, typer.Option("--pip", help="install there first what is installed here, pinned")] = False,
) -> int:
    """Run `train` or `sweep` as a job on a Ray cluster.

    Example: bootvit submit --address http://HEAD:8265 -- train digits/joint ray.storage_path=/shared

    Next: bootvit logs RUN
    """
    from cluster.submit import submit as send

    return send(command, address=address, wait=wait, pip=pip)
