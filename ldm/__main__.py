"""`python -m ldm` is the command `ldm`; `ldm.cli.commands` dispatches."""

import sys

from ldm.cli.commands import run_command_line as main

if __name__ == "__main__":
    sys.exit(main())
