"""Where the process begins: `trce`, `python -m trce_cli`, and what `accelerate launch -m trce_cli` starts."""

import gc
import signal
import sys


def main() -> int:
    """The console script: runs one command and returns its exit status."""
    try:  # around every import: a signal may come before the first of them is done
        from trce_cli.system.entry import begin, end

        begin()
        from trce_cli.cli.app import main as run

        status = run()
        end()
        return status
    except KeyboardInterrupt:  # while the command line was being imported
        sys.stderr.write("Error: Interrupted.\n")
        return 130
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # as `heard`, which may not have been imported
        gc.freeze()  # the system takes all of it back at once; to collect it takes the interpreter seconds


if __name__ == "__main__":
    sys.exit(main())
