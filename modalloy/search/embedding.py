"""How far the meanings of two answers are apart, by a model of sentences: AdaMMS compares long answers so."""

import torch
from torch import Tensor, nn

from modalloy.errors import CheckpointError, ModalloyError
from modalloy.model.opening import one_loader, open_tokenizer, opening
from modalloy.storage.folder import refuse_pickles
from modalloy.storage.locate import locate

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"  # of AdaMMS


class Embedder:
    """A model of transformers whose last states, averaged over a text's tokens, stand for it; every text is embedded once.

    So do the authors of `EMBEDDER` use theirs. One text is embedded at a time: without padding it does not depend on others.
    """

    def __init__(self, location: str, device: str = "cpu") -> None:
        """Load a model from a folder or a hub id.

        Raises:
            CheckpointError: it is not there, or is no whole model of text that transformers can load.
        """
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            folder = locate(location)
        except CheckpointError as error:
            raise CheckpointError(f"--embedder {error}") from error
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"--embedder {location}: has no config.json; give the folder or hub id of a model")
        try:
            self.tokenizer = open_tokenizer(folder)
            refuse_pickles(folder)
            with opening(folder, "model"), one_loader():  # what it would report is refused below
                model, loading = AutoModel.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
                )
        except CheckpointError as error:
            raise CheckpointError(f"--embedder {error}") from error
        lacking = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
        if lacking:
            raise CheckpointError(f"--embedder {location}: its weights lack {lacking[0]}; choose another model")
        if model.config.is_encoder_decoder:
            raise CheckpointError(
                f"--embedder {location}: is an encoder with a decoder; choose a model that is one of them"
            )
        self.location = location
        self.model = model.to(device).eval()
        self.longest = min(getattr(model.config, "max_position_embeddings", 10**9), self.tokenizer.model_max_length)
        self.known: dict[str, Tensor] = {}  # text → unit vector (dim,)

    def difference(self, a: str, b: str) -> float:
        """1 − cosine of what stands for two texts: 0 for equal ones, 1 to one without tokens, at most 2."""
        if a == b:
            return 0.0
        return 1.0 - float(self._embedded(a) @ self._embedded(b))

    @torch.no_grad()
    def _embedded(self, text: str) -> Tensor:
        if text not in self.known:
            with opening(self.location, "tokenizer", "used", silent=True):
                ids = self.tokenizer(text, return_tensors="pt").to(self.model.device)
            count = ids["input_ids"].shape[1]
            if count > self.longest:
                raise ModalloyError(
                    f"--embedder {self.location}: an answer takes {count} tokens, more than its {self.longest}; use a "
                    "smaller --max-new-tokens, or another model"
                )
            states = self.model(**ids).last_hidden_state[0] if count else torch.zeros(1, self.model.config.hidden_size)
            self.known[text] = nn.functional.normalize(states.mean(0).double(), dim=0)
        return self.known[text]
