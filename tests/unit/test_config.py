"""zrmq/config.py: every source, every refusal, and what the names of options follow from."""

from __future__ import annotations

from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrmq import config
from zrmq.config import BrokerConfig, NameServerConfig, RoleConfig, load, take
from zrmq.errors import Code, ConfigError


class Colour(str, Enum):
    RED = "red"
    BLUE = "blue"


class Section(msgspec.Struct, frozen=True, kw_only=True):
    segment_bytes: Annotated[int, config.meta("Size of a segment.", ge=4096, le=1 << 30)] = 1 << 26
    retention_ms: int | None = None
    colour: Colour = Colour.RED
    ratio: float = 0.5


Broker = BrokerConfig[Section]


class Needy(msgspec.Struct, frozen=True, kw_only=True):
    wanted: str
    items: list[str] = []


def broker(text: str, tmp_path: Path, **sources: Any) -> BrokerConfig[Section]:
    file = tmp_path / "zrmq.toml"
    file.write_text(text)
    return load(Broker, file=file, **sources)


# --- defaults and precedence ----------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_design() -> None:
    found = load(Broker)
    assert (found.host, found.broker_port, found.ingest_port) == ("127.0.0.1", 10911, 10912)
    assert found.nameservers == ("tcp://127.0.0.1:9876",)
    assert (found.auto_create_topics, found.default_queue_count, found.session_timeout_ms) == (True, 4, 10_000)
    assert found.store == Section()
    nameserver = load(NameServerConfig)
    assert (nameserver.nameserver_port, nameserver.suspect_after_ms, nameserver.gone_after_ms) == (9876, 3000, 10_000)


def test_a_file_sets_values_sections_and_units(tmp_path: Path) -> None:
    found = broker(
        'broker_name = "east"\nbroker_port = 0\nsession_timeout_ms = "4s"\nnameservers = ["a", "tcp://b:1"]\n'
        '[store]\nsegment_bytes = "1MiB"\nretention_ms = "72h"\ncolour = "blue"\nratio = 0.25\n',
        tmp_path,
    )
    assert (found.broker_name, found.broker_port, found.session_timeout_ms) == ("east", 0, 4000)
    assert found.nameservers == ("tcp://a:9876", "tcp://b:1")
    assert found.store == Section(segment_bytes=1 << 20, retention_ms=259_200_000, colour=Colour.BLUE, ratio=0.25)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    text = 'broker_name = "file"\ncluster = "file"\ndata = "file"\n'
    environ = {"ZRMQ_BROKER_NAME": "variable", "ZRMQ_CLUSTER": "variable", "HOME": "/nowhere"}
    found = broker(text, tmp_path, environ=environ, flags={"broker_name": "flag", "data": None})
    assert (found.broker_name, found.cluster, found.data, found.host) == ("flag", "variable", "file", "127.0.0.1")


def test_text_from_variables_and_flags_becomes_the_type_of_the_option() -> None:
    environ = {
        "ZRMQ_BROKER_PORT": "0", "ZRMQ_AUTO_CREATE_TOPICS": "false", "ZRMQ_NAMESERVERS": "a:1, b",
        "ZRMQ_STORE_SEGMENT_BYTES": "4 KiB", "ZRMQ_STORE_RATIO": "1.5",
    }
    found = load(Broker, environ=environ, flags={"store_retention_ms": "2d", "insecure": True, "ingest_port": 7})
    assert (found.broker_port, found.auto_create_topics, found.insecure, found.ingest_port) == (0, False, True, 7)
    assert found.nameservers == ("tcp://a:1", "tcp://b:9876")
    assert found.store == Section(segment_bytes=4096, retention_ms=172_800_000, ratio=1.5)


def test_an_empty_variable_was_not_given() -> None:
    assert load(Broker, environ={"ZRMQ_DATA": "", "ZRMQ_BROKER_PORT": ""}) == load(Broker)


