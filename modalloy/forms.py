"""What each form of a result holds: all that planning, verifying and describing must know of it. One line a form."""

from dataclasses import dataclass

from modalloy.errors import nearest, shown


@dataclass(frozen=True)
class Form:
    """One form of result. `modalloy.outputs.WRITERS` has, under the same name, what is written beside the weights."""

    name: str
    stem: str  # of the weight files
    is_whole: bool  # it holds every tensor of the base; else low-rank updates, as pairs of factors
    factor: str = ""  # the name of a factor; {stem} of the weight, {side}: A or B
    takes_full_updates: bool = True  # a merged weight that is no low-rank update can be held
    carries_senses: bool = False  # encoders, projectors and the updates of each modality's own tokens
    has_shards: bool = True
    is_model: bool = True  # it can be loaded by itself
    names_modules: bool = False  # a weight goes by the name of transformers' module, not by that in the base's files
    refers_to_base: bool = False  # by name; a base that only this machine would find is copied, if it is a model

    def factors(self, weight: str) -> tuple[str, str]:
        """The names of the two factors of a weight's update, A and B."""
        stem = weight.removesuffix(".weight")
        return self.factor.format(stem=stem, side="A"), self.factor.format(stem=stem, side="B")


AUTO = "auto"  # an adapter of adapters, a full model of full models

FORMS = {
    form.name: form
    for form in (
        Form(
            "adapter",
            "adapter_model",
            is_whole=False,
            factor="base_model.model.{stem}.lora_{side}.weight",
            takes_full_updates=False,
            has_shards=False,  # PEFT wants one file
            is_model=False,
            names_modules=True,
            refers_to_base=True,
        ),
        Form("full", "model", is_whole=True),
        Form(
            "omni",
            "adapter_model",
            is_whole=False,
            factor="{stem}.lora_{side}.default.weight",
            carries_senses=True,
            refers_to_base=True,
        ),
    )
}


def known_form(name: str) -> str:
    """The name, if it is a form's or "auto"; for pydantic, which reports the ValueError.

    Raises:
        ValueError: no form has this name.
    """
    if name not in (AUTO, *FORMS):
        raise ValueError(f"no form {shown(name)}; {nearest(name, [AUTO, *FORMS])}")
    return name
