"""Signatures by OpenSSF model signing, the bill of materials, and the refusal of pickles."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import modalloy
from modalloy.cli import app
from modalloy.errors import CheckpointError, ModalloyError, OutputError
from modalloy.signing import SignatureError, sign, verify_signature
from modalloy.storage.folder import read_json
from modalloy.verify import verify


def key_pair(folder: Path, name: str, curve: Any = None) -> tuple[Path, Path]:
    """Files of a private key and its public one."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    kind = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


def run(*argv: object) -> Any:
    return CliRunner().invoke(app, [*map(str, argv)], standalone_mode=False)


def test_a_result_is_signed_and_its_lineage_told(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    modalloy.merge(write_recipe(), out)
    private, public = key_pair(tmp_path, "mine")
    _, other = key_pair(tmp_path, "other")
    assert sign(out, key=private) == out / "model.sig"
    signed = verify_signature(out, key=public)
    assert [one.label for one in signed.parents] == list(read_json(out / "manifest.json")["inputs"])
    assert all(one.files and one.signed is None for one in signed.parents), signed.parents
    verify(out)  # a signature is no stranger in a result
    (out / "sources.json").unlink()  # which is of one machine, and not signed
    assert all(one.files is None for one in verify_signature(out, key=public).parents)
    with pytest.raises(SignatureError, match="is not of this key or identity") as caught:
        verify_signature(out, key=other)
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="is there already; sign again with --overwrite"):
        sign(out, key=private)


@pytest.mark.parametrize("change", ["weights", "manifest", "extra", "missing", "signature"])
def test_a_change_after_signing_is_one_line(tmp_path: Path, write_recipe: Callable[..., Path], change: str) -> None:
    out = tmp_path / "out"
    modalloy.merge(write_recipe(), out)
    private, public = key_pair(tmp_path, "mine")
    sign(out, key=private)
    if change == "extra":
        (out / "more.txt").write_text("more")
    elif change == "missing":
        (out / "recipe.yaml").unlink()
    else:
        names = {"weights": "adapter_model.safetensors", "manifest": "manifest.json", "signature": "model.sig"}
        path = out / names[change]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    done = run("verify", out, "--signature", "--key", public)
    assert done.return_value == 1 and done.stdout.startswith("fault    ") and done.stdout.count("\n") == 1, done.stdout
    words = {
        "extra": "more.txt was added",
        "missing": "recipe.yaml was removed",
        "manifest": "manifest.json was changed",
    }
    assert words.get(change, "model.sig") in done.stdout, done.stdout
    told = json.loads(run("verify", out, "--signature", "--key", public, "--json").stdout)
    assert told["ok"] is False and "model.sig" in told["fault"]


def test_the_commands_refuse_in_one_line(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    modalloy.merge(write_recipe(), out)
    private, public = key_pair(tmp_path, "mine")
    odd, _ = key_pair(tmp_path, "odd", ec.SECP256K1())
    (tmp_path / "text.pem").write_text("no key")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("sign", out), "give one of them"),
        (("sign", out, "--key", private, "--sigstore"), "give one of them"),
        (("sign", out, "--key", tmp_path / "none"), "no such file; correct the path of the key"),
        (("sign", out, "--key", odd), "P-256"),
        (("sign", out, "--key", tmp_path / "text.pem"), "a key is a PEM file"),
        (("verify", out, "--signature", "--key", public), "has no model.sig"),
        (("verify", out, "--key", public), "add --signature"),
    ]
    for argv, words in cases:
        error = run(*argv).exception
        assert isinstance(error, ModalloyError) and words in str(error) and "\n" not in str(error), (argv, error)
        assert not (out / "model.sig").exists() and not list(tmp_path.glob(".out*"))
    (out / "recipe.yaml").write_text("changed")
    with pytest.raises(CheckpointError, match=r"recipe.yaml: is not as manifest.json lists it; nothing is signed"):
        sign(out, key=private)


def test_a_bill_of_materials_names_files_and_inputs(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    out = tmp_path / "out"
    modalloy.merge(write_recipe(), out)
    assert run("bom", out).exception is None
    text = (out / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    told, manifest = json.loads(text), read_json(out / "manifest.json")
    of_model = {one["name"]: one["hashes"][0]["content"] for one in told["metadata"]["component"]["components"]}
    assert of_model == {name: known for name, known in manifest["outputs"].items() if name != "bom.cdx.json"}
    inputs = {one["bom-ref"]: one for one in told["components"]}
    assert list(inputs) == [f"input:{label}" for label in sorted(manifest["inputs"])] or len(inputs) == 3
    verify(out)
    private, public = key_pair(tmp_path, "mine")
    sign(out, key=private)
    verify_signature(out, key=public)
    assert isinstance(run("bom", out).exception, OutputError)


def test_safetensors_only_refuses_every_pickle(
    tmp_path: Path, write_recipe: Callable[..., Path], specialists: dict[str, Path]
) -> None:
    import torch
    from safetensors.torch import load_file

    weights = specialists["audio"] / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    recipe = write_recipe()
    assert modalloy.merge(recipe, tmp_path / "out").plan
    command = [sys.executable, "-m", "modalloy.cli", "--safetensors-only", "plan", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is a pickle, which --safetensors-only refuses" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
