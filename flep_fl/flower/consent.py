"""``cloud=mixed``: who sends plain weights, and whether everybody has agreed that some do.

The plain updates of some sites show the cloud roughly what the global model is, and so concern every site. A
kit records its site's consent; it is signed by the dealer, so nobody can add one later.
"""

from __future__ import annotations

from flep_fl.config import Config
from flep_fl.contracts.errors import ConfigError, ConsentError
from flep_fl.provision.kits import MIXED, Federation, SiteKit

_REMEDY = "Provision all sites again with cloud=mixed, or choose another trust mode"


def sends_plain_weights(kit: SiteKit, config: Config) -> bool:
    """Whether this site trusts the cloud with its weights.

    Raises
    ------
    ConsentError
        The federation is a mixed one, and this site's kit does not say that it agrees to that.
    ConfigError
        ``cloud.trusting`` names a site that is not in the federation.
    """
    if config.cloud.trust != MIXED:
        return False
    if MIXED not in kit.consents:
        raise ConsentError(
            f"The kit of site {kit.name} does not consent to cloud=mixed: other sites' plain weights would "
            "show the cloud roughly what the global model is",
            remedy=_REMEDY,
        )
    _require_known(kit.federation, config)
    return kit.name in config.cloud.trusting


def require_consent(federation: Federation, config: Config) -> None:
    """Refuse to start a mixed federation that a site has not agreed to.

    Raises
    ------
    ConsentError, ConfigError
        As :func:`sends_plain_weights`, naming every site.
    """
    if config.cloud.trust != MIXED:
        return
    if missing := federation.without_consent(MIXED):
        raise ConsentError(
            f"cloud=mixed needs the consent of every site; these kits do not hold it: {', '.join(missing)}",
            remedy=_REMEDY,
        )
    _require_known(federation, config)


def _require_known(federation: Federation, config: Config) -> None:
    unknown = sorted(set(config.cloud.trusting) - set(federation.sites))
    if unknown:
        raise ConfigError(
            f"cloud.trusting names {', '.join(unknown)}, who are not in the federation",
            expected="names among " + ", ".join(sorted(federation.sites)),
            remedy="Provision again with cloud.trusting set to names of sites",
        )
