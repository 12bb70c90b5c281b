"""What a user can fix, and how a command says so."""

import sys


class UserError(ValueError):
    """A mistake in a configuration, path, file or argument; its text is one line that names what is
    wrong and what is legal."""


def run_command(main):
    """Call ``main()``; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
