"""Variables with the prefix PD_PROXY_: settings, Kubernetes' own, and unknown ones."""

from __future__ import annotations

import pytest
from pd_proxy.settings.environment import Variables, is_service, read_variables
from pd_proxy.settings.load import configure, gather
from pd_proxy.settings.problems import ConfigurationError
from pd_proxy.settings.tree import setting_names


def read(**environment: str) -> Variables:
    return read_variables(environment, setting_names())


def service(name: str, address: str = "10.96.0.7", port: int = 8000, port_name: str = "http") -> dict[str, str]:
    """The variables that Kubernetes sets in a container for one Service (its `pkg/kubelet/envvars`)."""
    prefix = name.upper().replace("-", "_")
    link = f"[{address}]" if ":" in address else address
    tcp = f"{prefix}_PORT_{port}_TCP"
    return {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(port),
        f"{prefix}_SERVICE_PORT_{port_name.upper().replace('-', '_')}": str(port),
        f"{prefix}_PORT": f"tcp://{link}:{port}",
        tcp: f"tcp://{link}:{port}",
        f"{tcp}_PROTO": "tcp",
        f"{tcp}_PORT": str(port),
        f"{tcp}_ADDR": address,
    }


SERVICES = [
    *("pd-proxy", "pd-proxy-metrics", "pd-proxy-host", "pd-proxy-reuse", "pd-proxy-port", "pd-proxy-api-keys"),
    *("pd-proxy-timeouts", "pd-proxy--metrics", "pd-proxy-7", "pd-proxy-config", "pd-proxy-defaults"),
]


@pytest.mark.parametrize("address", ["10.96.0.7", "fd00::7"])
@pytest.mark.parametrize("name", SERVICES)
def test_variables_that_kubernetes_sets_for_a_service_are_ignored_with_one_note(name: str, address: str) -> None:
    environment = {**service(name, address), "PD_PROXY_LOG_LEVEL": "debug"}
    found = gather({}, None, environment)
    assert found.settings == configure({"log_level": "debug"}, None, {})
    (note,) = found.notes
    assert all(variable in note for variable in service(name))
    assert "PD_PROXY_LOG_LEVEL" not in note


def test_a_udp_service_with_two_ports_is_ignored_too() -> None:
    more = {
        "PD_PROXY_SERVICE_PORT_DNS": "53",
        "PD_PROXY_PORT_53_UDP": "udp://10.96.0.7:53",
        "PD_PROXY_PORT_53_UDP_PROTO": "udp",
        "PD_PROXY_PORT_53_UDP_PORT": "53",
        "PD_PROXY_PORT_53_UDP_ADDR": "10.96.0.7",
        "PD_PROXY_PORT_9_SCTP": "sctp://10.96.0.7:9",
    }
    assert read(**more).services == sorted(more)


def test_the_port_may_still_be_set_in_the_file_or_by_a_flag() -> None:
    assert configure({"port": "9000"}, None, service("pd-proxy")).port == 9000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PD_PROXY_SERVICE_HOST", "gateway"),
        ("PD_PROXY_SERVICE_PORT", "many"),
        ("PD_PROXY_SERVICE_PORT", "70000"),
        ("PD_PROXY_SERVICE_PORT_HTTP", ""),
        ("PD_PROXY_METRICS_PORT", "9100"),
        ("PD_PROXY_METRICS_PORT", "http://10.0.0.1:9100"),
        ("PD_PROXY_PORT_8000_TCP", "8000"),
        ("PD_PROXY_PORT_8000_TCP_ADDR", "tcp"),
        ("PD_PROXY_PORT_8000_TCP_NAME", "tcp"),
        ("PD_PROXY_SERVICE_HOSTS", "10.0.0.1"),
        ("PD_PROXY_SERVICE", "10.0.0.1"),
        ("PD_PROXY_PROT", "tcp://10.0.0.1:8000"),
        ("pd_proxy_service_host", "10.0.0.1"),
    ],
)
def test_variables_that_only_look_like_kubernetes_own_are_errors(name: str, value: str) -> None:
    assert not is_service(name, value)
    with pytest.raises(ConfigurationError, match=f"{name}: no such setting"):
        configure({}, None, {name: value})


@pytest.mark.parametrize(
    "value", ["tcp://gateway:8000", "tcp://10.0.0.1", "tcp://10.0.0.1:0", "http://10.0.0.1:1", "x"]
)
def test_a_port_that_is_neither_a_number_nor_a_link_is_an_error(value: str) -> None:
    with pytest.raises(ConfigurationError, match="PD_PROXY_PORT: port: must be a whole number"):
        configure({}, None, {"PD_PROXY_PORT": value})


@pytest.mark.parametrize("name", ["PD_PROXY_PORT", "pd_proxy_port", "PD_PROXY_TIMEOUTS__IDLE"])
def test_variables_of_settings_are_known(name: str) -> None:
    found = read(**{name: "1", "PD_PROXY_CONFIG": "x", "PATH": "y", "PD_PROXYING": "z"})
    assert found.unknown == found.services == found.problems == []
    assert list(found.origins.values()) == [name]


def test_variables_of_no_setting_are_found() -> None:
    names = ["PD_PROXY_PROT", "PD_PROXY_TIMEOUTS_IDLE", "PD_PROXY_TIMEOUTS__IDEL", "pd_proxy_x", "PD_PROXY_"]
    assert read(**dict.fromkeys(names, "1")).unknown == sorted(names)


def test_a_group_may_be_one_json_variable_and_its_members_win() -> None:
    found = read(PD_PROXY_TIMEOUTS='{"idle": 5, "connect": 6}', PD_PROXY_TIMEOUTS__IDLE="7")
    assert found.values == {"timeouts": {"idle": "7", "connect": 6}}
    assert found.origins == {
        "timeouts.idle": "PD_PROXY_TIMEOUTS__IDLE",
        "timeouts.connect": "PD_PROXY_TIMEOUTS",
    }


@pytest.mark.parametrize("text", ["", "5", "[1]", "{bad", '{"idle": 1, "idle": 2}', "[" * 100_000])
def test_a_group_that_is_no_json_object_is_an_error(text: str) -> None:
    assert read(PD_PROXY_TIMEOUTS=text).problems == [
        'PD_PROXY_TIMEOUTS: timeouts: as a variable, a group must be a JSON object, such as {"member": 1}'
    ]


def test_defaults_of_an_image_rank_below_everything() -> None:
    environment = {"PD_PROXY_DEFAULTS": "host=0.0.0.0, timeouts.idle=7"}
    assert configure({}, None, environment).host == "0.0.0.0"
    assert configure({}, None, environment).timeouts.idle == 7
    assert configure({}, None, {**environment, "PD_PROXY_HOST": "10.0.0.1"}).host == "10.0.0.1"
    assert configure({"host": "10.0.0.2"}, None, environment).host == "10.0.0.2"
    assert gather({}, None, environment).origins == {"host": "PD_PROXY_DEFAULTS", "timeouts.idle": "PD_PROXY_DEFAULTS"}


@pytest.mark.parametrize("text", ["host", "hots=0.0.0.0", "timeouts={}"])
def test_defaults_that_name_no_setting_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="PD_PROXY_DEFAULTS: "):
        configure({}, None, {"PD_PROXY_DEFAULTS": text})
