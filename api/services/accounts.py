"""Accounts: who may sign in, and with what password."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import bindparam, update
from sqlalchemy.sql.dml import ReturningUpdate

from api.auth.passwords import Passwords
from api.auth.throttle import LoginThrottle
from api.blocklist import Blocklist, RevokingTransaction
from api.db import Database, Executor, db_now
from api.db.models import User, table_of
from api.errors import BadCredentials, RegistrationClosed
from api.services import audit, holding
from api.services.audit import Origin
from api.services.client_terms import no_such_client, terms
from api.services.delegation import ensure_active, lock_user
from api.services.floors import end_sessions_of_user
from api.services.generations import Grant
from api.services.sessions import Sessions
from api.services.usernames import fold
from api.services.users import Account, Users, UserView
from api.shielding import finished


def _enter() -> ReturningUpdate[UUID]:
    users = table_of(User)
    unchanged = (users.c.id == bindparam("user_id")) & (
        users.c.password_hash == bindparam("verified")
    )
    return (
        update(users)
        .where(unchanged, users.c.is_active)
        .values(
            last_login_at=db_now(),
            updated_at=users.c.updated_at,
            password_hash=bindparam("kept"),
        )
        .returning(users.c.id)
    )


# Made once: building such a statement costs more than running it.
ENTER = _enter()


class Accounts:
    """What people do with accounts of their own. Each change is one transaction."""

    def __init__(
        self,
        database: Database,
        blocklist: Blocklist,
        sessions: Sessions,
        users: Users,
        passwords: Passwords,
        throttle: LoginThrottle,
        *,
        registration_open: bool,
    ) -> None:
        self._database = database
        self._blocklist = blocklist
        self._sessions = sessions
        self._users = users
        self._passwords = passwords
        self._throttle = throttle
        self._registration_open = registration_open

    async def sign_in(
        self, username: str, password: str, origin: Origin, client_id: UUID | None = None
    ) -> Grant:
        """Open a session, through a client app that has authenticated or none.

        Raises ``BadCredentials``, ``TooManyRequests``, ``ValidationFailed`` for the client.
        Unknown user, wrong password and disabled user cost the same: one throttle, one read,
        one verification, one audit row.
        """
        key = fold(username)
        async with self._throttle.attempt(key, origin.ip) as attempt:
            user = await self._users.by_key(key)
            right = await self._passwords.verify(password, user.password_hash if user else None)
            attempt.right = user is not None and right and user.is_active
        if user is None or not attempt.right:
            await self._note_failure(user, origin)
            raise BadCredentials
        rehashed = None
        if self._passwords.outdated(user.password_hash):
            rehashed = await self._passwords.hash(password)
        entered = user
        grant = await finished(
            self._database.run(lambda db: self._enter(db, entered, rehashed, origin, client_id))
        )
        if grant is None:
            raise BadCredentials
        return grant

    def _enter(
        self,
        db: Executor,
        user: Account,
        rehashed: str | None,
        origin: Origin,
        client_id: UUID | None,
    ) -> Grant | None:
        if client_id is not None:
            # it may have been disabled meanwhile, and must not be until this is done
            _require_client(db, client_id, unchanged=True)
        # the password may have changed, or the user been disabled, while it was verified
        verified = user.password_hash
        entering = {"user_id": user.id, "verified": verified, "kept": rehashed or verified}
        if db.execute(ENTER, entering).one_or_none() is None:
            return None
        through = {"client_id": str(client_id)} if client_id else {}
        note = audit.row("login", origin, actor=user.id, target=user.id, **through)
        db.execute(audit.INSERT, note)
        return self._sessions.open(db, user.id, origin, client_id)

    async def _note_failure(self, user: Account | None, origin: Origin) -> None:
        # what was typed may be a password in the wrong field: only known accounts are named
        target = user.id if user else None
        await audit.note(self._database, "login.failed", origin, target=target)

    async def register(
        self, username: str, password: str, email: str | None, origin: Origin
    ) -> UserView:
        """Make an account for whoever asks, with the role ``user``, where that is open."""
        if not self._registration_open:
            raise RegistrationClosed
        return await self._users.create(
            username, password, email, [holding.USER], origin, needed=()
        )

    async def change_password(
        self, user_id: UUID, sid: UUID, current: str, new: str, origin: Origin
    ) -> None:
        """Change one's own password and end every session but this one."""
        user = await self._users.row(user_id)
        async with self._throttle.attempt(user.username_key, origin.ip) as attempt:
            attempt.right = await self._passwords.verify(current, user.password_hash)
        if not attempt.right:
            await self._note_failure(user, origin)
            raise BadCredentials("The current password is wrong.")
        await self._passwords.refuse_weak(new, user.username, field="new_password")
        hashed = await self._passwords.hash(new)
        verified = user.password_hash
        others = await self._sessions.count_live(user_id) - 1

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                # the actor may have been disabled or logged out while these were hashed
                await lock_user(tx.session, user_id)
                await ensure_active(tx.session, origin)
                await self._store_password(tx, user_id, verified, hashed)
                audit.record(tx.session, "user.password", origin, target=user_id, sessions=others)
                lifetimes = self._sessions.lifetimes
                await end_sessions_of_user(tx, user_id, "password", lifetimes, keep=sid)
                # the token may have been revoked while this waited for its turn
                await ensure_active(tx.session, origin)

        await finished(work())

    async def _store_password(
        self, tx: RevokingTransaction, user_id: UUID, verified: str, hashed: str
    ) -> None:
        """Store a password's hash. ``BadCredentials`` where somebody has set another meanwhile."""
        stored = await tx.session.scalar(
            update(User)
            .where(User.id == user_id, User.password_hash == verified)
            .values(password_hash=hashed)
            .returning(User.id)
            .execution_options(synchronize_session=False)
        )
        if stored is None:
            raise BadCredentials("The current password is wrong.")

    async def set_email(self, user_id: UUID, email: str | None, origin: Origin) -> UserView:
        """Change one's own address. Raises ``TokenRevoked``."""
        async with self._database.write() as session:
            await lock_user(session, user_id)
            await ensure_active(session, origin)
            other = User.email.is_distinct_from(email)
            changed = await session.scalar(
                update(User)
                .where(User.id == user_id, other)
                .values(email=email)
                .returning(User.id)
                .execution_options(synchronize_session=False)
            )
            if changed is not None:
                audit.record(session, "user.changed", origin, target=user_id, fields=["email"])
        return await self._users.get(user_id)

    async def opens(self, username: str, password: str) -> bool:
        """Return whether an active account of that name has that password."""
        user = await self._users.by_key(fold(username))
        if user is None or not user.is_active:
            return False
        return await self._passwords.verify(password, user.password_hash)


def _require_client(db: Executor, client_id: UUID, *, unchanged: bool = False) -> None:
    if terms(db, client_id, unchanged=unchanged) is None:
        raise no_such_client()
