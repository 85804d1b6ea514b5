"""One medium to the decoder's tokens."""
