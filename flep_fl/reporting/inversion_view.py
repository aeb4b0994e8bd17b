"""What a cloud can read of an image in one update, open against untrusted: a picture in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flep_fl.contracts.errors import DamagedResultsError
from flep_fl.reporting.image_view import Stage, stage_from, stage_json
from flep_fl.reporting.page.blocks import Block, Picture, Pictures, Text

TITLE = "One image out of one update"


@dataclass(frozen=True, slots=True)
class InversionView:
    """What the attack gave.

    Attributes
    ----------
    stages
        What was trained on, and what came out of the bytes of either kind of cloud; none where the attack
        does not handle the run's network.
    what
        What was attacked, and how; or why nothing was.
    figures
        Structural similarity (SSIM) to the image by name: ``open``, ``untrusted``, ``grey``.
    """

    stages: Sequence[Stage]
    what: str
    figures: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "stages": [stage_json(stage) for stage in self.stages],
            "what": self.what,
            "figures": dict(self.figures),
        }

    @classmethod
    def from_json(cls, value: Any) -> InversionView:
        """Undo :meth:`to_json`.

        Raises
        ------
        DamagedResultsError
            When the value is not of that form.
        """
        try:
            return cls(
                [stage_from(entry) for entry in value["stages"]],
                str(value["what"]),
                {str(name): float(figure) for name, figure in value["figures"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise DamagedResultsError(f"The picture of an attack cannot be read ({exc!r})") from exc


def inversion_blocks(view: InversionView) -> list[Block]:
    """Return the pictures side by side, or the sentence that says why there are none."""
    if not view.stages:
        return [Text(view.what)]
    pictures = [
        Picture(stage.name, stage.png, f"{stage.name}: {stage.caption}", stage.caption)
        for stage in view.stages
    ]
    return [Pictures(TITLE, pictures, view.what)]
