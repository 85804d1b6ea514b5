"""Every input of a merge behind one door: any of its tensors, whoever it belongs to."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from modalloy.storage.source import Later
from modalloy.storage.tensors import ComposedRef, TensorRef, WeightFile, checked


class Inputs:
    """Reads any tensor of a merge's inputs, and refuses NaN and infinity by the owner's name. Pickles as paths."""

    def __init__(self, owners: Iterable[tuple[str, Iterable[WeightFile]]]) -> None:
        """`owners`: what messages call each owner, and its files; of a file that two share, the first is named."""
        self.files: dict[Path, tuple[WeightFile, str]] = {}
        self.uses: dict[TensorRef, int] = {}  # how often tensors that are shared will still be read
        self.held: dict[TensorRef, Tensor] = {}
        for owner, files in owners:
            for file in files:
                self.files.setdefault(file.path, (file, owner))

    def joined(self, owner: str, files: Iterable[WeightFile]) -> "Inputs":
        """These inputs and some more files."""
        both = Inputs(())
        both.files = self.files | {file.path: (file, owner) for file in files}
        return both

    def keep(self, refs: Iterable[TensorRef]) -> None:
        """These tensors will be read again: those of a store are then asked for once (see `storage/ranges.py`)."""
        for source in (source for ref in refs for source in ref.sources):
            self.files[source.file][0].keep(source)

    def share(self, uses: Mapping[TensorRef, int]) -> None:
        """Each of these tensors is read so many times, by one thread, and held from the first to the last: none may be changed."""
        self.uses, self.held = dict(uses), {}

    def forget(self) -> None:
        """Nothing will be read again."""
        for file, _ in self.files.values():
            file.forget()

    def read(self, ref: TensorRef, buffer: Tensor | None = None, later: Later | None = None) -> Tensor:
        """The data of a tensor, in a new tensor or in `buffer` (uint8, at least `ref.n_bytes` long).

        With `later`, what is stored in one piece is hashed and checked by what is given to it, before which the data must
        not be changed.

        Raises:
            CheckpointError: the file is damaged, was changed meanwhile, or holds NaN or infinity there.
        """
        if isinstance(ref, ComposedRef):
            return ref.composed(self.read if ref.sources else self._read_own, buffer)
        left = self.uses.get(ref, 0)
        if left:
            self.uses[ref] = left - 1
            if (held := self.held.pop(ref, None)) is None:
                held = self._read(ref, None, later)
            if left > 1:
                self.held[ref] = held
            return held
        return self._read(ref, buffer, later)

    def _read_own(self, ref: TensorRef, buffer: Tensor | None = None) -> Tensor:
        """The data in memory that nobody shares."""
        return ref.composed(self._read_own, buffer) if isinstance(ref, ComposedRef) else self._read(ref, buffer, None)

    def _read(self, ref: TensorRef, buffer: Tensor | None, later: Later | None) -> Tensor:
        file, owner = self.files[ref.file]
        tensor = file.read(ref, buffer, later)
        if later is None:
            return checked(tensor, ref, owner)
        later(partial(checked, tensor, ref, owner))
        return tensor

    def __getstate__(self) -> Mapping[str, list[str]]:
        owners: dict[str, list[str]] = {}
        for path, (_, owner) in self.files.items():
            owners.setdefault(owner, []).append(str(path))
        return owners

    def __setstate__(self, state: Mapping[str, list[str]]) -> None:
        self.__init__((owner, map(WeightFile, map(Path, paths))) for owner, paths in state.items())  # type: ignore[misc]
