"""What frozen encoders make of media, kept: the same for every merge of the same specialists."""

import hashlib
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from modalloy.errors import CheckpointError, MediaError, OutputError
from modalloy.files import replace_bytes
from modalloy.model import ChatModel, ModalloyForConditionalGeneration
from modalloy.senses.media.limits import opened
from modalloy.storage.folder import file_sha256

MEMORY_BYTES = 2_000_000_000
DISK_BYTES = 20_000_000_000


class FeatureCache:
    """Encoder features by encoder and file contents: in memory, and in a folder where one is given.

    Features are what the encoder gave, in float32 and unrounded, so that an answer does not depend on the cache.
    """

    def __init__(
        self, folder: Path | None = None, *, disk_bytes: int = DISK_BYTES, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.folder, self.disk_bytes, self.memory_bytes = folder, disk_bytes, memory_bytes
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.kept_bytes = 0
        self.encoders: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.files: dict[tuple[str, int, int], str] = {}
        self.written_bytes = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another --features") from error
            self.written_bytes = sum(path.lstat().st_size for path in folder.glob("*.safetensors"))

    def features(self, chat: ChatModel, modality: str, path: str | Path) -> Any:
        """Features (n_features, dim) of one medium, in float32; of a model that is not modalloy's, what its `features` gives;
        of a native modality, the medium in memory, as its block depends on the media beside it.

        Raises:
            MediaError: the medium cannot be read.
        """
        if not isinstance(chat.model, ModalloyForConditionalGeneration):
            return chat.features(modality, path)
        if modality in chat.processor.preparers:
            return chat.processor.preprocess(modality, path)
        key = hashlib.sha256(f"{self._encoder(chat, modality)} {self._file(path)}".encode()).hexdigest()
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        stored = None if self.folder is None else self.folder / f"{key}.safetensors"
        if stored is not None and stored.is_file():
            try:
                found = load_file(stored)["features"]
            except (SafetensorError, KeyError) as error:
                raise CheckpointError(f"{stored}: is damaged ({error}); remove it") from error
        else:
            medium = chat.processor.preprocess(modality, path)[None]
            found = chat.model.encode(modality, medium)[0].float().cpu().contiguous()
            if stored is not None and self.written_bytes + found.nbytes <= self.disk_bytes:
                try:
                    replace_bytes(stored, save({"features": found}))
                except OSError as error:
                    raise OutputError(
                        f"{stored}: cannot be written ({error.strerror}); free space, or choose another --features"
                    ) from error
                self.written_bytes += found.nbytes
        self.kept[key] = found
        self.kept_bytes += found.nbytes
        while self.kept_bytes > self.memory_bytes:
            self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes
        return found

    def _encoder(self, chat: ChatModel, modality: str) -> str:
        """What an encoder's features depend on besides the medium: its settings, its weights, the kind of device."""
        encoder = chat.model.encoders[modality]
        if encoder not in self.encoders:
            config = chat.model.config.modalities[modality]["encoder"]
            digest = hashlib.sha256(f"{config['name']} {sorted(config['settings'].items())}".encode())
            for name, tensor in sorted(encoder.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tensor.device.type}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
            self.encoders[encoder] = digest.hexdigest()
        return self.encoders[encoder]

    def _file(self, path: str | Path) -> str:
        """The hash of a file, taken once as long as it does not change."""
        with opened(path):
            pass  # a regular file, not too large
        try:
            status = os.stat(path)
            key = (str(path), status.st_mtime_ns, status.st_size)
            if key not in self.files:
                self.files[key] = file_sha256(Path(path))
        except OSError as error:
            raise MediaError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        return self.files[key]
