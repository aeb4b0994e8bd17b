"""A user's own classes, named in the configuration, and the permission to import them.

Importing a module runs it. So a dotted name is followed only where the *reader's* own ``allow_targets`` has a
prefix of it; a name that arrives in a bundle, an archive or a message is data and permits nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from flep_fl.contracts.errors import TargetError


def is_allowed(name: str, allow_targets: Sequence[str]) -> bool:
    """Whether a prefix in ``allow_targets`` covers ``name``.

    Prefixes cover whole parts: ``my_package`` and ``my_package.`` both cover ``my_package.Cipher``, and
    neither covers ``my_package_of_another.Cipher``. An empty prefix covers nothing.
    """
    stems = [prefix.rstrip(".") for prefix in allow_targets]
    return any(stem and (name == stem or name.startswith(f"{stem}.")) for stem in stems)


def import_target(name: str, allow_targets: Sequence[str], *, field: str) -> object:
    """Import ``package.module.attribute``, if the reader's own settings allow it.

    Parameters
    ----------
    name
        The dotted name.
    allow_targets
        Prefixes that the reader trusts, from its own configuration.
    field
        Name of the setting, for the message.

    Raises
    ------
    TargetError
        When the name is not covered (nothing was imported then), does not import, or names nothing.
    """
    module, _, attribute = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{field} is not a dotted name", expected="package.module.name", found=repr(name))
    if not is_allowed(name, allow_targets):
        raise TargetError(
            f"{field} names {name}, which is neither built in nor allowed here",
            expected="a name covered by allow_targets"
            + (f" ({', '.join(allow_targets)})" * bool(allow_targets)),
            remedy=f"Install that package and add allow_targets=[{module}.], if you trust its code",
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as exc:
        raise TargetError(
            f"{field}={name} cannot be imported",
            found=f"{type(exc).__name__}: {exc}",
            remedy="Check that the package is installed and the name is right",
        ) from exc
