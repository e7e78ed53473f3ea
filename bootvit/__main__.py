"""`bootvit` and `python -m bootvit`: run the command line, and end with the right status and one line for a mistake."""

import os
import sys
from collections.abc import Sequence

# read by Ray when it is imported: its new output would draw over ours
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0 success, 2 the user's mistake (one line on stderr), 1 anything else, 130 interrupted."""
    import click

    from bootvit.cli import app
    from bootvit.errors import RunFailed, UserError
    from bootvit.train import raise_on_sigterm

    raise_on_sigterm()
    try:
        status = app(args=list(sys.argv[1:] if argv is None else argv), standalone_mode=False, prog_name="bootvit")
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as err:
        print(err.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as err:
        print(f"bootvit: error: {' '.join(err.format_message().split())}", file=sys.stderr)
        return 2
    except UserError as err:
        print(f"bootvit: error: {err}", file=sys.stderr)
        return 2
    except RunFailed as err:
        print(f"bootvit: failed: {err}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, click.Abort):
        print("bootvit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
