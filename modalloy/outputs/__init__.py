"""What is written beside the weights, by form: one form, one file, one line here."""

from modalloy.outputs import adapter, full, omni

WRITERS = {"adapter": adapter.WRITER, "full": full.WRITER, "omni": omni.WRITER}
