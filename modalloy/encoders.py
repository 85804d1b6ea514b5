"""`Encoder`, where plugins import it from."""

from modalloy.senses.encoders import Encoder as Encoder
