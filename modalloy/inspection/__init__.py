"""Is this merge sane: what is measured of updates, and what a person should know."""
