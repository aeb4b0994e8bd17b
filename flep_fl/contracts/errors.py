"""Named errors: what was expected, what was found, what to do.

Every class carries a short ``code``. Codes, never messages, may travel to an untrusted cloud
(:data:`PUBLIC_CODES` is the allow-list); the message stays in the log of the party it concerns.
"""

from __future__ import annotations

from typing import ClassVar


class FlepError(Exception):
    """Base of every error that this project raises on purpose.

    Parameters
    ----------
    problem
        What is wrong, in one sentence, naming the field, file or party.
    expected, found
        The expected and the actual value, where that helps.
    remedy
        What the reader can do about it.
    """

    code: ClassVar[str] = "error"

    def __init__(
        self, problem: str, *, expected: object = None, found: object = None, remedy: str | None = None
    ) -> None:
        parts = [problem.rstrip(".") + "."]
        if expected is not None:
            parts.append(f"Expected {expected}.")
        if found is not None:
            parts.append(f"Found {found}.")
        if remedy is not None:
            parts.append(remedy.rstrip(".") + ".")
        super().__init__(" ".join(parts))
        self.problem = problem
        self.expected = expected
        self.found = found
        self.remedy = remedy


# --- configuration -----------------------------------------------------------------------------


class ConfigError(FlepError):
    """A configuration value is unknown, out of range, or does not fit another one."""

    code = "config"


class ConfigMismatchError(ConfigError):
    """Two parties (or a kit and the command line) disagree on a shared setting."""

    code = "config_mismatch"


class TargetError(ConfigError):
    """A class of a user's own is not allowed by ``allow_targets``, does not import, or does not fit."""

    code = "target"


class MissingExtraError(FlepError):
    """An optional dependency is not installed."""

    code = "missing_extra"


class KitError(FlepError):
    """A startup kit is missing, incomplete, damaged, or belongs to another role."""

    code = "kit"


class KitMismatchError(KitError):
    """A file of a startup kit is not the one that its dealer signed for."""

    code = "kit_mismatch"


class KitPermissionError(KitError):
    """A secret file of a startup kit can be read by others."""

    code = "kit_permission"


class KitOutdatedError(KitError):
    """A startup kit is older than one that this party has already used."""

    code = "kit_outdated"


class KitDealerError(KitError):
    """A startup kit is signed by another dealer than the one that this party knows."""

    code = "kit_dealer"


class ProvisionInterruptedError(KitError):
    """Provisioning was interrupted: some kits are new and some are old."""

    code = "provision_interrupted"


class CertificateError(KitError):
    """A TLS certificate of a startup kit is not valid now."""

    code = "certificate"


# --- images, records, archives -------------------------------------------------------------------


class DataError(FlepError):
    """Images or labels cannot be used."""

    code = "data"


class EmptyDatasetError(DataError):
    """A folder or a data set holds no usable image."""

    code = "empty_dataset"


class ImageFormatError(DataError):
    """An array is not an image of a supported shape and dtype, or a file does not decode."""

    code = "image_format"


class CipherParameterError(FlepError):
    """A parameter of the image cipher is outside its valid set."""

    code = "cipher_parameter"


class ImageKeyError(FlepError):
    """A bundle of image keys is damaged, or not in the format of this release."""

    code = "image_key"


class EnvelopeError(FlepError):
    """A sealed image or record is truncated, altered, or not one of ours."""

    code = "envelope"


class WrongImageKeyError(EnvelopeError):
    """A sealed image belongs to another key bundle or epoch."""

    code = "wrong_image_key"


class EnvelopeVersionError(EnvelopeError):
    """A sealed image has a format version that this release does not read."""

    code = "envelope_version"


class RecordError(DataError):
    """One record of a database or an archive is corrupt."""

    code = "corrupt_record"


class ArchiveError(DataError):
    """An archive is missing, incomplete, or does not match its manifest."""

    code = "archive"


class DatabaseError(DataError):
    """The private database cannot be opened or does not belong to this owner key."""

    code = "database"


class DiskFullError(DatabaseError):
    """The private database cannot grow: its disk is full or refuses to be written; nothing was stored."""

    code = "disk_full"


class StoreBusyError(DatabaseError):
    """As many captures wait for a commit as may wait; nothing was stored, the sender tries again."""

    code = "busy"


class UnknownDatasetError(DatabaseError):
    """The private database has no data set of that name."""

    code = "unknown_dataset"


class SequenceConflictError(DatabaseError):
    """A device used one sequence number (or one idempotency key) for two different captures."""

    code = "sequence_conflict"


class ClockError(DatabaseError):
    """The owner's clock is far from where it was: what depends on time is refused until somebody looks."""

    code = "clock"


