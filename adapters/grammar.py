"""Which message may come when in a scanner session, and what each deserves as an answer; no sockets here.

The reactions are those of Gadgetron 4.7 towards scanner clients: errors go out as TEXT followed by CLOSE, every session ends
with CLOSE, and a session that asks for a noise dependency hears no text at all.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from typing import Literal
from xml.etree.ElementTree import Element

import msgspec
from scanside.engine.config import ConfigStore, Value, with_overrides
from scanside.engine.errors import ConfigError, PeerError
from scanside.engine.messages import Level

from . import mrd
from .mrd_framing import Frame
from .mrd_lengths import MessageId
from .mrd_xml import parse_xml

__all__ = [
    "Action",
    "Answer",
    "Begin",
    "Dialect",
    "Failure",
    "Finish",
    "Forward",
    "Grammar",
    "Role",
    "Stage",
    "parse_parameters",
    "reply_text",
]

NOISE_GADGETS = ("NoiseSummaryGadget", "DependencyQueryGadget")
NOISE_PREFIX = "GadgetronNoiseCovarianceMatrix_"
NOISE_CONFIGS = ("gtquery.xml", "default_measurement_dependencies_ismrmrd_storage.xml")


class Dialect(enum.StrEnum):
    """Which family of consoles the other side belongs to."""

    GADGETRON = "gadgetron"
    FIRE = "fire"


class Role(enum.StrEnum):
    """What the session is for."""

    SCAN = "scan"
    """A scan from a scanner or its client."""
    NOISE = "noise"
    """A question for the noise measurement that a scan depends on."""
    EXTERNAL = "external"
    """We are one node of a Gadgetron chain, which allows no text and no 16-bit signed images."""


class Stage(enum.IntEnum):
    """How far a session has come."""

    GREETING = 0
    """No configuration yet."""
    CONFIGURED = 1
    """No header yet."""
    RUNNING = 2
    """Data may come."""
    FAILED = 3
    """Everything but CLOSE is thrown away."""
    CLOSED = 4
    """The peer said CLOSE: whatever it still sends means nothing."""


class Begin(msgspec.Struct, frozen=True):
    """The configuration is known: open a session for it, with values replaced by dotted path."""

    config: str
    overrides: dict[str, Value]
    role: Role
    noise_id: str = ""
    """Measurement that a noise session asks for."""


class Forward(msgspec.Struct, frozen=True, eq=False):
    """Hand this frame on to the session as it is."""

    frame: Frame


class Answer(msgspec.Struct, frozen=True, eq=False):
    """Send these bytes to the peer now."""

    data: bytes


class Failure(msgspec.Struct, frozen=True):
    """Tell the peer, end the session, and discard what else arrives."""

    text: str
    reason: str = "protocol"


class Finish(msgspec.Struct, frozen=True):
    """The peer said CLOSE."""


_ACQUISITION = int(
    MessageId.ACQUISITION
)  # the class attribute is slow to reach, and this runs for every piece received
_CLOSE = int(MessageId.CLOSE)
Action = Begin | Forward | Answer | Failure | Finish

_DATA = frozenset(
    {
        MessageId.ACQUISITION,
        MessageId.IMAGE,
        MessageId.WAVEFORM,
        MessageId.TEXT,
        MessageId.RECON_DATA,
        MessageId.IMAGE_ARRAY,
        MessageId.BUCKET,
    }
)
_REPLIES = frozenset({MessageId.RESPONSE, MessageId.ERROR, MessageId.DICOM, MessageId.DEPENDENCY})
_PREFIX: dict[Level, str] = {"debug": "DBG ", "info": "", "warning": "WRN ", "error": "ERR "}


def reply_text(level: Level, text: str, dialect: Dialect) -> bytes:
    """TEXT message for the console; FIRE colors lines by their first three letters."""
    if dialect is Dialect.FIRE:
        return mrd.encode_text(f"{_PREFIX[level]}{text}")
    return mrd.encode_text(f"[scanside] {level.upper()}: {text}")


class Grammar:
    """State of one connection from a scanner. `react` to each frame; `answer` looks up a query.

    `default` names the configuration for a name that is not installed; None refuses such names, as Gadgetron does.
    """

    def __init__(
        self,
        store: ConfigStore,
        answer: Callable[[str], str],
        *,
        dialect: Literal["auto", "gadgetron", "fire"] = "auto",
        default: str | None = None,
    ) -> None:
        self._store = store
        self._answer = answer
        self._fixed = dialect != "auto"
        self._default = default
        self.dialect = Dialect.FIRE if dialect == "fire" else Dialect.GADGETRON
        self.role = Role.SCAN
        self.stage = Stage.GREETING
        self._noise_id = ""

    @property
    def closed(self) -> bool:
        """Whether the peer is done."""
        return self.stage is Stage.CLOSED

    def fail(self) -> None:
        """Swallow everything but CLOSE from now on."""
        self.stage = max(self.stage, Stage.FAILED)

    def close(self) -> None:
        """Take the peer as done, though it did not say so."""
        self.stage = Stage.CLOSED

    def react(self, frame: Frame) -> list[Action]:
        """What to do about a frame. Raises nothing: what is wrong with it comes out as `Failure`."""
        if self.stage is Stage.RUNNING and frame.id == _ACQUISITION:
            return [Forward(frame)]
        if self.stage is Stage.CLOSED:
            return []
        if frame.id == _CLOSE:
            self.stage = Stage.CLOSED
            return [Finish()]
        if self.stage is Stage.FAILED:
            return []
        try:
            return self._react(frame)
        except (PeerError, ConfigError) as error:
            self.stage = Stage.FAILED
            return [Failure(str(error), error.reason)]

    def _react(self, frame: Frame) -> list[Action]:
        if frame.id == MessageId.QUERY:
            query = mrd.query(frame)
            return [Answer(mrd.encode_response(mrd.Response(query.correlation, self._answer(query.text))))]
        if frame.id in (MessageId.CONFIG_FILE, MessageId.CONFIG_TEXT):
            return self._config(frame)
        if frame.id == MessageId.HEADER:
            return self._header(frame)
        if frame.id in _REPLIES:
            raise PeerError(f"message {frame.id} goes from a server to a client only", offset=frame.offset)
        if frame.id in _DATA:
            return self._data(frame)
        raise PeerError(f"message {frame.id} has no place in this session", offset=frame.offset)

    def _config(self, frame: Frame) -> list[Action]:
        if self.stage is not Stage.GREETING:
            raise PeerError("received a second configuration; a session has one", offset=frame.offset)
        text = mrd.text(frame)
        if frame.id == MessageId.CONFIG_TEXT:
            name, overrides = self._by_text(frame, text)
        else:
            name, overrides = self._by_name(text), {}
        config = with_overrides(self._store.get(name), overrides, source="configuration text")
        self.stage = Stage.CONFIGURED
        return [Begin(config.name, overrides, self.role, self._noise_id)]

    def _by_name(self, name: str) -> str:
        if name in NOISE_CONFIGS:
            self.role = Role.NOISE
            return "default"
        if name == "openrecon" and not self._fixed:
            self.dialect = Dialect.FIRE
        try:
            return self._store.get(name).name
        except ConfigError:
            if self._default is None:
                raise
            return self._default

    def _by_text(self, frame: Frame, text: str) -> tuple[str, dict[str, Value]]:
        """Configuration from a Gadgetron chain: what it is for, and the properties of it that are ours."""
        if self._fixed and self.dialect is Dialect.FIRE and not text.lstrip().startswith("<"):
            return self._by_name(text), {}
        root = parse_xml(text.encode(), "configuration text", offset=frame.offset)
        names = {element.tag for element in root.iter()}
        classes = {(element.text or "").strip() for element in root.iter("classname")}
        if classes & set(NOISE_GADGETS):
            self.role = Role.NOISE
        elif not names & {"gadget", "stream", "reader", "writer"}:
            self.role = Role.EXTERNAL
        return self._properties(root)

    def _properties(self, root: Element) -> tuple[str, dict[str, Value]]:
        values: dict[str, Value] = {}
        for element in root.iter("property"):
            name = element.get("name") or element.findtext("name") or ""
            value = element.get("value") or element.findtext("value") or ""
            if name == "noise_file":
                self._noise_id = value.strip().removeprefix(NOISE_PREFIX)
            elif name.startswith("limits."):
                raise ConfigError(f"{name} cannot be set by a client; set it in a configuration file of the server")
            elif "." in name:  # gadgets have properties of their own, none with a dot
                values[name] = value
        return str(values.pop("scanside.config", "default")), values

    def _header(self, frame: Frame) -> list[Action]:
        if self.stage is Stage.GREETING:
            raise PeerError("received ISMRMRD header before config file", offset=frame.offset)
        if self.stage is Stage.RUNNING:
            raise PeerError("received a second header; a session is one scan", offset=frame.offset)
        self.stage = Stage.RUNNING
        return [Forward(frame)]

    def _data(self, frame: Frame) -> list[Action]:
        if self.stage is Stage.GREETING:
            raise PeerError(f"received message {frame.id} before the configuration", offset=frame.offset)
        if self.stage is Stage.CONFIGURED:
            raise PeerError(f"received message {frame.id} before the ISMRMRD header", offset=frame.offset)
        if frame.id != MessageId.TEXT:
            return [Forward(frame)]
        return self._text(frame)

    def _text(self, frame: Frame) -> list[Action]:
        """TEXT of a client is JSON parameters (FIRE, OpenRecon) or a remark; only the former concerns the session."""
        if not mrd.text(frame).lstrip().startswith(("{", "[")):
            return []
        if not self._fixed:
            self.dialect = Dialect.FIRE
        return [Forward(frame)]


def parse_parameters(text: str) -> dict[str, Value]:
    """Parameters from the JSON text that FIRE sends after the header: `{"parameters": {...}}`.

    Raises `PeerError` naming the path of what is neither text, number nor truth value.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise PeerError("parameters are nested too deeply") from None
    except ValueError as error:  # malformed, or an integer of thousands of digits
        raise PeerError(f"parameters are not valid JSON: {error}") from None
    values = document.get("parameters", {}) if isinstance(document, dict) else None
    if not isinstance(values, dict):
        raise PeerError("parameters: expected an object `parameters` in a JSON object")
    for name, value in values.items():
        if not isinstance(value, str | int | float | bool):
            raise PeerError(f"parameters.{name[:80]}: expected text, number or truth value, got {type(value).__name__}")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
