"""What a user can fix, and how a command says so."""

import os
import signal
import sys
import warnings
from io import TextIOWrapper

from tqdm import tqdm


class UserError(ValueError):
    """A user's mistake in a configuration, path, file or argument. Its text is one line that says what is wrong and
    what is legal."""

    exit_status = 2


# What the errors of operations on several processes say where one of these is gone, or does not answer any more.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "NCCL", "failed to connect")


def is_lost_process(error):
    """Whether an error says that another process of the same training has ended."""
    return type(error).__name__.startswith("Dist") or any(words in str(error) for words in _LOST)


def _output_has_no_reader():
    """Whether who read the standard output has left, as `| head` does; then nothing more is written to it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run_command(main):
    """Call ``main()``; a `UserError` or Ctrl-C becomes one line on stderr and an exit status, a warning one line.
    What the output's encoding lacks, such as bytes of file names that are no text, is printed as escapes."""
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook's is another
        sys.stdout.reconfigure(errors="backslashreplace")
    show_other = warnings.showwarning

    def show(message, category, *place, **options):
        if category is UserWarning:
            tqdm.write(f"warning: {message}", file=sys.stderr)  # not into a progress bar's line
        else:
            show_other(message, category, *place, **options)

    warnings.showwarning = show
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_has_no_reader():
            raise
        sys.exit(141)  # as shells say of a program that SIGPIPE ended
    except UserError as error:
        # PyTorch hands on the error of a process that loads data as that process's traceback, which ends in its text.
        text = str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        print("error: another process of this training has ended", file=sys.stderr)
        sys.exit(1)
    finally:
        warnings.showwarning = show_other
