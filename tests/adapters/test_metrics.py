"""Metrics: what is counted, what never becomes a label, and what HTTP answers to friend and foe."""

from __future__ import annotations

import http.client
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from scanside.adapters import metrics as module
from scanside.adapters.metrics import (
    FAMILIES,
    OTHER,
    WORDS_PER_LABEL,
    Metrics,
    MetricsServer,
    buckets,
    installed_versions,
)
from scanside.engine.errors import ConfigError, ScansideError
from scanside.engine.messages import FrameStats
from structlog.testing import capture_logs

REPOSITORY = Path(__file__).resolve().parents[2]
LATENCY = "scanside_frame_latency_seconds"
STAGE = "scanside_stage_duration_seconds"


def frame(**changes: Any) -> FrameStats:
    return FrameStats(**{"pipeline": "mri/sense", "outcome": "complete", "trigger": "flag", **changes})


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def exposition(metrics: Metrics) -> str:
    return prometheus_client.generate_latest(metrics.registry).decode()


# --- the table of metrics ----------------------------------------------------------------------------------------------------


def test_the_documentation_lists_every_metric_as_it_is() -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(scanside_\w+)` \| (.*?) \| (.*?) \| (?:(.*?) )?\| (.*) \|$", text, re.MULTILINE)
    documented = [
        (name, kind, unit, tuple(re.findall(r"`(\w+)`", labels)), said) for name, kind, unit, labels, said in rows
    ]
    assert documented == [(f.name, f.type, f.unit, f.labels, f.meaning) for f in FAMILIES]


def test_the_registry_holds_every_metric_of_the_table_and_no_other() -> None:
    metrics = Metrics()
    metrics.record_frame(frame(received=1.0, stages={"solve": 0.1}), 2.0)
    metrics.received("mrd", 1, 1)
    metrics.delivered("mrd")
    metrics.dropped("mrd", "deadline")
    metrics.session_opened()
    metrics.session_closed("complete")
    metrics.watch_queue("outbox", lambda: 3)
    metrics.session_replayed("resumed")
    found = {}
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {k for s in family.samples for k in s.labels if k != "le"}
        found[name] = (family.type, labels, family.documentation)
    assert found == {f.name: (f.type, set(f.labels), f.meaning) for f in FAMILIES}


def test_names_follow_the_conventions_of_prometheus() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"scanside_[a-z_]+", family.name)
        assert (family.type == "counter") == family.name.endswith("_total"), family.name
        assert (family.unit.split()[0] == "s") == family.name.endswith("_seconds"), family.name


# --- buckets -----------------------------------------------------------------------------------------------------------------


def test_edges_are_the_1_2_5_series_and_the_deadlines_exactly() -> None:
    edges = buckets([0.04, 0.1, 0.033])
    assert edges == sorted(set(edges))
    assert {0.04, 0.1, 0.033} <= set(edges)
    assert set(edges) - {0.04, 0.033} == {
        *(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    }


@pytest.mark.parametrize("deadline", [0.0, -0.04, math.inf, math.nan])
def test_a_deadline_that_is_none_is_refused(deadline: float) -> None:
    with pytest.raises(ConfigError, match=f"deadline {deadline} s is not above 0"):
        Metrics(deadlines=[deadline])


@given(st.lists(st.floats(0, 20), max_size=30))
def test_every_bucket_counts_the_latencies_up_to_its_edge(latencies: list[float]) -> None:
    metrics = Metrics()
    received = 1.0
    exact = [received + latency - received for latency in latencies]
    for latency in latencies:
        metrics.record_frame(frame(received=received), received + latency)
    for edge in buckets([0.04, 0.1]):
        le = prometheus_client.utils.floatToGoString(edge)
        found = value(metrics, f"{LATENCY}_bucket", pipeline="mri/sense", le=le)
        assert (found or 0) == sum(latency <= edge for latency in exact)
    assert (value(metrics, f"{LATENCY}_count", pipeline="mri/sense") or 0) == len(latencies)
    assert (value(metrics, f"{LATENCY}_sum", pipeline="mri/sense") or 0) == pytest.approx(sum(exact))


# --- what is counted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stats", "handed"),
    [
        (frame(received=0.0), 5.0),
        (frame(received=5.0), 0.0),
        (frame(received=5.0), 4.9),
        (frame(received=5.0), math.nan),
        (frame(received=5.0), math.inf),
        (frame(received=math.nan), 5.0),
        (frame(received=4.9, outcome="failed"), 5.0),
    ],
    ids=["arrival unknown", "no image", "image of an earlier frame", "nan", "inf", "arrival nan", "failed"],
)
def test_a_latency_that_is_not_known_is_left_out_and_the_frame_still_counted(stats: FrameStats, handed: float) -> None:
    metrics = Metrics()
    metrics.record_frame(stats, handed)
    assert value(metrics, "scanside_frames_total", pipeline="mri/sense", outcome=stats.outcome) == 1
    assert value(metrics, f"{LATENCY}_count", pipeline="mri/sense") is None


def test_stages_are_timed_and_impossible_durations_left_out() -> None:
    metrics = Metrics()
    metrics.record_frame(frame(stages={"solve": 0.25, "send": math.nan, "prepare": -1.0}), 0.0)
    metrics.record_frame(frame(stages={"solve": 0.5, "send": 0.125}), 0.0)
    assert value(metrics, f"{STAGE}_sum", stage="solve") == 0.75
    assert value(metrics, f"{STAGE}_sum", stage="send") == 0.125
    assert value(metrics, f"{STAGE}_count", stage="prepare") is None


def test_the_last_frame_is_stamped_with_the_time_of_day() -> None:
    metrics = Metrics()
    assert value(metrics, "scanside_engine_last_frame_timestamp_seconds") == 0
    before = time.time()
    metrics.record_frame(frame(outcome="failed"), 0.0)
    assert before <= (value(metrics, "scanside_engine_last_frame_timestamp_seconds") or 0) <= time.time()


def test_bytes_images_sessions_and_queues_are_counted() -> None:
    metrics = Metrics()
    metrics.received("mrd", 1000, 2)
    metrics.received("mrd", 24, 0)
    metrics.delivered("mrd")
    metrics.dropped("viewer", "slow")
    metrics.session_opened()
    metrics.session_opened()
    metrics.session_closed("incomplete")
    waiting = [1, 2, 3]
    metrics.watch_queue("outbox", lambda: len(waiting))
    assert value(metrics, "scanside_bytes_received_total", adapter="mrd") == 1024
    assert value(metrics, "scanside_acquisitions_received_total", adapter="mrd") == 2
    assert value(metrics, "scanside_images_delivered_total", sink="mrd") == 1
    assert value(metrics, "scanside_images_dropped_total", sink="viewer", reason="slow") == 1
    assert value(metrics, "scanside_sessions_active") == 1
    assert value(metrics, "scanside_sessions_total", outcome="incomplete") == 1
    assert value(metrics, "scanside_queue_depth", queue="outbox") == 3
    waiting.clear()
    assert value(metrics, "scanside_queue_depth", queue="outbox") == 0


def test_every_reason_of_the_error_tree_starts_at_zero() -> None:
    metrics = Metrics()

    def tree(error: type[ScansideError]) -> Iterator[str]:
        yield error.reason
        for child in error.__subclasses__():
            yield from tree(child)

    reasons = set(tree(ScansideError))
    assert {"protocol", "limit", "truncated"} <= reasons
    assert {value(metrics, "scanside_messages_rejected_total", reason=reason) for reason in reasons} == {0}


def test_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.message_rejected("limit")
    assert value(one, "scanside_messages_rejected_total", reason="limit") == 1
    assert value(other, "scanside_messages_rejected_total", reason="limit") == 0


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.record_frame(frame(received=1.0, stages={"solve": 0.5}), 2.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "scanside_frames_total", pipeline="mri/sense", outcome="complete") == 2000
    assert value(metrics, f"{LATENCY}_count", pipeline="mri/sense") == 2000
    assert value(metrics, f"{STAGE}_sum", stage="solve") == 1000


def test_the_build_is_told_in_labels() -> None:
    versions = installed_versions()
    assert set(versions) == {"version", "torch", "tensorrt", "cuda"}
    assert versions["torch"] != "none"
    assert value(Metrics(), "scanside_build_info", **versions) == 1
    told = {"version": "0.1.0", "torch": "2.9", "tensorrt": "none", "cuda": "13.0"}
    assert value(Metrics(build=told), "scanside_build_info", **told) == 1


# --- labels ------------------------------------------------------------------------------------------------------------------


@given(st.text().filter(lambda t: not re.fullmatch(r"[a-z0-9_/.-]{1,64}", t)))
def test_text_that_is_not_a_fixed_word_never_becomes_a_label(text: str) -> None:
    metrics = Metrics()
    metrics.record_frame(frame(pipeline=text, stages={text: 0.1}, received=1.0), 2.0)
    metrics.message_rejected(text)
    metrics.dropped(text, "slow")
    labels = {v for family in metrics.registry.collect() for s in family.samples for v in s.labels.values()}
    assert text not in labels
    assert value(metrics, "scanside_frames_total", pipeline=OTHER, outcome="complete") == 1
    assert value(metrics, f"{STAGE}_count", stage=OTHER) == 1
    assert value(metrics, "scanside_messages_rejected_total", reason=OTHER) == 1
    assert value(metrics, "scanside_images_dropped_total", sink=OTHER, reason="slow") == 1


def test_too_many_words_are_counted_as_other() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.record_frame(frame(pipeline=f"mri/scan-{number}"), 0.0)
    text = exposition(metrics)
    assert (
        len(set(re.findall(r'scanside_frames_total\{outcome="complete",pipeline="([^"]*)"', text)))
        == WORDS_PER_LABEL + 1
    )
    assert value(metrics, "scanside_frames_total", pipeline=OTHER, outcome="complete") == 1000 - WORDS_PER_LABEL
    assert value(metrics, "scanside_frames_total", pipeline="mri/scan-0", outcome="complete") == 1


def test_a_flood_of_bad_labels_takes_no_memory() -> None:
    metrics = Metrics()
    with capture_logs() as logs:
        for number in range(1000):
            metrics.message_rejected(f"Not A Word {number}")
    assert [(entry["event"], entry["metric"]) for entry in logs] == [
        ("label value replaced", "scanside_messages_rejected_total")
    ]
    assert "Not A Word" not in str(logs)
    assert value(metrics, "scanside_messages_rejected_total", reason=OTHER) == 1000
    assert len(metrics._rejected._known) < 50
    assert sum(map(len, metrics._rejected._words)) < 50


# --- HTTP --------------------------------------------------------------------------------------------------------------------


class Health:
    """What the server is told about itself."""

    def __init__(self) -> None:
        self.checks, self.alive = {"spool": True, "worker": True}, True

    def ready(self) -> tuple[bool, dict[str, bool]]:
        return all(self.checks.values()), self.checks

    def live(self) -> bool:
        return self.alive


@contextmanager
def serving(metrics: Metrics, health: Health) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics, "127.0.0.1", 0, health.ready, health.live)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def port(metrics: Metrics, health: Health) -> Iterator[int]:
    with serving(metrics, health) as server:
        yield server.port


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read().decode()


def talk(port: int, request: bytes) -> bytes:
    """Everything that comes back for these bytes."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_metrics_are_exposed_as_text(port: int, metrics: Metrics) -> None:
    metrics.received("mrd", 4096, 1)
    status, kind, body = ask(port, "/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    samples = {(s.name, *s.labels.values()): s.value for family in parse_text(body) for s in family.samples}
    assert samples["scanside_bytes_received_total", "mrd"] == 4096


def test_metrics_are_exposed_as_openmetrics_when_asked_for(port: int, metrics: Metrics) -> None:
    metrics.record_frame(frame(received=1.0), 1.5)
    status, kind, body = ask(port, "/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert (status, kind.split(";")[0]) == (200, "application/openmetrics-text")
    samples = {s.name: s.value for family in parse_openmetrics(body) for s in family.samples}
    assert samples[f"{LATENCY}_count"] == 1


def test_some_metrics_can_be_picked(port: int) -> None:
    body = ask(port, "/metrics?name[]=scanside_sessions_active")[2]
    assert [family.name for family in parse_text(body)] == ["scanside_sessions_active"]


def test_readiness_follows_the_checks(port: int, health: Health) -> None:
    assert ask(port, "/readyz")[:2] == (200, "application/json")
    health.checks["worker"] = False
    status, _, body = ask(port, "/readyz")
    assert (status, json.loads(body)) == (503, {"ready": False, "checks": {"spool": True, "worker": False}})
    assert ask(port, "/livez")[0] == 200


def test_liveness_follows_the_loop(port: int, health: Health) -> None:
    assert (ask(port, "/livez")[0], json.loads(ask(port, "/livez")[2])) == (200, {"live": True})
    health.alive = False
    assert (ask(port, "/livez")[0], json.loads(ask(port, "/livez")[2])) == (503, {"live": False})


def test_a_check_that_raises_is_an_error_and_not_the_end(port: int, health: Health, metrics: Metrics) -> None:
    health.checks = {"spool": object()}  # type: ignore[dict-item] # cannot be told in JSON
    metrics.watch_queue("outbox", lambda: [][0])
    with capture_logs() as logs:
        assert ask(port, "/readyz")[0] == 500
        assert ask(port, "/metrics")[0] == 500
        assert ask(port, "/livez")[0] == 200
    assert [entry["event"] for entry in logs] == ["endpoint failed"] * 2


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metric", "/favicon.ico", "/../metrics", "//metrics", "/%6detrics"]
)
def test_other_paths_are_not_found(port: int, path: str) -> None:
    assert ask(port, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get"])
def test_other_methods_are_not_allowed(port: int, method: str) -> None:
    assert ask(port, "/metrics", method)[0] == 405


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/nothing"])
def test_head_is_get_without_the_body(port: int, path: str) -> None:
    whole = talk(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = talk(port, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert head == whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    assert b"Connection: close" in head


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /livez\r\n\r\n", 400),
        (b"GET /livez HTTP/2\r\n\r\n", 400),
        (b"GET  /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /liv\xffez HTTP/1.1\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET http://127.0.0.1/livez HTTP/1.1\r\n\r\n", 200),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_malformed_requests_are_answered_with_the_fitting_status(port: int, request_bytes: bytes, status: int) -> None:
    assert talk(port, request_bytes).startswith(f"HTTP/1.1 {status} ".encode())


def test_whatever_bytes_arrive_the_server_goes_on(port: int) -> None:
    @given(st.binary(max_size=64))
    def send(rubbish: bytes) -> None:
        assert talk(port, rubbish + b"\r\n\r\n")[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 405", b"HTTP/1.1 404")

    send()
    assert ask(port, "/livez")[0] == 200


def test_half_a_request_gets_no_answer_and_costs_nobody(port: int) -> None:
    assert talk(port, b"GET /livez HTTP/1.1\r\nHost:") == b""
    assert ask(port, "/livez")[0] == 200


def test_a_silent_client_delays_nobody(port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)):
        assert ask(port, "/livez")[0] == 200


def test_a_client_that_drips_is_cut_off_by_the_total_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_PER_REQUEST", 0.3)
    with (
        closing(socket.create_connection(("127.0.0.1", port), timeout=0.02)) as connection,
        pytest.raises(OSError) as raised,
    ):
        while True:
            connection.sendall(b"a")  # never ends its line
            try:
                if connection.recv(1) == b"":
                    raise ConnectionResetError
            except TimeoutError:
                continue
    assert isinstance(raised.value, ConnectionError)


def test_one_connection_too_many_is_told_to_come_back(port: int) -> None:
    with ExitStack() as stack:
        for _ in range(module._CONNECTIONS):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), timeout=10)))
        assert ask(port, "/livez")[0] == 503
    deadline = time.monotonic() + 10
    while ask(port, "/livez")[0] == 503:
        assert time.monotonic() < deadline, "places of clients that left are not given to others"
        time.sleep(0.01)


# --- life of the server ------------------------------------------------------------------------------------------------------


def test_stopping_ends_the_thread_and_cuts_connections(metrics: Metrics, health: Health) -> None:
    before = set(threading.enumerate())
    with serving(metrics, health) as server, closing(socket.create_connection(("127.0.0.1", server.port), 10)) as idle:
        assert ask(server.port, "/livez")[0] == 200  # so the idle one was accepted too
        server.stop()
        assert idle.recv(1) == b""
        assert not set(threading.enumerate()) - before
        with pytest.raises(ConnectionRefusedError):
            ask(server.port, "/livez")


def test_a_server_can_be_stopped_twice_and_started_again(metrics: Metrics, health: Health) -> None:
    server = MetricsServer(metrics, "127.0.0.1", 0, health.ready, health.live)
    server.stop()
    for _ in range(3):
        server.start()
        server.start()
        assert ask(server.port, "/livez")[0] == 200
        server.stop()
        server.stop()


def test_stopping_at_once_leaves_nothing(metrics: Metrics, health: Health) -> None:
    for _ in range(20):
        with serving(metrics, health) as server:
            assert server.port > 0


def test_a_port_that_is_taken_is_named(metrics: Metrics, health: Health, port: int) -> None:
    server = MetricsServer(metrics, "127.0.0.1", port, health.ready, health.live)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: .*choose another port"):
        server.start()
    server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "scanner.example"])  # noqa: S104 - refused
def test_only_loopback_is_bound_unless_told_otherwise(metrics: Metrics, health: Health, host: str) -> None:
    with pytest.raises(ConfigError, match="refusing to bind"):
        MetricsServer(metrics, host, 0, health.ready, health.live)
    assert MetricsServer(metrics, host, 9464, health.ready, health.live, insecure=True).port == 9464


def test_ipv6_loopback_is_served(metrics: Metrics, health: Health) -> None:
    server = MetricsServer(metrics, "::1", 0, health.ready, health.live)
    try:
        server.start()
    except ConfigError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    try:
        with closing(http.client.HTTPConnection("::1", server.port, timeout=10)) as connection:
            connection.request("GET", "/livez")
            assert connection.getresponse().status == 200
    finally:
        server.stop()


# --- with the real Prometheus ------------------------------------------------------------------------------------------------


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian package prometheus)")
    return found


def busy_metrics() -> Metrics:
    metrics = Metrics()
    for latency in (0.03, 0.03, 0.03, 0.06):
        metrics.record_frame(frame(received=100.0, stages={"prepare": 0.001, "solve": latency}), 100.0 + latency)
    metrics.received("mrd", 4096, 1)
    metrics.delivered("mrd")
    metrics.dropped("viewer", "slow")
    metrics.session_opened()
    metrics.session_closed("complete")
    metrics.watch_queue("outbox", lambda: 3)
    return metrics


@pytest.mark.peer
def test_promtool_finds_nothing_to_complain_about() -> None:
    check = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=exposition(busy_metrics()),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        return listening.getsockname()[1]


@contextmanager
def prometheus(target: int, folder: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Run Prometheus on an endpoint; gives a function from a query to its result."""
    port = free_port()
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs:\n"
        f"  - {{job_name: scanside, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}\n"
    )
    arguments = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def query(expression: str) -> list[dict[str, Any]]:
        try:
            status, _, body = ask(port, f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        except ConnectionRefusedError:  # not up yet
            return []
        return json.loads(body)["data"]["result"] if status == 200 else []

    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([program("prometheus"), *arguments], stderr=log) as process,
    ):
        try:
            yield query
        finally:
            process.terminate()


@pytest.mark.peer
def test_prometheus_scrapes_and_computes_quantiles(tmp_path: Path, health: Health) -> None:
    program("prometheus")
    with serving(busy_metrics(), health) as server, prometheus(server.port, tmp_path) as query:
        quantile = f"histogram_quantile(0.5, sum by (le) ({LATENCY}_bucket))"
        deadline = time.monotonic() + 60
        while [r["value"][1] for r in query("up")] != ["1"] or not query(quantile):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        # Ranks 0 to 3 lie between the edges 20 ms and 40 ms, so the second is interpolated at two thirds of the way.
        assert float(query(quantile)[0]["value"][1]) == pytest.approx(0.02 + 0.02 * 2 / 3)
        kept = query(f'sum({LATENCY}_bucket{{le="0.04"}}) / sum({LATENCY}_count)')
        assert float(kept[0]["value"][1]) == 0.75
