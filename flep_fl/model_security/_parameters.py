"""SEAL's view of a profile: the context, its primes and the identifier of its data level."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from tenseal import sealapi

from flep_fl.model_security import _seal_blob
from flep_fl.model_security._scratch import ScratchFile
from flep_fl.model_security.profiles import Profile

_FIXED_BYTES = 1 + 8 + 8  # scheme, ring degree, number of primes
_MODULUS_BYTES = 16 + 8


@dataclass(frozen=True)
class SealParameters:
    """What a ciphertext of a profile must refer to.

    Attributes
    ----------
    context
        ``sealapi.SEALContext`` at 128-bit security.
    parms_id
        Identifier of the data level, 32 bytes, as SEAL serialises it.
    primes
        The moduli of the data level.
    serialised
        The encryption parameters as SEAL writes them, uncompressed and without envelope.
    minor_version
        SEAL 4's minor version in this installation.
    """

    context: Any
    parms_id: bytes
    primes: tuple[int, ...]
    serialised: bytes
    minor_version: int


@cache
def seal_parameters(profile: Profile) -> SealParameters:
    """Build the SEAL context of a profile; the primes are a function of their bit sizes."""
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(profile.poly_modulus_degree)
    bits = list(profile.coeff_mod_bit_sizes)
    parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(profile.poly_modulus_degree, bits))
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    primes = tuple(int(p.value()) for p in context.first_context_data().parms().coeff_modulus())
    with ScratchFile() as file:
        parameters.save(file.path)
        size = _FIXED_BYTES + _MODULUS_BYTES * (len(bits) + 1)  # the primes and the unused plain modulus
        blob = file.read()
    return SealParameters(
        context=context,
        parms_id=struct.pack("<4Q", *context.first_parms_id()),
        primes=primes,
        serialised=_seal_blob.unwrap(blob, (size,)),
        minor_version=_seal_blob.minor_version(blob),
    )
