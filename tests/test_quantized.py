"""A quantised base: near the unquantised one, its updates exact, and one line for all that does not go together with it.

torchao is an extra: where it is not installed, what needs it is skipped, and says so.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import LAYERS, LINEARS, WIDTH, base_tokenizer, write_omni
from serving import OTHER, PICTURE, SOUND, image, site, text
from torch import Tensor

from modalloy.cli import main
from modalloy.delta import LowRank
from modalloy.errors import CheckpointError, MissingPackageError, ModalloyError, OutputError, RecipeError
from modalloy.model import ChatModel, ModalloyForConditionalGeneration, load_model
from modalloy.model.quantised import GROUP, parts, quantisation, settle, stored_bytes
from modalloy.model.routing import FEW, TEXT, RoutedLinear, Routes, is_quantised, matmul
from modalloy.serve.queue import share

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason='torchao is not installed: pip install "modalloy[quantize]"'
)
QUESTION = "what is this ? dog , cat"
KINDS = ("int8", "int4")
# of a product of random numbers: rounding to codes, and of input and output to bfloat16
OFF = {"int8": 0.012, "int4": 0.11}
FFN = 64  # a multiple of GROUP, which the tests' usual width is not


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base whose linears can be held in int4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("quantized") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(conftest.WORDS),
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    base_tokenizer().save_pretrained(folder)
    shapes = {name: tuple(FFN if n == conftest.FFN else n for n in shape) for name, shape in LINEARS.items()}
    slots = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conftest, "SLOTS", slots)
        yield folder


@pytest.fixture(scope="module")
def omni(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_omni(tmp_path_factory.mktemp("merged"), wide)


@pytest.fixture(scope="module")
def plain(omni: Path) -> ChatModel:
    return load_model(omni)


@pytest.fixture(scope="module")
def quantised(omni: Path) -> dict[str, ChatModel]:
    return {kind: load_model(omni, quantize=kind) for kind in KINDS}


def linear_of(weight: Tensor, kind: str) -> RoutedLinear:
    """A linear with this weight, quantised."""
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    routed = RoutedLinear(layer, Routes())
    quantize_(torch.nn.Sequential(routed), quantisation(kind, "cpu", torch.float32).quant_type)
    settle({"": routed})
    assert is_quantised(routed.weight)
    return routed


def logits(chat: ChatModel, **media: Path) -> Tensor:
    content: list[dict[str, Any]] = [{"type": name, "path": path} for name, path in media.items()]
    prompt = chat.prompt([{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}])
    with torch.no_grad():
        found: Tensor = chat.model(**chat.inputs([prompt])).logits[0]
    return found


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_and_products_are_those_of_the_codes(kind: str) -> None:
    """Against float64: each number of the weight is within half a step of its own, in its row or its group."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 4 * GROUP, generator=draw) * torch.rand(48, 1, generator=draw)
    linear = linear_of(weight, kind)
    exact = weight.double()
    if kind == "int8":
        stored = linear.weight.qdata.double() * linear.weight.scale.double()  # type: ignore[operator, union-attr]
        step = 2 * exact.abs().amax(1, keepdim=True) / 255
        assert ((stored - exact).abs() <= step / 2 * 1.001).all()
    else:
        stored = matmul(torch.eye(4 * GROUP), linear.weight).T.double()
        groups = exact.view(48, 4, GROUP)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        rounded = groups.abs().amax(-1, keepdim=True) / 2**7  # of the scale, the zero and the number to bfloat16
        assert ((stored.view_as(groups) - groups).abs() <= step / 2 + 3 * rounded).all()
    assert (stored - exact).norm() > 0
    for rows in (1, FEW, FEW + 1, 64):
        x = torch.randn(rows, 4 * GROUP, generator=draw)
        out = matmul(x, linear.weight)
        assert out.dtype == x.dtype
        # input, output, and in int4 the number in between, rounded to bfloat16
        wanted = x.double() @ stored.T
        assert float((out.double() - wanted).norm() / wanted.norm()) < 2**-7
        true = x.double() @ exact.T
        assert float((out.double() - true).norm() / true.norm()) < OFF[kind]
        halves = matmul(x.bfloat16(), linear.weight)
        assert halves.dtype == torch.bfloat16


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_linears_of_the_blocks_stays_bit_for_bit(
    kind: str, plain: ChatModel, quantised: dict[str, ChatModel]
) -> None:
    before, after = dict(plain.model.named_parameters()), dict(quantised[kind].model.named_parameters())
    assert before.keys() == after.keys()
    weights = {f"decoder.{name}" for name in plain.model.linears}
    assert {name for name, one in after.items() if is_quantised(one)} == weights and len(weights) == 7 * LAYERS
    for name in before.keys() - weights:
        assert torch.equal(before[name], after[name]), name
    assert any("up_image" in name for name in before) and any("encoders.audio" in name for name in before)
    # one byte a number and 4 bytes a row; half a byte a number and 4 bytes a group
    for name in weights:
        rows, columns = before[name].shape
        wanted = rows * columns + 4 * rows if kind == "int8" else rows * columns // 2 + rows * columns // GROUP * 4
        extra = parts(after[name]).get("zero_point")
        assert stored_bytes(after[name]) == wanted + (0 if extra is None else extra.nbytes)


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_routed_exactly(kind: str, plain: ChatModel, quantised: dict[str, ChatModel]) -> None:
    """What two modalities' outputs differ by is their updates' difference, as before; the base's error is common to both."""
    draw = torch.Generator().manual_seed(1)
    owners = torch.tensor([[0, 0, 1, 1, 2, 2, 0]])
    names = ("text", "image", "audio")
    for name, linear in quantised[kind].model.linears.items():
        x = torch.randn(1, 1, linear.in_features, generator=draw).expand(1, 7, -1)
        with linear.routes.use(owners, names), torch.no_grad():
            out = linear(x)[0].double()
        got = {owner: out[row] for owner, row in (("text", 0), ("image", 2), ("audio", 4))}
        for one, other in (("image", "text"), ("audio", "image")):
            wanted = torch.zeros(linear.out_features, dtype=torch.float64)
            for owner, sign in ((one, 1), (other, -1)):
                delta: LowRank = plain.model.linears[name].update(owner)
                wanted += sign * (delta.up.double() @ (delta.down.double() @ x[0, 0].double()))
            assert torch.allclose(got[one] - got[other], wanted, atol=1e-5, rtol=1e-5), name
        alone = linear(x[:, :1])[0, 0].double()  # one owner only: another way through the layer
        assert float((alone - got["text"]).norm() / alone.norm()) < 2**-7
    assert TEXT in linear.scales


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "media", [{}, {"image": PICTURE}, {"image": OTHER, "audio": SOUND}], ids=["text", "one", "two"]
)
def test_logits_are_near(kind: str, media: dict[str, Path], plain: ChatModel, quantised: dict[str, ChatModel]) -> None:
    """Off by no more than the products of two layers of random weights are, if their errors add like independent ones."""
    wanted, got = logits(plain, **media), logits(quantised[kind], **media)
    off = float((got - wanted).norm() / wanted.norm())
    assert 0 < off < (7 * LAYERS) ** 0.5 * OFF[kind]


