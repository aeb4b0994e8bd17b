"""What an analyst's session is wired to: the keys of its kit, and what its configuration insists on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flep_fl.config import (
    Config,
    ckks_bound,
    ckks_max_examples,
    ckks_profile,
    federated_optimiser,
    update_mode,
)
from flep_fl.contracts.errors import KitError, ModelKeyError
from flep_fl.contracts.ports import ModelCipher
from flep_fl.flower.consent import sends_plain_weights
from flep_fl.model_security.carry_over import CarryOver, EarlierKeys
from flep_fl.model_security.cipher import CkksModelCipher, PublicModelCipher
from flep_fl.model_security.keyring import NO_SECRET, CheckKey, ModelKey, PublicKey, state_key
from flep_fl.model_security.mixed import TrustingModelCipher
from flep_fl.model_security.plain import PlainModelCipher
from flep_fl.model_security.schemes import SECRET_BYTES, load_scheme
from flep_fl.model_security.session import AnalystSession, Arrays, Membership
from flep_fl.provision.kits import SiteKit, forget_previous

_LOG = logging.getLogger(__name__)

SessionFactory = Callable[[Callable[[], Arrays] | None], AnalystSession]


def analyst_cipher(model_key: bytes, config: Config) -> ModelCipher:
    """Return what decrypts with the model key: CKKS, or the scheme that the configuration names.

    Raises
    ------
    ModelKeyError
        The key is damaged or was made for another profile.
    TargetError
        The scheme is not allowed here, or is none.
    """
    key, own = ModelKey.from_bytes(model_key), load_scheme(config.ckks.scheme, config.allow_targets)
    if own is None:
        return CkksModelCipher(key, ckks_profile(config))
    return own.scheme.cipher(key.derive(own.secret_info, SECRET_BYTES), key.key_id)


def session_factory(kit: SiteKit, config: Config, state: Path) -> SessionFactory:
    """Check a kit's keys, and return what makes the session of a given first model.

    The keys come first, so that a bad kit is told before minutes of restoring images.

    Parameters
    ----------
    kit, config
        The site's kit, and the configuration after :func:`flep_fl.config.adopt_kit`.
    state
        Folder of the session's state.

    Returns
    -------
    Callable
        ``make(initial)``; ``initial()`` returns the first model, None: the cloud brings it.

    Raises
    ------
    KitError
        When the model key is not the federation's.
    ConsentError
        When the federation is a mixed one and this site's kit does not consent.
    """
    federation = kit.federation
    profile = ckks_profile(config)
    encrypted = config.cloud.trust != "open"
    cipher: ModelCipher = PlainModelCipher("open")
    if encrypted:
        if kit.contribute_only:
            cipher = PublicModelCipher(PublicKey.from_bytes(kit.public_key or b""), profile)
        else:
            cipher = analyst_cipher(kit.model_key or b"", config)
        if cipher.key_id != federation.key_id:
            raise KitError(
                f"The model key in {kit.folder} is not the federation's",
                expected=f"key {federation.key_id}",
                found=f"key {cipher.key_id}",
                remedy="Use the kits as they were provisioned; do not mix them",
            )
    if sends_plain_weights(kit, config):
        cipher = TrustingModelCipher(cipher, profile)
    check_key = CheckKey.from_bytes(kit.check_key) if encrypted else None
    seals_states = None
    if check_key is not None and kit.model_key is not None:
        seals_states = state_key(ModelKey.from_bytes(kit.model_key), check_key)
    membership = Membership(
        site=kit.name,
        federation=federation.federation,
        config=federation.digest,
        shared=federation.agreement,
        mode=update_mode(config),
        profile=load_scheme(config.ckks.scheme, config.allow_targets) or profile,
        bound=ckks_bound(config),
        max_examples=ckks_max_examples(config),
        rounds=config.federation.rounds,
        min_contributors=config.federation.min_contributors,
        site_keys=federation.site_keys(),
        cloud_key=federation.cloud_key(),
        clip=config.ckks.out_of_range == "clip",
        contribute_only=kit.contribute_only,
        optimiser=federated_optimiser(config),
    )

    carry = None
    if federation.generation > 1 and not kit.contribute_only:
        carry = CarryOver(state, _earlier_keys(kit, config), partial(forget_previous, kit))

    def make(initial: Callable[[], Arrays] | None) -> AnalystSession:
        return AnalystSession(
            membership, kit.signing_key, cipher, check_key, initial, state, carry, seals_states
        )

    return make


def _earlier_keys(kit: SiteKit, config: Config) -> list[EarlierKeys]:
    """Return the earlier generations that still open something; keys of another profile do not."""
    found = []
    for keys in kit.previous:
        try:
            if config.cloud.trust == "open":
                cipher: ModelCipher = PlainModelCipher("open")
                sealed_states = NO_SECRET
            else:
                cipher = analyst_cipher(keys.model_key or b"", config)
                check_key = CheckKey.from_bytes(keys.check_key)
                sealed_states = state_key(ModelKey.from_bytes(keys.model_key or b""), check_key)
            found.append(EarlierKeys(cipher, sealed_states))
        except ModelKeyError as exc:
            _LOG.warning("keys of generation %d are not used: %s", keys.generation, exc)
    return found
