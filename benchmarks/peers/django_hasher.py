"""Django's Argon2 hasher with the parameters that every peer has."""

from __future__ import annotations

from django.contrib.auth.hashers import Argon2PasswordHasher

from benchmarks.peers.data import ARGON2


class Argon2(Argon2PasswordHasher):
    """As Django's documentation changes the cost of a hasher: by a subclass."""

    time_cost = ARGON2["time_cost"]
    memory_cost = ARGON2["memory_cost"]
    parallelism = ARGON2["parallelism"]
