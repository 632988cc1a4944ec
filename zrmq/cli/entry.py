"""Where the process of a command begins and ends. Ctrl-C is silent there: nothing is to be put in order yet, or any more."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line of this process and end it (`SystemExit`)."""
    end_by_ctrl_c()  # an import that it interrupts would end in a traceback
    from zrmq.cli.main import main as run

    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # in the few steps around the command's own handling of it
        end_by_ctrl_c()
        signal.raise_signal(signal.SIGINT)
    finally:
        end_by_ctrl_c()


def end_by_ctrl_c() -> None:
    """From here on Ctrl-C ends the process at once, by the system's hand; a shell has 130 for its exit code.

    Where it is ignored, as in a script's `zrmq up &`, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
