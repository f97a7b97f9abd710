"""What may come when in a session: the reactions of protocol 1.4, and any order of messages at all."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters import mrd
from scanside.adapters.grammar import (
    Answer,
    Begin,
    Dialect,
    Failure,
    Finish,
    Forward,
    Grammar,
    Role,
    Stage,
    parse_parameters,
    reply_text,
)
from scanside.adapters.mrd_framing import Frame, Framer
from scanside.engine.config import ConfigStore
from scanside.engine.errors import PeerError

STORE = ConfigStore()
CONFIG = mrd.encode_config_file("default")
HEADER = mrd.encode_header("<ismrmrdHeader/>")
ACQUISITION = struct.pack("<H", 1008) + bytes(34) + struct.pack("<HHH", 2, 1, 1) + bytes(300) + bytes(16)
CLOSE = mrd.encode_close()
NOISE_CHAIN = (
    "<gadgetronStreamConfiguration><gadget><name>N</name><classname>NoiseSummaryGadget</classname>"
    "<property><name>noise_file</name><value>GadgetronNoiseCovarianceMatrix_scan_7</value></property>"
    "</gadget></gadgetronStreamConfiguration>"
)
MESSAGES = {
    "config": CONFIG,
    "unknown config": mrd.encode_config_file("nonsense"),
    "config text": mrd.encode_config_text("<configuration/>"),
    "noise chain": mrd.encode_config_text(NOISE_CHAIN),
    "broken text": mrd.encode_config_text("nothing like XML"),
    "header": HEADER,
    "acquisition": ACQUISITION,
    "text": mrd.encode_text("hello"),
    "parameters": mrd.encode_text('{"parameters": {"config": "sense"}}'),
    "query": mrd.encode_query(mrd.Query(7, "gadgetron::info")),
    "response": mrd.encode_response(mrd.Response(7, "answer")),
    "error": mrd.encode_error("wrong"),
    "dependency": mrd.encode_dependency({"status": ["failed"]}),
    "waveform": struct.pack("<H", 1026) + bytes(28) + struct.pack("<HH", 1, 1) + bytes(8) + bytes(4),
    "close": CLOSE,
}


def frames(*messages: bytes) -> list[Frame]:
    """Messages as they come out of the framer."""
    return Framer().feed(b"".join(messages))


def grammar(dialect: str = "auto", default: str | None = None) -> Grammar:
    """A fresh session."""
    return Grammar(STORE, str.upper, dialect=dialect, default=default)


def reactions(state: Grammar, *messages: bytes) -> list[object]:
    """All actions that messages cause."""
    return [action for frame in frames(*messages) for action in state.react(frame)]


def kinds(actions: list[object]) -> list[str]:
    """Their class names."""
    return [type(action).__name__ for action in actions]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ((CLOSE,), ["Finish"]),
        ((MESSAGES["query"], CLOSE), ["Answer", "Finish"]),
        ((HEADER, CLOSE), ["Failure", "Finish"]),
        ((MESSAGES["unknown config"], CLOSE), ["Failure", "Finish"]),
        ((MESSAGES["broken text"], CLOSE), ["Failure", "Finish"]),
        ((CONFIG, CLOSE), ["Begin", "Finish"]),
        ((CONFIG, CONFIG, CLOSE), ["Begin", "Failure", "Finish"]),
        ((CONFIG, HEADER, HEADER, CLOSE), ["Begin", "Forward", "Failure", "Finish"]),
        ((ACQUISITION, CLOSE), ["Failure", "Finish"]),
        ((CONFIG, ACQUISITION, CLOSE), ["Begin", "Failure", "Finish"]),
        ((MESSAGES["text"], CLOSE), ["Failure", "Finish"]),
        ((CONFIG, HEADER, MESSAGES["text"], ACQUISITION, CLOSE), ["Begin", "Forward", "Forward", "Finish"]),
        ((CONFIG, HEADER, MESSAGES["parameters"], CLOSE), ["Begin", "Forward", "Forward", "Finish"]),
        ((CONFIG, HEADER, MESSAGES["error"], ACQUISITION, CLOSE), ["Begin", "Forward", "Failure", "Finish"]),
        ((CONFIG, MESSAGES["query"], HEADER, MESSAGES["query"]), ["Begin", "Answer", "Forward", "Answer"]),
        ((CONFIG, HEADER, CLOSE, ACQUISITION, HEADER, CLOSE), ["Begin", "Forward", "Finish"]),
    ],
)
def test_each_order_of_messages_has_its_reaction(messages: tuple[bytes, ...], expected: list[str]) -> None:
    assert kinds(reactions(grammar(), *messages)) == expected


@given(st.lists(st.sampled_from(sorted(MESSAGES)), max_size=12), st.sampled_from(["auto", "gadgetron", "fire"]))
def test_any_order_of_messages_leads_to_documented_actions(names: list[str], dialect: str) -> None:
    state = grammar(dialect)
    begun = failed = finished = 0
    for name in names:
        for frame in frames(MESSAGES[name]):
            before = state.stage
            for action in state.react(frame):
                assert not finished, "nothing follows the end"
                assert not failed or isinstance(action, Finish), "only CLOSE counts after a failure"
                begun += isinstance(action, Begin)
                failed += isinstance(action, Failure)
                finished += isinstance(action, Finish)
                assert not isinstance(action, Forward) or begun, "nothing is handed on without a configuration"
                assert not isinstance(action, Failure) or action.text
            assert state.stage >= before, "a session never goes back"
    assert begun <= 1
    assert failed <= 1
    assert finished == ("close" in names)
    assert state.closed == bool(finished)


@given(st.binary(max_size=40))
def test_any_configuration_is_accepted_or_refused_with_words(data: bytes) -> None:
    for message in (struct.pack("<H", 1) + data.ljust(1024, b"\0"), struct.pack("<HI", 2, len(data)) + data):
        (action,) = reactions(grammar(), message)
        assert isinstance(action, Begin | Failure)


@pytest.mark.parametrize("name", ["../../etc/passwd", "os", "A" * 1023, "", "nonsense.xml", "default.xml\n", "%s%n"])
def test_names_that_are_not_installed_are_refused_with_those_that_are(name: str) -> None:
    (failure,) = reactions(grammar(), mrd.encode_config_file(name))
    assert isinstance(failure, Failure)
    assert failure.reason == "config"
    assert "default" in failure.text
    assert "sense" in failure.text


def test_a_default_configuration_takes_the_names_that_are_not_installed() -> None:
    (begin,) = reactions(grammar(default="mri/grappa"), mrd.encode_config_file("siemens_special"))
    assert isinstance(begin, Begin)
    assert begin.config == "mri/grappa"


def test_the_fixed_name_of_openrecon_means_its_dialect() -> None:
    state = grammar()
    (begin,) = reactions(state, mrd.encode_config_file("openrecon"))
    assert isinstance(begin, Begin)
    assert begin.config == STORE.get("default").name
    assert state.dialect is Dialect.FIRE


def test_json_after_the_header_tells_fire_from_gadgetron() -> None:
    state = grammar()
    reactions(state, CONFIG, HEADER, MESSAGES["text"])
    assert state.dialect is Dialect.GADGETRON
    reactions(state, MESSAGES["parameters"])
    assert state.dialect is Dialect.FIRE


def test_a_fixed_dialect_is_not_guessed() -> None:
    state = grammar("gadgetron")
    reactions(state, CONFIG, HEADER, MESSAGES["parameters"])
    assert state.dialect is Dialect.GADGETRON


def test_a_noise_session_knows_which_measurement_it_asks_for() -> None:
    (begin,) = reactions(grammar(), mrd.encode_config_text(NOISE_CHAIN))
    assert begin == Begin("mri/online", {}, Role.NOISE, "scan_7")
    (by_name,) = reactions(grammar(), mrd.encode_config_file("gtquery.xml"))
    assert isinstance(by_name, Begin)
    assert by_name.role is Role.NOISE


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("<configuration/>", Role.EXTERNAL),
        (
            '<?xml version="1.0"?><configuration><property name="scanside.config" value="sense"/></configuration>',
            Role.EXTERNAL,
        ),
        ("<configuration><stream><gadget><name>a</name></gadget></stream></configuration>", Role.SCAN),
        ("<gadgetronStreamConfiguration><reader/></gadgetronStreamConfiguration>", Role.SCAN),
    ],
)
def test_the_configuration_text_says_what_a_session_is_for(text: str, role: Role) -> None:
    (begin,) = reactions(grammar(), mrd.encode_config_text(text))
    assert isinstance(begin, Begin)
    assert begin.role is role
    assert begin.config == ("mri/sense" if "sense" in text else "mri/online")


def test_properties_with_a_dot_are_ours_and_checked() -> None:
    text = '<configuration><property name="{}" value="{}"/><property name="model" value="x.plan"/></configuration>'
    (begin,) = reactions(grammar(), mrd.encode_config_text(text.format("reconstruction.iterations", 7)))
    assert isinstance(begin, Begin)
    assert begin.overrides == {"reconstruction.iterations": "7"}
    for name, value in (("reconstruction.iterations", -1), ("no.such", 1), ("limits.sessions", 9999)):
        (failure,) = reactions(grammar(), mrd.encode_config_text(text.format(name, value)))
        assert isinstance(failure, Failure)
        assert name in failure.text


def test_queries_get_their_answer_with_their_number() -> None:
    (answer,) = reactions(grammar(), MESSAGES["query"])
    assert isinstance(answer, Answer)
    assert mrd.response(frames(answer.data)[0]) == mrd.Response(7, "GADGETRON::INFO")


def test_a_session_can_be_failed_and_closed_from_outside() -> None:
    state = grammar()
    reactions(state, CONFIG, HEADER)
    state.fail()
    assert reactions(state, ACQUISITION) == []
    state.close()
    state.fail()
    assert state.stage is Stage.CLOSED
    assert reactions(state, CLOSE) == []


def test_texts_to_the_console_carry_their_level_in_each_dialect() -> None:
    assert mrd.text(frames(reply_text("error", "broken", Dialect.FIRE))[0]) == "ERR broken"
    assert mrd.text(frames(reply_text("warning", "odd", Dialect.FIRE))[0]) == "WRN odd"
    assert mrd.text(frames(reply_text("error", "broken", Dialect.GADGETRON))[0]) == "[scanside] ERROR: broken"


values = st.dictionaries(st.text(max_size=8), st.one_of(st.text(max_size=8), st.booleans(), st.integers(-99, 99)))


@given(values)
def test_parameters_come_through_as_they_are(parameters: dict[str, object]) -> None:
    assert parse_parameters(json.dumps({"version": "1.1.0", "parameters": parameters})) == parameters


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ('{"parameters":' + '{"a":' * 50_000 + "1" + "}" * 50_001, "nested"),
        ('{"parameters":{"a":' + "9" * 10_000 + "}}", "JSON"),
        ('{"parameters":{"a":NaN}}', "NaN"),
        ('{"parameters":5}', "object"),
        ("[1, 2]", "object"),
        ("{", "JSON"),
        ('{"parameters":{"slider":{"a":1}}}', "parameters.slider"),
        ('{"parameters":{"slider":null}}', "parameters.slider"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused_with_their_path(text: str, says: str) -> None:
    with pytest.raises(PeerError, match=says):
        parse_parameters(text)


@given(st.text(max_size=60))
def test_any_text_as_parameters_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_parameters(text), dict)
    except PeerError as error:
        assert str(error)
