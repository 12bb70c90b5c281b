"""What a user can fix, and how a command says so."""

import sys
import warnings
from io import TextIOWrapper


class UserError(ValueError):
    """A user's mistake in a configuration, path, file or argument. Its text is one line that says what is wrong and
    what is legal."""

    exit_status = 2


def run_command(main):
    """Call ``main()``; a `UserError` becomes one line on stderr and its exit status, a warning to the user one line.
    What the output's encoding lacks, such as bytes of file names that are no text, is printed as escapes."""
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook's is another
        sys.stdout.reconfigure(errors="backslashreplace")
    show_other = warnings.showwarning

    def show(message, category, *place, **options):
        if category is UserWarning:
            print(f"warning: {message}", file=sys.stderr)
        else:
            show_other(message, category, *place, **options)

    warnings.showwarning = show
    try:
        main()
    except UserError as error:
        # PyTorch hands on the error of a process that loads data as that process's traceback, which ends in its text.
        text = str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(error.exit_status)
    finally:
        warnings.showwarning = show_other
