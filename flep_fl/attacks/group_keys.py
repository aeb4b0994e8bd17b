"""The paper's cipher as the paper keys it: one permutation and one secret window for a whole epoch.

The paper calls the pair (chaotic sequence, b) *group keys* and changes them "regularly": until then every
image is scrambled alike. The project's own presets, ``paper`` among them, derive fresh keys for every image
from a synthetic IV, and seal the result in an authenticated envelope. To attack what the literature attacks,
this cipher takes both away and nothing else: layers, wire format and noise are those of the project.

For attacks only. Named as ``cipher.name=flep_fl.attacks.group_keys.PAPER`` with
``allow_targets=[flep_fl.attacks.]``.
"""

from __future__ import annotations

import dataclasses
import secrets

from flep_fl.contracts.ports import Entropy
from flep_fl.data_security.envelope import IV_BYTES
from flep_fl.data_security.keys import ImageKeyBundle, LayerKeys
from flep_fl.data_security.parameters import CipherParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher
from flep_fl.data_security.presets import Preset


class _GroupKeyBundle(ImageKeyBundle):
    """A bundle whose layer keys are those of the epoch, whichever image asks."""

    __slots__ = ()

    def layer_keys(self, iv: bytes) -> LayerKeys:
        """Return the same keys for every image: the paper's group keys."""
        return ImageKeyBundle.layer_keys(self, bytes(IV_BYTES))


class GroupKeyCipher(ThreeLayerCipher):
    """The three-layer cipher with one set of layer keys per epoch; noise is drawn afresh all the same."""

    def __init__(
        self,
        bundle: ImageKeyBundle,
        *,
        noise_secret: bytes | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        fields = {f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle) if f.init}
        super().__init__(_GroupKeyBundle(**fields), noise_secret=noise_secret, entropy=entropy)


PAPER = Preset(
    CipherParameters(layers=("scramble", "encode", "noise"), noise_units="wire"),
    "The paper's three steps with the paper's group keys, and no envelope.",
    restore_order="denoise_first",
    factory=GroupKeyCipher,
)
"""What the paper describes, for attacks."""
