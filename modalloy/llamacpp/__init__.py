"""llama.cpp's decoder, which takes token ids and embeddings and switches LoRA adapters between them; knows no model of ours."""
