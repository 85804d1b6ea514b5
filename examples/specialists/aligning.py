"""Stage 1a: projectors that speak the decoder's language before the decoder is asked, which needs no decoder and so no time."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modalloy.evals.corpus import Clip
from modalloy.senses.projectors.embedding_table import EmbeddingTable
from modalloy.senses.projectors.reader import Reader

Report = Callable[[dict[str, Any]], None]
LOGIT_SCALE = 1 / 0.07
ROUNDS = (0.1, 0.2)  # noise on each feature of speech, round by round
OWN_SHARE = 0.15  # of all files


def name_things(
    projector: EmbeddingTable,
    x: Tensor,
    asked: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    seed: int,
    report: Report,
) -> None:
    """Teach a projector what things are called, and how they move where that is asked too: its heads, on tables of names.

    Features are standardised while it runs, so that one that varies little is learned as soon as others; in the end that is
    folded into the heads.

    Args:
        projector: its tables become the names' embeddings.
        x: (media, tokens, dim), encoder features.
        asked: for each table (media,), the right name's index, and (names, width), the mean embedding of each name. The names
            of the first are drawn in equal shares.
    """
    for table, (_, words) in zip(projector.tables, asked, strict=True):
        table.get_parameter("weight").data.copy_(words)
    first = asked[0][0]
    share = torch.bincount(first, minlength=len(asked[0][1])).float()
    generator = torch.Generator().manual_seed(seed)
    mean, spread = x.flatten(0, 1).mean(0), x.flatten(0, 1).std(0) + 1e-3
    optimizer = torch.optim.AdamW(projector.heads.requires_grad_(True).parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    drop = nn.Dropout(0.5)
    for step in range(steps):
        rows = torch.multinomial(1 / share[first], min(256, len(x)), generator=generator)
        given = drop((x[rows] - mean) / spread)
        loss = told_loss(projector, given, [right[rows] for right, _ in asked])
        advance(optimizer, schedule, loss)
        report({"stage": "1a", "step": step + 1, "loss": round(loss.item(), 4)})
    with torch.no_grad():
        for head in projector.heads:
            head.get_parameter("weight").div_(spread)
            head.get_parameter("bias").sub_(head.get_parameter("weight") @ mean)


def told_loss(projector: EmbeddingTable, x: Tensor, asked: Sequence[Tensor]) -> Tensor:
    """Nats of the right entries by the mean of a medium's tokens and, at a quarter of the weight, by each token."""
    loss = x.new_zeros(())
    for place, right in enumerate(asked):
        told = projector.told(x, place).clamp_min(1e-9)
        each = right[:, None].expand(told.shape[:2])
        loss = loss + nn.functional.nll_loss(told.mean(1).log(), right)
        loss = loss + 0.25 * nn.functional.nll_loss(told.log().flatten(0, 1), each.flatten())
    return loss


def embedded(name: str, table: Tensor, tokenizer: Any) -> Tensor:
    """The mean embedding of a name's tokens, (width,)."""
    found: Tensor = table[tokenizer.encode(f" {name}", add_special_tokens=False)].mean(0)
    return found


def artist_groups(clips: Sequence[Clip]) -> dict[str, str]:
    """The group of each family of artists: its own where it made a good share of the files, else "others"."""
    made = Counter(clip.family for clip in clips)
    return {family: family if count >= OWN_SHARE * len(clips) else "others" for family, count in made.items()}


class Blind(nn.Module):
    """Projects each medium by a projector that was taught without the artists whose medium it is.

    What a projector was taught with it knows too well: a decoder that is trained on such tokens learns to trust them, and fails
    on those of an artist who is new. So the decoder is trained on what each medium would look like if its artist were new.
    """

    def __init__(self, groups: dict[str, str], projectors: dict[str, nn.Module]) -> None:
        super().__init__()
        self.groups, self.taught = groups, nn.ModuleDict(projectors)
        self.families: list[str] = []  # of the media of the next batch

    def forward(self, x: Tensor) -> Tensor:
        """(media, features, dim) → (media, tokens, width)."""
        given = zip(self.families, x, strict=True)
        return torch.cat([self.taught[self.groups[family]](row[None]) for family, row in given])


def read_aloud(
    projector: Reader, x: Tensor, transcripts: Tensor, table: Tensor, steps: int, seed: int, report: Report
) -> None:
    """Make a Q-Former write what is said: its i-th query gives the embedding of the transcript's i-th token.

    The loss is a softmax over the tokens that occur, of the cosine between what a query gives and their embeddings, and the
    squared distance to the right one, so that the decoder meets the embeddings that it knows. Each round of `ROUNDS` warms up
    and cools down on its own.

    Args:
        projector: its table becomes `table`.
        x: (media, features, dim), encoder features.
        transcripts: (media, queries), rows of `table`; what is shorter ends in the token of a line's end.
        table: (tokens, width), embeddings of the tokens that occur.
    """
    projector.table.weight.data.copy_(table)
    directions = nn.functional.normalize(table, dim=-1)
    size = table.pow(2).mean()
    for number, blur in enumerate(ROUNDS):
        generator = torch.Generator().manual_seed(seed + number)
        learned = [p for p in projector.requires_grad_(True).parameters() if p is not projector.table.weight]
        optimizer = torch.optim.AdamW(learned, lr=1.5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
        for step in range(steps):
            rows = torch.randint(len(x), (32,), generator=generator)
            noise = blur * torch.randn(len(rows), *x.shape[1:], generator=generator)
            given = projector.queried(x[rows].float() + noise)
            logits = LOGIT_SCALE * nn.functional.normalize(given, dim=-1) @ directions.T
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), transcripts[rows].flatten())
            loss = loss + 0.5 * (given - table[transcripts[rows]]).pow(2).mean() / size
            advance(optimizer, schedule, loss)
            report({"stage": "1a", "round": number + 1, "step": step + 1, "loss": round(loss.item(), 4)})


@torch.no_grad()
def read_share(projector: Reader, x: Tensor, transcripts: Tensor, table: Tensor) -> tuple[float, float]:
    """Shares of tokens, and of whole utterances, whose nearest embedding is the right one."""
    directions = nn.functional.normalize(table, dim=-1)
    given = torch.cat([projector.queried(part.float()) for part in x.split(64)])
    right = (nn.functional.normalize(given, dim=-1) @ directions.T).argmax(-1) == transcripts
    return right.float().mean().item(), right.all(1).float().mean().item()


def written(texts: Sequence[str], tokenizer: Any, queries: int) -> list[list[int]]:
    """Token ids of transcripts, each filled up with line ends to the number of queries.

    Raises:
        ValueError: a transcript has more tokens than there are queries.
    """
    end = tokenizer.encode("\n", add_special_tokens=False)
    rows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > queries:
            raise ValueError(f"{text!r} has {len(ids)} tokens; the projector writes {queries}")
        rows.append(ids + end * (queries - len(ids)))
    return rows


def advance(optimizer: torch.optim.Optimizer, schedule: Any, loss: Tensor) -> None:
    """One step of an optimiser and its schedule."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
