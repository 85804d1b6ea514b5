"""`--model modalloy` of lmms-eval; imported by lmms-eval only."""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from modalloy.errors import ModalloyError
from modalloy.model import load_model
from modalloy.model.chat import placed_message
from modalloy.names import modality_name


class ModalloyChat(lmms):
    """Answers the messages of tasks, greedily, one at a time. A medium that cannot be read ends the run.

    Args:
        pretrained: folder or hub id, as `load_model` takes it; so are `device` and `dtype`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval gives it to every model
    ) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise ModalloyError(f"questions are asked one at a time, not {batch_size} at once; leave out --batch_size")
        self.chat = load_model(pretrained, device=device, dtype=dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request."""
        answers = []
        for request in requests:
            context, doc_to_messages, options, doc_id, task, split = request.args
            if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
                raise ModalloyError(
                    f"answers are decoded greedily, and {task} asks for {options}; set do_sample: false"
                )
            messages = [
                turn
                for message in doc_to_messages(self.task_dict[task][split][doc_id])
                for turn in _turn(message, self.chat.modalities)
            ]
            answer = self.chat.chat(messages, max_new_tokens=int(options.get("max_new_tokens", 128)))
            answers.append(_until(answer, options.get("until") or ()))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise ModalloyError("likelihoods are not scored through lmms-eval; use `modalloy eval`, or lm-eval for text")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise ModalloyError("tasks of several rounds are not supported; choose another task")


def _turn(message: dict[str, Any], modalities: Sequence[str]) -> list[dict[str, Any]]:
    """A message as our processor takes it; a user's media stand where the text has placeholders."""
    parts = [_part(part) for part in message["content"]]
    if message["role"] != "user":
        return [{**message, "content": parts}]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    media = [(modality_name(part["type"]), part["path"]) for part in parts if part["type"] != "text"]
    placed = placed_message(text, media, modalities)
    return placed if any("inline" in part for part in placed[0]["content"]) else [{**message, "content": parts}]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A content part as our processor takes it: the medium under its modality."""
    kind = part["type"]
    return part if kind == "text" else {"type": kind, "path": part["url"]}


def _until(answer: str, stops: str | Sequence[str]) -> str:
    listed = [stops] if isinstance(stops, str) else stops
    return min((answer.split(stop)[0] for stop in listed if stop), key=len, default=answer).strip()
