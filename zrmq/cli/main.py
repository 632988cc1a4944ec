"""The command `zrmq`: a table of commands, each loaded when it is called, so that `zrmq --help` is quick."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from zrmq.cli.failures import EXIT_DONE, EXIT_FAILED, EXIT_UNREACHABLE, EXIT_USAGE, Invocation, run_command
from zrmq.logs import quiet

# name: (module, what it does). The module has the command under the name, with _ for -.
COMMANDS = {
    "up": ("zrmq.cli.roles", "Run a NameServer and a broker in one process."),
    "nameserver": ("zrmq.cli.roles", "Run a NameServer."),
    "broker": ("zrmq.cli.roles", "Run a broker."),
    "send": ("zrmq.cli.send", "Send a message, or one for each line of stdin."),
    "tail": ("zrmq.cli.tail", "Print a topic's messages as they come."),
    "topic": ("zrmq.cli.topic", "List, create, update, delete and show topics."),
    "group": ("zrmq.cli.group", "List and show consumer groups."),
    "cluster": ("zrmq.cli.cluster", "List the brokers of the cluster."),
    "broker-status": ("zrmq.cli.cluster", "Show what a broker counts and holds."),
    "demo": ("zrmq.cli.demo", "Run a cluster on this machine's sensors, and show that nothing is lost."),
    "bench": ("zrmq.cli.bench", "Measure this machine, each figure beside its limit."),
}

HELP = f"""A durable message broker for scripts, edge boxes and small clusters.

Clients find the cluster by --nameservers, else by the variable ZRMQ_NAMESERVERS, else at tcp://127.0.0.1:9876.

Exit codes: {EXIT_DONE} done, {EXIT_FAILED} failed, {EXIT_USAGE} wrong usage, {EXIT_UNREACHABLE} nothing reachable.

\b
Examples:
  zrmq up --data ./data
  zrmq send meters 21.5 --tag kitchen
  zrmq tail meters --from earliest
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run, and whose errors end in a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The group's own part. Until the command has read its options, and where it cannot, `--json` counts wherever it is."""
        words = args[: args.index("--")] if "--" in args else args
        ctx.ensure_object(Invocation).as_json = "--json" in words
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in COMMANDS.items()])

    def main(self, *arguments: Any, **extra: Any) -> NoReturn:
        """Run one command line and end the process (`SystemExit`)."""
        invocation = Invocation()
        extra = {"prog_name": "zrmq", **extra, "standalone_mode": False, "obj": invocation}
        with quiet():
            code = run_command(lambda: super(LazyGroup, self).main(*arguments, **extra), invocation)
        sys.exit(code)


def _print_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from zrmq import __version__

        click.echo(f"zrmq {__version__}")
        ctx.exit()


VERSION = click.Option(
    ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version and end."
)

main = LazyGroup("zrmq", help=HELP, params=[VERSION])
