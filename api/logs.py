"""Structured logs on standard error: one JSON object a line, or plain lines on a terminal."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str = "INFO") -> None:
    """Send structlog's and the standard library's records the same way. Never logs a secret:

    no caller passes tokens, passwords or bodies, uncaught errors hide SQL parameters, and
    tracebacks show no local variables.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    final: list[structlog.typing.Processor] = (
        [renderer] if terminal else [structlog.processors.format_exc_info, renderer]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # libraries tell at DEBUG what they were given: aiosqlite every value of every statement
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level]))
    for ours in ("rolecall", "api"):
        logging.getLogger(ours).setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)
