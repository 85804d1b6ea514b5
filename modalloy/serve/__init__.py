"""`modalloy serve`: an OpenAI-compatible server. It talks to a model only through `modalloy.model`'s chat, batch and answers."""