class BackupError(DatabaseError):
    """A backup is damaged or incomplete, or does not belong to this owner key."""

    code = "backup"


class NotReleasedError(DataError):
    """The owner has released nothing of this data set in its current epoch yet."""

    code = "not_released"


class ReleaseChangedError(DataError):
    """The release that a page was asked of is no longer served; the grant has to be opened again."""

    code = "release_changed"


# --- grants, requests ----------------------------------------------------------------------------


class GrantError(FlepError):
    """A grant is damaged, altered, or does not allow this."""

    code = "grant"


class UnknownGrantError(GrantError):
    """There is no such grant for this analyst."""

    code = "unknown_grant"


class GrantRevokedError(GrantError):
    """The owner took the grant back."""

    code = "grant_revoked"


class GrantExpiredError(GrantError):
    """The grant's last day is over."""

    code = "grant_expired"


class RequestSignatureError(FlepError):
    """A request is not signed, altered, too old, replayed, or meant for somebody else."""

    code = "request_signature"


class FetchError(DataError):
    """Records cannot be fetched from a data owner."""

    code = "fetch"


class OwnerUnreachableError(FetchError):
    """A data owner does not answer, or answers that it is busy for too long."""

    code = "owner_unreachable"


class TamperedReleaseError(FetchError):
    """Records were dropped, swapped, duplicated, altered or made up between the owner and the analyst."""

    code = "tampered_release"


class OwnerPinError(FetchError):
    """A data owner shows another key than the one that was pinned."""

    code = "owner_pin"


class KeystoreError(FlepError):
    """The analyst's keystore cannot be opened, is damaged, or lacks a key."""

    code = "keystore"


class TrainingError(FlepError):
    """Local training failed: its loss stopped being finite."""

    code = "training"


class DenoiserError(FlepError):
    """The denoiser's weights are missing, damaged, or not meant for this noise."""

    code = "denoiser"


# --- model security ------------------------------------------------------------------------------


class LayoutError(FlepError):
    """A model does not have the parameters that the federation agreed on."""

    code = "layout"


class ProfileError(ConfigError):
    """A CKKS profile cannot hold this federation (security, headroom or precision)."""

    code = "profile"


class WeightRangeError(FlepError):
    """A weight is not finite or lies outside ``ckks.bound``."""

    code = "weight_range"


class ModelKeyError(FlepError):
    """A model key is damaged, or an update was made under another one."""

    code = "model_key"


class ContributeOnlyError(FlepError):
    """A site that holds the public key alone was asked to open something."""

    code = "contribute_only"


class CiphertextError(FlepError):
    """A ciphertext does not have the exact structure that the profile prescribes."""

    code = "ciphertext"


class UpdateError(FlepError):
    """A sealed update or sum was refused before its payload was touched."""

    code = "update"


class MalformedUpdateError(UpdateError):
    """An envelope is truncated, too large, or not in the format of this release."""

    code = "malformed"


class SignatureError(UpdateError):
    """An envelope was altered, or signed by somebody who is not in the kit."""

    code = "signature"


class ForeignUpdateError(UpdateError):
    """An envelope belongs to another federation, key, model layout or profile."""

    code = "foreign"


class StaleUpdateError(UpdateError):
    """An envelope belongs to another run, round or attempt, or was seen before (replay)."""

    code = "stale"


class SumCheckError(UpdateError):
    """The sum is not the sum of the signed updates: the cloud (or a key holder) cheated."""

    code = "sum_rejected"


class TooFewContributorsError(UpdateError):
    """A sum names fewer contributors than this analyst insists on."""

    code = "too_few_contributors"


class ConsentError(KitError):
    """A mixed federation lacks the consent of a site."""

    code = "consent"


class OptimiserStateError(FlepError):
    """The state of a federated optimiser is damaged, missing, or belongs to another model."""

    code = "optimiser_state"


class MissedSumError(UpdateError):
    """A site missed a sum that its optimiser needs; another analyst has to hand the state over."""

    code = "missed_sum"


class TransferError(UpdateError):
    """A state handed over by another analyst is forged, old, foreign, or not what the others hold."""

    code = "transfer"


class HaltedError(FlepError):
    """The site rejected a sum under its current keys and stops until they are rotated."""

    code = "halted"


# --- any Flower app ------------------------------------------------------------------------------


class ModOrderError(FlepError):
    """A mod that changes updates stands outside ckks_mod, where it could only change ciphertext."""

    code = "mod_order"


class ModelWithheldError(FlepError):
    """The global model was asked of a cloud that cannot open it."""

    code = "model_withheld"


