"""Where log lines go: key-value for people at a terminal, JSON lines for everything else, the same in every process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Literal, TextIO, get_args

import structlog
from scanside.engine.errors import ConfigError

__all__ = ["ENVIRONMENT", "LogLevel", "configure_logging"]

LogLevel = Literal["debug", "info", "warning", "error"]

_LEVEL, _FILE = "SCANSIDE_LOG_LEVEL", "SCANSIDE_LOG_FILE"
ENVIRONMENT = (_LEVEL, _FILE)
"""How processes that are started later learn the settings."""


def configure_logging(level: LogLevel | None = None, file: Path | None = None) -> None:
    """Send log lines of `level` and above to stderr, or append them to `file`.

    What is given holds for processes started later too, which call this without arguments. Raises ConfigError for a level
    that is none, OSError when the file cannot be opened.
    """
    if level is not None:
        os.environ[_LEVEL] = level
    if file is not None:
        os.environ[_FILE] = str(file.absolute())
    name = os.environ.get(_LEVEL, "info").lower()
    if name not in get_args(LogLevel):
        raise ConfigError(f"{_LEVEL} is {name!r}, allowed are {', '.join(get_args(LogLevel))}")
    stream = _stream()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *_renderers(stream),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[name.upper()]),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )


def _stream() -> TextIO:
    path = os.environ.get(_FILE)
    if path is None:
        return sys.stderr
    return Path(path).open("a", encoding="utf-8", buffering=1)  # closed with the process, whose lines it takes


def _renderers(stream: TextIO) -> list[structlog.typing.Processor]:
    if stream.isatty():
        return [structlog.dev.ConsoleRenderer()]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
