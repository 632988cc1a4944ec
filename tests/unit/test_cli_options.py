"""Options: those of the roles are those of the configuration, and values with units are read as everywhere."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
import pytest
from click.testing import CliRunner

from zrmq.cli.main import main
from zrmq.cli.options import WAIT_MS_MAX, examples, parse_time, parse_timeout, role_options
from zrmq.cli.roles import DECIDED_BY_UP
from zrmq.config import BrokerConfig, NameServerConfig, options
from zrmq.errors import ConfigError
from zrmq.producer import SEND_TIMEOUT_MS_MAX
from zrmq.store.config import StoreConfig

BROKER = BrokerConfig[StoreConfig]
ROLES = {"nameserver": [NameServerConfig], "broker": [BROKER], "up": [NameServerConfig, BROKER]}


@pytest.mark.parametrize("role", ROLES)
def test_each_option_of_a_role_is_a_flag_with_its_meaning(role: str) -> None:
    help_text = " ".join(CliRunner().invoke(main, [role, "--help"], terminal_width=200).stdout.split())
    for kind in ROLES[role]:
        for option in options(kind):
            if role == "up" and option.name in DECIDED_BY_UP:
                assert f"{option.flag} " not in help_text
                continue
            assert option.flag in help_text
            assert " ".join(option.description.split()) in help_text


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "x", "--host", "127.0.0.1", "--nameserver-port", "9876", "--broker-port", "10911"],
        ["--proxy-port", "8081", "--console-port", "8080"],
    ],
)
def test_up_takes_the_options_of_its_contract(flags: list[str]) -> None:
    """Parsed, and then refused for a host that does not exist, so that nothing is started."""
    result = CliRunner().invoke(main, ["up", *flags, "--log-level", "never"])
    assert result.exit_code == 2
    assert "--log-level is 'never'" in result.stderr
    assert "No such option" not in result.stderr


def given_flags(*arguments: str) -> dict[str, Any]:
    """What a command with a role's options is called with."""
    seen: dict[str, Any] = {}

    @click.command()
    @role_options(BROKER, without=("nameservers",))
    def command(**flags: Any) -> None:
        seen.update(flags)

    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return seen


def test_what_was_not_given_is_none() -> None:
    flags = given_flags()
    assert {name for name, value in flags.items() if value is not None} == {"as_json"}
    assert "nameservers" not in flags


def test_flags_are_handed_on_as_text() -> None:
    flags = given_flags("--store-segment-bytes", "64MiB", "--no-auto-create-topics", "--insecure")
    assert (flags["store_segment_bytes"], flags["auto_create_topics"], flags["insecure"]) == ("64MiB", False, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--broker-port", "70000"], "--broker-port is '70000'; it has to be a whole number from 0 to 65535."),
        (["--store-segment-bytes", "64 potatoes"], "a size such as '64MiB'"),
        (["--host", "0.0.0.0"], "--insecure"),
        (["--nameservers", ","], "No NameServer is given"),
        (["--config", "/nowhere/zrmq.toml"], "does not exist"),
    ],
)
def test_a_role_checks_everything_before_it_starts(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(main, ["broker", "--data", "/nowhere/at/all", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_the_file_is_read_and_its_slips_are_told(tmp_path: Any) -> None:
    file = tmp_path / "zrmq.toml"
    file.write_text("broker_prot = 5\n")
    result = CliRunner().invoke(main, ["broker", "--config", str(file)])
    assert result.exit_code == 2
    assert "did you mean broker_port?" in result.stderr


# --- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1795000000123", 1_795_000_000_123),
        ("2026-11-23T08:30:00Z", round(datetime(2026, 11, 23, 8, 30, tzinfo=UTC).timestamp() * 1000)),
        ("2026-11-23T08:30:00.250+01:00", round(datetime(2026, 11, 23, 7, 30, tzinfo=UTC).timestamp() * 1000) + 250),
        ("2026-11-23", round(datetime(2026, 11, 23).astimezone().timestamp() * 1000)),  # of this machine's zone
    ],
)
def test_times(text: str, value: int) -> None:
    assert parse_time(text) == value


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "2026-13-01", "1e9", "٣", "1960-01-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time"):
        parse_time(text)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("topic create meters --retention soon", "'--retention': 'soon' is not a duration"),
        ("topic create meters --retention -5", "'--retention': '-5' is not a duration"),
        ("topic create meters --retention 0", "'--retention': '0' is no bound for what is kept"),
        ("topic create meters --retention-bytes much", "'--retention-bytes': 'much' is not a size"),
        ("topic update meters --retention-bytes 0", "'--retention-bytes': '0' is no bound for what is kept"),
        ("topic update meters --retention-bytes 5000000TiB", "'--retention-bytes': '5000000TiB' is no bound for what is kept"),
        ("send meters x --timeout -1s", "'--timeout': '-1s' is not a duration"),
        ("send meters x --timeout 1x", "'--timeout': '1x' is not a duration"),
        ("send meters x --property unit", "'--property': 'unit' is no property"),
        ("send meters x --property =C", "'--property': '=C' is no property"),
        ("tail meters --from yesterday", "'--from': 'yesterday' is no time"),
    ],
)
def test_values_that_cannot_be_are_wrong_usage_of_an_option(line: str, sentence: str) -> None:
    """Refused here: nobody would answer at that address."""
    result = CliRunner().invoke(main, [*line.split(), "--nameservers", "tcp://127.0.0.1:1"])
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_examples_keep_their_lines() -> None:
    assert examples("zrmq a", "zrmq b") == "\b\nExamples:\n  zrmq a\n  zrmq b"


@pytest.mark.parametrize("text", ["0", "0s", "2h", "61min"])
def test_a_timeout_that_cannot_be_waited_names_the_option(text: str) -> None:
    result = CliRunner().invoke(main, ["cluster", "--timeout", text])
    assert result.exit_code == 2
    assert f"'--timeout': '{text}' cannot be waited; give a time from 1ms to 60min." in result.stderr
    assert parse_timeout("1h") == WAIT_MS_MAX == SEND_TIMEOUT_MS_MAX
