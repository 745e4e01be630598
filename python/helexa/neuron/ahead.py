"""What a neuron does ahead of loads, so that these find it done."""

import logging
from collections.abc import Iterable
from contextlib import suppress

from helexa.engine.device import AUTO, find_devices
from helexa.engine.parts import KEPT_TEXTS, prepare_text
from helexa.engine.rehearsal import rehearse
from helexa.errors import HelexaError
from helexa.log import fields
from helexa.neuron.config import ModelEntry
from helexa.weights.sources import resolve

logger = logging.getLogger(__name__)


def rehearse_loads(device: str | None) -> None:
    """Has the CUDA devices ready that models may be loaded to; `device` is the configuration's."""
    with suppress(HelexaError):  # a load will say so
        rehearse(found for found in find_devices(device or AUTO) if found.name != "cpu")


def read_vocabularies(entries: Iterable[ModelEntry]) -> None:
    """Has the tokenizers of models ready that are configured and in reach, but not loaded at the start.

    To make one takes longer than to bring the weights of a model of average size to a device.
    """
    for entry in [entry for entry in entries if not entry.load][:KEPT_TEXTS]:
        try:
            prepare_text(resolve(entry.source or entry.id))
        except (HelexaError, OSError) as error:  # a load will say so, if there is one
            logger.info("vocabulary_not_read", extra=fields(model=entry.id, error=error))
