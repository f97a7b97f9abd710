"""Questions that clients of Gadgetron ask, and those about scanside itself."""

from __future__ import annotations

import pytest
from scanside.adapters.queries import answer_query, package_version
from scanside.engine.config import ConfigStore

STORE = ConfigStore()
GADGETRON = ("info", "version", "build", "info::memory", "info::python", "info::matlab", "info::cuda", "cuda::driver")


@pytest.mark.parametrize(
    "key", [f"gadgetron::{name}" for name in GADGETRON] + ["ismrmrd::version", "scanside::version"]
)
def test_what_gadgetron_answers_is_answered(key: str) -> None:
    answer = answer_query(key, STORE, ready=True, sessions=0)
    assert answer
    assert answer != "Unknown query"


@pytest.mark.parametrize("key", ["cuda::devices", "cuda::runtime", "cuda::memory", "cuda::capabilities"])
def test_what_depends_on_the_graphics_card_is_never_unknown(key: str) -> None:
    assert answer_query(f"gadgetron::{key}", STORE, ready=True, sessions=0) != "Unknown query"


@pytest.mark.parametrize(("ready", "health"), [(True, "ready"), (False, "not ready")])
def test_health_is_told(ready: bool, health: str) -> None:
    assert answer_query("scanside::health", STORE, ready=ready, sessions=3) == health
    assert answer_query("scanside::sessions", STORE, ready=ready, sessions=3) == "3"
    assert answer_query("scanside::configs", STORE, ready=ready, sessions=3).split(";") == STORE.names()


@pytest.mark.parametrize("key", ["", "gadgetron", "gadgetron::info::", "os.environ", "scanside::health\n"])
def test_anything_else_is_unknown(key: str) -> None:
    assert answer_query(key, STORE, ready=True, sessions=0) == "Unknown query"


def test_versions_of_absent_packages() -> None:
    assert package_version("no-such-package") == "not installed"
