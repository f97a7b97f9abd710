"""What broken and malicious peers send, by the rows of the acceptance table: the pieces alone, no sockets."""

from __future__ import annotations

import struct

import numpy as np
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd import header_xml
from scanside.engine.headers import AcquisitionFlag
from scanside.engine.messages import AcquisitionBatch
from scanside.engine.simulation.scan import simulate_scan

__all__ = ["BAIT", "CLOSE", "CONFIG", "Faults", "acquisition", "image"]

BAIT = "scanside_bait"
CONFIG, CLOSE = mrd.encode_config_file("mri/cartesian"), mrd.encode_close()
ACQUISITION, IMAGE = 1008, 1022
SMALL_MATRIX = 46


def acquisition(
    *, samples: int = 64, channels: int = 8, dimensions: int = 0, step: int = 0, data: bytes = b""
) -> bytes:
    """An acquisition with sizes as they are asked for, and as much data as is asked for."""
    header = bytearray(340)
    struct.pack_into("<H", header, 0, 1)
    struct.pack_into("<HHH", header, 34, samples, channels, channels)
    struct.pack_into("<H", header, 176, dimensions)
    struct.pack_into("<H", header, 242, step)
    return struct.pack("<H", ACQUISITION) + bytes(header) + data


def image(width: int, height: int, attributes: int) -> bytes:
    """The beginning of an image."""
    header = bytearray(198)
    struct.pack_into("<HH", header, 0, 1, 5)
    struct.pack_into("<HHH", header, 16, width, height, 1)
    struct.pack_into("<H", header, 34, 1)
    return struct.pack("<H", IMAGE) + bytes(header) + struct.pack("<Q", attributes)


