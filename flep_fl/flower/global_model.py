"""What a cloud that can open sums makes of them: the global model, and its score on the cloud's own images.

Imported by the branch of a trusted or open cloud alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flep_fl.config import Config, federated_optimiser
from flep_fl.contracts.errors import ConfigError, LayoutError, OptimiserStateError
from flep_fl.contracts.files import write_secret
from flep_fl.contracts.ports import Float64Vector
from flep_fl.contracts.records import CloudEvaluation
from flep_fl.data_analyst.model import build_model, get_arrays, set_arrays
from flep_fl.data_analyst.restore import reduce_area
from flep_fl.data_analyst.train import evaluate
from flep_fl.data_owner.partition import split_test
from flep_fl.data_owner.sources import SOURCES, load_source
from flep_fl.model_security import optimiser
from flep_fl.model_security.layout import Arrays, ModelLayout
from flep_fl.model_security.optimiser import OptimiserState

Follow = Callable[[int, Float64Vector, ModelLayout], Arrays]
"""``follow(round, average, layout)`` returns the global model after a round."""

_NUMBER_BYTES = 8


def follower(config: Config, path: Path) -> Follow:
    """Return what takes the same step as every analyst does.

    Parameters
    ----------
    config
        ``federation.optimizer`` and its numbers, the model and its seed.
    path
        Keeps the optimiser's state, so that a resumed run goes on with it. Secret, as the model is.
    """
    settings = federated_optimiser(config)
    if not settings.has_memory:
        return lambda _number, average, layout: layout.unflatten(average)

    def follow(number: int, average: Float64Vector, layout: ModelLayout) -> Arrays:
        if path.exists():
            data = path.read_bytes()
            last, state = int.from_bytes(data[:_NUMBER_BYTES], "big"), data[_NUMBER_BYTES:]
            if last >= number:
                raise OptimiserStateError(
                    f"{path} is of a later round", expected=f"before {number}", found=last
                )
            current = OptimiserState.from_bytes(state)
        else:
            current = optimiser.start(settings, layout.flatten(first_model(config, layout)))
        new = optimiser.step(settings, current, average, number)
        write_secret(path, number.to_bytes(_NUMBER_BYTES, "big") + new.to_bytes())
        return layout.unflatten(new.weights)

    return follow


def first_model(config: Config, layout: ModelLayout) -> Arrays:
    """Build the first model that follows from the kit's seed.

    Numbers of channels and classes are read off the layout; that they are right is proved by the model then
    having exactly that layout.

    Raises
    ------
    LayoutError
        The sites' model is not ``config.model``.
    """
    shapes = [tensor.shape for tensor in layout.tensors if len(tensor.shape) > 1]
    if shapes:
        arrays = get_arrays(
            build_model(config.model.name, classes=shapes[-1][0], channels=shapes[0][1], seed=config.seed)
        )
        if ModelLayout.of(arrays).digest == layout.digest:
            return arrays
    raise LayoutError(
        f"The cloud cannot follow the sites' model: it is not model={config.model.name}",
        remedy="Use cloud=untrusted, or federation.optimizer=fedavg without cloud.eval_data",
    )


def evaluator(config: Config) -> Callable[[Arrays, ModelLayout], CloudEvaluation]:
    """Read the cloud's own test images, and return what evaluates a model on them.

    A packaged data set stands for its held-out part (``data.test_fraction`` and ``seed``: the owner's own,
    where the owner uses the same); a folder stands for all its images. ``data.image_size`` and ``data.limit``
    apply as for the owner's images.

    Raises
    ------
    ConfigError, MissingExtraError, EmptyDatasetError, ImageFormatError
        The images cannot be read.
    """
    name, data = config.cloud.eval_data or "", config.data
    own = name not in SOURCES
    source = load_source(
        "folder" if own else name,
        path=Path(name) if own else None,
        image_size=data.image_size,
        limit=data.limit,
        seed=config.seed,
    )
    held_out = split_test(source.labels, data.test_fraction, config.seed)[1]
    chosen = range(len(source.labels)) if own else held_out.tolist()
    side = config.model.input_size
    planes = [reduce_area(np.asarray(source.images[i], dtype=np.float32), side) for i in chosen]
    if len(shapes := {plane.shape for plane in planes}) > 1:
        raise ConfigError(
            f"cloud.eval_data={name} holds images of {len(shapes)} sizes",
            remedy="Set model.input_size, or data.image_size",
        )
    images = np.stack(planes)[:, None]
    labels = np.array([source.labels[i] for i in chosen], dtype=np.int64)

    def score(arrays: Arrays, layout: ModelLayout) -> CloudEvaluation:
        shape = next((t.shape for t in reversed(layout.tensors) if len(t.shape) > 1), (0,))
        if shape[0] != len(source.classes):
            raise ConfigError(
                f"cloud.eval_data={name} has other classes than the sites' model",
                expected=f"{shape[0]} classes",
                found=f"{len(source.classes)}: {', '.join(source.classes)}",
                remedy="Give the cloud images of the same classes, in folders of the same names",
            )
        first_model(config, layout)
        model = build_model(config.model.name, classes=shape[0], channels=1, seed=config.seed)
        set_arrays(model, arrays)
        result = evaluate(model, images, labels)
        return CloudEvaluation(result.accuracy, result.loss_mean, result.total)

    return score
