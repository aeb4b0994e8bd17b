"""Whether the sites' port uses TLS and node authentication, and with which files of a kit."""

from __future__ import annotations

from flep_fl.config import Config
from flep_fl.flower.runtime.security import CloudSecurity, SiteSecurity
from flep_fl.provision.certificates import require_valid
from flep_fl.provision.kits import CloudKit, SiteKit
from flep_fl.provision.settings import tls_wanted


def cloud_security(kit: CloudKit, config: Config) -> CloudSecurity | None:
    """Return what the cloud shows and which nodes it knows; None where the port is for this machine alone.

    Parameters
    ----------
    kit, config
        The cloud's kit, and the configuration after :func:`flep_fl.config.adopt_kit`.

    Raises
    ------
    ConfigError
        ``runtime.tls=off`` where others could reach the port.
    CertificateError
        A certificate has expired, or is not valid yet.
    """
    if not _wanted(kit, config):
        return None
    require_valid(kit.certificate, what="The cloud's certificate")
    require_valid(kit.ca, what="The federation's certificate authority")
    return CloudSecurity(kit.certificate, kit.private_key, kit.ca, kit.federation.node_keys())


def site_security(kit: SiteKit, config: Config) -> SiteSecurity | None:
    """Return what a site trusts and shows; None where the cloud is on this machine, without TLS.

    Parameters
    ----------
    kit, config
        The site's kit, and the configuration after :func:`flep_fl.config.adopt_kit`.

    Raises
    ------
    ConfigError
        ``runtime.tls=off`` where others could listen.
    CertificateError
        The authority's certificate has expired, or is not valid yet.
    """
    if not _wanted(kit, config):
        return None
    require_valid(kit.ca, what="The federation's certificate authority")
    return SiteSecurity(kit.ca, kit.node_key)


def _wanted(kit: CloudKit | SiteKit, config: Config) -> bool:
    federation, runtime = kit.federation, config.runtime
    return tls_wanted(runtime.tls, federation.address, runtime.address, agreed=federation.tls)