class Faults:
    """Sessions of misbehaving peers, by name, with what the server must say of them."""

    def __init__(self) -> None:
        self.scan = simulate_scan(64, 8, 1, 0, noise_readouts=0)
        self.xml = header_xml(self.scan.header)
        self.lines = list(self.scan.readouts(1))

    def opening(self, config: bytes = CONFIG) -> list[bytes]:
        """Configuration and header."""
        return [config, mrd.encode_header(self.xml)]

    def whole(self, lines: list[AcquisitionBatch] | None = None) -> list[bytes]:
        """A session, message by message."""
        return [*self.opening(), *(mrd.encode_acquisitions(line) for line in lines or self.lines), CLOSE]

    def sessions(self) -> dict[str, list[list[bytes]]]:
        """All of them without a word of what is expected: sessions by row, each as the pieces that are sent one after another."""
        documents = self.headers(), self.documents("http://127.0.0.1:9/")
        told = self.grammar(), self.lengths(), self.sizes()
        headers, xml = ([[CONFIG, mrd.encode_header(text), CLOSE] for text, _ in part.values()] for part in documents)
        grammar, lengths, sizes = ([pieces for pieces, _ in part.values()] for part in told)
        first, *rest = self.whole()
        return {
            "1 truncated": [[*self.opening(), body] for body in self.truncated().values()],
            "5 grammar": grammar,
            "6 short": list(self.short().values()),
            "7 lengths": lengths,
            "8 sizes": sizes,
            "9 headers": headers,
            "10 odd lines": [pieces for pieces, _, _ in self.odd_lines().values()],
            "11 XML": xml,
            "12 names": list(self.names().values()),
            "13 parameters": [
                [first, rest[0], mrd.encode_text(text), *rest[1:]] for text, _ in self.parameters().values()
            ],
        }

    def truncated(self) -> dict[str, bytes]:
        """What stands at the end of a stream that breaks off."""
        body = acquisition(data=bytes(100))
        return {"1 byte of an id": body[:1], "a header": body[:200], "the data": body}

    def grammar(self) -> dict[str, tuple[list[bytes], str]]:
        """Ids that are none, and messages in the wrong place."""
        header, line = mrd.encode_header(self.xml), mrd.encode_acquisitions(self.lines[0])
        at = len(CONFIG)
        return {
            "unknown id": ([CONFIG, struct.pack("<H", 999), bytes(64)], f"999 .*{at}"),
            "data before the configuration": ([line, CLOSE], "1008 .*before .*0"),
            "data before the header": ([CONFIG, line, CLOSE], f"1008 .*before .*{at}"),
            "header before the configuration": ([header, CLOSE], "header .*before .*0"),
            "two headers": ([CONFIG, header, header, CLOSE], f"second .*{at + len(header)}"),
            "two configurations": ([CONFIG, CONFIG, CLOSE], f"second .*{at}"),
            "a server's message": ([CONFIG, mrd.encode_error("no"), CLOSE], f"client .*{at}"),
        }

    def short(self) -> dict[str, list[bytes]]:
        """Connections that come for nothing, or for a question."""
        chain = mrd.encode_config_text(
            "<gadgetronStreamConfiguration><gadget><classname>NoiseSummaryGadget</classname></gadget>"
            "</gadgetronStreamConfiguration>"
        )
        return {
            "CLOSE": [CLOSE], "dependency query": [chain + CLOSE], "port scan": [], "HTTP GET": [b"GET / HTTP/1.1\r\n\r\n"],
        }  # fmt: skip

    def lengths(self) -> dict[str, tuple[list[bytes], str]]:
        """Lengths that nothing has."""
        most = (1 << 64) - 1
        return {
            "header of 4 GiB": ([CONFIG, struct.pack("<HI", 3, 0xFFFFFFFF)], "limit"),
            "configuration of 4 GiB": ([struct.pack("<HI", 2, 0xFFFFFFFF)], "limit"),
            "text of 4 GiB": ([*self.opening(), struct.pack("<HI", 5, 0xFFFFFFFF)], "limit"),
            "query of 2^64 - 1": ([struct.pack("<HQQQ", 6, 0, 1, most)], "limit"),
            "attributes of 2^64 - 1": ([*self.opening(), image(8, 8, most)], "limit"),
        }

    def sizes(self) -> dict[str, tuple[list[bytes], str]]:
        """Sizes that nothing has."""
        return {
            "image of 65535 x 65535": ([*self.opening(), image(65535, 65535, 0)], "limit"),
            "65535 samples x 65535 channels": ([*self.opening(), acquisition(samples=65535, channels=65535)], "limit"),
            "trajectory_dimensions 65535": ([*self.opening(), acquisition(dimensions=65535)], "trajectory_dimensions"),
            "no samples": ([*self.opening(), acquisition(samples=0), CLOSE], "samples"),
            "no channels": ([*self.opening(), acquisition(channels=0), CLOSE], "channels"),
        }

    def headers(self) -> dict[str, tuple[bytes, str]]:
        """Encoding spaces that nothing has."""
        matrix, fov = "encoding[0].encodedSpace.matrixSize", "encoding[0].encodedSpace.fieldOfView_mm"
        cases = {
            "10^6 x 10^6 x 10^6": (("<x>128</x>", "<x>1000000</x>"), matrix),
            "0": (("<x>128</x>", "<x>0</x>"), matrix),
            "-1": (("<x>128</x>", "<x>-1</x>"), matrix),
            "1.5": (("<x>128</x>", "<x>1.5</x>"), matrix),
            "FOV of NaN": (None, fov),
        }
        text, found = self.xml.decode(), {}
        for name, (change, path) in cases.items():
            start = text.index("<matrixSize>" if change else "<fieldOfView_mm>")
            stop = text.index("</x>", start)
            value = change[1].removeprefix("<x>").removesuffix("</x>") if change else "NaN"
            begin = text.index("<x>", start) + 3
            found[name] = (text[:begin] + value + text[stop:]).encode(), path.rpartition(".")[2]
        return found

    def documents(self, url: str) -> dict[str, tuple[bytes, str]]:
        """XML that is an attack, or no XML. url: what an external entity leads to."""
        text = self.xml.decode()
        root = text.index("<ismrmrdHeader")
        pile = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))
        bomb = f"<!DOCTYPE b [<!ENTITY a0 'ha'>{pile}]>"
        outside = f"<!DOCTYPE b [<!ENTITY x SYSTEM '{url}'>]>"
        inside = text[root:].replace("<encoding>", "<encoding>&x;", 1)
        word = "document type"
        return {
            "entity bomb": ((bomb + text[root:]).encode(), word),
            "external entity": ((outside + inside).encode(), word),
            "external document type": ((f"<!DOCTYPE b SYSTEM '{url}'>" + text[root:]).encode(), word),
            "UTF-16": (text.encode("utf-16"), "UTF-8"),
            "NUL in the middle": (text.encode()[:root] + b"<a>\0" + text.encode()[root:], "well-formed"),
            "invalid UTF-8": (self.xml[:-20] + b"\xc3\x28" + self.xml[-20:], "UTF-8"),
        }

    def odd_lines(self) -> dict[str, tuple[list[bytes], str, set[int]]]:
        """Readouts that do not fit: the session, how the image counts them, lines that are lost."""
        last = np.uint64(~np.uint64(AcquisitionFlag.LAST_IN_SLICE.bit))
        return {
            "other channel count": (self._with(20, acquisition(channels=4, step=20, data=bytes(8 * 4 * 64))), "", {20}),
            "other sample count": (self._with(20, acquisition(samples=32, step=20, data=bytes(8 * 8 * 32))), "", {20}),
            "index beyond the limits": (self._with(20, _line(self.lines[20], step=60_000)), "outside", {20}),
            "duplicate line": (self._with(20, _line(self.lines[20]) * 2), "duplicate", set()),
            "five lines missing": (self.whole([*self.lines[:10], *self.lines[15:]]), "missing", set(range(10, 15))),
            "last line marked never": (self._with(63, _line(self.lines[63], clear=last)), "", set()),
            "last line twice": (self._with(63, _line(self.lines[63]) * 2), "", set()),
        }  # fmt: skip

    def _with(self, place: int, message: bytes) -> list[bytes]:
        """The session with one readout replaced."""
        pieces = self.whole()
        pieces[2 + place] = message
        return pieces

    def names(self) -> dict[str, list[bytes]]:
        """Names of configurations that are something else."""
        names = ("../../etc/passwd", "os", BAIT, "x" * 1023, "", "unknown")
        found = {
            repr(name if len(name) < 40 else f"{len(name)} bytes"): [mrd.encode_config_file(name), CLOSE]
            for name in names
        }
        text = mrd.encode_config_text(
            f"<configuration><stream/><property name='scanside.config' value='{BAIT}'/></configuration>"
        )
        return {**found, "as a property": [text, CLOSE]}

    def parameters(self) -> dict[str, tuple[str, str]]:
        """JSON that is no set of parameters, and the path that must be named."""
        return {
            "deep nesting": ('{"parameters":' + "[" * 100_000, "parameters"),
            "huge integer": ('{"parameters":{"a":' + "9" * 10_000 + "}}", "parameters"),
            "a list": ('{"parameters":[1]}', "parameters"),
            "an object as value": (
                '{"parameters":{"reconstruction.iterations":{}}}',
                "parameters.reconstruction.iterations",
            ),
            "text for a number": ('{"parameters":{"reconstruction.iterations":"many"}}', "reconstruction.iterations"),
            "out of range": ('{"parameters":{"reconstruction.iterations":-5}}', "reconstruction.iterations"),
        }


def _line(batch: AcquisitionBatch, *, step: int | None = None, clear: np.uint64 | None = None) -> bytes:
    """One readout at another place, or without a flag."""
    headers = batch.headers.copy()
    if step is not None:
        headers["idx"]["kspace_encode_step_1"] = step
    if clear is not None:
        headers["flags"] &= clear
    return mrd.encode_acquisitions(AcquisitionBatch(headers=headers, samples=batch.samples))
