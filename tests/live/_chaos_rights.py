"""Holders of a permission, whose rights are changed while they use and refresh their tokens.

`World` makes holders of every kind; `CHANGES` what is done to them. The checker keeps, for each
change, when it was asked for and when it was answered, so that it knows of every token whether it
must be refused, must be accepted, or was made too near a change to tell.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.live._chaos import Row, Scene, Traffic

PERMISSION = "roles:read"
GUARDED = "/admin/roles?limit=1"
ROLE, OUTER = "held", "outer"
PASSWORD = "correct-Harbour-93"
ADMIN = ("admin", "adminpass")
# How many of a holder's access tokens are still used beside the newest.
RECENT = 4
HOLDER_WATCHERS = 2


@dataclass(frozen=True)
class Token:
    """A token, and between which moments it was made, and its session opened."""

    value: str
    asked: float
    answered: float
    opening: float
    opened: float


@dataclass
class Holder:
    """Somebody who holds the permission, in one of the ways that there are.

    ``way``: ``role``, ``included`` (the role includes it), ``app`` (through a client app),
    ``narrowed`` (by a scope, through a client app), ``client`` and ``client-narrowed`` (a client
    app's own token).
    """

    way: str
    subject: str
    username: str = ""
    client_id: str = ""
    secret: str = ""
    access: list[Token] = field(default_factory=list)
    refresh: Token | None = None

    @property
    def is_client(self) -> bool:
        """Whether its tokens speak of the client app itself."""
        return self.way.startswith("client")

    @property
    def is_narrowed(self) -> bool:
        """Whether it asks for tokens with a scope, which it must hold."""
        return self.way.endswith("narrowed")

    @property
    def name(self) -> str:
        """How notes call it."""
        return f"{self.username or 'the client app'} ({self.way})"


@dataclass
class Change:
    """One change of rights: ``after`` says whether the permission is held once it is made.

    ``revokes``: tokens of before are refused from the 2xx on. ``ends``: so are their sessions.
    """

    method: str
    path: str
    body: dict[str, Any] | None
    affects: frozenset[int]
    after: bool
    revokes: bool
    ends: bool = False
    asked: float = 0.0
    answered: float | None = None


class World:
    """The role, the users and the client apps of a test, made through the API."""

    def __init__(self, url: str) -> None:
        # a change may be held for long before its commit
        self.client = httpx.AsyncClient(
            base_url=url, timeout=90, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._token = ""
        self.users: dict[str, str] = {}
        self.apps: dict[str, dict[str, Any]] = {}
        self.holders: list[Holder] = []

    async def build(self) -> World:
        """Make all of it."""
        await self._make("/admin/roles", name=ROLE, permissions=[PERMISSION], includes=[])
        await self._make("/admin/roles", name=OUTER, permissions=[], includes=[ROLE])
        for name, role in (("first", ROLE), ("second", OUTER), ("third", ROLE)):
            body = {"username": name, "password": PASSWORD, "roles": ["user", role]}
            self.users[name] = (await self._make("/admin/users", **body))["id"]
        for name, public, grants in (
            ("public", True, ["refresh_token"]),
            ("confidential", False, ["client_credentials"]),
        ):
            self.apps[name] = await self._make(
                "/admin/clients", name=name, allowed_roles=[ROLE], audiences=[], grants=grants,
                public=public,
            )  # fmt: skip
        public_id = self.apps["public"]["client_id"]
        own = self.apps["confidential"]
        for way, username in (
            ("role", "first"), ("role", "third"), ("included", "second"),
            ("app", "first"), ("app", "second"), ("narrowed", "first"),
        ):  # fmt: skip
            through = public_id if way in {"app", "narrowed"} else ""
            self.holders.append(Holder(way, self.users[username], username, through))
        for way in ("client", "client-narrowed"):
            self.holders.append(
                Holder(way, own["client_id"], "", own["client_id"], own["client_secret"])
            )
        return self

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def affected(self, *, user: str = "", app: str = "") -> frozenset[int]:
        """Return which holders a user or a client app stands behind; all where none is named."""
        subject = self.users.get(user, "")
        client = self.apps[app]["client_id"] if app else ""
        return frozenset(
            number
            for number, holder in enumerate(self.holders)
            if (not subject or holder.subject == subject)
            and (not client or holder.client_id == client)
        )

    async def _make(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self.admin("POST", path, body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def admin(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """Ask as the demo administrator; what httpx raises is the caller's."""
        if not self._token:
            name, password = ADMIN
            credentials = {"username": name, "password": password, "transport": "json"}
            answer = await self.client.post("/login", json=credentials)
            answer.raise_for_status()
            self._token = answer.json()["access_token"]
        headers = {"Authorization": f"Bearer {self._token}"}
        answer = await self.client.request(method, path, json=body, headers=headers)
        if answer.status_code == 401:
            self._token = ""
            return await self.admin(method, path, body)
        return answer

    # --- What is done to the holders, as pairs: one that takes away, one that gives back ---

    def role_changed(self) -> list[Change]:
        """Take the permission from the role, and give it back."""
        path, everybody = f"/admin/roles/{ROLE}", self.affected()
        nothing: dict[str, Any] = {"permissions": []}
        permission: dict[str, Any] = {"permissions": [PERMISSION]}
        return [
            Change("PATCH", path, nothing, everybody, after=False, revokes=True),
            Change("PATCH", path, permission, everybody, after=True, revokes=False),
        ]

    def roles_of_a_user_changed(self) -> list[Change]:
        """Take the role from a user, and give it back."""
        path, theirs = f"/admin/users/{self.users['first']}/roles", self.affected(user="first")
        return [
            Change("PUT", path, {"roles": ["user"]}, theirs, after=False, revokes=True),
            Change("PUT", path, {"roles": ["user", ROLE]}, theirs, after=True, revokes=False),
        ]

    def user_logged_out(self) -> list[Change]:
        """End every session of two users."""
        return [
            Change("POST", f"/admin/users/{self.users[user]}/logout", None,
                   self.affected(user=user), after=True, revokes=True, ends=True)
            for user in ("first", "second")
        ]  # fmt: skip

    def user_disabled(self) -> list[Change]:
        """Disable a user, and enable them."""
        return self._switched(f"/admin/users/{self.users['first']}", self.affected(user="first"))

    def client_app_disabled(self) -> list[Change]:
        """Disable a client app that users sign in through, and enable it."""
        path = f"/admin/clients/{self.apps['public']['client_id']}"
        return self._switched(path, self.affected(app="public"))

    def client_app_with_own_tokens_disabled(self) -> list[Change]:
        """Disable a client app that has tokens of its own, and enable it."""
        path = f"/admin/clients/{self.apps['confidential']['client_id']}"
        return self._switched(path, self.affected(app="confidential"))

    def _switched(self, path: str, affects: frozenset[int]) -> list[Change]:
        off, on = {"is_active": False}, {"is_active": True}
        return [
            Change("PATCH", path, off, affects, after=False, revokes=True, ends=True),
            Change("PATCH", path, on, affects, after=True, revokes=False),
        ]


CHANGES: dict[str, Callable[[World], list[Change]]] = {
    "a role changed": World.role_changed,
    "the roles of a user changed": World.roles_of_a_user_changed,
    "a user logged out everywhere": World.user_logged_out,
    "a user disabled": World.user_disabled,
    "a client app disabled": World.client_app_disabled,
    "a client app with tokens of its own disabled": World.client_app_with_own_tokens_disabled,
}


class RightsLoad(Traffic):
    """Holders who use and refresh their tokens, and watchers that try those of before a change.

    ``idle``: they do nothing by themselves; whoever made it calls ``sign_in``, ``renew``, ``use``.
    """

    def __init__(self, url: str, world: World, *, idle: bool = False) -> None:
        super().__init__(url)
        self.world = world
        self._idle = idle
        self.changes: list[Change] = []
        self.dead: list[tuple[int, Token, bool]] = []

    def _work(self) -> list[Coroutine[Any, Any, None]]:
        if self._idle:
            return []
        holders = [self._hold(number) for number in range(len(self.world.holders))]
        return holders + [self._watch() for _ in range(HOLDER_WATCHERS)]

    # --- What is known of a token ---

    def must_be_refused(self, number: int, token: Token, sent: float, *, refresh: bool) -> bool:
        """Return whether a change had revoked the token before it was sent."""
        return any(
            change.revokes
            and number in change.affects
            and (change.ends or not refresh)
            and (token.opened if change.ends else token.answered) <= change.asked
            and change.answered is not None
            and change.answered <= sent
            for change in self.changes
        )

    def permitted(self, number: int, since: float, until: float) -> bool | None:
        """Return whether the permission was held all that time; None where that was changing."""
        held = True
        for change in self.changes:
            if number in change.affects and change.asked <= until:
                if change.answered is None or change.answered >= since:
                    return None
                held = change.after
        return held

    # --- What holders do ---

    async def _hold(self, number: int) -> None:
        holder = self.world.holders[number]
        while not self._stopping:
            if holder.refresh is None and not (holder.is_client and holder.access):
                await self.sign_in(number)
            elif random.random() < 0.3:
                await self.renew(number)
            if holder.access:
                await self.use(number, random.choice(holder.access[-RECENT:]))

    async def sign_in(self, number: int) -> None:
        """Get the first tokens; wait while nobody can tell that this would be allowed."""
        holder, now = self.world.holders[number], time.monotonic()
        holder.access, holder.refresh = [], None
        if self._shut(number, now, now):
            await asyncio.sleep(0.02)
            return
        if holder.is_client:
            await self.renew(number)
            return
        body = {"username": holder.username, "password": PASSWORD, "transport": "json"}
        if holder.client_id:
            body["client_id"] = holder.client_id
        answer = await self._ask("POST", "/login", json=body)
        if answer is None:
            return
        answered = time.monotonic()
        if answer.status_code == 200:
            found = answer.json()
            times = (now, answered, now, answered)
            holder.access = [Token(found["access_token"], *times)]
            holder.refresh = Token(found["refresh_token"], *times)
        elif not self._shut(number, now, answered):
            self._refused(f"{holder.name}: POST /login", answer)

    def _shut(self, number: int, since: float, until: float) -> bool:
        """Return whether a change may have kept the holder from signing in or refreshing."""
        return any(
            change.ends
            and number in change.affects
            and change.asked <= until
            and (reopened is None or reopened >= since)
            for change, reopened in self._endings()
        )

    def _endings(self) -> Iterator[tuple[Change, float | None]]:
        """Yield each change that ended sessions, and when signing in was possible again."""
        for place, change in enumerate(self.changes):
            if not change.ends:
                continue
            if change.after:
                yield change, change.answered
                continue
            later = (one for one in self.changes[place + 1 :] if one.affects == change.affects)
            back = next((one for one in later if one.after and not one.ends), None)
            yield change, None if back is None else back.answered

    async def renew(self, number: int) -> None:
        """Get the next tokens; a live session must never be refused."""
        holder, sent = self.world.holders[number], time.monotonic()
        refresh = holder.refresh
        answer = await self._ask_for_next(holder)
        if answer is None:
            return
        answered, what = time.monotonic(), f"{holder.name}: refresh"
        ended = refresh is not None and self.must_be_refused(number, refresh, sent, refresh=True)
        if answer.status_code == 200:
            if ended:
                self.tally.revoked_accepted += 1
                self._note(what, answer)
            self._keep(holder, answer.json(), sent, answered)
            return
        since = refresh.opening if refresh is not None else sent
        if ended or self._shut(number, since, answered):
            holder.access, holder.refresh = [], None
        elif (
            not holder.is_narrowed
            or _oauth_error(answer) != "invalid_scope"
            or self.permitted(number, sent, answered)
        ):
            self._refused(what, answer)
        elif holder.is_client:
            await asyncio.sleep(0.02)

    async def _ask_for_next(self, holder: Holder) -> httpx.Response | None:
        token = holder.refresh.value if holder.refresh is not None else ""
        if not holder.is_client and not holder.is_narrowed:
            return await self._ask("POST", "/refresh", token)
        form = {"scope": PERMISSION} if holder.is_narrowed else {}
        if holder.is_client:
            form |= {"grant_type": "client_credentials"}
            auth = (holder.client_id, holder.secret)
            return await self._ask("POST", "/oauth/token", data=form, auth=auth)
        form |= {"grant_type": "refresh_token", "refresh_token": token}
        return await self._ask("POST", "/oauth/token", data=form | {"client_id": holder.client_id})

    def _keep(self, holder: Holder, found: dict[str, str], sent: float, answered: float) -> None:
        before = holder.refresh
        session = (before.opening, before.opened) if before is not None else (sent, answered)
        holder.access.append(Token(found["access_token"], sent, answered, *session))
        del holder.access[: -2 * RECENT]
        if before is not None:
            holder.refresh = Token(found["refresh_token"], sent, answered, *session)
            self.tally.refreshes += 1

    async def use(self, number: int, token: Token) -> int | None:
        """Ask for what needs the permission; return the status where there was an answer."""
        sent = time.monotonic()
        answer = await self._ask("GET", GUARDED, token.value)
        if answer is None:
            return None
        status, what = answer.status_code, f"{self.world.holders[number].name}: GET"
        if self.must_be_refused(number, token, sent, refresh=False):
            self.tally.revoked_asked += 1
            if status != 401:
                self.tally.revoked_accepted += 1
                self._note(f"{what} with a token of before", answer)
            return status
        answered = time.monotonic()
        if status == 200 and self.permitted(number, sent, answered) is False:
            # a token that was on its way while the change was made is no better
            self.tally.revoked_accepted += 1
            self._note(f"{what} while the permission was not held", answer)
        held = self.permitted(number, token.asked, answered)
        if held is not None and status != 200 and (held or status != 403):
            self._refused(what, answer)
        return status

    async def _watch(self) -> None:
        """Try tokens of before a change, the newest most often, at any later moment."""
        while not self._stopping:
            if not self.dead:
                await asyncio.sleep(0.02)
                continue
            among = self.dead[-10:] if random.random() < 0.7 else self.dead
            number, token, is_refresh = random.choice(among)
            if not is_refresh:
                await self.use(number, token)
                continue
            answer = await self._ask("POST", "/refresh", token.value)
            if answer is not None:
                self.tally.revoked_asked += 1
                if answer.status_code != 401:
                    self.tally.revoked_accepted += 1
                    self._note(f"{self.world.holders[number].name}: refresh of before", answer)

    # --- What is done to them ---

    async def make(self, change: Change) -> int | None:
        """Make a change; return the status, None where there was no answer."""
        change.asked, change.answered = time.monotonic(), None
        self.changes.append(change)
        try:
            answer = await self.world.admin(change.method, change.path, change.body)
        except httpx.TransportError:
            return None
        if answer.status_code < 300:
            self.settle(change)
        return answer.status_code

    async def status(self, token: Token) -> int | None:
        """Ask for what needs the permission; return the status, whatever it is."""
        answer = await self._ask("GET", GUARDED, token.value)
        return None if answer is None else answer.status_code

    def settle(self, change: Change) -> None:
        """Take a change as made from now on, and remember which tokens it revoked."""
        change.answered = time.monotonic()
        if not change.revokes:
            return
        for number in change.affects:
            holder = self.world.holders[number]
            known = [(token, False) for token in holder.access]
            if change.ends and holder.refresh is not None:
                known.append((holder.refresh, True))
            for token, is_refresh in known:
                if (token.opened if change.ends else token.answered) <= change.asked:
                    self.dead.append((number, token, is_refresh))


def _oauth_error(answer: httpx.Response) -> str:
    """Return the error of RFC 6749 section 5.2, else nothing."""
    try:
        return str(answer.json().get("error", ""))
    except ValueError:
        return ""


@asynccontextmanager
async def holders_of(scene: Scene) -> AsyncIterator[World]:
    """The holders of a scene's service."""
    world = World(scene.url)
    try:
        yield await world.build()
    finally:
        await world.close()


async def trial_of_rights(scene: Scene, load: RightsLoad, name: str, seconds: float) -> Row:
    """Make a change and undo it, again and again for ``seconds``; watch half as long after."""
    load.reset()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for change in CHANGES[name](load.world):
            status = await load.make(change)
            assert status == 200, f"{name}: {change.method} {change.path} answers {status}"
            await asyncio.sleep(random.uniform(0.05, 0.25))
    await asyncio.sleep(seconds / 2)
    return Row(name, scene.database, load.reset(), 0.0)
