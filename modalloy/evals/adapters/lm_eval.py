"""A merged model's text path as a model of lm-eval (EleutherAI's harness), for the text suites that it has.

    import lm_eval, modalloy
    from modalloy.evals.adapters.lm_eval import lm_eval_model
    lm_eval.simple_evaluate(lm_eval_model(modalloy.load_model("out")), tasks=["mmlu"], num_fewshot=5)

Needs `pip install 'modalloy[evals]'`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modalloy.errors import ModalloyError
from modalloy.model import ChatModel
from modalloy.model.rendering import chosen_template, rendered_by

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ModalloyError("lm-eval is not installed; run `pip install 'modalloy[evals]'`") from error


def lm_eval_model(chat: ChatModel) -> "TextPath":
    """What `lm_eval.simple_evaluate(model=…)` takes."""
    return TextPath(chat)


class TextPath(TemplateLM):
    """Scores and continues text, greedily, one request at a time. A text that is too long is refused, never cut."""

    def __init__(self, chat: ChatModel) -> None:
        super().__init__()
        self.chat = chat
        self.tokenizer = chat.processor.tokenizer
        self.max_length = int(chat.model.config.text_config.max_position_embeddings)
        self._known: tuple[list[int], int, Tensor] | None = None

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests is kept under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without `add_generation_prompt`, its last message is left open."""
        processor = self.chat.processor
        return rendered_by(
            chosen_template(processor.chat_template, processor.where),
            chat_history,
            self.tokenizer,
            processor.where,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with what the tokenizer puts before a text unless the text has it already."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the model's length."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(score for score, _ in scored))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first stop string.

        Raises:
            ModalloyError: a task asks for sampling, or for more tokens than there is room for.
        """
        return [self._continue(context, dict(options)) for context, options in (request.args for request in requests)]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until, limit = options.get("until") or [], int(options.get("max_gen_toks", 256))
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise ModalloyError(f"answers are decoded greedily, and the task asks for {options}; set do_sample: false")
        ids = self.tok_encode(context)
        self._check_length(len(ids) + limit)
        stops = [until] if isinstance(until, str) else list(until)
        output = self.chat.model.generate(
            input_ids=torch.tensor([ids], device=self.chat.model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.chat.model.device),
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(self.chat.ends.tokens) or None,
            trust_remote_code=False,
            pad_token_id=self.chat.processor.padding_id,
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
        )
        text = str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of each (…, context, continuation) in token ids."""
        found = []
        for _, context, continuation in requests:
            logits = self._logits([*context, *continuation[:-1]], len(continuation))
            ids = torch.tensor(continuation, device=logits.device)
            picked = logits.log_softmax(-1).gather(-1, ids[:, None])
            found.append((float(picked.sum()), bool((logits.argmax(-1) == ids).all())))
        return found

    def _logits(self, ids: list[int], rows: int) -> Tensor:
        """Logits after the last `rows` tokens. One-token options of a question share the question's."""
        if self._known is None or self._known[:2] != (ids, rows):
            self._check_length(len(ids))
            inputs = torch.tensor([ids], device=self.chat.model.device)
            output = self.chat.model(input_ids=inputs, logits_to_keep=rows, use_cache=False)
            self._known = ids, rows, output.logits[0].float()
        return self._known[2]

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ModalloyError(
                f"a request takes {length} tokens, more than the model's {self.max_length}; give fewer shots"
            )
