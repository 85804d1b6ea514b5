"""Signatures of results by OpenSSF model signing, and the lineage that a signed manifest tells.

Signed is every file of the folder but `sources.json`, which says where inputs were on one machine. Among them is
`manifest.json`, which holds the sha256 of every input and output: who trusts the signature can walk from a result to its
parents, and from those that are signed to theirs. A signature says who made a folder and that nobody changed it; that the
weights are what the recipe gives is `verify`'s to say, and that the model is good nobody's.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, ModalloyError, OutputError, cut, missing_package
from modalloy.files import disk_errors
from modalloy.outputs.manifest import NOT_HASHED, SIGNATURE, read_manifest, result_files
from modalloy.outputs.sources import SOURCES, read_sources
from modalloy.recipe import load_recipe
from modalloy.storage.folder import file_sha256, reading

# in the library's words, and in ours
DIFFERENCE = re.compile(
    r"(?P<what>Extra|Missing) files [^:]*: (?P<files>[^\"']*[^\"'\\])|Hash mismatch for \\*'(?P<name>[^'\\]+)"
)
DIFFERENCES = {"Extra": "added", "Missing": "removed", None: "changed"}
REMEDY = "a key is a PEM file on the curve P-256, P-384 or P-521, and sigstore needs a network"


class SignatureError(ModalloyError):
    """A signature that does not hold: another key's, or of files that were changed since."""


@dataclass(frozen=True)
class Parent:
    """An input of a signed result: where it was, and what is known of it there.

    `files`: whether those that the manifest names have its hashes; `signed`: whether its own signature holds for the same
    key (None: it has none, or is not there).
    """

    label: str
    place: str
    files: bool | None
    signed: bool | None


@dataclass(frozen=True)
class Signed:
    """A signature that holds."""

    signature: str
    signer: str
    files: int
    parents: tuple[Parent, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"ok": True}

    def summary(self) -> list[str]:
        """Lines for people."""
        words = {True: "yes", False: "no", None: "–"}
        lines = [f"signed   by {self.signer}: {self.files} files as they were signed"]
        lines += [
            f"input    {one.label}: hashes as in the manifest: {words[one.files]}, signed by the same key: {words[one.signed]}"
            for one in self.parents
        ]
        return lines


def sign(folder: str | Path, *, key: str | Path | None = None, overwrite: bool = False) -> Path:
    """Sign a result with a private key (PEM, on the curves P-256, P-384 or P-521), or with sigstore where `key` is None.

    Sigstore asks a browser who you are and writes to a public log; a key needs no network. The password of a key that has one
    is read from MODALLOY_KEY_PASSWORD.

    Returns:
        The path of the signature, `model.sig` in the folder.

    Raises:
        CheckpointError: the folder is no result, or its files are not those of its manifest.
        OutputError: it is signed already.
        ModalloyError: the key cannot be used, or sigstore cannot be reached.
        MissingPackageError: without the extra `sign`.
    """
    folder = Path(folder)
    _check_listed(folder)
    target = folder / SIGNATURE
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: is there already; sign again with --overwrite")
    signing, hashing = _library()
    partial = folder.parent / f".{folder.name}.{SIGNATURE}-{secrets.token_hex(4)}"
    config = signing.Config().set_hashing_config(_hashed(hashing))
    try:
        with _one_line(folder if key is None else Path(key), "sign"):
            if key is None:
                config.use_sigstore_signer()
            else:
                password = os.environ.get("MODALLOY_KEY_PASSWORD")
                config.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
            config.sign(folder, partial)
        with disk_errors(folder):
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def verify_signature(
    folder: str | Path, *, key: str | Path | None = None, identity: str | None = None, issuer: str | None = None
) -> Signed:
    """Check the signature of a result with a public key (PEM), or sigstore's with an identity and who vouches for it.

    Raises:
        SignatureError: the signature is not this key's or identity's, or a file was changed, added or removed since.
        CheckpointError: there is no signature, or nothing to check it with.
        MissingPackageError: without the extra `sign`.
    """
    folder = Path(folder)
    target = folder / SIGNATURE
    with reading(target):
        if not target.is_file():
            raise CheckpointError(f"{folder}: has no {SIGNATURE}; sign it with `modalloy sign`")
    if key is None and not (identity and issuer):
        raise CheckpointError(
            "a signature is of somebody: give --key PUBLIC_KEY, or --identity and --issuer of sigstore"
        )
    _check_signature(folder, key, identity, issuer)
    signer = f"the key {file_sha256(Path(key))[:16]} ({key})" if key is not None else f"{identity} ({issuer})"
    return Signed(str(target), signer, len(result_files(folder)) + 1, tuple(_parents(folder, key, identity, issuer)))


