"""Where everything is kept: the engine, the models and the migrations."""

from api.db.engine import STATEMENT_SECONDS, Database, Executor, write_last
from api.db.types import UTCDateTime, db_now

__all__ = ["STATEMENT_SECONDS", "Database", "Executor", "UTCDateTime", "db_now", "write_last"]
