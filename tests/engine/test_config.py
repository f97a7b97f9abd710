"""Configurations: what is read, and what an error says."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from scanside.engine.config import (
    ConfigStore,
    SystemConfig,
    origins,
    parameter_overrides,
    read_config,
    to_toml_rows,
    with_overrides,
)
from scanside.engine.errors import ConfigError

PLAIN = SystemConfig(name="mri/plain")


def read(text: str) -> SystemConfig:
    return read_config(text, name="mri/x", source="x.toml")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_a_file_changes_what_it_names_and_nothing_else() -> None:
    config = read('aliases = ["a"]\n[reconstruction]\nmethod = "grappa"\nkernel = [7, 2]\n[limits]\nframes_open = 5')
    assert (config.name, config.aliases) == ("mri/x", ("a",))
    changed = {path for path, value in to_toml_rows(config).items() if value != to_toml_rows(PLAIN)[path]}
    assert changed == {"name", "aliases", "reconstruction.method", "reconstruction.kernel", "limits.frames_open"}
    assert config.reconstruction.kernel == (7, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[reconstruction]\nmethod = "cg_sens"', r"x\.toml: reconstruction\.method = 'cg_sens': allowed: .* mean 'cg_sense'\?"),
        ("[output]\nimage = 5", r"x\.toml: output\.image = 5: allowed: magnitude, complex$"),
        ("[reconstruction]\niterations = 0", r"x\.toml: reconstruction\.iterations = 0: expected `int` >= 1"),
        ("[reconstruction]\niterations = 1000000000", r"reconstruction\.iterations = 1000000000: expected `int` <= 10000"),
        ('[reconstruction]\niterations = "5"', r"reconstruction\.iterations = '5': expected `int`, got `str`"),
        ("[reconstruction]\niterations = true", r"reconstruction\.iterations = True: expected `int`, got `bool`"),
        ("[reconstruction]\nregularization = nan", r"reconstruction\.regularization = nan: expected"),
        ("[reconstruction]\nregularization = inf", r"reconstruction\.regularization = inf: expected a finite number"),
        ("[reconstruction]\nkernel = [5]", r"reconstruction\.kernel = \[5\]: expected `array` of length 2"),
        ("[reconstruction]\nkernel = [5, 0]", r"reconstruction\.kernel\[1\] = 0: expected `int` >= 1"),
        ("[coil_maps]\ncrop = 1.0", r"coil_maps\.crop = 1\.0: expected `float` < 1"),
        ("[limits]\nframe_byte = 3", r"unknown key limits\.frame_byte; known: .*; did you mean 'frame_bytes'\?"),
        ("[reconstructon]\nx = 1", r"unknown key reconstructon; known: aliases, coil_maps, .*; did you mean 'reconstruction'\?"),
        ("reconstruction = 3", r"reconstruction = 3: expected `object`"),
        ("aliases = [3]", r"aliases\[0\] = 3: expected `str`"),
        ("[reconstruction", r"x\.toml: not valid TOML: Expected"),
        ("a = 1\na = 2", r"x\.toml: not valid TOML"),
    ],
)  # fmt: skip
def test_errors_say_where_what_and_what_was_meant(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("path", "given", "value"),
    [
        ("reconstruction.iterations", "20", 20),
        ("reconstruction.iterations", 20, 20),
        ("reconstruction.regularization", "1e-3", 1e-3),
        ("reconstruction.regularization", 0, 0.0),
        ("reconstruction.method", " grappa ", "grappa"),
        ("reconstruction.kernel", "[7, 2]", (7, 2)),
        ("reconstruction.kernel", "7,2", (7, 2)),
        ("output.send_original", "True", True),
        ("output.send_original", "FALSE", False),
        ("output.send_original", True, True),
        ("limits.frames_open", "7", 7),
    ],
)
def test_overrides_take_text_and_native_values(path: str, given: str | float | bool, value: object) -> None:
    assert to_toml_rows(with_overrides(PLAIN, {path: given}, source="-P"))[path] == value
    assert to_toml_rows(with_overrides(PLAIN, {}, source="-P")) == to_toml_rows(PLAIN)


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("reconstruction.iteration", "20", r"-P: unknown key reconstruction\.iteration; .*mean 'reconstruction\.iterations'\?"),
        ("reconstruction", "20", "-P: unknown key reconstruction;"),
        ("name", "x", "-P: unknown key name;"),
        ("reconstruction.iterations", "many", r"-P: reconstruction\.iterations = 'many': expected `int`"),
        ("reconstruction.iterations", "9" * 9000, r"reconstruction\.iterations = '9{76}\.\.\.: "),
        ("reconstruction.iterations", "", r"-P: reconstruction\.iterations = '': expected `int`"),
        ("reconstruction.regularization", "nan", r"reconstruction\.regularization = 'nan': expected"),
        ("reconstruction.regularization", float("inf"), r"reconstruction\.regularization = inf: expected a finite number"),
        ("reconstruction.kernel", "5", r"reconstruction\.kernel = '5': expected `array` of length 2"),
        ("reconstruction.method", "sens", r"reconstruction\.method = 'sens': allowed: .*; did you mean 'sense'\?"),
        ("output.send_original", "perhaps", r"output\.send_original = 'perhaps'"),
    ],
)  # fmt: skip
def test_errors_of_overrides(path: str, given: str | float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(PLAIN, {path: given}, source="-P")


def test_an_override_leaves_the_original_alone() -> None:
    changed = with_overrides(PLAIN, {"reconstruction.method": "sense"}, source="-P")
    assert (PLAIN.reconstruction.method, changed.reconstruction.method) == ("auto", "sense")


def test_parameters_of_a_console() -> None:
    known, unknown = parameter_overrides(
        {
            "sendOriginal": "True",
            "Iterations": 7,
            "reconstructionMethod": "sense",
            "coil_maps.kernel": 5,
            "version": "1.1.0",
            "regularization": "",
        }
    )
    assert known == {
        "output.send_original": "True",
        "reconstruction.iterations": 7,
        "reconstruction.method": "sense",
        "coil_maps.kernel": 5,
    }
    assert unknown == {"version"}


@pytest.mark.parametrize(
    "name",
    [
        "limits.frame_bytes",
        "frame_bytes",
        "runtime.device",
        "device",
        "name",
        "aliases",
        "description",
        "kernel",
        "",
        ".",
    ],
)
def test_what_a_console_cannot_set(name: str) -> None:
    assert parameter_overrides({name: "1"}) == ({}, {name})


def test_every_setting_but_kernel_has_a_short_name() -> None:
    closed = ("limits", "network", "training", "runtime")
    paths = [path for path in to_toml_rows(PLAIN) if "." in path and path.partition(".")[0] not in closed]
    for path in paths:
        assert parameter_overrides({path.replace(".", "").replace("_", ""): "1"})[0] == {path: "1"}
        short = path.rpartition(".")[2]
        assert parameter_overrides({short: "1"})[0] == ({} if short == "kernel" else {path: "1"})


def test_shipped_configurations_are_found_by_all_their_names() -> None:
    store = ConfigStore()
    for name in store.names():
        config = store.get(name)
        assert config.name == name
        kind, _, short = name.partition("/")
        shared = kind == "pat" and f"mri/{short}" in store.names()  # then the short name is that for MRI
        for alias in (*config.aliases, *(() if shared else (short,))):
            assert store.get(alias) is config
    assert store.get("default").name == store.get("openrecon").name == "mri/online"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "os", "", "x" * 1023, "mri/cartesian.toml", "MRI/CARTESIAN", "mri\x00"]
)
def test_names_that_are_not_installed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown configuration .*; known: .*cartesian") as caught:
        ConfigStore().get(name)
    assert len(str(caught.value).partition("known:")[0]) < 200  # not all of what was asked for


def test_a_misspelt_name_is_guessed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cartesian'"):
        ConfigStore().get("cartesain")


def test_a_folder_adds_replaces_and_redirects(tmp_path: Path) -> None:
    shipped = ConfigStore()
    write(tmp_path, "mri/mine", 'aliases = ["default", "sense"]')
    write(tmp_path, "mri/grappa", "[reconstruction]\niterations = 3")
    write(tmp_path, "pat/das", "")
    store = ConfigStore([tmp_path])
    assert set(store.names()) == {*shipped.names(), "mri/mine", "pat/das"}
    assert store.get("default").name == store.get("sense").name == "mri/mine"
    assert store.get("mri/sense").name == "mri/sense"
    assert store.get("openrecon").name == "mri/online"
    assert store.get("das").name == "pat/das"
    assert store.get("grappa").reconstruction.iterations == 3
    assert store.get("grappa").reconstruction.method == "auto"


def test_the_last_folder_wins(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / str(number), f"mri/m{number}", 'aliases = ["default"]')
        write(tmp_path / str(number), "mri/both", f"[reconstruction]\niterations = {number}")
    store = ConfigStore([tmp_path / "1", tmp_path / "2"])
    assert store.get("default").name == "mri/m2"
    assert store.get("both").reconstruction.iterations == 2


def test_an_alias_never_hides_a_full_name(tmp_path: Path) -> None:
    write(tmp_path, "mri/a", 'aliases = ["mri/sense"]')
    assert ConfigStore([tmp_path]).get("mri/sense").name == "mri/sense"


def test_two_files_with_one_alias(tmp_path: Path) -> None:
    write(tmp_path, "mri/a", 'aliases = ["same"]')
    write(tmp_path, "mri/b", 'aliases = ["same"]')
    with pytest.raises(
        ConfigError, match=r"a\.toml and .*b\.toml: both have the alias 'same'; take it out of one of them"
    ):
        ConfigStore([tmp_path])


def test_folders_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder of configurations"):
        ConfigStore([tmp_path / "none"])
    path = write(tmp_path, "mri/bad", "")
    path.write_bytes(b"description = '\xff'")
    with pytest.raises(ConfigError, match=r"bad\.toml: cannot be read as UTF-8 text"):
        ConfigStore([tmp_path])
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"bad\.toml: cannot be read"):
        ConfigStore([tmp_path])
    path.rmdir()
    write(tmp_path, "mri/bad", "[output]\npixels = 'int8'")
    with pytest.raises(ConfigError, match=r"bad\.toml: output\.pixels = 'int8': allowed: auto, float32, uint16"):
        ConfigStore([tmp_path])


def test_where_values_come_from(tmp_path: Path) -> None:
    write(tmp_path, "mri/mine", "[reconstruction]\niterations = 3\nmethod = 'sense'")
    store = ConfigStore([tmp_path])
    found = origins(store.get("mine"), store, {"reconstruction.method": "grappa"})
    assert found["reconstruction.method"] == "override"
    assert found["reconstruction.iterations"] == "file"
    assert found["reconstruction.regularization"] == "default"
    assert set(found) == set(to_toml_rows(PLAIN))


def test_stages_with_their_weights_and_what_training_reads_cannot_be_set_from_the_wire() -> None:
    wanted = {"stages": "[]", "weights": "/etc/passwd", "trainingsteps": 1, "networkblocks": 1, "learningrate": 1.0}
    assert parameter_overrides(wanted) == ({}, set(wanted))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[[stages]]\n[stages.transform]\nkind = 'imge'",
            r"stages\[0\]\.transform\.kind = 'imge'.*did you mean 'image'",
        ),
        ("[[stages]]\n[[stages]]\n[stages.data]\nweight = nan", r"stages\[1\]\.data\.weight = nan: expected"),
        (
            "[[stages]]\n[stages.prior]\nweight = 'a'",
            r"unknown key stages\[0\]\.prior\.weight;.*did you mean 'weights'",
        ),
        ("[sampler]\nsigma = [0.1, 0.0]", r"sampler\.sigma\[1\] = 0\.0: expected `float` > 0"),
    ],
)
def test_what_is_wrong_in_a_stage_is_named_by_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_replacing_values_leaves_nothing_for_the_garbage_collector() -> None:
    """Every session does it, and the collector of the server runs seldom."""
    with_overrides(PLAIN, {}, source="-P")
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            with_overrides(PLAIN, {"reconstruction.iterations": 3}, source="-P")
        assert gc.collect() == 0
    finally:
        gc.enable()
