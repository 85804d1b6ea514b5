"""Other harnesses over our models. Nothing here is imported unless the harness is used."""