# --- federation, processes -------------------------------------------------------------------------


class QuorumError(FlepError):
    """A round got fewer valid updates than ``federation.quorum``."""

    code = "quorum"


class SiteLostError(FlepError):
    """A site's process or connection ended in mid-round."""

    code = "site_lost"


class RoundTimeoutError(FlepError):
    """A site did not answer within ``federation.round_timeout``."""

    code = "round_timeout"


class RuntimeStartError(FlepError):
    """A child process did not start or ended unexpectedly."""

    code = "runtime_start"


class PortInUseError(RuntimeStartError):
    """An address is taken by another process."""

    code = "port_in_use"


class CheckpointError(FlepError):
    """A run cannot be resumed from the folder that ``resume=`` names."""

    code = "checkpoint"


class ForeignCheckpointError(CheckpointError):
    """A checkpoint belongs to another federation, key or configuration than the cloud's kit."""

    code = "checkpoint_foreign"


class StaleCheckpointError(CheckpointError):
    """The sites have gone on since a checkpoint was written, or have left its run for another."""

    code = "checkpoint_stale"


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is cut, altered, incomplete or not in the format of this release."""

    code = "checkpoint_damaged"


class FinishedCheckpointError(CheckpointError):
    """The run of a checkpoint is over."""

    code = "checkpoint_finished"


class SuperLinkLostError(FlepError):
    """The cloud's SuperLink ended and was started again: every message on its way is lost.

    A grid call raises it once for every restart, when the new SuperLink already answers on the same
    address. Sites connect to it by themselves, as new nodes.
    """

    code = "superlink_lost"


class TransportSecurityError(FlepError):
    """TLS with the cloud failed, or a certificate or node key cannot be used."""

    code = "transport_security"


class NodeRefusedError(FlepError):
    """The cloud does not accept this site's node key."""

    code = "node_refused"


class IdleTimeoutError(FlepError):
    """Nothing was heard from the cloud for ``runtime.idle_timeout`` seconds."""

    code = "idle_timeout"


# --- the owner's devices, gateway and network --------------------------------------------------------


class DeviceError(FlepError):
    """A device's folder, key or state on the device itself is missing, damaged or in use."""

    code = "device"


class CaptureError(DataError):
    """A capture's description is not in the format of this release."""

    code = "capture"


class EnrolmentError(FlepError):
    """An approval does not count: unknown administrator, wrong signature, expired, or out of turn."""

    code = "enrolment"


class RegistryFullError(EnrolmentError):
    """The registry of devices cannot grow: its disk is full or refuses to be written; nothing was changed."""

    code = "disk_full"


class AuditError(FlepError):
    """The audit log, or the heads that sign it, do not fit together."""

    code = "audit"


class AuditDiskFullError(AuditError):
    """The audit log cannot grow: its disk is full or refuses to be written; nothing was taken or given."""

    code = "disk_full"


class NetworkRuleError(ConfigError):
    """The network rules are not valid, or do not fit the gateway's listeners."""

    code = "network_rules"


class GatewayCertificateError(FlepError):
    """A certificate of the owner's gateway or its key is missing, damaged, or cannot be issued as asked."""

    code = "gateway_certificate"


class GatewayError(FlepError):
    """The gateway cannot be reached, or answered with a refusal that trying again will not change."""

    code = "gateway"


class OwnerHomeError(FlepError):
    """The owner's folder is missing, incomplete, or already in use by another process."""

    code = "owner_home"


# --- reports -------------------------------------------------------------------------------------


class ResultsError(DataError):
    """A folder holds no results that a report could be made of."""

    code = "results"


class DamagedResultsError(ResultsError):
    """A file that a run left is not JSON, or not of the form that the run wrote."""

    code = "results_damaged"


class MixedResultsError(ResultsError):
    """A folder holds results that do not belong into one report."""

    code = "results_mixed"


PUBLIC_CODES: frozenset[str] = frozenset(
    cls.code
    for cls in (
        ConfigMismatchError,
        LayoutError,
        WeightRangeError,
        SumCheckError,
        TooFewContributorsError,
        HaltedError,
        SignatureError,
        ForeignUpdateError,
        StaleUpdateError,
        MalformedUpdateError,
        TransferError,
        MissedSumError,
        ModOrderError,
    )
)
"""Reason codes that a site may tell an untrusted cloud; every other failure travels as ``error``."""


def public_code(exc: BaseException) -> str:
    """Return the reason that an untrusted cloud may learn: an allow-listed code, or ``error``."""
    return exc.code if isinstance(exc, FlepError) and exc.code in PUBLIC_CODES else FlepError.code
