"""Bytes in and out: tensors, files and folders; nothing of recipes, specialists or methods."""