def test_an_option_without_a_default_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match="wanted is missing; give --wanted or ZRMQ_WANTED"):
        load(Needy)
    assert load(Needy, flags={"wanted": "x", "items": "a,b"}) == Needy(wanted="x", items=["a", "b"])


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ('broker_prot = 1\n', "broker_prot", "did you mean broker_port?"),
        ('[store]\nsegment_byte = 1\n', "store.segment_byte", "did you mean store.segment_bytes?"),
        ('[stor]\nsegment_bytes = 1\n', "stor", "did you mean store?"),
        ('zzzz = 1\n', "zzzz", "there are advertise_host"),
        ('[store.deep]\nx = 1\n', "store.deep", "is no option"),
        ('[empty_table]\n', "empty_table", "is no option"),
    ],
)
def test_an_unknown_key_is_refused_with_file_path_and_suggestion(text: str, key: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        broker(text, tmp_path)
    assert f"{tmp_path / 'zrmq.toml'}: {key} is no option" in caught.value.message
    assert hint in caught.value.message
    assert caught.value.facts == {"file": str(tmp_path / "zrmq.toml"), "key": key}
    assert caught.value.code is Code.CONFIG


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('broker_port = "many"\n', "broker_port is 'many'; it has to be a whole number from 0 to 65535"),
        ('broker_port = 65536\n', "broker_port is 65536; it has to be a whole number from 0 to 65535"),
        ('broker_port = "1"\n', "broker_port is '1'; it has to be a whole number"),
        ('broker_port = true\n', "broker_port is True; it has to be a whole number"),
        ('broker_port = [1]\n', "broker_port is [1]; it has to be a whole number"),
        ('[broker_port]\nx = 1\n', "broker_port is {'x': 1}; it has to be a whole number"),
        ('auto_create_topics = 1\n', "auto_create_topics is 1; it has to be true or false"),
        ('host = 1\n', "host is 1; it has to be text"),
        ('data = ""\n', "data is ''; it has to be text, not empty"),
        ('broker_name = "a b"\n', "broker_name is 'a b'; it has to be a name of up to 120 letters"),
        ('log_level = "loud"\n', "log_level is 'loud'; it has to be one of 'debug', 'error', 'info', 'warning'"),
        ('nameservers = [1]\n', "nameservers is [1]; it has to be a list, each text"),
        ('session_timeout_ms = "5 weeks"\n', "session_timeout_ms is '5 weeks'; it has to be a duration such as '10s'"),
        ('session_timeout_ms = 1\n', "it has to be a duration such as '10s', or a number of milliseconds from 500 to 600000"),
        ('store = 5\n', "store is 5; it has to be a section, [store]"),
        ('[store]\nsegment_bytes = "1 B"\n', "store.segment_bytes is '1 B'; it has to be a size such as '64MiB'"),
        ('[store]\nsegment_bytes = 5000.5\n', "store.segment_bytes is 5000.5; it has to be a size"),
        ('[store]\ncolour = "green"\n', "store.colour is 'green'; it has to be one of 'red', 'blue'"),
        ('[store]\nratio = "x"\n', "store.ratio is 'x'; it has to be a number"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_it_may_be(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        broker(text, tmp_path)
    assert expected in caught.value.message
    assert caught.value.message.startswith(str(tmp_path / "zrmq.toml"))


def test_the_source_of_a_wrong_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^ZRMQ_BROKER_PORT is 'x'; it has to be"):
        load(Broker, environ={"ZRMQ_BROKER_PORT": "x"})
    with pytest.raises(ConfigError, match=r"^--store-segment-bytes is '12 apples'; it has to be"):
        load(Broker, flags={"store_segment_bytes": "12 apples"})
    with pytest.raises(ConfigError, match="broker_prt is no option; did you mean broker_port"):
        load(Broker, flags={"broker_prt": 1})


def test_a_misspelt_variable_is_refused_and_a_strange_one_is_somebody_elses() -> None:
    with pytest.raises(ConfigError, match="ZRMQ_NAMESERVER is no option; did you mean ZRMQ_NAMESERVERS"):
        load(Broker, environ={"ZRMQ_NAMESERVER": "a"})
    assert load(Broker, environ={"ZRMQ_MY_OWN_THING": "a", "ZRMQ_NAMESERVER_PORT": "1"}) == load(Broker)


def test_roles_share_a_file_but_nothing_unknown_to_all_of_them(tmp_path: Path) -> None:
    file = tmp_path / "zrmq.toml"
    file.write_text('nameserver_port = 1\nbroker_port = 2\nhost = "localhost"\n[store]\nsegment_bytes = 4096\n')
    assert load(NameServerConfig, file=file).nameserver_port == 1
    assert load(Broker, file=file).broker_port == 2
    file.write_text("nameserver_prt = 1\n")
    with pytest.raises(ConfigError, match="did you mean nameserver_port"):
        load(Broker, file=file)


def test_a_file_that_cannot_be_read_or_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(Broker, file=tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Broker, file=tmp_path)
    for content in (b"a = = 1", b"\xff\xfe", b"a = 1\na = 2", b"host = " + b"9" * 5_000):
        (tmp_path / "wrong.toml").write_bytes(content)
        with pytest.raises(ConfigError, match="is not TOML"):
            load(Broker, file=tmp_path / "wrong.toml")


# --- addresses ------------------------------------------------------------------------------------------------------


def test_a_program_gives_a_whole_config_or_options() -> None:
    whole = NameServerConfig(nameserver_port=0)
    assert take(NameServerConfig, whole, {"host": None}) is whole
    assert take(NameServerConfig, None, {"nameserver_port": 0}) == whole


@pytest.mark.parametrize(
    ("role", "wrong"), [(NameServerConfig, 5), (NameServerConfig, load(Broker)), (Broker, NameServerConfig())]
)
def test_a_config_of_another_kind_is_refused(role: Any, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^config is .*; give a (NameServer|Broker)Config, or options by name\. "):
        take(role, wrong, {})


def test_options_beside_a_whole_config_are_refused_and_not_forgotten() -> None:
    with pytest.raises(ConfigError, match="nameserver_port is given beside a whole config; set it in the config"):
        take(NameServerConfig, NameServerConfig(), {"nameserver_port": 0})



@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "*", "box.example", ""])
def test_other_machines_may_reach_us_only_when_told_so(host: str) -> None:
    with pytest.raises(ConfigError, match="insecure") as caught:
        NameServerConfig(host=host)
    assert caught.value.facts["host"] == host
    assert NameServerConfig(host=host, insecure=True).host == host


def test_a_broker_is_suspected_before_it_is_forgotten() -> None:
    with pytest.raises(ConfigError, match="suspect_after_ms is 20000, longer than gone_after_ms with 1000"):
        NameServerConfig(suspect_after_ms=20_000, gone_after_ms=1_000)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert RoleConfig(host=host).host == host


def test_a_broker_on_all_addresses_says_which_one_clients_use() -> None:
    with pytest.raises(ConfigError, match="advertise_host"):
        Broker(store=Section(), host="0.0.0.0", insecure=True)
    assert Broker(store=Section(), host="0.0.0.0", insecure=True, advertise_host="box").advertise_host == "box"


@pytest.mark.parametrize("host", ["box", "box.lan", "my_box-7", "10.0.0.7", "fe80::1", "[fe80::1]", "x" * 240])
def test_a_broker_advertises_a_host(host: str) -> None:
    assert Broker(store=Section(), advertise_host=host).advertise_host == host


@pytest.mark.parametrize(
    "host", ["my box", "tcp://box", "a;b", "a/b", "box:10911", "[box]", "[10.0.0.7]", "box\0", "0.0.0.0", "*", "x" * 300]
)
def test_what_no_client_can_connect_to_is_not_advertised(host: str) -> None:
    with pytest.raises(ConfigError, match="advertise_host is .*, which no client can connect to; give") as caught:
        Broker(store=Section(), advertise_host=host)
    assert len(caught.value.message) < 300


def test_a_broker_has_two_ports() -> None:
    with pytest.raises(ConfigError, match="broker_port and ingest_port are both 10912; give each a port of its own"):
        Broker(store=Section(), broker_port=10_912)
    assert Broker(store=Section(), broker_port=0, ingest_port=0).broker_port == 0, "free ones are two"


def test_nameserver_addresses_are_completed_and_listed_once() -> None:
    parsed = config.parse_nameservers(" box , tcp://box:9876,[::1]:7,tcp://[::1],ipc:///run/x,10.0.0.1:1,")
    assert parsed == ("tcp://box:9876", "tcp://[::1]:7", "tcp://[::1]:9876", "ipc:///run/x", "tcp://10.0.0.1:1")


@pytest.mark.parametrize("text", ["", " , ", "http://box", "box:port", "box:0", "box:65536", "a b", ":9876", "::1", "tcp://"])
def test_what_cannot_be_an_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        config.parse_nameservers(text)
    with pytest.raises(ConfigError):
        Broker(store=Section(), nameservers=(text,))


@pytest.mark.parametrize("value", [5, b"box:9876", [5], [None, "box"], object()])
def test_what_names_no_nameserver_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="name (one|each) as tcp://HOST:PORT"):
        config.parse_nameservers(value)


def test_a_client_finds_nameservers_in_argument_variable_default() -> None:
    environ = {"ZRMQ_NAMESERVERS": "a,b"}
    assert config.find_nameservers(["c:1"], environ) == ("tcp://c:1",)
    assert config.find_nameservers(None, environ) == ("tcp://a:9876", "tcp://b:9876")
    assert config.find_nameservers(None, {}) == ("tcp://127.0.0.1:9876",)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRMQ_NAMESERVERS", "elsewhere")
    assert config.find_nameservers(None) == ("tcp://elsewhere:9876",)


def test_tcp_addresses_bracket_ipv6() -> None:
    assert config.tcp_address("127.0.0.1", 1) == "tcp://127.0.0.1:1"
    assert config.tcp_address("::1", 1) == "tcp://[::1]:1"
    assert config.tcp_address("[::1]", 1) == "tcp://[::1]:1"


# --- values and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("500ms", 500), ("10s", 10_000), (" 1.5 m ", 90_000), ("2min", 120_000), ("72h", 259_200_000), ("7d", 604_800_000),
     ("0", 0), ("42", 42), ("0.001s", 1)],
)
def test_durations(text: str, value: int) -> None:
    assert config.parse_duration(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("64MiB", 67_108_864), ("1.5 GiB", 1_610_612_736), ("10GB", 10**10), ("4096B", 4096), ("7", 7), ("1KiB", 1024),
     ("1kB", 1000), ("2TiB", 1 << 41)],
)
def test_sizes(text: str, value: int) -> None:
    assert config.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 fortnight", "1e3", "0.5ms", "1s1s", "٣s", "9" * 40, "nan"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse_duration(text)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1mib", "0.3B", "1 s", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse_size(text)


