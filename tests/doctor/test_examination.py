"""Each mistake that an operator can make with engines gets a sentence that says what to do."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pd_proxy.doctor import examination
from pd_proxy.doctor.examination import examine
from pd_proxy.doctor.report import Report
from pd_proxy.fleet.findings import Finding
from pd_proxy.flow.trial import Trials
from pd_proxy.settings.tree import build_settings
from pd_proxy_simulator import Simulator

from tests.contract.cases import CASES, IDS, Case
from tests.support import simulators, until

CERTIFICATE = Path(__file__).parent / "self_signed.pem"


async def report(prefill: list[str], decode: list[str], *, pairs: int = 16, **settings: Any) -> Report:
    """The report about some engines."""
    return await examine(build_settings({"prefill": prefill, "decode": decode, **settings}, {}), most_pairs=pairs)


def only(found: Report, severity: str = "fault") -> Finding:
    """The one finding of a severity."""
    [finding] = [finding for finding in found.findings if finding.severity == severity]
    assert finding.advice
    return finding


async def at_rest(*engines: Simulator) -> None:
    """Wait until the engines run nothing and keep no hand-off."""
    await until(
        lambda: (
            not any(
                e.engine.running or e.engine.waiting or e.engine.stranded_blocks or len(e.engine.handoffs)
                for e in engines
            )
        )
    )


async def test_correct_engines_have_no_findings() -> None:
    async with simulators("prefill", "prefill", "decode", "decode", lease=600.0) as [p, q, d, e]:
        found = await report([p.url, q.url], [d.url, e.url])
        assert found.findings == ()
        assert found.exit_status == 0
        assert found.pairs == 4
        first = found.engines[0]
        assert (first.url, first.role, first.state, first.says) == (p.url, "prefill", "up", "prefill")
        assert (first.version, first.connector, first.tells) == ("0.32.0", "nixl", ("NixlConnector",))
        assert (first.block_size, first.context, first.prefix_caching, first.tp) == (16, 32768, True, 1)
        assert first.models == ("sim",)
        assert [handoff.found for handoff in found.handoffs] == ["ok"] * 4
        assert {handoff.side for handoff in found.handoffs} == {f"127.0.0.1:{engine.side_port}" for engine in (p, q)}
        assert all(handoff.reachable for handoff in found.handoffs)
        await at_rest(p, q, d, e)


async def test_a_dead_engine_is_a_fault_and_the_others_are_examined() -> None:
    async with simulators("prefill", "decode", "decode") as [p, d, dead]:
        dead.kill()
        found = await report([p.url], [d.url, dead.url])
        finding = only(found)
        assert (finding.code, finding.backends) == ("refused", (dead.url,))
        assert "connection refused" in finding.what
        assert finding.advice.startswith("Start the engine, or correct its host and port")
        assert [engine.state for engine in found.engines] == ["up", "up", "down"]
        assert [(handoff.decode, handoff.found) for handoff in found.handoffs] == [(d.url, "ok")]
        assert found.exit_status == 2


async def test_an_engine_that_is_loading_or_has_failed_inside_is_not_up() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        d.faults.add("status", leg="health", status=503)
        finding = only(await report([p.url], [d.url]))
        assert finding.code == "unhealthy"
        assert "/health answered 503" in finding.what
        assert "log" in finding.advice


async def test_an_engine_that_does_not_answer_in_time_is_a_fault() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        d.faults.add("hang", leg="health")
        finding = only(await report([p.url], [d.url], health={"timeout": 0.3}))
        assert finding.code == "timeout"
        assert "within 0.3 s" in finding.what
        assert "health.timeout" in finding.advice


async def test_a_host_that_cannot_be_resolved_is_a_fault() -> None:
    async with simulators("prefill") as [p]:
        finding = only(await report([p.url], ["http://no-such-host.invalid:8000"]))
        assert finding.code == "unresolved"
        assert "no such host" in finding.what


@asynccontextmanager
async def server(answer: bytes, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that answers every connection alike; yields its host and port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(65536)
            writer.write(answer)
            await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def http(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: text/html\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (http("404 Not Found", b"<html>no such page"), "no_engine", "/health answered 404"),
        (http("200 OK", b"<html>welcome to nginx"), "no_models", "lists no model"),
        (http("302 Found", b""), "no_engine", "/health answered 302"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no_http", "/health could not be asked"),
        (b"", "no_http", "/health could not be asked"),
    ],
)
async def test_a_server_that_is_no_engine_is_a_fault(answer: bytes, code: str, says: str) -> None:
    async with simulators("decode") as [d], server(answer) as address:
        finding = only(await report([address], [d.url], pairs=0))
        assert finding.code == code
        assert says in finding.what
        assert finding.advice.startswith("Correct the ")


async def test_the_port_of_the_side_channel_in_place_of_the_api_is_a_fault() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        finding = only(await report([f"127.0.0.1:{p.side_port}"], [d.url], health={"timeout": 0.3}))
        assert finding.code in ("no_http", "no_engine", "timeout")
        assert "Correct the" in finding.advice


def tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


async def test_an_http_url_of_an_engine_with_tls_is_a_fault() -> None:
    async with simulators("decode") as [d], server(http("200 OK", b""), tls()) as address:
        finding = only(await report([f"http://{address}"], [d.url]))
        assert finding.code == "speaks_tls"
        assert "https://" in finding.advice


async def test_an_https_url_of_an_engine_without_tls_is_a_fault() -> None:
    async with simulators("decode") as [d], server(http("200 OK", b"")) as address:
        finding = only(await report([f"https://{address}"], [d.url]))
        assert finding.code == "no_tls"
        assert "http://" in finding.advice


async def test_an_untrusted_certificate_is_a_fault() -> None:
    async with simulators("decode") as [d], server(http("200 OK", b""), tls()) as address:
        finding = only(await report([f"https://{address}"], [d.url]))
        assert finding.code == "certificate"
        assert "SSL_CERT_FILE" in finding.advice


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_a_missing_or_refused_key_is_a_fault(key: str | None) -> None:
    async with simulators("prefill") as [p], simulators("decode", api_key="right") as [d]:
        finding = only(await report([p.url], [d.url], backend_api_key=key))
        assert finding.code == "key_refused"
        assert "answered 401" in finding.what
        assert "backend_api_key" in finding.advice
        assert "wrong" not in finding.what


async def test_the_engines_key_is_sent_to_them() -> None:
    async with simulators("prefill", "decode", api_key="right") as [p, d]:
        assert (await report([p.url], [d.url], backend_api_key="right")).exit_status == 0


async def test_a_sleeping_engine_is_reported_with_how_to_wake_it() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        d.asleep = True
        finding = only(await report([p.url], [d.url]))
        assert finding.code == "asleep"
        assert "/wake_up" in finding.advice


async def test_engines_of_different_models_cannot_be_a_pair() -> None:
    async with simulators("prefill", model="a") as [p], simulators("decode", model="b") as [d]:
        found = await report([p.url], [d.url])
        finding = only(found)
        assert finding.code == "no_pair"
        assert "no model in common" in finding.what
        assert found.handoffs == ()
        warning = only(found, "warning")
        assert warning.code == "models_differ"
        assert warning.what == f"group default: models differ: a at {p.url}; b at {d.url}"


async def test_one_engine_of_another_model_among_others_is_named() -> None:
    async with simulators("prefill", "decode") as [p, d], simulators("decode", model="b") as [other]:
        found = await report([p.url], [d.url, other.url])
        finding = only(found)
        assert (finding.code, finding.backends) == ("no_pair", (other.url,))
        assert [handoff.found for handoff in found.handoffs] == ["ok"]


async def test_engines_of_different_versions_cannot_be_a_pair_unless_that_is_allowed() -> None:
    async with simulators("prefill") as [p], simulators("decode", version="0.31.0") as [d]:
        assert only(await report([p.url], [d.url])).code == "no_pair"
        found = await report([p.url], [d.url], pair_revisions="any")
        assert only(found, "warning").code == "versions_differ"
        assert "no_pair" not in [finding.code for finding in found.findings]


@pytest.mark.parametrize(
    ("prefill", "decode", "code", "advice"),
    [
        ({"side_host": "127.0.0.9"}, {}, "side_channel", "VLLM_NIXL_SIDE_CHANNEL_HOST"),
        ({"connector": "none", "dev_mode": False}, {}, "no_params", "--kv-transfer-config"),
        ({}, {"connector": "none", "dev_mode": False}, "not_read", "--kv-transfer-config"),
        ({"connector": "mooncake"}, {"connector": "mooncake"}, "wrong_connector", "Set `connector`"),
        ({"connector": "sglang"}, {}, "wrong_connector", "Set `connector`"),
        ({}, {"weights": 7}, "decode_failed", "version, model, block size and connector"),
    ],
)
async def test_pairs_that_cannot_hand_over_are_faults(
    prefill: dict[str, Any], decode: dict[str, Any], code: str, advice: str
) -> None:
    async with simulators("prefill", **prefill) as [p], simulators("decode", **decode) as [d]:
        found = await report([p.url], [d.url])
        [handoff] = found.handoffs
        assert handoff.found == code
        findings = [finding for finding in found.findings if finding.code == code]
        assert {finding.severity for finding in findings} == {"fault"}
        urls = {url for finding in findings for url in finding.backends}
        assert urls and urls <= {p.url, d.url}
        assert all(url in finding.what for finding in findings for url in finding.backends)
        assert all(advice in finding.advice for finding in findings)
        assert found.exit_status == 2


async def test_engines_that_share_no_cache_are_a_warning_since_they_may_miss_at_times(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    async with (
        simulators("prefill", connector="shared_cache", shared_path=str(one)) as [p],
        simulators("decode", connector="shared_cache", shared_path=str(other)) as [d],
    ):
        warning = only(await report([p.url], [d.url], connector="shared_cache"), "warning")
        assert (warning.code, warning.backends) == ("not_read", (p.url, d.url))


async def test_a_wrong_side_channel_is_reported_with_its_address() -> None:
    async with simulators("prefill", side_host="127.0.0.9") as [p], simulators("decode") as [d]:
        found = await report([p.url], [d.url])
        assert f"127.0.0.9:{p.side_port}, which this machine cannot reach (connection refused)" in only(found).what
        [handoff] = found.handoffs
        assert (handoff.side, handoff.reachable) == (f"127.0.0.9:{p.side_port}", False)


async def test_swapped_roles_are_reported_and_not_tried_where_a_try_would_kill_an_engine() -> None:
    async with simulators("prefill", "decode", connector="mooncake") as [p, d]:
        places = [{"backend": d.url, "port": d.side_port}]
        found = await report([d.url], [p.url], connector="mooncake", locations=places)
        swapped = [finding for finding in found.findings if finding.code == "roles_swapped"]
        assert {finding.backends for finding in swapped} == {(d.url,), (p.url,)}
        assert all(finding.severity == "fault" for finding in swapped)
        assert not p.requests and not d.requests
        assert p.alive and d.alive


async def test_swapped_roles_are_a_warning_where_they_work() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        found = await report([d.url], [p.url])
        assert found.exit_status == 1
        swapped = [finding for finding in found.findings if finding.code == "roles_swapped"]
        assert [(finding.severity, finding.backends) for finding in swapped] == [
            ("warning", (d.url,)),
            ("warning", (p.url,)),
        ]
        assert f"{d.url} is listed under prefill, and says that it was started as a decode engine" in swapped[0].what


async def test_swapped_roles_of_sglang_engines_are_reported() -> None:
    async with simulators("prefill", "decode", connector="sglang") as [p, d]:
        found = await report([d.url], [p.url], connector="sglang", kind="sglang")
        swapped = [finding.backends for finding in found.findings if finding.code == "roles_swapped"]
        assert swapped == [(d.url,), (p.url,)]
        assert "no_coordinates" not in [finding.code for finding in found.findings]


async def test_a_missing_bootstrap_server_is_a_fault() -> None:
    async with simulators("prefill", "decode", connector="mooncake") as [p, d]:
        with socket.create_server(("127.0.0.1", 0)) as held:
            free = held.getsockname()[1]
        places = [{"backend": p.url, "port": free}]
        finding = only(await report([p.url], [d.url], connector="mooncake", locations=places))
        assert finding.code == "no_coordinates"
        assert "locations" in finding.advice


@pytest.mark.parametrize("case", CASES, ids=IDS)
async def test_every_connector_can_be_examined_and_leaves_nothing_behind(case: Case) -> None:
    with case.engines() as told:
        async with simulators("prefill", "decode", **told) as [p, d]:
            settings = case.gateway([p, d])
            if case.name == "ascend_layerwise":
                settings["metaserver"] = {"url": "http://127.0.0.1:1"}
            found = await report([p.url], [d.url], **settings)
            assert found.exit_status == 0, found.as_text()
            if case.name == "ascend_layerwise":
                assert only(found, "note").code == "cannot_try"
            else:
                assert [handoff.found for handoff in found.handoffs] == ["ok"]
            await at_rest(p, d)


async def test_at_most_the_given_number_of_pairs_is_tried_and_engines_without_a_pair_are_named() -> None:
    async with simulators("prefill", "decode", "decode", "decode") as [p, *decode]:
        found = await report([p.url], [engine.url for engine in decode], pairs=2)
        assert [handoff.decode for handoff in found.handoffs] == [decode[0].url, decode[1].url]
        warning = only(found, "warning")
        assert (warning.code, warning.backends) == ("not_tried", (decode[2].url,))
        assert found.exit_status == 1
        assert not decode[2].requests


async def test_without_pairs_engines_are_asked_and_get_no_requests() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        found = await report([p.url], [d.url], pairs=0)
        assert found.exit_status == 0
        assert not p.requests and not d.requests


async def test_settings_without_engines_are_a_fault() -> None:
    assert only(await report([], [])).code == "nothing_to_serve"
    async with simulators("prefill") as [p]:
        finding = only(await report([p.url], []))
        assert finding.what == "group default: the settings name no decode backend"


async def test_groups_are_examined_each_with_its_own_connector() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        simulators("prefill", "decode", connector="mooncake") as [q, e],
    ):
        group = {"name": "other", "connector": "mooncake", "prefill": [q.url], "decode": [e.url]}
        places = [{"backend": q.url, "port": q.side_port}]
        found = await report([p.url], [d.url], groups=[group], locations=places)
        assert found.exit_status == 0, found.as_text()
        assert [(handoff.group, handoff.found) for handoff in found.handoffs] == [("default", "ok"), ("other", "ok")]


async def test_a_connector_that_is_not_set_is_learnt_from_the_engines() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        found = await report([p.url], [d.url], connector="auto")
        assert found.exit_status == 0, found.as_text()
        assert [engine.connector for engine in found.engines] == ["nixl", "nixl"]


async def test_a_connector_that_is_neither_set_nor_reported_is_a_finding() -> None:
    async with simulators("prefill", "decode", connector="none") as [p, d]:
        finding = only(await report([p.url], [d.url], connector="auto"))
        assert (finding.code, "set it" in finding.what) == ("no_pair", True)


async def test_a_prefill_engine_without_a_prefix_cache_is_a_note() -> None:
    async with simulators("prefill", prefix_caching=False) as [p], simulators("decode") as [d]:
        found = await report([p.url], [d.url])
        assert found.exit_status == 0
        assert only(found, "note").code == "uncached"


async def test_a_socket_for_engines_that_another_process_holds_is_reported() -> None:
    [case] = [case for case in CASES if case.name == "moriio_read"]
    with case.engines() as told:
        async with simulators("prefill", "decode", **told) as [p, d]:
            settings = case.gateway([p, d])
            host, _, port = settings["zmq"]["registrations"].removeprefix("tcp://").rpartition(":")
            with socket.socket() as taken:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken.bind((host, int(port)))
                taken.listen()
                found = await report([p.url], [d.url], **settings)
            assert only(found, "warning").code == "cannot_try"
            assert found.exit_status == 1
            assert [engine.state for engine in found.engines] == ["unknown", "unknown"]


async def test_an_engine_that_does_not_register_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_REGISTERS_WITHIN", 0.2)
    [case] = [case for case in CASES if case.name == "moriio_read"]
    with case.engines() as told:
        async with simulators("prefill", "decode", **{**told, "proxy": ""}) as [p, d]:
            found = await report([p.url], [d.url], **{**case.gateway([p, d]), "zmq": {"registrations": told["proxy"]}})
            assert [finding.code for finding in found.findings] == ["unregistered", "unregistered"]
            assert "zmq.registrations" in found.findings[0].advice


async def test_an_exception_in_the_doctor_does_not_hide_other_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(trials: Trials, *pair: object) -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr(Trials, "_hand_over", fail)
    async with simulators("prefill", "decode") as [p, d]:
        finding = only(await report([p.url], [d.url]))
        assert (finding.code, finding.backends) == ("failed", (p.url, d.url))
        assert "oops" in finding.what
