"""How training scripts store specialists: one layout a file."""
