"""Commands for who passes a result on: sign and bom."""

from pathlib import Path
from typing import Annotated

import typer

from modalloy.cli.options import OutFolder
from modalloy.cli.terminal import say
from modalloy.errors import ModalloyError


def sign(
    out: OutFolder,
    key: Annotated[
        Path | None, typer.Option(help="private key (PEM: P-256, P-384 or P-521)", show_default=False)
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="sign by sigstore: needs a network, and a browser or CI's own identity")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier signature")] = False,
) -> Path:
    """Sign a result by OpenSSF model signing: every file, and the manifest with the hashes of its inputs."""
    if (key is None) != sigstore:
        raise ModalloyError("sign with --key FILE, which needs no network, or with --sigstore; give one of them")
    from modalloy.signing import sign as run

    target = run(out, key=key, overwrite=overwrite)
    say(f"wrote    {target}")
    return out


def bom(
    out: OutFolder,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier one")] = False,
) -> Path:
    """Write a CycloneDX bill of materials of a result beside its manifest: its files, its inputs, their hashes."""
    from modalloy.bom import write_bom

    say(f"wrote    {write_bom(out, overwrite=overwrite)}")
    return out
