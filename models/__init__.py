"""Floor 4: the models that are trained."""

from coterie.models.config import DecoderConfig
from coterie.models.decoder import Decoder, DecoderOutput
from coterie.models.initialise import initialise

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput", "initialise"]
