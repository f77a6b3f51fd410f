"""Tracebacks as plain text: with source lines, without the values of local variables."""

from __future__ import annotations

import traceback


def plain_traceback(error: BaseException) -> str:
    """Return the traceback of ``error`` and of its causes, as the interpreter prints it.

    Log this text, never ``exc_info``: a logger that is given the exception itself may print the
    local variables of every frame, passwords among them. structlog's default renderer does so
    where ``rich`` is installed, and so does ``structlog.processors.dict_tracebacks``.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    # a lone surrogate in a message would make the handler that writes the line fail
    return text.encode("utf-8", "backslashreplace").decode()