@given(st.integers(0, 10**9), st.sampled_from(sorted(config._SIZE_UNITS)))
def test_every_size_with_a_unit_is_exact(amount: int, unit: str) -> None:
    assert config.parse_size(f"{amount}{unit}") == amount * config._SIZE_UNITS[unit]


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_a_config_error(text: str) -> None:
    for parse in (config.parse_duration, config.parse_size):
        with suppress(ConfigError):
            assert parse(text) >= 0


def test_key_name_flag_and_variable_follow_from_the_field() -> None:
    found = {option.key: option for option in config.options(Broker)}
    option = found["store.segment_bytes"]
    assert (option.name, option.flag, option.variable) == (
        "store_segment_bytes", "--store-segment-bytes", "ZRMQ_STORE_SEGMENT_BYTES",
    )
    assert (option.unit, option.default, option.description) == ("bytes", 1 << 26, "Size of a segment.")
    assert found["session_timeout_ms"].unit == "ms"
    assert found["broker_port"].unit == ""


@pytest.mark.parametrize("role", config.ROLE_CONFIGS)
def test_every_option_of_every_role_explains_itself_and_no_two_share_a_name(role: Any) -> None:
    found = [option for option in config.options(role) if option.key != "store"]
    assert all(option.description.endswith(".") for option in found)
    assert len({option.variable for option in found}) == len(found)
