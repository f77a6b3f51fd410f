"""The routes of the Django Ninja peer."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import User
from django.urls import path
from ninja import ModelSchema, Router
from ninja.errors import HttpError
from ninja_extra import NinjaExtraAPI
from ninja_jwt.authentication import JWTAuth
from ninja_jwt.controller import NinjaJWTDefaultController
from ninja_jwt.tokens import AccessToken, BlacklistMixin


class RevocableAccessToken(BlacklistMixin, AccessToken):  # type: ignore[misc]
    """An access token that the blacklist app refuses as it does refresh tokens."""

    @classmethod
    def unlisted(cls, user: User) -> str:
        """Return a token that is not in the list of outstanding ones, as pairs' are not."""
        return str(AccessToken.for_user(user))


class Person(ModelSchema):
    """A person as shown."""

    class Meta:
        model = User
        fields = ("id", "username", "email", "is_active")


router = Router(auth=JWTAuth())


@router.get("/protected")
def protected(request: Any) -> dict[str, Any]:
    """Say who it is."""
    return {"logged_in_as": request.user.username, "roles": ["user"]}


@router.post("/logout")
def logout(request: Any) -> dict[str, bool]:
    """Revoke the token."""
    RevocableAccessToken(request.headers["Authorization"].split()[1]).blacklist()
    return {"logout": True}


@router.get("/users", response=list[Person])
def users(request: Any) -> Any:
    """List 50, for staff."""
    if not request.user.is_staff:
        raise HttpError(403, "staff only")
    return User.objects.order_by("id")[:50]


api = NinjaExtraAPI()
api.register_controllers(NinjaJWTDefaultController)
api.add_router("", router)
urlpatterns = [path("", api.urls)]
