"""A conversation to the prompt that a chat template makes of it, in a child process within limits."""

from typing import Any

from modalloy.errors import CheckpointError
from modalloy.model.bounded import render

END = "\ue008"  # ends a message that is to be continued

Message = dict[str, Any]  # {"role": "user", "content": "text" or a list of parts}; a part is {"type": …, …}


def chosen_template(template: Any, where: str) -> str:
    """The chat template itself, of one or of several that have names.

    Raises:
        CheckpointError: there is none, or none is called default.
    """
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{where}: its tokenizer has no chat template; add chat_template.jinja of the published model, or ask another"
        )
    return template


def rendered_by(template: str, messages: list[Message], tokenizer: Any, where: str, **options: Any) -> str:
    """The prompt of a conversation as transformers renders it, but in a child process within limits.

    `continue_final_message` leaves the last message open. Other options are the template's own variables.

    Raises:
        CheckpointError: the template refuses the conversation, is damaged, renders nothing, or goes past a limit.
    """
    from transformers.utils import get_json_schema

    open_ended = options.pop("continue_final_message", False)
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if open_ended:
        turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']}{END} "}
    if tools := options.get("tools"):
        options["tools"] = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    variables = {
        "messages": turns,
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
        **tokenizer.special_tokens_map,
        **options,
    }
    text = render(template, _plain(variables), where)
    if open_ended:
        if END not in text:
            raise CheckpointError(f"{where}: its chat template leaves out the last message; it cannot be continued")
        end = text.rindex(END)
        trims = text[end + 1 : end + 2] != " "  # then transformers takes off the message's own last spaces, too
        text = text[:end].rstrip() if trims else text[:end]
    return text


def _plain(value: Any) -> Any:
    """A value as the child gets it: of JSON's types only; another is its type's name."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
