"""The command line: in this process through typer's runner, as a program of its own, and against a real server."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scanside.adapters.cli import app
from scanside.adapters.commands.results import Latency
from scanside.adapters.files.ismrmrd import open_scan, write_scan
from scanside.adapters.local_server import LocalServer
from scanside.adapters.server import ServeOptions
from scanside.engine.config import ConfigStore, read_config
from scanside.engine.errors import ConfigError, DeviceLost
from scanside.engine.messages import EndOfScan, Image
from scanside.engine.simulation.scan import simulate_scan
from scanside.engine.streaming.session import Session
from typer.testing import CliRunner, Result

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "scanside.adapters.cli"]
COMMANDS = ["serve", "send", "run", "config", "config list", "config show", "config check", "doctor", "demo", "tune"]
FRAMES = 3


def call(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(word) for word in words])


def program(*words: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=100, **settings)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small moving scan in an ISMRMRD file."""
    simulated = simulate_scan(48, 4, 2, 16, repetitions=FRAMES, motion_degrees=5.0, noise=0.002)
    path = tmp_path_factory.mktemp("scans") / "scan.h5"
    write_scan(path, simulated.header, simulated.batches)
    return path


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Port of a real server with one worker process."""
    with LocalServer(["--threads", "1"]) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def expected(scan: Path) -> list[np.ndarray]:
    """The images that the engine itself makes of the scan, in this process."""
    return [image.pixels for image in images_of_engine(scan)]


def images_of_engine(path: Path, name: str = "default") -> list[Image]:
    from scanside.adapters.mrd_header import parse_header

    config = ConfigStore().get(name)
    session = Session(config)
    with open_scan(path) as file:
        messages = [parse_header(file.xml, config.limits), *file.batches(), EndOfScan()]
        return [event for message in messages for event in session.feed(message) if isinstance(event, Image)]


def pixels(path: Path, group: str = "dataset") -> list[np.ndarray]:
    with open_scan(path, group) as file:
        return [image.pixels for image in file.images()]


def groups(path: Path) -> list[str]:
    with h5py.File(path, "r") as file:
        return sorted(file)


# --- help and errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_says_what_it_does_and_shows_how(command: str) -> None:
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Examples" in result.output
    shown = re.findall(r"^ *scanside (\w+(?: \w+)?)", result.output, re.MULTILINE)
    assert any(line.startswith(command) for line in shown)


def test_without_a_command_the_help_is_shown() -> None:
    result = call()
    assert result.exit_code == 0
    assert "Commands" in result.output


@pytest.mark.parametrize("module", ["cli", "commands.configs", "commands.output"])
def test_the_help_and_light_commands_need_no_heavy_package(module: str) -> None:
    heavy = {"torch", "numpy", "h5py", "zmq", "matplotlib"}
    code = f"import scanside.adapters.{module}, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_console_script_is_the_one_that_is_tested() -> None:
    entry = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]["scanside"]
    module, _, name = entry.partition(":")
    assert getattr(importlib.import_module(module), name) is importlib.import_module("scanside.adapters.cli").main


@pytest.mark.parametrize(
    ("words", "code", "expected_text"),
    [
        ("frobnicate", 2, "No such command 'frobnicate'"),
        ("serve --frobnicate", 2, "No such option: --frobnicate"),
        ("serve --dialect klingon", 2, "klingon"),
        ("serve -p 70000", 2, "65535"),
        ("serve -H 0.0.0.0 -p 0", 2, "--insecure"),
        ("serve -d nonsense", 2, "unknown configuration 'nonsense'"),
        ("serve --configs /no/such/folder", 2, "no such folder"),
        ("send", 2, "expected a file to send"),
        ("send a.h5 -f b.h5", 2, "expected a file to send, once"),
        ("send a.h5 --pace-ms 3 --rate 5", 2, "give one of them"),
        ("send /no/such/file.h5", 2, "/no/such/file.h5 is not there"),
        ("run", 2, "expected a file to reconstruct"),
        ("run x.h5 -c cartesain", 2, "did you mean 'cartesian'?"),
        ("run x.h5 -P method", 2, "expected name=value"),
        ("run x.h5 -P reconstruction.metod=sense", 2, "did you mean 'reconstruction.method'?"),
        ("run x.h5 -o /no/such/folder/out.h5", 2, "the folder /no/such/folder does not exist"),
        ("config show", 2, "Missing argument"),
        ("config show nonsense", 2, "unknown configuration"),
        ("config check /no/such/file.toml", 1, "/no/such/file.toml: No such file or directory"),
    ],
)
def test_errors_are_one_clear_line(
    words: str, code: int, expected_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*words.split())
    assert result.exit_code == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("scanside: ")
    assert expected_text in line


def test_debug_shows_the_traceback() -> None:
    result = call("--debug", "config", "show", "nonsense")
    assert isinstance(result.exception, ConfigError)
    assert "Traceback" in program("--debug", "config", "show", "nonsense").stderr


def test_options_glued_with_an_equals_sign_work_as_in_openrecon_s_command_lines(scan: Path) -> None:
    result = call("send", scan, "-p=9", "-a=localhost")
    assert "no server answers at localhost:9" in result.stderr


# --- config ------------------------------------------------------------------------------------------------------------------


def test_config_list_in_a_pipe_has_a_name_and_a_description_per_line(tmp_path: Path) -> None:
    (tmp_path / "mri").mkdir()
    (tmp_path / "mri" / "mine.toml").write_text('description = "my own"\n')
    done = program("config", "list", "--configs", tmp_path)
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert list(rows) == ConfigStore([tmp_path]).names()
    assert rows["mri/mine"] == "my own"


@pytest.mark.parametrize("name", ConfigStore().names())
def test_the_effective_configuration_is_toml_that_gives_the_same_configuration(name: str) -> None:
    result = call("config", "show", name, "--effective", "-P", "reconstruction.iterations=7")
    again = read_config(result.stdout, name=name, source="shown")
    assert again.reconstruction.iterations == 7
    shipped = ConfigStore().get(name)
    assert again.preparation == shipped.preparation
    assert (again.trigger, again.output, again.limits) == (shipped.trigger, shipped.output, shipped.limits)
    assert re.search(r"^iterations = 7 +# override$", result.stdout, re.MULTILINE)
    assert "# default" in result.stdout


def test_config_show_leaves_out_what_is_default() -> None:
    shown = call("config", "show", "Generic_Cartesian_SENSE.xml").stdout
    assert "# mri/sense: " in shown
    assert '"cg_sense"' in shown
    assert "# default" not in shown


def test_config_check_accepts_shipped_files_and_names_mistakes(tmp_path: Path) -> None:
    good = REPOSITORY / "configs" / "mri" / "sense.toml"
    result = call("config", "check", good)
    assert (result.exit_code, result.stdout.partition(",")[0]) == (0, f"{good}: OK")
    bad = tmp_path / "bad.toml"
    bad.write_text("[reconstruction]\niteration = 3\n")
    result = call("config", "check", bad)
    assert result.exit_code == 2
    assert "reconstruction.iteration" in result.stderr
    assert "did you mean 'iterations'?" in result.stderr


# --- run ---------------------------------------------------------------------------------------------------------------------


def test_run_writes_what_the_engine_makes(scan: Path, expected: list[np.ndarray], tmp_path: Path) -> None:
    out, png = tmp_path / "out.h5", tmp_path / "png"
    before = torch.get_num_threads()
    result = call("run", "-i", scan, "-o", out, "-c", "default", "--png", png, "--threads", 1)
    used, _ = torch.get_num_threads(), torch.set_num_threads(before)
    assert used == 1
    assert result.exit_code == 0, result.stderr
    assert len(expected) == FRAMES
    np.testing.assert_allclose(pixels(out), expected, rtol=1e-4, atol=1e-6)
    assert len(list(png.glob("*.png"))) == FRAMES
    frames = [line for line in result.stdout.splitlines() if line.startswith("repetition")]
    assert len(frames) == FRAMES
    assert all(
        re.search(r"slice 0 +prior +complete +[12]\.\d\d +\d+ .*reconstruction [\d.]+ ms", line) for line in frames
    )


def test_run_obeys_overrides(scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    words = (
        "run",
        scan,
        "-o",
        out,
        "-G",
        "mine",
        "-P",
        "reconstruction.method=zero_filled",
        "-P",
        "output.image=complex",
    )
    result = call(*words)
    assert "zero_filled" in result.stdout
    assert groups(out) == ["mine"]
    assert pixels(out, "mine")[0].dtype == np.complex64


def test_run_without_an_image_is_a_failure(scan: Path, tmp_path: Path) -> None:
    result = call("run", scan, "-c", "receive", "-o", tmp_path / "out.h5")
    assert result.exit_code == 1
    assert "no image" in result.stderr
    assert not (tmp_path / "out.h5").exists()


def test_run_refuses_a_group_that_is_there_before_it_reconstructs(scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    assert call("run", scan, "-o", out).exit_code == 0
    result = call("run", scan, "-o", out)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "already has a group 'dataset'" in result.stderr


# --- send --------------------------------------------------------------------------------------------------------------------


def test_send_brings_back_what_the_engine_makes(
    scan: Path, port: int, expected: list[np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    done = program(
        "send", "-f", scan, "-p", port, "-o", out, "-G", "first", "-c", "default.xml", "-v", "--rate", "2000"
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(pixels(out, "first"), expected, rtol=1e-4, atol=1e-6)
    assert (
        len(re.findall(r"^image \d of series 1: 48 x 48 float32 magnitude, [\d.]+ ms after", done.stdout, re.MULTILINE))
        == 3
    )
    assert re.search(r"latency +p50 [\d.]+ ms, p95 [\d.]+ ms, max [\d.]+ ms", done.stdout)
    assert re.search(r"pace +0\.5 ms between readouts", done.stdout)


def test_send_compressed_several_times_makes_a_group_each(
    scan: Path, port: int, expected: list[np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    result = call("send", scan, "-p", port, "-o", out, "-l", 2, "-P", 20, "--png", tmp_path / "png")
    assert result.exit_code == 0, result.stderr
    assert len(groups(out)) == 2
    for group in groups(out):
        np.testing.assert_allclose(pixels(out, group), expected, atol=1e-3 * np.max(expected))
    assert len(list((tmp_path / "png").glob("*.png"))) == FRAMES


def test_send_speaks_as_openrecon_does(scan: Path, port: int, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    result = call(
        "send", scan, "-p", port, "-o", out, "-G", "x", "-c", "openrecon", "--parameter", "method=zero_filled"
    )
    assert result.exit_code == 0
    assert "reconstruction.method = zero_filled" in result.stderr
    assert pixels(out, "x")[0].dtype == np.uint16


def test_send_sends_a_configuration_from_a_file(scan: Path, port: int, tmp_path: Path) -> None:
    from scanside.adapters.client import config_text

    chain = tmp_path / "chain.xml"
    chain.write_text(config_text("mri/sense", {"output.image": "complex"}))
    result = call("send", scan, "-p", port, "-C", chain)
    assert result.exit_code == 0, result.stderr
    assert "48 x 48 complex64 complex" in result.stdout


def test_send_tells_the_server_s_reason_and_fails(scan: Path, port: int) -> None:
    result = call("send", scan, "-p", port, "-c", "nonsense")
    assert result.exit_code == 1
    assert "unknown configuration 'nonsense'" in result.stderr


def test_send_fails_when_no_image_comes_back(scan: Path, port: int, tmp_path: Path) -> None:
    result = call("send", scan, "-p", port, "-c", "receive", "-o", tmp_path / "out.h5")
    assert result.exit_code == 1
    assert "no image came back" in result.stderr
    assert not (tmp_path / "out.h5").exists()


def test_send_asks(port: int) -> None:
    assert call("send", "-Q", "scanside::health", "-p", port).stdout == "ready\n"
    assert call("send", "-Q", "nonsense", "-p", port).stdout == "Unknown query\n"


def test_send_asks_for_a_noise_measurement(port: int) -> None:
    result = call("send", "-q", "-p", port, "-c", "gtquery.xml")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("status = ")


# --- serve -------------------------------------------------------------------------------------------------------------------


def test_serve_says_where_it_listens_and_ends_on_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    words = [*PROGRAM, "serve", "-p=0", "--metrics-port=0", "-v", "-l", str(log), "--defaultConfig=mri/sense"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in process.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        found = re.search(r"listens on 127\.0\.0\.1:(\d+)", said)
        assert found
        assert call("send", "-Q", "scanside::configs", "-p", found[1]).stdout.strip() == ";".join(ConfigStore().names())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    assert re.search(r"http://127\.0\.0\.1:\d+/metrics", said)
    assert all(name in said for name in ConfigStore().names())
    assert "any other name means mri/sense" in said
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert "ready" in [event["event"] for event in events]
    assert all({"timestamp", "level"} <= set(event) for event in events)


def test_serve_ends_though_nobody_reads_its_log_any_more() -> None:
    """As when what had started it was killed first."""
    words = [*PROGRAM, "serve", "-p=0", "--metrics-port=0", "--no-spool", "-v"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any("Ctrl-C" in line for line in process.stdout)
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert isinstance(process.wait(60), int)
    finally:
        process.kill()
        process.wait()


def test_serve_offers_every_setting_of_the_server() -> None:
    offered = {"host", "port", "default_config", "config_folders", "dialect", "failure", "workers", "threads"}
    offered |= {"metrics_host", "metrics_port", "bus", "record", "insecure", "idle_seconds"}
    offered |= {"spool", "spool_bytes", "keep_raw"}
    fixed = {"handshake_seconds", "worker_seconds", "drain_seconds"}
    assert set(ServeOptions.__struct_fields__) == offered | fixed


def test_a_server_that_cannot_start_is_told_with_its_last_words() -> None:
    with LocalServer(["-d", "nonsense"]) as server, pytest.raises(DeviceLost, match="unknown configuration 'nonsense'"):
        server.wait_ready()


def test_latency_figures() -> None:
    assert Latency.of([]) is None
    assert str(Latency.of([0.001 * n for n in range(1, 102)])) == "p50 51.0 ms, p95 96.0 ms, max 101.0 ms"