@needs_torchao
def test_bfloat16_beside_codes(omni: Path) -> None:
    """Near the model in bfloat16: what its encoders' weights lose by rounding is none of the codes' doing."""
    got = logits(load_model(omni, quantize="int8", dtype="bfloat16"), image=PICTURE)
    wanted = logits(load_model(omni, dtype="bfloat16"), image=PICTURE)
    assert got.dtype == torch.bfloat16 and float((got - wanted).norm() / wanted.norm()) < 0.05


@needs_torchao
def test_transformers_own_way_gives_the_same_model(omni: Path, quantised: dict[str, ChatModel]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = ModalloyForConditionalGeneration.from_pretrained(omni, dtype=torch.float32, quantization_config=config)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, quantised["int8"].model(input_ids=ids).logits)


@needs_torchao
def test_a_specialist_and_a_base_are_quantised_too(omni: Path, wide: Path) -> None:
    specialist = load_model(omni.parent / "vision-damc", base=str(wide), quantize="int4")
    assert specialist.ask(QUESTION, image=PICTURE, max_new_tokens=2) is not None
    assert all(is_quantised(one.weight) for one in load_model(wide, quantize="int8").model.linears.values())


@needs_torchao
def test_what_does_not_go_together_is_refused(
    omni: Path, base: Path, wide: Path, quantised: dict[str, ChatModel], tmp_path: Path
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def says(kind: type[ModalloyError], words: str, call: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)

    load = ModalloyForConditionalGeneration.from_pretrained
    says(RecipeError, r"quantize int3: no such kind; did you mean", lambda: load_model(omni, quantize="int3"))
    says(RecipeError, r"give device cpu or cuda, not auto", lambda: load_model(omni, quantize="int8", device="auto"))
    says(RecipeError, r"leave out fold or quantize", lambda: load_model(omni, quantize="int8", fold=True))
    says(RecipeError, r"load the model without", quantised["int8"].model.fold)
    says(
        CheckpointError,
        r"down_proj.*: 32 × 48 cannot be held in int4.*use int8",
        lambda: load_model(base, quantize="int4"),
    )
    says(OutputError, r"is not written", lambda: quantised["int8"].model.save_pretrained(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    says(
        RecipeError,
        r"BitsAndBytesConfig would replace the routed linears",
        lambda: load(omni, quantization_config=BitsAndBytesConfig()),
    )
    says(
        RecipeError,
        r"embeddings are not quantised",
        lambda: load(
            omni, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
        ),
    )
    says(RecipeError, r"bfloat16 only; give dtype bfloat16", lambda: quantisation("int4", "cuda", torch.float32))
    load_model(omni).model.save_pretrained(tmp_path / "whole")
    config = (tmp_path / "whole" / "config.json").read_text()
    lie = '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true},'
    (tmp_path / "whole" / "config.json").write_text(config.replace("{", lie, 1))
    says(CheckpointError, r"says that it is quantised", lambda: load_model(tmp_path / "whole"))


@needs_torchao
def test_dense_weights_of_text_are_refused(omni: Path, tmp_path: Path) -> None:
    from modalloy.model import ModalloyConfig
    from modalloy.model.quantised import only_the_base

    config = ModalloyConfig.from_pretrained(omni)
    config.text_linears = ["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(RecipeError, match="text uses dense weights of its own"):
        only_the_base(quantisation("int8", "cpu", torch.float32), config, omni)


@needs_torchao
def test_a_hosted_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}')
    with pytest.raises(RecipeError, match="a model of transformers' own, which modalloy does not route"):
        load_model(tmp_path, quantize="int8")


@needs_torchao
def test_served_answers_are_those_of_chat_and_codes_are_shared(omni: Path, quantised: dict[str, ChatModel]) -> None:
    chat = quantised["int8"]
    wanted = chat.ask(QUESTION, image=PICTURE, max_new_tokens=8)
    other = load_model(omni, quantize="int8")
    codes = sum(stored_bytes(linear.weight) for linear in chat.model.linears.values())
    assert share([chat, other]) > codes > 0
    with site({"merged": chat, "other": other}) as server:
        for name in ("merged", "other"):
            status, _, answer = server.chat(image(PICTURE), text(QUESTION), model=name, max_tokens=8)
            assert status == 200 and answer["choices"][0]["message"]["content"] == wanted


@needs_torchao
def test_chat_says_what_it_saved(omni: Path, quantised: dict[str, ChatModel]) -> None:
    """As a command of its own, so that what torchao logs when it is imported would be seen."""
    asked = ["chat", str(omni), "-p", QUESTION, "--max-new-tokens", "4", "--image", str(PICTURE)]
    done = subprocess.run(
        [sys.executable, "-m", "modalloy.cli", *asked, "--quantize", "int8", "--device", "cpu"],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "MODALLOY_TRACEBACK"},
    )
    assert (done.returncode, done.stdout) == (
        0,
        quantised["int8"].ask(QUESTION, image=PICTURE, max_new_tokens=4) + "\n",
    )
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("quantize 14 of 14 linears"), done.stderr


@pytest.mark.parametrize("command", [["chat", "out", "-p", "?"], ["serve", "out"]])
def test_a_wrong_kind_and_a_missing_package_are_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(kind: str) -> str:
        monkeypatch.setattr(sys, "argv", ["modalloy", *command, "--quantize", kind])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        return err

    assert refused("fp4") == "error: --quantize fp4: no such kind; known: int8, int4\n"
    monkeypatch.setitem(sys.modules, "torchao", None)
    line = 'error: torchao is not installed, and this needs it; run pip install "modalloy[quantize]"\n'
    assert refused("int8") == line


def test_loading_without_torchao_is_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingPackageError, match=r"torchao is not installed.*modalloy\[quantize\]"):
        load_model(base, quantize="int8")


@needs_torchao
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str, omni: Path, plain: ChatModel) -> None:
    got = logits(load_model(omni, quantize=kind, device="cuda", dtype="bfloat16"), image=PICTURE).cpu().float()
    wanted = logits(plain, image=PICTURE)
    assert float((got - wanted).norm() / wanted.norm()) < 3 * OFF[kind] + 0.02
