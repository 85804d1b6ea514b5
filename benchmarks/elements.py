"""Fine-tunes the built-in decoder on the chemical elements: a donor with a skill of its own for `across.py`.

A plain Llama that sees nothing, all of whose linear weights were trained, without adapters; or with --rank a LoRA of PEFT on
them, for `search.py`. It learns "What is the atomic number of iron?" in three wordings; it is tested in another one, so that
what is measured is what it knows, not what it was asked. Takes minutes on two CPU cores.

    python benchmarks/elements.py --out build/references/elements
    python benchmarks/elements.py --rank 8 --out build/references/elements-lora
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from modalloy import builtin
from modalloy.evals.benchmark import Sample
from modalloy.storage.locate import locate

NAMES: list[str] = re.findall(
    r"\w+",
    "hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminium silicon phosphorus "
    "sulfur chlorine argon potassium calcium scandium titanium vanadium chromium manganese iron cobalt nickel copper zinc gallium "
    "germanium arsenic selenium bromine krypton rubidium strontium yttrium zirconium niobium molybdenum technetium ruthenium "
    "rhodium palladium silver cadmium indium tin antimony tellurium iodine xenon caesium barium lanthanum cerium praseodymium "
    "neodymium promethium samarium europium gadolinium terbium dysprosium holmium erbium thulium ytterbium lutetium hafnium "
    "tantalum tungsten rhenium osmium iridium platinum gold mercury thallium lead bismuth polonium astatine radon francium radium "
    "actinium thorium protactinium uranium neptunium plutonium americium curium berkelium californium einsteinium fermium "
    "mendelevium nobelium lawrencium rutherfordium dubnium seaborgium bohrium hassium meitnerium darmstadtium roentgenium "
    "copernicium nihonium flerovium moscovium livermorium tennessine oganesson",
)
WORDINGS = (
    "What is the atomic number of {}?",
    "Which place does {} have in the periodic table?",
    "What number is the element {}?",
)
TEMPLATE = builtin.specialist("image") / "chat_template.jinja"
TESTED = "How many protons does an atom of {} have?"
EPOCHS, BATCH, RATE, LORA_RATE = 8, 24, 3e-4, 2e-3


def samples() -> list[Sample]:
    """A question per element, with three wrong numbers within six of the right one."""
    found = []
    for number, name in enumerate(NAMES, 1):
        draw = random.Random(name)
        near = [other for other in range(max(1, number - 6), number + 7) if other != number]
        options = [str(option) for option in draw.sample(near, 3)]
        options.insert(draw.randrange(4), str(number))
        found.append(
            Sample(
                id=f"elements {number}",
                text=TESTED.format(name),
                golds=(str(number),),
                choices=tuple(options),
                options=tuple(options),
                group={"cell": "elements"},
                cluster=(name,),
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, as transformers writes it")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rank", type=int, help="train a LoRA of this rank instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = locate(builtin.BASE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")  # the specialists'
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if args.rank:
        lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
        adapted: Any = get_peft_model(model, lora)
    else:
        adapted = model.requires_grad_(False)
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.endswith("_proj.weight"))
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    rate = LORA_RATE if args.rank else RATE
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    texts = [(wording.format(name), str(number)) for number, name in enumerate(NAMES, 1) for wording in WORDINGS]
    steps = args.epochs * -(-len(texts) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(batches(texts, args.epochs)):
        loss = answers_loss(model, tokenizer, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 5 == 0:
            print(f"step {step} of {steps}: {loss.item():.3f}", flush=True)
    if args.rank:
        adapted.save_pretrained(args.out)
        return
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(args.out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / file, args.out / file)
    shutil.copyfile(TEMPLATE, args.out / TEMPLATE.name)
    config = json.loads((args.out / "config.json").read_text())
    (args.out / "config.json").write_text(json.dumps(config | {"_name_or_path": model.config._name_or_path}, indent=2))


def batches(texts: list[tuple[str, str]], epochs: int) -> Iterator[list[tuple[str, str]]]:
    """The questions and answers in another order every epoch."""
    for epoch in range(epochs):
        order = random.Random(epoch).sample(texts, len(texts))
        yield from (order[start : start + BATCH] for start in range(0, len(order), BATCH))


def answers_loss(model: Any, tokenizer: Any, batch: list[tuple[str, str]]) -> Tensor:
    """Cross-entropy of the answers' tokens, their end included."""
    rows, answers = [], []
    for question, answer in batch:
        turn = [{"role": "user", "content": question}]
        rows.append(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        answers.append(answer + tokenizer.eos_token)
    prompts = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in rows]
    targets = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    length = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
    ids = torch.full((len(batch), length), tokenizer.eos_token_id)
    labels = torch.full((len(batch), length), -100)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        whole = torch.tensor(prompt + target)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = torch.tensor(target)
    wanted = labels[:, 1:] >= 0
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


if __name__ == "__main__":
    main()
