"""A scheme of the user's own in place of CKKS (``ckks.scheme=my_package.MyScheme``)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flep_fl.contracts.errors import TargetError
from flep_fl.contracts.ports import ModelScheme
from flep_fl.contracts.targets import import_target

SECRET_INFO = b"flep-fl/scheme-secret/v1\0"
"""Label under which a scheme's secret is derived from the model key; the scheme's name follows."""

SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class OwnScheme:
    """A scheme and its name (port ``SumTerms``)."""

    name: str
    scheme: ModelScheme

    @property
    def digest(self) -> str:
        """SHA-256 of the name."""
        return hashlib.sha256(b"flep-fl/scheme/" + self.name.encode()).hexdigest()

    @property
    def secret_info(self) -> bytes:
        """Label of the secret."""
        return SECRET_INFO + self.name.encode()

    def tolerance(self, contributors: int) -> float:
        """Return the scheme's own."""
        return self.scheme.tolerance(contributors)


def load_scheme(name: str, allow_targets: Sequence[str]) -> OwnScheme | None:
    """Import a scheme; None for the built-in one, ``ckks``.

    Raises
    ------
    TargetError
        It is not allowed, does not import, cannot be built, or has not the methods of ``ModelScheme``.
    """
    if name == "ckks":
        return None
    target = import_target(name, allow_targets, field="ckks.scheme")
    wanted = ("cipher", "adder", "tolerance")
    if not callable(target) or not all(callable(getattr(target, method, None)) for method in wanted):
        raise TargetError(
            f"ckks.scheme={name} is not a scheme",
            expected="a class with the methods " + ", ".join(wanted),
            remedy="See ModelScheme in flep_fl.contracts.ports",
        )
    try:
        return OwnScheme(name, target())
    except Exception as exc:
        raise TargetError(
            f"ckks.scheme={name} cannot be built", found=f"{type(exc).__name__}: {exc}"
        ) from exc
