"""Why a user holds a permission: the shortest paths from a role given to one that grants it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from uuid import UUID

from sqlalchemy import Select, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.db.models import DELETED_NAME, Role, RoleInclude, RolePermission, UserRole, table_of

# A graph of roles can have exponentially many shortest paths: an answer holds the first of them.
PATHS_AT_MOST = 20

Includes = Mapping[str, Collection[str]]
Grants = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class GrantPath:
    """How a user comes to hold a permission: the role given, what it includes, what grants it."""

    roles: tuple[str, ...]
    permission: str


@dataclass(frozen=True, slots=True)
class GrantPaths:
    """The first paths, the shortest before the others; ``more`` where there are others still."""

    paths: tuple[GrantPath, ...]
    more: bool


ROLES, GIVEN = table_of(Role).c, table_of(UserRole).c
INCLUDES, PERMISSIONS = table_of(RoleInclude).c, table_of(RolePermission).c
OF_USER = GIVEN.user_id == bindparam("user_id")
GIVEN_NAMES = select(ROLES.name).join_from(table_of(UserRole), table_of(Role)).where(OF_USER)


def _included_names() -> Select[str, str]:
    """Select (role, the names of those it includes, separated by commas) of all that is held."""
    held = select(GIVEN.role_id).where(OF_USER).cte("held", recursive=True)
    held = held.union(select(INCLUDES.included_id).where(INCLUDES.role_id == held.c.role_id))
    role, included = table_of(Role).alias("role"), table_of(Role).alias("included")
    return (
        select(role.c.name, func.aggregate_strings(included.c.name, ","))
        .select_from(held)
        .join(table_of(RoleInclude), INCLUDES.role_id == held.c.role_id)
        .join(role, role.c.id == INCLUDES.role_id)
        .join(included, included.c.id == INCLUDES.included_id)
        .group_by(role.c.name)
    )


def _granted() -> Select[str, str]:
    """Select (role, permission) of all that is held and is among ``wanted``."""
    held = select(GIVEN.role_id).where(OF_USER).cte("held", recursive=True)
    held = held.union(select(INCLUDES.included_id).where(INCLUDES.role_id == held.c.role_id))
    return (
        select(ROLES.name, PERMISSIONS.permission)
        .select_from(held)
        .join(table_of(RolePermission), PERMISSIONS.role_id == held.c.role_id)
        .join(table_of(Role), ROLES.id == held.c.role_id)
        .where(PERMISSIONS.permission.in_(bindparam("wanted", expanding=True)))
        .order_by(PERMISSIONS.permission)
    )


# Made once: building such a statement costs more than running it.
INCLUDED_NAMES, GRANTED = _included_names(), _granted()


async def grant_paths(session: AsyncSession, user_id: UUID, wanted: str) -> GrantPaths:
    """Return the shortest paths from a role given to the user to each that permits ``wanted``.

    Only roles that the user holds are read. The cost grows with the number of includes among
    them, never with the number of paths.
    """
    user = {"user_id": user_id}
    given = (await session.scalars(GIVEN_NAMES, user)).all()
    grants: dict[str, list[str]] = {}
    values = user | {"wanted": [wanted, f"{wanted.partition(':')[0]}:*", "*"]}
    for name, permission in await session.execute(GRANTED, values):
        grants.setdefault(name, []).append(permission)
    # no role's name holds a comma
    rows = await session.execute(INCLUDED_NAMES, user)
    includes = {name: included.split(",") for name, included in rows}
    found = list(islice(shortest_paths(given, includes, grants), PATHS_AT_MOST + 1))
    shown = tuple(_without_deleted(path) for path in found[:PATHS_AT_MOST])
    return GrantPaths(shown, more=len(found) > PATHS_AT_MOST)


def _without_deleted(path: GrantPath) -> GrantPath:
    """Leave out the role that a user still has in place of the one that replaced it."""
    roles = tuple(name for name in path.roles if not name.startswith(DELETED_NAME))
    return GrantPath(roles, path.permission)


def shortest_paths(
    given: Collection[str], includes: Includes, grants: Grants
) -> Iterator[GrantPath]:
    """Yield every shortest path from a role ``given`` to each role of ``grants``.

    The shorter before the longer, then in the order of the names. Between two paths lies at
    most one look at each include, however many paths there are in all.
    """
    levels = _levels(given, includes)
    for depth, level in enumerate(levels):
        if targets := level & grants.keys():
            yield from _paths_to(targets, levels[: depth + 1], includes, grants)


def _levels(given: Collection[str], includes: Includes) -> list[set[str]]:
    """Return the roles by their distance from those given."""
    levels, level = [], set(given)
    seen = set(level)
    while level:
        levels.append(level)
        level = {name for role in level for name in includes.get(role, ())} - seen
        seen |= level
    return levels


def _paths_to(
    targets: set[str], levels: Sequence[set[str]], includes: Includes, grants: Grants
) -> Iterator[GrantPath]:
    """Yield the paths to roles of the last level, by names."""
    # what leads to a target, in each level: every path along it is one to be yielded
    leading = [targets]
    for level in reversed(levels[:-1]):
        leading.append(
            {role for role in level if not leading[-1].isdisjoint(includes.get(role, ()))}
        )
    leading.reverse()
    # not recursive: a path may be longer than Python's stack
    steps = [iter(sorted(leading[0]))]
    path: list[str] = []
    while steps:
        role = next(steps[-1], None)
        if role is None:
            steps.pop()
            if path:
                path.pop()
        elif len(path) == len(levels) - 1:
            for permission in grants[role]:
                yield GrantPath((*path, role), permission)
        else:
            path.append(role)
            steps.append(iter(sorted(leading[len(path)].intersection(includes[role]))))