def _check_signature(folder: Path, key: str | Path | None, identity: str | None, issuer: str | None) -> None:
    _library()
    from model_signing import hashing, verifying

    config = verifying.Config().set_hashing_config(_hashed(hashing))
    with _one_line(Path(key) if key is not None else folder, "check the signature with"):
        if key is not None:
            config.use_elliptic_key_verifier(public_key=key)
        else:
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as reason:  # the library raises whatever its parts do; each means that the signature does not hold
        raise SignatureError(f"{folder / SIGNATURE}: {_why(folder, reason)}") from None


def _parents(folder: Path, key: str | Path | None, identity: str | None, issuer: str | None) -> Iterator[Parent]:
    """What is known of the inputs that the signed manifest names, where they are still on this machine."""
    inputs = read_manifest(folder)["inputs"]
    places: dict[str, Path] = {}
    if (folder / SOURCES).exists() and (folder / "recipe.yaml").exists():
        recipe = load_recipe(folder / "recipe.yaml")
        sources = read_sources(folder, recipe)
        labels = [label for label in inputs if label not in ("base", "target")]
        places = dict(zip(labels, sources.models, strict=True))
        places |= {"base" if name == "base_model" else name: place for name, place in sources.starts.items()}
    for label, told in inputs.items():
        place = places.get(label)
        if place is None or not place.is_dir():
            yield Parent(label, str(place or told.get("name", "")), None, None)
            continue
        hashes = told.get("sha256", {})
        same = all((place / name).is_file() and file_sha256(place / name) == known for name, known in hashes.items())
        signed: bool | None = None
        if (place / SIGNATURE).is_file():
            try:
                _check_signature(place, key, identity, issuer)
                signed = True
            except SignatureError:
                signed = False
        yield Parent(label, str(place), same if hashes else None, signed)


def _check_listed(folder: Path) -> None:
    """Refuse to sign a folder whose files are not those of its manifest."""
    listed = read_manifest(folder)["outputs"]
    for name in sorted({*listed, *result_files(folder)}):
        if name not in listed or not (folder / name).is_file() or file_sha256(folder / name) != listed[name]:
            raise CheckpointError(
                f"{folder / name}: is not as manifest.json lists it; nothing is signed: verify the result, or merge again"
            )


def _hashed(hashing: Any) -> Any:
    """Every file of a result but the signature itself and what is of one machine."""
    ignored = [name for name in NOT_HASHED if name != "manifest.json"]
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None
    return signing, hashing


@contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """A key that cannot be read or is of another kind, a network that is not there: one line."""
    try:
        yield
    except FileNotFoundError:
        raise ModalloyError(f"{path}: no such file; correct the path of the key") from None
    except (ModalloyError, KeyboardInterrupt):
        raise
    except Exception as reason:  # cryptography's and sigstore's many kinds
        raise ModalloyError(f"{path}: cannot {what} it: {cut(' '.join(str(reason).split()))}; {REMEDY}") from None


def _why(folder: Path, reason: Exception) -> str:
    """What does not hold, in words: another key, or the files that are not as they were signed."""
    text = " ".join(str(reason).split())
    if text.startswith("Signature mismatch"):
        told = (f"{one['files'] or one['name']} was {DIFFERENCES[one['what']]}" for one in DIFFERENCE.finditer(text))
        return f"does not hold: {cut('; '.join(told))} after signing"
    return f"is not of this key or identity, or no signature at all ({type(reason).__name__}); ask its maker for the public key"
