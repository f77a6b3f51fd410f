"""Where everything is kept: the engine, the models and the migrations."""

from api.db.engine import Database
from api.db.types import UTCDateTime, db_now

__all__ = ["Database", "UTCDateTime", "db_now"]
