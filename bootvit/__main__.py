"""`bootvit` and `python -m bootvit`: run the command line; end with the right status, and one line for a mistake."""

import os
import sys
from collections.abc import Sequence

from bootvit.output import READER_GONE, lasting_output

# read by Ray when it is imported: its new output would draw over ours, and a kill would print C++ stack traces
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")

INTERRUPTED = 130
WORKS = ("train", "sweep", "report", "import", "export", "data pack", "rm")  # they do more than print


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0 success, 2 the user's mistake (one line on stderr), 1 anything else, 130 interrupted.

    141 where the reader of a command's output has left, if output is all that the command is for.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with lasting_output(needed=not " ".join(arguments[:2]).startswith(WORKS)):
            return run(arguments)
    except SystemExit as err:
        if err.code != READER_GONE:
            raise
        return READER_GONE
    except KeyboardInterrupt:  # while the packages are imported
        print("bootvit: interrupted", file=sys.stderr)
        return INTERRUPTED


def run(arguments: list[str]) -> int:
    """The command line; its status, and one line on stderr for what is no bug."""
    import typer

    from bootvit.addresses import public
    from bootvit.asks import raise_on_sigterm
    from bootvit.cli import app
    from bootvit.errors import RunFailed, UserError

    # typer brings its own copy of click, whose errors it does not export by name
    parser_error: type[Exception] = typer.BadParameter.__mro__[2]
    raise_on_sigterm()
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="bootvit")
        sys.stdout.flush()  # here, where it may fail
        if status == INTERRUPTED:  # typer returns this for the KeyboardInterrupt that it has caught
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except parser_error as err:
        text = public(str(err.format_message()))  # type: ignore[attr-defined]
        lines = text if type(err).__name__ == "NoArgsIsHelpError" else f"bootvit: error: {' '.join(text.split())}"
        print(lines, file=sys.stderr)
        return 2
    except (UserError, RunFailed, MemoryError, OSError) as err:
        return explain(err)
    except (KeyboardInterrupt, typer.Abort):
        print("bootvit: interrupted", file=sys.stderr)
        return INTERRUPTED


def explain(err: Exception) -> int:
    """One line on stderr, and the status, for what is the user's or the machine's; anything else is raised again."""
    from bootvit.addresses import public
    from bootvit.errors import OF_THE_MACHINE, OF_THE_USER, UserError

    if isinstance(err, OSError) and err.errno not in OF_THE_MACHINE + OF_THE_USER:
        raise err
    if isinstance(err, UserError) or (isinstance(err, OSError) and err.errno in OF_THE_USER):
        print(f"bootvit: error: {public(str(err))}", file=sys.stderr)
        return 2
    reason = f"out of memory {err}".strip() if isinstance(err, MemoryError) else str(err)
    print(f"bootvit: failed: {public(reason)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
