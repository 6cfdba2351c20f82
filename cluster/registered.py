"""A trained adapter as an MLflow model: `mlflow.pyfunc.load_model("models:/NAME@newest").predict(slices)`.

Slices float32 [n, 3, S, S] in [0, 1], prepared as card.json says, to logits float32 [n, classes + 1, S, S]; channel 0
is background. Nothing is pickled: the model is the adapter's folder and the name of this module, so that who loads it
has fedsam installed. An adapter of a SAM checkpoint needs that file:
`load_model(uri, model_config={"checkpoint": PATH})`.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedsam_core
from fedsam_core.trained import CARD, load_trained, read_card


class Predictor:
    """What `mlflow.pyfunc` calls."""

    def __init__(self, adapter: Path, checkpoint: Path | None) -> None:
        self._segmenter = load_trained(adapter, checkpoint).segmenter

    def predict(self, slices: np.ndarray) -> np.ndarray:
        """Logits."""
        with torch.inference_mode():
            return self._segmenter(torch.from_numpy(np.ascontiguousarray(slices))).numpy()  # type: ignore[no-any-return]


def save_model(adapter: Path, folder: Path) -> None:
    """Writes the model to a new folder.

    Raises:
        CheckpointError: the adapter's card is missing or damaged.
    """
    from mlflow import pyfunc  # takes seconds to import, and few runs are registered
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    card = read_card(adapter / CARD)
    size = card.model.image_size
    slices = TensorSpec(np.dtype(np.float32), (-1, 3, size, size))
    logits = TensorSpec(np.dtype(np.float32), (-1, card.model.classes + 1, size, size))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*input example", UserWarning)  # the signature says it all
        pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(adapter),
            model_config={"checkpoint": ""},  # only a key that is there can be given when the model is loaded
            signature=ModelSignature(Schema([slices]), Schema([logits])),
            pip_requirements=[f"fedsam=={fedsam_core.__version__}", f"torch=={torch.__version__.partition('+')[0]}"],
        )


def _load_pyfunc(path: str, model_config: dict[str, Any]) -> Predictor:
    checkpoint = model_config["checkpoint"]
    return Predictor(Path(path), Path(checkpoint) if checkpoint else None)
