"""Pictures, sounds, videos and point clouds as arrays, where scripts import them from."""

from modalloy.senses.media import load_audio as load_audio
from modalloy.senses.media import load_image as load_image
from modalloy.senses.media import load_points as load_points
from modalloy.senses.media import load_video as load_video
